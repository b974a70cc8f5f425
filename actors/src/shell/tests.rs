//! Runs small plans on real CPU streams and compares the values with the simulator's values. Also tests failures.

use crossbeam_channel::{Receiver, Sender, bounded};
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::{Collective, CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::{Buffer, CpuArgs, CpuSlice, CpuSliceMut, CustomKernel, Launch, Op, Program};
use shardflow_kernels::tensor::{DType, HostTensor};

use super::*;
use crate::builder::Builder;
use crate::protocol::Message;
use crate::remote::Peers;
use crate::simulate::{plans, tests::exact};
use crate::spec::{ActionRef, ActorSpec, Firing, InputSpec, Pieces, RegisterId};
use crate::trace::Cause;

/// Timeout that ends a test that hangs. It is much longer than any run here takes.
const TIMEOUT: Duration = Duration::from_secs(20);

fn mix(a: i32, b: i32) -> i32 {
    (a.rotate_left(7) ^ b).wrapping_mul(0x5bd1_e995).rotate_left(11).wrapping_add(b)
}

fn value(seed: i32, reads: &[i32]) -> i32 {
    reads.iter().fold(seed, |a, &b| mix(a, b))
}

/// A kernel that computes `write = value(reads)`. If it accumulates or `keep` is set, it mixes in the old content.
#[derive(Debug)]
struct Mix {
    seed: i32,
    keep: bool,
}

impl CustomKernel for Mix {
    fn name(&self) -> &str {
        "mix"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        let first = |slice: &CpuSlice<'_>| match slice {
            CpuSlice::I32(v) => v[0],
            CpuSlice::F32(v) => v[0] as i32,
        };
        let reads: Vec<i32> = args.reads.iter().map(|r| first(&r.data)).collect();
        let value = value(self.seed, &reads);
        let CpuSliceMut::I32(out) = &mut args.writes[0].data else { panic!("writes integers") };
        out[0] = if self.keep || args.accumulate { mix(out[0], value) } else { value };
        Ok(())
    }
}

struct Act<F>(F);

impl<F> std::fmt::Debug for Act<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("act")
    }
}

impl<F: Fn() -> Result<(), KernelError> + Send + Sync> CustomKernel for Act<F> {
    fn name(&self) -> &str {
        "act"
    }

    fn run_cpu(&self, _: CpuArgs<'_>) -> Result<(), KernelError> {
        (self.0)()
    }
}

pub(super) fn act(f: impl Fn() -> Result<(), KernelError> + Send + Sync + 'static) -> Op {
    Op::Custom(Arc::new(Act(f)))
}

fn idle() -> Op {
    act(|| Ok(()))
}

fn cell(base: usize) -> Buffer {
    Buffer { base, offset: 0, shape: vec![1], dtype: DType::I32 }
}

pub(super) fn launch(op: Op, reads: Vec<Buffer>, writes: Vec<Buffer>, accumulate: bool) -> Launch {
    Launch { op, reads, writes, accumulate, workspace: None }
}

fn program(op: Op) -> ActionProgram {
    let launches = vec![launch(op, vec![], vec![], false)];
    let program = Program { name: "work".into(), launches, signals: vec![] };
    ActionProgram { program: Arc::new(program), bases: vec![], ends: None }
}

pub(super) fn launch_first(loaded: &mut LoadedPlan, at: ActionRef, op: Op) {
    let program = &mut programs(loaded, at.actor.0)[at.action as usize].program;
    Arc::make_mut(program).launches.insert(0, launch(op, vec![], vec![], false));
}

fn started(loaded: LoadedPlan) -> RunningSession {
    start(loaded, WatchdogOptions::default()).unwrap()
}

pub(super) fn checked_by_hand() -> WatchdogOptions {
    WatchdogOptions { stall_after: Duration::from_secs(10), check_every: None, ..WatchdogOptions::default() }
}

fn wait_for(running: &RunningSession, condition: impl Fn(&[ActorSnapshot]) -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition(&running.session.snapshot()) {
        assert!(Instant::now() < deadline, "{:?}", running.session.snapshot());
        std::thread::yield_now();
    }
}

