//! Messages of the rendezvous, and the causes that refuse a start.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};
use shardflow_actors::transport::{Address, SessionId, SettledWorld, TransportError};

use crate::declare::{COLLECTIVES, EXECUTABLE, KERNELS, MESH, PLAN, PROCESSES, TRANSPORT, VALUE_BYTES_MAX, VERSION};
use crate::exit::{Exit, Report};
use crate::machine::affinity;

/// Bytes of an introduction, at most.
pub(super) const INTRODUCTION_BYTES_MAX: usize = 16 << 10;
const NAME_BYTES_MAX: usize = 256;
const FACTS_MAX: usize = 96;
/// Bytes of all facts' names and values.
const FACTS_BYTES_MAX: usize = 9 << 10;
const ADDRESSES_MAX: usize = 8;
const ADDRESS_BYTES_MAX: usize = 512;
/// 1024 cores, the size of the kernel's affinity mask.
const CORES_WORDS_MAX: usize = 16;
/// Ranks, or conflicts, that a message lists before it says how many more there are.
const LISTED_MAX: usize = 16;

/// Which program a process runs, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Version of this crate.
    pub version: String,
    /// BLAKE3 of the executable.
    pub binary: [u8; 32],
    /// The same for all processes of one machine: the boot of a kernel, and the host name.
    pub node: String,
    /// The same for processes that can open each other's sockets below `TMPDIR`: a hash of user, device, inode and path of that
    /// folder. Containers of one host may have the same node, and each a `/tmp` of its own.
    pub sockets: [u8; 32],
    /// The cores that it may run on: see [`crate::machine::threads_per_device`].
    pub cores: Vec<u64>,
    /// Host name, for messages.
    pub host: String,
    /// Process id, for messages.
    pub pid: u32,
}

impl Identity {
    /// Of the running process. Reads the whole executable.
    ///
    /// # Errors
    /// [`RendezvousError::Identity`].
    pub fn of_this_process() -> Result<Self, RendezvousError> {
        let failed = |what| move |cause| RendezvousError::Identity { what, cause };
        // The link of the kernel leads to the file that runs, even when another has been put in its place.
        let executable = File::open("/proc/self/exe");
        let executable = executable.or_else(|_| std::env::current_exe().and_then(File::open));
        let mut hasher = blake3::Hasher::new();
        executable.and_then(|file| hasher.update_reader(file).map(drop)).map_err(failed("executable"))?;
        let read = |path| std::fs::read_to_string(path).map(|text| text.trim().to_string());
        let host = read("/proc/sys/kernel/hostname").map_err(failed("host name"))?;
        let boot = read("/proc/sys/kernel/random/boot_id").map_err(failed("boot id"))?;
        let (version, pid) = (env!("CARGO_PKG_VERSION").into(), std::process::id());
        let folder = std::env::temp_dir();
        let place = std::fs::metadata(&folder).map(|data| (data.dev(), data.ino())).ok();
        let sockets = format!("{:?} {place:?} {folder:?}", rustix::process::geteuid());
        let (binary, sockets) = (*hasher.finalize().as_bytes(), *blake3::hash(sockets.as_bytes()).as_bytes());
        Ok(Self { version, binary, node: format!("{boot} {host}"), sockets, cores: affinity(), host, pid })
    }
}

/// One process of a world, as all others know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its rank.
    pub process: u32,
    /// See [`Identity::node`].
    pub node: String,
    /// See [`Identity::sockets`].
    pub sockets: [u8; 32],
    /// See [`Identity::cores`].
    pub cores: Vec<u64>,
    /// See [`Identity::host`].
    pub host: String,
    /// See [`Identity::pid`].
    pub pid: u32,
    /// How often it has been restarted.
    pub restart: u64,
    /// Where its endpoint listens.
    pub addresses: Vec<Address>,
    /// Where it hears heartbeats (UDP).
    pub heartbeat: SocketAddr,
}

impl Member {
    /// Who, for messages.
    pub fn who(&self) -> ProcessLabel {
        ProcessLabel { process: self.process, host: self.host.clone(), pid: self.pid }
    }

    /// True when the two run on one node and can open each other's Unix sockets.
    pub fn is_near(&self, other: &Self) -> bool {
        let can_open = self.sockets == other.sockets && self.unix().is_some() && other.unix().is_some();
        self.node == other.node && can_open
    }

    /// Where to dial it from another node.
    pub fn tcp(&self) -> Option<&Address> {
        self.addresses.iter().find(|a| matches!(a, Address::Tcp(_)))
    }

    /// Where to dial it from its own node.
    pub fn unix(&self) -> Option<&Address> {
        self.addresses.iter().find(|a| matches!(a, Address::Unix(_)))
    }
}

