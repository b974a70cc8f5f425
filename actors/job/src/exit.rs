//! Exit codes, the rule that decides which of them justify a restart, and the reports of failures and of progress.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, fs, io};

use serde::{Deserialize, Serialize};

/// Environment variable with the path of the file to which a failing process writes its [`Report`].
pub const ERROR_FILE: &str = "SHARDFLOW_ERROR_FILE";
/// Environment variable with the path of the file that records the last committed step. Set only for local rank 0.
pub const PROGRESS_FILE: &str = "SHARDFLOW_PROGRESS_FILE";

/// Maximum size in bytes of a report file that [`Report::read`] accepts. [`crate::departure::report`] truncates the
/// cause to [`CAUSE_BYTES_MAX`] to stay below this size.
const REPORT_BYTES_MAX: u64 = 64 << 10;
pub(crate) const CAUSE_BYTES_MAX: usize = 16 << 10;

/// Why a process ended. A code that `sysexits.h` also defines has the meaning given there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// 0: done.
    Done,
    /// 2: an invalid flag or file.
    Usage,
    /// 65: the data or the checkpoint is damaged, or the checkpoint belongs to another model.
    BadData,
    /// 69: another process has ended or does not respond.
    PeerUnavailable,
    /// 70: a bug, or a failure that has no other code.
    Internal,
    /// 71: a memory allocation failed during the training. A failed allocation at the start gives [`Exit::Refused`].
    OutOfMemory,
    /// 73: a checkpoint or a parameter file cannot be written.
    CannotWrite,
    /// 75: the program ended without a failure and may be restarted.
    Retry,
    /// 76: a peer uses a different protocol or secret.
    Protocol,
    /// 78: the plan or the configuration was refused.
    Refused,
    /// 79: no progress within the time limit.
    Hang,
    /// 80: a loss or gradient is Inf or NaN.
    Numerics,
    /// 128 + n: signal n killed the process, or the process itself exited with the code 128 + n.
    Signal(u8),
    /// Any other code. The program that exited with it defines its meaning.
    Other(u8),
}

impl Exit {
    /// Returns the code and a text with its meaning. `Signal` and `Other` have no such text.
    fn parts(self) -> (u8, Option<&'static str>) {
        match self {
            Exit::Done => (0, Some("done")),
            Exit::Usage => (2, Some("usage")),
            Exit::BadData => (65, Some("bad data or checkpoint")),
            Exit::PeerUnavailable => (69, Some("peer unavailable")),
            Exit::Internal => (70, Some("internal")),
            Exit::OutOfMemory => (71, Some("out of memory")),
            Exit::CannotWrite => (73, Some("cannot write a checkpoint")),
            Exit::Retry => (75, Some("retry")),
            Exit::Protocol => (76, Some("protocol or authentication")),
            Exit::Refused => (78, Some("plan or configuration refused")),
            Exit::Hang => (79, Some("hang")),
            Exit::Numerics => (80, Some("numerics")),
            Exit::Signal(signal) => (128 | signal, None),
            Exit::Other(code) => (code, None),
        }
    }

    /// The exit code.
    pub fn code(self) -> u8 {
        self.parts().0
    }

    /// Returns the exit with this code: the inverse of [`Exit::code`].
    pub fn from_code(code: u8) -> Exit {
        use Exit::*;
        let named = [
            Done,
            Usage,
            BadData,
            PeerUnavailable,
            Internal,
            OutOfMemory,
            CannotWrite,
            Retry,
            Protocol,
            Refused,
            Hang,
            Numerics,
        ];
        match named.into_iter().find(|exit| exit.code() == code) {
            Some(exit) => exit,
            // Linux has signals 1 to 64.
            None if (129..=192).contains(&code) => Signal(code - 128),
            None => Other(code),
        }
    }

    /// The exit of a reaped process.
    pub fn from_status(status: ExitStatus) -> Exit {
        match (status.code(), status.signal()) {
            (Some(code), _) => Exit::from_code(code as u8),
            (None, Some(signal)) => Exit::Signal(signal as u8),
            (None, None) => Exit::Internal,
        }
    }

