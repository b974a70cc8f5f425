//! The model, its training program and its data. `gpt2_torch.py` follows the same rules.

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use shardflow::init::mix;
use shardflow::prelude::*;

use crate::Result;

/// The default sizes are those of GPT-2 with 124 million weights. The model has a separate head and no biases.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    #[arg(long, value_enum, default_value_t = On::Cuda)]
    pub device: On,
    /// Mesh axes and sizes, such as data=2,stage=2.
    #[arg(long, default_value = "data=1")]
    pub mesh: String,
    #[arg(long, value_enum, default_value_t = Stored::Bf16)]
    pub precision: Stored,
    #[arg(long, default_value_t = 12)]
    pub layers: usize,
    #[arg(long, default_value_t = 12)]
    pub heads: usize,
    #[arg(long, default_value_t = 768)]
    pub width: usize,
    #[arg(long, default_value_t = 1024)]
    pub context: usize,
    /// Rows of the embedding table and of the head matrix: GPT-2's 50257 tokens, rounded up.
    #[arg(long, default_value_t = 50304)]
    pub vocabulary: usize,
    /// Samples per step; 0 selects the largest of 16, 8, 4, 2 whose plan needs at most half the GPU's free memory, or
    /// else 1. On CPUs, 0 selects 16.
    #[arg(long, default_value_t = 0)]
    pub batch: usize,
    #[arg(long, default_value_t = 1)]
    pub micro_batches: usize,
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f32,
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum On {
    Cpu,
    Cuda,
}

/// Element types in which activations are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stored {
    F32,
    Bf16,
}

/// Largest batch that `--batch 0` selects.
const BATCH_MAX: usize = 16;

impl ModelArgs {
    /// Compiles the training program, and returns its plan and its batch size.
    pub fn compile(&self) -> Result<(Plan, usize)> {
        if self.batch > 0 {
            return Ok((self.plan(self.batch)?, self.batch));
        }
        let half = match self.device {
            On::Cuda => gpu_memory_bytes(1)? / 2,
            On::Cpu => usize::MAX,
        };
        let mut batch = BATCH_MAX;
        loop {
            let plan = self.plan(batch)?;
            let bytes: usize = plan.memories().map(|memory| memory.total_bytes()).sum();
            if bytes <= half || batch == 1 {
                return Ok((plan, batch));
            }
            batch /= 2;
        }
    }

    fn plan(&self, batch: usize) -> Result<Plan> {
        let mut g = Graph::new(&Mesh::parse(&self.mesh)?);
        let &Self { vocabulary, layers, heads, width, context, dropout, .. } = self;
        let logits = nn::gpt(&mut g, &GptConfig { vocabulary, layers, heads, width, context, batch, dropout });
        let layout = nn::batch_layout(&g);
        let targets = g.input("targets", &[batch, context], DType::I32, layout);
        let loss = g.cross_entropy(logits, targets);
        g.minimize(loss, AdamW::default());
        let devices = g.mesh().device_count();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let options = CompileOptions {
            device: match self.device {
                On::Cpu => DeviceKind::Cpu,
                On::Cuda => DeviceKind::Cuda,
            },
            precision: match self.precision {
                Stored::F32 => Precision::F32,
                Stored::Bf16 => Precision::BF16,
            },
            micro_batches: self.micro_batches,
            threads_per_device: (cores / devices).clamp(1, shardflow::passes::THREADS_MAX),
            ..CompileOptions::default()
        };
        Ok(compile(g, &options)?)
    }

    /// Returns the inputs of a step.
    pub fn batch(&self, step: u64, batch: usize) -> [(&'static str, HostTensor); 2] {
        let (first, length) = (step * batch as u64, self.context as u64);
        let tokens = |shift: u64| {
            let token = |i| token(i, self.vocabulary);
            let sample = |k: u64| (0..length).map(move |t| token((first + k) * length + t + shift));
            HostTensor::i32(&[batch, self.context], (0..batch as u64).flat_map(sample).collect())
        };
        [("ids", tokens(0)), ("targets", tokens(1))]
    }

    /// Returns the settings of the model for the report.
    pub fn json(&self, batch: usize) -> Value {
        let Self { device, precision, mesh, layers, heads, width, context, vocabulary, .. } = self;
        let name = |value: Option<clap::builder::PossibleValue>| value.map(|value| value.get_name().to_owned());
        json!({
            "device": name(device.to_possible_value()), "precision": name(precision.to_possible_value()), "mesh": mesh,
            "layers": layers, "heads": heads, "width": width, "context": context, "vocabulary": vocabulary, "batch": batch,
        })
    }
}

/// Seed that is mixed with a token's position.
const DATA_SEED: u64 = 4242;

/// Returns the token at position `i` of an endless text. Tokens with small ids are frequent, which a model can learn.
pub fn token(i: u64, vocabulary: usize) -> i32 {
    let vocabulary = vocabulary as u64;
    let x = mix(DATA_SEED.wrapping_add(i)) % vocabulary;
    (x * x / vocabulary * x / vocabulary) as i32
}
