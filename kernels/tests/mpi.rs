//! Collectives by MPI between real processes: this test binary starts itself under `mpirun`. The suite of every engine, the
//! same bits on all members, aborts, processes that are late or lost. Built only with the feature `mpi`.

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

/// Tells a child what to do.
const SCENARIO: &str = "SHARDFLOW_TEST_SCENARIO";

/// Longer than any of these runs, by far.
const DEADLINE: Duration = Duration::from_secs(120);

/// How long processes wait until all have come.
const WITHIN: Duration = Duration::from_secs(30);

const SUM: CollectiveKind = CollectiveKind::AllReduce { op: ReduceOp::Sum };

fn group(id: u32, n: usize) -> Arc<Group> {
    Arc::new(Group { id, ranks: (0..n).collect() })
}

fn engine(world: &Arc<MpiWorld>, groups: &[Arc<Group>]) -> Result<Arc<Mpi>, KernelError> {
    Ok(Arc::new(Mpi::new(world.clone(), groups, &|rank| rank as u32, WITHIN)?))
}

/// The suite of every engine, with a device in each process.
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
    // Of very different sizes, so that the order of additions shows.
    let value = |i: usize| (1.0 + rank + i as f32 * 0.37).sin() * [1.0, 1e-4, 1e5][i % 3];
    arena.write_host(0, &HostTensor::f32(&[len], (0..len).map(value).collect()))?;
    Ok(arena)
}

/// All members have the same bits of a sum, which data parallelism relies on.
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
                return Ok(format!("member {member} has another sum of {len}"));
            }
        }
    }
    Ok("passed".to_owned())
}

/// Process 0 waits for others that never come, until it is aborted.
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
        let (waits, call) = (engine.clone(), kind.clone());
        thread::spawn(move || drop(sender.send([(); 2].map(|()| run(&waits, &arena, call.clone(), 1, n, 10)))));
        // Whether the call is waiting by now or has yet to begin: it ends.
        let early = ended.recv_timeout(Duration::from_millis(100));
        engine.abort("the test says so");
        engine.abort("a later cause");
        let results = ended.recv_timeout(Duration::from_secs(2));
        let aborted = || Err(KernelError::Aborted { cause: "the test says so".to_owned() });
        if early.is_ok() || results != Ok([aborted(), aborted()]) {
            return Ok(format!("{kind:?}: {early:?}, then {results:?}"));
        }
    }
    Ok("passed".to_owned())
}

/// Process 1 is killed while all are at it.
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
    Ok("nobody was lost".to_owned())
}

/// Process 0 is at its end while the others wait for it elsewhere.
fn early_end(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    if world.rank() > 0 {
        engine(world, &[group(1, world.size() as usize)])?;
    }
    Ok("passed".to_owned())
}

/// Process 1 comes to the meeting, and then makes no communicator.
fn half_made(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    if world.rank() > 0 {
        return engine(world, &[]).map(|_| "passed".to_owned());
    }
    let made = Mpi::new(world.clone(), &[group(1, 2)], &|rank| rank as u32, Duration::from_secs(2));
    let said = made.map(drop).map_err(|error| error.to_string());
    let is_late = said.as_ref().is_err_and(|error| error.contains("not all members have come"));
    Ok(if is_late { "passed".to_owned() } else { format!("{said:?}") })
}

/// What is refused before anything runs.
fn refusals(world: &Arc<MpiWorld>) -> Result<String, KernelError> {
    let again = MpiWorld::start().map(drop).map_err(|error| error.to_string());
    let same = Mpi::new(world.clone(), &[group(1, 2)], &|_| 0, WITHIN).map(drop).map_err(|error| error.to_string());
    let late = match world.rank() {
        // Comes to nothing: that the others wait is what this is about.
        1 => Err("not all of 2 processes have come".to_owned()),
        _ => Mpi::new(world.clone(), &[group(1, 2)], &|rank| rank as u32, Duration::from_millis(200))
            .map(drop)
            .map_err(|error| error.to_string()),
    };
    let said = |result: &Result<(), String>, text: &str| result.as_ref().is_err_and(|error| error.contains(text));
    let all = said(&again, "started before in this process")
        && said(&same, "members of group 1 in different processes of 2")
        && said(&late, "not all of 2 processes have come");
    Ok(if all { "passed".to_owned() } else { format!("{again:?} {same:?} {late:?}") })
}

/// What a child process does; in the parent, nothing.
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
        "half made" => half_made(&world),
        _ => refusals(&world),
    };
    println!("\n> {} {}", world.rank(), result.unwrap_or_else(|error| error.to_string()));
    if world.rank() > 0 && ["aborts", "half made", "refusals"].contains(&scenario.as_str()) {
        // Until `mpirun` ends this one, because process 0 ended without the end of MPI.
        thread::park_timeout(DEADLINE);
    }
}

/// Plays a scenario in so many processes; gives the exit code, and the lines behind `> `, sorted.
fn play(scenario: &str, processes: usize) -> (Option<i32>, Vec<String>) {
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
        // Not SIGKILL, which it could not pass on.
        let _ = kill_process(Pid::from_child(&mpirun), Signal::TERM);
        let _ = mpirun.wait();
        panic!("{scenario} of {processes} does not end");
    };
    let mut lines: Vec<String> = text.lines().filter_map(|line| line.strip_prefix("> ")).map(String::from).collect();
    lines.sort();
    (mpirun.wait().expect("an end").code(), lines)
}

fn check_passes(scenario: &str, processes: usize) {
    let expected: Vec<String> = (0..processes).map(|rank| format!("{rank} passed")).collect();
    // The code is 0 only if MPI was ended in order.
    assert_eq!(play(scenario, processes), (Some(0), expected), "{scenario} of {processes}");
}

#[test]
fn the_suite_of_every_engine_passes() {
    [2, 3, 4].into_iter().for_each(|processes| check_passes("suite", processes));
}

#[test]
fn all_members_get_the_same_bits_of_a_sum() {
    [2, 3, 4].into_iter().for_each(|processes| check_passes("same bits", processes));
}

#[test]
fn an_abort_ends_who_waits_and_the_process_ends_without_the_others() {
    let (code, lines) = play("aborts", 3);
    assert!(code.is_some_and(|code| code != 0), "{code:?}");
    assert!(lines.contains(&"0 passed".to_owned()), "{lines:?}");
}

#[test]
fn a_killed_process_ends_all_in_time_and_not_with_0() {
    let began = Instant::now();
    let (code, lines) = play("lost", 4);
    assert!(code.is_some_and(|code| code != 0), "{code:?} {lines:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_process_that_ends_early_does_not_wait_for_ever() {
    let began = Instant::now();
    let (code, _) = play("early end", 3);
    // Within the time that it waits for the others, plus the start.
    assert!(code.is_some_and(|code| code != 0) && began.elapsed() < Duration::from_secs(20), "{code:?}");
}

#[test]
fn a_communicator_that_a_member_does_not_make_has_a_deadline() {
    let began = Instant::now();
    let (code, lines) = play("half made", 2);
    assert!(code.is_some_and(|code| code != 0) && lines.contains(&"0 passed".to_owned()), "{code:?} {lines:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn what_cannot_be_is_refused() {
    let (_, lines) = play("refusals", 2);
    assert!(lines.contains(&"0 passed".to_owned()), "{lines:?}");
}
