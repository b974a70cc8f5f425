//! A listener's thread, which never blocks: it polls sockets and unauthenticated connections and advances handshakes.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::socket::Socket;
use super::state::{ListenerOptions, Refusals, Shared, Unclaimed};
use crate::secret::Secret;
use crate::transport::connection::Connection;
use crate::transport::handshake::{Acceptor, HANDSHAKE_BYTES_MAX, HandshakeError, Refusal, head, with_length};
use crate::transport::hello::{Hello, Purpose};
use crate::transport::sealed::Seal;

/// Maximum number of connections accepted from one socket per iteration.
const ACCEPTS_MAX: usize = 64;
/// How long the thread accepts no connections after an accept fails, for example because no descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(super) struct Server {
    pub(super) sockets: Vec<Socket>,
    pub(super) wake: UnixStream,
    pub(super) secret: Secret,
    pub(super) options: ListenerOptions,
    pub(super) shared: Arc<Shared>,
    /// The oldest connection is first.
    pub(super) pending: VecDeque<PendingConnection>,
    pub(super) paused_until: Option<Instant>,
}

/// An unauthenticated connection.
pub(super) struct PendingConnection {
    connection: Connection,
    deadline: Instant,
    /// The incoming message with its length prefix. The first `filled` bytes have been received.
    message: Vec<u8>,
    filled: usize,
    /// `None` until the greeting arrives.
    acceptor: Option<Acceptor>,
}

enum Step {
    Incomplete,
    Accepted(Hello),
    /// The connection is rejected, and this counter is incremented.
    Rejected(fn(&mut Refusals) -> &mut u64),
}

const PREFIX_BYTES: usize = 2;

impl Server {
    pub(super) fn run(mut self) {
        while let Some((sockets, pending)) = self.poll() {
            self.advance(&pending);
            self.expire();
            for (index, _) in sockets.iter().enumerate().filter(|(_, ready)| **ready) {
                self.accept(index);
            }
        }
        self.shared.close();
    }

