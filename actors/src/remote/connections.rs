//! The threads of the connections to peers: one writes what is in an outbox, one reads what the peer tells.

use std::collections::BTreeMap;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use shardflow_kernels::cuda::nccl::{Pipe, Sent};
use shardflow_kernels::tensor::{HostTensor, element_count};

use super::{ByteRun, HostPiece, Outgoing, PeerEnd, PeerMessage, PeerSpec};
use crate::error::{Failure, PeerError};
use crate::message::Cast;
use crate::protocol::{Message, ProtocolEvent};
use crate::shell::RegisterMemory;
use crate::spec::RegisterId;
use crate::supervisor::Session;
use crate::transport::Connection;
use crate::transport::frame::{FRAME_BYTES, Frame};

/// Bytes that are gathered before they are written; longer runs go straight from the slot to the connection.
const BUFFER_BYTES: usize = 1 << 16;

/// Host pieces that may wait to be taken; a step's worth of a large mesh, and far less than what would hurt.
const HOST_PIECES_MAX: usize = 1 << 16;

/// Starts two threads for each peer. They end after [`Remote::end`], when the links are shut down.
pub(crate) fn serve(
    session: &Arc<Session>,
    ends: Vec<PeerEnd>,
    memory: &Arc<BTreeMap<RegisterId, RegisterMemory>>,
) -> io::Result<Connections> {
    let mut connections = Connections::default();
    for PeerEnd { peer, index, outgoing } in ends {
        let PeerSpec { process, link, pushes, mirrors, pipes, .. } = peer;
        let (pipes, sent) = (Arc::new(pipes), Arc::<SentSlots>::default());
        let (out, back) = (link.try_clone()?, link.try_clone()?);
        connections.links.push(link);
        let initial = pushes.keys().filter(|r| session.spec.registers[r.0 as usize].initial).copied().collect();
        let mut writer = Writer {
            sink: BufWriter::with_capacity(BUFFER_BYTES, out),
            session: session.clone(),
            memory: memory.clone(),
            pipes: pipes.clone(),
            sent: sent.clone(),
            pushes,
            initial,
            pushed: BTreeMap::new(),
        };
        let reporter = session.clone();
        let write = move || {
            if let Err(cause) = writer.run(&outgoing) {
                reporter.peer_lost(process, cause.to_string());
            }
        };
        connections.writers.push(thread::Builder::new().name(format!("to rank {process}")).spawn(write)?);
        let source = BufReader::with_capacity(BUFFER_BYTES, back);
        let reader = Reader {
            source,
            session: session.clone(),
            memory: memory.clone(),
            pipes,
            sent,
            process,
            index,
            mirrors,
            pieces: BTreeMap::new(),
        };
        let read = move || reader.run();
        connections.readers.push(thread::Builder::new().name(format!("from rank {process}")).spawn(read)?);
    }
    Ok(connections)
}

/// How long a refresh waits for readers to end; less than the peer's time-out of a write.
const READ_WITHIN: Duration = Duration::from_secs(2);
/// How long what is queued may take to be written at the end.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// How often the threads are looked at meanwhile.
const CLOSE_STEP: Duration = Duration::from_millis(1);

/// The threads and connections of all peers.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    links: Vec<Connection>,
    writers: Vec<JoinHandle<()>>,
    readers: Vec<JoinHandle<()>>,
}

impl Connections {
    /// Ends all threads. In order, what is queued is written first, for [`CLOSE_WITHIN`] at most: then `give_up` ends what a peer
    /// does not take. A failed session waits for nobody.
    pub(crate) fn close(&mut self, in_order: bool, give_up: impl Fn()) {
        // A link that cannot be shut down is down.
        let down = |links: &[Connection]| links.iter().for_each(|link| drop(link.shutdown()));
        if !in_order {
            down(&self.links);
        }
        let deadline = Instant::now() + CLOSE_WITHIN;
        while self.writers.iter().any(|writer| !writer.is_finished()) {
            if Instant::now() >= deadline {
                give_up();
                down(&self.links);
                break;
            }
            thread::sleep(CLOSE_STEP);
        }
        // A panic of these threads would be a bug of this file; there is nothing left to stop.
        self.writers.drain(..).for_each(|thread| drop(thread.join()));
        down(&self.links);
        self.readers.drain(..).for_each(|thread| drop(thread.join()));
        self.links.clear();
    }
}

