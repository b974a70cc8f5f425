//! A session's membership in its world: joins the other processes, receives their failures, and reports its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::UdpSocket;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::{Condvar, Mutex};
use shardflow_actors::error::Failure;
use shardflow_actors::shell::{Control, RunningSession};
use shardflow_job::env::{INTERFACE, LaunchContext, Launched};
use shardflow_job::exit;
use shardflow_job::machine::{MemoryClaim, hidden_name};
use shardflow_job::membership::{self, ControlTree, FirstCause, Membership, MembershipConfig, MembershipEvent};
use shardflow_job::options::{ClusterOptions, Transport};
use shardflow_job::rendezvous::{Fact, Identity, Member, RendezvousConfig, Roster, local_address, rendezvous};
use shardflow_job::secret::Secret;
use shardflow_job::transport::{Listener, Purpose, with_zone_of};
use shardflow_kernels::collective::Group;
use shardflow_kernels::cuda::nccl::UniqueId;
use shardflow_kernels::error::KernelError;

use super::Cluster;
use super::connector::{self, Connector};
use super::error::ClusterError;
use super::failure::{attribute_to_peer, is_symptom, peer_failure, report_failure};
use super::nccl_ids;
use super::save_agreement::{self, ClusterAgreement, Received};
use crate::checkpoint::agreement::{ProcessRank, SaveAgreement};
use crate::devices::Pipes;
use crate::plan::error::PlanError;
use crate::plan::instance::Instance;
use crate::process_map::ProcessMap;

/// How long a failed session waits for the first cause, beyond the membership's own grace period.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);

/// A running session's connection to the other processes.
pub(crate) struct World {
    pub(crate) process_map: ProcessMap,
    /// The connector of the join, with the join's deadline; [`World::connector`] returns a copy with a new deadline.
    connector: Connector,
    pub(crate) membership: Arc<Membership>,
    monitor: Arc<Monitor>,
    agreement: Arc<ClusterAgreement>,
    /// Peers' messages with NCCL ids.
    ids: Receiver<Received>,
}

/// Another process of the session. Its host and pid are known if it runs on this machine, or if this process connects
/// to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    pub process: u32,
    pub host: Option<String>,
    pub pid: Option<u32>,
    /// True if it runs on the same machine as this process.
    pub is_on_this_node: bool,
    /// Time since the last heartbeat of the process; `None` if the process has ended normally.
    pub silent: Option<Duration>,
}

/// Control-plane topic on which each process reports busy processes to its neighbours in the control tree.
const ACTIVITY_TOPIC: u16 = 3;
/// Longest interval between two activity reports while activities change.
const ACTIVITY_EVERY: Duration = Duration::from_millis(250);
/// The activity of a process that waits for others.
pub(crate) const WAITING: &str = "";
/// Longest text of a peer's activity, in characters.
const ACTIVITY_CHARS_MAX: usize = 60;

/// Capacity of each topic's queue of received messages.
const QUEUE_MAX: usize = 1 << 12;

/// Receives the membership's events and applies them to the session.
#[derive(Default)]
struct Monitor {
    state: Mutex<State>,
    cause_known: Condvar,
}

#[derive(Default)]
struct State {
    /// The first cause that the processes agreed on, once the session has ended.
    cause: Option<FirstCause>,
    /// Peers that have left normally.
    left: Vec<u32>,
    control: Option<Control>,
    /// By rank: the activities, with start times, of this process and of busy processes that neighbours have reported.
    activities: BTreeMap<u32, (String, Instant)>,
    /// By neighbour: the ranks in its last report (`heard`), and the last report sent to it (`reported`).
    heard: BTreeMap<u32, Vec<u32>>,
    reported: BTreeMap<u32, Vec<(u32, String, Instant)>>,
}

