//! The threads of the connections to peers. For each peer, one thread writes the outbox and one reads its messages.

use std::collections::BTreeMap;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use shardflow_kernels::cuda::nccl::{Pipe, Sent};
use shardflow_kernels::tensor::{HostTensor, element_count};

use crate::bus::Cast;
use crate::error::{Failure, PeerError};
use crate::frame::{FRAME_BYTES, Frame};
use crate::loaded::Memory;
use crate::protocol::{Message, ProtocolEvent, Sequence};
use crate::remote::{ByteRun, HostPiece, Outgoing, PeerMessage, PeerSpec, Remote};
use crate::spec::RegisterId;
use crate::supervisor::Session;
use shardflow_job::transport::Connection;

/// Size of the buffers in bytes. Longer parts of a slot bypass the buffers.
const BUFFER_BYTES: usize = 1 << 16;

/// Maximum number of pieces that the host has not read. A step of a large mesh needs fewer, and this number of pieces
/// fits in memory.
const HOST_PIECES_MAX: usize = 1 << 16;

/// The data that both threads of a connection use.
struct Link {
    session: Arc<Session>,
    memory: Memory,
    process: u32,
    index: usize,
    pipes: BTreeMap<RegisterId, Arc<Pipe>>,
    /// The last send of each slot through a pipe; the slot returns to the producer only after the send has ended.
    sent: Mutex<BTreeMap<(RegisterId, u32), Sent>>,
}

impl Link {
    fn remote(&self) -> &Remote {
        self.session.bus.remote()
    }
}

/// Starts two threads per peer. They end after [`Remote::end`], when the connections are shut down.
pub(crate) fn serve(
    session: &Arc<Session>,
    ends: Vec<(PeerSpec, Receiver<Outgoing>)>,
    memory: &Memory,
) -> io::Result<Connections> {
    let mut connections = Connections::default();
    for (index, (peer, outgoing)) in ends.into_iter().enumerate() {
        let PeerSpec { process, connection, pushes, mirrors, pipes, .. } = peer;
        let (session, memory, sent) = (session.clone(), memory.clone(), Mutex::default());
        let link = Arc::new(Link { session, memory, process, index, pipes, sent });
        let sink = BufWriter::with_capacity(BUFFER_BYTES, connection.try_clone()?);
        let source = BufReader::with_capacity(BUFFER_BYTES, connection.try_clone()?);
        connections.open.push(connection);
        let writer = Writer { sink, link: link.clone(), pushes, pushed: BTreeMap::new() };
        let write = move || writer.run(&outgoing);
        connections.writers.push(thread::Builder::new().name(format!("to rank {process}")).spawn(write)?);
        let mirrored = mirrors.keys().map(|register| (*register, Mirrored::new(&link, *register))).collect();
        let reader = Reader { source, link, mirrors, mirrored };
        let read = move || reader.run();
        connections.readers.push(thread::Builder::new().name(format!("from rank {process}")).spawn(read)?);
    }
    Ok(connections)
}

/// How long a refresh (bytes of an initial piece that are sent again) waits until the register's local readers have ended
/// their firings. It is shorter than the peer's write timeout.
const READERS_TIMEOUT: Duration = Duration::from_secs(2);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_EVERY: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
pub(crate) struct Connections {
    open: Vec<Connection>,
    writers: Vec<JoinHandle<()>>,
    readers: Vec<JoinHandle<()>>,
}

impl Connections {
    /// Ends all threads. If `in_order` is set, the writers first send the queued messages. If this takes longer than
    /// [`CLOSE_TIMEOUT`], `close` calls `abort` and cuts the connections. A failed session does not wait.
    pub(crate) fn close(&mut self, in_order: bool, abort: impl Fn()) {
        // A connection that cannot be shut down is closed already.
        let shut_down =
            |open: &[Connection]| open.iter().for_each(|connection| drop(connection.shutdown(Shutdown::Both)));
        if !in_order {
            shut_down(&self.open);
        }
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while self.writers.iter().any(|writer| !writer.is_finished()) {
            if Instant::now() >= deadline {
                abort();
                shut_down(&self.open);
                break;
            }
            thread::sleep(POLL_EVERY);
        }
        // A panic in these threads is a bug in this file; there is nothing left to stop.
        self.writers.drain(..).for_each(|thread| drop(thread.join()));
        shut_down(&self.open);
        self.readers.drain(..).for_each(|thread| drop(thread.join()));
        self.open.clear();
    }
}

