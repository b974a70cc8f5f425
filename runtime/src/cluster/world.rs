//! A session's place among the processes that run its plan: joins them, hears of their failures, tells them of its own.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use shardflow_actors::error::{Failure, PeerError};
use shardflow_actors::membership::{self, FirstCause, Membership, MembershipError, MembershipEvent, PeerStatus};
use shardflow_actors::shell::{Control, RunningSession};
use shardflow_actors::transport::{Address, Listener, Purpose, SharedKey, TransportError, with_zone_of};
use shardflow_kernels::collective::{Collective, Group};
use shardflow_kernels::cpu::instruction_set;
use shardflow_kernels::cuda::cudnn::Attention;
use shardflow_kernels::cuda::nccl::UniqueId;
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::Arena;

use super::by_mpi::ByMpi;
use super::connector::{self, Connections, Connector};
use super::env::{self, LaunchContext};
use super::nccl_ids;
use super::rendezvous::{Fact, Identity, Member, RendezvousConfig, Roster, local_address, rendezvous};
use super::save_agreement::{self, ClusterAgreement, Received};
use super::{ClusterError, ClusterOptions, Transport};
use crate::checkpoint::{self, SaveAgreement};
use crate::declare::{COLLECTIVES, KERNELS, MESH, ON_NON_FINITE, PLAN, SEED, TRANSPORT};
use crate::exit;
use crate::machine::hidden_name;
use crate::plan::Plan;
use crate::plan::validate::{self, PlanError};
use crate::session::devices::Pipes;
use crate::session::error_exit::exit_of;
use crate::session::observer::PeerState;
use crate::session::process_map::ProcessMap;
use crate::session::{SessionError, SessionOptions};
use crate::text::counted;

/// How long a failed session waits to hear what the others say, beyond the membership's own grace.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);

/// What a running session has to do with the other processes.
pub(crate) struct World {
    process_map: ProcessMap,
    roster: Roster,
    endpoint: Arc<Listener>,
    secret: SharedKey,
    options: ClusterOptions,
    by_mpi: ByMpi,
    membership: Arc<Membership>,
    first: Arc<First>,
    together: Arc<ClusterAgreement>,
    /// What peers say that NCCL knows groups by.
    ids: Receiver<Received>,
}

/// Topic of the control plane on which processes report their activity.
const DOING: u16 = 3;
/// The activity of a process that waits for others.
pub(crate) const WAITING: &str = "";
/// Longest text of a peer's activity, in characters.
const DOING_CHARS_MAX: usize = 60;

/// Messages of one topic that may wait to be taken.
const HEARD_MAX: usize = 1 << 12;

/// The end of the session, once there is one, and what it ends here.
#[derive(Default)]
struct First {
    state: Mutex<State>,
    known: Condvar,
}

#[derive(Default)]
struct State {
    /// What the processes agreed on.
    cause: Option<FirstCause>,
    /// Peers that have ended in order.
    left: Vec<u32>,
    /// Of the running session, once it runs.
    control: Option<Control>,
    /// Each process's activity, and its start.
    doing: BTreeMap<u32, (String, Instant)>,
}

impl State {
    /// Which processes have been busy for `at_least` while `own` waits.
    fn slow(&self, own: u32, at_least: Duration) -> Option<String> {
        let waits = self.doing.get(&own).is_some_and(|(what, since)| what == WAITING && since.elapsed() >= at_least);
        let line = |(rank, (what, since)): (&u32, &(String, Instant))| {
            let is_busy = *rank != own && what != WAITING;
            is_busy.then(|| format!("rank {rank}, which has been {what} for {} s", since.elapsed().as_secs()))
        };
        let lines: Vec<String> = self.doing.iter().filter_map(line).take(SLOW_LISTED_MAX).collect();
        (waits && !lines.is_empty()).then(|| format!("waiting for {}", lines.join("; for ")))
    }
}

/// Slow ranks listed in one line, at most.
const SLOW_LISTED_MAX: usize = 8;