/// A plan with [`Mix`] kernels: each action computes each output and its own history from all inputs.
pub(super) struct Bench {
    pub(super) loaded: LoadedPlan,
    /// For each actor: an arena with one integer per action.
    pub(super) histories: Vec<Arena>,
}

fn seed(actor: usize, action: usize, port: usize) -> i32 {
    (actor * 10_007 + action * 101 + port + 1) as i32
}

pub(super) fn bench(spec: Spec) -> Bench {
    let engine: Arc<dyn Collective> = Arc::new(InProcess::new());
    let devices: Vec<Device> = (0..=spec.actors.values().map(|a| a.device).max().unwrap())
        .map(|d| Device::cpu(d, 1, engine.clone()))
        .collect();
    let memory = spec.registers.iter().map(|(id, register)| {
        let device = &devices[spec.actor(register.producer).device];
        let arena = device.arena(4 * register.slots as usize).unwrap();
        for piece in 0..u64::from(register.initial.max(1)) {
            arena.write_host(4 * register.slot(piece) as usize, &HostTensor::i32(&[1], vec![id.0 as i32])).unwrap();
        }
        (id, RegisterMemory { base: Base { arena, offset: 0 }, stride: 4 })
    });
    let memory = memory.collect();
    let arena = |a: &ActorSpec| devices[a.device].arena(4 * a.actions.len()).unwrap();
    let histories: Vec<Arena> = spec.actors.values().map(arena).collect();
    let mut hosted = BTreeMap::new();
    for (id, actor) in spec.actors.iter() {
        let a = id.0 as usize;
        let program = |x: usize| mix_program(&spec, a, x, Base { arena: histories[a].clone(), offset: 4 * x });
        let programs = (0..actor.actions.len()).map(program).collect();
        let stream = devices[actor.device].stream(&actor.name, 1).unwrap();
        hosted.insert(id, ActorHost { stream, programs });
    }
    let loaded = LoadedPlan { spec: Arc::new(spec), hosted, memory, engine, peers: Peers::default() };
    Bench { loaded, histories }
}

fn mix_program(spec: &Spec, a: usize, x: usize, history: Base) -> ActionProgram {
    let action = &spec.actors[ActorId(a as u32)].actions[x];
    let mut bases: Vec<BaseRef> = (0..action.inputs.len()).map(BaseRef::Input).collect();
    bases.extend((0..action.outputs.len()).map(BaseRef::Output));
    bases.push(BaseRef::Fixed(history));
    // The kernel also reads its history, so that no two firings compute the same value.
    let own = bases.len() - 1;
    let reads: Vec<Buffer> = (0..action.inputs.len()).chain([own]).map(cell).collect();
    let mut program = Program { name: action.name.clone(), ..Program::default() };
    for (port, output) in action.outputs.iter().enumerate() {
        let register = spec.register(output.register);
        let kernel = Mix { seed: seed(a, x, port), keep: register.initial > 0 };
        let op = Op::Custom(Arc::new(kernel));
        let write = vec![cell(action.inputs.len() + port)];
        program.launches.push(launch(op, reads.clone(), write, output.pieces.accumulates()));
        if output.early {
            program.signals.push((program.launches.len(), port as u32));
        }
    }
    let op = Op::Custom(Arc::new(Mix { seed: seed(a, x, 99), keep: true }));
    let inputs = (0..action.inputs.len()).map(cell).collect();
    program.launches.push(launch(op, inputs, vec![cell(own)], false));
    ActionProgram { program: Arc::new(program), bases, ends: None }
}

pub(super) fn add_steps(running: &RunningSession, spec: &Spec, steps: u32) {
    for (at, action) in spec.all_actions().filter(|(_, action)| action.external) {
        running.add_tokens(at.actor, at.action, action.per_step * steps).unwrap();
    }
}

