//! Measures the time and memory of planning large meshes, deep models, and a program whose layers all differ. For each
//! plan, also measures how long one rank takes to make its part and to hash the plan.
//!
//! Command: `cargo bench -p shardflow-integration-tests --bench planning [PART OF A NAME]`

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use shardflow::nn::{self, GptConfig};
use shardflow::prelude::*;

struct Case {
    name: &'static str,
    mesh: &'static str,
    micro_batches: usize,
    build: fn(&mut Graph),
}

const fn config(layers: usize, width: usize, heads: usize, batch: usize) -> GptConfig {
    GptConfig { vocabulary: 50_257, layers, heads, width, context: 64, batch, dropout: 0.0 }
}

fn gpt(g: &mut Graph, config: &GptConfig) {
    let logits = nn::gpt(g, config);
    let layout = nn::batch_layout(g);
    let targets = g.input("targets", &[config.batch, config.context], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
}

/// Builds a chain of layers that differ in width, layout or op. The compiled program has about 20,000 ops.
fn unlike_layers(g: &mut Graph) {
    const LAYERS: usize = 1800;
    let layout = nn::batch_layout(g);
    let mut x = g.input("x", &[8, 64], DType::F32, layout);
    let mut width = 64;
    for layer in 0..LAYERS {
        g.place_at("stage", layer * 2 / LAYERS);
        let next = 64 + 8 * (layer * 7 % 301);
        let split = if layer % 2 == 0 { Layout::split("tensor", 0) } else { Layout::split("tensor", 1) };
        let w = g.parameter(&format!("w{layer}"), &[next, width], Init::Normal { std: 0.1 }, split);
        let h = g.einsum("bi,oi->bo", x, w);
        x = match layer % 3 {
            0 => g.gelu(h),
            1 => g.scale(h, 1.0 + layer as f32),
            _ => g.add(h, h),
        };
        width = next;
    }
    let out = g.parameter("out", &[16, width], Init::Normal { std: 0.1 }, Layout::broadcast());
    let logits = g.einsum("bi,oi->bo", x, out);
    let targets = g.input("targets", &[8], DType::I32, Layout::broadcast());
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
}

const CASES: &[Case] = &[
    Case {
        name: "96 layers on 3072 ranks with stages",
        mesh: "data=24,stage=16,tensor=8",
        micro_batches: 64,
        build: |g| gpt(g, &config(96, 12_288, 96, 1536)),
    },
    Case {
        name: "96 layers on 64 ranks without stages",
        mesh: "data=8,tensor=8",
        micro_batches: 64,
        build: |g| gpt(g, &config(96, 12_288, 96, 24_576)),
    },
    Case {
        name: "96 layers on 3072 ranks without stages",
        mesh: "data=384,tensor=8",
        micro_batches: 64,
        build: |g| gpt(g, &config(96, 12_288, 96, 24_576)),
    },
    Case {
        name: "128 layers on 3072 ranks",
        mesh: "tensor=8,stage=64,data=6",
        micro_batches: 64,
        build: |g| gpt(g, &config(128, 25_600, 128, 384)),
    },
    Case {
        name: "32 layers on 32 ranks",
        mesh: "stage=8,tensor=4",
        micro_batches: 8,
        build: |g| gpt(g, &config(32, 128, 4, 8)),
    },
    Case {
        name: "192 layers on 8 ranks",
        mesh: "data=2,stage=2,tensor=2",
        micro_batches: 4,
        build: |g| gpt(g, &config(192, 128, 4, 8)),
    },
    Case {
        name: "48 layers on three axes",
        mesh: "data=8,stage=2,tensor=2",
        micro_batches: 4,
        build: |g| gpt(g, &config(48, 128, 4, 16)),
    },
    Case {
        name: "48 layers on five axes",
        mesh: "pod=2,data=2,stage=2,context=2,tensor=2",
        micro_batches: 4,
        build: |g| gpt(g, &config(48, 128, 4, 16)),
    },
    Case { name: "unlike layers on 8 ranks", mesh: "data=2,stage=2,tensor=2", micro_batches: 1, build: unlike_layers },
];

const REPETITIONS: usize = 9;

/// Returns the peak memory of this process so far in MiB, or 0 if the system does not report it.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// The median duration of [`REPETITIONS`] calls, in milliseconds.
fn median_ms(call: impl Fn()) -> f64 {
    let duration = |_| {
        let begin = Instant::now();
        call();
        begin.elapsed().as_secs_f64() * 1e3
    };
    let mut durations: Vec<f64> = (0..REPETITIONS).map(duration).collect();
    durations.sort_by(f64::total_cmp);
    durations[REPETITIONS / 2]
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    for case in CASES.iter().filter(|case| wanted.iter().all(|part| case.name.contains(part))) {
        let mut g = Graph::new(&Mesh::parse(case.mesh).expect("a mesh"));
        (case.build)(&mut g);
        let begin = Instant::now();
        let options = CompileOptions { micro_batches: case.micro_batches, ..CompileOptions::default() };
        let plan = compile(g, &options).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let seconds = begin.elapsed().as_secs_f64();
        let (nodes, classes) = (plan.graph.nodes().len(), plan.classes.devices.len());
        let devices = plan.device_count();
        let begin = Instant::now();
        let explained = black_box(plan.explain()).len();
        let explain = begin.elapsed().as_secs_f64();
        println!("{}: {nodes} nodes, {classes} classes, {seconds:.2} s, peak of {} MiB so far", case.name, peak_mib());
        println!("  explain: {explain:.2} s, {} kB", explained / 1000);
        let (plan, last) = (Arc::new(plan), devices - 1);
        let part = median_ms(|| _ = black_box(plan.clone().instance_of(last..devices)));
        let hash = median_ms(|| _ = black_box(plan.hash()));
        let spec = plan.instance_of(last..devices).spec;
        let (actors, registers) = (spec.actors.len(), spec.registers.len());
        println!("  one rank: {part:.1} ms, {actors} actors, {registers} registers; hash of the plan: {hash:.1} ms");
    }
}
