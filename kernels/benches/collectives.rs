//! Measures the throughput of collectives between processes of one node. The benchmark starts itself once per rank, and
//! prints one line of JSON per (collective, world size, `bytes`).
//!
//! `cargo bench -p shardflow-kernels --bench collectives -- [--engine on-node|unix|tcp] [--worlds 2,4] [--sizes 1024,4096]
//! [--ops all_reduce,send]`
//!
//! `bytes` is the size of a rank's float input (for `all_gather`, of the rank's output). `us` is the median time of a
//! call in microseconds. As in nccl-tests, `algbw_GBps` is `bytes` per median time, and `busbw_GBps` is `algbw_GBps`
//! times a factor: 2(n-1)/n for `all_reduce`, 1 for `send` (half a ping-pong), and (n-1)/n for the other collectives.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow_kernels::collective::board::Board;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::shared_memory::SharedMemory;
use shardflow_kernels::collective::wire::{Channel, ChannelKey, Wire};
use shardflow_kernels::collective::{Collective, CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::{Access, Arena, View};
use shardflow_kernels::tensor::{DType, HostTensor, Region, split_range};

const OPS: [&str; 5] = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"];

/// Environment variable that configures a child: `RANK PARENT BOARD,ARENA,ARENA..`. `RANK` is the child's rank,
/// `PARENT` is the parent's process id, and the last part lists the parent's file descriptors of the shared memory.
const CHILD_ENV: &str = "SHARDFLOW_BENCH_PLACE";

type Error = Box<dyn std::error::Error>;

struct Options {
    engine: String,
    worlds: Vec<usize>,
    sizes: Vec<usize>,
    ops: Vec<String>,
}

struct Rank {
    rank: usize,
    group: Arc<Group>,
    engine: Box<dyn Collective>,
    engine_name: String,
    arena: Arena,
    /// Offset of y in bytes.
    y: usize,
}

fn options() -> Result<Options, Error> {
    let mut options = Options {
        engine: "on-node".to_owned(),
        worlds: vec![2, 4],
        sizes: (10..=26).step_by(2).map(|log| 1 << log).collect(),
        ops: OPS.map(str::to_owned).to_vec(),
    };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        let numbers = || value.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
        match flag.as_str() {
            "--engine" => options.engine = value,
            "--worlds" => options.worlds = numbers()?,
            "--sizes" => options.sizes = numbers()?,
            "--ops" => options.ops = value.split(',').map(str::to_owned).collect(),
            _ => return Err(format!("unknown flag {flag}: use --engine, --worlds, --sizes or --ops").into()),
        }
    }
    Ok(options)
}

fn group(world: usize) -> Arc<Group> {
    Arc::new(Group { id: 0, ranks: (0..world).collect() })
}

/// Starts the processes of a world and waits until they have ended.
fn launch(options: &Options, world: usize) -> Result<(), Error> {
    let size = options.sizes.iter().copied().max().unwrap_or(0);
    let device = Device::cpu(0, 1, Arc::new(InProcess::new()));
    let mut memory = vec![Board::create(&[group(world)])?];
    for _ in 0..world {
        memory.push(device.shared_arena(2 * size)?);
    }
    let files: Vec<String> =
        memory.iter().filter_map(Arena::descriptor).map(|file| file.as_raw_fd().to_string()).collect();
    let mut children = Vec::new();
    for rank in 0..world {
        let config = format!("{rank} {} {}", std::process::id(), files.join(","));
        let command =
            Command::new(std::env::current_exe()?).args(std::env::args().skip(1)).env(CHILD_ENV, config).spawn();
        children.push(command?);
    }
    for mut child in children {
        let status = child.wait()?;
        if !status.success() {
            return Err(format!("a process of the world of size {world} ended with {status}").into());
        }
    }
    // Only the socket engines create this folder.
    let _ = std::fs::remove_dir(std::env::temp_dir().join(format!("shardflow-bench-{}-{world}", std::process::id())));
    Ok(())
}

