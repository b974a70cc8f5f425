//! Cases of the test `cuda`: which member waits for which other member, and for how long.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow_kernels::clock::Stamped;
use shardflow_kernels::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait, ReduceOp};
use shardflow_kernels::cuda::gpu::Gpu;
use shardflow_kernels::cuda::nccl::{GroupMember, Nccl, Pipe, UniqueId};
use shardflow_kernels::cuda::shared_gpu::SharedGpu;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::{Launch, Op, Program};
use shardflow_kernels::stream::Submission;
use shardflow_kernels::tensor::{DType, HostTensor};

use super::{WITHIN, floats, gpus};

fn memberships(gpus: &[Arc<Gpu>; 2]) -> [GroupMember; 2] {
    let (group, id) = (Arc::new(Group { id: 7, ranks: vec![0, 1].into() }), UniqueId::new().expect("an id"));
    [0, 1].map(|member: usize| GroupMember { group: group.clone(), member, gpu: gpus[member].clone(), id })
}

/// The time that a stream has spent in collectives grows during a collective, and stays constant afterwards.
pub fn time() {
    let gpus: [_; 2] = gpus().try_into().expect("two devices");
    let nccl = Nccl::join(&memberships(&gpus), WITHIN).expect("both members join");
    for engine in [Arc::new(nccl) as Arc<dyn Collective>, Arc::new(SharedGpu::new())] {
        let devices = [0, 1].map(|rank: usize| Device::cuda(rank, gpus[rank].clone(), engine.clone()));
        let streams = devices.each_ref().map(|device| device.stream("reduce", 1).expect("a stream"));
        let arenas = devices.each_ref().map(|device| device.arena(256).expect("memory"));
        let submit = |member: usize| {
            let (x, kind) = (floats(0, &[2]), CollectiveKind::AllReduce { op: ReduceOp::Sum });
            let group = Arc::new(Group { id: 7, ranks: vec![0, 1].into() });
            let op = Op::Collective(CollectiveCall { group, member, kind });
            let mut launch = Launch { op, reads: vec![x.clone()], writes: vec![x], accumulate: false, workspace: None };
            let bytes = devices[member].kind().workspace_bytes(&launch);
            launch.workspace = Some(floats(64, &[bytes.div_ceil(4)]));
            let program = Arc::new(Program { name: "reduce".to_owned(), launches: vec![launch], signals: vec![] });
            let bases = vec![Base { arena: arenas[member].clone(), offset: 0 }];
            let submission = Submission { program, bases, repeat: false, notify: Box::new(drop) };
            streams[member].submit(submission).expect("a live stream");
        };
        let mut time_min = Duration::ZERO;
        for _ in 0..3 {
            // The time must grow by this much while the collective waits for the other member's call.
            time_min += Duration::from_millis(3);
            let other = streams[1].collective_time();
            submit(0);
            let deadline = Instant::now() + WITHIN;
            while streams[0].collective_time() < time_min && Instant::now() < deadline {
                std::thread::yield_now();
            }
            if streams[0].collective_time() < time_min {
                engine.abort("the collective's time does not grow");
                panic!("the collective's time stays at {:?}", streams[0].collective_time());
            }
            assert_eq!(streams[1].collective_time(), other, "the time of a member without a call grew");
            submit(1);
            streams.iter().for_each(|stream| stream.synchronize().expect("a live stream"));
            let stable_time = || {
                let first = streams[0].collective_time();
                std::thread::yield_now();
                (streams[0].collective_time() == first).then_some(first)
            };
            while stable_time().is_none() {
                assert!(Instant::now() < deadline, "the time still grows after the end of the collective");
            }
            assert!(streams[0].collective_time() >= time_min);
        }
        wait_for_pollers_to_park();
    }
}

/// Returns once the pollers have parked. A thread that polls every 50 us is switched out 100 times in 5 ms.
fn wait_for_pollers_to_park() {
    let context_switches = || {
        let threads = std::fs::read_dir("/proc/self/task").expect("Linux").flatten().map(|thread| thread.path());
        let is_poller = |thread: &PathBuf| {
            std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim().ends_with("poller"))
        };
        let switches = |thread: PathBuf| {
            let status = std::fs::read_to_string(thread.join("status")).expect("a live thread");
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            count.and_then(|count| count.trim().parse::<u64>().ok()).expect("a number")
        };
        let counts: Vec<u64> = threads.filter(is_poller).map(switches).collect();
        assert_eq!(counts.len(), 2);
        counts
    };
    let deadline = Instant::now() + WITHIN;
    loop {
        let (before, began) = (context_switches(), Instant::now());
        while began.elapsed() < Duration::from_millis(5) {
            std::thread::yield_now();
        }
        if context_switches() == before {
            return;
        }
        assert!(Instant::now() < deadline, "pollers have nothing pending and do not park");
    }
}

/// Tests that a pipe is connected before its first use, and reports which of its members waits for which other member.
pub fn pipe() {
    let gpus = [0, 1].map(|i| Gpu::open(i).expect("a device"));
    let memberships = memberships(&gpus);
    let engine = Arc::new(Nccl::join(&memberships, WITHIN).expect("both members join"));
    let pipes = [0, 1].map(|member: usize| engine.pipe(&memberships[member]).expect("a pipe"));
    let start = Stamped::new(());
    let connect = |pipe: &Pipe| {
        start.get();
        pipe.connect(WITHIN).expect("the other end connects");
        Stamped::new(())
    };
    let ends = std::thread::scope(|scope| {
        let ends = pipes.each_ref().map(|pipe| scope.spawn(|| connect(pipe)));
        ends.map(|end| end.join().expect("no panic"))
    });
    ends.iter().for_each(|end| *end.get());
    let device = |rank: usize| Device::cuda(rank, gpus[rank].clone(), engine.clone());
    let arenas = [0, 1].map(|rank| device(rank).arena(64).expect("memory"));
    arenas[0].write_host(0, &HostTensor::f32(&[16], vec![1.5; 16])).expect("inside");
    let wait_until_waits_are = |expected: &[MemberWait]| {
        let deadline = Instant::now() + WITHIN;
        while engine.waits() != expected {
            assert!(Instant::now() < deadline, "got {:?}, expected {expected:?}", engine.waits());
            std::thread::yield_now();
        }
    };
    wait_until_waits_are(&[]);
    pipes[0].send(&arenas[0], [(0, 64)].into_iter()).expect("a send");
    let sent = pipes[0].settle(&arenas[0]).expect("the send is on the stream");
    wait_until_waits_are(&[MemberWait { group: 7, rank: 0, peer: 1 }]);
    pipes[1].receive(&arenas[1], [(0, 64)].into_iter()).expect("the sent bytes");
    pipes[0].wait(&sent).expect("the end");
    wait_until_waits_are(&[]);
    assert_eq!(arenas[1].read_host(0, &[16], DType::F32).expect("inside").as_f32(), Some(&[1.5; 16][..]));
}
