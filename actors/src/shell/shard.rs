//! Runs one actor of the plan as a ractor actor: feeds events to its protocol, launches firings and sends messages.

use std::sync::Arc;

use crossbeam_channel::Sender;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::stream::{Notification, Notify, Submission};

use crate::bus::{Cast, Mail};
use crate::error::{Failure, PeerError};
use crate::loaded::{ActionProgram, BaseRef, FiringEnd, Memory};
use crate::protocol::{Effect, Protocol, ProtocolError, ProtocolEvent};
use crate::snapshot::{ActorSnapshot, NotFinite};
use crate::spec::{ActionRef, ActorId, RegisterId};
use crate::supervisor::Session;
use crate::trace::{Cause, FiringRecord, Idle};

/// Implements ractor's actor trait. All state is in [`Shard`].
pub(crate) struct ShardActor;

pub(crate) struct Shard {
    me: ActorId,
    session: Arc<Session>,
    protocol: Protocol,
    programs: Vec<ActionProgram>,
    memory: Memory,
    busy_ns: Vec<u64>,
    idle: Idle,
    /// End of the last firing, in nanoseconds since the session's start.
    idle_since_ns: u64,
    /// The firing in flight; its `ended_ns` is not known yet.
    in_flight: Option<FiringRecord>,
    /// A reused buffer. With it, processing an event does not allocate.
    effects: Vec<Effect>,
}

impl Shard {
    pub(crate) fn new(me: ActorId, session: Arc<Session>, programs: Vec<ActionProgram>, memory: Memory) -> Self {
        let protocol = Protocol::new(&session.spec, me);
        let busy_ns = vec![0; programs.len()];
        Self {
            me,
            session,
            protocol,
            programs,
            memory,
            busy_ns,
            idle: Idle::default(),
            idle_since_ns: 0,
            in_flight: None,
            effects: Vec::new(),
        }
    }

    fn process(&mut self, cast: Cast) -> Result<(), Failure> {
        let name = &self.session.spec.actor(self.me).name;
        self.session.bus.dequeued(self.me, name, &cast).map_err(|e| self.own_protocol_failure(e))?;
        match cast {
            Cast::Event(event) => self.apply(event),
            Cast::Failed(cause) => Err(self.kernel_failure(cause)),
            Cast::Snapshot(reply) => {
                // If the reply cannot be sent, the requester no longer waits for it.
                let _ = reply.try_send(Stamped::new(self.snapshot()));
                Ok(())
            }
            #[cfg(test)]
            Cast::Panic => panic!("panic requested by a test"),
        }
    }

