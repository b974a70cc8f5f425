//! Every process but 0 at rendezvous: finds process 0, introduces itself, waits for the roster.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use shardflow_actors::transport::wire::{self, MESSAGE_BYTES_MAX, WireError};
use shardflow_actors::transport::{
    Address, Connection, Hello, ListenAddress, Listener, Purpose, Refusal, SessionId, TransportError, connect,
};

use super::messages::{Answer, Call, INTRODUCTION_BYTES_MAX, Ready, RendezvousRefusal};
use super::{JoinInfo, MissingRanks, RETRY, RendezvousConfig, RendezvousError, Roster};
use super::{advertised, introduction, local_address};
use crate::exit::Report;

/// Process 0 says at the deadline who is missing; it has this much longer to say so.
const MARGIN: Duration = Duration::from_secs(5);
/// Longest cause of a failure that is reported, in bytes.
const CAUSE_BYTES_MAX: usize = 4 << 10;

pub(super) fn follow(
    config: &RendezvousConfig,
    deadline: Instant,
    on_waiting: &mut dyn FnMut(&MissingRanks),
) -> Result<(Roster, Listener), RendezvousError> {
    // On TCP for other nodes, and on a Unix socket for this one.
    let address = local_address(&config.coordinator, config.interface, config.spans_nodes, deadline)?;
    let listen = [ListenAddress::Tcp(address), ListenAddress::PrivateUnix];
    let endpoint = Listener::listen(config.process, config.secret.clone(), &listen, config.endpoint)?;
    let own = introduction(config, advertised(config, endpoint.addresses().to_vec())?)?;
    loop {
        let link = find(config, deadline, on_waiting)?;
        match meet(config, &own, &endpoint, &link, deadline) {
            // Process 0 went away while all waited: it was restarted, or it has put a newer one in this one's place.
            Err(RendezvousError::Transport(error)) if is_hangup(&error) && Instant::now() < deadline => {
                tracing::warn!(%error, "lost rank 0 at rendezvous; looking for it again");
                std::thread::sleep(RETRY);
            }
            met => return met.map(|roster| (roster, endpoint)),
        }
    }
}

/// RV-4: reports to process 0, or to the process that answers for it, that `ranks` do not join.
///
/// # Errors
/// The report was not accepted in time, or the processes already run without these ranks.
pub(in crate::cluster) fn call(
    config: &RendezvousConfig,
    ranks: Range<u32>,
    report: &Report,
) -> Result<(), RendezvousError> {
    let (deadline, from) = (Instant::now() + config.report_within, ranks.start);
    let cause = report.cause[..report.cause.floor_char_boundary(CAUSE_BYTES_MAX)].to_string();
    let call = Call::Failed { ranks, report: Report { cause, ..report.clone() } };
    let hello =
        Hello { session: SessionId::default(), epoch: config.restart, from, to: 0, purpose: Purpose::Rendezvous };
    loop {
        let link = connect(&config.coordinator, &config.secret, &hello, deadline)?;
        let written = wire::write_message(&mut link.until(deadline), &call, INTRODUCTION_BYTES_MAX);
        let answer = written.and_then(|()| wire::read_message::<Answer>(&mut link.until(deadline), MESSAGE_BYTES_MAX));
        match answer {
            Ok(_) => return Ok(()),
            // It ended before it accepted the report: others may not have it.
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(cause) => {
                let peer = format!("rank 0 at {}", config.coordinator);
                return Err(TransportError::Wire { peer, cause }.into());
            }
        }
    }
}

