//! Asks the servers of a running job, for `shardflow status` and `shardflow explain-hang`. Imports `watch::status`, `exit`.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::status::Status;
use crate::exit::Exit;
use crate::session::observer::Observer;

/// For each of connecting, writing and reading.
const TIMEOUT: Duration = Duration::from_secs(10);
/// An answer is no longer than this.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// Why a job could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody answers there.
    #[error("nothing is served at {address}: {source}; is the job started with --listen {address}?")]
    Unreachable {
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

impl AskError {
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
    /// Since a firing began or ended.
    pub idle_seconds: f64,
    /// What everything waits for in the end; `None` between steps.
    pub cause: Option<String>,
    /// The process where the cause lies, if it is another one.
    pub elsewhere: Option<u32>,
    /// Who waits, and for what, down to the cause.
    pub chain: Vec<(String, String)>,
}

impl HangReport {
    pub(super) fn of(observer: &Observer) -> Option<Self> {
        let idle_seconds = Status::of(observer)?.idle_seconds;
        let (spec, hosting, hang) = (&observer.plan().spec, observer.hosting(), observer.hang());
        Some(Self {
            process: hosting.process,
            processes: hosting.processes,
            idle_seconds,
            cause: hang.as_ref().map(|hang| hang.cause(spec)),
            elsewhere: hang.as_ref().and_then(|hang| hang.process()),
            chain: hang.map_or_else(Vec::new, |hang| hang.steps(spec)),
        })
    }
}

impl fmt::Display for HangReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rank {} of {}: last progress {:.1} s ago", self.process, self.processes, self.idle_seconds)?;
        for (who, what) in &self.chain {
            writeln!(f, "  {who}\n    waits for {what}")?;
        }
        match &self.cause {
            Some(cause) => writeln!(f, "  {cause}"),
            None => writeln!(f, "  no step is under way"),
        }
    }
}

/// How the session at an address does.
///
/// # Errors
/// When nobody answers, or answers otherwise.
pub fn status(address: SocketAddr) -> Result<Status, AskError> {
    ask(address, "/status")
}

/// What the session at an address waits for, and after it those of the processes where the cause is said to lie: process `n` is
/// asked on the `n`-th port from the first.
///
/// # Errors
/// When nobody answers at the first address.
pub fn explain_hang(first: SocketAddr) -> Result<Vec<HangReport>, AskError> {
    let mut reports: Vec<HangReport> = vec![ask(first, "/hang")?];
    let own = reports[0].process;
    while let Some(next) = reports.last().and_then(|report| report.elsewhere) {
        let port = (i64::from(first.port()) + i64::from(next) - i64::from(own)).try_into();
        let Ok(port) = port else { break };
        // One that does not answer is all that can be said of it, and the one before has named it.
        let Ok(report) = ask::<HangReport>(SocketAddr::new(first.ip(), port), "/hang") else { break };
        if report.process != next || reports.iter().any(|known| known.process == next) {
            break;
        }
        reports.push(report);
    }
    Ok(reports)
}

fn ask<T: DeserializeOwned>(address: SocketAddr, path: &'static str) -> Result<T, AskError> {
    let text = get(address, path).map_err(|source| AskError::Unreachable { address, source })?;
    let wrong = |answer: String| AskError::Answer { address, path, answer };
    let first = text.lines().next().unwrap_or("nothing").to_owned();
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body).filter(|_| first.contains(" 200 "));
    let body = body.ok_or_else(|| wrong(first))?;
    serde_json::from_str(body).map_err(|error| wrong(error.to_string()))
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