impl State {
    /// Returns a log line with the busy processes, if process `own` has waited for at least `wait_min`.
    fn slow_peers(&self, own: u32, wait_min: Duration, now: Instant) -> Option<String> {
        let is_long = |since: &Instant| now.saturating_duration_since(*since) >= wait_min;
        let waits = self.activities.get(&own).is_some_and(|(activity, since)| activity == WAITING && is_long(since));
        let entry = |(rank, (activity, since)): (&u32, &(String, Instant))| {
            let is_busy = *rank != own && activity != WAITING;
            let seconds = now.saturating_duration_since(*since).as_secs();
            is_busy.then(|| format!("rank {rank}, which has been {activity} for {seconds} s"))
        };
        let entries: Vec<String> = self.activities.iter().filter_map(entry).take(SLOW_LISTED_MAX).collect();
        (waits && !entries.is_empty()).then(|| format!("waiting for {}", entries.join("; for ")))
    }

    /// Returns each report that has changed since the last call, with the neighbour that gets it. A report lists the
    /// processes that have been busy for longest, except those in the neighbour's direction. Each process thus knows
    /// some of the slowest processes, and the size of reports is bounded.
    fn activity_reports(&mut self, own: u32, tree: &ControlTree, now: Instant) -> Vec<(u32, Vec<u8>)> {
        let mut reports = Vec::new();
        for neighbour in tree.neighbours(own) {
            let is_busy = |(rank, (activity, _)): &(&u32, &(String, Instant))| {
                activity != WAITING && tree.next_hop(own, **rank) != Some(neighbour)
            };
            let busy = self.activities.iter().filter(is_busy);
            let mut busy: Vec<_> = busy.map(|(rank, (activity, since))| (*rank, activity.clone(), *since)).collect();
            busy.sort_by_key(|(rank, _, since)| (*since, *rank));
            busy.truncate(SLOW_LISTED_MAX);
            if *self.reported.entry(neighbour).or_default() != busy {
                let line = |(rank, activity, since): &(u32, String, Instant)| {
                    format!("{rank} {} {activity}\n", now.saturating_duration_since(*since).as_millis())
                };
                reports.push((neighbour, busy.iter().map(line).collect::<String>().into_bytes()));
                self.reported.insert(neighbour, busy);
            }
        }
        reports
    }

    /// Replaces a neighbour's earlier report by a new one.
    fn record_activities(&mut self, from: u32, bytes: &[u8], now: Instant) {
        let text = String::from_utf8_lossy(bytes);
        let entry = |line: &str| {
            let mut parts = line.splitn(3, ' ');
            let (rank, age_ms) = (parts.next()?.parse::<u32>().ok()?, parts.next()?.parse::<u32>().ok()?);
            let activity = parts.next()?.chars().filter(|c| !c.is_control()).take(ACTIVITY_CHARS_MAX).collect();
            let since = now.checked_sub(Duration::from_millis(age_ms.into())).unwrap_or(now);
            Some((rank, (activity, since)))
        };
        let entries: Vec<(u32, (String, Instant))> = text.lines().take(SLOW_LISTED_MAX).filter_map(entry).collect();
        let ranks = entries.iter().map(|(rank, _)| *rank).collect();
        let before = self.heard.insert(from, ranks).unwrap_or_default();
        before.iter().for_each(|rank| drop(self.activities.remove(rank)));
        self.activities.extend(entries);
    }
}

const SLOW_LISTED_MAX: usize = 8;

impl Monitor {
    /// Starts the thread that receives events. The thread ends with the membership or with the session.
    fn spawn(
        self: &Arc<Self>,
        membership: &Arc<Membership>,
        listener: Weak<Listener>,
        queues: [(u16, Sender<Received>); 2],
        (own, options): (u32, ClusterOptions),
    ) -> io::Result<()> {
        let (monitor, events, membership) = (self.clone(), membership.notices().clone(), Arc::downgrade(membership));
        let every = ACTIVITY_EVERY.min(options.report_every / 4);
        let (mut report_at, mut activity_at) = (Instant::now() + options.report_every, Instant::now() + every);
        let run = move || {
            loop {
                let now = Instant::now();
                if now >= report_at {
                    report_at = now + options.report_every;
                    let slow = monitor.state.lock().slow_peers(own, options.report_every, now);
                    slow.iter().for_each(|line| options.report_waiting(line));
                }
                if now >= activity_at {
                    activity_at = now + every;
                    membership.upgrade().iter().for_each(|membership| monitor.report_activities(own, membership, now));
                }
                let event = match events.recv_deadline(report_at.min(activity_at)) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                match event {
                    MembershipEvent::Message { topic: ACTIVITY_TOPIC, from, bytes } => {
                        monitor.state.lock().record_activities(from, &bytes, Instant::now());
                    }
                    MembershipEvent::Message { topic, from, bytes } => {
                        if let Some((_, queue)) = queues.iter().find(|(of, _)| *of == topic) {
                            // If the queue is full, the message is dropped, and the wait for it ends at its deadline.
                            drop(queue.try_send(Received { from, bytes }));
                        }
                    }
                    MembershipEvent::Left { process } => monitor.record_left(process),
                    MembershipEvent::Ended(cause) => return monitor.record_end(cause, &listener),
                }
            }
        };
        thread::Builder::new().name("membership".into()).spawn(run).map(drop)
    }

