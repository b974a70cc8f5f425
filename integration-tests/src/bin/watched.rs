//! A training for tests of monitoring: `watched ADDRESS MESH gpipe|1f1b MICRO_BATCHES MILLISECONDS`. Every stage takes
//! MILLISECONDS for the forward pass of a micro-batch, and the same time for its backward pass. This time does not
//! depend on the machine's load, because the kernels wait for a timer. The line `close` on standard input blocks the
//! forward pass of the last stage, and the line `open` unblocks it. The end of the input ends the training.

use std::io::BufRead;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use shardflow::graph::{AdamW, CustomOp, Graph, Var};
use shardflow::layout_error::LayoutError;
use shardflow::nn::{self, Parallel};
use shardflow::passes::{CompileOptions, compile};
use shardflow::placement::Mesh;
use shardflow::plan::Schedule;
use shardflow::sbp::rule::Rule;
use shardflow::session::{Session, SessionOptions};
use shardflow::watch::Watch;
use shardflow_integration_tests::training::{LEARNING_RATE, options};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::op::{CpuArgs, CpuSlice, CpuSliceMut, CustomKernel};
use shardflow_kernels::tensor::{DType, HostTensor, Region};

const CONTEXT: usize = 3;
const VOCABULARY: usize = 5;
const WIDTH: usize = 4;

/// A gate that blocks kernels while it is closed.
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

    fn pass(&self) {
        self.opened.wait_while(&mut self.closed.lock(), |closed| *closed);
    }
}

/// An op that copies its input after a delay. If it has a gate, it also waits while the gate is closed.
#[derive(Clone, Debug)]
struct Paced {
    delay: Duration,
    gate: Option<Arc<Gate>>,
}

impl CustomOp for Paced {
    fn name(&self) -> &str {
        "paced"
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("btc->btc")
    }

    fn kernel(&self, _: &[Region], _: &[Region]) -> Arc<dyn CustomKernel> {
        Arc::new(self.clone())
    }

    fn backward(&self, g: &mut Graph, _: &[Var], _: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>> {
        let back = Self { gate: None, ..self.clone() };
        vec![grads[0].map(|grad| g.custom(Arc::new(back), &[grad])[0])]
    }
}

impl CustomKernel for Paced {
    fn name(&self) -> &str {
        "paced"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        self.gate.iter().for_each(|gate| gate.pass());
        thread::sleep(self.delay);
        let (CpuSlice::F32(from), CpuSliceMut::F32(to)) = (&args.reads[0].data, &mut args.writes[0].data) else {
            return Err(KernelError::arguments("paced", "element type", "floats", "integers"));
        };
        to.copy_from_slice(from);
        Ok(())
    }
}

fn graph(mesh: &str, batch: usize, delay: Duration, gate: &Arc<Gate>) -> Graph {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let stages = g.mesh().axes().iter().find(|axis| axis.name == "stage").map_or(1, |axis| axis.size);
    let layout = nn::batch_layout(&g);
    let mut x = None;
    for stage in 0..stages {
        if stages > 1 {
            g.place_at("stage", stage);
        }
        let from = x.unwrap_or_else(|| {
            let ids = g.input("ids", &[batch, CONTEXT], DType::I32, layout.clone());
            nn::embedding(&mut g, "table", ids, VOCABULARY, WIDTH, Parallel::Replicated)
        });
        let gate = (stage + 1 == stages).then(|| gate.clone());
        x = Some(g.custom(Arc::new(Paced { delay, gate }), &[from])[0]);
    }
    let logits = nn::linear(&mut g, "last", x.expect("a stage"), VOCABULARY, Parallel::Replicated);
    let targets = g.input("targets", &[batch, CONTEXT], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
    g
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, mesh, schedule, micro_batches, milliseconds] = &args[..] else {
        eprintln!("usage: watched ADDRESS MESH gpipe|1f1b MICRO_BATCHES MILLISECONDS");
        std::process::exit(2);
    };
    let schedule = if schedule == "gpipe" { Schedule::GPipe } else { Schedule::OneFOneB };
    let micro_batches: usize = micro_batches.parse().expect("a number of micro-batches");
    let delay = Duration::from_millis(milliseconds.parse().expect("milliseconds"));
    let devices = Mesh::parse(mesh).expect("a mesh").device_count();
    let batch = micro_batches * devices;
    let gate = Arc::new(Gate::default());
    let options = CompileOptions { devices, ..options(micro_batches, schedule) };
    let plan = compile(graph(mesh, batch, delay, &gate), &options).expect("a plan");
    let watch = Watch::listen(address.parse().expect("an address")).expect("a server");
    let mut session = Session::start(plan, &SessionOptions::default()).expect("a session");
    watch.show(&session);
    println!("{} actors", session.plan().spec.actors.len());
    let input_ended = Arc::new(AtomicBool::new(false));
    thread::spawn({
        let input_ended = input_ended.clone();
        move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                gate.set(line == "close");
            }
            gate.set(false);
            input_ended.store(true, Ordering::Relaxed);
        }
    });
    let tokens = || {
        let count = (batch * CONTEXT) as i32;
        HostTensor::i32(&[batch, CONTEXT], (0..count).map(|i| i % VOCABULARY as i32).collect())
    };
    while !input_ended.load(Ordering::Relaxed) {
        session.step(&[("ids", tokens()), ("targets", tokens())], LEARNING_RATE).expect("a step");
    }
    session.shutdown().expect("a clean shutdown");
}
