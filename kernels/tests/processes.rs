//! Collectives between real processes: this test binary starts itself again. Results have the same bits as those of the
//! in-process engine. All members report a mismatch of calls. After an abort, no member waits for a killed or frozen
//! member.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use shardflow_kernels::collective::board::Board;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::shared_memory::SharedMemory;
use shardflow_kernels::collective::{Collective, CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Access, Arena, View};
use shardflow_kernels::tensor::{DType, HostTensor, Region, split_range};

/// Environment variable that configures a child: `SCENARIO RANK PARENT BOARD,ARENA,ARENA..`. `PARENT` is the parent's
/// process id. The last part lists the parent's file descriptors.
const CHILD_ENV: &str = "SHARDFLOW_TEST_PLACE";

/// Maximum wait for an action of a child.
const DEADLINE: Duration = Duration::from_secs(20);

const ARENA_BYTES: usize = 8 << 20;

/// More rounds than any test can run.
const ROUNDS_MAX: usize = 100_000_000;

fn group(n: usize) -> Arc<Group> {
    Arc::new(Group { id: 7, ranks: (0..n).collect() })
}

/// One member's part of a collective: the kind, and the shapes of this member's x and y.
type Step = (CollectiveKind, Vec<usize>, Vec<usize>);

fn rows(shape: [usize; 2], n: usize, dim: usize) -> Vec<Region> {
    let part = |i| {
        let range = split_range(shape[dim], n, i);
        let mut region = Region::whole(&shape);
        (region.start[dim], region.size[dim]) = (range.start, range.len());
        region
    };
    (0..n).map(part).collect()
}

/// The collectives that a member calls, with small and large, even and uneven shapes.
fn script(n: usize, member: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for shape in [[3, 5], [7, 33], [101, 203], [64, 1024]] {
        let (rows, columns) = (rows(shape, n, 0), rows(shape, n, 1));
        let (row, column) = (rows[member].size.clone(), columns[member].size.clone());
        let whole = shape.to_vec();
        for op in [ReduceOp::Sum, ReduceOp::Max] {
            steps.push((CollectiveKind::AllReduce { op }, whole.clone(), whole.clone()));
        }
        let scatter = CollectiveKind::ReduceScatter { op: ReduceOp::Sum, parts: columns.clone().into() };
        steps.push((scatter, whole.clone(), column.clone()));
        steps.push((CollectiveKind::AllGather { parts: rows.clone().into() }, row.clone(), whole.clone()));
        steps.push((CollectiveKind::AllToAll { sources: rows.into(), targets: columns.into() }, row, column));
        steps.push((CollectiveKind::Broadcast { root: n - 1 }, whole.clone(), whole));
    }
    steps
}

/// Runs the script and returns the number of arena bytes used. Each step has an x, a y and a copy of y. As soon as a
/// call returns, its x and y are overwritten. This must not change the results of any member.
fn run_script(engine: &dyn Collective, arena: &Arena, n: usize, member: usize) -> Result<usize, KernelError> {
    let mut end = 0;
    for (kind, x_shape, y_shape) in script(n, member) {
        let elements = |shape: &[usize]| shape.iter().product::<usize>();
        let x = end;
        let y = x + 4 * elements(&x_shape);
        let kept = y + 4 * elements(&y_shape);
        end = kept + 4 * elements(&y_shape);
        let view = |offset, shape| View::new("test", arena, offset, shape, DType::F32);
        let call = CollectiveCall { group: group(n), member, kind };
        engine.run(&call, &[view(x, &x_shape)?], &[view(y, &y_shape)?])?;
        arena.write_host(kept, &arena.read_host(y, &y_shape, DType::F32)?)?;
        let overwritten = elements(&x_shape) + elements(&y_shape);
        arena.write_host(x, &HostTensor::f32(&[overwritten], vec![f32::NAN; overwritten]))?;
    }
    Ok(end)
}

fn sum(engine: &dyn Collective, arena: &Arena, n: usize, member: usize, op: ReduceOp) -> Result<(), KernelError> {
    let x = View::new("test", arena, 0, &[10_000], DType::F32)?;
    let call = CollectiveCall { group: group(n), member, kind: CollectiveKind::AllReduce { op } };
    engine.run(&call, &[x], &[x])
}

fn join(rank: usize, parent: &str, files: &str) -> (SharedMemory, Arena, usize) {
    let map = |file: &str, bytes, access| {
        let path = format!("/proc/{parent}/fd/{file}");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        Arena::map_peer(file.into(), bytes, access).unwrap()
    };
    let files: Vec<&str> = files.split(',').collect();
    let groups = [group(files.len() - 1)];
    let board = map(files[0], Board::bytes(&groups), Access::ReadWrite);
    let access = |i| if i == rank { Access::ReadWrite } else { Access::Read };
    let arenas: BTreeMap<usize, Arena> =
        files[1..].iter().enumerate().map(|(i, file)| (i, map(file, ARENA_BYTES, access(i)))).collect();
    let arena = arenas[&rank].clone();
    (SharedMemory::new(board, &groups, arenas).unwrap(), arena, groups[0].ranks.len())
}