    fn report_activities(&self, own: u32, membership: &Membership, now: Instant) {
        let reports = self.state.lock().activity_reports(own, membership.tree(), now);
        // A lost connection also fails the membership, so the error needs no handling here.
        reports.into_iter().for_each(|(to, bytes)| drop(membership.send(to, ACTIVITY_TOPIC, bytes)));
    }

    fn record_left(&self, process: u32) {
        let mut state = self.state.lock();
        state.left.push(process);
        let control = state.control.clone();
        drop(state);
        control.into_iter().for_each(|control| control.peer_left(process));
    }

    /// Records the first cause and ends this process's session. A session that has failed before keeps its failure.
    fn record_end(&self, cause: FirstCause, listener: &Weak<Listener>) {
        let mut state = self.state.lock();
        let control = state.control.clone();
        state.cause = Some(cause.clone());
        drop(state);
        self.cause_known.notify_all();
        match control {
            Some(control) => control.fail(peer_failure(&cause)),
            // No session runs yet. Closing the listener ends this process's waits for connections.
            None => listener.upgrade().into_iter().for_each(|listener| listener.close()),
        }
    }

    /// Sets the running session's control, and applies earlier events: departures of peers, or the session's end.
    fn attach(&self, control: Control) {
        let mut state = self.state.lock();
        state.control = Some(control.clone());
        let (left, cause) = (state.left.clone(), state.cause.clone());
        drop(state);
        left.into_iter().for_each(|process| control.peer_left(process));
        cause.into_iter().for_each(|cause| control.fail(peer_failure(&cause)));
    }
}

impl World {
    /// Joins the other processes; `None` for a single process. `facts` are the values besides the build that must be
    /// equal on all processes. `memory` may differ. Later waits for live processes last up to `wait_max`.
    pub(crate) fn join(
        plan: &Instance,
        cluster: &Cluster,
        process_map: ProcessMap,
        (memory, facts): (&MemoryClaim, impl FnOnce() -> Result<Vec<Fact>, ClusterError>),
        wait_max: Duration,
    ) -> Result<Option<Self>, ClusterError> {
        let LaunchContext::World(world) = &cluster.launch else { return Ok(None) };
        if process_map.processes == 1 {
            return Ok(None);
        }
        exit::mark_joining();
        let (options, secret) = (cluster.options.clone().with_finite_times(), world.secret.read()?);
        let wanted = connector::partners(plan, &process_map, options.collectives);
        let (roster, listener, heartbeat) = meet(world, &options, &secret, wanted, (memory, facts))?;
        let tree = Arc::new(ControlTree::new(&roster.nodes()));
        let mut connector = Connector {
            device: plan.device,
            process_map,
            tree,
            roster: roster.into(),
            listener: listener.into(),
            secret,
            by_mpi: cluster.by_mpi.clone(),
            deadline: Instant::now() + options.connect_within,
            options,
            pipes: Pipes::new(),
        };
        let membership = Arc::new(start_membership(&connector, heartbeat, wait_max)?);
        // From here on, heartbeats detect lost processes, so waits may be longer.
        connector.options.connect_within = wait_max.max(connector.options.connect_within);
        let (to_agreement, messages) = bounded(QUEUE_MAX);
        let agreement = ClusterAgreement::new(process_map, membership.clone(), messages, wait_max).into();
        let (monitor, listener): (Arc<Monitor>, _) = (Arc::default(), Arc::downgrade(&connector.listener));
        let (to_nccl, ids) = bounded(QUEUE_MAX);
        let own = (world.process, connector.options.clone());
        let queues = [(save_agreement::TOPIC, to_agreement), (nccl_ids::TOPIC, to_nccl)];
        let spawned = monitor.spawn(&membership, listener, queues, own);
        spawned.map_err(system("start a thread"))?;
        Ok(Some(Self { process_map, connector, membership, monitor, agreement, ids }))
    }