    /// Returns which sockets and pending connections are ready. Returns `None` when the listener closes.
    fn poll(&mut self) -> Option<(Vec<bool>, Vec<bool>)> {
        let now = Instant::now();
        self.paused_until = self.paused_until.filter(|until| *until > now);
        let is_paused = self.paused_until.is_some();
        let wake_at = self.pending.front().map(|p| p.deadline).into_iter().chain(self.paused_until).min();
        // Adds one millisecond, so that the thread does not wake just before the deadline.
        let wait = wake_at.map(|at| at.saturating_duration_since(now) + Duration::from_millis(1));
        let wait = wait.map(|wait| Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() });

        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        let listening = if is_paused { &[] } else { &self.sockets[..] };
        fds.extend(listening.iter().map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)));
        fds.extend(self.pending.iter().map(|p| PollFd::from_borrowed_fd(p.connection.as_fd(), PollFlags::IN)));
        match poll(&mut fds, wait.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Some((Vec::new(), vec![false; self.pending.len()])),
            // Only a bug can cause another error. Retrying would spin and hide the bug.
            Err(error) => {
                tracing::error!(%error, "poll failed; the listener closes");
                return None;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (first, rest) = ready.split_first()?;
        let (sockets, pending) = rest.split_at(listening.len());
        (!first).then(|| (sockets.to_vec(), pending.to_vec()))
    }

    fn advance(&mut self, ready: &[bool]) {
        for (mut pending, ready) in std::mem::take(&mut self.pending).into_iter().zip(ready) {
            let step = if *ready { self.step(&mut pending) } else { Step::Incomplete };
            match step {
                Step::Incomplete => self.pending.push_back(pending),
                Step::Accepted(hello) => self.add_unclaimed(hello, pending.connection),
                Step::Rejected(counter) => self.count(counter),
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while self.pending.front().is_some_and(|p| p.deadline <= now) {
            self.pending.pop_front();
            self.count(|r| &mut r.timed_out);
        }
    }

    fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPTS_MAX {
            match self.sockets[index].accept() {
                Ok(connection) if connection.set_nonblocking(true).is_ok() => {
                    let deadline = Instant::now() + self.options.handshake_timeout;
                    let message = vec![0; PREFIX_BYTES];
                    let pending = PendingConnection { connection, deadline, message, filled: 0, acceptor: None };
                    self.pending.push_back(pending);
                }
                Ok(_) => self.count(|r| &mut r.disconnected),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; dropping the oldest unauthenticated one");
                    self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                    if self.pending.pop_front().is_some() {
                        self.count(|r| &mut r.evicted);
                    }
                    return;
                }
            }
            if self.pending.len() > self.options.unauthenticated_max {
                self.pending.pop_front();
                self.count(|r| &mut r.evicted);
            }
        }
    }

    /// Advances the handshake by at most two messages, as far as bytes have arrived.
    fn step(&self, pending: &mut PendingConnection) -> Step {
        loop {
            let message = match pending.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return Step::Incomplete,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Step::Rejected(|r| &mut r.malformed);
                }
                Err(_) => return Step::Rejected(|r| &mut r.disconnected),
            };
            match pending.acceptor.take() {
                None => match self.greet(pending, &message) {
                    Ok(()) => {}
                    Err(rejected) => return rejected,
                },
                Some(acceptor) => return self.verify(pending, acceptor, &message),
            }
        }
    }

    fn greet(&self, pending: &mut PendingConnection, message: &[u8]) -> Result<(), Step> {
        let (acceptor, answer) = Acceptor::new(&self.secret, message).map_err(|cause| {
            if matches!(cause, HandshakeError::Version { .. } | HandshakeError::Proof) {
                // The peer may be in this job, with another version or secret. This answer lets the peer report that.
                let _ = pending.send(&head());
            }
            rejected(&cause)
        })?;
        pending.send(&answer).map_err(|_| Step::Rejected(|r| &mut r.disconnected))?;
        pending.acceptor = Some(acceptor);
        Ok(())
    }

    /// HS-1: decrypts the hello before using it.
    fn verify(&self, pending: &mut PendingConnection, acceptor: Acceptor, message: &[u8]) -> Step {
        let hello = match acceptor.verify(message) {
            Ok(hello) => hello,
            Err(cause) => return rejected(&cause),
        };
        let admitted = hello.and_then(|hello| self.admit(&hello).map(|()| hello));
        let verdict = admitted.as_ref().map(|_| ()).map_err(Refusal::clone);
        let sent = acceptor.answer(&verdict).ok().filter(|(answer, _)| pending.send(answer).is_ok());
        match (admitted, sent) {
            (Err(refusal), _) => Step::Rejected(counter(&refusal)),
            (Ok(hello), Some((_, keys))) if pending.connection.configure().is_ok() => {
                if hello.sealed {
                    pending.connection.seal(Seal::new(keys));
                }
                Step::Accepted(hello)
            }
            (Ok(_), _) => Step::Rejected(|r| &mut r.disconnected),
        }
    }

    /// Checks the policy and EP-3.
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        let state = self.shared.state.lock();
        state.policy.admit(hello)?;
        let unclaimed = state.unclaimed.len();
        if unclaimed < self.options.unclaimed_max {
            Ok(())
        } else {
            Err(Refusal::Crowded { unclaimed: unclaimed as u64 })
        }
    }

    fn add_unclaimed(&self, hello: Hello, connection: Connection) {
        let mut state = self.shared.state.lock();
        if state.closed {
            return;
        }
        let Hello { from, purpose, .. } = hello;
        if purpose != Purpose::Rendezvous {
            // A dialler that retried has a new connection, which replaces its old one. At the rendezvous, both are
            // kept, because two processes may claim one rank.
            state.unclaimed.retain(|u| (u.from, u.purpose) != (from, purpose));
        }
        state.unclaimed.push_back(Unclaimed { from, purpose, connection });
        self.shared.arrived.notify_all();
    }

    fn count(&self, counter: fn(&mut Refusals) -> &mut u64) {
        *counter(&mut self.shared.state.lock().refusals) += 1;
    }
}

fn rejected(cause: &HandshakeError) -> Step {
    match cause {
        HandshakeError::Version { .. } => Step::Rejected(|r| &mut r.version),
        HandshakeError::Proof => Step::Rejected(|r| &mut r.proof),
        _ => Step::Rejected(|r| &mut r.malformed),
    }
}

fn counter(refusal: &Refusal) -> fn(&mut Refusals) -> &mut u64 {
    match refusal {
        Refusal::Session { .. } => |r| &mut r.session,
        Refusal::OldEpoch { .. } | Refusal::Late { .. } => |r| &mut r.old_epoch,
        Refusal::NewEpoch { .. } => |r| &mut r.new_epoch,
        Refusal::Process { .. } | Refusal::WrongProcess { .. } => |r| &mut r.process,
        Refusal::Unreadable => |r| &mut r.unreadable,
        Refusal::NotStarted | Refusal::Crowded { .. } => |r| &mut r.retry,
    }
}

impl PendingConnection {
    /// Returns the next message, without its length prefix, once it is complete. Never reads beyond this message.
    fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            while self.filled < self.message.len() {
                match (&self.connection).read(&mut self.message[self.filled..]) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(bytes) => self.filled += bytes,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            let bytes = usize::from(u16::from_le_bytes([self.message[0], self.message[1]]));
            if bytes == 0 || bytes > HANDSHAKE_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if self.filled == PREFIX_BYTES {
                self.message.resize(PREFIX_BYTES + bytes, 0);
                continue;
            }
            self.filled = 0;
            let message = std::mem::replace(&mut self.message, vec![0; PREFIX_BYTES]);
            return Ok(Some(message[PREFIX_BYTES..].to_vec()));
        }
    }

    /// Sends a message without blocking. A new socket's send buffer is large enough for a whole handshake.
    fn send(&self, part: &[u8]) -> io::Result<()> {
        (&self.connection).write_all(&with_length(part))
    }
}
