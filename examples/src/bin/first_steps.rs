//! The smallest whole program: a model that learns which letter follows which, on two devices.

use shardflow::prelude::*;

const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog. ";
const BATCH: usize = 8;
const LENGTH: usize = 16;

fn main() -> std::process::ExitCode {
    program::run(train)
}

fn train() -> Result<(), Box<dyn std::error::Error>> {
    // The program, as if there were one device. Only the inputs say that samples are split over the axis `data`.
    let mut g = Graph::new(&Mesh::parse("data=2")?);
    let ids = g.input("ids", &[BATCH, LENGTH], DType::I32, Layout::split("data", 0));
    let targets = g.input("targets", &[BATCH, LENGTH], DType::I32, Layout::split("data", 0));
    let x = nn::embedding(&mut g, "embedding", ids, 128, 32, Parallel::Replicated);
    let hidden = nn::linear(&mut g, "hidden", x, 64, Parallel::Replicated);
    let hidden = g.gelu(hidden);
    let logits = nn::linear(&mut g, "head", hidden, 128, Parallel::Replicated);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());

    // Backward, the all-reduce of gradients and the optimizer are added, and the plan is checked, before anything runs.
    let plan = compile(g, &CompileOptions::default())?;
    let mut session = Session::start(plan, &SessionOptions::default())?;
    for step in 0..=100 {
        let letter = |i: usize| i32::from(TEXT[(step + i) % TEXT.len()]);
        let batch = |shift| HostTensor::i32(&[BATCH, LENGTH], (shift..BATCH * LENGTH + shift).map(letter).collect());
        let report = session.step(&[("ids", batch(0)), ("targets", batch(1))], 1e-2)?;
        if let Some(loss) = report.loss.filter(|_| step % 20 == 0) {
            println!("step {step:>3}  loss {loss:.4}");
        }
    }
    Ok(session.shutdown()?)
}