    /// True if a restart from the last committed checkpoint may help. SIGHUP, SIGINT, SIGQUIT and SIGTERM are requests
    /// to end. Any other signal may have a temporary cause, such as the out-of-memory killer or an intermittent bug.
    pub fn worth_a_retry(self) -> bool {
        match self {
            Exit::PeerUnavailable | Exit::Internal | Exit::OutOfMemory | Exit::Retry | Exit::Hang | Exit::Other(_) => {
                true
            }
            Exit::Done | Exit::Usage | Exit::BadData | Exit::CannotWrite | Exit::Protocol => false,
            Exit::Refused | Exit::Numerics => false,
            Exit::Signal(signal) => !matches!(signal, 1 | 2 | 3 | 15),
        }
    }

    /// True if this exit means that another process caused the end of this one.
    pub fn is_caused_by_peer(self) -> bool {
        matches!(self, Exit::PeerUnavailable | Exit::Retry)
    }

    /// If a node has ended with this exit, returns the exit of the processes that wait for that node: 69 if this exit
    /// is a signal or a restart may help, or else this exit itself.
    pub(crate) fn of_waiting(self) -> Exit {
        let is_final = self.parts().1.is_some() && !self.worth_a_retry();
        if is_final { self } else { Exit::PeerUnavailable }
    }

    /// Returns the cause, followed by this exit in parentheses unless the cause already ends with it.
    pub(crate) fn after(self, cause: &str) -> String {
        let (cause, code) = (cause.trim(), format!("({self})"));
        if cause.ends_with(&code) { cause.into() } else { format!("{cause} {code}") }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.parts()) {
            (_, (code, Some(meaning))) => write!(f, "code {code}: {meaning}"),
            (Exit::Signal(signal), (code, _)) => match signal_hook::low_level::signal_name(i32::from(*signal)) {
                Some(name) => write!(f, "code {code}: {name}"),
                None => write!(f, "signal {signal}"),
            },
            (_, (code, None)) => write!(f, "code {code}"),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// A process's report of its own failure: one JSON object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Rank of the reporting process.
    pub rank: u32,
    /// Unix time of the failure, in nanoseconds.
    pub time_unix_ns: u64,
    /// The code with which the process will end.
    pub exit: u8,
    /// Description of the failure, in one or a few lines.
    pub cause: String,
    /// The rank that failed first. If absent, the exit code decides whether the failure began in the reporting process.
    #[serde(default)]
    pub first_cause_rank: Option<u32>,
    /// True if the process had joined the session. In this case, the session also reports the failure to the others.
    #[serde(default)]
    pub joined: bool,
    /// True if the node where the failure began has left the job: its launcher starts no more processes. Restarted
    /// processes of other nodes would wait for that node in vain.
    #[serde(default)]
    pub departed: bool,
}

impl Report {
    /// Writes the report atomically.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        write_atomically(path, &serde_json::to_vec(self)?)
    }

    /// Reads a report. `None` if the file is missing or invalid: the exit code is known even without a report.
    pub fn read(path: &Path) -> Option<Report> {
        let bytes = fs::metadata(path).ok()?.len();
        (bytes <= REPORT_BYTES_MAX).then(|| serde_json::from_slice(&fs::read(path).ok()?).ok())?
    }

    /// True if the failure began in the reporting process.
    pub fn is_own_failure(&self) -> bool {
        match self.first_cause_rank {
            Some(first) => first == self.rank,
            None => !Exit::from_code(self.exit).is_caused_by_peer(),
        }
    }

    /// True if the rendezvous must refuse all processes: they would wait for the reporter, and no restart would help.
    pub fn concerns_all(&self) -> bool {
        let exit = Exit::from_code(self.exit);
        let is_final = self.departed || !exit.worth_a_retry();
        !self.joined && self.is_own_failure() && exit != Exit::Done && is_final
    }
}

static JOINED: AtomicBool = AtomicBool::new(false);

/// Records for the launcher that this process waits for the others at the rendezvous. While any process of this node
/// waits, a process of this node that exits with 0 and has no such record counts as failed.
pub fn mark_joining() {
    if let Some(path) = env::var_os(ERROR_FILE) {
        let _ = fs::write(joining_file(Path::new(&path)), "");
    }
}

/// The marker file that [`mark_joining`] creates in a process whose [`ERROR_FILE`] is `error_file`.
pub(crate) fn joining_file(error_file: &Path) -> PathBuf {
    error_file.with_extension("joining")
}

