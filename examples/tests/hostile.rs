//! Attacks on a running training: `gpt` runs as two processes over TCP, and unauthenticated peers (strangers) flood
//! their ports. This is a separate test binary because it measures time.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use programs::{Folder, GPT, launcher};
use serde_json::Value;
use shardflow::job::secret::Secret;
use shardflow::job::transport::handshake::{Dialler, GREETING_BYTES, HandshakeError, Refusal};
use shardflow::job::transport::{Address, Hello, Purpose, SessionId, TransportError, connect};

#[path = "support/programs.rs"]
mod programs;

const SECRET: &str = "a secret of this test";
/// Time limit of the run, much longer than the run takes.
const TIMEOUT: Duration = Duration::from_secs(300);
const STEPS: usize = 2000;
const MODEL: &str = "--layers 4 --heads 4 --width 64 --context 32 --batch 8 --sample 0 --threads-per-device 1 --data text \
                     --micro-batches 2 --mesh data=2,stage=2 --steps 2000";
/// Number of connections that are held open during an attack.
const STRANGERS: usize = 500;
/// Pause between two rounds of the attacking thread. It limits the attack to a few hundred rounds per second. A faster
/// attack would slow the training merely by using up the processors.
const PAUSE: Duration = Duration::from_millis(2);
/// Number of steps in a window, the unit of measurement. Windows with and without an attack alternate.
const WINDOW: usize = 25;
/// Number of pairs of windows, one with and one without an attack, that are compared.
const PAIRS: usize = 4;
const RATIO_MAX: f64 = 1.2;
const GROWTH_KB_MAX: usize = 16 << 10;

/// A folder with a text, and the launcher that runs there. Dropping it ends the processes and removes the folder.
struct Run {
    folder: Folder,
    launcher: Option<Child>,
}

impl Drop for Run {
    fn drop(&mut self) {
        // Ending the launcher also ends its processes.
        if let Some(child) = &mut self.launcher {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Run {
    fn new() -> Self {
        Self { folder: Folder::new("hostile"), launcher: None }
    }

    /// Starts `gpt` in one process, or under the launcher if `launch` has flags.
    fn start(&self, launch: &[&str], log: &str) -> Child {
        let mut command = Command::new(if launch.is_empty() { GPT.into() } else { launcher() });
        if !launch.is_empty() {
            command.args(["launch"]).args(launch).args(["--", GPT]);
        }
        command.args(MODEL.split_whitespace()).args(["--log-json", log]).current_dir(self.folder.path());
        command.env("SHARDFLOW_SECRET", SECRET).env("SHARDFLOW_TRANSPORT", "tcp");
        let errors = File::create(self.folder.path().join("errors")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().expect("a program that was built")
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.folder.path().join("errors")).unwrap_or_default()
    }

    /// Returns the loss bits and the seconds of each step in the log so far.
    fn steps(&self, log: &str) -> Vec<(u64, f64)> {
        let step = |r: Value| Some((r["loss"].as_f64()?.to_bits(), r["step_seconds"].as_f64()?));
        self.folder.records(log).into_iter().filter_map(step).collect()
    }

    /// Waits until this number of steps is logged.
    fn until(&self, log: &str, steps: usize, deadline: Instant) -> Vec<(u64, f64)> {
        loop {
            let done = self.steps(log);
            if done.len() >= steps {
                return done;
            }
            assert!(Instant::now() < deadline, "{} of {steps} steps logged in time:\n{}", done.len(), self.errors());
            pause(Duration::from_millis(20));
        }
    }
}

/// Waits for a fixed time, because there is no event to wait for.
fn pause(time: Duration) {
    let (_sender, receiver) = channel::<()>();
    let _ = receiver.recv_timeout(time);
}

/// Returns the resident memory in kB.
fn resident_kb(pid: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux reports VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Returns the ports of this node that the process listens on. `protocol` is `tcp` or `udp`.
fn ports(pid: u32, protocol: &str) -> BTreeSet<u16> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    let links = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()?.to_str().map(String::from));
    let sockets: BTreeSet<String> =
        links.filter_map(|link| Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.into())).collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/{protocol}")).expect("Linux has it");
    // A listening TCP socket is in state 0A, an unconnected UDP socket in state 07.
    let state = if protocol == "tcp" { "0A" } else { "07" };
    let port = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_own = *fields.get(3)? == state && sockets.contains(*fields.get(9)?);
        is_own.then(|| u16::from_str_radix(fields[1].split_once(':')?.1, 16).ok()).flatten()
    };
    table.lines().filter_map(port).collect()
}