    fn apply(&mut self, event: ProtocolEvent) -> Result<(), Failure> {
        let now_ns = self.session.activity.now_ns();
        self.session.activity.add(now_ns);
        let mut effects = std::mem::take(&mut self.effects);
        self.protocol.apply(event, &mut effects).map_err(|e| self.protocol_failure(event, e))?;
        if let (ProtocolEvent::Signal { .. } | ProtocolEvent::Done { .. }, Some(fired)) = (event, &mut self.in_flight)
            && fired.early_ns == 0
        {
            fired.early_ns = now_ns;
        }
        if let ProtocolEvent::Done { action } = event {
            if let Some(fired) = self.in_flight.take() {
                self.busy_ns[action as usize] += now_ns - fired.launched_ns;
                self.session.records.rings[&self.me].push(FiringRecord { ended_ns: now_ns, ..fired });
            }
            self.idle_since_ns = now_ns;
            if self.session.steps.complete(self.me, action) {
                self.session.failure.notify();
            }
        }
        self.protocol.fire(&mut effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Launch { action, firing } => {
                    let (idle_ns, cause) = (self.idle_since_ns, Cause::of(&event));
                    self.idle.add(cause, now_ns - idle_ns);
                    let record = FiringRecord { action, firing, idle_ns, cause, ..FiringRecord::default() };
                    self.in_flight = Some(FiringRecord { launched_ns: now_ns, ..record });
                    self.launch(action, firing)?;
                }
                Effect::Send { to, message } => {
                    // The send fails only if the actor has stopped, and actors stop only when the session ends.
                    self.session.bus.send(to, Cast::Event(ProtocolEvent::Message(message)));
                }
            }
        }
        self.effects = effects;
        Ok(())
    }

    fn launch(&mut self, action: u32, firing: u64) -> Result<(), Failure> {
        let spec = self.session.spec.action(self.me, action);
        let program = &self.programs[action as usize];
        let slot = |register: RegisterId, slot: u32| self.memory[&register].slot(slot);
        let base = |base: &BaseRef| match *base {
            BaseRef::Fixed(ref base) => base.clone(),
            BaseRef::Input(port) => slot(spec.inputs[port].register, self.protocol.input_slot(action, port, firing)),
            BaseRef::Output(port) => slot(spec.outputs[port].register, self.protocol.output_slot(action, port, firing)),
            BaseRef::Ring { ref memory, slots } => memory.slot((firing % u64::from(slots)) as u32),
        };
        let bases = program.bases.iter().map(base).collect();
        let repeat = (0..spec.outputs.len()).any(|port| self.protocol.repeats(action, port, firing));
        self.session.steps.launch(self.me, action);
        let end = FiringEnd { at: ActionRef { actor: self.me, action }, firing };
        let notify = notify(self.session.clone(), end, program.ends.clone());
        let submission = Submission { program: program.program.clone(), bases, repeat, notify };
        self.session.streams[&self.me].submit(submission).map_err(|cause| self.kernel_failure(cause))
    }

    fn snapshot(&self) -> ActorSnapshot {
        let idle_now_ns =
            if self.in_flight.is_some() { 0 } else { self.session.activity.now_ns() - self.idle_since_ns };
        let in_flight_since_ns = self.in_flight.map(|fired| fired.launched_ns);
        let collective_ns = self.session.streams[&self.me].collective_time().as_nanos() as u64;
        let (busy_ns, idle) = (self.busy_ns.clone(), self.idle.clone());
        let base = ActorSnapshot::of(&self.protocol);
        ActorSnapshot { busy_ns, collective_ns, idle, idle_now_ns, in_flight_since_ns, ..base }
    }

    fn own_protocol_failure(&self, cause: ProtocolError) -> Failure {
        let own = self.session.spec.actor(self.me);
        Failure::Protocol { actor: own.name.clone(), device: own.device, cause }
    }

    /// Attributes a protocol error to the process that sent the message, or to a bug in this process.
    fn protocol_failure(&self, event: ProtocolEvent, cause: ProtocolError) -> Failure {
        let sender = match event {
            ProtocolEvent::Message(message) => message.route(&self.session.spec),
            _ => None,
        };
        match sender.and_then(|(from, _)| self.session.bus.remote().process_of(from)) {
            Some(process) => Failure::Peer { process, cause: PeerError::Protocol(cause) },
            None => self.own_protocol_failure(cause),
        }
    }

    fn kernel_failure(&self, cause: KernelError) -> Failure {
        let own = self.session.spec.actor(self.me);
        let action = self.protocol.in_flight().map_or("none", |a| &own.actions[a as usize].name);
        Failure::Kernel { actor: own.name.clone(), device: own.device, action: action.into(), cause: Box::new(cause) }
    }
}

/// Returns a callback that turns stream notifications into casts, and reports the end of the firing to the host. The
/// callback runs on the stream's thread and does not block.
fn notify(session: Arc<Session>, end: FiringEnd, ends: Option<Sender<Stamped<FiringEnd>>>) -> Notify {
    let FiringEnd { at: ActionRef { actor: me, action }, firing } = end;
    Box::new(move |notification| {
        let report = ends.as_ref().filter(|_| notification == Notification::Done);
        let cast = match notification {
            Notification::Signal(output) => Cast::Event(ProtocolEvent::Signal { action, output }),
            Notification::NotFinite { launch, write, elements } => {
                let found = NotFinite { actor: me, action, firing, launch, write, elements };
                return session.records.not_finite.lock().push(found);
            }
            Notification::Done => Cast::Event(ProtocolEvent::Done { action }),
            Notification::Failed(cause) => Cast::Failed(cause),
        };
        session.bus.send(me, cast);
        if let Some(ends) = report {
            // A host that has ended needs no results.
            let _ = ends.send(Stamped::new(end));
        }
    })
}

impl Actor for ShardActor {
    type Msg = Mail;
    type State = Shard;
    type Arguments = Shard;

    async fn pre_start(&self, _: ActorRef<Mail>, shard: Shard) -> Result<Shard, ActorProcessingErr> {
        Ok(shard)
    }

    async fn handle(&self, _: ActorRef<Mail>, mail: Mail, shard: &mut Shard) -> Result<(), ActorProcessingErr> {
        if let Err(failure) = shard.process(mail.open()) {
            shard.session.fail(failure);
        }
        Ok(())
    }

    async fn post_stop(&self, _: ActorRef<Mail>, shard: &mut Shard) -> Result<(), ActorProcessingErr> {
        shard.session.records.finals.lock().push(shard.snapshot());
        Ok(())
    }
}
