//! Collectives by MPI between real processes: this test binary starts itself under `mpirun`. It runs the conformance
//! suite. It also tests aborts, late processes and lost processes, and checks that all members get the same bits. Cargo
//! builds it only with the feature `mpi`.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpid, kill_process};
use shardflow_kernels::collective::mpi::{Mpi, MpiWorld};
use shardflow_kernels::collective::{Collective, CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::conformance::{self, SummationOrder};
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, View};
use shardflow_kernels::tensor::{DType, HostTensor, Region};

/// Environment variable that selects the scenario of a child.
const SCENARIO: &str = "SHARDFLOW_TEST_SCENARIO";

/// Maximum duration of a run. It is much longer than any of the runs takes.
const DEADLINE: Duration = Duration::from_secs(120);

/// How long processes wait until all processes have arrived.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(30);

const SUM: CollectiveKind = CollectiveKind::AllReduce { op: ReduceOp::Sum };

fn group(id: u32, n: usize) -> Arc<Group> {
    Arc::new(Group { id, ranks: (0..n).collect() })
}

fn engine(world: &Arc<MpiWorld>, groups: &[Arc<Group>]) -> Result<Arc<Mpi>, KernelError> {
    Ok(Arc::new(Mpi::new(world.clone(), groups, &|rank| rank as u32, ARRIVAL_TIMEOUT)?))
}

/// Runs the conformance suite with one device per process.
fn suite(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    let make = |n: usize| {
        let engine = engine(world, &conformance::collectives_groups(n))?;
        let device = Device::cpu(rank, 1, engine);
        let arena = device.arena(conformance::COLLECTIVES_ARENA_BYTES)?;
        Ok(if rank < n { vec![(device, arena)] } else { vec![] })
    };
    let failures = conformance::run_collectives_apart(&make, size, SummationOrder::InAnyOrder);
    let lines: Vec<String> = failures.iter().take(5).map(|f| f.to_string().chars().take(400).collect()).collect();
    Ok(if failures.is_empty() { "passed".to_owned() } else { format!("{} failures: {lines:?}", failures.len()) })
}

fn run(engine: &Mpi, arena: &Arena, kind: CollectiveKind, group: u32, n: usize, len: usize) -> Result<(), KernelError> {
    let (member, shape, whole) = (engine_rank(engine), [len], [n * len]);
    let x = View::new("test", arena, 0, &shape, DType::F32)?;
    let y = View::new("test", arena, 4 * len, &shape, DType::F32)?;
    let all = View::new("test", arena, 8 * len, &whole, DType::F32)?;
    let call = CollectiveCall { group: self::group(group, n), member, kind };
    match call.kind {
        CollectiveKind::Send { .. } => engine.run(&call, &[x], &[]),
        CollectiveKind::Receive { .. } => engine.run(&call, &[], &[y]),
        CollectiveKind::AllGather { .. } => engine.run(&call, &[y], &[all]),
        _ => engine.run(&call, &[x], &[y]),
    }
}

fn engine_rank(engine: &Mpi) -> usize {
    engine.world().rank() as usize
}

fn memory(engine: &Arc<Mpi>, len: usize, n: usize) -> Result<Arena, KernelError> {
    let arena = Device::cpu(0, 1, engine.clone()).arena(4 * len * (2 + n))?;
    let rank = engine_rank(engine) as f32;
    // The values have very different magnitudes, so the order of additions affects the result.
    let value = |i: usize| (1.0 + rank + i as f32 * 0.37).sin() * [1.0, 1e-4, 1e5][i % 3];
    arena.write_host(0, &HostTensor::f32(&[len], (0..len).map(value).collect()))?;
    Ok(arena)
}

/// Tests that all members get the same bits for a sum. Data parallelism relies on this.
fn same_bits(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    let n = world.size() as usize;
    let engine = engine(world, &[group(1, n)])?;
    for len in [1, 2, 7, 100, 5003, 300_000, 2_000_000] {
        let arena = memory(&engine, len, n)?;
        run(&engine, &arena, SUM, 1, n, len)?;
        let part = |i| Region { start: vec![i * len], size: vec![len] };
        run(&engine, &arena, CollectiveKind::AllGather { parts: (0..n).map(part).collect() }, 1, n, len)?;
        let own = arena.read_host(4 * len, &[len], DType::I32)?;
        for member in 0..n {
            if arena.read_host(4 * len * (2 + member), &[len], DType::I32)? != own {
                return Ok(format!("member {member} has a different sum of {len} elements"));
            }
        }
    }
    Ok("passed".to_owned())
}

