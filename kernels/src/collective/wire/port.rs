//! One member's links together: moving bytes over two of them at once, waiting, and noticing what goes wrong meanwhile.
//!
//! How members that disagree find out, though no call talks to all of them: whoever has waited for [`QUIET`] tells all
//! who take part what it waits in, and listens to all. Of two members that wait in different calls, the one that came
//! first hears of the other's.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::link::{Context, Link};
use crate::collective::{Group, MemberWait};
use crate::error::KernelError;

/// Longest wait without looking whether the session was aborted.
const TICK: Duration = Duration::from_millis(50);

/// How long nothing moves before a member tells the others what it waits in.
const QUIET: Duration = Duration::from_millis(200);

/// How long a member whose link broke waits for others to say why, since it is often not the first to know. Longer than
/// those take who wait elsewhere, and look round only after [`QUIET`].
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What all members of a group in this process share: why it works no more, set once, and who of them waits.
#[derive(Debug)]
pub(super) struct Stop {
    /// Of all groups of the engine.
    pub(super) aborted: Arc<OnceLock<KernelError>>,
    /// Of this group, as any of its members in this process found.
    pub(super) failed: OnceLock<KernelError>,
    group: Arc<Group>,
    /// By member: 0, or one more than the member that it waits for.
    waiting: Vec<AtomicUsize>,
}

impl Stop {
    pub(super) fn new(group: Arc<Group>, aborted: Arc<OnceLock<KernelError>>) -> Self {
        let waiting = group.ranks.iter().map(|_| AtomicUsize::new(0)).collect();
        Self { aborted, failed: OnceLock::new(), group, waiting }
    }

    pub(super) fn check(&self) -> Result<(), KernelError> {
        match self.aborted.get().or_else(|| self.failed.get()) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// The members of this process that wait now.
    pub(super) fn waits(&self) -> impl Iterator<Item = MemberWait> {
        let Group { id, ranks } = &*self.group;
        self.waiting.iter().zip(ranks).filter_map(|(waiting, rank)| {
            let peer = waiting.load(Ordering::Relaxed).checked_sub(1)?;
            Some(MemberWait { group: *id, rank: *rank, peer: ranks[peer] })
        })
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) context: Context,
    /// By member; `None` at the member's own place.
    links: Vec<Option<Link>>,
    stop: Arc<Stop>,
    write_timeout: Duration,
    /// Since when nothing has moved.
    quiet_since: Option<Instant>,
}

impl Port {
    pub(super) fn new(context: Context, links: Vec<Option<Link>>, stop: Arc<Stop>, write_timeout: Duration) -> Self {
        Self { context, links, stop, write_timeout, quiet_since: None }
    }

    pub(super) fn member(&self) -> usize {
        self.context.member
    }

    pub(super) fn members(&self) -> usize {
        self.context.group.ranks.len()
    }

    fn link(&mut self, peer: usize) -> Result<(&mut Link, &Context), KernelError> {
        let missing = || self.context.link_error(peer, "no channel was made");
        match self.links.get_mut(peer) {
            Some(Some(link)) => Ok((link, &self.context)),
            _ => Err(missing()),
        }
    }

    /// A call that this member took part in is over.
    pub(super) fn finish_call(&mut self) {
        for (peer, link) in self.links.iter_mut().enumerate() {
            if let Some(link) = link
                && self.context.involves(peer)
            {
                link.finish_call();
            }
        }
    }

    /// Begins a transfer of so many bytes to `peer`.
    pub(super) fn begin_out(&mut self, peer: usize, bytes: usize) -> Result<(), KernelError> {
        let (link, context) = self.link(peer)?;
        link.begin_out(context, bytes as u64);
        Ok(())
    }

    /// Begins a transfer of so many bytes from `peer`.
    pub(super) fn begin_in(&mut self, peer: usize, bytes: usize) -> Result<(), KernelError> {
        self.link(peer)?.0.begin_in(bytes as u64);
        Ok(())
    }

    /// Hands over what goes at once of a transfer's next bytes; returns how many.
    pub(super) fn send(&mut self, peer: usize, data: &[u8]) -> Result<usize, KernelError> {
        let (link, context) = self.link(peer)?;
        link.send(context, data)
    }

    /// Takes what is there at once of a transfer's next bytes; returns how many.
    pub(super) fn receive(&mut self, peer: usize, into: &mut [u8]) -> Result<usize, KernelError> {
        let (link, context) = self.link(peer)?;
        link.receive(context, into)
    }

    /// True when the transfer to `peer` has been handed over.
    pub(super) fn out_done(&mut self, peer: usize) -> Result<bool, KernelError> {
        Ok(self.link(peer)?.0.out_done())
    }

    /// True when the transfer from `peer` has been read.
    pub(super) fn in_done(&mut self, peer: usize) -> Result<bool, KernelError> {
        Ok(self.link(peer)?.0.in_done())
    }

