//! A process other than 0 at the rendezvous: connects to process 0, sends its [`JoinInfo`], and waits for the roster.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::transport::wire::{self, MESSAGE_BYTES_MAX, WireError};
use crate::transport::{
    Address, Connection, ListenAddress, Listener, ListenerOptions, Refusal, TransportError, connect,
};

use super::config::{RETRY, RendezvousConfig, advertised, hello, join_info, local_address};
use super::messages::{
    Answer, JoinInfo, Outcome, REQUEST_BYTES_MAX, Ready, RendezvousError, RendezvousRefusal, Request,
};
use super::roster::Roster;
use crate::exit::Report;

/// Extra time after the deadline, so that process 0's report of the missing ranks can still arrive.
const MARGIN: Duration = Duration::from_secs(5);
const CAUSE_BYTES_MAX: usize = 4 << 10;

pub(super) fn join(config: &RendezvousConfig, deadline: Instant, on_waiting: &mut dyn FnMut(&str)) -> Outcome {
    // Listens on TCP for processes on other nodes, and on a Unix socket for those on this node.
    let address = local_address(&config.coordinator, config.interface, config.spans_nodes, deadline)?;
    let listen = [ListenAddress::Tcp(address), ListenAddress::PrivateUnix];
    let listener = Listener::listen(config.process, config.secret.clone(), &listen, ListenerOptions::default())?;
    let own = join_info(config, advertised(config, listener.addresses().to_vec())?)?;
    loop {
        let connection = connect_to_coordinator(config, deadline, on_waiting)?;
        match request_join(config, &own, &listener, &connection, deadline) {
            // Process 0 closed the waiting connection: process 0 was restarted, or a newer process has this rank.
            Err(RendezvousError::Transport(error)) if is_hangup(&error) && Instant::now() < deadline => {
                tracing::warn!(%error, "lost the connection to rank 0 at the rendezvous; connecting again");
                std::thread::sleep(RETRY);
            }
            result => return result.map(|roster| (roster, listener)),
        }
    }
}

/// RV-4: reports that `ranks` will not join. The receiver is process 0, or its launcher if process 0 has failed.
/// Returns true if the receiver waited for these ranks.
pub(crate) fn send_failure(
    config: &RendezvousConfig,
    ranks: Range<u32>,
    report: &Report,
) -> Result<bool, RendezvousError> {
    let (deadline, from) = (Instant::now() + config.report_within, ranks.start);
    let cause = report.cause[..report.cause.floor_char_boundary(CAUSE_BYTES_MAX)].to_string();
    let request = Request::Failed { ranks, report: Report { cause, ..report.clone() } };
    let hello = hello(config, from);
    loop {
        let connection = match connect(&config.coordinator, &config.secret, &hello, deadline) {
            // Process 0 of the previous attempt refused this report. Process 0 of the next attempt needs it, or would
            // wait for this node.
            Err(error) if report.departed && error.refusal().is_some() && Instant::now() < deadline => {
                std::thread::sleep(RETRY);
                continue;
            }
            connected => connected?,
        };
        let until = || connection.until(deadline);
        let written = wire::write_message(&mut until(), &request, REQUEST_BYTES_MAX);
        let answer = written.and_then(|()| wire::read_message::<Answer>(&mut until(), MESSAGE_BYTES_MAX));
        match answer {
            // If process 0 failed, its launcher sends this answer.
            Ok(Answer::Refused(RendezvousRefusal::Failed(first))) if first.rank == 0 => return Ok(false),
            Ok(_) => return Ok(true),
            // The receiver ended before it accepted the report, so others may not have received the report.
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(cause) => {
                let peer = format!("rank 0 at {}", config.coordinator);
                return Err(TransportError::Wire { peer, cause }.into());
            }
        }
    }
}

