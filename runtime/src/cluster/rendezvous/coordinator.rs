//! Process 0 at rendezvous: gathers the introductions, compares them, starts all together.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::time::{Duration, Instant};

use shardflow_actors::transport::wire::{self, MESSAGE_BYTES_MAX, WireError};
use shardflow_actors::transport::{Address, Connection, ListenAddress, Listener, Purpose, SessionId, TransportError};

use super::messages::{Answer, Call, INTRODUCTION_BYTES_MAX, Ready};
use super::{
    Conflict, JoinInfo, MissingRanks, ProcessLabel, RendezvousConfig, RendezvousError, RendezvousRefusal, Roster,
};
use super::{RETRY, advertised, introduction, is_in_use, join};
use crate::exit::Report;
use crate::machine::Targets;

/// A connected process says who it is, takes an answer, and confirms, each within this.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Conflicts that are kept; the first says enough.
const CONFLICTS_MAX: usize = 64;

/// A process that has introduced itself.
struct Seat {
    introduction: JoinInfo,
    link: Connection,
}

/// Who is here.
struct Hall {
    own: JoinInfo,
    /// By rank, from rank 1.
    seats: Vec<Option<Seat>>,
    conflicts: Vec<Conflict>,
    /// RV-4: these ranks do not join.
    failed: Option<(Range<u32>, Report)>,
    /// Processes without a seat, to be told why.
    turned_away: Vec<Connection>,
}

pub(super) fn lead(
    config: &RendezvousConfig,
    deadline: Instant,
    on_waiting: &mut dyn FnMut(&MissingRanks),
) -> Result<(Roster, Listener), RendezvousError> {
    let endpoint = listen(config, deadline)?;
    let seats = (1..config.processes).map(|_| None).collect();
    // Others reach process 0 by the name that they know, not by the address that it stands for here.
    let others = endpoint.addresses().iter().skip(1).cloned();
    let published = std::iter::once(config.coordinator.clone()).chain(others).collect();
    let own = introduction(config, advertised(config, published)?)?;
    let mut hall = Hall { own, seats, conflicts: Vec::new(), failed: None, turned_away: Vec::new() };
    hall.gather(config, &endpoint, deadline, on_waiting)?;
    if let Some((ranks, report)) = hall.failed.take() {
        let refused = hall.refuse(RendezvousRefusal::Failed(report.clone()));
        let missing = hall.missing().into_iter().filter(|rank| !ranks.contains(rank)).collect();
        turn_away(&endpoint, missing, &report, Instant::now() + config.report_within);
        return Err(refused);
    }
    if !hall.conflicts.is_empty() {
        return Err(hall.refuse(RendezvousRefusal::Conflicts(hall.conflicts.clone())));
    }
    let missing = hall.missing();
    if !missing.is_empty() {
        // The deadline is over.
        let waited_ms = (config.timeout + deadline.elapsed()).as_millis() as u64;
        let processes = config.processes;
        let refused = endpoint.refused().total();
        return Err(hall.refuse(RendezvousRefusal::Missing { missing, processes, waited_ms, refused }));
    }
    let roster = hall.roster()?;
    endpoint.begin(roster.world());
    match hall.start(&roster) {
        Ok(()) => Ok((roster, endpoint)),
        Err(lost) => Err(hall.refuse(RendezvousRefusal::Lost(lost))),
    }
}

/// RV-4, on behalf of `ranks`, process 0 among them.
///
/// # Errors
/// The address cannot be listened on.
pub(in crate::cluster) fn answer(
    config: &RendezvousConfig,
    ranks: Range<u32>,
    report: &Report,
) -> Result<(), RendezvousError> {
    let deadline = Instant::now() + config.report_within;
    let endpoint = bind(config, deadline)?;
    let missing = (0..config.processes).filter(|rank| !ranks.contains(rank)).collect();
    turn_away(&endpoint, missing, report, deadline);
    Ok(())
}

/// Refuses all that call, until all of `missing` have, or the time is up.
fn turn_away(endpoint: &Listener, mut missing: BTreeSet<u32>, report: &Report, deadline: Instant) {
    while !missing.is_empty() {
        let Ok((from, link)) = endpoint.wait_any(Purpose::Rendezvous, deadline) else { return };
        // Read to its end: a connection that is closed with bytes unread may lose the answer.
        let ranks = match read_call(&link) {
            Ok(Call::Failed { ranks, .. }) => ranks,
            Ok(Call::Join(_)) => from..from.saturating_add(1),
            Err(_) => continue,
        };
        tell(&link, &Answer::Refused(RendezvousRefusal::Failed(report.clone())));
        missing.retain(|rank| !ranks.contains(rank));
    }
}