/// The last send of each slot that took a pipe: until it is over, the slot is not the producer's again.
type SentSlots = Mutex<BTreeMap<(RegisterId, u32), Sent>>;

struct Writer {
    sink: BufWriter<Connection>,
    session: Arc<Session>,
    memory: Arc<BTreeMap<RegisterId, RegisterMemory>>,
    pipes: Arc<BTreeMap<RegisterId, Arc<Pipe>>>,
    sent: Arc<SentSlots>,
    pushes: BTreeMap<RegisterId, Vec<ByteRun>>,
    initial: Vec<RegisterId>,
    /// The last piece whose bytes were sent.
    pushed: BTreeMap<RegisterId, u64>,
}

impl Writer {
    /// Writes until [`Outgoing::End`]; flushes whenever nothing is queued.
    fn run(&mut self, outgoing: &Receiver<Outgoing>) -> io::Result<()> {
        while let Ok(first) = outgoing.recv() {
            for out in std::iter::once(first).chain(outgoing.try_iter()) {
                match out {
                    Outgoing::Message(message, clock) => {
                        clock.join();
                        self.message(message)?;
                    }
                    Outgoing::Host(piece) => self.host(&piece)?,
                    Outgoing::Refresh(round, clock) => {
                        clock.join();
                        for register in self.initial.clone() {
                            self.slot(register, 0, 0)?;
                        }
                        self.frame(Frame::Ready { round })?;
                    }
                    Outgoing::End => {
                        self.frame(Frame::Bye)?;
                        return self.sink.flush();
                    }
                }
            }
            self.sink.flush()?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: Frame) -> io::Result<()> {
        self.sink.write_all(&frame.encode())
    }

    fn message(&mut self, message: Message) -> io::Result<()> {
        if let Message::Filled { register, slot, piece, .. } = message
            && self.pushes.contains_key(&register)
            && self.pushed.insert(register, piece) != Some(piece)
        {
            self.slot(register, slot, piece)?;
        }
        let (Message::Filled { register, .. } | Message::Released { register, .. }) = message;
        self.session.bus.remote().told[register.0 as usize].add();
        self.frame(Frame::Message(message))
    }

    /// The bytes that the peer reads of a slot, run after run: behind the frame, or through a pipe.
    fn slot(&mut self, register: RegisterId, slot: u32, piece: u64) -> io::Result<()> {
        let runs = &self.pushes[&register];
        let bytes = runs.iter().map(|run| run.bytes as u64).sum();
        let frame = Frame::Data { register, slot, piece, bytes };
        let memory = &self.memory[&register];
        let (arena, start) = (&memory.base.arena, memory.base.offset + slot as usize * memory.stride);
        if let Some(pipe) = self.pipes.get(&register) {
            // PIPE-2: called, announced, and only then waited for.
            pipe.send(arena, runs.iter().map(|run| (start + run.offset, run.bytes)))?;
            self.sink.write_all(&frame.encode())?;
            self.sink.flush()?;
            let sent = pipe.settle(arena)?;
            self.sent.lock().unwrap_or_else(PoisonError::into_inner).insert((register, slot), sent);
        } else {
            self.sink.write_all(&frame.encode())?;
            runs.iter().try_for_each(|run| arena.write_to(start + run.offset, run.bytes, &mut self.sink))?;
        }
        self.session.bus.remote().told[register.0 as usize].add();
        Ok(())
    }

    fn host(&mut self, piece: &HostPiece) -> io::Result<()> {
        let bytes: usize = piece.tensors.iter().map(|t| t.elements_held() * t.dtype().bytes()).sum();
        self.frame(Frame::Host { port: piece.port, bytes: bytes as u64 })?;
        for tensor in &piece.tensors {
            self.sink.write_all(tensor.as_bytes())?;
        }
        Ok(())
    }
}

struct Reader {
    source: BufReader<Connection>,
    session: Arc<Session>,
    memory: Arc<BTreeMap<RegisterId, RegisterMemory>>,
    pipes: Arc<BTreeMap<RegisterId, Arc<Pipe>>>,
    sent: Arc<SentSlots>,
    process: u32,
    index: usize,
    mirrors: BTreeMap<RegisterId, Vec<ByteRun>>,
    /// Pieces whose bytes have come, by register.
    pieces: BTreeMap<RegisterId, u64>,
}

impl Reader {
    fn run(mut self) {
        loop {
            match self.next() {
                Ok(true) => {}
                Ok(false) => return,
                Err(PeerError::Lost { message }) => return self.session.peer_lost(self.process, message),
                Err(cause) => return self.session.fail(Failure::Peer { process: self.process, cause }),
            }
        }
    }