fn connect_to_coordinator(
    config: &RendezvousConfig,
    deadline: Instant,
    on_waiting: &mut dyn FnMut(&str),
) -> Result<Connection, RendezvousError> {
    let hello = hello(config, config.process);
    let late_until = deadline.min(Instant::now() + config.late_grace);
    let mut report_at = Instant::now() + config.report_every;
    loop {
        let error = match connect(&config.coordinator, &config.secret, &hello, deadline.min(report_at)) {
            Ok(connection) => return Ok(connection),
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
            (TransportError::Unreachable { .. }, _) => return Err(RendezvousError::NotReached(error)),
            _ => return Err(error.into()),
        }
        if now >= report_at {
            on_waiting(&format!("waiting for rank 0 at {}", config.coordinator));
            report_at = now + config.report_every;
        }
    }
}

/// Exchanges all messages with process 0, from the join request to the start.
fn request_join(
    config: &RendezvousConfig,
    own: &JoinInfo,
    listener: &Listener,
    connection: &Connection,
    deadline: Instant,
) -> Result<Roster, RendezvousError> {
    let peer = || format!("rank 0 at {}", config.coordinator);
    let broken = |cause| RendezvousError::Transport(TransportError::Wire { peer: peer(), cause });
    let unexpected =
        |action: &str| RendezvousError::Unexpected { coordinator: config.coordinator.clone(), action: action.into() };
    let receive =
        |deadline| wire::read_message::<Answer>(&mut connection.until(deadline), MESSAGE_BYTES_MAX).map_err(broken);

    let begin = Instant::now();
    let join = Request::Join(own.clone());
    wire::write_message(&mut connection.until(deadline + MARGIN), &join, REQUEST_BYTES_MAX).map_err(broken)?;
    let mut roster = match receive(deadline + MARGIN) {
        Ok(Answer::Roster(roster)) => roster,
        Ok(Answer::Refused(refusal)) => return Err(RendezvousError::Refused(refusal)),
        Ok(Answer::Start) => return Err(unexpected("sent the start before the roster")),
        Err(RendezvousError::Transport(TransportError::Wire { cause, .. })) if cause.is_timeout() => {
            let waited_ms = begin.elapsed().as_millis();
            return Err(unexpected(&format!(
                "neither started nor refused the job in {waited_ms} ms: rank 0 is frozen, was started later, or has a \
                 larger SHARDFLOW_MEET_MS or --meet-wait"
            )));
        }
        Err(error) => return Err(error),
    };
    if !roster.is_for(&own.member, config.processes, &own.wanted) {
        return Err(unexpected("sent a roster of another world"));
    }
    // RO-1: the first member is rank 0. It may publish an unspecified address (`0.0.0.0`). The name at which rank 0 was
    // reached replaces such an address.
    let is_unspecified = |text: &str| text.parse().is_ok_and(|address: SocketAddr| address.ip().is_unspecified());
    for address in &mut roster.members[0].addresses {
        if matches!(address, Address::Tcp(text) if is_unspecified(text)) {
            *address = config.coordinator.clone();
        }
    }
    listener.begin(roster.world());
    // If process 0 is lost from here on, the start fails. After a write error, a refusal may still be readable.
    let ready = Ready { session: roster.session };
    let deadline = Instant::now() + config.timeout;
    let _ = wire::write_message(&mut connection.until(deadline), &ready, REQUEST_BYTES_MAX);
    match receive(deadline) {
        Ok(Answer::Start) => Ok(roster),
        Ok(Answer::Refused(refusal)) => Err(RendezvousError::Refused(refusal)),
        Ok(Answer::Roster(_)) => Err(unexpected("sent a second roster")),
        Err(_) => Err(RendezvousError::Refused(RendezvousRefusal::Lost(roster.members[0].label()))),
    }
}

fn is_hangup(error: &TransportError) -> bool {
    matches!(error, TransportError::Wire { cause: cause @ WireError::Io(_), .. } if !cause.is_timeout())
}
