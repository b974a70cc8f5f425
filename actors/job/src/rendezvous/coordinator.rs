//! Process 0 at the rendezvous: collects the join requests, compares them, and starts all processes together.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::transport::wire::{self, MESSAGE_BYTES_MAX, WireError};
use crate::transport::{
    Address, Connection, ListenAddress, Listener, ListenerOptions, Purpose, SessionId, TransportError,
};

use super::config::{RETRY, RendezvousConfig, advertised, is_in_use, join_info};
use super::join::join;
use super::messages::{
    Answer, Conflict, JoinInfo, Outcome, REQUEST_BYTES_MAX, Ready, RendezvousError, RendezvousRefusal, Request, joined,
    ranks,
};
use super::roster::{Directory, ProcessLabel};
use crate::exit::Report;
use crate::machine::Targets;

/// Timeout for each message to or from a connected process.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for an address that is in use. After that, process 0 tries for the same time to join the process
/// that holds the address, because that process may belong to this job.
const IN_USE_WAIT: Duration = Duration::from_millis(1500);
const CONFLICTS_MAX: usize = 64;

struct Joined {
    info: JoinInfo,
    connection: Connection,
}

struct JoinState {
    own: JoinInfo,
    /// The joined processes by rank, starting at rank 1.
    joined: Vec<Option<Joined>>,
    conflicts: Vec<Conflict>,
    /// RV-4: the ranks that will not join, and the report about them.
    failed: Option<(Range<u32>, Report)>,
    /// Connections of processes that were not accepted. These processes also receive the refusal.
    rejected: Vec<Connection>,
}

pub(super) fn run(config: &RendezvousConfig, deadline: Instant, on_waiting: &mut dyn FnMut(&str)) -> Outcome {
    let listener = listen(config, deadline, on_waiting)?;
    let joined = (1..config.processes).map(|_| None).collect();
    // Other processes reach process 0 by the configured name, which may resolve differently on their nodes.
    let others = listener.addresses().iter().skip(1).cloned();
    let published = std::iter::once(config.coordinator.clone()).chain(others).collect();
    let own = join_info(config, advertised(config, published)?)?;
    let mut state = JoinState { own, joined, conflicts: Vec::new(), failed: None, rejected: Vec::new() };
    state.collect(config, &listener, deadline, on_waiting)?;
    if let Some((ranks, report)) = state.failed.take() {
        let error = state.refuse(RendezvousRefusal::Failed(report.clone()));
        let missing = state.missing().into_iter().filter(|rank| !ranks.contains(rank)).collect();
        refuse_missing(&listener, missing, &report, Instant::now() + config.report_within);
        return Err(error);
    }
    if !state.conflicts.is_empty() {
        return Err(state.refuse(RendezvousRefusal::Conflicts(state.conflicts.clone())));
    }
    let missing = state.missing();
    if !missing.is_empty() {
        // The deadline has passed.
        let waited_ms = (config.timeout + deadline.elapsed()).as_millis() as u64;
        let processes = config.processes;
        let refused = listener.refused().total();
        return Err(state.refuse(RendezvousRefusal::Missing { missing, processes, waited_ms, refused }));
    }
    let directory = state.directory()?;
    let roster = directory.roster(0, &state.own.wanted);
    listener.begin(roster.world());
    match state.start(&directory, roster.session) {
        Ok(()) => Ok((roster, listener)),
        Err(lost) => Err(state.refuse(RendezvousRefusal::Lost(lost))),
    }
}

/// RV-4, if `ranks` include 0: refuses each caller during `report_within`. Returns true if one of them tried to join.
pub(crate) fn refuse_callers(
    config: &RendezvousConfig,
    ranks: Range<u32>,
    report: &Report,
) -> Result<bool, RendezvousError> {
    let deadline = Instant::now() + config.report_within;
    let listener = bind(config, deadline.min(Instant::now() + IN_USE_WAIT))?;
    let missing = (0..config.processes).filter(|rank| !ranks.contains(rank)).collect();
    Ok(refuse_missing(&listener, missing, report, deadline))
}

/// Refuses every process that connects, until all `missing` processes are refused or the deadline passes. Returns true
/// if one of the refused processes tried to join.
fn refuse_missing(listener: &Listener, mut missing: BTreeSet<u32>, report: &Report, deadline: Instant) -> bool {
    let mut joins = false;
    while !missing.is_empty() {
        let Ok((from, connection)) = listener.wait_any(Purpose::Rendezvous, deadline) else { break };
        // Reads the whole request first: closing a connection with unread bytes may discard the answer.
        let Ok(request) = read_request(&connection) else { continue };
        joins |= matches!(request, Request::Join(_));
        let ranks = if let Request::Failed { ranks, .. } = request { ranks } else { from..from.saturating_add(1) };
        send_answer(&connection, &Answer::Refused(RendezvousRefusal::Failed(report.clone())));
        missing.retain(|rank| !ranks.contains(rank));
    }
    joins
}