/// A value that must be equal on all processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// Its name.
    pub name: String,
    /// Its value, as text.
    pub value: String,
}

impl Fact {
    /// Makes a fact.
    pub fn new(name: impl Into<String>, value: impl ToString) -> Self {
        Self { name: name.into(), value: value.to_string() }
    }
}

/// What a process says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinInfo {
    /// Who and where.
    pub member: Member,
    /// Values that must be equal on all processes, ordered so that a difference explains those after it.
    pub facts: Vec<Fact>,
}

impl JoinInfo {
    /// Whether every part is of a reasonable size.
    ///
    /// # Errors
    /// [`RendezvousError::TooLong`].
    pub fn check(&self) -> Result<(), RendezvousError> {
        let member = &self.member;
        let longest = member.addresses.iter().map(|a| a.to_string().len()).max().unwrap_or(0);
        let all_bytes = self.facts.iter().map(|fact| fact.name.len() + fact.value.len()).sum();
        let fixed = [
            ("node", member.node.len(), NAME_BYTES_MAX),
            ("host name", member.host.len(), NAME_BYTES_MAX),
            ("mask of cores", member.cores.len(), CORES_WORDS_MAX),
            ("list of addresses", member.addresses.len(), ADDRESSES_MAX),
            ("address", longest, ADDRESS_BYTES_MAX),
            ("list of facts", self.facts.len(), FACTS_MAX),
        ];
        // The first fact that is too long explains why all are.
        let facts = self.facts.iter().map(|fact| (fact.name.as_str(), fact.value.len(), VALUE_BYTES_MAX));
        let total = ("text of all facts", all_bytes, FACTS_BYTES_MAX);
        for (what, length, length_max) in fixed.into_iter().chain(facts).chain([total]) {
            if length > length_max {
                let what = what.chars().take(NAME_BYTES_MAX).collect();
                return Err(RendezvousError::TooLong { who: member.who(), what, length, length_max });
            }
        }
        Ok(())
    }

    /// The first fact in which another process differs.
    pub(super) fn conflict(&self, other: &Self) -> Option<Conflict> {
        let value = |of: &Self, name: &str| {
            let fact = of.facts.iter().find(|fact| fact.name == name);
            fact.map_or_else(|| "nothing".to_owned(), |fact| fact.value.clone())
        };
        self.facts.iter().chain(&other.facts).find_map(|Fact { name, .. }| {
            let (ours, theirs) = (value(self, name), value(other, name));
            let (name, first, second) = (name.clone(), self.member.who(), other.member.who());
            (ours != theirs).then_some(Conflict::Differs { name, first, ours, second, theirs })
        })
    }
}

/// The members of a world that starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    /// Random; the same for all.
    pub session: SessionId,
    /// The most restarts of any member.
    pub epoch: u64,
    /// By rank.
    pub members: Vec<Member>,
}

impl Roster {
    /// What an endpoint needs of it.
    pub fn world(&self) -> SettledWorld {
        SettledWorld { session: self.session, epoch: self.epoch, processes: self.members.len() as u32 }
    }
}

/// To process 0: the first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Call {
    /// A process wants to join.
    Join(JoinInfo),
    /// These ranks do not join, and a new start would not help.
    Failed { ranks: Range<u32>, report: Report },
}

/// From process 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// All are here: let them in, and say [`Ready`].
    Roster(Roster),
    /// All are ready.
    Start,
    /// There is no world.
    Refused(RendezvousRefusal),
}

/// To process 0: the members of this session can be let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ready {
    pub session: SessionId,
}

/// A process, for messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLabel {
    /// Its rank.
    pub process: u32,
    /// Its host.
    pub host: String,
    /// Its id there.
    pub pid: u32,
}

impl fmt::Display for ProcessLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} (host {}, pid {})", self.process, self.host, self.pid)
    }
}

/// How to fix a difference in a fact.
fn advice(name: &str) -> &'static str {
    match name {
        VERSION | EXECUTABLE => "start the same build on every node",
        PROCESSES => "give every launcher the same numbers of nodes and processes",
        MESH => "give every rank the same mesh",
        TRANSPORT => "set the same SHARDFLOW_TRANSPORT on every node",
        COLLECTIVES => "set the same SHARDFLOW_COLLECTIVES on every node",
        KERNELS => "use nodes of one kind, with the same environment: results would differ by rounding",
        PLAN => "give every rank the same arguments and configuration",
        _ => "give every rank the same value",
    }
}

/// Two processes that cannot be in one world.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Conflict {
    /// They do not run the same thing.
    #[error("{first} and {second} differ in their {name}: {ours} and {theirs}; {}", advice(.name))]
    Differs {
        /// The fact in which they differ.
        name: String,
        /// One; rank 0.
        first: ProcessLabel,
        /// What it has.
        ours: String,
        /// The other.
        second: ProcessLabel,
        /// What it has.
        theirs: String,
    },
    /// They claim the same rank.
    #[error("two processes claim one rank: {first} and {second}; give each its own")]
    Duplicate {
        /// The one that came first.
        first: ProcessLabel,
        /// The other.
        second: ProcessLabel,
    },
}