fn read_call(link: &Connection) -> Result<Call, WireError> {
    wire::read_message(&mut link.until(Instant::now() + REPLY_TIMEOUT), INTRODUCTION_BYTES_MAX)
}

/// Listens where the others look for process 0, and where only they look once they know it.
fn listen(config: &RendezvousConfig, deadline: Instant) -> Result<Listener, RendezvousError> {
    match bind(config, deadline.min(Instant::now() + config.late_grace)) {
        Err(error) if is_in_use(&error) => Err(occupied(config, error)),
        bound => Ok(bound?),
    }
}

fn bind(config: &RendezvousConfig, give_up: Instant) -> Result<Listener, TransportError> {
    let open = |listen: &[ListenAddress]| Listener::listen(0, config.secret.clone(), listen, config.endpoint);
    let local = config.interface.unwrap_or((Ipv4Addr::LOCALHOST, 0).into());
    loop {
        let opened = match &config.coordinator {
            Address::Unix(path) => open(&[ListenAddress::Unix(path.clone()), ListenAddress::Tcp(local)]),
            Address::Tcp(name) => open_tcp(config, name, &open),
        };
        match opened {
            // A rank 0 that is about to end may still be there.
            Err(error) if is_in_use(&error) && Instant::now() < give_up => std::thread::sleep(RETRY),
            opened => return opened,
        }
    }
}

