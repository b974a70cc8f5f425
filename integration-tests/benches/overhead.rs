//! Measures the share of a step's time that is not spent in kernels. Steps of a session alternate with direct runs of
//! the same launches on one stream.
//!
//! Command: `cargo bench -p shardflow-integration-tests --bench overhead [-- THREADS]`

use std::sync::Arc;
use std::sync::mpsc::channel;

use shardflow::plan::BaseKey;
use shardflow::plan::instance::Instance;
use shardflow::session::{Session, SessionOptions};
use shardflow_actors::spec::StreamKind;
use shardflow_integration_tests::default_model;
use shardflow_integration_tests::measure::{median, timed};
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::Program;
use shardflow_kernels::stream::{Notification, Stream, Submission};

const ROUNDS: usize = 60;

/// Returns the programs of the compute actor with their base addresses. Every register has one slot.
fn bound_programs(plan: &Instance, arena: &Arena) -> Vec<(Arc<Program>, Vec<Base>)> {
    let mut out = Vec::new();
    for (actor, actions) in plan.spec.actors.values().zip(plan.actions.values()) {
        let is_compute = actor.stream == StreamKind::Compute;
        for (action, spec) in actions.iter().zip(&actor.actions).filter(|_| is_compute) {
            let scratch = plan.memory(0).scratch.get(&actor.stream).map_or(0, |scratch| scratch.0);
            let offset = |base: &BaseKey| match base {
                BaseKey::Fixed => 0,
                BaseKey::Scratch => scratch,
                BaseKey::Staging => panic!("only actions of the host have staging memory"),
                BaseKey::Input(port) => plan.register_place(spec.inputs[*port].register).offset,
                BaseKey::Output(port) => plan.register_place(spec.outputs[*port].register).offset,
            };
            let bases = action.bases.iter().map(|b| Base { arena: arena.clone(), offset: offset(b) }).collect();
            let program = Program { name: action.name.clone(), launches: action.launches.clone(), signals: Vec::new() };
            out.push((Arc::new(program), bases));
        }
    }
    out
}

/// Runs one step's launches without a session.
fn run_directly(stream: &Stream, programs: &[(Arc<Program>, Vec<Base>)]) {
    let (sender, receiver) = channel();
    for (program, bases) in programs {
        let (program, bases, sender) = (program.clone(), bases.clone(), sender.clone());
        let notify = Box::new(move |notice| drop(sender.send(notice)));
        stream.submit(Submission { program, bases, repeat: false, notify }).expect("the stream is open");
    }
    for _ in programs {
        assert_eq!(receiver.recv(), Ok(Notification::Done));
    }
}

fn main() {
    let threads = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(1);
    let plan = default_model::plan(threads).instance();
    let device = Device::cpu(0, threads, Arc::new(InProcess::new()));
    let stream = device.stream("direct", threads).expect("a thread");
    let arena = device.arena(plan.memory(0).arena_bytes).expect("memory");
    let programs = bound_programs(&plan, &arena);
    let mut session = Session::start((*plan.plan).clone(), &SessionOptions::default()).expect("a session");
    let (mut session_seconds, mut direct_seconds) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS + 5 {
        let pair = (timed(|| default_model::step(&mut session)), timed(|| run_directly(&stream, &programs)));
        if round >= 5 {
            session_seconds.push(pair.0);
            direct_seconds.push(pair.1);
        }
    }
    let [session_seconds, direct_seconds] =
        [session_seconds, direct_seconds].map(|seconds| median(seconds).expect("rounds"));
    println!(
        "{threads} threads: a step takes {:.2} ms, its kernels {:.2} ms: {:.1} % outside kernels",
        session_seconds * 1e3,
        direct_seconds * 1e3,
        100.0 * (1.0 - direct_seconds / session_seconds)
    );
}