impl First {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears what happens to others. The thread ends with the membership, or with the session.
    fn listen(
        self: &Arc<Self>,
        notices: Receiver<MembershipEvent>,
        endpoint: Weak<Listener>,
        to_agree: Sender<Received>,
        to_ids: Sender<Received>,
        (own, options): (u32, ClusterOptions),
    ) -> io::Result<()> {
        let first = self.clone();
        let mut report_at = Instant::now() + options.report_every;
        let listen = move || {
            loop {
                if Instant::now() >= report_at {
                    report_at = Instant::now() + options.report_every;
                    let slow = first.lock().slow(own, options.report_every);
                    slow.iter().for_each(|slow| options.report_waiting(slow));
                }
                let notice = match notices.recv_deadline(report_at) {
                    Ok(notice) => notice,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                match notice {
                    // One that does not take what it is told runs into its deadline.
                    MembershipEvent::Message { topic: save_agreement::TOPIC, from, bytes } => {
                        drop(to_agree.try_send(Received { from, bytes }))
                    }
                    MembershipEvent::Message { topic: nccl_ids::TOPIC, from, bytes } => {
                        drop(to_ids.try_send(Received { from, bytes }))
                    }
                    MembershipEvent::Message { topic: DOING, from, bytes } => {
                        let printable = |c: &char| !c.is_control();
                        let what =
                            String::from_utf8_lossy(&bytes).chars().filter(printable).take(DOING_CHARS_MAX).collect();
                        first.lock().doing.insert(from, (what, Instant::now()));
                    }
                    MembershipEvent::Message { .. } => {}
                    MembershipEvent::Left { process } => first.left(process),
                    MembershipEvent::Ended(cause) => return first.ended(cause, &endpoint),
                }
            }
        };
        thread::Builder::new().name("membership".into()).spawn(listen).map(drop)
    }

    fn left(&self, process: u32) {
        let mut state = self.lock();
        state.left.push(process);
        let control = state.control.clone();
        drop(state);
        control.into_iter().for_each(|control| control.peer_left(process));
    }

    /// The processes agree on why the session ends. Where this process failed by itself, that is kept. Where others have
    /// lost it, it learns so here.
    fn ended(&self, cause: FirstCause, endpoint: &Weak<Listener>) {
        let mut state = self.lock();
        let control = state.control.clone();
        state.cause = Some(cause.clone());
        drop(state);
        self.known.notify_all();
        match control {
            Some(control) => control.fail(peer_failure(&cause)),
            // Nothing runs yet: nobody is to be waited for any more.
            None => endpoint.upgrade().into_iter().for_each(|endpoint| endpoint.close()),
        }
    }

    /// What happens from now on happens to a session that runs, and what has happened does.
    fn attach(&self, control: Control) {
        let mut state = self.lock();
        state.control = Some(control.clone());
        let (left, cause) = (state.left.clone(), state.cause.clone());
        drop(state);
        left.into_iter().for_each(|process| control.peer_left(process));
        cause.into_iter().for_each(|cause| control.fail(peer_failure(&cause)));
    }

    /// The cause, if it is known in time.
    fn wait(&self, within: Duration) -> Option<FirstCause> {
        let waited = self.known.wait_timeout_while(self.lock(), within, |state| state.cause.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.cause.clone()
    }
}

impl World {
    /// Meets the other processes; `None` where there are none. Later waits for live processes last as long as the session's
    /// watchdog allows.
    pub(crate) fn join(plan: &Plan, session: &SessionOptions) -> Result<Option<Self>, ClusterError> {
        let (cluster, wait_max) = (&session.cluster, session.watchdog.wait_max());
        let LaunchContext::World(world) = &cluster.launch else { return Ok(None) };
        let (devices, processes) = (plan.memory.len(), world.processes);
        if processes as usize > devices {
            let mesh = counted(devices, "device");
            let why = format!("a mesh of {mesh} cannot be spread over {processes} processes: start at most {devices}");
            return Err(ClusterError::Refused(why));
        }
        if processes == 1 {
            return Ok(None);
        }
        let (mut options, by_mpi) = (cluster.options.clone(), cluster.by_mpi.clone());
        let secret = SharedKey::from_text(world.secret.read()?.text())?;
        let coordinator = address(&world.endpoint);
        let system = |what| move |cause| ClusterError::System { what, cause };
        let spans_nodes = world.local_processes < processes;
        let say = |line: &str| options.report_waiting(line);
        hidden_name(&coordinator, spans_nodes).filter(|_| world.local_process == 0).iter().for_each(|line| say(line));
        let deadline = Instant::now() + options.meet_within;
        let local = |deadline| local_address(&coordinator, options.interface, spans_nodes, deadline);
        let wait_for_name = |error| {
            say(&format!("{error}; trying again for {:?}", options.meet_within));
            local(deadline)
        };
        let local = local(Instant::now()).or_else(wait_for_name)?;
        let heartbeat = membership::bind(local).map_err(system("listen for heartbeats"))?;
        let bound = heartbeat.local_addr().map_err(system("listen for heartbeats"))?;
        let outside = options.advertise.as_ref().map_or(Ok(bound), |advertise| advertise.heartbeats(bound));
        let config = RendezvousConfig {
            process: world.process,
            processes,
            restart: world.restart,
            facts: facts(plan, session)?,
            heartbeat: outside.map_err(system("listen for heartbeats"))?,
            spans_nodes,
            interface: options.interface,
            advertise: options.advertise.clone(),
            timeout: options.meet_within,
            report_every: options.report_every,
            report_within: options.report_within,
            ..RendezvousConfig::new(coordinator, secret.clone(), Identity::of_this_process()?)
        };
        let (roster, endpoint) = rendezvous(&config, |waiting| say(&waiting.to_string()))?;
        exit::joined();
        endpoint
            .private_error()
            .iter()
            .for_each(|cause| say(&format!("no Unix socket for processes of this node: {cause}")));
        connector::check_near(&roster, world.process, options.transport)?.iter().for_each(|line| say(line));
        let process_map = ProcessMap { process: world.process, processes, devices };
        let mut joining = membership::MembershipConfig::new(
            world.process,
            processes,
            roster.session.0,
            roster.epoch,
            *secret.mac("membership", &[]).as_bytes(),
            heartbeat,
        );
        (joining.interval, joining.deadline) = (options.heartbeat_every, options.heartbeat_deadline);
        joining.join_within = options.connect_within;
        let roads = roads(plan.device, &process_map, &roster, &endpoint, &secret, &options, &by_mpi);
        for process in process_map.peers() {
            joining.connections.insert(process, roads.link(process, Purpose::Control)?);
            joining.addresses.insert(process, with_zone_of(roster.members[process as usize].heartbeat, bound));
        }
        // From here on heartbeats show who is alive.
        options.connect_within = wait_max.max(options.connect_within);
        joining.join_at_most = options.connect_within;
        let membership = Arc::new(Membership::start(joining)?);
        let (to_agree, heard) = bounded(HEARD_MAX);
        let together = Arc::new(ClusterAgreement::new(world.process, processes, membership.clone(), heard, wait_max));
        let (first, endpoint): (Arc<First>, _) = (Arc::default(), Arc::new(endpoint));
        let (to_ids, ids) = bounded(HEARD_MAX);
        let (notices, own) = (membership.notices().clone(), (world.process, options.clone()));
        let listening = first.listen(notices, Arc::downgrade(&endpoint), to_agree, to_ids, own);
        listening.map_err(system("start a thread"))?;
        Ok(Some(Self { process_map, roster, endpoint, secret, options, by_mpi, membership, first, together, ids }))
    }

    /// Publishes this process's activity to those that wait for it. With [`WAITING`] it waits for others, and logs their
    /// activity at intervals.
    pub(crate) fn doing(&self, what: &str) {
        self.first.lock().doing.insert(self.process_map.process, (what.into(), Instant::now()));
        // A failure to send ends the session by other means.
        let _ = self.membership.send_to_all(DOING, what.as_bytes());
    }

    /// Which devices are whose.
    pub(crate) fn process_map(&self) -> ProcessMap {
        self.process_map
    }

    /// The processes of this node, in order.
    pub(crate) fn here(&self) -> Vec<u32> {
        let node = |process: u32| &self.roster.members[process as usize].node;
        (0..self.process_map.processes).filter(|process| node(*process) == node(self.process_map.process)).collect()
    }

    /// The cores that a process may run on.
    pub(crate) fn cores(&self, process: u32) -> &[u64] {
        &self.roster.members[process as usize].cores
    }

    fn roads(&self, device: DeviceKind) -> Connector<'_> {
        roads(device, &self.process_map, &self.roster, &self.endpoint, &self.secret, &self.options, &self.by_mpi)
    }

    /// True when the memory of such devices is to be shared with other processes.
    pub(crate) fn shares_memory(&self, device: DeviceKind) -> bool {
        let own = self.process_map.process;
        self.process_map.peers().any(|process| self.roads(device).shares_memory(own, process))
    }

    /// Counts the mirrors that the processes of this node will have in the memory of their devices.
    ///
    /// # Errors
    /// [`PlanError::Memory`] when they exceed the plan's budget.
    pub(crate) fn count_mirrors(&self, plan: &mut Plan) -> Result<(), PlanError> {
        let roads = self.roads(plan.device);
        for process_map in self.here().into_iter().map(|process| ProcessMap { process, ..self.process_map }) {
            let far = process_map.peers().filter(|peer| !roads.shares_memory(process_map.process, *peer));
            let mirrors: Vec<_> = far.flat_map(|peer| process_map.mirrors(plan, peer)).collect();
            for (_, device, bytes) in mirrors {
                plan.memory[device].mirror_bytes += bytes;
            }
        }
        validate::memory(plan)
    }

    /// Whether registers between GPUs take pipes of their own, and not the connections.
    pub(crate) fn takes_pipes(&self) -> bool {
        matches!(self.options.transport, Transport::Auto | Transport::SharedMemory)
    }

    /// What NCCL knows these groups by, which all processes ask for.
    pub(crate) fn nccl_ids(&self, groups: &[Arc<Group>]) -> Result<Vec<UniqueId>, KernelError> {
        let deadline = Instant::now() + self.options.connect_within;
        nccl_ids::exchange(groups, &self.process_map, &self.membership, &self.ids, deadline)
    }

    /// Makes all ways between the processes.
    pub(crate) fn connect(
        &self,
        plan: &Plan,
        devices: &[Device],
        arenas: &BTreeMap<usize, Arena>,
        in_process: Arc<dyn Collective>,
        pipes: Pipes,
    ) -> Result<Connections, ClusterError> {
        Connector { pipes, ..self.roads(plan.device) }.make(plan, devices, arenas, in_process)
    }

    /// From now on a failure here ends the session everywhere, and one elsewhere ends it here.
    pub(crate) fn watch(&self, running: &RunningSession) {
        let (membership, process_map) = (self.membership.clone(), self.process_map);
        let control = running.control();
        control.on_failure(move |failure| tell(&membership, &process_map, failure));
        self.first.attach(control);
    }

    /// What the session ended for, after a failure here: the first cause of all processes, as far as they say it in time.
    pub(crate) fn settle(&self, failure: Failure) -> Failure {
        match self.first.wait(SETTLE_TIMEOUT) {
            // Of its own failure this process knows most. That others have lost it explains what broke here.
            Some(cause) if cause.process != self.process_map.process || is_symptom(&failure) => peer_failure(&cause),
            // A symptom that nobody else explains stays what it is.
            _ => self.named(failure),
        }
    }

    /// A session that cannot start here for `error`: the others are told. Gives what this process ends for, which is what
    /// the others say where they failed first.
    pub(crate) fn cannot_start(&self, error: SessionError) -> SessionError {
        let fail = || self.membership.fail(format!("it cannot start: {error}"), error.exit().code());
        match &error {
            SessionError::Cluster(ClusterError::Transport(
                late @ (TransportError::Unreachable { to: process, .. }
                | TransportError::Missing { from: Some(process), .. }),
            )) => self.membership.suspect(*process, late.to_string()),
            // The session has reported its failure.
            SessionError::Failed(_) => {}
            error if breaks_off(error) => {}
            _ => fail(),
        }
        match self.first.wait(SETTLE_TIMEOUT) {
            Some(cause) if cause.process != self.process_map.process || breaks_off(&error) => {
                SessionError::Failed(peer_failure(&cause))
            }
            _ => {
                fail();
                error
            }
        }
    }

    /// A link to another process that broke, put down to that process.
    fn named(&self, failure: Failure) -> Failure {
        let Failure::Kernel { cause, .. } = &failure else { return failure };
        let KernelError::Link { peer, .. } = &**cause else { return failure };
        let (process, message) = (self.process_map.process_of(*peer), failure.to_string());
        if process == self.process_map.process {
            return failure;
        }
        Failure::Peer { process, cause: PeerError::Lost { message } }
    }

    /// The agreement on checkpoints, and who this process is in it.
    pub(crate) fn agree(&self) -> (Arc<dyn SaveAgreement>, checkpoint::ProcessRank) {
        let ProcessMap { process, processes, .. } = self.process_map;
        (self.together.clone(), checkpoint::ProcessRank { process, processes, epoch: self.roster.epoch })
    }

    /// What of others was refused since the start, by reason.
    pub(crate) fn refused(&self) -> [(&'static str, u64); 7] {
        let counters = self.membership.counters();
        [
            ("bad_format", counters.bad_format),
            ("bad_mac", counters.bad_mac),
            ("replay", counters.replays),
            ("other_session", counters.other_session),
            ("old_epoch", counters.old_epoch),
            ("newer_epoch", counters.newer_epoch),
            ("garbled", counters.garbled),
        ]
    }

    /// What is known of the other processes.
    pub(crate) fn peers(&self) -> Vec<PeerState> {
        let member = |process: u32| &self.roster.members[process as usize];
        let own = member(self.process_map.process);
        let peer = |status: PeerStatus| {
            let Member { process, node, host, pid, .. } = member(status.process);
            let (process, host, pid, is_on_this_node) = (*process, host.clone(), *pid, *node == own.node);
            PeerState { process, host, pid, is_on_this_node, silent: status.silent }
        };
        self.membership.peers().into_iter().map(peer).collect()
    }

    /// Tells the others that this process ends in order.
    pub(crate) fn leave(&self) {
        self.membership.leave();
    }
}

fn roads<'a>(
    device: DeviceKind,
    process_map: &ProcessMap,
    roster: &'a Roster,
    endpoint: &'a Listener,
    secret: &'a SharedKey,
    options: &'a ClusterOptions,
    by_mpi: &'a ByMpi,
) -> Connector<'a> {
    let deadline = Instant::now() + options.connect_within;
    let pipes = Pipes::new();
    Connector { device, process_map: *process_map, roster, endpoint, secret, options, by_mpi, deadline, pipes }
}