fn at(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Returns a message of a handshake, prefixed with its length.
fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_le_bytes()[..], message].concat()
}

fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_le_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn hello() -> Hello {
    let purpose = Purpose::Registers { index: 0 };
    Hello { session: SessionId([7; 16]), epoch: 0, from: 1, to: 0, sealed: true, purpose }
}

/// Runs a whole handshake as a peer that knows the secret. Returns the bytes that the peer sent, and the result.
fn handshake(port: u16, secret: &Secret) -> std::io::Result<(Vec<u8>, Result<(), HandshakeError>)> {
    let mut stream = TcpStream::connect(at(port))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let (dialler, greeting) = Dialler::new(secret).expect("random numbers");
    stream.write_all(&framed(&greeting))?;
    let reply = read_message(&mut stream)?;
    let (greeted, message) = dialler.introduce(&hello(), &reply).expect("a valid greeting");
    stream.write_all(&framed(&message))?;
    let verdict = read_message(&mut stream)?;
    Ok(([framed(&greeting), framed(&message)].concat(), greeted.finish(&verdict).map(drop)))
}

/// Checks before the flood that each kind of stranger gets its own type of refusal. Returns a recorded handshake for a
/// replay.
fn check_refusals(port: u16, secret: &Secret) -> Vec<u8> {
    let wrong = Secret::new("a secret of another job").unwrap();
    let address = Address::Tcp(at(port).to_string());
    let denied = connect(&address, &wrong, &hello(), Instant::now() + Duration::from_secs(10)).unwrap_err();
    assert!(matches!(denied, TransportError::Handshake { cause: HandshakeError::Denied, .. }), "{denied}");
    // A peer of another session that knows the secret receives the reason for the refusal.
    let (recorded, verdict) = handshake(port, secret).expect("an answer");
    let refusal = verdict.unwrap_err();
    let session =
        |r: &Refusal| matches!(r, Refusal::Session { .. } | Refusal::WrongProcess { .. } | Refusal::Process { .. });
    assert!(matches!(&refusal, HandshakeError::Refused(r) if session(r)), "{refusal}");
    // Each connection has a new ephemeral key, so the hello in the replayed bytes is invalid.
    let mut stream = TcpStream::connect(at(port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(&recorded).unwrap();
    read_message(&mut stream).expect("its greeting");
    assert!(read_message(&mut stream).is_err(), "a replayed handshake received a verdict");
    recorded
}

/// Returns the bytes that stranger (unauthenticated peer) `number` sends before it falls silent: nothing, a part of a
/// message, garbage, a message that is too long, or a replay.
fn opening(number: usize, recorded: &[u8]) -> Vec<u8> {
    let garbage = |bytes: usize| (0..bytes).map(|i| (i * number % 251) as u8).collect::<Vec<_>>();
    // The greeting of the recorded handshake.
    let whole = &recorded[..2 + GREETING_BYTES];
    match number % 8 {
        0 => vec![],
        1 => whole[..1].to_vec(),
        2 => whole.to_vec(),
        3 => [whole, &1024u16.to_le_bytes(), &garbage(1023)].concat(),
        4 => garbage(64),
        5 => [&u16::MAX.to_le_bytes()[..], &garbage(4096)].concat(),
        6 => [whole, &90u16.to_le_bytes(), &garbage(90)].concat(),
        _ => recorded.to_vec(),
    }
}

/// Attacks all ports while it is enabled.
struct Attack {
    enabled: AtomicBool,
    tcp: Vec<u16>,
    udp: Vec<u16>,
    recorded: Vec<u8>,
    connections: AtomicUsize,
    datagrams: AtomicUsize,
}

impl Attack {
    fn run(&self, end: &Receiver<()>) {
        let socket = UdpSocket::bind(at(0)).unwrap();
        let wrong = Secret::new("a secret of another job").unwrap();
        let mut strangers = Vec::new();
        for number in 0.. {
            // The test ends the attack by dropping the sender.
            if end.recv_timeout(PAUSE) == Err(std::sync::mpsc::RecvTimeoutError::Disconnected) {
                return;
            }
            if !self.enabled.load(Ordering::Relaxed) {
                strangers.clear();
                continue;
            }
            let tcp = self.tcp[number % self.tcp.len()];
            // The first round opens all connections. Each later round replaces an older connection by a new one.
            let opened = STRANGERS.saturating_sub(strangers.len()).max(1);
            for stranger in number..number + opened {
                let Ok(mut stream) = TcpStream::connect(at(tcp)) else { continue };
                // Ignore errors, because the listener may have closed the connection already.
                let _ = stream.write_all(&opening(stranger, &self.recorded));
                self.connections.fetch_add(1, Ordering::Relaxed);
                if strangers.len() < STRANGERS {
                    strangers.push(stream);
                } else {
                    strangers[stranger % STRANGERS] = stream;
                }
            }
            if number % 16 == 0 {
                let address = Address::Tcp(at(tcp).to_string());
                let accepted = connect(&address, &wrong, &hello(), Instant::now());
                assert!(accepted.is_err(), "a wrong secret was accepted");
            }
            for datagram in 0..4 {
                let bytes: Vec<u8> = match datagram {
                    0 => Vec::new(),
                    // This datagram begins like a heartbeat and has the right length, but its MAC is invalid.
                    1 => [&b"SFHB\x01\0\0\0"[..], &[number as u8; 60]].concat(),
                    2 => vec![number as u8; 68],
                    _ => vec![0; 60_000],
                };
                let sent = socket.send_to(&bytes, at(self.udp[number % self.udp.len()]));
                self.datagrams.fetch_add(usize::from(sent.is_ok()), Ordering::Relaxed);
            }
        }
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Returns the median step time under attack divided by the median step time without attack. The windows alternate.
fn ratio(run: &Run, attack: &Attack, deadline: Instant) -> f64 {
    let (mut calm, mut attacked) = (Vec::new(), Vec::new());
    for window in 0..2 * PAIRS {
        let enabled = window % 2 == 1;
        attack.enabled.store(enabled, Ordering::Relaxed);
        // The step that runs now belongs to neither window.
        let begin = run.steps("many").len() + 1;
        let steps = run.until("many", begin + WINDOW, deadline);
        let seconds = steps[begin..begin + WINDOW].iter().map(|step| step.1);
        if enabled { attacked.extend(seconds) } else { calm.extend(seconds) }
    }
    attack.enabled.store(false, Ordering::Relaxed);
    let (calm, attacked) = (median(calm), median(attacked));
    println!("step: {:.2} ms, {:.2} ms under attack", calm * 1e3, attacked * 1e3);
    attacked / calm
}

#[test]
fn unauthenticated_peers_slow_a_training_little_and_change_no_loss() {
    let mut run = Run::new();
    let deadline = Instant::now() + TIMEOUT;
    assert!(run.start(&[], "one").wait().unwrap().success(), "{}", run.errors());
    let free = TcpListener::bind(at(0)).unwrap().local_addr().unwrap();
    run.launcher = Some(run.start(&["--nproc-per-node=2", &format!("--rdzv-endpoint={free}")], "many"));
    run.until("many", 10, deadline);

    let workers = run.folder.workers();
    assert_eq!(workers.len(), 2, "{}", run.errors());
    let all = |protocol| workers.iter().flat_map(|pid| ports(*pid, protocol)).collect::<Vec<_>>();
    let (tcp, udp) = (all("tcp"), all("udp"));
    assert!(tcp.len() >= 2 && udp.len() >= 2, "each worker has a TCP and a UDP port: {tcp:?} {udp:?}");
    let secret = Secret::new(SECRET).unwrap();
    let recorded = tcp.iter().map(|port| check_refusals(*port, &secret)).next_back().unwrap();

    let resident = || workers.iter().map(|pid| resident_kb(*pid)).collect::<Vec<_>>();
    let before = resident();
    let (connections, datagrams) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let attack = Attack { enabled: AtomicBool::new(false), tcp, udp, recorded, connections, datagrams };
    let best = thread::scope(|scope| {
        let (_running, end) = channel::<()>();
        let attack = &attack;
        scope.spawn(move || attack.run(&end));
        // Other programs also use this machine, so take the minimum of several measurements as the cost of the attack.
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            best = best.min(ratio(&run, attack, deadline));
            if best < RATIO_MAX {
                break;
            }
        }
        best
    });
    println!("{} connections, {} datagrams", attack.connections.into_inner(), attack.datagrams.into_inner());
    assert!(best < RATIO_MAX, "steps take {best:.2} times as long under attack");
    for (after, before) in resident().into_iter().zip(before) {
        println!("resident memory: {before} kB before the attacks, {after} kB after them");
        assert!(after.saturating_sub(before) < GROWTH_KB_MAX, "resident memory grew from {before} to {after} kB");
    }

    let ended = run.launcher.as_mut().expect("it was started").wait().unwrap();
    assert!(ended.success(), "{ended}:\n{}", run.errors());
    let losses = |log| run.steps(log).into_iter().map(|step| step.0).collect::<Vec<_>>();
    assert_eq!(losses("many").len(), STEPS);
    assert!(losses("many") == losses("one"), "losses differ from those of a run without attack");
}