/// Why there is no world; all processes that can be reached are told the same.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum RendezvousRefusal {
    /// Some do not fit together.
    #[error("the ranks do not fit together: {}", list(.0))]
    Conflicts(Vec<Conflict>),
    /// Some did not come.
    #[error(
        "{} did not come in {waited_ms} ms: {} of {processes} were here{}",
        ranks(.missing), here(.missing, *.processes), turned_away(*.refused)
    )]
    Missing {
        /// Their ranks, at least one.
        missing: Vec<u32>,
        /// Processes of the world.
        processes: u32,
        /// Milliseconds waited.
        waited_ms: u64,
        /// Connections that rank 0 did not let in meanwhile.
        refused: u64,
    },
    /// One ended before it joined, for a cause that no restart fixes.
    #[error("rank {} ended before it joined: {} ({})", .0.rank, .0.cause.trim(), Exit::from_code(.0.exit))]
    Failed(Report),
    /// One went away, or froze, after all had come.
    #[error("{0} was here and is gone; see its log")]
    Lost(ProcessLabel),
}

/// Who is not here yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MissingRanks {
    /// At process 0.
    Ranks {
        /// Their ranks.
        missing: Vec<u32>,
        /// Processes of the world.
        processes: u32,
    },
    /// Elsewhere: process 0 cannot be reached yet.
    Coordinator {
        /// Where it should be.
        address: Address,
    },
}

impl fmt::Display for MissingRanks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ranks { missing, processes } => {
                write!(f, "waiting for {}: {} of {processes} here", ranks(missing), here(missing, *processes))
            }
            Self::Coordinator { address } => write!(f, "waiting for rank 0 at {address}"),
        }
    }
}

fn here(missing: &[u32], processes: u32) -> usize {
    (processes as usize).saturating_sub(missing.len())
}

/// Ranks, for messages.
pub(crate) fn ranks(ranks: &[u32]) -> String {
    let word = if ranks.len() == 1 { "rank" } else { "ranks" };
    let listed: Vec<String> = ranks.iter().take(LISTED_MAX).map(u32::to_string).collect();
    format!("{word} {}{}", listed.join(", "), more(ranks.len()))
}

fn turned_away(connections: u64) -> String {
    match connections {
        0 => String::new(),
        n => format!("; rank 0 refused {n} connections: another secret or version on some rank, or strangers"),
    }
}

fn list(conflicts: &[Conflict]) -> String {
    let listed: Vec<String> = conflicts.iter().take(LISTED_MAX).map(Conflict::to_string).collect();
    format!("{}{}", listed.join("; "), more(conflicts.len()))
}

fn more(count: usize) -> String {
    if count > LISTED_MAX { format!(" and {} more", count - LISTED_MAX) } else { String::new() }
}

/// Why a process did not get into a world.
#[derive(Debug, thiserror::Error)]
pub enum RendezvousError {
    /// A connection could not be made, or broke.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// There is no world, for anybody.
    #[error("no start: {0}")]
    Refused(RendezvousRefusal),
    /// There is one, without this process.
    #[error(
        "rank {process} came too late: epoch {epoch} runs at {coordinator}; \
         end it there, or restart all ranks together"
    )]
    Late {
        /// This process.
        process: u32,
        /// The epoch that runs.
        epoch: u64,
        /// Where.
        coordinator: Address,
    },
    /// A rank that its world does not have.
    #[error("rank {process} of a world of {processes}: expected 1 to 4096 processes, and ranks below their number")]
    Rank {
        /// The rank.
        process: u32,
        /// Processes of the world.
        processes: u32,
    },
    /// Something that a process says of itself is too long.
    #[error("{who}: {what} of length {length}, at most {length_max} is allowed")]
    TooLong {
        /// Of whom.
        who: ProcessLabel,
        /// What.
        what: String,
        /// Its length.
        length: usize,
        /// The most.
        length_max: usize,
    },
    /// The process cannot say what it is.
    #[error("cannot read this process's {what}: {cause}")]
    Identity {
        /// What.
        what: &'static str,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The coordinator's name or network is not known here.
    #[error("no way from here to {coordinator}: {cause}")]
    NoWay {
        /// Where rank 0 should be.
        coordinator: Address,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// Process 0 took the introduction, and then did not answer in time, or with what it cannot say: a bug.
    #[error("rank 0 at {coordinator} {what}")]
    Unexpected {
        /// Where it is.
        coordinator: Address,
        /// What it did.
        what: String,
    },
}