fn open_tcp(
    config: &RendezvousConfig,
    name: &str,
    open: &dyn Fn(&[ListenAddress]) -> Result<Listener, TransportError>,
) -> Result<Listener, TransportError> {
    let failed = |cause| TransportError::Listen { address: config.coordinator.clone(), cause };
    let mut last = failed(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    let Targets { addresses, is_hidden } = Targets::of(name, config.spans_nodes).map_err(failed)?;
    for target in addresses {
        let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let any = [ListenAddress::Tcp((any, target.port()).into()), ListenAddress::PrivateUnix];
        let mut address = config.interface.unwrap_or(target);
        address.set_port(target.port());
        if is_hidden && config.interface.is_none() {
            return open(&any);
        }
        match open(&[ListenAddress::Tcp(address), ListenAddress::PrivateUnix]) {
            // The name is an address in front of this node, such as a service's: listen on all that it has.
            Err(TransportError::Listen { cause, .. })
                if cause.kind() == io::ErrorKind::AddrNotAvailable && !target.ip().is_loopback() =>
            {
                return open(&any);
            }
            Err(error) => last = error,
            opened => return opened,
        }
    }
    Err(last)
}

/// Another process holds the address. Is it a second rank 0? Then it, and all others, should hear of it.
fn occupied(config: &RendezvousConfig, error: TransportError) -> RendezvousError {
    let brief = RendezvousConfig { timeout: REPLY_TIMEOUT, late_grace: Duration::ZERO, ..config.clone() };
    match join::follow(&brief, Instant::now() + REPLY_TIMEOUT, &mut |_| {}) {
        Err(refused @ (RendezvousError::Refused(_) | RendezvousError::Late { .. })) => refused,
        _ => error.into(),
    }
}

impl Hall {
    fn missing(&self) -> Vec<u32> {
        (1u32..).zip(&self.seats).filter(|(_, seat)| seat.is_none()).map(|(rank, _)| rank).collect()
    }

    /// Until all are here; until the deadline; or until a little after a conflict.
    fn gather(
        &mut self,
        config: &RendezvousConfig,
        endpoint: &Listener,
        deadline: Instant,
        on_waiting: &mut dyn FnMut(&MissingRanks),
    ) -> Result<(), TransportError> {
        let (mut deadline, mut report_at) = (deadline, Instant::now() + config.report_every);
        loop {
            // Whoever died while it waited has to come again.
            for seat in &mut self.seats {
                seat.take_if(|seat| seat.link.is_closed());
            }
            let now = Instant::now();
            if !self.conflicts.is_empty() {
                deadline = deadline.min(now + config.conflict_grace);
            }
            let missing = self.missing();
            if missing.is_empty() || now >= deadline || self.failed.is_some() {
                return Ok(());
            }
            if now >= report_at {
                on_waiting(&MissingRanks::Ranks { missing, processes: config.processes });
                report_at = now + config.report_every;
            }
            match endpoint.wait_any(Purpose::Rendezvous, deadline.min(report_at)) {
                Ok((from, link)) => self.welcome(from, link),
                Err(TransportError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads an introduction and gives it its seat.
    fn welcome(&mut self, from: u32, link: Connection) {
        let introduction = match read_call(&link) {
            Ok(Call::Join(introduction)) if introduction.member.process == from && introduction.check().is_ok() => {
                introduction
            }
            Ok(Call::Failed { ranks, report }) if report.is_for_all() => {
                self.failed = Some((ranks, report));
                return self.turned_away.push(link);
            }
            // It holds the secret, so this is a bug or a dying process; it may come again.
            read => {
                tracing::warn!(from, error = ?read.err(), "an introduction that cannot be read");
                return;
            }
        };
        if let Some(conflict) = self.own.conflict(&introduction) {
            self.object(conflict);
        }
        let Some(seat) = from.checked_sub(1).and_then(|seat| self.seats.get_mut(seat as usize)) else {
            // Rank 0 is taken; a rank beyond the world has another number of processes, which was noted.
            if from == 0 {
                self.object(Conflict::Duplicate { first: self.own.member.who(), second: introduction.member.who() });
            }
            self.turned_away.push(link);
            return;
        };
        let Some(sitting) = seat else {
            *seat = Some(Seat { introduction, link });
            return;
        };
        let (old, new) = (&sitting.introduction.member, &introduction.member);
        let (first, second) = (old.who(), new.who());
        if sitting.link.is_closed() || new.restart > old.restart || first == second {
            // RV-3
            *seat = Some(Seat { introduction, link });
        } else if new.restart < old.restart {
            // A leftover of the past concerns nobody else.
            tell(&link, &Answer::Refused(RendezvousRefusal::Conflicts(vec![Conflict::Duplicate { first, second }])));
        } else {
            self.object(Conflict::Duplicate { first, second });
            self.turned_away.push(link);
        }
    }

    fn object(&mut self, conflict: Conflict) {
        if self.conflicts.len() < CONFLICTS_MAX && !self.conflicts.contains(&conflict) {
            self.conflicts.push(conflict);
        }
    }

    fn roster(&self) -> Result<Roster, RendezvousError> {
        let seated = self.seats.iter().flatten().map(|seat| seat.introduction.member.clone());
        let members: Vec<_> = std::iter::once(self.own.member.clone()).chain(seated).collect();
        let epoch = members.iter().map(|m| m.restart).max().unwrap_or(0);
        Ok(Roster { session: SessionId::random()?, epoch, members })
    }

    /// RV-1. Gives back who went away.
    fn start(&self, roster: &Roster) -> Result<(), ProcessLabel> {
        let lost = |seat: &Seat| seat.introduction.member.who();
        let answer = Answer::Roster(roster.clone());
        for seat in self.seats.iter().flatten() {
            tell(&seat.link, &answer).then_some(()).ok_or_else(|| lost(seat))?;
        }
        let deadline = Instant::now() + REPLY_TIMEOUT;
        for seat in self.seats.iter().flatten() {
            match wire::read_message::<Ready>(&mut seat.link.until(deadline), INTRODUCTION_BYTES_MAX) {
                Ok(ready) if ready.session == roster.session => {}
                _ => return Err(lost(seat)),
            }
        }
        for seat in self.seats.iter().flatten() {
            tell(&seat.link, &Answer::Start).then_some(()).ok_or_else(|| lost(seat))?;
        }
        Ok(())
    }

    /// RV-2.
    fn refuse(&self, verdict: RendezvousRefusal) -> RendezvousError {
        let answer = Answer::Refused(verdict.clone());
        for link in self.seats.iter().flatten().map(|seat| &seat.link).chain(&self.turned_away) {
            tell(link, &answer);
        }
        RendezvousError::Refused(verdict)
    }
}

/// False when the process did not take it.
fn tell(link: &Connection, answer: &Answer) -> bool {
    let mut writer = link.until(Instant::now() + REPLY_TIMEOUT);
    wire::write_message(&mut writer, answer, MESSAGE_BYTES_MAX).is_ok()
}
