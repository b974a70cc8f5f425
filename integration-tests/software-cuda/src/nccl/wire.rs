//! What processes tell each other of a communicator whose ranks they share, and a process's connection to the hub.
//!
//! A message is a header in JSON and raw bytes, each behind its length. It is a test's own, between its own processes:
//! nothing is checked but that it can be read.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;

use cudarc::nccl::sys::ncclUniqueId;
use serde::{Deserialize, Serialize};

use crate::nccl::abroad::{Answer, deliver};
use crate::nccl::engine::{Call, Tag};
use crate::world::{lock, world};

/// What ranks of several processes do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Meeting {
    /// The n-th collective of the communicator.
    Collective(u64),
    /// The n-th message from a rank to a rank.
    Message(usize, usize, u64),
}

impl Meeting {
    /// What a part of a rank is to all.
    pub fn of(rank: usize, tag: Tag) -> Meeting {
        match tag {
            Tag::Collective(n) => Meeting::Collective(n),
            Tag::Send(to, n) => Meeting::Message(rank, to, n),
            Tag::Receive(from, n) => Meeting::Message(from, rank, n),
        }
    }
}

/// A rank that joins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Joining {
    /// Names the communicator.
    pub clique: String,
    /// Of the communicator.
    pub ranks: usize,
    /// Its own.
    pub rank: usize,
    /// Node and number: no two ranks may be on one.
    pub device: (String, usize),
    /// Its process.
    pub process: u32,
}

/// One end of the messages from a rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Direction {
    /// Whose end it is.
    pub rank: usize,
    /// The other.
    pub peer: usize,
    /// Whether it sends.
    pub sends: bool,
}

impl Direction {
    /// That of a rank's first message, if the call is for one.
    pub fn of_first(rank: usize, tag: Tag) -> Option<Direction> {
        match tag {
            Tag::Send(peer, 1) => Some(Direction { rank, peer, sends: true }),
            Tag::Receive(peer, 1) => Some(Direction { rank, peer, sends: false }),
            _ => None,
        }
    }

    /// The other end.
    pub fn other(self) -> Direction {
        Direction { rank: self.peer, peer: self.rank, sends: !self.sends }
    }
}

/// What is said.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// To the hub: a rank joins.
    Join(Joining),
    /// To the hub: ranks of one process call, with what they send, one after another. To all: what came of it.
    Post {
        meeting: Meeting,
        /// Rank, call, bytes that it sends.
        calls: Vec<(usize, Call, usize)>,
    },
    /// To the hub, and on to the others: a rank has called for its first message to a peer, or from it.
    Call(Direction),
    /// To the hub: a rank is given up, in order or not.
    Leave { rank: usize, in_order: bool },
    /// To the hub, and on to the others: this process moves, or compiles.
    Busy,
    /// From the hub: all ranks are there.
    Full,
    /// From the hub: these ranks do not go together.
    Refused,
    /// From the hub: what came of a meeting, or why nothing did.
    Answer { meeting: Meeting, mismatch: Option<String> },
    /// From the hub: a rank was given up out of order, or its process is gone.
    Lost,
    /// From the hub: its own process has given up all its ranks in order, and may be gone soon.
    HubLeft,
}

/// Writes one message.
pub fn say(mut to: &UnixStream, said: &Said, bytes: &[u8]) -> io::Result<()> {
    let header = serde_json::to_vec(said)?;
    let lengths = [header.len() as u64, bytes.len() as u64].map(u64::to_le_bytes);
    to.write_all(&[lengths.concat(), header].concat())?;
    to.write_all(bytes)
}

/// Reads one message; an error at the end.
pub fn hear(from: &mut BufReader<UnixStream>) -> io::Result<(Said, Vec<u8>)> {
    let mut length = || {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes).map(|()| u64::from_le_bytes(bytes) as usize)
    };
    let (header, bytes) = (length()?, length()?);
    let (mut header, mut bytes) = (vec![0; header], vec![0; bytes]);
    from.read_exact(&mut header)?;
    from.read_exact(&mut bytes)?;
    Ok((serde_json::from_slice(&header)?, bytes))
}

/// The name of a communicator, which a unique id is: the name of the hub's socket, `/`, and a number.
pub fn name_of(id: &ncclUniqueId) -> String {
    let bytes: Vec<u8> = id.internal.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The unique id that is this name.
pub fn id_of(name: &str) -> ncclUniqueId {
    let mut internal = [0; 128];
    internal.iter_mut().zip(name.bytes().take(127)).for_each(|(to, byte)| *to = byte as _);
    ncclUniqueId { internal }
}

/// Where a hub listens. The name is the kernel's: no file is left behind.
pub fn address(clique: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(clique.split('/').next().unwrap_or_default())
}

/// A process's connection to the hub of one communicator.
#[derive(Debug)]
pub struct Wire(Mutex<UnixStream>);

impl Wire {
    /// Connects; `clique` is the handle of the communicator's ranks in this process, which learn what the hub says.
    pub fn connect(name: &str, clique: u64) -> io::Result<Arc<Wire>> {
        let stream = UnixStream::connect_addr(&address(name)?)?;
        let mut from = BufReader::new(stream.try_clone()?);
        thread::Builder::new().name("software-nccl".into()).spawn(move || {
            while let Ok((said, bytes)) = hear(&mut from) {
                let said = match said {
                    Said::Answer { meeting, mismatch } => Heard::Answer(meeting, Arc::new(Answer { mismatch, bytes })),
                    said => Heard::Other(said),
                };
                deliver(world(), clique, said);
            }
            deliver(world(), clique, Heard::End);
        })?;
        Ok(Arc::new(Wire(Mutex::new(stream))))
    }

    /// Tells the hub. That it is gone, the reader learns.
    pub fn say(&self, said: &Said, bytes: &[u8]) {
        let _ = say(&lock(&self.0), said, bytes);
    }

    /// Nothing more is said.
    pub fn end(&self) {
        let _ = lock(&self.0).shutdown(Shutdown::Write);
    }
}

/// What a process hears of a communicator.
pub enum Heard {
    /// What came of a meeting.
    Answer(Meeting, Arc<Answer>),
    /// Anything else that the hub says.
    Other(Said),
    /// The hub is gone, or this process has given up all its ranks.
    End,
}