struct Writer {
    sink: BufWriter<Connection>,
    link: Arc<Link>,
    pushes: BTreeMap<RegisterId, Vec<ByteRun>>,
    /// For each register: the last piece whose bytes were sent.
    pushed: BTreeMap<RegisterId, u64>,
}

impl Writer {
    fn run(mut self, outgoing: &Receiver<Outgoing>) {
        if let Err(cause) = self.write(outgoing) {
            self.link.session.peer_lost(self.link.process, cause.to_string());
        }
    }

    /// Writes until [`Outgoing::End`]; flushes when the queue is empty.
    fn write(&mut self, outgoing: &Receiver<Outgoing>) -> io::Result<()> {
        while let Ok(first) = outgoing.recv() {
            for out in std::iter::once(first).chain(outgoing.try_iter()) {
                match out {
                    Outgoing::Message(message) => self.write_message(message.open())?,
                    Outgoing::Host(piece) => self.write_host_piece(&piece)?,
                    Outgoing::Refresh(round) => {
                        let round = round.open();
                        self.write_initial_registers()?;
                        self.write_frame(Frame::Ready { round })?;
                    }
                    Outgoing::End => {
                        self.write_frame(Frame::Bye)?;
                        return self.sink.flush();
                    }
                }
            }
            self.sink.flush()?;
        }
        Ok(())
    }

    fn write_initial_registers(&mut self) -> io::Result<()> {
        let spec = self.link.session.spec.clone();
        for register in self.pushes.keys().copied().collect::<Vec<_>>() {
            let of = spec.register(register);
            (0..u64::from(of.initial)).try_for_each(|piece| self.write_slot(register, of.slot(piece), piece))?;
        }
        Ok(())
    }

    fn write_frame(&mut self, frame: Frame) -> io::Result<()> {
        self.sink.write_all(&frame.encode())
    }

    fn write_message(&mut self, message: Message) -> io::Result<()> {
        if let Message::Filled { register, slot, piece, .. } = message
            && self.pushes.contains_key(&register)
            && self.pushed.insert(register, piece) != Some(piece)
        {
            self.write_slot(register, slot, piece)?;
        }
        let (Message::Filled { register, .. } | Message::Released { register, .. }) = message;
        self.link.remote().sent[register].add();
        self.write_frame(Frame::Message(message))
    }

    /// Writes the parts of a slot that the peer reads, either after the frame or through a pipe.
    fn write_slot(&mut self, register: RegisterId, slot: u32, piece: u64) -> io::Result<()> {
        let runs = &self.pushes[&register];
        let bytes = runs.iter().map(|run| run.bytes as u64).sum();
        let frame = Frame::Data { register, slot, piece, bytes };
        let memory = &self.link.memory[&register];
        let (arena, start) = (&memory.base.arena, memory.offset(slot));
        if let Some(pipe) = self.link.pipes.get(&register) {
            // PIPE-2: start the send, announce it, and only then wait for it.
            pipe.send(arena, runs.iter().map(|run| (start + run.offset, run.bytes)))?;
            self.sink.write_all(&frame.encode())?;
            self.sink.flush()?;
            let sent = pipe.settle(arena)?;
            self.link.sent.lock().insert((register, slot), sent);
        } else {
            self.sink.write_all(&frame.encode())?;
            runs.iter().try_for_each(|run| arena.write_to(start + run.offset, run.bytes, &mut self.sink))?;
        }
        self.link.remote().sent[register].add();
        Ok(())
    }

    fn write_host_piece(&mut self, piece: &HostPiece) -> io::Result<()> {
        let bytes: usize = piece.tensors.iter().map(|t| t.elements_held() * t.dtype().bytes()).sum();
        self.write_frame(Frame::Host { port: piece.port, bytes: bytes as u64 })?;
        piece.tensors.iter().try_for_each(|tensor| self.sink.write_all(tensor.as_bytes()))
    }
}

fn unexpected<T>(message: String) -> Result<T, PeerError> {
    Err(PeerError::Unexpected { message })
}

struct Reader {
    source: BufReader<Connection>,
    link: Arc<Link>,
    mirrors: BTreeMap<RegisterId, Vec<ByteRun>>,
    mirrored: BTreeMap<RegisterId, Mirrored>,
}

