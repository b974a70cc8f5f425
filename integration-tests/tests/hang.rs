//! `explain-hang` queries a training from outside while one of its steps is stuck.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shardflow::graph::builder::Layout;
use shardflow::graph::{AdamW, CustomOp, Graph, Var};
use shardflow::layout_error::LayoutError;
use shardflow::nn::{self, Parallel};
use shardflow::passes::compile;
use shardflow::placement::Mesh;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::sbp::rule::Rule;
use shardflow::session::{Session, SessionOptions};
use shardflow::watch::{Watch, client};
use shardflow_integration_tests::training::{LEARNING_RATE, options, within};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::op::{CpuArgs, CpuSlice, CpuSliceMut, CustomKernel};
use shardflow_kernels::tensor::{DType, HostTensor, Region};

const BATCH: usize = 8;
/// Much longer than any wait here.
const PATIENCE: Duration = Duration::from_secs(30);

/// A gate that blocks the kernels of one shard while it is closed.
#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.closed.lock() = closed;
        self.opened.notify_all();
    }
}

/// An op that copies its input. In the forward or in the backward pass, the shard that starts at this row and column
/// waits at the gate.
#[derive(Clone, Debug)]
struct Gated {
    gate: Arc<Gate>,
    row: usize,
    column: usize,
    backward: bool,
}

#[derive(Debug)]
struct GatedKernel(Option<Arc<Gate>>);

impl CustomOp for Gated {
    fn name(&self) -> &str {
        "gated"
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("btc->btc")
    }

    fn kernel(&self, inputs: &[Region], _: &[Region]) -> Arc<dyn CustomKernel> {
        let start = &inputs[0].start;
        let is_here = !self.backward && (start[0], start[2]) == (self.row, self.column);
        Arc::new(GatedKernel(is_here.then(|| self.gate.clone())))
    }

    fn backward(&self, graph: &mut Graph, _: &[Var], _: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>> {
        let op = Arc::new(Self { backward: !self.backward, ..self.clone() });
        grads.iter().map(|grad| grad.map(|grad| graph.custom(op.clone(), &[grad])[0])).collect()
    }
}

impl CustomKernel for GatedKernel {
    fn name(&self) -> &str {
        "gated"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        if let Some(gate) = &self.0 {
            gate.opened.wait_while(&mut gate.closed.lock(), |closed| *closed);
        }
        let (CpuSlice::F32(from), CpuSliceMut::F32(to)) = (&args.reads[0].data, &mut args.writes[0].data) else {
            return Err(KernelError::arguments("gated", "element type", "floats", "integers"));
        };
        to.copy_from_slice(from);
        Ok(())
    }
}

/// Starts two linear layers with the gate between them. If the mesh has an axis `stage`, the layers are on two stages.
/// If the mesh has an axis `tensor`, it splits the layers.
fn start(mesh: &str, op: Gated) -> Session {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let staged = g.mesh().axis("stage").is_ok();
    let layout: Layout = nn::batch_layout(&g);
    if staged {
        g.place_at("stage", 0);
    }
    let ids = g.input("ids", &[BATCH, 3], DType::I32, layout.clone());
    let x = nn::embedding(&mut g, "table", ids, 5, 4, Parallel::Replicated);
    if staged {
        g.place_at("stage", 1);
    }
    let split = g.mesh().axis("tensor").is_ok();
    let (column, row) = if split { (Parallel::Column("tensor"), Parallel::Row("tensor")) } else { Default::default() };
    let x = nn::linear(&mut g, "first", x, 4, column);
    let x = g.custom(Arc::new(op), &[x])[0];
    let logits = nn::linear(&mut g, "last", x, 5, row);
    let targets = g.input("targets", &[BATCH, 3], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
    let plan = compile(g, &options(2, OneFOneB)).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
    Session::start(plan, &SessionOptions::default()).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"))
}

fn step(session: &mut Session) {
    let tokens = || HostTensor::i32(&[BATCH, 3], (0..BATCH as i32 * 3).map(|i| i % 5).collect());
    session.step(&[("ids", tokens()), ("targets", tokens())], LEARNING_RATE).expect("a step");
}

#[test]
fn a_hang_report_names_the_cause_and_the_wait_chain() {
    within(120, || {
        let watch = Watch::listen("127.0.0.1:0".parse().expect("an address")).expect("a server");
        let explain = || client::explain_hang(watch.address()).expect("a session").reports.pop().expect("a report");
        assert!(client::explain_hang(watch.address()).expect_err("no session").to_string().contains("503"));
        // The mesh, the gated shard's first row (in a micro-batch) and first column, and the blocked action.
        for (mesh, row, column, culprit) in [
            ("data=1", 0, 0, "device 0 compute forward"),
            ("data=2", 2, 0, "device 1 compute forward"),
            ("stage=2", 0, 0, "device 1 compute backward"),
            ("data=2,stage=2", 2, 0, "device 3 compute forward"),
            // The other device waits for the blocked device inside a collective that both devices have started.
            ("tensor=2", 0, 2, "device 1 compute forward"),
            ("tensor=2", 0, 2, "device 1 compute backward"),
            ("tensor=2", 0, 0, "device 0 compute backward"),
        ] {
            let gate = Arc::new(Gate::default());
            let mut session =
                start(mesh, Gated { gate: gate.clone(), row, column, backward: culprit.ends_with("backward") });
            watch.show(&session);
            step(&mut session);
            assert_eq!(explain().cause, None, "{mesh}: between steps");
            gate.set(true);
            thread::scope(|scope| {
                let stepping = scope.spawn(|| step(&mut session));
                let (until, wanted) =
                    (Instant::now() + PATIENCE, format!("{culprit} has not ended, and waits for no other action"));
                // Poll until all other actions wait.
                let report = loop {
                    let report = explain();
                    if report.cause.as_deref() == Some(&wanted) && report.idle_seconds > 0.2 {
                        break report;
                    }
                    assert!(Instant::now() < until, "{mesh}: {report}");
                    thread::yield_now();
                };
                assert_eq!((report.process, &report.elsewhere[..]), (0, &[][..]));
                assert!(report.chain.last().is_none_or(|(_, state)| state.contains(&culprit[..8])), "{report}");
                let status = client::status(watch.address()).expect("a session");
                let held = status.actors.iter().find(|actor| culprit.starts_with(&actor.name)).expect("an actor");
                assert_eq!(held.now, format!("{culprit} is in flight"));
                assert!(held.now_seconds > 0.2 && status.idle_seconds > 0.2, "{status}");
                gate.set(false);
                stepping.join().expect("the step continues");
            });
            session.shutdown().unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
        }
    });
}
