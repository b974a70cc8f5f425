//! A client for the servers of a running job, for `shardflow status` and `shardflow explain-hang`.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::status::Status;
use crate::session::observer::Observer;
use shardflow_job::transport::resolve;

/// Time-out of each connect, write and read.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A process that made progress within this time is not stuck.
const PROGRESS_SECONDS: f64 = 1.0;
const RESPONSE_BYTES_MAX: u64 = 16 << 20;

/// Why a job cannot be queried.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain the fields")]
pub enum ClientError {
    #[error("nothing is served at {address}: {source}; start the job with --listen {address}")]
    Unreachable { address: SocketAddr, source: io::Error },
    #[error("{address} does not respond within {} s: {source}; its process may be suspended, or its machine overloaded", TIMEOUT.as_secs())]
    NoResponse { address: SocketAddr, source: io::Error },
    /// The server is another program, or returns an error.
    #[error("{address}: unexpected response to {path}: {response}")]
    BadResponse { address: SocketAddr, path: &'static str, response: String },
}

/// Why a process makes no progress.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HangReport {
    /// Rank of the process.
    pub process: u32,
    /// Number of processes.
    pub processes: u32,
    /// Time since the last progress.
    pub idle_seconds: f64,
    /// Whether a step is running.
    pub is_under_way: bool,
    /// The root cause of all waits; `None` between steps, and while there is progress.
    pub cause: Option<String>,
    /// Other processes in which the cause may lie.
    pub elsewhere: Vec<u32>,
    /// Chain of waits down to the cause. Each entry has the waiting action, and what this action waits for.
    pub chain: Vec<(String, String)>,
}

impl HangReport {
    pub(super) fn of(observer: &Observer) -> Option<Self> {
        let (spec, process_map, control) = (&observer.plan().spec, observer.process_map(), observer.control());
        let (idle_seconds, hang) = (control.idle_ns()? as f64 * 1e-9, control.hang());
        Some(Self {
            process: process_map.process,
            processes: process_map.processes,
            idle_seconds,
            is_under_way: control.is_under_way(),
            cause: hang.as_ref().map(|hang| hang.cause(spec)),
            elsewhere: hang.as_ref().map_or_else(Vec::new, |hang| hang.processes()),
            chain: hang.map_or_else(Vec::new, |hang| hang.steps(spec)),
        })
    }
}

impl fmt::Display for HangReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rank {} of {}: last progress {:.1} s ago", self.process, self.processes, self.idle_seconds)?;
        if self.cause.is_some() && self.idle_seconds < PROGRESS_SECONDS {
            writeln!(f, "  there is progress; the waits at this instant:")?;
        }
        for (waiting, awaited) in &self.chain {
            writeln!(f, "  {waiting}\n    waits for {awaited}")?;
        }
        match &self.cause {
            Some(cause) => writeln!(f, "  {cause}"),
            None if self.is_under_way => writeln!(f, "  a step is running and makes progress"),
            None => writeln!(f, "  no step is running"),
        }?;
        match self.elsewhere.as_slice() {
            [] | [_] => Ok(()),
            several => {
                let ranks = several.iter().map(|rank| format!("rank {rank}")).collect::<Vec<_>>();
                writeln!(f, "  one of these ranks is late; this rank cannot determine which one: {}", ranks.join(", "))
            }
        }
    }
}

/// Queries the status of the session at an address.
pub fn status(address: SocketAddr) -> Result<Status, ClientError> {
    request(address, "/status")
}

/// Hang reports of all processes in which the cause may lie.
#[derive(Debug)]
pub struct HangExplanation {
    /// The reports in the order of the queries: the first process, then those in which the cause may lie.
    pub reports: Vec<HangReport>,
    /// Processes that cannot be queried although others wait for them, with the errors of the queries.
    pub unreachable: Vec<(u32, ClientError)>,
}

impl fmt::Display for HangExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reports.iter().try_for_each(|report| write!(f, "{report}"))?;
        self.unreachable.iter().try_for_each(|(rank, error)| writeln!(f, "rank {rank} cannot be queried: {error}"))
    }
}

/// Queries the session at an address, and all processes in which the cause of its waits may lie. The port of another
/// process is `first`'s port plus the difference of their ranks.
///
/// # Errors
/// If no server responds at the first address.
pub fn explain_hang(first: SocketAddr) -> Result<HangExplanation, ClientError> {
    let own: HangReport = request(first, "/hang")?;
    let (mut known, process) = (BTreeSet::from([own.process]), own.process);
    let mut explanation = HangExplanation { reports: vec![own], unreachable: Vec::new() };
    let mut visited = 0;
    while let Some(report) = explanation.reports.get(visited) {
        visited += 1;
        for next in report.elsewhere.clone().into_iter().filter(|next| known.insert(*next)) {
            match query_process(first, process, next) {
                Ok(report) => explanation.reports.push(report),
                Err(error) => explanation.unreachable.push((next, error)),
            }
        }
    }
    Ok(explanation)
}

fn query_process(first: SocketAddr, own: u32, process: u32) -> Result<HangReport, ClientError> {
    let port = i64::from(first.port()) + i64::from(process) - i64::from(own);
    // If the port is out of range, use port 0: a connection to port 0 fails.
    let address = SocketAddr::new(first.ip(), port.try_into().unwrap_or(0));
    let report: HangReport = request(address, "/hang")?;
    if report.process == process {
        return Ok(report);
    }
    let response = format!("this is rank {}, not rank {process}", report.process);
    Err(ClientError::BadResponse { address, path: "/hang", response })
}

