//! The messages between processes that share a communicator, and the connection of a process to the hub.
//!
//! A message consists of a JSON header and raw bytes, each preceded by its length. Only processes of one
//! test exchange messages, so the reader checks only whether it can decode a message.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;

use cudarc::nccl::sys::ncclUniqueId;
use serde::{Deserialize, Serialize};

use crate::nccl::abroad::{ExchangeResult, deliver};
use crate::nccl::engine::{Call, Tag};
use crate::world::{lock, machine};

/// Identifies a collective or message in the same way on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum ExchangeId {
    /// The n-th collective of the communicator.
    Collective(u64),
    /// The n-th message from one rank to another.
    Message(usize, usize, u64),
}

impl ExchangeId {
    /// Returns the exchange to which a rank's part belongs.
    pub fn of(rank: usize, tag: Tag) -> ExchangeId {
        match tag {
            Tag::Collective(n) => ExchangeId::Collective(n),
            Tag::Send(to, n) => ExchangeId::Message(rank, to, n),
            Tag::Receive(from, n) => ExchangeId::Message(from, rank, n),
        }
    }
}

/// A rank's request to join.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct JoinRequest {
    /// Name of the communicator.
    pub clique: String,
    /// Number of ranks of the communicator.
    pub ranks: usize,
    /// The joining rank.
    pub rank: usize,
    /// Node and device number. Two ranks must not share a device.
    pub device: (String, usize),
    /// Process id of the joining rank.
    pub process: u32,
}

/// One end (the sender or the receiver) of all messages from one rank to another rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Direction {
    /// The rank of this end.
    pub rank: usize,
    /// The other rank.
    pub peer: usize,
    /// Whether this end is the sender.
    pub sends: bool,
}

impl Direction {
    /// Returns this end of a rank's first message to or from a peer, or `None` for any other tag.
    pub fn of_first(rank: usize, tag: Tag) -> Option<Direction> {
        match tag {
            Tag::Send(peer, 1) => Some(Direction { rank, peer, sends: true }),
            Tag::Receive(peer, 1) => Some(Direction { rank, peer, sends: false }),
            _ => None,
        }
    }

    /// Returns the other end.
    pub fn other(self) -> Direction {
        Direction { rank: self.peer, peer: self.rank, sends: !self.sends }
    }
}

/// A message to or from the hub.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum HubMessage {
    /// To the hub: a rank joins.
    Join(JoinRequest),
    /// To the hub: calls of the sending process's ranks, followed by their data.
    Post {
        exchange: ExchangeId,
        /// Rank, call, and number of bytes that the rank sends.
        calls: Vec<(usize, Call, usize)>,
    },
    /// To the hub, which forwards it: a rank has made the call for its first message to or from a peer.
    Call(Direction),
    /// To the hub: a rank's communicator was destroyed (`in_order`) or aborted.
    Leave { rank: usize, in_order: bool },
    /// To the hub, which forwards it: the sending process makes progress or compiles.
    Busy,
    /// From the hub: all ranks have joined.
    Full,
    /// From the hub: the ranks' requests to join are inconsistent.
    Refused,
    /// From the hub: the result of an exchange, or its mismatch.
    ExchangeResult { exchange: ExchangeId, mismatch: Option<String> },
    /// From the hub: a rank's communicator was aborted, or a process has ended without closing its ranks.
    Lost,
    /// From the hub: the hub's process has destroyed all its ranks and may end soon.
    HubLeft,
}

/// Writes a message.
pub fn write_message(mut to: &UnixStream, message: &HubMessage, bytes: &[u8]) -> io::Result<()> {
    let header = serde_json::to_vec(message)?;
    let lengths = [header.len() as u64, bytes.len() as u64].map(u64::to_le_bytes);
    to.write_all(&[lengths.concat(), header].concat())?;
    to.write_all(bytes)
}

/// Reads a message. Returns an error at the end of the stream.
pub fn read_message(from: &mut BufReader<UnixStream>) -> io::Result<(HubMessage, Vec<u8>)> {
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

/// Decodes a communicator's name from its unique id. The name is the name of the hub's socket, `/`, and a number.
pub fn name_of(id: &ncclUniqueId) -> String {
    let bytes: Vec<u8> = id.internal.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Returns the unique id that encodes a name.
pub fn id_of(name: &str) -> ncclUniqueId {
    let mut internal = [0; 128];
    internal.iter_mut().zip(name.bytes().take(127)).for_each(|(to, byte)| *to = byte as _);
    ncclUniqueId { internal }
}

/// Returns the socket address of a hub. The socket is abstract, so it leaves no file behind.
pub fn address(clique: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(clique.split('/').next().unwrap_or_default())
}

/// The connection of a process to the hub of one communicator.
#[derive(Debug)]
pub(crate) struct HubConnection(Mutex<UnixStream>);

impl HubConnection {
    /// Connects to the hub. A thread delivers the hub's messages to the clique with the handle `clique`.
    pub fn connect(name: &str, clique: u64) -> io::Result<Arc<HubConnection>> {
        let stream = UnixStream::connect_addr(&address(name)?)?;
        let mut from = BufReader::new(stream.try_clone()?);
        thread::Builder::new().name("software-nccl".into()).spawn(move || {
            while let Ok((message, bytes)) = read_message(&mut from) {
                let message = match message {
                    HubMessage::ExchangeResult { exchange, mismatch } => {
                        HubEvent::ExchangeResult(exchange, Arc::new(ExchangeResult { mismatch, bytes }))
                    }
                    message => HubEvent::Other(message),
                };
                deliver(machine(), clique, message);
            }
            deliver(machine(), clique, HubEvent::End);
        })?;
        Ok(Arc::new(HubConnection(Mutex::new(stream))))
    }

    /// Sends a message to the hub. Ignores errors, because the thread that reads notices a closed connection.
    pub fn send(&self, message: &HubMessage, bytes: &[u8]) {
        let _ = write_message(&lock(&self.0), message, bytes);
    }

    /// Closes the sending side.
    pub fn end(&self) {
        let _ = lock(&self.0).shutdown(Shutdown::Write);
    }
}

/// An event that the hub's connection delivers to a communicator.
pub(crate) enum HubEvent {
    /// The result of an exchange.
    ExchangeResult(ExchangeId, Arc<ExchangeResult>),
    /// Any other message from the hub.
    Other(HubMessage),
    /// The connection has ended.
    End,
}
