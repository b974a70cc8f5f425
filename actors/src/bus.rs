//! Who is where: from an actor's id to its mailbox, or to the peer that hosts it.
//!
//! Mailboxes of ractor have no bound, so the bus counts what lies in each and compares it with what credits allow: one
//! entry for each slot of each input (CR-3), one for each slot and reader of each output, and those of one firing.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use ractor::ActorRef;
use shardflow_kernels::clock::RaceClock;

use crate::error::ProtocolError;
use crate::message::{Cast, Mail};
use crate::protocol::ProtocolEvent;
use crate::remote::Remote;
use crate::spec::{ActorId, Spec};

/// The mailboxes of a session.
#[derive(Debug)]
pub(crate) struct Bus {
    /// By actor; none for those of other processes.
    refs: OnceLock<Vec<Option<ActorRef<Mail>>>>,
    remote: Remote,
    /// By actor.
    boxes: Vec<Depth>,
    /// What a test does to messages.
    #[cfg(test)]
    fault: OnceLock<crate::simulate::tests::Fault>,
}

#[derive(Debug)]
struct Depth {
    entries: crossbeam_utils::CachePadded<AtomicU32>,
    bound: u32,
}

impl Bus {
    /// Before the actors are known.
    pub(crate) fn new(spec: &Spec, remote: Remote) -> Self {
        let boxes = (0..spec.actors.len() as u32)
            .map(|a| Depth { entries: Default::default(), bound: mailbox_bound(spec, ActorId(a)) });
        Self {
            refs: OnceLock::new(),
            remote,
            boxes: boxes.collect(),
            #[cfg(test)]
            fault: OnceLock::new(),
        }
    }

    /// Fills in the actors of this process; once.
    pub(crate) fn connect(&self, actors: Vec<(ActorId, ActorRef<Mail>)>) {
        let mut refs = vec![None; self.boxes.len()];
        actors.into_iter().for_each(|(id, actor)| refs[id.0 as usize] = Some(actor));
        // A second call would be a bug of `start`; the first one's actors stay.
        let _ = self.refs.set(refs);
    }

    /// What goes to peers.
    pub(crate) fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Queues an entry; a message for a peer's actor goes on its way. False when the actor has stopped, or is not there yet.
    pub(crate) fn send(&self, to: ActorId, cast: Cast) -> bool {
        #[cfg(test)]
        if self.is_lost(&cast) {
            return true;
        }
        let Some(actor) = self.refs.get().and_then(|r| r.get(to.0 as usize)?.as_ref()) else {
            return match cast {
                Cast::Event(ProtocolEvent::Message(message)) => self.remote.send(to, message),
                _ => false,
            };
        };
        if counted(&cast) {
            self.boxes[to.0 as usize].entries.fetch_add(1, Ordering::Relaxed);
        }
        actor.cast(Mail { cast, clock: RaceClock::capture() }).is_ok()
    }

    /// From now on messages suffer this; once.
    #[cfg(test)]
    pub(crate) fn break_with(&self, fault: crate::simulate::tests::Fault) {
        self.fault.set(fault).expect("once");
    }

    #[cfg(test)]
    fn is_lost(&self, cast: &Cast) -> bool {
        let Cast::Event(ProtocolEvent::Message(message)) = cast else { return false };
        self.fault.get().is_some_and(|fault| fault.apply(0, *message).is_empty())
    }

    /// True when a mailbox holds more than credits allow. What a peer tells is let in only below that.
    pub(crate) fn overfull(&self, actor: ActorId) -> bool {
        let Depth { entries, bound } = &self.boxes[actor.0 as usize];
        entries.load(Ordering::Relaxed) > *bound
    }

    /// An entry was taken out of an actor's mailbox.
    ///
    /// # Errors
    /// CR-3, when more lay there than credits allow.
    pub(crate) fn taken(&self, actor: ActorId, name: &str, cast: &Cast) -> Result<(), ProtocolError> {
        if !counted(cast) {
            return Ok(());
        }
        let Depth { entries, bound } = &self.boxes[actor.0 as usize];
        let entries = entries.fetch_sub(1, Ordering::Relaxed);
        if entries <= *bound {
            return Ok(());
        }
        let numbers = format!("{entries} entries in the mailbox, credits allow {bound}");
        Err(ProtocolError::Invariant { label: "CR-3", at: format!("actor {name}"), numbers })
    }

    /// Ends all actors; what lies in their mailboxes is dropped.
    pub(crate) fn stop(&self) {
        for actor in self.refs.get().into_iter().flatten().flatten() {
            actor.stop(None);
        }
    }
}

/// What the host sends comes at the host's own pace and is not bounded by credits.
fn counted(cast: &Cast) -> bool {
    match cast {
        Cast::Event(ProtocolEvent::Token { .. } | ProtocolEvent::Start) | Cast::Snapshot(_) => false,
        Cast::Event(_) | Cast::Failed(_) => true,
        #[cfg(test)]
        Cast::Panic => false,
    }
}

/// Most entries that credits let lie in an actor's mailbox.
pub(crate) fn mailbox_bound(spec: &Spec, actor: ActorId) -> u32 {
    let own = &spec.actors[actor.0 as usize];
    let register = |id: crate::spec::RegisterId| &spec.registers[id.0 as usize];
    let slots = own.actions.iter().flat_map(|a| &a.inputs).map(|i| register(i.register).slots);
    let releases = own.actions.iter().flat_map(|a| &a.outputs).map(|o| register(o.register));
    let releases = releases.map(|r| r.slots * r.readers.len() as u32);
    // Of the firing in flight: a signal for each early output, and its end.
    let notices = own.actions.iter().map(|a| 1 + a.outputs.iter().filter(|o| o.early).count() as u32);
    slots.sum::<u32>() + releases.sum::<u32>() + notices.max().unwrap_or(0)
}