fn run(spec: Spec, steps: u32) -> Vec<Vec<i32>> {
    let Bench { loaded, histories: arenas } = bench(spec.clone());
    let running = started(loaded);
    add_steps(&running, &spec, steps);
    assert!(running.quiesce(TIMEOUT).unwrap(), "{:?}", running.session.snapshot());
    let snapshots = running.shutdown().unwrap();
    for (actor, snapshot) in spec.actors.values().zip(&snapshots) {
        let all: Vec<u64> = actor.actions.iter().map(|a| u64::from(a.per_step * steps)).collect();
        assert_eq!(snapshot.firings, all);
        assert!(snapshot.registers.iter().all(|r| r.slots_peak <= r.slots));
    }
    let read = |(arena, actor): (&Arena, &ActorSpec)| {
        let tensor = arena.read_host(0, &[actor.actions.len()], DType::I32).unwrap();
        tensor.as_i32().unwrap().to_vec()
    };
    arenas.iter().zip(spec.actors.values()).map(read).collect()
}

/// Computes the expected histories with the same arithmetic, one firing at a time, in the simulator's order.
fn expected(spec: &Spec, steps: u32) -> Vec<Vec<i32>> {
    let mut run = exact(&Arc::new(spec.clone()), 3, 1, steps).unwrap();
    run.timeline.sort_by_key(|f| f.start);
    let mut slots: Vec<Vec<i32>> = spec.registers.values().map(|r| vec![0; r.slots as usize]).collect();
    for (id, register) in spec.registers.iter() {
        let r = id.0 as usize;
        (0..u64::from(register.initial)).for_each(|piece| slots[r][register.slot(piece) as usize] = r as i32);
    }
    let mut histories: Vec<Vec<i32>> = spec.actors.values().map(|a| vec![0; a.actions.len()]).collect();
    for fired in run.timeline {
        let (a, x) = (fired.actor.0 as usize, fired.action as usize);
        let action = &spec.actors[ActorId(a as u32)].actions[x];
        let place = |id: RegisterId, piece: u64| (id.0 as usize, spec.register(id).slot(piece) as usize);
        let of_firing = |id, pieces: &Pieces| pieces.of_firing(fired.firing, spec.register(id).pieces_per_step);
        let read = |i: &InputSpec| {
            let (register, slot) = place(i.register, of_firing(i.register, &i.pieces).0);
            slots[register][slot]
        };
        let inputs: Vec<i32> = action.inputs.iter().map(read).collect();
        let mut reads = inputs.clone();
        reads.push(histories[a][x]);
        for (port, output) in action.outputs.iter().enumerate() {
            let initial = spec.register(output.register).initial;
            let (piece, first, _) = of_firing(output.register, &output.pieces);
            let (register, slot) = place(output.register, piece + u64::from(initial));
            let value = value(seed(a, x, port), &reads);
            let keep = initial > 0 || !first;
            let cell = &mut slots[register][slot];
            *cell = if keep { mix(*cell, value) } else { value };
        }
        histories[a][x] = mix(histories[a][x], value(seed(a, x, 99), &inputs));
    }
    histories
}

#[test]
fn every_plan_computes_the_values_of_the_simulators_order() {
    for (name, spec, steps) in plans::all() {
        assert_eq!(run((*spec).clone(), steps), expected(&spec, steps), "{name}");
    }
}

#[test]
fn twenty_runs_compute_equal_values() {
    for spec in [plans::data_parallel(), plans::accumulation()] {
        let first = run(spec.clone(), 5);
        for _ in 1..20 {
            assert_eq!(run(spec.clone(), 5), first);
        }
    }
}

/// A chain of actors `a0 -> a1 -> ...`, one per device, with the given ops.
fn chain(ops: Vec<Op>) -> LoadedPlan {
    let mut b = Builder::new();
    let mut last: Option<ActionRef> = None;
    for index in 0..ops.len() {
        let actor = b.actor(format!("a{index}"), index, Firing::Credit);
        let action = b.action(actor, "work", 1);
        b.action_mut(action).external = index == 0;
        if let Some(last) = last {
            b.edge(format!("wire{index}"), 2, last, action);
        }
        last = Some(action);
    }
    let mut loaded = bench(b.build()).loaded;
    for (own, op) in loaded.hosted.values_mut().zip(ops) {
        own.programs[0] = program(op);
    }
    loaded
}

fn first_failure(running: RunningSession) -> Failure {
    let first = running.failures().recv_timeout(TIMEOUT).expect("the session fails");
    assert_eq!(running.add_tokens(ActorId(0), 0, 1), Err(first.clone()), "a failed session accepts no tokens");
    assert_eq!(running.quiesce(TIMEOUT), Err(first.clone()));
    assert_eq!(running.shutdown(), Err(first.clone()));
    first
}