    /// Moves the next bytes of a transfer to one peer, and of a transfer from one, at the same time: all of them.
    pub(super) fn exchange(
        &mut self,
        out: Option<(usize, &[u8])>,
        into: Option<(usize, &mut [u8])>,
    ) -> Result<(), KernelError> {
        let (to, data) = out.map_or((None, &[][..]), |(peer, data)| (Some(peer), data));
        let (from, into) = into.map_or((None, &mut [][..]), |(peer, into)| (Some(peer), into));
        let (mut sent, mut received) = (0, 0);
        loop {
            let (mut moved, mut waits_to, mut waits_from) = (0, None, None);
            if let Some(peer) = to {
                let bytes = self.send(peer, &data[sent..])?;
                sent += bytes;
                moved += bytes;
                // A transfer of nothing is its header.
                let flushed = self.link(peer)?.0.flushed();
                waits_to = (sent < data.len() || !flushed).then_some(peer);
            }
            if let Some(peer) = from {
                let bytes = self.receive(peer, &mut into[received..])?;
                received += bytes;
                moved += bytes;
                let missing = if into.is_empty() { !self.in_done(peer)? } else { received < into.len() };
                waits_from = missing.then_some(peer);
            }
            if waits_to.is_none() && waits_from.is_none() {
                return Ok(());
            }
            if moved == 0 {
                self.wait(waits_to, waits_from)?;
            }
        }
    }

    /// Waits until `to` takes bytes, or some have come from `from`.
    ///
    /// # Errors
    /// Why the group has stopped; [`KernelError::Link`] when the peer has gone or takes nothing for too long;
    /// [`KernelError::CollectiveMismatch`] when members wait in different calls.
    pub(super) fn wait(&mut self, to: Option<usize>, from: Option<usize>) -> Result<(), KernelError> {
        self.stop.check()?;
        let member = self.context.member;
        self.stop.waiting[member].store(from.or(to).map_or(0, |peer| peer + 1), Ordering::Relaxed);
        let waited = self.wait_a_tick(to, from);
        self.stop.waiting[member].store(0, Ordering::Relaxed);
        waited
    }

    fn wait_a_tick(&mut self, to: Option<usize>, from: Option<usize>) -> Result<(), KernelError> {
        let wants = |peer: usize| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::OUT | PollFlags::RDHUP, to == Some(peer));
            flags.set(PollFlags::IN, from == Some(peer));
            flags
        };
        let fd = |peer: usize| match self.links.get(peer) {
            Some(Some(link)) => Ok(PollFd::from_borrowed_fd(link.channel.as_fd(), wants(peer))),
            _ => Err(self.context.link_error(peer, "no channel was made")),
        };
        let first = to.or(from).unwrap_or(self.context.member);
        let mut fds = [fd(first)?, fd(from.unwrap_or(first))?];
        let fds = if from.is_some_and(|peer| peer != first) { &mut fds[..] } else { &mut fds[..1] };
        let ready = poll_for(fds, TICK).map_err(|error| self.context.link_error(first, error))?;
        let hung_up = fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR);
        if let Some(peer) = to {
            if hung_up {
                return Err(self.hung_up(peer));
            }
            let (timeout, (link, context)) = (self.write_timeout, self.link(peer)?);
            if link.stalled.is_some_and(|since| since.elapsed() > timeout) {
                let cause = format!("takes no bytes for {} ms during {}", timeout.as_millis(), context.text);
                return Err(context.link_error(peer, cause));
            }
        }
        if ready {
            self.quiet_since = None;
            return Ok(());
        }
        let since = *self.quiet_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= QUIET { self.ask_around() } else { Ok(()) }
    }

    /// A peer that still had bytes to take has ended its side.
    fn hung_up(&mut self, peer: usize) -> KernelError {
        match self.link(peer).and_then(|(link, context)| link.hear(context)) {
            Err(said) => said,
            Ok(()) => self.context.link_error(peer, format!("closed by the peer during {}", self.context.text)),
        }
    }

    fn ask_around(&mut self) -> Result<(), KernelError> {
        for link in self.links.iter_mut().flatten() {
            link.announce(&self.context)?;
            link.hear(&self.context)?;
        }
        Ok(())
    }

    /// The likeliest cause of `error`: what this process or another member already knows.
    fn first_cause(&mut self, error: KernelError) -> KernelError {
        // What a peer said is of another rank, or is no failed link.
        let own_rank = self.context.group.ranks[self.context.member];
        if !matches!(error, KernelError::Link { rank, .. } if rank == own_rank) {
            return error;
        }
        let deadline = Instant::now() + LAST_WORDS;
        loop {
            if let Err(known) = self.stop.check() {
                return known;
            }
            for link in self.links.iter_mut().flatten() {
                match link.hear(&self.context) {
                    // What it said, not that it is silent.
                    Err(said) if link.may_speak() => return said,
                    _ => {}
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let listening = self.links.iter().flatten().filter(|link| link.is_listening());
            let mut fds: Vec<_> =
                listening.map(|link| PollFd::from_borrowed_fd(link.channel.as_fd(), PollFlags::IN)).collect();
            if fds.is_empty() || left.is_zero() || poll_for(&mut fds, left).is_err() {
                return error;
            }
        }
    }

    /// Ends the group for this member, and tells the others why. Returns the cause to report.
    pub(super) fn give_up(&mut self, error: KernelError) -> KernelError {
        let cause = self.first_cause(error);
        // Another member of this process, or an abort, may have been first.
        let failed = self.stop.failed.get_or_init(|| cause);
        let cause = self.stop.aborted.get().unwrap_or(failed).clone();
        for link in self.links.iter_mut().flatten() {
            link.give_up(&self.context, &cause);
        }
        cause
    }
}

/// Waits for events, and says whether there are any; a signal that cuts the wait short is none.
fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) -> Result<bool, String> {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    match poll(fds, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(format!("cannot poll: {error}")),
    }
}