fn request<T: DeserializeOwned>(address: SocketAddr, path: &'static str) -> Result<T, ClientError> {
    let text = get(address, path).map_err(|source| failed(address, source))?;
    let wrong = |response: String| ClientError::BadResponse { address, path, response };
    let first = text.lines().next().unwrap_or("nothing").to_owned();
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body).filter(|_| first.contains(" 200 "));
    let body = body.ok_or_else(|| wrong(first))?;
    serde_json::from_str(body).map_err(|error| wrong(error.to_string()))
}

/// Default address of a server.
pub const ADDRESS: &str = "127.0.0.1:9400";

/// Parses an address with a number or a name: `127.0.0.1:9400`, `localhost:9400`, `[fe80::1%eth0]:9400`.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let found = resolve(text).map_err(|error| {
        let is_bare = text.parse::<Ipv6Addr>().is_ok() || (!text.starts_with('[') && text.matches(':').count() > 1);
        let brackets = if is_bare { ", with brackets around an IPv6 address" } else { "" };
        format!("{error}; expected ADDRESS:PORT{brackets}")
    })?;
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| "the name has no address".to_owned())
}

fn failed(address: SocketAddr, source: io::Error) -> ClientError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::NoResponse { address, source },
        _ => ClientError::Unreachable { address, source },
    }
}

/// Uses HTTP 1.0, which has no chunked responses and closes the connection after a response.
fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut text = String::new();
    stream.take(RESPONSE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn addresses_are_accepted_by_number_and_by_name() {
        let local = "127.0.0.1:9400".parse().expect("an address");
        assert_eq!([address("127.0.0.1:9400"), address("localhost:9400")], [Ok(local), Ok(local)]);
        for wrong in ["9400", "127.0.0.1", "127.0.0.1:99999", ""] {
            assert!(address(wrong).is_err_and(|error| error.ends_with("expected ADDRESS:PORT")), "{wrong}");
        }
        for wrong in ["::1", "fe80::1", "::1:99999"] {
            let expected = "expected ADDRESS:PORT, with brackets around an IPv6 address";
            assert!(address(wrong).is_err_and(|error| error.ends_with(expected)), "{wrong}");
        }
    }

    #[test]
    fn addresses_have_zones() {
        assert_eq!(address("[::1]:9400"), Ok("[::1]:9400".parse().expect("an address")));
        assert_eq!(address("[fe80::1%3]:9400"), Ok("[fe80::1%3]:9400".parse().expect("an address")));
        let Ok(SocketAddr::V6(named)) = address("[fe80::1%lo]:9400") else { panic!("the loopback interface exists") };
        assert!(named.scope_id() > 0);
        assert!(address("[fe80::1%no-such]:9400").is_err_and(|error| error.contains("interface no-such")));
    }

    #[test]
    fn a_silent_server_is_distinguished_from_a_missing_one() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let mut stream = TcpStream::connect(address).expect("a listener");
        stream.set_read_timeout(Some(Duration::from_millis(1))).expect("a time-out");
        let silent = stream.read(&mut [0]).expect_err("nobody writes");
        let error = failed(address, silent).to_string();
        assert!(
            error.contains("does not respond within 10 s") && error.contains("its process may be suspended"),
            "{error}"
        );
        drop(listener);
        let error = request::<u32>(address, "/status").expect_err("nobody listens").to_string();
        assert!(error.contains("nothing is served") && error.contains("--listen"), "{error}");
    }

    fn consecutive_listeners(count: u16) -> Vec<TcpListener> {
        loop {
            let first = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = first.local_addr().expect("bound").port();
            let more = (1..count).map(|n| TcpListener::bind(("127.0.0.1", port.checked_add(n)?)).ok());
            if let Some(more) = more.collect::<Option<Vec<_>>>() {
                return std::iter::once(first).chain(more).collect();
            }
        }
    }

    fn serve(listener: TcpListener, report: HangReport) {
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let request = io::BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            assert!(request.count() > 0);
            let body = serde_json::to_string(&report).expect("JSON");
            write!(stream, "HTTP/1.0 200 OK\r\n\r\n{body}").expect("it reads");
        });
    }

    fn report(process: u32, cause: &str, elsewhere: Vec<u32>) -> HangReport {
        let cause = Some(cause.to_owned());
        HangReport { process, processes: 4, idle_seconds: 9.0, is_under_way: true, cause, elsewhere, chain: Vec::new() }
    }

    #[test]
    fn each_process_that_may_have_the_cause_is_queried_once() {
        let mut listeners = consecutive_listeners(4);
        let first = listeners[1].local_addr().expect("bound");
        // Rank 0 has no server.
        drop(listeners.remove(0));
        let waits = |process, elsewhere| report(process, "a rank is waited for", elsewhere);
        let late = report(3, "device 3 compute forward has not ended", Vec::new());
        let reports = [waits(1, vec![0, 2, 3]), waits(2, vec![0, 1, 3]), late];
        listeners.into_iter().zip(reports.clone()).for_each(|(listener, report)| serve(listener, report));
        let HangExplanation { reports: received, unreachable } = explain_hang(first).expect("a response");
        assert_eq!(received, reports);
        assert!(matches!(&unreachable[..], [(0, ClientError::Unreachable { .. })]), "{unreachable:?}");
        assert!(received[0].to_string().contains("cannot determine which one: rank 0, rank 2, rank 3"));
        let active = HangReport { idle_seconds: 0.1, ..received[0].clone() };
        let text = "there is progress";
        assert!(active.to_string().contains(text) && !received[0].to_string().contains(text), "{active}");
    }
}