/// Creates the rank's engine, of the kind that `options` selects.
fn join(options: &Options, config: &str) -> Result<Rank, Error> {
    let [rank, parent, files] = config.split(' ').collect::<Vec<_>>()[..] else {
        return Err("invalid child configuration".into());
    };
    let rank: usize = rank.parse()?;
    let size = options.sizes.iter().copied().max().unwrap_or(0);
    let map = |file: &str, bytes, access| -> Result<Arena, Error> {
        // The parent keeps the file open until this process ends.
        let path = format!("/proc/{parent}/fd/{file}");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Arena::map_peer(file.into(), bytes, access)?)
    };
    let files: Vec<&str> = files.split(',').collect();
    let group = group(files.len() - 1);
    let mut arenas = BTreeMap::new();
    for (i, file) in files[1..].iter().enumerate() {
        let access = if i == rank { Access::ReadWrite } else { Access::Read };
        arenas.insert(i, map(file, 2 * size, access)?);
    }
    let arena = arenas[&rank].clone();
    let engine: Box<dyn Collective> = match options.engine.as_str() {
        "on-node" => {
            let board = map(files[0], Board::bytes(std::slice::from_ref(&group)), Access::ReadWrite)?;
            Box::new(SharedMemory::new(board, std::slice::from_ref(&group), arenas)?)
        }
        engine @ ("unix" | "tcp") => {
            let folder = std::env::temp_dir().join(format!("shardflow-bench-{parent}-{}", group.ranks.len()));
            let channels = connect(&folder, rank, group.ranks.len(), engine == "tcp")?;
            Box::new(Wire::new(channels, Duration::from_secs(60)))
        }
        other => return Err(format!("unknown engine {other}: use on-node, unix or tcp").into()),
    };
    Ok(Rank { rank, group, engine, engine_name: options.engine.clone(), arena, y: size })
}

/// Connects each pair of ranks by Unix sockets in `folder`. If `tcp` is set, these sockets only set up TCP connections.
fn connect(folder: &Path, rank: usize, world: usize, tcp: bool) -> Result<BTreeMap<ChannelKey, Channel>, Error> {
    std::fs::create_dir_all(folder)?;
    let listener = UnixListener::bind(folder.join(rank.to_string()))?;
    let mut channels = BTreeMap::new();
    for peer in 0..rank {
        let began = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(folder.join(peer.to_string())) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > Duration::from_secs(10) => return Err(error.into()),
                Err(_) => std::thread::yield_now(),
            }
        };
        stream.write_all(&[rank as u8])?;
        let mut port = [0; 2];
        stream.read_exact(&mut port)?;
        let tcp = tcp.then(|| TcpStream::connect(("127.0.0.1", u16::from_le_bytes(port)))).transpose()?;
        channels.insert((0, rank, peer), tcp.map_or_else(|| Channel::Unix(stream), Channel::Tcp));
    }
    for _ in rank + 1..world {
        let (mut stream, _) = listener.accept()?;
        let mut peer = [0];
        stream.read_exact(&mut peer)?;
        let socket = TcpListener::bind("127.0.0.1:0")?;
        stream.write_all(&socket.local_addr()?.port().to_le_bytes())?;
        let tcp = tcp.then(|| socket.accept()).transpose()?;
        channels
            .insert((0, rank, peer[0].into()), tcp.map_or_else(|| Channel::Unix(stream), |(tcp, _)| Channel::Tcp(tcp)));
    }
    std::fs::remove_file(folder.join(rank.to_string()))?;
    Ok(channels)
}

impl Rank {
    fn run(&self, kind: CollectiveKind, x: Option<(usize, usize)>, y: Option<(usize, usize)>) {
        let call = CollectiveCall { group: self.group.clone(), member: self.rank, kind };
        let shapes = [x, y].map(|buffer| [buffer.map_or(0, |(_, elements)| elements)]);
        let view = |buffer: Option<(usize, usize)>, shape| {
            buffer.map(|(offset, _)| View::new("bench", &self.arena, offset, shape, DType::F32).expect("inside"))
        };
        let (x, y) = (view(x, &shapes[0]), view(y, &shapes[1]));
        self.engine.run(&call, x.as_slice(), y.as_slice()).expect("all members agree");
    }

