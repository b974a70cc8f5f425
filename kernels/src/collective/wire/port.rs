//! All links of one member: transfers over several links at once, waits, and failure detection.
//!
//! Different calls are detected even if the members that make them exchange no data. A member that has waited for
//! [`QUIET`] sends its call over all its links, and reads the headers that arrived. Members that wait forever wait for
//! each other in a cycle, and a member waits only for members to which it has links. Equal calls do not wait in a cycle.
//! So the cycle has a link whose two members wait in different calls. If both calls have the same number, both members
//! detect the mismatch and report it over their links, as do the members that receive the report. The links of a
//! reduction, ring or tree connect all members, so all of them receive it. If a member has finished a differing call
//! without exchanging data, the numbers differ. Then the next header of data reveals the mismatch or, if there is none,
//! the watchdog ends the session.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::link::{Context, Link};
use crate::collective::{Group, MemberWait};
use crate::error::{KernelError, Result};

/// Longest wait between two checks for an abort.
const TICK: Duration = Duration::from_millis(50);

/// How long a member waits without progress before it sends its call to the other members.
const QUIET: Duration = Duration::from_millis(200);

/// How long a member with a broken link waits for other members to send the cause, which they often know earlier. The
/// time exceeds [`QUIET`], because a member that waits for another peer begins to read headers after [`QUIET`].
const CAUSE_WAIT: Duration = Duration::from_millis(500);

/// State of a member that other threads read or set while it runs a call.
#[derive(Debug)]
pub(super) struct MemberStatus {
    group: Arc<Group>,
    member: usize,
    /// The abort of the engine, shared by all its groups.
    aborted: Arc<OnceLock<KernelError>>,
    /// The failure of the group, shared by its members in this process.
    failed: Arc<OnceLock<KernelError>>,
    /// 1 plus the member for which this member waits, or 0 if it waits for none.
    waits_for: AtomicUsize,
}

impl MemberStatus {
    pub(super) fn new(
        group: Arc<Group>,
        member: usize,
        aborted: Arc<OnceLock<KernelError>>,
        failed: Arc<OnceLock<KernelError>>,
    ) -> Self {
        Self { group, member, aborted, failed, waits_for: AtomicUsize::new(0) }
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.aborted.get().or_else(|| self.failed.get()) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    pub(super) fn wait(&self) -> Option<MemberWait> {
        let peer = self.waits_for.load(Ordering::Relaxed).checked_sub(1)?;
        Some(MemberWait::new(&self.group, self.member, peer))
    }
}

#[derive(Debug)]
pub(super) struct Port {
    pub(super) context: Context,
    /// The links, by peer.
    links: BTreeMap<usize, Link>,
    status: Arc<MemberStatus>,
    write_timeout: Duration,
    /// The start of the current period without transferred bytes.
    quiet_since: Option<Instant>,
}

impl Port {
    pub(super) fn new(
        context: Context,
        links: BTreeMap<usize, Link>,
        status: Arc<MemberStatus>,
        write_timeout: Duration,
    ) -> Self {
        Self { context, links, status, write_timeout, quiet_since: None }
    }

    pub(super) fn members(&self) -> usize {
        self.context.group.ranks.len()
    }

    pub(super) fn link(&mut self, peer: usize) -> Result<(&mut Link, &Context)> {
        match self.links.get_mut(&peer) {
            Some(link) => Ok((link, &self.context)),
            None => Err(self.context.no_channel(peer)),
        }
    }

    pub(super) fn finish_call(&mut self) {
        let involved = self.links.iter_mut().filter(|(peer, _)| self.context.involves(**peer));
        involved.for_each(|(_, link)| link.finish_call());
    }

    pub(super) fn begin_out(&mut self, peer: usize, bytes: usize) -> Result<()> {
        let (link, context) = self.link(peer)?;
        link.begin_out(context, bytes as u64);
        Ok(())
    }

    pub(super) fn begin_in(&mut self, peer: usize, bytes: usize) -> Result<()> {
        self.link(peer)?.0.begin_in(bytes as u64);
        Ok(())
    }

    /// Sends the next bytes of a transfer without blocking. Returns the number of bytes.
    pub(super) fn send(&mut self, peer: usize, data: &[u8]) -> Result<usize> {
        let (link, context) = self.link(peer)?;
        link.send(context, data)
    }

    /// Reads the next bytes of a transfer without blocking. Returns the number of bytes.
    pub(super) fn receive(&mut self, peer: usize, into: &mut [u8]) -> Result<usize> {
        let (link, context) = self.link(peer)?;
        link.receive(context, into)
    }

    /// Sends all of `out` to one peer while it fills `into` from one peer. Each buffer is the next part of a transfer.
    pub(super) fn exchange(&mut self, out: Option<(usize, &[u8])>, into: Option<(usize, &mut [u8])>) -> Result<()> {
        let (to, data) = out.map_or((None, &[][..]), |(peer, data)| (Some(peer), data));
        let (from, into) = into.map_or((None, &mut [][..]), |(peer, into)| (Some(peer), into));
        let (mut sent, mut received) = (0, 0);
        loop {
            let (mut moved, mut waits_to, mut waits_from) = (0, None, None);
            if let Some(peer) = to {
                let bytes = self.send(peer, &data[sent..])?;
                sent += bytes;
                moved += bytes;
                // A transfer of no bytes still has a header.
                let flushed = self.link(peer)?.0.flushed();
                waits_to = (sent < data.len() || !flushed).then_some(peer);
            }
            if let Some(peer) = from {
                let bytes = self.receive(peer, &mut into[received..])?;
                received += bytes;
                moved += bytes;
                let missing = if into.is_empty() { !self.link(peer)?.0.in_done() } else { received < into.len() };
                waits_from = missing.then_some(peer);
            }
            if waits_to.is_none() && waits_from.is_none() {
                return Ok(());
            }
            if moved == 0 {
                self.wait(waits_to.as_slice(), waits_from)?;
            }
        }
    }

