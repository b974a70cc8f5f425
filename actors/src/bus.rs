//! Delivers messages: maps an actor's id to the actor's mailbox, or to the peer that hosts the actor.
//!
//! ractor's mailboxes are unbounded, so the bus counts each mailbox's entries and checks the count. The maximum is the
//! sum of three numbers: one message per slot of each input (CR-3), one release per slot and reader of each output, and
//! the notifications of one firing.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crossbeam_channel::Sender;
use ractor::ActorRef;
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::error::KernelError;

use crate::protocol::{ProtocolError, ProtocolEvent};
use crate::remote::Remote;
use crate::snapshot::ActorSnapshot;
use crate::spec::{ActorId, RegisterId, Spec};
use crate::table::Table;

/// One mailbox entry. Entries stay within the process. Processes exchange only [`crate::protocol::Message`]s.
#[derive(Debug)]
pub(crate) enum Cast {
    Event(ProtocolEvent),
    Failed(KernelError),
    Snapshot(Sender<Stamped<ActorSnapshot>>),
    #[cfg(test)]
    Panic,
}

pub(crate) type Mail = Stamped<Cast>;

#[derive(Debug)]
pub(crate) struct Bus {
    /// Mailboxes by actor; `None` for actors of other processes.
    actors: OnceLock<Table<ActorId, Option<ActorRef<Mail>>>>,
    remote: Remote,
    mailboxes: Table<ActorId, Mailbox>,
    #[cfg(test)]
    fault: OnceLock<(crate::simulate::tests::Fault, std::sync::Arc<Spec>)>,
}

#[derive(Debug)]
struct Mailbox {
    entries: crossbeam_utils::CachePadded<AtomicU32>,
    bound: u32,
}

impl Bus {
    pub(crate) fn new(spec: &Spec, remote: Remote) -> Self {
        let mailboxes =
            spec.actors.map(|(id, _)| Mailbox { entries: Default::default(), bound: mailbox_bound(spec, id) });
        Self {
            actors: OnceLock::new(),
            remote,
            mailboxes,
            #[cfg(test)]
            fault: OnceLock::new(),
        }
    }

    pub(crate) fn connect(&self, actors: Vec<(ActorId, ActorRef<Mail>)>) {
        let mut by_id = self.mailboxes.map(|_| None);
        actors.into_iter().for_each(|(id, actor)| by_id[id] = Some(actor));
        // Only a bug in `prepare` can cause a second call, which has no effect.
        let _ = self.actors.set(by_id);
    }

    pub(crate) fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Queues an entry for a local actor, or a message for an actor's peer. Returns false if the actor is unreachable.
    pub(crate) fn send(&self, to: ActorId, cast: Cast) -> bool {
        #[cfg(test)]
        if self.is_lost(&cast) {
            return true;
        }
        let Some(actor) = self.actors.get().and_then(|all| all.get(to)?.as_ref()) else {
            return match cast {
                Cast::Event(ProtocolEvent::Message(message)) => self.remote.send(to, message),
                _ => false,
            };
        };
        if is_bounded(&cast) {
            self.mailboxes[to].entries.fetch_add(1, Ordering::Relaxed);
        }
        actor.cast(Mail::new(cast)).is_ok()
    }

    #[cfg(test)]
    pub(crate) fn inject(&self, fault: crate::simulate::tests::Fault, spec: std::sync::Arc<Spec>) {
        self.fault.set((fault, spec)).expect("`inject` is called only once");
    }

    #[cfg(test)]
    fn is_lost(&self, cast: &Cast) -> bool {
        let Cast::Event(ProtocolEvent::Message(message)) = cast else { return false };
        self.fault.get().is_some_and(|(fault, spec)| fault.apply(spec, 0, *message).is_empty())
    }

    /// True if a mailbox holds more entries than credits allow. Connections then reject messages from peers.
    pub(crate) fn is_overfull(&self, actor: ActorId) -> bool {
        let Mailbox { entries, bound } = &self.mailboxes[actor];
        entries.load(Ordering::Relaxed) > *bound
    }

    /// Records that an entry left the mailbox. Returns a CR-3 error if the mailbox held more than credits allow.
    pub(crate) fn dequeued(&self, actor: ActorId, name: &str, cast: &Cast) -> Result<(), ProtocolError> {
        if !is_bounded(cast) {
            return Ok(());
        }
        let Mailbox { entries, bound } = &self.mailboxes[actor];
        let entries = entries.fetch_sub(1, Ordering::Relaxed);
        if entries <= *bound {
            return Ok(());
        }
        let numbers = format!("the mailbox has {entries} entries, but credits allow only {bound}");
        Err(ProtocolError::Invariant { label: "CR-3", at: format!("actor {name}"), numbers })
    }

    /// Stops all actors and drops the entries in their mailboxes.
    pub(crate) fn stop(&self) {
        for actor in self.actors.get().into_iter().flat_map(Table::values).flatten() {
            actor.stop(None);
        }
    }
}

/// True for a kind of entry whose count is bounded by credits. The count of the host's entries is not bounded.
fn is_bounded(cast: &Cast) -> bool {
    match cast {
        Cast::Event(ProtocolEvent::Token { .. } | ProtocolEvent::Start) | Cast::Snapshot(_) => false,
        Cast::Event(_) | Cast::Failed(_) => true,
        #[cfg(test)]
        Cast::Panic => false,
    }
}

pub(crate) fn mailbox_bound(spec: &Spec, actor: ActorId) -> u32 {
    let own = spec.actor(actor);
    let register = |id: RegisterId| spec.register(id);
    let slots = own.actions.iter().flat_map(|a| &a.inputs).map(|i| register(i.register).slots);
    let releases = own.actions.iter().flat_map(|a| &a.outputs).map(|o| register(o.register));
    let releases = releases.map(|r| r.slots * r.readers.len() as u32);
    // The firing in flight sends one signal per early output, and one notification of its end.
    let notifications = own.actions.iter().map(|a| 1 + a.outputs.iter().filter(|o| o.early).count() as u32);
    slots.sum::<u32>() + releases.sum::<u32>() + notifications.max().unwrap_or(0)
}
