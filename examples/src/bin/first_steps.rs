//! The smallest complete program: a model that learns to predict the next letter, on two devices.

use shardflow::prelude::*;

const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog. ";
const BATCH: usize = 8;
const LENGTH: usize = 16;

fn main() -> std::process::ExitCode {
    program::run(train)
}

fn train() -> Result<(), Box<dyn std::error::Error>> {
    // The program is written for one device. Only the layouts of the inputs split samples over the axis `data`.
    let mut g = Graph::new(&Mesh::parse("data=2")?);
    let ids = g.input("ids", &[BATCH, LENGTH], DType::I32, Layout::split("data", 0));
    let targets = g.input("targets", &[BATCH, LENGTH], DType::I32, Layout::split("data", 0));
    let x = nn::embedding(&mut g, "embedding", ids, 128, 32, Parallel::Replicated);
    let hidden = nn::linear(&mut g, "hidden", x, 64, Parallel::Replicated);
    let hidden = g.gelu(hidden);
    let logits = nn::linear(&mut g, "head", hidden, 128, Parallel::Replicated);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());

    // Adds the backward pass, the all-reduce of gradients and the optimizer, and checks the plan before it runs.
    let plan = compile(g, &CompileOptions::default())?;

    let mut session = Session::start(plan, &SessionOptions::default())?;
    for step in 0..=100 {
        let report = session.step(&[("ids", letters(step)), ("targets", letters(step + 1))], 1e-2)?;
        if let Some(loss) = report.loss.filter(|_| step % 20 == 0) {
            program::print(format!("step {step:>3}  loss {loss:.4}"));
        }
    }
    Ok(session.shutdown()?)
}

/// Returns the letters from `start` on, as a batch.
fn letters(start: usize) -> HostTensor {
    let letters = (start..start + BATCH * LENGTH).map(|i| i32::from(TEXT[i % TEXT.len()]));
    HostTensor::i32(&[BATCH, LENGTH], letters.collect())
}
