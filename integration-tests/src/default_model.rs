//! The model that `gpt` trains by default, for benchmarks.

use shardflow::graph::{AdamW, Graph};
use shardflow::nn::{self, GptConfig};
use shardflow::passes::{CompileOptions, compile};
use shardflow::placement::Mesh;
use shardflow::plan::Plan;
use shardflow::session::Session;
use shardflow_kernels::tensor::{DType, HostTensor};

/// The model's sizes.
pub const CONFIG: GptConfig =
    GptConfig { vocabulary: 65, layers: 4, heads: 4, width: 128, context: 64, batch: 12, dropout: 0.0 };

/// Compiles the model's training program for one device.
pub fn plan(threads_per_device: usize) -> Plan {
    let mesh = Mesh::parse("data=1").expect("a mesh");
    let mut graph = Graph::new(&mesh);
    let logits = nn::gpt(&mut graph, &CONFIG);
    let layout = nn::batch_layout(&graph);
    let targets = graph.input("targets", &[CONFIG.batch, CONFIG.context], DType::I32, layout);
    let loss = graph.cross_entropy(logits, targets);
    graph.minimize(loss, AdamW::default());
    compile(graph, &CompileOptions { threads_per_device, ..CompileOptions::default() }).expect("a plan")
}

/// Runs one step; every step uses the same batch.
pub fn step(session: &mut Session) {
    let tokens = CONFIG.batch * CONFIG.context;
    let ids = HostTensor::i32(&[CONFIG.batch, CONFIG.context], (0..tokens).map(|i| (i * 7 % 65) as i32).collect());
    session.step(&[("ids", ids.clone()), ("targets", ids)], 1e-3).expect("a step");
}