    /// Publishes this process's activity. While it is [`WAITING`], the monitor logs the other processes' activities.
    pub(crate) fn doing(&self, activity: &str) {
        self.monitor.state.lock().activities.insert(self.process_map.process, (activity.into(), Instant::now()));
    }

    /// The neighbour in the control tree on the way to a process. For this process, its own rank.
    pub(crate) fn hop(&self, process: u32) -> u32 {
        self.connector.tree.next_hop(self.process_map.process, process).unwrap_or(process)
    }

    pub(crate) fn has_left(&self, process: u32) -> bool {
        self.membership.has_left(process)
    }

    fn members_here(&self) -> impl Iterator<Item = &Member> {
        self.connector.roster.on_node_of(self.process_map.process)
    }

    /// The processes of this node, in order.
    pub(crate) fn here(&self) -> Vec<u32> {
        self.members_here().map(|member| member.process).collect()
    }

    /// The cores of a process of this node.
    pub(crate) fn cores(&self, process: u32) -> &[u64] {
        self.connector.roster.member(process).map_or(&[], |member| &member.cores)
    }

    /// The memory claim of each process of this node, by rank.
    pub(crate) fn memory_claims(&self) -> BTreeMap<u32, MemoryClaim> {
        self.members_here().map(|member| (member.process, member.memory.clone())).collect()
    }

    pub(crate) fn connector(&self) -> Connector {
        let deadline = Instant::now() + self.connector.options.connect_within;
        Connector { deadline, ..self.connector.clone() }
    }

    /// True if the devices' memory is shared with other processes.
    pub(crate) fn shares_memory(&self) -> bool {
        let own = self.process_map.process;
        self.here().into_iter().any(|process| process != own && self.connector.shares_memory(own, process))
    }

    /// Adds the mirrors of this node's processes ([`Instance::mirrors`]) to the plan's memory, and checks that it fits.
    pub(crate) fn count_mirrors(&self, plan: &mut Instance) -> Result<(), PlanError> {
        let here: BTreeSet<u32> = self.here().into_iter().collect();
        for process in here {
            let devices = self.process_map.devices_of(process);
            plan.mirrors.extend(devices.clone().map(|device| (device, 0)));
            let other = (process != self.process_map.process).then(|| plan.plan.clone().instance_of(devices));
            let part = other.as_ref().unwrap_or(plan);
            let crossings = self.process_map.crossings(part).into_iter().filter(|crossing| crossing.to == process);
            let copied = crossings.filter(|crossing| !self.connector.shares_memory(crossing.from, process));
            let bytes: Vec<_> = copied.map(|crossing| (crossing.landing, crossing.mirror_bytes(part))).collect();
            bytes.into_iter().for_each(|(landing, bytes)| *plan.mirrors.entry(landing).or_default() += bytes);
        }
        plan.check_memory()
    }

    /// True if registers between GPUs of different processes use NCCL pipes instead of connections.
    pub(crate) fn takes_pipes(&self) -> bool {
        matches!(self.connector.options.transport, Transport::Auto | Transport::SharedMemory)
    }

    /// Returns each group's `ncclUniqueId`. All processes call it.
    pub(crate) fn nccl_ids(&self, groups: &[Arc<Group>]) -> Result<Vec<UniqueId>, KernelError> {
        let deadline = Instant::now() + self.connector.options.connect_within;
        nccl_ids::exchange(groups, &self.process_map, &self.membership, &self.ids, deadline)
    }

    /// From now on a failure in any process ends the session in all processes.
    pub(crate) fn watch(&self, running: &RunningSession) {
        let (membership, process_map) = (self.membership.clone(), self.process_map);
        let control = running.control();
        control.on_failure(move |failure| report_failure(&membership, &process_map, failure));
        self.monitor.attach(control);
    }

