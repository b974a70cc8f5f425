//! One thread that sends and receives heartbeats and runs the failure detector.
//!
//! Heartbeats are datagrams, because a TCP connection could stay silent past the deadline. After a network outage of
//! some seconds, TCP may wait for about the same time before it retransmits. The next datagram needs no such wait.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::datagram::{BYTES, Codec};
use super::shared::{JoinOnDrop, Shared};

/// Maximum interval between checks of the failure detector and of the grace window.
const TICK: Duration = Duration::from_millis(50);
/// Maximum number of datagrams processed between two checks, so that a flood cannot block the detector.
const DRAIN_MAX: usize = 256;

pub(crate) struct Heartbeats {
    pub(crate) shared: Arc<Shared>,
    pub(crate) codec: Codec,
    pub(crate) socket: UdpSocket,
    /// Heartbeat addresses of the neighbours in the control tree.
    pub(crate) addresses: BTreeMap<u32, SocketAddr>,
    pub(crate) interval: Duration,
}

impl Heartbeats {
    /// Starts the thread. It ends within a tick after the first returned value is dropped.
    pub(super) fn start(mut self) -> io::Result<(Arc<()>, JoinOnDrop)> {
        self.socket.set_nonblocking(true)?;
        let stop = Arc::new(());
        let running = Arc::downgrade(&stop);
        let thread = thread::Builder::new().name("heartbeat".into()).spawn(move || self.run(&running))?;
        Ok((stop, JoinOnDrop(Some(thread))))
    }

    fn run(&mut self, running: &Weak<()>) {
        let (mut next, mut sequence, mut loss_reported) = (Instant::now(), 0, false);
        while running.strong_count() > 0 {
            let now = Instant::now();
            if now >= next {
                self.send(&mut sequence);
                // Not `next + interval`: one heartbeat is enough after a pause of this process.
                next = now + self.interval;
            }
            self.wait(TICK.min(next.saturating_duration_since(now)));
            self.drain();
            self.shared.tick();
            if !loss_reported && self.shared.heartbeats().iter().any(|(_, lost, _)| lost.is_some()) {
                // The loss is sent immediately, because this process may end before the next heartbeat.
                loss_reported = true;
                self.send(&mut sequence);
            }
        }
    }

    fn send(&self, sequence: &mut u64) {
        *sequence += 1;
        for (to, lost, most_silent) in self.shared.heartbeats() {
            let Some(address) = self.addresses.get(&to) else { continue };
            let datagram = self.codec.write(self.shared.own, *sequence, lost, most_silent);
            // Does not retry, because the next heartbeat follows soon. Peers detect a longer silence.
            if let Err(error) = self.socket.send_to(&datagram, address) {
                tracing::debug!(%address, %error, "cannot send a heartbeat");
            }
        }
    }

    fn wait(&self, timeout: Duration) {
        // Rounds the timeout up to whole milliseconds, so that the loop does not spin during the last fraction of one.
        let nanos = (timeout.subsec_millis() + 1).min(999) * 1_000_000;
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(nanos) };
        // An error (a signal) has the same effect as a timeout: the loop continues.
        let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout));
    }

    fn drain(&mut self) {
        // The buffer is one byte longer than a datagram, to detect longer datagrams.
        let mut bytes = [0; BYTES + 1];
        for _ in 0..DRAIN_MAX {
            let Ok((length, _)) = self.socket.recv_from(&mut bytes) else { return };
            match self.codec.read(&bytes[..length]) {
                Ok(heartbeat) => self.shared.receive_heartbeat(heartbeat),
                Err(rejection) => self.shared.reject(rejection),
            }
        }
    }
}