    /// Waits until one of the peers `to` accepts bytes, or bytes have arrived from `from`.
    pub(super) fn wait(&mut self, to: &[usize], from: Option<usize>) -> Result<()> {
        self.status.check()?;
        let awaited = from.or(to.first().copied());
        self.status.waits_for.store(awaited.map_or(0, |peer| peer + 1), Ordering::Relaxed);
        let waited = self.wait_tick(to, from);
        self.status.waits_for.store(0, Ordering::Relaxed);
        waited
    }

    fn wait_tick(&mut self, to: &[usize], from: Option<usize>) -> Result<()> {
        let mut wanted: Vec<(usize, PollFlags)> =
            to.iter().map(|peer| (*peer, PollFlags::OUT | PollFlags::RDHUP)).collect();
        match (from, wanted.iter_mut().find(|(peer, _)| Some(*peer) == from)) {
            (_, Some((_, flags))) => *flags |= PollFlags::IN,
            (Some(from), None) => wanted.push((from, PollFlags::IN)),
            (None, None) => {}
        }
        let fd = |(peer, flags): &(usize, PollFlags)| match self.links.get(peer) {
            Some(link) => Ok(PollFd::from_borrowed_fd(link.channel.as_fd(), *flags)),
            None => Err(self.context.no_channel(*peer)),
        };
        let mut fds = wanted.iter().map(fd).collect::<Result<Vec<_>>>()?;
        let first = wanted.first().map_or(self.context.member, |(peer, _)| *peer);
        let ready = poll_for(&mut fds, TICK).map_err(|error| self.context.link_error(first, error))?;
        let broken = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let hung_up: Vec<bool> = fds.iter().map(|fd| fd.revents().intersects(broken)).collect();
        for (peer, hung_up) in to.iter().zip(hung_up) {
            if hung_up {
                return Err(self.hung_up(*peer));
            }
            let (timeout, (link, context)) = (self.write_timeout, self.link(*peer)?);
            if link.stalled.is_some_and(|since| since.elapsed() > timeout) {
                let cause =
                    format!("the peer has accepted no bytes for {} ms during {}", timeout.as_millis(), context.text);
                return Err(context.link_error(*peer, cause));
            }
        }
        if ready {
            self.quiet_since = None;
            return Ok(());
        }
        let since = *self.quiet_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= QUIET { self.exchange_announcements() } else { Ok(()) }
    }

    /// The error for a peer that closed its side while this member still had bytes to send to that peer.
    fn hung_up(&mut self, peer: usize) -> KernelError {
        match self.link(peer).and_then(|(link, context)| link.read_headers(context)) {
            Err(peer_error) => peer_error,
            Ok(()) => {
                self.context.link_error(peer, format!("the peer closed the connection during {}", self.context.text))
            }
        }
    }

    fn exchange_announcements(&mut self) -> Result<()> {
        for link in self.links.values_mut() {
            link.announce(&self.context)?;
            link.read_headers(&self.context)?;
        }
        Ok(())
    }

    /// Returns the cause of `error` if this process or another member already knows the cause, and otherwise `error`.
    fn root_cause(&mut self, error: KernelError) -> KernelError {
        // Only a failure of this member's own link may have another cause. Any other error is the cause itself, for
        // example an error that a peer sent.
        let own_rank = self.context.group.ranks.rank(self.context.member);
        if !matches!(error, KernelError::Link { rank, .. } if rank == own_rank) {
            return error;
        }
        let deadline = Instant::now() + CAUSE_WAIT;
        loop {
            if let Err(known) = self.status.check() {
                return known;
            }
            for link in self.links.values_mut() {
                match link.read_headers(&self.context) {
                    // The connection is not closed, so this error came from the peer.
                    Err(peer_error) if link.can_receive_header() => return peer_error,
                    _ => {}
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let waiting_links = self.links.values().filter(|link| link.awaits_header());
            let mut fds: Vec<_> =
                waiting_links.map(|link| PollFd::from_borrowed_fd(link.channel.as_fd(), PollFlags::IN)).collect();
            if fds.is_empty() || left.is_zero() || poll_for(&mut fds, left).is_err() {
                return error;
            }
        }
    }

    /// Fails the group for this member, and notifies the other members of the cause. Returns the cause.
    pub(super) fn fail(&mut self, error: KernelError) -> KernelError {
        let cause = self.root_cause(error);
        // Another member of this process, or an abort, may have failed the group first.
        let failed = self.status.failed.get_or_init(|| cause);
        let cause = self.status.aborted.get().unwrap_or(failed).clone();
        for link in self.links.values_mut() {
            link.fail(&self.context, &cause);
        }
        cause
    }
}

/// Waits for events. Returns whether there are any; a signal that interrupts the wait counts as none.
fn poll_for(fds: &mut [PollFd<'_>], timeout: Duration) -> Result<bool, String> {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    match poll(fds, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(format!("cannot poll: {error}")),
    }
}