#[test]
fn the_first_cause_names_its_actor_and_action() {
    let cause = KernelError::Custom { name: "act".into(), message: "no".into() };
    let (failed, fails) = (format!("a1 on device 1, action work: {cause}"), act(move || Err(cause.clone())));
    let stray = Message::Filled { register: RegisterId(0), reader: 0, slot: 1, piece: 1 };
    let stray = Cast::Event(ProtocolEvent::Message(stray));
    let cases = [
        (fails, None, [&failed, ""]),
        (act(|| panic!("boom")), None, ["a1 on device 1, action work: kernel", "panicked: boom"]),
        (idle(), Some(Cast::Panic), ["a1 on device 1 panicked: ", "requested by a test"]),
        (
            idle(),
            Some(stray),
            ["a1 on device 1: register 'wire1': the `Filled` message carries piece 1, expected 0 (CR-4)", ""],
        ),
    ];
    for (op, cast, [start, part]) in cases {
        let running = started(chain(vec![idle(), op, idle()]));
        match cast {
            None => running.add_tokens(ActorId(0), 0, 50).unwrap(),
            Some(cast) => assert!(running.session.bus.send(ActorId(1), cast)),
        }
        let failure = first_failure(running).to_string();
        assert!(failure.starts_with(start) && failure.contains(part), "{failure}");
    }
}

pub(super) fn programs(loaded: &mut LoadedPlan, actor: u32) -> &mut Vec<ActionProgram> {
    &mut loaded.hosted.get_mut(&ActorId(actor)).unwrap().programs
}

pub(super) fn collective_launch(group: &Arc<Group>, member: usize, kind: CollectiveKind, base: usize) -> Launch {
    let buffer = Buffer { base, offset: 0, shape: vec![1], dtype: DType::F32 };
    let op = Op::Collective(CollectiveCall { group: group.clone(), member, kind });
    launch(op, vec![buffer.clone()], vec![buffer], false)
}

fn collective(kinds: [CollectiveKind; 2]) -> LoadedPlan {
    let mut b = Builder::new();
    for device in 0..2 {
        let actor = b.actor(format!("a{device}"), device, Firing::Credit);
        b.external(actor, "reduce", 1);
    }
    let Bench { mut loaded, histories } = bench(b.build());
    let group = Arc::new(Group { id: 0, ranks: vec![0, 1].into() });
    for (member, kind) in kinds.into_iter().enumerate() {
        let launches = vec![collective_launch(&group, member, kind, 0)];
        let program = Arc::new(Program { name: "reduce".into(), launches, signals: vec![] });
        let bases = vec![BaseRef::Fixed(Base { arena: histories[member].clone(), offset: 0 })];
        *programs(&mut loaded, member as u32) = vec![ActionProgram { program, bases, ends: None }];
    }
    loaded
}

#[test]
fn a_mismatched_collective_fails_the_session() {
    let kind = |op| CollectiveKind::AllReduce { op };
    let running = started(collective([kind(ReduceOp::Sum), kind(ReduceOp::Max)]));
    running.add_tokens(ActorId(0), 0, 1).unwrap();
    running.add_tokens(ActorId(1), 0, 1).unwrap();
    let failure = first_failure(running);
    let mismatch = |c: &KernelError| matches!(c, KernelError::CollectiveMismatch { .. });
    assert!(matches!(&failure, Failure::Kernel { cause, .. } if mismatch(cause)), "{failure}");
}

#[test]
fn shutdown_aborts_a_collective_that_the_other_member_never_joins() {
    let kind = CollectiveKind::AllReduce { op: ReduceOp::Sum };
    let running = started(collective([kind.clone(), kind]));
    running.add_tokens(ActorId(0), 0, 5).unwrap();
    assert!(!running.quiesce(Duration::ZERO).unwrap() || running.session.snapshot()[0].firings[0] > 0);
    running.shutdown().unwrap();
}

/// A kernel that reports its start and blocks until the returned sender is dropped.
fn gate() -> (Op, Receiver<()>, Sender<()>) {
    let (begun, begins) = bounded(1000);
    let (open, opened) = bounded::<()>(0);
    let kernel = act(move || {
        let _ = begun.send(());
        // This also returns when the test drops its sender.
        let _ = opened.recv_timeout(TIMEOUT);
        Ok(())
    });
    (kernel, begins, open)
}