/// An authenticated connection to process 0.
fn find(
    config: &RendezvousConfig,
    deadline: Instant,
    on_waiting: &mut dyn FnMut(&MissingRanks),
) -> Result<Connection, RendezvousError> {
    let (session, purpose) = (SessionId::default(), Purpose::Rendezvous);
    let hello = Hello { session, epoch: config.restart, from: config.process, to: 0, purpose };
    let late_until = deadline.min(Instant::now() + config.late_grace);
    let mut report_at = Instant::now() + config.report_every;
    loop {
        let error = match connect(&config.coordinator, &config.secret, &hello, deadline.min(report_at)) {
            Ok(link) => return Ok(link),
            Err(error) => error,
        };
        let now = Instant::now();
        match (&error, error.refusal()) {
            (_, Some(Refusal::Late { .. })) if now < late_until => std::thread::sleep(RETRY),
            (_, Some(Refusal::Late { epoch })) => {
                let (process, epoch, coordinator) = (config.process, *epoch, config.coordinator.clone());
                return Err(RendezvousError::Late { process, epoch, coordinator });
            }
            (TransportError::Unreachable { .. }, _) if now < deadline => {}
            _ => return Err(error.into()),
        }
        if now >= report_at {
            on_waiting(&MissingRanks::Coordinator { address: config.coordinator.clone() });
            report_at = now + config.report_every;
        }
    }
}

/// From the introduction to the start.
fn meet(
    config: &RendezvousConfig,
    own: &JoinInfo,
    endpoint: &Listener,
    link: &Connection,
    deadline: Instant,
) -> Result<Roster, RendezvousError> {
    let peer = || format!("rank 0 at {}", config.coordinator);
    let broken = |cause| RendezvousError::Transport(TransportError::Wire { peer: peer(), cause });
    let unexpected =
        |what: &str| RendezvousError::Unexpected { coordinator: config.coordinator.clone(), what: what.into() };
    let hear = |deadline| wire::read_message::<Answer>(&mut link.until(deadline), MESSAGE_BYTES_MAX).map_err(broken);

    let begin = Instant::now();
    let join = Call::Join(own.clone());
    wire::write_message(&mut link.until(deadline + MARGIN), &join, INTRODUCTION_BYTES_MAX).map_err(broken)?;
    let mut roster = match hear(deadline + MARGIN) {
        Ok(Answer::Roster(roster)) => roster,
        Ok(Answer::Refused(verdict)) => return Err(RendezvousError::Refused(verdict)),
        Ok(Answer::Start) => return Err(unexpected("sent a start before the roster")),
        Err(RendezvousError::Transport(TransportError::Wire { cause, .. })) if cause.is_timeout() => {
            let waited_ms = begin.elapsed().as_millis();
            return Err(unexpected(&format!(
                "neither started nor gave up in {waited_ms} ms: it is frozen, or waits for ranks that start much later"
            )));
        }
        Err(error) => return Err(error),
    };
    let in_order = (0u32..).zip(&roster.members).all(|(rank, member)| member.process == rank);
    let me = roster.members.get(config.process as usize);
    if !in_order || roster.members.len() != config.processes as usize || me != Some(&own.member) {
        return Err(unexpected("sent a roster of another world"));
    }
    // Rank 0 lists itself as "all addresses"; this process reached it by the coordinator's name.
    let is_unspecified = |text: &str| text.parse().is_ok_and(|address: SocketAddr| address.ip().is_unspecified());
    for address in &mut roster.members[0].addresses {
        if matches!(address, Address::Tcp(text) if is_unspecified(text)) {
            *address = config.coordinator.clone();
        }
    }
    endpoint.begin(roster.world());
    // From here on there is no way back to waiting: if process 0 goes, this start has failed. If it went already, it may have
    // said why; so a confirmation that cannot be sent is no reason not to listen.
    let ready = Ready { session: roster.session };
    let deadline = Instant::now() + config.timeout;
    let _ = wire::write_message(&mut link.until(deadline), &ready, INTRODUCTION_BYTES_MAX);
    match hear(deadline) {
        Ok(Answer::Start) => Ok(roster),
        Ok(Answer::Refused(verdict)) => Err(RendezvousError::Refused(verdict)),
        Ok(Answer::Roster(_)) => Err(unexpected("sent a second roster")),
        Err(_) => Err(RendezvousError::Refused(RendezvousRefusal::Lost(roster.members[0].who()))),
    }
}

fn is_hangup(error: &TransportError) -> bool {
    matches!(error, TransportError::Wire { cause: cause @ WireError::Io(_), .. } if !cause.is_timeout())
}
