//! Asks the servers of a running job, for `shardflow status` and `shardflow explain-hang`.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::status::Status;
use crate::exit::Exit;
use crate::session::observer::Observer;

/// For each of connecting, writing and reading.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What has moved this lately is not stuck.
const MOVES_SECONDS: f64 = 1.0;
/// An answer is no longer than this.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// Why a job could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("nothing is served at {address}: {source}; is the job started with --listen {address}?")]
    Unreachable {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Something is there, and says nothing.
    #[error("{address} does not answer in {} s: {source}; is its process stopped, or its machine overloaded?", TIMEOUT.as_secs())]
    Silent {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Something else answers there, or there is nothing to tell.
    #[error("{address} answers {path} with: {answer}")]
    Answer {
        /// Where.
        address: SocketAddr,
        /// What was asked for.
        path: &'static str,
        /// Its first line, or what is wrong with it.
        answer: String,
    },
}

impl ClientError {
    /// With which code a program ends because of it.
    pub fn exit(&self) -> Exit {
        Exit::PeerUnavailable
    }
}

/// What everything waits for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HangReport {
    /// Number of the process.
    pub process: u32,
    /// How many there are.
    pub processes: u32,
    /// Since anything moved.
    pub idle_seconds: f64,
    /// Whether a step is under way.
    pub is_under_way: bool,
    /// What everything waits for in the end; `None` between steps, and while something moves.
    pub cause: Option<String>,
    /// The other processes where the cause may lie.
    pub elsewhere: Vec<u32>,
    /// Who waits, and for what, down to the cause.
    pub chain: Vec<(String, String)>,
}

impl HangReport {
    pub(super) fn of(observer: &Observer) -> Option<Self> {
        let idle_seconds = observer.idle_ns()? as f64 * 1e-9;
        let (spec, process_map, hang) = (&observer.plan().spec, observer.process_map(), observer.hang());
        Some(Self {
            process: process_map.process,
            processes: process_map.processes,
            idle_seconds,
            is_under_way: observer.is_under_way(),
            cause: hang.as_ref().map(|hang| hang.cause(spec)),
            elsewhere: hang.as_ref().map_or_else(Vec::new, |hang| hang.processes()),
            chain: hang.map_or_else(Vec::new, |hang| hang.steps(spec)),
        })
    }
}

impl fmt::Display for HangReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rank {} of {}: last progress {:.1} s ago", self.process, self.processes, self.idle_seconds)?;
        if self.cause.is_some() && self.idle_seconds < MOVES_SECONDS {
            writeln!(f, "  it moves; this instant it waits so:")?;
        }
        for (who, what) in &self.chain {
            writeln!(f, "  {who}\n    waits for {what}")?;
        }
        match &self.cause {
            Some(cause) => writeln!(f, "  {cause}"),
            None if self.is_under_way => writeln!(f, "  a step is under way, and moves"),
            None => writeln!(f, "  no step is under way"),
        }?;
        match self.elsewhere.as_slice() {
            [] | [_] => Ok(()),
            several => {
                let ranks = several.iter().map(|rank| format!("rank {rank}")).collect::<Vec<_>>();
                writeln!(f, "  which of them is late is not known here: {}", ranks.join(", "))
            }
        }
    }
}

/// How the session at an address does.
///
/// # Errors
/// When nobody answers, or answers otherwise.
pub fn status(address: SocketAddr) -> Result<Status, ClientError> {
    ask(address, "/status")
}

/// What was answered, and by whom nothing.
#[derive(Debug)]
pub struct HangExplanation {
    /// In the order in which they were asked: the first, then those where the cause may lie.
    pub reports: Vec<HangReport>,
    /// Processes that are waited for and could not be asked.
    pub unasked: Vec<(u32, ClientError)>,
}

impl fmt::Display for HangExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reports.iter().try_for_each(|report| write!(f, "{report}"))?;
        self.unasked.iter().try_for_each(|(rank, error)| writeln!(f, "rank {rank} could not be asked: {error}"))
    }
}

/// What the session at an address waits for, and all processes where the cause may lie: process `n` is asked on the `n`-th port
/// from the first.
///
/// # Errors
/// When nobody answers at the first address.
pub fn explain_hang(first: SocketAddr) -> Result<HangExplanation, ClientError> {
    let own: HangReport = ask(first, "/hang")?;
    let (mut known, process) = (BTreeSet::from([own.process]), own.process);
    let mut explained = HangExplanation { reports: vec![own], unasked: Vec::new() };
    let mut asked = 0;
    while let Some(report) = explained.reports.get(asked) {
        asked += 1;
        for next in report.elsewhere.clone().into_iter().filter(|next| known.insert(*next)) {
            match ask_process(first, process, next) {
                Ok(report) => explained.reports.push(report),
                Err(error) => explained.unasked.push((next, error)),
            }
        }
    }
    Ok(explained)
}

