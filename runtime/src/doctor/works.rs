//! Tries the operations that the processes of a job use to communicate.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::fs::MemfdFlags;

use super::finding::{Finding, FindingStatus, not_ok, ok};
use shardflow_job::env::{DERIVED_PORTS, Endpoint, PORT_DEFAULT};
use shardflow_job::machine::temporary_folder;

pub(super) fn examine() -> Vec<Finding> {
    let sockets = "make the temporary folder writable, or set TMPDIR to the short path of a writable folder";
    vec![
        finding("loopback", loopback(), "bring up the interface: ip link set lo up"),
        finding("unix sockets", unix_sockets(), sockets),
        finding("memfd", memfd(), "allow memfd_create in the container's seccomp profile, and mount /proc"),
        default_port(),
        derived_ports(),
    ]
}

fn finding(name: &'static str, result: io::Result<()>, hint: &str) -> Finding {
    match result {
        Ok(()) => ok(name, "works"),
        Err(error) => not_ok(name, FindingStatus::Broken, error.to_string(), hint),
    }
}

/// Sends one byte and receives it. Both ends are in this thread; the kernel buffers the byte.
fn exchange(mut from: impl Write, mut to: impl Read) -> io::Result<()> {
    from.write_all(b"x")?;
    to.read_exact(&mut [0])
}

fn loopback() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let from = TcpStream::connect(listener.local_addr()?)?;
    exchange(from, listener.accept()?.0)
}

fn unix_sockets() -> io::Result<()> {
    let folder = temporary_folder("shardflow-doctor-").map_err(|error| io::Error::other(error.to_string()))?;
    let path = folder.path().join("meet-0");
    let unusable = |what: &str| io::Error::other(format!("{}: {what}", path.display()));
    let text = path.to_str().ok_or_else(|| unusable("not UTF-8, and processes exchange the socket's path as text"))?;
    Endpoint::parse(&format!("unix:{text}")).map_err(|expected| unusable(&format!("expected {expected}")))?;
    let listener = UnixListener::bind(&path)?;
    let from = UnixStream::connect(&path)?;
    exchange(from, listener.accept()?.0)
}

fn memfd() -> io::Result<()> {
    let mut file = File::from(rustix::fs::memfd_create("shardflow-doctor", MemfdFlags::CLOEXEC)?);
    file.set_len(4096)?;
    file.write_all(b"x")
}

fn default_port() -> Finding {
    let hint = "if the job has several nodes, choose another port with --rdzv-endpoint HOST:PORT";
    match TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT_DEFAULT)) {
        Ok(_) => ok("default port", format!("{PORT_DEFAULT} is free")),
        Err(error) => not_ok("default port", FindingStatus::Poor, format!("{PORT_DEFAULT}: {error}"), hint),
    }
}

/// Checks that the ports of jobs under Slurm and OpenMPI are not ephemeral ports.
fn derived_ports() -> Finding {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = range.split_whitespace().map_while(|word| word.parse::<u16>().ok());
    let value = format!("{} to {} for jobs of Slurm and OpenMPI", DERIVED_PORTS.start, DERIVED_PORTS.end - 1);
    match (numbers.next(), numbers.next()) {
        (Some(low), Some(high)) if low < DERIVED_PORTS.end && high >= DERIVED_PORTS.start => {
            let value = format!("{value}; the kernel's ephemeral ports are {low} to {high}");
            let hint = "run `sysctl net.ipv4.ip_local_port_range='32768 60999'`, or set SHARDFLOW_ENDPOINT";
            not_ok("derived ports", FindingStatus::Poor, value, hint)
        }
        _ => ok("derived ports", value),
    }
}