pub(super) fn address(endpoint: &env::Endpoint) -> Address {
    match endpoint {
        env::Endpoint::Tcp { host, port } if host.contains(':') => Address::Tcp(format!("[{host}]:{port}")),
        env::Endpoint::Tcp { host, port } => Address::Tcp(format!("{host}:{port}")),
        env::Endpoint::Unix(path) => Address::Unix(path.clone()),
    }
}

/// Facts that must be equal on all processes, besides the build. The plan is last: it depends on most of the others.
fn facts(plan: &Plan, session: &SessionOptions) -> Result<Vec<Fact>, ClusterError> {
    let options = &session.cluster.options;
    let kernels = match plan.device {
        DeviceKind::Cpu => instruction_set(),
        DeviceKind::Cuda => format!("CUDA, attention {:?}", Attention::from_env()?),
    };
    let mut facts = vec![
        Fact::new(MESH, plan.graph.mesh()),
        Fact::new(TRANSPORT, format_args!("{:?}", options.transport)),
        Fact::new(COLLECTIVES, format_args!("{:?}", options.collectives)),
        Fact::new(KERNELS, kernels),
        Fact::new(SEED, session.seed),
        Fact::new(ON_NON_FINITE, format_args!("{:?}", session.on_non_finite)),
    ];
    facts.extend(session.declared.iter().map(|(name, value)| Fact::new(name, value)));
    facts.push(Fact::new(PLAN, plan.hash()));
    Ok(facts)
}