#[test]
fn shutdown_with_work_queued_ends_after_the_firing_in_flight() {
    let (kernel, begins, open) = gate();
    let running = started(chain(vec![kernel, idle()]));
    running.add_tokens(ActorId(0), 0, 100).unwrap();
    begins.recv_timeout(TIMEOUT).unwrap();
    let session = running.session.clone();
    let stopping = std::thread::spawn(move || running.shutdown());
    // The kernel stays blocked until the actor has stopped.
    let deadline = Instant::now() + TIMEOUT;
    while session.bus.send(ActorId(0), Cast::Event(ProtocolEvent::Start)) {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    drop(open);
    assert_eq!(stopping.join().unwrap().unwrap()[0].firings, [1]);
}

#[test]
fn the_watchdog_reports_what_each_actor_waits_for() {
    let (kernel, begins, open) = gate();
    let reports = Arc::new(Mutex::new(Vec::new()));
    let received = reports.clone();
    let options = WatchdogOptions {
        abort_after: Some(Duration::from_secs(30)),
        on_stall: Some(Arc::new(move |text: &str| received.lock().push(text.to_owned()))),
        ..checked_by_hand()
    };
    let running = start(chain(vec![idle(), kernel]), options).unwrap();
    assert_eq!(running.check_progress(Duration::from_secs(1000)), None, "without work there is no stall");
    running.add_tokens(ActorId(0), 0, 9).unwrap();
    begins.recv_timeout(TIMEOUT).unwrap();
    // The first actor fills its two slots and then waits. From then on only virtual time passes.
    wait_for(&running, |all| all[0].waiting.describe(&running.session.spec).contains("credit"));
    let at = |seconds| running.check_progress(Duration::from_secs(seconds));
    assert_eq!((at(2000), at(2009)), (None, None));
    let report = at(2010).expect("ten seconds without progress");
    assert_eq!(at(2020), None, "a stall is reported once");
    let lines =
        ["a0 work waits for a credit of register 'wire1' (2 of 2 slots held by a1 work)", "a1 work is in flight"];
    for line in lines {
        assert!(report.contains(line), "{report}");
    }
    assert_eq!(*reports.lock(), [report]);
    assert!(running.failures().is_empty(), "the session has not failed yet");
    let report = at(2030).expect("thirty seconds without progress");
    let failure = running.failures().recv_timeout(TIMEOUT).unwrap();
    assert_eq!(failure.to_string(), report);
    let Failure::Stalled { idle_ms: 30_000, cause, process: None, .. } = &failure else { panic!("{failure}") };
    assert!(
        cause.starts_with("a1 work has not ended, and waits for no other action; so a0 work waits for "),
        "{cause}"
    );
    assert_eq!(at(2060), None, "the session has ended");
    assert_eq!(running.shutdown(), Err(failure));
    drop(open);
}

/// The host may add some tokens of a step only after the step's other results are known.
#[test]
fn a_stall_is_reported_while_a_step_lacks_a_token() {
    let mut b = Builder::new();
    let actors = ["first", "late"].map(|name| b.actor(name, 0, Firing::Credit));
    let [first, late] = actors.map(|actor| b.external(actor, "work", 1));
    b.edge("wire", 1, first, late);
    let running = start(bench(b.build()).loaded, checked_by_hand()).unwrap();
    running.add_tokens(first.actor, 0, 1).unwrap();
    wait_for(&running, |all| all[0].firings == [1] && !running.session.steps.any_in_flight());
    let at = |seconds| running.check_progress(Duration::from_secs(seconds));
    assert_eq!((at(1000), running.quiesce(TIMEOUT)), (None, Ok(true)), "no step has all of its tokens");
    let report = at(1010).expect("ten seconds without progress");
    assert!(report.contains("late work waits for a token"), "{report}");
    running.add_tokens(late.actor, 0, 1).unwrap();
    assert_eq!(running.quiesce(TIMEOUT), Ok(true));
    assert_eq!((at(2000), at(3000)), (None, None), "a finished step is not a stall");
    running.shutdown().unwrap();
}

/// A peer may be one step ahead: its messages arrive before this process's own update has ended.
#[test]
fn an_early_firing_does_not_hide_a_late_one() {
    let mut b = Builder::new();
    let actors = ["ahead", "late"].map(|name| b.actor(name, 0, Firing::Credit));
    let [ahead, late] = actors.map(|actor| b.external(actor, "work", 1));
    let mut loaded = bench(b.build()).loaded;
    let (kernel, begins, open) = gate();
    programs(&mut loaded, late.actor.0)[0] = program(kernel);
    let running = started(loaded);
    running.add_tokens(ahead.actor, 0, 2).unwrap();
    running.add_tokens(late.actor, 0, 1).unwrap();
    begins.recv_timeout(TIMEOUT).unwrap();
    wait_for(&running, |all| all[0].firings == [2] && all[0].waiting.in_flight.is_none());
    assert_eq!(running.quiesce(Duration::ZERO), Ok(false), "two firings have ended, but not the late one");
    drop(open);
    assert_eq!(running.quiesce(TIMEOUT), Ok(true));
    running.shutdown().unwrap();
}

#[test]
fn mismatched_parts_are_rejected() {
    type Change = fn(&mut LoadedPlan);
    let changes: [(&str, Change); 5] = [
        ("processes that host the actor: expected 1, got 0", |l| drop(l.hosted.pop_last())),
        ("tags of the program's signals: expected the early outputs [0, 1], got []", |l| {
            programs(l, 0)[1].program = Arc::default();
        }),
        ("input port of a base", |l| programs(l, 0)[0].bases.push(BaseRef::Input(7))),
        ("slots of a ring: expected 1 or more, got 0", |l| {
            let memory = l.memory[&RegisterId(0)].clone();
            programs(l, 0)[0].bases.push(BaseRef::Ring { memory, slots: 0 });
        }),
        ("end of the slots", |l| l.memory.get_mut(&RegisterId(0)).unwrap().base.offset = 1 << 20),
    ];
    for (text, change) in changes {
        let mut loaded = bench(plans::data_parallel()).loaded;
        change(&mut loaded);
        let error = start(loaded, WatchdogOptions::default()).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}

/// Each firing of an action computes `slot = mix(slot, value(1, []))` in the slot of its ring.
#[test]
fn firings_use_the_slots_of_a_ring_in_turn_and_report_their_ends() {
    const SLOTS: u32 = 3;
    let mut loaded = chain(vec![idle()]);
    let arena = Device::cpu(0, 1, Arc::new(InProcess::new())).arena(4 * SLOTS as usize).unwrap();
    let (ends, ended) = crossbeam_channel::unbounded();
    let launches = vec![launch(Op::Custom(Arc::new(Mix { seed: 1, keep: true })), vec![], vec![cell(0)], false)];
    let program = Arc::new(Program { name: "work".into(), launches, signals: vec![] });
    let memory = RegisterMemory { base: Base { arena: arena.clone(), offset: 0 }, stride: 4 };
    let bases = vec![BaseRef::Ring { memory, slots: SLOTS }];
    *programs(&mut loaded, 0) = vec![ActionProgram { program, bases, ends: Some(ends) }];
    let running = started(loaded);
    let at = ActionRef { actor: ActorId(0), action: 0 };
    let mut expected = [0; SLOTS as usize];
    for firing in 0..2 * u64::from(SLOTS) + 1 {
        running.add_tokens(at.actor, at.action, 1).unwrap();
        assert_eq!(ended.recv_timeout(TIMEOUT).unwrap().open(), FiringEnd { at, firing });
        let slot = &mut expected[firing as usize % SLOTS as usize];
        *slot = mix(*slot, value(1, &[]));
        assert_eq!(arena.read_host(0, &[SLOTS as usize], DType::I32).unwrap().as_i32(), Some(&expected[..]));
    }
    running.shutdown().unwrap();
}

#[test]
fn only_external_actions_accept_tokens() {
    let running = started(chain(vec![idle(), idle()]));
    for (actor, action) in [(1, 0), (9, 9)] {
        let error = running.add_tokens(ActorId(actor), action, 1).unwrap_err();
        assert!(matches!(error, Failure::Protocol { cause: ProtocolError::UnexpectedToken { .. }, .. }), "{error}");
    }
    running.add_tokens(ActorId(0), 0, 3).unwrap();
    assert!(running.quiesce(TIMEOUT).unwrap());
}

#[test]
fn a_failure_aborts_collectives_and_stays_the_first_cause() {
    let kind = CollectiveKind::AllReduce { op: ReduceOp::Sum };
    let mut loaded = collective([kind.clone(), kind]);
    let cause = KernelError::Custom { name: "act".into(), message: "no".into() };
    let (fails, (begun, begins)) = (cause.clone(), bounded(1));
    // Once device 0 is in the collective, device 1 fails instead of joining.
    programs(&mut loaded, 1)[0] = program(act(move || Err(fails.clone())));
    let begin = act(move || {
        let _ = begun.try_send(());
        Ok(())
    });
    launch_first(&mut loaded, ActionRef { actor: ActorId(0), action: 0 }, begin);
    let running = started(loaded);
    running.add_tokens(ActorId(0), 0, 1).unwrap();
    begins.recv_timeout(TIMEOUT).unwrap();
    running.add_tokens(ActorId(1), 0, 1).unwrap();
    let expected = Failure::Kernel { actor: "a1".into(), device: 1, action: "reduce".into(), cause: Box::new(cause) };
    assert_eq!(running.failures().recv_timeout(TIMEOUT), Ok(expected.clone()));
    // The stream becomes idle only if the collective was aborted.
    let (session, (idle, becomes_idle)) = (running.session.clone(), bounded(1));
    std::thread::spawn(move || idle.send(session.streams[&ActorId(0)].synchronize()));
    assert_eq!(becomes_idle.recv_timeout(TIMEOUT), Ok(Ok(())));
    let late = Failure::Panic { actor: "a0".into(), device: 0, action: None, message: "later".into() };
    running.session.fail(late);
    assert_eq!(running.shutdown(), Err(expected));
}

#[test]
fn firings_are_traced_with_their_causes() {
    let running = started(chain(vec![idle(), idle()]));
    let control = running.control();
    running.add_tokens(ActorId(0), 0, 3).unwrap();
    assert_eq!(running.quiesce(TIMEOUT), Ok(true));
    let [first, second] = [0, 1].map(|actor| control.fired(ActorId(actor), 0));
    let wire = RegisterId(running.session.spec.registers.values().position(|r| r.name == "wire1").unwrap() as u32);
    for (new, causes) in [(&first, [Cause::Host, Cause::Own]), (&second, [Cause::Input(wire), Cause::Own])] {
        let numbers: Vec<u64> = new.firings.iter().map(|fired| fired.firing).collect();
        assert_eq!((&numbers[..], new.next, new.lost), (&[0, 1, 2][..], 3, 0));
        assert_eq!(new.firings[0].cause, causes[0]);
        let mut before = 0;
        for fired in &new.firings {
            let credit = matches!(fired.cause, Cause::Credit(_));
            assert!(causes.contains(&fired.cause) || credit, "{fired:?}");
            let times = [before, fired.idle_ns, fired.launched_ns, fired.ended_ns, control.now_ns().unwrap()];
            assert!(times.is_sorted(), "{times:?}");
            before = fired.ended_ns;
        }
    }
    let snapshots = control.snapshot();
    let idle = &snapshots[1].idle;
    let waited: u64 =
        second.firings.iter().filter(|f| f.cause == Cause::Input(wire)).map(|f| f.launched_ns - f.idle_ns).sum();
    assert_eq!((idle.input_ns.get(&wire), idle.host_ns), (Some(&waited), 0));
    assert!(snapshots[0].idle.host_ns > 0 && snapshots[0].idle_now_ns > 0);
    running.add_tokens(ActorId(0), 0, 1).unwrap();
    assert_eq!(running.quiesce(TIMEOUT), Ok(true));
    assert_eq!(control.fired(ActorId(1), second.next).firings.iter().map(|f| f.firing).collect::<Vec<_>>(), [3]);
    running.shutdown().unwrap();
    assert_eq!((control.snapshot(), control.now_ns()), (vec![], None));
}
