//! One thread that sends and receives heartbeats, and lets the detector look.
//!
//! Datagrams, because after a cut of some seconds TCP's retransmission has backed off for about as long again: a connection
//! would stay silent past the deadline although the network is back. A datagram gets through at once.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::datagram::{BYTES, Codec};
use super::shared::Shared;

/// The detector looks at least this often, and the end of the grace window is noticed this late at most.
const TICK: Duration = Duration::from_millis(50);
/// Datagrams taken in between two looks, so that a flood cannot keep the detector from looking.
const DRAIN_MAX: usize = 256;

/// The running thread; dropping it ends it, within a tick.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Begins to beat.
pub(crate) fn start(
    shared: Arc<Shared>,
    codec: Codec,
    socket: UdpSocket,
    addresses: Vec<SocketAddr>,
    every: Duration,
) -> io::Result<Heartbeat> {
    socket.set_nonblocking(true)?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut beating =
        Beating { shared, codec, socket, addresses, every, sequence: 0, accuses: false, stop: stop.clone() };
    let thread = thread::Builder::new().name("heartbeat".into()).spawn(move || beating.run())?;
    Ok(Heartbeat { stop, thread: Some(thread) })
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there would be a bug that its own message tells.
            let _ = thread.join();
        }
    }
}

struct Beating {
    shared: Arc<Shared>,
    codec: Codec,
    socket: UdpSocket,
    addresses: Vec<SocketAddr>,
    every: Duration,
    sequence: u64,
    /// A beat has told whom this process has lost.
    accuses: bool,
    stop: Arc<AtomicBool>,
}

impl Beating {
    fn run(&mut self) {
        let mut next = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            if now >= next {
                self.send();
                // Not `next + every`: after a pause of ours one beat is enough.
                next = now + self.every;
            }
            self.wait(TICK.min(next.saturating_duration_since(now)));
            self.drain();
            self.shared.tick();
            if !self.accuses && self.shared.beat().is_some_and(|(_, lost)| lost.is_some()) {
                // At once: this process may have ended before the next beat.
                self.accuses = true;
                self.send();
            }
        }
    }

    fn send(&mut self) {
        let Some((step, lost)) = self.shared.beat() else { return };
        self.sequence += 1;
        let datagram = self.codec.write(self.shared.own, self.sequence, step, lost);
        for address in &self.addresses {
            // A network that is down shows as silence on both sides; the next beat tries again.
            if let Err(error) = self.socket.send_to(&datagram, address) {
                tracing::debug!(%address, %error, "a heartbeat was not sent");
            }
        }
    }

    fn wait(&self, timeout: Duration) {
        // In whole milliseconds upwards, so that the loop does not spin for the last fraction.
        let nanos = (timeout.subsec_millis() + 1).min(999) * 1_000_000;
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(nanos) };
        // An error (a signal) is as good as a time-out: the loop goes on.
        let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout));
    }

    fn drain(&mut self) {
        // One byte more than a datagram, so that longer ones are seen to be longer.
        let mut bytes = [0; BYTES + 1];
        for _ in 0..DRAIN_MAX {
            let Ok((length, _)) = self.socket.recv_from(&mut bytes) else { return };
            match self.codec.read(&bytes[..length]) {
                Ok(beat) => self.shared.heard(beat),
                Err(refusal) => self.shared.refused(refusal),
            }
        }
    }
}