fn peer_failure(cause: &FirstCause) -> Failure {
    Failure::Peer { process: cause.process, cause: PeerError::Failed { cause: cause.cause.clone(), exit: cause.exit } }
}

/// Why there is no world: what another process ended for while this one joined is told as it is later.
pub(crate) fn named(error: ClusterError) -> SessionError {
    match error {
        ClusterError::Membership(MembershipError::Ended(cause)) => SessionError::Failed(peer_failure(&cause)),
        error => error.into(),
    }
}

/// True for an error by which a start breaks off because somebody else ended what is shared with this process. Whoever did
/// says why, or is missed by all.
fn breaks_off(error: &SessionError) -> bool {
    match error {
        SessionError::Cluster(ClusterError::Transport(broken)) => {
            matches!(broken, TransportError::Io { .. } | TransportError::Closed)
        }
        SessionError::Cluster(ClusterError::Kernel(cause)) | SessionError::Kernel(cause) => is_of_others(cause),
        _ => false,
    }
}

/// True for a collective that somebody else ended: a peer, which has told all why, or will not live to. MPI does not say who is at
/// fault: whoever is gone is missed by its heartbeats.
fn is_of_others(cause: &KernelError) -> bool {
    matches!(cause, KernelError::Aborted { .. } | KernelError::Mpi { .. })
}

/// True for a failure that another process may be the cause of.
fn is_symptom(failure: &Failure) -> bool {
    match failure {
        Failure::Peer { .. } | Failure::Stalled { process: Some(_), .. } => true,
        Failure::Kernel { cause, .. } => is_of_others(cause) || matches!(&**cause, KernelError::Link { .. }),
        _ => false,
    }
}

/// Tells the others of a failure here: of a symptom that they may explain, or of a cause.
fn tell(membership: &Membership, process_map: &ProcessMap, failure: &Failure) {
    match failure {
        // The membership told us.
        Failure::Peer { cause: PeerError::Failed { .. }, .. } => {}
        Failure::Peer { process, cause } => membership.suspect(*process, cause.to_string()),
        // Its own report knows more.
        Failure::Stalled { process: Some(process), .. } => membership.suspect(*process, failure.to_string()),
        Failure::Kernel { cause, .. } => match &**cause {
            cause if is_of_others(cause) => {}
            KernelError::Link { peer, .. } => membership.suspect(process_map.process_of(*peer), failure.to_string()),
            _ => membership.fail(failure.to_string(), exit_of(failure).code()),
        },
        _ => membership.fail(failure.to_string(), exit_of(failure).code()),
    }
}