fn read_request(connection: &Connection) -> Result<Request, WireError> {
    wire::read_message(&mut connection.until(Instant::now() + REPLY_TIMEOUT), REQUEST_BYTES_MAX)
}

/// Listens on the coordinator's address, and on a second address that only rosters contain.
fn listen(config: &RendezvousConfig, until: Instant, note: &mut dyn FnMut(&str)) -> Result<Listener, RendezvousError> {
    let (begin, mut wait, mut failed) = (Instant::now(), Duration::ZERO, None);
    loop {
        match (bind(config, until.min(begin + wait)), failed.take()) {
            (Err(error), None) if is_in_use(&error) => {}
            (Err(error), Some(failed)) if is_in_use(&error) => return Err(failed),
            (bound, _) => return Ok(bound?),
        }
        if wait.is_zero() && !config.late_grace.is_zero() {
            wait = IN_USE_WAIT.min(config.late_grace);
            note(&format!("{} is in use; trying again for {wait:?}", config.coordinator));
            continue;
        }
        match join_as_duplicate(config) {
            refused @ RendezvousError::Refused(_) => return Err(refused),
            in_use @ RendezvousError::InUse { .. } => failed = Some(in_use),
            // An earlier world holds the address and may be about to end.
            error => (failed, wait) = (Some(error), config.late_grace),
        }
    }
}