/// Records that this process has completed the rendezvous, or has reported its failure there. Later failures are not
/// reported at the rendezvous; the session reports them. Returns true if this was already recorded.
pub fn mark_joined() -> bool {
    JOINED.swap(true, Ordering::Relaxed)
}

static DEPARTED: AtomicBool = AtomicBool::new(false);

/// Records that another node has left the job ([`Report::departed`]). The launcher then does not restart this process.
pub(crate) fn mark_departed() {
    DEPARTED.store(true, Ordering::Relaxed);
}

pub(crate) fn is_departed() -> bool {
    DEPARTED.load(Ordering::Relaxed)
}

/// The rank that the launcher assigned to this process.
pub fn own_rank() -> u32 {
    env::var("SHARDFLOW_RANK").ok().and_then(|rank| rank.parse().ok()).unwrap_or(0)
}

/// Records a committed step, if [`PROGRESS_FILE`] is set. The launcher gives up if restarts commit no new step.
pub fn progress(step: u64) -> io::Result<()> {
    match env::var_os(PROGRESS_FILE) {
        Some(path) => write_atomically(Path::new(&path), step.to_string().as_bytes()),
        None => Ok(()),
    }
}

/// The step in a progress file; `None` if there is no committed step yet.
pub fn read_progress(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Unix time in nanoseconds; 0 if the clock is before 1970.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_one_meaning() {
        for code in 0..=255 {
            assert_eq!(Exit::from_code(code).code(), code);
        }
        assert_eq!(Exit::from_code(137), Exit::Signal(9));
        assert_eq!(Exit::from_code(1), Exit::Other(1));
        assert_eq!(Exit::from_status(ExitStatus::from_raw(9)), Exit::Signal(9));
        assert_eq!(Exit::from_status(ExitStatus::from_raw(78 << 8)), Exit::Refused);
        assert_eq!(Exit::Signal(9).to_string(), "code 137: SIGKILL");
    }

    #[test]
    fn final_failures_and_requested_ends_are_not_worth_a_retry() {
        let worth: Vec<u8> = (0..=255).filter(|code| Exit::from_code(*code).worth_a_retry()).collect();
        let not: Vec<u8> = (0..=255).filter(|code| !worth.contains(code)).collect();
        assert_eq!(not, [0, 2, 65, 73, 76, 78, 80, 129, 130, 131, 143]);
    }

    #[test]
    fn a_waiting_process_ends_with_a_final_code_of_its_own_meaning() {
        let codes = [1, 2, 65, 69, 70, 75, 78, 80, 130, 137].map(|code| Exit::from_code(code).of_waiting().code());
        assert_eq!(codes, [69, 2, 65, 69, 69, 69, 78, 80, 69, 69]);
        assert_eq!(Exit::Usage.after("no file\n"), "no file (code 2: usage)");
        assert_eq!(Exit::Usage.after("no file (code 2: usage)"), "no file (code 2: usage)");
    }

    #[test]
    fn a_report_is_read_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        assert_eq!(Report::read(&path), None);
        let report = Report {
            rank: 3,
            time_unix_ns: 5,
            exit: 69,
            cause: "a \"b\"\n".into(),
            first_cause_rank: Some(1),
            joined: false,
            departed: false,
        };
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path), Some(report.clone()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is gone");
        assert!(!report.is_own_failure());
        assert!(Report { exit: 70, first_cause_rank: None, ..report.clone() }.is_own_failure());
        assert!(!Report { first_cause_rank: None, ..report.clone() }.is_own_failure());
        let code = |exit| Report { exit, first_cause_rank: None, ..report.clone() };
        assert_eq!([0, 2, 70, 78].map(|exit| code(exit).concerns_all()), [false, true, false, true]);
        assert!(!Report { joined: true, ..code(2) }.concerns_all(), "the session reports this failure");
        let departed = |exit| Report { departed: true, first_cause_rank: Some(3), ..code(exit) };
        assert_eq!([0, 1, 69, 137].map(|exit| departed(exit).concerns_all()), [false, true, true, true]);
        assert!(!Report { first_cause_rank: Some(1), ..code(2) }.concerns_all(), "rank 1 reports this failure");
        fs::write(&path, "{\"rank\":").unwrap();
        assert_eq!(Report::read(&path), None);
        fs::write(&path, vec![b' '; REPORT_BYTES_MAX as usize + 1]).unwrap();
        assert_eq!(Report::read(&path), None);
    }
}
