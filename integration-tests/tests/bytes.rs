//! The bytes that collectives deliver to each device in a step match the plan.

use std::collections::BTreeMap;

use shardflow::boxing::step::StepKind;
use shardflow::graph::NodeOp;
use shardflow::plan::BaseKey;
use shardflow::plan::instance::Instance;
use shardflow_actors::label::Role;
use shardflow_integration_tests::training::{Model, ONE, options, within};
use shardflow_kernels::collective::CollectiveKind;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::{element_count, split_range};

/// Returns the bytes that each device receives from collectives in a step, except the bytes of clipping. The numbers
/// follow from the layout changes in the graph and from the sizes of the gradient buckets.
fn predicted(plan: &Instance) -> Vec<u64> {
    let mut bytes = vec![0; plan.device_count()];
    for node in plan.graph.nodes() {
        let NodeOp::Boxing(step) = &node.op else { continue };
        if step.kind == StepKind::Transfer {
            // Transfers are copies on the reader's stream, not collectives.
            continue;
        }
        let rate = node.rate;
        assert_eq!(plan.graph.tensor(node.outputs[0]).rate, rate);
        let firings = rate.per_step(plan.micro_batches) as u64;
        for (index, device) in step.to.placement.devices().iter().enumerate() {
            bytes[*device] += firings * step.bytes_received(index) as u64;
        }
    }
    for (device, received) in buckets(plan) {
        bytes[device] += received;
    }
    bytes
}

/// For each device, returns the bytes that it receives from all-reduces of gradient buckets. A bucket is a whole
/// register slot. In a group of n members, each member receives `(n - 1) * own chunk + (all - own chunk)` elements.
fn buckets(plan: &Instance) -> BTreeMap<usize, u64> {
    let mut bytes = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.values().zip(plan.actions.values()) {
        for (action, spec) in actions.iter().zip(&actor.actions) {
            let calls = matches!(action.launches.first().map(|launch| &launch.op), Some(Op::Collective(_)));
            if spec.label.role != Role::Communication || !calls {
                continue;
            }
            assert_eq!(spec.per_step, 1);
            for launch in &action.launches {
                let Op::Collective(call) = &launch.op else { panic!("a bucket is one collective") };
                assert!(matches!(call.kind, CollectiveKind::AllReduce { .. }), "{call:?}");
                let BaseKey::Input(port) = action.bases[launch.reads[0].base] else { panic!("a bucket reads a slot") };
                let slot = plan.register_place(spec.inputs[port].register).stride;
                assert_eq!(slot, element_count(&launch.reads[0].shape) * 4, "the bucket is the whole slot");
                let (all, members) = (slot / 4, call.group.ranks.len());
                let chunk = split_range(all, members, call.member).len();
                *bytes.entry(actor.device).or_default() += 4 * ((members - 1) * chunk + all - chunk) as u64;
            }
        }
    }
    bytes
}

fn check(mesh: &'static str, micro_batches: usize) -> Vec<u64> {
    within(60, move || {
        let model = Model::default();
        let mut session = model.session(mesh, &options(micro_batches, shardflow::plan::Schedule::OneFOneB));
        let want = predicted(session.plan());
        let counted = |s: &shardflow::session::Session| {
            s.metrics().devices.iter().map(|d| d.collective_bytes).collect::<Vec<_>>()
        };
        for step in 1..=3 {
            model.step(&mut session);
            let want: Vec<u64> = want.iter().map(|b| b * step).collect();
            assert_eq!(counted(&session), want, "mesh {mesh}, after {step} steps");
        }
        want
    })
}

#[test]
fn a_device_and_a_pipeline_of_single_devices_run_no_collective() {
    assert_eq!(check(ONE, 2), [0]);
    assert_eq!(check("stage=2", 2), [0, 0]);
}

/// Gradients are reduced once per step, for any number of micro-batches. With two devices, each device receives half of
/// the gradients in the reduce-scatter, and half of them in the all-gather of an all-reduce.
#[test]
fn data_parallelism_reduces_gradients_once_per_step() {
    let bytes = check("data=2", 1);
    assert_eq!(bytes, check("data=2", 4));
    let model = Model::default();
    let parameters: usize = {
        let plan = model.plan(ONE, &options(1, shardflow::plan::Schedule::OneFOneB));
        plan.graph.parameters().iter().map(|p| element_count(plan.graph.shape(*p))).sum()
    };
    let min = 4 * parameters as u64;
    for device in bytes {
        assert!(device >= min && device < min + 4096, "got {device} bytes, expected {min} to {}", min + 4095);
    }
}

#[test]
fn tensor_parallelism_receives_activations_in_each_micro_batch() {
    let bytes = check("tensor=2", 2);
    assert!(bytes.iter().all(|b| *b > 0));
    check("tensor=3", 1);
}

#[test]
fn data_and_tensor_parallelism_receive_both() {
    check("data=2,tensor=2", 1);
    check("data=2,tensor=2", 3);
    check("data=2,stage=2,tensor=2", 2);
}
