//! How a process ends: the exit codes, which of them are worth a restart, and how a process reports why it failed and how
//! far it came.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, fs, io};

use serde::{Deserialize, Serialize};

use crate::cluster::departure;

/// Variable with the path of the file to which a process that fails writes its [`Report`].
pub const ERROR_FILE: &str = "SHARDFLOW_ERROR_FILE";
/// Variable with the path of the file to which the last committed step is written. Only the first process of a node has
/// it.
pub const PROGRESS_FILE: &str = "SHARDFLOW_PROGRESS_FILE";

/// Largest report that is read, in bytes. What is longer was not written by [`report`].
const REPORT_BYTES_MAX: u64 = 64 << 10;
/// Longest cause that is written, in bytes.
const CAUSE_BYTES_MAX: usize = 16 << 10;

/// Why a process ended. The codes follow `sysexits.h` where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Exit {
    /// 0: done.
    Done,
    /// 2: a flag or a file that cannot be used.
    Usage,
    /// 65: data or a checkpoint is damaged, or belongs to another model.
    BadData,
    /// 69: another process is gone, or does not answer.
    PeerUnavailable,
    /// 70: a bug, or a failure that has no code of its own.
    Internal,
    /// 71: memory could not be had.
    OutOfMemory,
    /// 73: a checkpoint cannot be written.
    CannotWrite,
    /// 75: nothing is wrong with the program; start it again.
    Retry,
    /// 76: a peer speaks another protocol, or does not know the secret.
    Protocol,
    /// 78: the plan or the configuration was refused.
    Refused,
    /// 79: nothing moved for too long.
    Hang,
    /// 80: a loss or gradient that is not finite.
    Numerics,
    /// 128 + n: ended by signal n, or as if it had been.
    Signal(u8),
    /// A code that is none of these: of a program that does not follow them.
    Other(u8),
}

impl Exit {
    /// Every exit that has one code of its own.
    pub const NAMED: [Exit; 12] = [
        Exit::Done,
        Exit::Usage,
        Exit::BadData,
        Exit::PeerUnavailable,
        Exit::Internal,
        Exit::OutOfMemory,
        Exit::CannotWrite,
        Exit::Retry,
        Exit::Protocol,
        Exit::Refused,
        Exit::Hang,
        Exit::Numerics,
    ];

    /// The code that the process ends with.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Usage => 2,
            Exit::BadData => 65,
            Exit::PeerUnavailable => 69,
            Exit::Internal => 70,
            Exit::OutOfMemory => 71,
            Exit::CannotWrite => 73,
            Exit::Retry => 75,
            Exit::Protocol => 76,
            Exit::Refused => 78,
            Exit::Hang => 79,
            Exit::Numerics => 80,
            Exit::Signal(signal) => 128 | signal,
            Exit::Other(code) => code,
        }
    }

    /// The meaning of a code: the inverse of [`Exit::code`].
    pub fn from_code(code: u8) -> Exit {
        match Exit::NAMED.into_iter().find(|exit| exit.code() == code) {
            Some(exit) => exit,
            // Linux has the signals 1 to 64.
            None if (129..=192).contains(&code) => Exit::Signal(code - 128),
            None => Exit::Other(code),
        }
    }

    /// How a process that was waited for ended.
    pub fn from_status(status: ExitStatus) -> Exit {
        match (status.code(), status.signal()) {
            (Some(code), _) => Exit::from_code(code as u8),
            (None, Some(signal)) => Exit::Signal(signal as u8),
            (None, None) => Exit::Internal,
        }
    }

    /// Whether to start again from the last commit may help. Signals by which somebody asks a process to end (SIGHUP,
    /// SIGINT, SIGQUIT, SIGTERM) are a wish, not a failure; any other may have come from outside (the kernel that is
    /// out of memory) or from a bug that does not always show.
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

    /// Whether a process that ends so accuses another one rather than itself.
    pub fn blames_a_peer(self) -> bool {
        matches!(self, Exit::PeerUnavailable | Exit::Retry)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meaning = match self {
            Exit::Done => "done",
            Exit::Usage => "usage",
            Exit::BadData => "bad data or checkpoint",
            Exit::PeerUnavailable => "peer unavailable",
            Exit::Internal => "internal",
            Exit::OutOfMemory => "out of memory",
            Exit::CannotWrite => "cannot write a checkpoint",
            Exit::Retry => "retry",
            Exit::Protocol => "protocol or authentication",
            Exit::Refused => "plan or configuration refused",
            Exit::Hang => "hang",
            Exit::Numerics => "numerics",
            Exit::Signal(signal) => match signal_hook::low_level::signal_name(i32::from(*signal)) {
                Some(name) => name,
                None => return write!(f, "signal {signal}"),
            },
            Exit::Other(_) => return write!(f, "code {}", self.code()),
        };
        write!(f, "code {}: {meaning}", self.code())
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// What a process says about its own failure: one JSON object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Who reports.
    pub rank: u32,
    /// When, since 1970.
    pub time_unix_ns: u64,
    /// The code that it will end with.
    pub exit: u8,
    /// What failed, in one line or a few.
    pub cause: String,
    /// Whose failure it was: the reporter's own when absent.
    #[serde(default)]
    pub first_cause_rank: Option<u32>,
    /// The process had met the others, which learn of its failure from the session.
    #[serde(default)]
    pub joined: bool,
}