    /// Takes one frame in; false after the last one.
    fn next(&mut self) -> Result<bool, PeerError> {
        let mut header = [0; FRAME_BYTES];
        self.source.read_exact(&mut header)?;
        match Frame::decode(&header)? {
            Frame::Bye => {
                self.session.peer_left(self.process);
                self.session.bus.remote().has_ended(self.index);
                self.tell_host(PeerMessage::Ended { process: self.process });
                return Ok(false);
            }
            Frame::Ready { round } if self.session.bus.remote().is_ready(self.index, round) => {}
            Frame::Ready { round } => return Err(self.unexpected(format!("ready for refresh {round} out of order"))),
            Frame::Message(message) => self.message(message)?,
            Frame::Data { register, slot, piece, bytes } => self.data(register, slot, piece, bytes)?,
            Frame::Host { port, bytes } => self.host(port, bytes)?,
        }
        Ok(true)
    }

    fn tell_host(&self, said: PeerMessage) {
        if let Some(host) = &self.session.bus.remote().host {
            // A program that has ended needs nothing.
            let _ = host.send(said);
        }
    }

    fn unexpected(&self, what: String) -> PeerError {
        PeerError::Unexpected { what }
    }

    /// RM-1 of a message: the peer hosts who sends it, and this process whom it is for.
    fn message(&mut self, message: Message) -> Result<(), PeerError> {
        let (Message::Filled { register, reader, piece, .. } | Message::Released { register, reader, piece, .. }) =
            message;
        let remote = self.session.bus.remote();
        let Some((from, to)) = message.ends(&self.session.spec) else {
            return Err(self.unexpected(format!("a message about reader {reader} of register {}", register.0)));
        };
        if remote.peer_of[from.0 as usize] != Some(self.index) || !remote.is_here(to) {
            let name = self.session.spec.register_name(register);
            return Err(
                self.unexpected(format!("a message about register '{name}' between actors {from:?} and {to:?}"))
            );
        }
        if matches!(message, Message::Filled { .. })
            && self.mirrors.contains_key(&register)
            && self.pieces.get(&register).is_none_or(|due| piece >= *due)
        {
            let name = self.session.spec.register_name(register);
            return Err(self.unexpected(format!("piece {piece} of register '{name}' without its bytes")));
        }
        if let Message::Released { register, slot, .. } = message {
            self.end_of_send(register, slot)?;
        }
        remote.told[register.0 as usize].join();
        if self.session.bus.overfull(to) {
            return Err(self.unexpected("more messages than credits allow".into()));
        }
        self.session.bus.send(to, Cast::Event(ProtocolEvent::Message(message)));
        Ok(())
    }

    /// A slot is released only once the send out of it is over here too; that the reader has the bytes, it has said.
    fn end_of_send(&self, register: RegisterId, slot: u32) -> Result<(), PeerError> {
        let Some(pipe) = self.pipes.get(&register) else { return Ok(()) };
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner).get(&(register, slot)).cloned();
        sent.map_or(Ok(()), |sent| pipe.wait(&sent)).map_err(|error| io::Error::from(error).into())
    }