    /// Returns why the session ended after a failure here: the first cause of all processes, if it comes in time.
    pub(crate) fn settle(&self, failure: Failure) -> Failure {
        match self.wait_for_cause() {
            // If the first cause is in another process, it explains this failure. Any first cause explains a symptom.
            Some(cause) if cause.process != self.process_map.process || is_symptom(&failure) => peer_failure(&cause),
            // Otherwise this process failed first, or no cause arrived. Its own failure has the most detail.
            _ => attribute_to_peer(failure, &self.process_map),
        }
    }

    /// The first cause of all processes; `None` if it does not arrive in time.
    pub(crate) fn wait_for_cause(&self) -> Option<FirstCause> {
        let mut state = self.monitor.state.lock();
        self.monitor.cause_known.wait_while_for(&mut state, |state| state.cause.is_none(), SETTLE_TIMEOUT);
        state.cause.clone()
    }

    /// The agreement on checkpoints, and this process's rank in it.
    pub(crate) fn agree(&self) -> (Arc<dyn SaveAgreement>, ProcessRank) {
        let ProcessMap { process, processes, .. } = self.process_map;
        (self.agreement.clone(), ProcessRank { process, processes, epoch: self.connector.roster.epoch })
    }

    /// Number of messages refused since the start, by reason.
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

    pub(crate) fn peers(&self) -> Vec<PeerState> {
        let here: BTreeSet<u32> = self.here().into_iter().collect();
        let peer = |(process, silent)| {
            let member = self.connector.roster.member(process);
            let (host, pid) = member.map(|member| (member.host.clone(), member.pid)).unzip();
            PeerState { process, host, pid, is_on_this_node: here.contains(&process), silent }
        };
        self.membership.silent_times().into_iter().map(peer).collect()
    }
}

/// Binds this process's addresses and joins the others. Returns the roster, the listener, and the heartbeat socket.
fn meet(
    world: &Launched,
    options: &ClusterOptions,
    secret: &Secret,
    wanted: BTreeSet<u32>,
    (memory, facts): (&MemoryClaim, impl FnOnce() -> Result<Vec<Fact>, ClusterError>),
) -> Result<(Roster, Listener, UdpSocket), ClusterError> {
    let coordinator = world.endpoint.address();
    let spans_nodes = world.local_processes < world.processes;
    let report = |line: &str| options.report_waiting(line);
    let hidden = hidden_name(&coordinator, spans_nodes).filter(|_| world.local_process == 0);
    hidden.iter().for_each(|line| report(line));
    let deadline = Instant::now() + options.meet_within;
    let local = |deadline| local_address(&coordinator, options.interface, spans_nodes, deadline);
    let retry = |error| {
        report(&format!("{error}; trying again for {:?}", options.meet_within));
        local(deadline)
    };
    let local = local(Instant::now()).or_else(retry)?;
    let heartbeat = membership::bind(local).map_err(|cause| match options.interface {
        Some(own) if cause.kind() == io::ErrorKind::AddrNotAvailable => {
            let text = format!("{INTERFACE} or --interface is {}, which is not an address of this node", own.ip());
            ClusterError::Refused(text)
        }
        _ => system("listen for heartbeats")(cause),
    })?;
    let bound = heartbeat.local_addr().map_err(system("listen for heartbeats"))?;
    let published = options.advertise.as_ref().map_or(Ok(bound), |advertise| advertise.heartbeats(bound));
    let config = RendezvousConfig {
        process: world.process,
        processes: world.processes,
        restart: world.restart,
        memory: memory.clone(),
        facts: facts()?,
        wanted,
        heartbeat: published.map_err(|e| ClusterError::Refused(format!("cannot publish an address: {e}")))?,
        spans_nodes,
        ..RendezvousConfig::new(coordinator, secret.clone(), Identity::of_this_process()?, options)
    };
    let (roster, listener) = rendezvous(&config, report)?;
    exit::mark_joined();
    let no_socket = listener.private_error();
    no_socket.iter().for_each(|cause| report(&format!("no Unix socket for processes of this node: {cause}")));
    connector::check_near(&roster, world.process, options.transport)?.iter().for_each(|line| report(line));
    Ok((roster, listener, heartbeat))
}

