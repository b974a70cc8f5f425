//! The thread of an endpoint: polls listeners and strangers, moves each handshake on as far as its bytes go, and never
//! waits for one of them.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{ListenerOptions, Refusals, Shared, Socket, Unclaimed};
use crate::transport::dial::with_length;
use crate::transport::handshake::{Acceptor, HANDSHAKE_BYTES_MAX, HandshakeError, Nonce, Refusal, greeting};
use crate::transport::{Connection, Hello, Purpose, SharedKey, secret};

/// Connections taken from one listener before others get their turn.
const ACCEPTS_A_TURN: usize = 64;
/// After the system refused to accept (no descriptors left, for one), listeners rest this long.
const REST: Duration = Duration::from_millis(50);

/// What the thread owns.
pub(super) struct Server {
    listeners: Vec<Socket>,
    sleeper: UnixStream,
    secret: SharedKey,
    options: ListenerOptions,
    shared: Arc<Shared>,
    /// Oldest first.
    strangers: VecDeque<Stranger>,
    rest_until: Option<Instant>,
}

/// A connection that has not proved itself.
struct Stranger {
    link: Connection,
    nonce: Nonce,
    deadline: Instant,
    /// The message that is coming in, with its length in front; `filled` bytes of it are there.
    message: Vec<u8>,
    filled: usize,
    /// `None` until it has greeted.
    acceptor: Option<Acceptor>,
}

/// What became of a stranger.
enum Step {
    /// It has to say more.
    More,
    /// It is in.
    In(Hello),
    /// It is out, and counted there.
    Out(fn(&mut Refusals) -> &mut u64),
}

const PREFIX_BYTES: usize = 2;

impl Server {
    pub(super) fn new(
        listeners: Vec<Socket>,
        sleeper: UnixStream,
        secret: SharedKey,
        options: ListenerOptions,
        shared: Arc<Shared>,
    ) -> Self {
        Self { listeners, sleeper, secret, options, shared, strangers: VecDeque::new(), rest_until: None }
    }

    /// Until the endpoint closes.
    pub(super) fn run(mut self) {
        while let Some((listeners, strangers)) = self.poll() {
            self.advance(&strangers);
            self.expire();
            for (index, _) in listeners.iter().enumerate().filter(|(_, ready)| **ready) {
                self.accept(index);
            }
        }
        self.shared.close();
    }

    /// Which listeners and strangers have something; `None` when the endpoint closes.
    fn poll(&mut self) -> Option<(Vec<bool>, Vec<bool>)> {
        let now = Instant::now();
        self.rest_until = self.rest_until.filter(|until| *until > now);
        let resting = self.rest_until.is_some();
        let wake_at = self.strangers.front().map(|s| s.deadline).into_iter().chain(self.rest_until).min();
        // One millisecond more, so as not to wake just before the deadline.
        let wait = wake_at.map(|at| at.saturating_duration_since(now) + Duration::from_millis(1));
        let wait = wait.map(|wait| Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() });