impl Report {
    /// Writes the report. A reader sees the whole of it or nothing.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        write_whole(path, &serde_json::to_vec(self)?)
    }

    /// Reads a report; nothing when there is none, or none that can be read: it only adds to what the exit code says.
    pub fn read(path: &Path) -> Option<Report> {
        let bytes = fs::metadata(path).ok()?.len();
        (bytes <= REPORT_BYTES_MAX).then(|| serde_json::from_slice(&fs::read(path).ok()?).ok())?
    }

    /// Whether the reporter says that the failure began with itself.
    pub fn blames_itself(&self) -> bool {
        match self.first_cause_rank {
            Some(first) => first == self.rank,
            None => !Exit::from_code(self.exit).blames_a_peer(),
        }
    }

    /// Whether the other processes would wait for the reporter in vain, and a restart would not help.
    pub fn is_for_all(&self) -> bool {
        let exit = Exit::from_code(self.exit);
        !self.joined && self.blames_itself() && exit != Exit::Done && !exit.worth_a_retry()
    }
}

/// True once this process has met the others, or has reported why it cannot.
static JOINED: AtomicBool = AtomicBool::new(false);

/// The processes have met: from now on the session informs the others of a failure here.
pub(crate) fn joined() {
    JOINED.store(true, Ordering::Relaxed);
}

/// Reports why this process is about to end with `exit`. `first_cause_rank`: the rank that failed first, where it is another
/// one. With [`Exit::Retry`] and its own rank, the process ends on request, such as before its node is taken away: no launcher
/// restarts it. Under `shardflow launch` the report goes to the launcher. Without it, a process
/// of several that ends before it has met the others, for a cause that is not worth a retry, reports to them: it dials the
/// rendezvous endpoint, or as rank 0 answers there, for at most `SHARDFLOW_REPORT_WAIT_MS`. The first report of a process
/// stands.
///
/// # Errors
/// The report cannot be written.
pub fn report(exit: Exit, cause: &str, first_cause_rank: Option<u32>) -> io::Result<()> {
    let path = env::var_os(ERROR_FILE);
    if path.as_ref().is_some_and(|path| Path::new(path).exists()) {
        return Ok(());
    }
    let rank = own_rank();
    let cause = cause[..cause.floor_char_boundary(CAUSE_BYTES_MAX)].into();
    let (time_unix_ns, joined) = (unix_ns(), JOINED.swap(true, Ordering::Relaxed));
    let report = Report { rank, time_unix_ns, exit: exit.code(), cause, first_cause_rank, joined };
    match path {
        Some(path) => report.write(Path::new(&path)),
        None => {
            if report.is_for_all() {
                departure::report(&report);
            }
            Ok(())
        }
    }
}

/// The rank that the launcher gave this process.
pub(crate) fn own_rank() -> u32 {
    env::var("SHARDFLOW_RANK").ok().and_then(|rank| rank.parse().ok()).unwrap_or(0)
}

/// Tells the launcher that `step` is committed, so that it can see whether restarts get anywhere. Does nothing when no
/// launcher asked for it.
///
/// # Errors
/// The file cannot be written.
pub fn progress(step: u64) -> io::Result<()> {
    match env::var_os(PROGRESS_FILE) {
        Some(path) => write_whole(Path::new(&path), step.to_string().as_bytes()),
        None => Ok(()),
    }
}

/// The step in a progress file; nothing when none was committed yet.
pub fn read_progress(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Now, in nanoseconds since 1970; 0 when the clock stands before that.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    fs::write(&beside, bytes)?;
    fs::rename(&beside, path)
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
    fn what_is_worth_a_retry() {
        let worth: Vec<u8> = (0..=255).filter(|code| Exit::from_code(*code).worth_a_retry()).collect();
        let not: Vec<u8> = (0..=255).filter(|code| !worth.contains(code)).collect();
        assert_eq!(not, [0, 2, 65, 73, 76, 78, 80, 129, 130, 131, 143]);
    }

    #[test]
    fn a_report_comes_back_whole_or_not_at_all() {
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
        };
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path), Some(report.clone()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
        assert!(!report.blames_itself());
        assert!(Report { exit: 70, first_cause_rank: None, ..report.clone() }.blames_itself());
        assert!(!Report { first_cause_rank: None, ..report.clone() }.blames_itself());
        let code = |exit| Report { exit, first_cause_rank: None, ..report.clone() };
        assert!(code(2).is_for_all() && code(78).is_for_all() && !code(0).is_for_all() && !code(70).is_for_all());
        assert!(!Report { joined: true, ..code(2) }.is_for_all(), "its session reports it");
        assert!(!Report { first_cause_rank: Some(1), ..code(2) }.is_for_all(), "rank 1 reports it");
        fs::write(&path, "{\"rank\":").unwrap();
        assert_eq!(Report::read(&path), None);
        fs::write(&path, vec![b' '; REPORT_BYTES_MAX as usize + 1]).unwrap();
        assert_eq!(Report::read(&path), None);
    }
}
