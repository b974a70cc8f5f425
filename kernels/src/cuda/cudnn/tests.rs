//! Checks the graphs that cuDNN receives. One test, which is run by hand, passes the graphs to NVIDIA's library.

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendDescriptorType_t as Kind, cudnnDataType_t,
    cudnnPointwiseMode_t::CUDNN_POINTWISE_BINARY_SELECT,
};

use super::descriptor::{Descriptor, Values};
use super::graph::{Node, Storage};
use super::*;

fn attention_shape(pass: Pass, [batch, time, heads, depth]: [usize; 4]) -> AttentionShape {
    AttentionShape { pass, batch, time, heads, depth, scale: 0.125 }
}

#[test]
fn only_some_architectures_have_an_engine_with_a_fixed_order() {
    let engine = |capability, version| ordered_engine(capability, version).map(|pin| pin.engine);
    assert_eq!([(9, 0), (10, 0), (8, 0)].map(|capability| engine(capability, 92_800)), [Some(6), None, None]);
    assert_eq!(engine((9, 0), 92_400), None);
}

/// Every virtual tensor is written once, before any read; every buffer occurs once; workspace tensors do not overlap.
#[test]
fn graphs_write_each_tensor_before_they_read_it() {
    for pass in [Pass::Forward, Pass::Backward] {
        let graph = Graph::of(&attention_shape(pass, [2, 3, 5, 8]));
        let mut is_written = vec![false; graph.tensors.len()];
        for node in &graph.nodes {
            let (reads, write) = match node {
                Node::Matmul { a, b, c } => (vec![*a, *b], *c),
                Node::Pointwise { x, b, t, y, .. } => ([Some(*x), *b, *t].into_iter().flatten().collect(), *y),
                Node::Reduce { x, y, .. } | Node::Transpose { x, y } => (vec![*x], *y),
            };
            let computed = |id: usize| matches!(graph.tensors[id].storage, Storage::Virtual | Storage::Workspace(_));
            assert!(reads.iter().all(|&id| is_written[id] || !computed(id)), "{node:?}");
            assert!(!std::mem::replace(&mut is_written[write], true), "{node:?}");
        }
        let tensors = |select: fn(&Storage) -> bool| graph.tensors.iter().filter(move |tensor| select(&tensor.storage));
        assert!(graph.tensors.iter().zip(&is_written).all(|(t, written)| *written || t.storage != Storage::Virtual));
        let buffers = if pass == Pass::Forward { 5 } else { 9 };
        assert_eq!(tensors(|storage| matches!(storage, Storage::Buffer(_))).count(), buffers);
        let is_mask = |node: &&Node| matches!(node, Node::Pointwise { mode: CUDNN_POINTWISE_BINARY_SELECT, .. });
        assert_eq!(graph.nodes.iter().filter(is_mask).count(), 1);
        let scores = tensors(|storage| *storage != Storage::Virtual).filter(|tensor| tensor.dims[2..] == [3, 3]);
        assert_eq!(scores.count(), 0, "scores are stored in memory");
        let mut end = 0;
        for tensor in tensors(|storage| matches!(storage, Storage::Workspace(_))) {
            let Storage::Workspace(start) = tensor.storage else { continue };
            assert!(start >= end && tensor.data == cudnnDataType_t::CUDNN_DATA_FLOAT);
            end = start + 4 * tensor.dims.iter().product::<i64>() as usize;
        }
        assert!(end <= graph.workspace_bytes);
        let shape = attention_shape(pass, [2, 3, 5, 8]);
        assert_eq!(graph.workspace_bytes + shape.library_bytes(), shape.workspace_bytes(), "wrong workspace size");
    }
}

/// The device description that NVIDIA's library receives for this architecture.
fn device_description(architecture: usize) -> String {
    let shared = match architecture {
        80 => 166_912,
        90 | 100 => 232_448,
        _ => 101_376,
    };
    format!(
        "{{\"deviceVer\":{},\"multiProcessorCount\":108,\"smCountOrigin\":0,\"warpSize\":32,\
         \"maxSharedMemoryPerBlock\":49152,\"maxSharedMemoryPerBlockOptin\":{},\
         \"reservedSharedMemoryPerBlock\":1024,\"oversizedSharedMemoryPerBlock\":0,\"memoryBusWidth\":5120,\
         \"maxRegistersPerSM\":65536,\"maxCtasPerSM\":32,\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":2048,\
         \"regsPerBlock\":65536,\"totalGlobalMem\":42949672960,\"smClockRateKHz\":1410000,\"l2CacheSize\":41943040,\
         \"maxBlockSize\":[1024,1024,64],\"memClockRateKHz\":1215000,\"maxGridSize\":[2147483647,65535,65535],\
         \"supportCoopLaunch\":1,\"pciDeviceId\":0,\"isTccDriver\":0,\"cudaDeviceId\":0,\"driverVer\":13000,\
         \"deviceName\":\"sm_{architecture}\"}}",
        architecture * 10,
        shared,
    )
}

/// Compiles the engines' kernels for GPUs that the machine lacks. A stub of the driver answers all calls.
#[test]
#[ignore = "needs NVIDIA's cuDNN: run kernels/cuda/check_cudnn.py"]
fn nvidias_library_creates_plans_for_our_graphs() {
    const SHAPES: [[usize; 4]; 9] = [
        [1, 2, 1, 8],
        [2, 3, 2, 8],
        [1, 17, 3, 16],
        [1, 65, 1, 24],
        [3, 70, 2, 16],
        [1, 130, 2, 72],
        [1, 1000, 12, 64],
        [8, 1024, 12, 64],
        [2, 2048, 16, 128],
    ];
    let api = Api::get().expect("cuDNN is installed");
    println!("cuDNN {}", api.version());
    for architecture in [80, 90, 100, 120] {
        let description = device_description(architecture);
        let attributes = [(Attribute::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, Values::Text(description.as_bytes()))];
        let device = Descriptor::finalized(api, Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &attributes, "a device");
        let device = device.expect("cuDNN accepts the device description");
        let capability = (architecture as i32 / 10, architecture as i32 % 10);
        let pins = [(Pass::Forward, None), (Pass::Backward, None)].into_iter();
        for (pass, pin) in pins.chain(ordered_engine(capability, api.number()).map(|pin| (Pass::Backward, Some(pin)))) {
            for shape in SHAPES {
                let attention = attention_shape(pass, shape);
                // The workspace limit is the same as for a launch.
                let (graph, bytes_max) = (Graph::of(&attention), attention.workspace_bytes());
                let plan = Plan::new(api, Target::Described([&device]), graph, pin, bytes_max, "a plan");
                plan.unwrap_or_else(|error| panic!("sm_{architecture}, {pass:?} {shape:?}: {error}"));
            }
            let kind = if pin.is_some() { "fixed order" } else { "heuristic" };
            println!("sm_{architecture} {pass:?} {kind}: plans created");
        }
        let unsupported = Graph::of(&attention_shape(Pass::Forward, [1, 64, 1, 12]));
        let refused = Plan::new(api, Target::Described([&device]), unsupported, None, usize::MAX, "heads of 12");
        assert!(refused.is_err(), "sm_{architecture}: {refused:?}");
    }
}