fn start_membership(
    connector: &Connector,
    heartbeat: UdpSocket,
    wait_max: Duration,
) -> Result<Membership, ClusterError> {
    let Connector { process_map, roster, options, secret, .. } = connector;
    let bound = heartbeat.local_addr().map_err(system("listen for heartbeats"))?;
    let (own, processes) = (process_map.process, process_map.processes);
    let key = secret.key("membership");
    let mut config = MembershipConfig::new(own, processes, roster.session.0, roster.epoch, key, heartbeat);
    (config.interval, config.deadline) = (options.heartbeat_every, options.heartbeat_deadline);
    config.join_within = options.connect_within;
    config.join_at_most = wait_max.max(options.connect_within);
    config.tree = connector.tree.clone();
    for process in config.tree.neighbours(own) {
        config.connections.insert(process, connector.connect(process, Purpose::Control)?);
        config.addresses.insert(process, with_zone_of(connector.member(process)?.heartbeat, bound));
    }
    Ok(Membership::start(config)?)
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> ClusterError {
    move |cause| ClusterError::System { action, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_process_lists_the_busy_ones() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        // Rank 1 began its activity at 2 s, the others at 0 s.
        let line = |own: &str, peers: &[(u32, &str)], now| {
            let peers = peers.iter().map(|(rank, activity)| (*rank, (activity.to_string(), at(0))));
            let activities = peers.chain([(1, (own.into(), at(2)))]).collect();
            State { activities, ..State::default() }.slow_peers(1, Duration::from_secs(5), at(now))
        };
        let peers = [(0, "loading weights"), (2, WAITING), (3, "running the program")];
        let expected = "waiting for rank 0, which has been loading weights for 7 s; for rank 3, which has been running the \
                        program for 7 s";
        assert_eq!(line(WAITING, &peers, 7).as_deref(), Some(expected));
        assert_eq!(line(WAITING, &peers, 6), None, "rank 1 has waited for only 4 s");
        assert_eq!(line("loading weights", &peers, 7), None, "rank 1 does not wait");
        assert_eq!(line(WAITING, &[(0, WAITING)], 7), None, "all ranks wait");
        let many: Vec<_> = (2..20).map(|rank| (rank, "busy")).collect();
        assert_eq!(line(WAITING, &many, 7).unwrap().matches("rank ").count(), SLOW_LISTED_MAX);
    }

    #[test]
    fn busy_processes_are_known_across_the_control_tree() {
        // Ranks 0 and 2 are leaders. Rank 1 is below rank 0, and rank 3 is below rank 2.
        let tree = ControlTree::new(&["a", "a", "b", "b"]);
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut states: Vec<State> = (0..4).map(|_| State::default()).collect();
        let own = [(0, WAITING), (1, "loading\nweights"), (2, WAITING), (3, WAITING)];
        own.iter()
            .for_each(|(rank, text)| drop(states[*rank].activities.insert(*rank as u32, ((*text).into(), at(1)))));
        let exchange = |states: &mut Vec<State>, now| {
            let mut reports = 0;
            for from in 0..4 {
                for (to, bytes) in states[from as usize].activity_reports(from, &tree, now) {
                    states[to as usize].record_activities(from, &bytes, now);
                    reports += 1;
                }
            }
            reports
        };
        let reports = (0..3).map(|round| exchange(&mut states, at(3 + round))).sum::<usize>();
        assert_eq!(reports, 3, "one report for each hop");
        let line = |state: &State, own| state.slow_peers(own, Duration::from_secs(2), at(9));
        for (own, state) in (0..).zip(&states).filter(|(own, _)| *own != 1) {
            assert_eq!(line(state, own).as_deref(), Some("waiting for rank 1, which has been loading for 8 s"));
        }
        // Rank 1 now also waits, so no rank is busy.
        states[1].activities.insert(1, (WAITING.into(), at(10)));
        let reports = (0..3).map(|round| exchange(&mut states, at(11 + round))).sum::<usize>();
        assert_eq!(reports, 3);
        assert!((0..).zip(&states).all(|(own, state)| line(state, own).is_none()));
    }
}