    /// Runs one call of the collective `op` with `k` elements.
    fn op(&self, op: &str, k: usize, parts: &[Region]) {
        let (own, y) = (parts[self.rank].size[0], self.y);
        match op {
            "all_reduce" => self.run(CollectiveKind::AllReduce { op: ReduceOp::Sum }, Some((0, k)), Some((0, k))),
            "all_gather" => {
                self.run(CollectiveKind::AllGather { parts: parts.to_vec().into() }, Some((0, own)), Some((y, k)))
            }
            "reduce_scatter" => {
                let kind = CollectiveKind::ReduceScatter { op: ReduceOp::Sum, parts: parts.to_vec().into() };
                self.run(kind, Some((0, k)), Some((y, own)));
            }
            // Rank r holds row r of a matrix with rows of k elements, and receives column block r of the matrix.
            "all_to_all" => {
                let n = parts.len();
                let row = |i| Region { start: vec![i, 0], size: vec![1, k] };
                let column = |i: usize| Region { start: vec![0, parts[i].start[0]], size: vec![n, parts[i].size[0]] };
                let (sources, targets) = ((0..n).map(row).collect(), (0..n).map(column).collect());
                self.all_to_all(CollectiveKind::AllToAll { sources, targets }, k, own);
            }
            _ => {
                let (send, receive) =
                    (CollectiveKind::Send { to: 1 - self.rank }, CollectiveKind::Receive { from: 1 - self.rank });
                if self.rank == 0 {
                    self.run(send, Some((0, k)), None);
                    self.run(receive, None, Some((y, k)));
                } else {
                    self.run(receive, None, Some((y, k)));
                    self.run(send, Some((0, k)), None);
                }
            }
        }
    }

    fn all_to_all(&self, kind: CollectiveKind, k: usize, own: usize) {
        let call = CollectiveCall { group: self.group.clone(), member: self.rank, kind };
        let (x, y) = ([1, k], [self.group.ranks.len(), own]);
        let x = View::new("bench", &self.arena, 0, &x, DType::F32).expect("inside");
        let y = View::new("bench", &self.arena, self.y, &y, DType::F32).expect("inside");
        self.engine.run(&call, &[x], &[y]).expect("all members agree");
    }

    fn barrier(&self) {
        self.run(CollectiveKind::AllReduce { op: ReduceOp::Sum }, Some((0, 0)), Some((0, 0)));
    }

    fn measure(&self, op: &str, bytes: usize) -> Result<(), Error> {
        let n = self.group.ranks.len();
        let k = bytes / 4 / n * n;
        let part = |i| {
            let range = split_range(k, n, i);
            Region { start: vec![range.start], size: vec![range.len()] }
        };
        let parts: Vec<Region> = (0..n).map(part).collect();
        self.arena.write_host(0, &HostTensor::f32(&[k], vec![1.0; k]))?;
        (0..5).for_each(|_| self.op(op, k, &parts));
        self.barrier();
        let time = |_| {
            let began = Instant::now();
            self.op(op, k, &parts);
            began.elapsed().as_secs_f64()
        };
        let mut times: Vec<f64> = (0..((1 << 27) / bytes.max(1)).clamp(12, 400)).map(time).collect();
        self.barrier();
        times.sort_by(f64::total_cmp);
        let pair = if op == "send" { 2.0 } else { 1.0 };
        let (median, p10) = (times[times.len() / 2] / pair, times[times.len() / 10] / pair);
        let share = (n - 1) as f64 / n as f64;
        let factor = if op == "all_reduce" {
            2.0 * share
        } else if op == "send" {
            1.0
        } else {
            share
        };
        let bandwidth = bytes as f64 / median / 1e9;
        if self.rank == 0 {
            println!(
                "{{\"bench\": \"collectives\", \"backend\": \"shardflow {}\", \"op\": \"{op}\", \"world\": {n}, \
                 \"bytes\": {bytes}, \"us\": {:.2}, \"p10_us\": {:.2}, \"algbw_GBps\": {bandwidth:.4}, \
                 \"busbw_GBps\": {:.4}}}",
                self.engine_name,
                median * 1e6,
                p10 * 1e6,
                bandwidth * factor
            );
        }
        Ok(())
    }
}

fn main() -> Result<(), Error> {
    let options = options()?;
    let Ok(config) = std::env::var(CHILD_ENV) else {
        return options.worlds.iter().try_for_each(|&world| launch(&options, world));
    };
    let rank = join(&options, &config)?;
    for &bytes in &options.sizes {
        for op in options.ops.iter().filter(|op| op.as_str() != "send" || rank.group.ranks.len() == 2) {
            rank.measure(op, bytes)?;
        }
    }
    Ok(())
}