fn ask_process(first: SocketAddr, own: u32, process: u32) -> Result<HangReport, ClientError> {
    let port = i64::from(first.port()) + i64::from(process) - i64::from(own);
    // Port 0 is nobody's, and says so.
    let address = SocketAddr::new(first.ip(), port.try_into().unwrap_or(0));
    let report: HangReport = ask(address, "/hang")?;
    if report.process == process {
        return Ok(report);
    }
    Err(ClientError::Answer { address, path: "/hang", answer: format!("it is rank {} of a job", report.process) })
}

fn ask<T: DeserializeOwned>(address: SocketAddr, path: &'static str) -> Result<T, ClientError> {
    let text = get(address, path).map_err(|source| failed(address, source))?;
    let wrong = |answer: String| ClientError::Answer { address, path, answer };
    let first = text.lines().next().unwrap_or("nothing").to_owned();
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body).filter(|_| first.contains(" 200 "));
    let body = body.ok_or_else(|| wrong(first))?;
    serde_json::from_str(body).map_err(|error| wrong(error.to_string()))
}

/// Where a process is served, and asked, that was told no other address.
pub const ADDRESS: &str = "127.0.0.1:9400";

/// An address as users write it, by number or by name: `127.0.0.1:9400`, `localhost:9400`.
///
/// # Errors
/// What is wrong with it.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let found: Vec<SocketAddr> =
        text.to_socket_addrs().map_err(|error| format!("{error}; expected ADDRESS:PORT"))?.collect();
    let first = found.iter().find(|address| address.is_ipv4()).or(found.first());
    first.copied().ok_or_else(|| "no such machine".to_owned())
}

fn failed(address: SocketAddr, source: io::Error) -> ClientError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent { address, source },
        _ => ClientError::Unreachable { address, source },
    }
}

/// HTTP 1.0 has no chunks to put together, and the server closes behind its answer.
fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut text = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn addresses_by_number_and_by_name() {
        let local = "127.0.0.1:9400".parse().expect("an address");
        assert_eq!([address("127.0.0.1:9400"), address("localhost:9400")], [Ok(local), Ok(local)]);
        for wrong in ["9400", "127.0.0.1", "127.0.0.1:99999", ""] {
            assert!(address(wrong).is_err_and(|told| told.ends_with("expected ADDRESS:PORT")), "{wrong}");
        }
    }

    #[test]
    fn who_is_silent_is_not_taken_for_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        let mut stream = TcpStream::connect(address).expect("a listener");
        stream.set_read_timeout(Some(Duration::from_millis(1))).expect("a time-out");
        let silent = stream.read(&mut [0]).expect_err("nobody writes");
        let told = failed(address, silent).to_string();
        assert!(told.contains("does not answer in 10 s") && told.contains("is its process stopped"), "{told}");
        drop(listener);
        let told = ask::<u32>(address, "/status").expect_err("nobody listens").to_string();
        assert!(told.contains("nothing is served") && told.contains("--listen"), "{told}");
    }

    /// So many listeners on ports in a row.
    fn in_a_row(count: u16) -> Vec<TcpListener> {
        loop {
            let first = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = first.local_addr().expect("bound").port();
            let more = (1..count).map(|n| TcpListener::bind(("127.0.0.1", port.checked_add(n)?)).ok());
            if let Some(more) = more.collect::<Option<Vec<_>>>() {
                return std::iter::once(first).chain(more).collect();
            }
        }
    }

    /// Answers once.
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
    fn all_processes_where_the_cause_may_lie_are_asked_once() {
        let mut listeners = in_a_row(4);
        let first = listeners[1].local_addr().expect("bound");
        // Rank 0 has gone.
        drop(listeners.remove(0));
        let waits = |process, elsewhere| report(process, "a rank is waited for", elsewhere);
        let late = report(3, "device 3 compute forward has not ended", Vec::new());
        let reports = [waits(1, vec![0, 2, 3]), waits(2, vec![0, 1, 3]), late];
        listeners.into_iter().zip(reports.clone()).for_each(|(listener, report)| serve(listener, report));
        let HangExplanation { reports: told, unasked } = explain_hang(first).expect("an answer");
        assert_eq!(told, reports);
        assert!(matches!(&unasked[..], [(0, ClientError::Unreachable { .. })]), "{unasked:?}");
        assert!(told[0].to_string().contains("which of them is late is not known here: rank 0, rank 2, rank 3"));
        let moves = HangReport { idle_seconds: 0.1, ..told[0].clone() };
        assert!(moves.to_string().contains("it moves") && !told[0].to_string().contains("it moves"), "{moves}");
    }
}
