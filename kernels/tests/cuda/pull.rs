//! A case of the test `cuda`: one GPU copies regions from another GPU.

use std::sync::Arc;

use shardflow_kernels::collective::Collective;
use shardflow_kernels::cuda::shared_gpu::SharedGpu;
use shardflow_kernels::device::Device;
use shardflow_kernels::op::{Buffer, Launch, Op, Program};
use shardflow_kernels::stream::Notification;
use shardflow_kernels::tensor::{DType, HostTensor, Region, element_count};

use super::{floats, gpus, submit_on};

/// Copies regions from another GPU's memory.
pub fn run() {
    let gpus = gpus();
    let engine: Arc<dyn Collective> = Arc::new(SharedGpu::new());
    let [device, other] = [0, 1].map(|rank| Device::cuda(rank, gpus[rank].clone(), engine.clone()));
    let (stream, arena) = (device.stream("pull", 1).expect("a stream"), device.arena(4096).expect("memory"));
    let source = other.arena(4096).expect("memory");
    // In order: some columns; some columns of some planes; whole rows, which are contiguous.
    for (from, start, to, target_start, size) in [
        (vec![9, 10], vec![2, 3], vec![7, 6], vec![1, 2], vec![5, 4]),
        (vec![5, 4, 10], vec![1, 1, 3], vec![3, 3, 5], vec![0, 1, 0], vec![3, 2, 5]),
        (vec![9, 10], vec![2, 0], vec![7, 10], vec![1, 0], vec![5, 10]),
    ] {
        let values: Vec<f32> = (0..element_count(&from)).map(|i| i as f32 + 1.0).collect();
        source.write_host(0, &HostTensor::f32(&from, values.clone())).expect("inside");
        arena.write_host(0, &HostTensor::f32(&to, vec![0.0; element_count(&to)])).expect("inside");
        let [src, dst] =
            [(start, &size), (target_start, &size)].map(|(start, size)| Region { start, size: size.clone() });
        let mut expected = vec![0.0; element_count(&to)];
        let runs = src.runs(&from).into_iter().flatten().zip(dst.runs(&to).into_iter().flatten());
        runs.for_each(|(i, j)| expected[j] = values[i]);
        let (op, write) = (Op::CopyRegion { src, dst }, Buffer { base: 1, ..floats(0, &to) });
        let (reads, writes) = (vec![floats(0, &from)], vec![write]);
        let launches = vec![Launch { op, reads, writes, accumulate: false, workspace: None }];
        let program = Arc::new(Program { name: "pull".to_owned(), launches, signals: vec![] });
        assert_eq!(submit_on(&stream, &program, &[&source, &arena]).expect("a live stream"), [Notification::Done]);
        assert_eq!(arena.read_host(0, &to, DType::F32).expect("inside"), HostTensor::f32(&to, expected));
    }
}