    /// RM-1 of a slot's bytes. The bytes of an initial register's piece 0 may come again (a refresh).
    fn data(&mut self, register: RegisterId, slot: u32, piece: u64, bytes: u64) -> Result<(), PeerError> {
        let name = || self.session.spec.register_name(register);
        let (Some(runs), Some(memory)) = (self.mirrors.get(&register), self.memory.get(&register)) else {
            return Err(self.unexpected(format!("bytes of register '{}'", name())));
        };
        let spec = &self.session.spec.registers[register.0 as usize];
        let due = self.pieces.get(&register).copied().unwrap_or(u64::from(spec.initial));
        let refresh = spec.initial && (slot, piece) == (0, 0);
        if !refresh && (piece != due || u64::from(slot) != piece % u64::from(spec.slots)) {
            let what =
                format!("bytes of piece {piece} of register '{}' for slot {slot}, piece {due} being due", name());
            return Err(self.unexpected(what));
        }
        let expected: u64 = runs.iter().map(|run| run.bytes as u64).sum();
        if bytes != expected {
            return Err(self.unexpected(format!("{bytes} bytes for a slot of register '{}', not {expected}", name())));
        }
        let held = self.session.bus.remote().oldest_held(&self.session.spec, register);
        if !refresh && held.saturating_add(u64::from(spec.slots)) <= piece {
            let what = format!("bytes of piece {piece} of register '{}' over piece {held}, which is in use", name());
            return Err(self.unexpected(what));
        }
        let firings = if refresh { Some(self.wait_for_readers(register)?) } else { None };
        self.session.bus.remote().told[register.0 as usize].join();
        let arena = &memory.base.arena;
        let start = memory.base.offset + slot as usize * memory.stride;
        if let Some(pipe) = self.pipes.get(&register) {
            let received = pipe.receive(arena, runs.iter().map(|run| (start + run.offset, run.bytes)));
            received.map_err(io::Error::from)?;
        } else {
            for run in runs {
                arena.read_from(start + run.offset, run.bytes, &mut self.source)?;
            }
        }
        // A reader that fired meanwhile may have read a part of these bytes.
        if firings.is_some() && self.session.firings_of_readers(register) != firings {
            return Err(self.in_use(register));
        }
        if !refresh {
            self.pieces.insert(register, due + 1);
        }
        Ok(())
    }

    /// RM-3 of a refresh: the firings of the register's readers, once none is in the middle of a step. A peer may have a
    /// step's results a little before the last reader here has ended.
    fn wait_for_readers(&self, register: RegisterId) -> Result<u64, PeerError> {
        let deadline = Instant::now() + READ_WITHIN;
        loop {
            match self.session.firings_of_readers(register) {
                Some(firings) => return Ok(firings),
                None if Instant::now() < deadline => thread::sleep(CLOSE_STEP),
                None => return Err(self.in_use(register)),
            }
        }
    }

    fn in_use(&self, register: RegisterId) -> PeerError {
        let name = self.session.spec.register_name(register);
        self.unexpected(format!("a refresh of register '{name}' in the middle of a step"))
    }

    fn host(&mut self, port: u32, bytes: u64) -> Result<(), PeerError> {
        let remote = self.session.bus.remote();
        let Some(own) = remote.host_ports.get(port as usize).filter(|p| p.process == self.process) else {
            return Err(self.unexpected(format!("tensors for port {port}, which is not its own")));
        };
        let expected: usize = own.tensors.iter().map(|(shape, dtype)| element_count(shape) * dtype.bytes()).sum();
        let queued = remote.host.as_ref().map_or(0, Sender::len);
        if bytes != expected as u64 || queued > HOST_PIECES_MAX {
            return Err(self.unexpected(format!("{bytes} bytes for port {port}, not {expected}, or too many pieces")));
        }
        let mut tensors = Vec::new();
        for (shape, dtype) in own.tensors.clone() {
            let mut raw = vec![0; element_count(&shape) * dtype.bytes()];
            self.source.read_exact(&mut raw)?;
            tensors.push(HostTensor::from_le_bytes(dtype, &shape, &raw));
        }
        self.tell_host(PeerMessage::Piece(HostPiece { port, tensors }));
        Ok(())
    }
}
