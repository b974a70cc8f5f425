//! Messages of the rendezvous, and the reasons for refusing a start.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use crate::transport::{Address, Listener, PROCESSES_MAX, SessionId, TransportError};
use serde::{Deserialize, Serialize};

use super::facts::{VALUE_BYTES_MAX, advice};
use super::roster::{Member, ProcessLabel, Roster};
use crate::exit::{Exit, Report};
use crate::machine::{CGROUPS_MAX, affinity};

pub(super) const REQUEST_BYTES_MAX: usize = 32 << 10;
const NAME_BYTES_MAX: usize = 256;
const FACTS_MAX: usize = 96;
/// Maximum total length of the names and values of all facts, in bytes.
const FACTS_BYTES_MAX: usize = 9 << 10;
const ADDRESSES_MAX: usize = 8;
const ADDRESS_BYTES_MAX: usize = 512;
/// Number of 64-bit words for 1024 cores, the size of the kernel's affinity mask.
const CORES_WORDS_MAX: usize = 16;
/// Maximum number of ranges of wanted ranks. A process that wants every second rank reaches it.
const WANTED_MAX: usize = PROCESSES_MAX as usize / 2;
/// Maximum number of ranks or conflicts that a message lists. Further ones are only counted.
const LISTED_MAX: usize = 16;

/// The program that a process runs, its host and its process id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Version of this crate.
    pub version: String,
    /// BLAKE3 hash of the executable.
    pub binary: [u8; 32],
    /// The kernel's boot id and the host name. They are the same for all processes of a machine.
    pub node: String,
    /// Hash of the user id, and of the device, inode and path of `TMPDIR`. Processes with the same hash can open each
    /// other's sockets in `TMPDIR`. Containers on one host have the same `node`, but may have separate `/tmp` folders.
    pub sockets: [u8; 32],
    /// Affinity mask. See [`crate::machine::threads_per_device`].
    pub cores: Vec<u64>,
    /// Host name, for error messages.
    pub host: String,
    /// Process id, for error messages.
    pub pid: u32,
}

impl Identity {
    /// Returns the identity of the running process. Reads the whole executable.
    pub fn of_this_process() -> Result<Self, RendezvousError> {
        let failed = |part| move |cause| RendezvousError::Identity { part, cause };
        // `/proc/self/exe` is the running file, even if the file at its path was replaced.
        let executable = File::open("/proc/self/exe");
        let executable = executable.or_else(|_| std::env::current_exe().and_then(File::open));
        let mut hasher = blake3::Hasher::new();
        executable.and_then(|file| hasher.update_reader(file).map(drop)).map_err(failed("executable"))?;
        let read = |path| std::fs::read_to_string(path).map(|text| text.trim().to_string());
        let host = read("/proc/sys/kernel/hostname").map_err(failed("host name"))?;
        let boot = read("/proc/sys/kernel/random/boot_id").map_err(failed("boot id"))?;
        let (version, pid) = (env!("CARGO_PKG_VERSION").into(), std::process::id());
        let folder = std::env::temp_dir();
        let inode = std::fs::metadata(&folder).map(|data| (data.dev(), data.ino())).ok();
        let sockets = format!("{:?} {inode:?} {folder:?}", rustix::process::geteuid());
        let (binary, sockets) = (*hasher.finalize().as_bytes(), *blake3::hash(sockets.as_bytes()).as_bytes());
        Ok(Self { version, binary, node: format!("{boot} {host}"), sockets, cores: affinity(), host, pid })
    }
}

/// A value that must be equal on all processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names explain the fields")]
pub struct Fact {
    pub name: String,
    pub value: String,
}

impl Fact {
    /// Creates a fact.
    pub fn new(name: impl Into<String>, value: impl ToString) -> Self {
        Self { name: name.into(), value: value.to_string() }
    }
}

/// The data that a process sends to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinInfo {
    /// The process and its addresses.
    pub member: Member,
    /// Values that must be equal on all processes. A value comes before any value that depends on it.
    pub facts: Vec<Fact>,
    /// The ranks that the process needs in its [`Roster`], besides those that are listed in any case (RO-1).
    pub wanted: Vec<Range<u32>>,
}

impl JoinInfo {
    /// Checks the size of every part.
    pub fn check(&self) -> Result<(), RendezvousError> {
        let member = &self.member;
        let longest = member.addresses.iter().map(|a| a.to_string().len()).max().unwrap_or(0);
        let all_bytes = self.facts.iter().map(|fact| fact.name.len() + fact.value.len()).sum();
        let wanted = self.wanted.iter().map(Range::len).sum();
        let fixed = [
            ("bytes in its node id", member.node.len(), NAME_BYTES_MAX),
            ("bytes in its host name", member.host.len(), NAME_BYTES_MAX),
            ("64-bit words in its core mask", member.cores.len(), CORES_WORDS_MAX),
            ("cgroups", member.memory.cgroups.len(), CGROUPS_MAX),
            ("addresses", member.addresses.len(), ADDRESSES_MAX),
            ("bytes in an address", longest, ADDRESS_BYTES_MAX),
            ("facts", self.facts.len(), FACTS_MAX),
            ("ranges of wanted ranks", self.wanted.len(), WANTED_MAX),
            ("wanted ranks", wanted, PROCESSES_MAX as usize),
        ];
        // Checks each fact before the total, because the name of a long fact is the more helpful error.
        let name = |fact: &Fact| fact.name.chars().take(NAME_BYTES_MAX).collect::<String>();
        let part = |fact: &Fact| (format!("bytes in its fact '{}'", name(fact)), fact.value.len(), VALUE_BYTES_MAX);
        let fixed = fixed.map(|(part, length, length_max)| (part.to_owned(), length, length_max));
        let total = ("bytes in its facts".to_owned(), all_bytes, FACTS_BYTES_MAX);
        for (part, length, length_max) in fixed.into_iter().chain(self.facts.iter().map(part)).chain([total]) {
            if length > length_max {
                return Err(RendezvousError::TooLong { process: member.label(), part, length, length_max });
            }
        }
        Ok(())
    }