        let mut fds = vec![PollFd::new(&self.sleeper, PollFlags::IN)];
        let listening = if resting { &[] } else { &self.listeners[..] };
        fds.extend(listening.iter().map(|listener| PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)));
        fds.extend(self.strangers.iter().map(|s| PollFd::from_borrowed_fd(s.link.as_fd(), PollFlags::IN)));
        match poll(&mut fds, wait.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Some((Vec::new(), vec![false; self.strangers.len()])),
            // Nothing that we pass can be wrong but by a bug; an endpoint that spins would hide it.
            Err(error) => {
                tracing::error!(%error, "the endpoint cannot poll and closes");
                return None;
            }
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (first, rest) = ready.split_first()?;
        let (listeners, strangers) = rest.split_at(listening.len());
        (!first).then(|| (listeners.to_vec(), strangers.to_vec()))
    }

    /// Moves on the strangers that have sent something.
    fn advance(&mut self, ready: &[bool]) {
        for (mut stranger, ready) in std::mem::take(&mut self.strangers).into_iter().zip(ready) {
            let step = if *ready { self.step(&mut stranger) } else { Step::More };
            match step {
                Step::More => self.strangers.push_back(stranger),
                Step::In(hello) => self.shelve(hello, stranger.link),
                Step::Out(counter) => self.count(counter),
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while self.strangers.front().is_some_and(|s| s.deadline <= now) {
            self.strangers.pop_front();
            self.count(|r| &mut r.too_slow);
        }
    }

    fn accept(&mut self, index: usize) {
        for _ in 0..ACCEPTS_A_TURN {
            match self.listeners[index].accept() {
                Ok(link) => match self.stranger(link) {
                    Ok(stranger) => self.strangers.push_back(stranger),
                    Err(_) => self.count(|r| &mut r.hung_up),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; the oldest stranger makes room");
                    self.rest_until = Some(Instant::now() + REST);
                    if self.strangers.pop_front().is_some() {
                        self.count(|r| &mut r.crowded_out);
                    }
                    return;
                }
            }
            if self.strangers.len() > self.options.strangers_max {
                self.strangers.pop_front();
                self.count(|r| &mut r.crowded_out);
            }
        }
    }

    fn stranger(&self, link: Connection) -> io::Result<Stranger> {
        link.set_nonblocking(true)?;
        if let Connection::Tcp(stream) = &link {
            stream.set_nodelay(true)?;
        }
        let nonce = secret::random().map_err(io::Error::other)?;
        let deadline = Instant::now() + self.options.handshake_timeout;
        Ok(Stranger { link, nonce, deadline, message: vec![0; PREFIX_BYTES], filled: 0, acceptor: None })
    }

    /// As far as the bytes go that are there; two messages at most.
    fn step(&self, stranger: &mut Stranger) -> Step {
        loop {
            let message = match stranger.receive() {
                Ok(Some(message)) => message,
                Ok(None) => return Step::More,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return Step::Out(|r| &mut r.malformed),
                Err(_) => return Step::Out(|r| &mut r.hung_up),
            };
            match stranger.acceptor.take() {
                None => match self.greet(stranger, &message) {
                    Ok(()) => {}
                    Err(out) => return out,
                },
                Some(acceptor) => return self.judge(stranger, acceptor, message),
            }
        }
    }

    fn greet(&self, stranger: &mut Stranger, message: &[u8]) -> Result<(), Step> {
        let acceptor = Acceptor::new(&stranger.nonce, message);
        if matches!(acceptor, Ok(_) | Err(HandshakeError::Version { .. })) {
            stranger.send(&greeting(&stranger.nonce)).map_err(|_| Step::Out(|r| &mut r.hung_up))?;
        }
        stranger.acceptor = Some(acceptor.map_err(|cause| match cause {
            HandshakeError::Version { .. } => Step::Out(|r| &mut r.version),
            _ => Step::Out(|r| &mut r.malformed),
        })?);
        Ok(())
    }

    /// HS-1: only here is the hello looked at.
    fn judge(&self, stranger: &mut Stranger, acceptor: Acceptor, message: Vec<u8>) -> Step {
        let (believed, hello) = match acceptor.believe(&self.secret, message) {
            Ok(believed) => believed,
            Err(cause) => {
                // It may well be one of us with another secret, and should hear it.
                let _ = stranger.send(&[]);
                return match cause {
                    HandshakeError::Proof => Step::Out(|r| &mut r.proof),
                    _ => Step::Out(|r| &mut r.malformed),
                };
            }
        };
        let admitted = hello.and_then(|hello| self.admit(&hello).map(|()| hello));
        let verdict = admitted.as_ref().map(|_| ()).map_err(Refusal::clone);
        let sent = believed.answer(&self.secret, &verdict).is_ok_and(|answer| stranger.send(&answer).is_ok());
        match admitted {
            Ok(hello) if sent && stranger.link.settle().is_ok() => Step::In(hello),
            Ok(_) => Step::Out(|r| &mut r.hung_up),
            Err(refusal) => Step::Out(counter(&refusal)),
        }
    }

    /// EP-3, after the gate.
    fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        let state = self.shared.state();
        state.gate.admit(hello)?;
        match state.unclaimed.len() {
            unclaimed if unclaimed >= self.options.unclaimed_max => {
                Err(Refusal::Crowded { unclaimed: unclaimed as u64 })
            }
            _ => Ok(()),
        }
    }

    fn shelve(&self, hello: Hello, link: Connection) {
        let mut state = self.shared.state();
        if state.closed {
            return;
        }
        let Hello { from, purpose, .. } = hello;
        if purpose != Purpose::Rendezvous {
            // A dialler that gave up and came again. At rendezvous two may claim one rank, and both must be named.
            state.unclaimed.retain(|u| (u.from, u.purpose) != (from, purpose));
        }
        state.unclaimed.push_back(Unclaimed { from, purpose, link });
        self.shared.arrived.notify_all();
    }

    fn count(&self, counter: fn(&mut Refusals) -> &mut u64) {
        *counter(&mut self.shared.state().refusals) += 1;
    }
}

fn counter(refusal: &Refusal) -> fn(&mut Refusals) -> &mut u64 {
    match refusal {
        Refusal::Session { .. } => |r| &mut r.session,
        Refusal::OldEpoch { .. } | Refusal::Late { .. } => |r| &mut r.old_epoch,
        Refusal::NewEpoch { .. } => |r| &mut r.new_epoch,
        Refusal::Process { .. } | Refusal::NotMe { .. } => |r| &mut r.process,
        Refusal::Unreadable => |r| &mut r.unreadable,
        Refusal::NotStarted | Refusal::Crowded { .. } => |r| &mut r.again,
    }
}

impl Stranger {
    /// A whole message without its length, once it is there. Never reads past its end: what follows a handshake belongs to
    /// whoever claims the link.
    fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            while self.filled < self.message.len() {
                match (&self.link).read(&mut self.message[self.filled..]) {
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

    /// The buffer of a fresh socket takes a whole handshake; a stranger that has filled it is not worth the wait.
    fn send(&self, part: &[u8]) -> io::Result<()> {
        (&self.link).write_all(&with_length(part))
    }
}

impl Socket {
    fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Connection::Tcp(stream)),
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Connection::Unix(stream)),
        }
    }

    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}