/// The body of a child process. Does nothing in the parent. A line on standard input aborts the child. The end of
/// standard input does so too, so no child outlives the parent.
#[test]
fn child() {
    let Ok(config) = std::env::var(CHILD_ENV) else { return };
    let [scenario, rank, parent, files] = config.split(' ').collect::<Vec<_>>()[..] else { panic!("{config}") };
    let rank: usize = rank.parse().unwrap();
    let (engine, arena, n) = join(rank, parent, files);
    let engine = Arc::new(engine);
    let aborts = engine.clone();
    thread::spawn(move || {
        let mut line = String::new();
        let _ = std::io::stdin().read_line(&mut line);
        aborts.abort(if line.is_empty() { "the parent has exited" } else { line.trim() });
    });
    let result = match scenario {
        "run_script" => run_script(&*engine, &arena, n, rank).map(drop),
        "odd" => sum(&*engine, &arena, n, rank, if rank == 1 { ReduceOp::Max } else { ReduceOp::Sum }),
        _ => (0..ROUNDS_MAX).try_for_each(|round| {
            if round == 20 {
                println!("\n> started");
            }
            sum(&*engine, &arena, n, rank, ReduceOp::Sum)
        }),
    };
    println!("\n> {}", result.map_or_else(|error| error.to_string(), |()| "done".to_owned()));
}

/// A child process, and the lines with the prefix `> ` that it has printed.
struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Process {
    fn line(&self) -> String {
        self.lines.recv_timeout(DEADLINE).unwrap_or_else(|error| error.to_string())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Creates the memory of `n` ranks. Its values have both signs and different magnitudes.
fn memory(n: usize) -> Vec<Arena> {
    let device = Device::cpu(0, 1, Arc::new(InProcess::new()));
    let fill = |rank| {
        let arena = device.shared_arena(ARENA_BYTES).unwrap();
        let elements = ARENA_BYTES / 4;
        let mut state = 1 + rank as u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            unit * (1 << (state >> 33 & 15)) as f32
        };
        arena.write_host(0, &HostTensor::f32(&[elements], (0..elements).map(|_| next()).collect())).unwrap();
        arena
    };
    (0..n).map(fill).collect()
}

fn start(scenario: &str, board: &Arena, arenas: &[Arena]) -> Vec<Process> {
    let number = |arena: &Arena| arena.descriptor().unwrap().as_raw_fd().to_string();
    let files: Vec<String> = std::iter::once(board).chain(arenas).map(number).collect();
    let one = |rank: usize| {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env(CHILD_ENV, format!("{scenario} {rank} {} {}", std::process::id(), files.join(",")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(line) = line.strip_prefix("> ") {
                    let _ = sender.send(line.to_owned());
                }
            }
        });
        Process { stdin: child.stdin.take(), child, lines }
    };
    (0..arenas.len()).map(one).collect()
}

fn board(n: usize) -> Arena {
    Board::create(&[group(n)]).unwrap()
}

#[test]
fn processes_get_the_bits_of_the_in_process_engine() {
    for n in [2, 4] {
        let (arenas, expected) = (memory(n), memory(n));
        let engine = &InProcess::new();
        let ends: Vec<usize> = thread::scope(|scope| {
            let run_script = |(member, arena)| scope.spawn(move || run_script(engine, arena, n, member).unwrap());
            let members: Vec<_> = expected.iter().enumerate().map(run_script).collect();
            members.into_iter().map(|member| member.join().unwrap()).collect()
        });
        let board = board(n);
        let processes = start("run_script", &board, &arenas);
        for (rank, process) in processes.iter().enumerate() {
            assert_eq!(process.line(), "done", "rank {rank} of {n}");
        }
        for rank in 0..n {
            let end = ends[rank] / 4;
            assert!(end * 4 < ARENA_BYTES);
            // Reads integers in order to compare bits, including those of NaN.
            let bits = |arena: &Arena| arena.read_host(0, &[end], DType::I32).unwrap();
            let (got, expected) = (bits(&arenas[rank]), bits(&expected[rank]));
            let (got, expected) = (got.as_i32().unwrap(), expected.as_i32().unwrap());
            assert_eq!(got.iter().zip(expected).position(|(a, b)| a != b), None, "rank {rank} of {n}");
        }
    }
}

#[test]
fn all_processes_report_a_disagreement() {
    for n in [3, 4] {
        let (board, arenas) = (board(n), memory(n));
        for (rank, process) in start("odd", &board, &arenas).iter().enumerate() {
            let line = process.line();
            let expected = "collective mismatch in group 7, member 1: the other members expect AllReduce { op: Sum }";
            assert!(line.starts_with(expected) && line.contains("got AllReduce { op: Max }"), "rank {rank}: {line}");
        }
    }
}

/// During the calls, one member is killed or frozen. Another member then aborts, which ends all calls.
#[test]
fn an_abort_ends_all_waits_for_a_lost_member() {
    for (n, signal) in [(2, Signal::KILL), (4, Signal::KILL), (4, Signal::STOP)] {
        let (board, arenas) = (board(n), memory(n));
        let mut processes = start("forever", &board, &arenas);
        for process in &processes {
            assert_eq!(process.line(), "started");
        }
        let lost = processes.remove(n / 2);
        lost.signal(signal);
        writeln!(processes[0].stdin.as_mut().unwrap(), "rank {} is lost", n / 2).unwrap();
        for process in &processes {
            assert_eq!(process.line(), format!("aborted: rank {} is lost", n / 2));
        }
    }
}