/// The state of a register's mirror.
struct Mirrored {
    /// The pieces whose bytes will arrive, in order.
    arrivals: Sequence,
    /// For each slot: the piece that the slot holds, if any.
    slots: Vec<Option<u64>>,
}

impl Mirrored {
    fn new(link: &Link, register: RegisterId) -> Self {
        let spec = &link.session.spec;
        let of = spec.register(register);
        let mut slots = vec![None; of.slots as usize];
        (0..u64::from(of.initial)).for_each(|piece| slots[of.slot(piece) as usize] = Some(piece));
        let readers = link.remote().local_readers(spec, register);
        Self { arrivals: Sequence::of_arrivals_to(spec, register, &readers), slots }
    }
}

impl Reader {
    fn run(mut self) {
        loop {
            match self.next() {
                Ok(true) => {}
                Ok(false) => return,
                Err(PeerError::Lost { message }) => return self.link.session.peer_lost(self.link.process, message),
                Err(cause) => return self.link.session.fail(Failure::Peer { process: self.link.process, cause }),
            }
        }
    }

    /// Processes one frame. Returns false after the last frame.
    fn next(&mut self) -> Result<bool, PeerError> {
        let mut header = [0; FRAME_BYTES];
        self.source.read_exact(&mut header)?;
        match Frame::decode(&header)? {
            Frame::Bye => {
                self.link.session.peer_left(self.link.process);
                self.link.remote().set_ended(self.link.index);
                self.send_to_host(PeerMessage::Ended { process: self.link.process });
                return Ok(false);
            }
            Frame::Ready { round } if self.link.remote().set_ready(self.link.index, round) => {}
            Frame::Ready { round } => return unexpected(format!("a ready message for refresh {round} out of order")),
            Frame::Message(message) => self.process_message(message)?,
            Frame::Data { register, slot, piece, bytes } => self.process_data(register, slot, piece, bytes)?,
            Frame::Host { port, bytes } => self.process_host_piece(port, bytes)?,
        }
        Ok(true)
    }

    fn send_to_host(&self, message: PeerMessage) {
        if let Some(host) = &self.link.remote().host {
            // An error means that the host program has ended and needs no messages.
            let _ = host.send(message);
        }
    }

    /// Checks RM-1 for a message: the peer must host its sender, and this process must host its receiver.
    fn process_message(&mut self, message: Message) -> Result<(), PeerError> {
        let (Message::Filled { register, reader, piece, .. } | Message::Released { register, reader, piece, .. }) =
            message;
        let remote = self.link.remote();
        let Some((from, to)) = message.route(&self.link.session.spec) else {
            return unexpected(format!("a message about reader {reader} of register {}", register.0));
        };
        if !remote.is_at(self.link.index, from) || !remote.is_local(to) {
            let name = self.link.session.spec.register_name(register);
            return unexpected(format!("a message about register '{name}' from actor {} to actor {}", from.0, to.0));
        }
        if matches!(message, Message::Filled { .. })
            && self.mirrored.get(&register).is_some_and(|mirrored| !mirrored.slots.contains(&Some(piece)))
        {
            let name = self.link.session.spec.register_name(register);
            return unexpected(format!("piece {piece} of register '{name}' without its bytes"));
        }
        if let Message::Released { register, slot, .. } = message {
            self.wait_for_send(register, slot)?;
        }
        remote.sent[register].join();
        if self.link.session.bus.is_overfull(to) {
            return unexpected("more messages than credits allow".into());
        }
        self.link.session.bus.send(to, Cast::Event(ProtocolEvent::Message(message)));
        Ok(())
    }

    /// Waits until this process has finished sending a slot. A release shows that the reader has received the bytes,
    /// but not that the send has ended.
    fn wait_for_send(&self, register: RegisterId, slot: u32) -> Result<(), PeerError> {
        let Some(pipe) = self.link.pipes.get(&register) else { return Ok(()) };
        let sent = self.link.sent.lock().get(&(register, slot)).cloned();
        sent.map_or(Ok(()), |sent| pipe.wait(&sent)).map_err(|error| io::Error::from(error).into())
    }