fn bind(config: &RendezvousConfig, give_up: Instant) -> Result<Listener, TransportError> {
    let open =
        |listen: &[ListenAddress]| Listener::listen(0, config.secret.clone(), listen, ListenerOptions::default());
    let local = config.interface.unwrap_or((Ipv4Addr::LOCALHOST, 0).into());
    loop {
        let opened = match &config.coordinator {
            Address::Unix(path) => open(&[ListenAddress::Unix(path.clone()), ListenAddress::Tcp(local)]),
            Address::Tcp(name) => open_tcp(config, name, &open),
        };
        match opened {
            // An earlier rank 0 may still hold the address until it ends.
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
            // The name resolves to the address of a proxy, such as a Kubernetes service. Listens on all addresses.
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

/// Another process holds the address, perhaps a second rank 0. Sends it a join request, so that it detects the
/// duplicate rank and refuses all processes.
fn join_as_duplicate(config: &RendezvousConfig) -> RendezvousError {
    // `report_every` also limits each attempt to connect. A busy machine may need most of this time for an attempt.
    let (timeout, report_every) = (REPLY_TIMEOUT, IN_USE_WAIT);
    let brief = RendezvousConfig { timeout, report_every, late_grace: Duration::ZERO, ..config.clone() };
    match join(&brief, Instant::now() + IN_USE_WAIT, &mut |_| {}) {
        Err(refused @ (RendezvousError::Refused(_) | RendezvousError::Late { .. })) => refused,
        Err(RendezvousError::Transport(e) | RendezvousError::NotReached(e)) if e.refusal().is_some() => e.into(),
        _ => RendezvousError::InUse { coordinator: config.coordinator.clone() },
    }
}

impl JoinState {
    fn missing(&self) -> Vec<u32> {
        (1u32..).zip(&self.joined).filter(|(_, entry)| entry.is_none()).map(|(rank, _)| rank).collect()
    }

    /// Accepts join requests until all processes have joined, one reports a failure, or the deadline passes.
    fn collect(
        &mut self,
        config: &RendezvousConfig,
        listener: &Listener,
        deadline: Instant,
        on_waiting: &mut dyn FnMut(&str),
    ) -> Result<(), TransportError> {
        let (mut deadline, mut report_at) = (deadline, Instant::now() + config.report_every);
        loop {
            let now = Instant::now();
            if !self.conflicts.is_empty() {
                deadline = deadline.min(now + config.conflict_grace);
            }
            let ends = now >= deadline || self.failed.is_some();
            if ends || now >= report_at || self.joined.iter().all(Option::is_some) {
                // A process that died while it waited must join again. The check takes a system call per process, so it
                // is not repeated after each join.
                for entry in &mut self.joined {
                    entry.take_if(|joined| joined.connection.is_closed());
                }
                let missing = self.missing();
                if missing.is_empty() || ends {
                    return Ok(());
                }
                if now >= report_at {
                    let (joined, all) = (joined(&missing, config.processes), config.processes);
                    on_waiting(&format!("waiting for {}: {joined} of {all} joined", ranks(&missing)));
                    report_at = now + config.report_every;
                }
            }
            match listener.wait_any(Purpose::Rendezvous, deadline.min(report_at)) {
                Ok((from, connection)) => self.handle_request(from, connection),
                Err(TransportError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads a request, and records a joined process, a failure or a conflict.
    fn handle_request(&mut self, from: u32, connection: Connection) {
        let info = match read_request(&connection) {
            Ok(Request::Join(info)) if info.member.process == from && info.check().is_ok() => info,
            Ok(Request::Failed { ranks, report }) if report.concerns_all() => {
                self.failed = Some((ranks, report));
                return self.rejected.push(connection);
            }
            // The sender knows the secret. So it has a bug, or it is ending and may join again.
            request => {
                tracing::warn!(from, error = ?request.err(), "invalid rendezvous request");
                return;
            }
        };
        if let Some(conflict) = self.own.conflict(&info) {
            self.add_conflict(conflict);
        }
        let Some(entry) = from.checked_sub(1).and_then(|index| self.joined.get_mut(index as usize)) else {
            // Rank 0 is this process. A rank outside of the world implies another world size, which is recorded above.
            if from == 0 {
                let (first, second) = (self.own.member.label(), info.member.label());
                self.add_conflict(Conflict::Duplicate { first, second });
            }
            self.rejected.push(connection);
            return;
        };
        let Some(present) = entry else {
            *entry = Some(Joined { info, connection });
            return;
        };
        let (old, new) = (&present.info.member, &info.member);
        let (first, second) = (old.label(), new.label());
        if present.connection.is_closed() || new.restart > old.restart || first == second {
            // RV-3
            *entry = Some(Joined { info, connection });
        } else if new.restart < old.restart {
            // Refuses only the process of the earlier attempt. The others continue.
            let conflicts = vec![Conflict::Duplicate { first, second }];
            send_answer(&connection, &Answer::Refused(RendezvousRefusal::Conflicts(conflicts)));
        } else {
            self.add_conflict(Conflict::Duplicate { first, second });
            self.rejected.push(connection);
        }
    }

    fn add_conflict(&mut self, conflict: Conflict) {
        if self.conflicts.len() < CONFLICTS_MAX && !self.conflicts.contains(&conflict) {
            self.conflicts.push(conflict);
        }
    }

    fn directory(&self) -> Result<Directory, RendezvousError> {
        let others = self.joined.iter().flatten().map(|joined| joined.info.member.clone());
        let members = std::iter::once(self.own.member.clone()).chain(others).collect();
        Ok(Directory::new(SessionId::random().map_err(TransportError::from)?, members))
    }

    /// RV-1: starts all processes. If one was lost, returns that process as the error.
    fn start(&self, directory: &Directory, session: SessionId) -> Result<(), ProcessLabel> {
        let all = || self.joined.iter().flatten();
        let roster = |info: &JoinInfo| Answer::Roster(directory.roster(info.member.process, &info.wanted));
        let unreached = all().find(|joined| !send_answer(&joined.connection, &roster(&joined.info)));
        let not_ready = || {
            let deadline = Instant::now() + REPLY_TIMEOUT;
            all().find(|joined| {
                let ready = wire::read_message(&mut joined.connection.until(deadline), REQUEST_BYTES_MAX);
                !ready.is_ok_and(|ready: Ready| ready.session == session)
            })
        };
        let not_started = || all().find(|joined| !send_answer(&joined.connection, &Answer::Start));
        let lost = unreached.or_else(not_ready).or_else(not_started);
        lost.map_or(Ok(()), |joined| Err(joined.info.member.label()))
    }

    /// RV-2: sends the refusal to all connected processes.
    fn refuse(&self, refusal: RendezvousRefusal) -> RendezvousError {
        let answer = Answer::Refused(refusal.clone());
        for connection in self.joined.iter().flatten().map(|joined| &joined.connection).chain(&self.rejected) {
            send_answer(connection, &answer);
        }
        RendezvousError::Refused(refusal)
    }
}

fn send_answer(connection: &Connection, answer: &Answer) -> bool {
    let mut writer = connection.until(Instant::now() + REPLY_TIMEOUT);
    wire::write_message(&mut writer, answer, MESSAGE_BYTES_MAX).is_ok()
}