/// Process 0 waits for processes that never join, until it is aborted.
fn aborts(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    let n = world.size() as usize;
    let kinds = [SUM, CollectiveKind::Send { to: 1 }, CollectiveKind::Receive { from: 1 }];
    for kind in kinds {
        let engine = engine(world, &[group(1, n)])?;
        if world.rank() > 0 {
            continue;
        }
        let arena = memory(&engine, 10, n)?;
        let (sender, ended) = channel();
        let (engine_clone, call) = (engine.clone(), kind.clone());
        thread::spawn(move || drop(sender.send([(); 2].map(|()| run(&engine_clone, &arena, call.clone(), 1, n, 10)))));
        // The abort ends the call, no matter whether the call already waits or has not started.
        let early = ended.recv_timeout(Duration::from_millis(100));
        engine.abort("aborted by the test");
        engine.abort("a later cause");
        let results = ended.recv_timeout(Duration::from_secs(2));
        let aborted = || Err(KernelError::Aborted { cause: "aborted by the test".to_owned() });
        if early.is_ok() || results != Ok([aborted(), aborted()]) {
            return Ok(format!("{kind:?}: {early:?} before the abort, {results:?} after it"));
        }
    }
    Ok("passed".to_owned())
}

/// Process 1 is killed while all processes call collectives.
fn lost(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    let n = world.size() as usize;
    let engine = engine(world, &[group(1, n)])?;
    let arena = memory(&engine, 1000, n)?;
    for round in 0.. {
        if (world.rank(), round) == (1, 50) {
            let _ = kill_process(getpid(), Signal::KILL);
        }
        run(&engine, &arena, SUM, 1, n, 1000)?;
    }
    Ok("no process was lost".to_owned())
}

/// Process 0 exits while the other processes wait for it in another call.
fn early_end(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    if world.rank() > 0 {
        engine(world, &[group(1, world.size() as usize)])?;
    }
    Ok("passed".to_owned())
}

/// Process 1 joins the barrier, but does not create a communicator.
fn missing_communicator(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    if world.rank() > 0 {
        return engine(world, &[]).map(|_| "passed".to_owned());
    }
    let made = Mpi::new(world.clone(), &[group(1, 2)], &|rank| rank as u32, Duration::from_secs(2));
    let result = made.map(drop).map_err(|error| error.to_string());
    let is_late = result.as_ref().is_err_and(|error| error.contains("not all members arrived"));
    Ok(if is_late { "passed".to_owned() } else { format!("{result:?}") })
}

/// Tests errors that are detected before a collective runs.
fn rejections(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    let again = MpiWorld::start().map(drop).map_err(|error| error.to_string());
    let same =
        Mpi::new(world.clone(), &[group(1, 2)], &|_| 0, ARRIVAL_TIMEOUT).map(drop).map_err(|error| error.to_string());
    let late = match world.rank() {
        // Process 1 does not arrive, so the other processes must wait and then fail.
        1 => Err("not all of 2 processes arrived".to_owned()),
        _ => Mpi::new(world.clone(), &[group(1, 2)], &|rank| rank as u32, Duration::from_millis(200))
            .map(drop)
            .map_err(|error| error.to_string()),
    };
    let fails_with = |result: &Result<(), String>, text: &str| result.as_ref().is_err_and(|error| error.contains(text));
    let all = fails_with(&again, "started before in this process")
        && fails_with(&same, "distinct process numbers below 2, one per member of group 1")
        && fails_with(&late, "not all of 2 processes arrived");
    Ok(if all { "passed".to_owned() } else { format!("again: {again:?}, same process: {same:?}, late: {late:?}") })
}