    /// Checks RM-1 for a slot's bytes. The bytes of initial pieces may be sent again (a refresh).
    fn process_data(&mut self, register: RegisterId, slot: u32, piece: u64, bytes: u64) -> Result<(), PeerError> {
        let name = || self.link.session.spec.register_name(register);
        let (Some(runs), Some(memory), Some(mirrored)) =
            (self.mirrors.get(&register), self.link.memory.get(&register), self.mirrored.get(&register))
        else {
            return unexpected(format!("bytes of register '{}'", name()));
        };
        let spec = self.link.session.spec.register(register);
        let due = mirrored.arrivals.piece();
        let is_own_slot = slot == spec.slot(piece);
        let refresh = piece < u64::from(spec.initial) && is_own_slot;
        if !refresh && (piece != due || !is_own_slot) {
            let message =
                format!("bytes of piece {piece} of register '{}' for slot {slot}, expected piece {due}", name());
            return unexpected(message);
        }
        let expected: u64 = runs.iter().map(|run| run.bytes as u64).sum();
        if bytes != expected {
            return unexpected(format!("{bytes} bytes for a slot of register '{}', expected {expected}", name()));
        }
        let is_held = |held: &u64| self.link.remote().is_held(&self.link.session.spec, register, *held);
        if let Some(held) = mirrored.slots[slot as usize].filter(|held| !refresh && is_held(held)) {
            return unexpected(format!(
                "bytes of piece {piece} of register '{}' that would overwrite piece {held}, still in use",
                name()
            ));
        }
        let firings = if refresh { Some(self.wait_for_readers(register)?) } else { None };
        self.link.remote().sent[register].join();
        let arena = &memory.base.arena;
        let start = memory.offset(slot);
        if let Some(pipe) = self.link.pipes.get(&register) {
            let received = pipe.receive(arena, runs.iter().map(|run| (start + run.offset, run.bytes)));
            received.map_err(io::Error::from)?;
        } else {
            runs.iter().try_for_each(|run| arena.read_from(start + run.offset, run.bytes, &mut self.source))?;
        }
        // A reader that fired during the transfer may have read some of these bytes.
        if firings.is_some() && self.link.session.steps.firings_of_readers(register) != firings {
            return self.refresh_in_step(register);
        }
        if !refresh && let Some(mirrored) = self.mirrored.get_mut(&register) {
            mirrored.slots[slot as usize] = Some(piece);
            mirrored.arrivals.advance();
        }
        Ok(())
    }

    /// RM-3 for a refresh: waits until no local reader of the register is in the middle of a step. A peer may start the
    /// refresh just before the step's last local reader ends. Returns the number of ended firings of these readers.
    fn wait_for_readers(&self, register: RegisterId) -> Result<u64, PeerError> {
        let deadline = Instant::now() + READERS_TIMEOUT;
        loop {
            match self.link.session.steps.firings_of_readers(register) {
                Some(firings) => return Ok(firings),
                None if Instant::now() < deadline => thread::sleep(POLL_EVERY),
                None => return self.refresh_in_step(register),
            }
        }
    }

    fn refresh_in_step<T>(&self, register: RegisterId) -> Result<T, PeerError> {
        let name = self.link.session.spec.register_name(register);
        unexpected(format!("a refresh of register '{name}' in the middle of a step"))
    }

    fn process_host_piece(&mut self, port: u32, bytes: u64) -> Result<(), PeerError> {
        let remote = self.link.remote();
        let Some(own) = remote.directory.route(port) else {
            return unexpected(format!("tensors of port {port}, which does not exist"));
        };
        if !remote.is_behind(self.link.index, own.process) {
            return unexpected(format!("tensors of port {port}, whose sender is not reached through this peer"));
        }
        let expected: usize = own.tensors.iter().map(|(shape, dtype)| element_count(shape) * dtype.bytes()).sum();
        if bytes != expected as u64 {
            return unexpected(format!("{bytes} bytes for port {port}, expected {expected}"));
        }
        if remote.host.as_ref().is_some_and(|host| host.len() > HOST_PIECES_MAX) {
            return unexpected(format!("more than {HOST_PIECES_MAX} pieces that the host has not read"));
        }
        let mut tensors = Vec::new();
        for (shape, dtype) in own.tensors.clone() {
            let mut raw = vec![0; element_count(&shape) * dtype.bytes()];
            self.source.read_exact(&mut raw)?;
            tensors.push(HostTensor::from_le_bytes(dtype, &shape, &raw));
        }
        let piece = Arc::new(HostPiece { port, tensors });
        remote.send_host_piece(&piece, Some(self.link.index));
        if remote.is_for_host(&own) {
            self.send_to_host(PeerMessage::Piece(piece));
        }
        Ok(())
    }
}