    /// The first fact whose value differs between the two processes.
    pub(super) fn conflict(&self, other: &Self) -> Option<Conflict> {
        let value = |info: &Self, name: &str| {
            let fact = info.facts.iter().find(|fact| fact.name == name);
            fact.map_or_else(|| "nothing".to_owned(), |fact| fact.value.clone())
        };
        self.facts.iter().chain(&other.facts).find_map(|Fact { name, .. }| {
            let (first_value, second_value) = (value(self, name), value(other, name));
            let (name, first, second) = (name.clone(), self.member.label(), other.member.label());
            let is_different = first_value != second_value;
            is_different.then_some(Conflict::Differs { name, first, first_value, second, second_value })
        })
    }
}

/// The first message that a process sends to process 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    Join(JoinInfo),
    /// These ranks will not join, and a restart would not help.
    Failed {
        ranks: Range<u32>,
        report: Report,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// All processes have joined. The receiver starts to accept their connections, and sends [`Ready`].
    Roster(Roster),
    /// All processes are ready.
    Start,
    Refused(RendezvousRefusal),
}

/// Reports to process 0 that the sender accepts connections from the session's members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ready {
    pub session: SessionId,
}

/// Two processes that cannot be in the same world.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum Conflict {
    #[error("{first} and {second} differ in their {name}: {first_value} and {second_value}; {}", advice(.name))]
    Differs { name: String, first: ProcessLabel, first_value: String, second: ProcessLabel, second_value: String },
    #[error("two processes claim one rank: {first} and {second}; give each process its own rank")]
    Duplicate { first: ProcessLabel, second: ProcessLabel },
}

/// Why the world does not start. All processes that can be reached receive the same reason.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum RendezvousRefusal {
    #[error("the ranks are incompatible: {}", list(.0))]
    Conflicts(Vec<Conflict>),
    #[error(
        "{} did not join in {waited_ms} ms: {} of {processes} joined{}; {WAIT_LONGER}",
        ranks(.missing), joined(.missing, *.processes), refused_connections(*.refused)
    )]
    Missing { missing: Vec<u32>, processes: u32, waited_ms: u64, refused: u64 },
    /// A process ended before it joined, and no restart can help. Or a node ended; the cause then names the node.
    #[error("{}", failed(.0))]
    Failed(Report),
    #[error("{0} joined and was lost before the start; see its log")]
    Lost(ProcessLabel),
}

fn failed(Report { rank, cause, exit, departed, .. }: &Report) -> String {
    // The report comes from the network, so the cause may be empty.
    if *departed && !cause.is_empty() {
        return cause.clone();
    }
    format!("rank {rank} ended before it joined: {}", Exit::from_code(*exit).after(cause))
}

pub(super) fn joined(missing: &[u32], processes: u32) -> usize {
    (processes as usize).saturating_sub(missing.len())
}

/// Formats ranks for error messages.
pub fn ranks(ranks: &[u32]) -> String {
    let word = if ranks.len() == 1 { "rank" } else { "ranks" };
    let listed: Vec<String> = ranks.iter().take(LISTED_MAX).map(u32::to_string).collect();
    format!("{word} {}{}", listed.join(", "), more(ranks.len()))
}

fn refused_connections(connections: u64) -> String {
    match connections {
        0 => String::new(),
        n => format!(
            "; rank 0 refused {n} connections: a rank has another secret or version, or other programs connected"
        ),
    }
}

fn list(conflicts: &[Conflict]) -> String {
    let listed: Vec<String> = conflicts.iter().take(LISTED_MAX).map(Conflict::to_string).collect();
    format!("{}{}", listed.join("; "), more(conflicts.len()))
}

fn more(count: usize) -> String {
    if count > LISTED_MAX { format!(" and {} more", count - LISTED_MAX) } else { String::new() }
}

pub(super) const WAIT_LONGER: &str = "to wait longer, set SHARDFLOW_MEET_MS or pass --meet-wait to `shardflow launch`";

pub(super) type Outcome = Result<(Roster, Listener), RendezvousError>;

/// Why this process did not join a world.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum RendezvousError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("{0}; {WAIT_LONGER}")]
    NotReached(TransportError),
    #[error("cannot start: {0}")]
    Refused(RendezvousRefusal),
    #[error(
        "rank {process} joined too late: epoch {epoch} already runs at {coordinator}; \
         stop that run, or restart all ranks together"
    )]
    Late { process: u32, epoch: u64, coordinator: Address },
    #[error("rank {process} is not in a world of {processes}: ranks begin at 0, and a world has 1 to 4096 processes")]
    Rank { process: u32, processes: u32 },
    #[error("{process} has {length} {part}, but the maximum is {length_max}")]
    TooLong { process: ProcessLabel, part: String, length: usize, length_max: usize },
    #[error("cannot read this process's {part}: {cause}")]
    Identity { part: &'static str, cause: io::Error },
    #[error("cannot listen on {coordinator}: another program or another job uses it; choose another port")]
    InUse { coordinator: Address },
    #[error("no route to {coordinator}: {cause}")]
    NoRoute { coordinator: Address, cause: io::Error },
    /// Process 0 received the join request, but did not answer in time, or answered with an invalid message.
    #[error("rank 0 at {coordinator} {action}")]
    Unexpected { coordinator: Address, action: String },
}