/// The body of a child process. Does nothing in the parent.
#[test]
fn child() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let world = MpiWorld::start().expect("MPI under mpirun");
    let result = match scenario.as_str() {
        "suite" => suite(&world),
        "same bits" => same_bits(&world),
        "aborts" => aborts(&world),
        "lost" => lost(&world),
        "early end" => early_end(&world),
        "missing communicator" => missing_communicator(&world),
        _ => rejections(&world),
    };
    println!("\n> {} {}", world.rank(), result.unwrap_or_else(|error| error.to_string()));
    if world.rank() > 0 && ["aborts", "missing communicator", "rejections"].contains(&scenario.as_str()) {
        // Waits until `mpirun` ends this process. `mpirun` does so, because process 0 exited without finalizing MPI.
        thread::park_timeout(DEADLINE);
    }
}

/// Runs a scenario in `processes` processes. Returns the exit code, and the sorted lines with the prefix `> `.
fn run_scenario(scenario: &str, processes: usize) -> (Option<i32>, Vec<String>) {
    let mut mpirun = Command::new("mpirun")
        .args(["--quiet", "--oversubscribe", "-n", &processes.to_string(), "-x", SCENARIO])
        .arg(std::env::current_exe().expect("this program"))
        .args(["child", "--exact", "--nocapture"])
        .env(SCENARIO, scenario)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("mpirun: install openmpi-bin");
    let mut output = mpirun.stdout.take().expect("piped");
    let (sender, ended) = channel();
    thread::spawn(move || {
        let mut text = String::new();
        let _ = output.read_to_string(&mut text);
        sender.send(text)
    });
    let Ok(text) = ended.recv_timeout(DEADLINE) else {
        // Sends SIGTERM, because mpirun could not forward SIGKILL to the processes.
        let _ = kill_process(Pid::from_child(&mpirun), Signal::TERM);
        let _ = mpirun.wait();
        panic!("{scenario} in {processes} processes does not end");
    };
    let mut lines: Vec<String> = text.lines().filter_map(|line| line.strip_prefix("> ")).map(String::from).collect();
    lines.sort();
    (mpirun.wait().expect("an exit status").code(), lines)
}

fn check_passes(scenario: &str, processes: usize) {
    let expected: Vec<String> = (0..processes).map(|rank| format!("{rank} passed")).collect();
    // The exit code is 0 only if MPI was finalized.
    assert_eq!(run_scenario(scenario, processes), (Some(0), expected), "{scenario} in {processes} processes");
}

#[test]
fn the_conformance_suite_passes() {
    [2, 3, 4].into_iter().for_each(|processes| check_passes("suite", processes));
}

#[test]
fn all_members_get_the_same_bits_of_a_sum() {
    [2, 3, 4].into_iter().for_each(|processes| check_passes("same bits", processes));
}

#[test]
fn an_abort_ends_waiting_calls_and_the_process_exits_without_the_others() {
    let (code, lines) = run_scenario("aborts", 3);
    assert!(code.is_some_and(|code| code != 0), "{code:?}");
    assert!(lines.contains(&"0 passed".to_owned()), "{lines:?}");
}

#[test]
fn a_killed_process_ends_all_processes_soon_with_a_nonzero_code() {
    let began = Instant::now();
    let (code, lines) = run_scenario("lost", 4);
    assert!(code.is_some_and(|code| code != 0), "exit code {code:?}, lines {lines:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_process_that_exits_early_does_not_wait_forever() {
    let began = Instant::now();
    let (code, _) = run_scenario("early end", 3);
    // The limit covers the start, and the time for which the process waits for the other processes.
    assert!(code.is_some_and(|code| code != 0) && began.elapsed() < Duration::from_secs(20), "{code:?}");
}

#[test]
fn waiting_for_a_member_that_creates_no_communicator_times_out() {
    let began = Instant::now();
    let (code, lines) = run_scenario("missing communicator", 2);
    assert!(code.is_some_and(|code| code != 0) && lines.contains(&"0 passed".to_owned()), "{code:?}, {lines:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn invalid_starts_and_groups_are_rejected() {
    let (_, lines) = run_scenario("rejections", 2);
    assert!(lines.contains(&"0 passed".to_owned()), "{lines:?}");
}
