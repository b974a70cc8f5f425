//! A custom op outside Shardflow's crates: squared ReLU (So et al. 2021, <https://arxiv.org/abs/2109.08668>) with its
//! gradient. The op's rule defines how the op may be split, so it runs under every layout.

use std::sync::Arc;

use shardflow::prelude::*;

/// `(x) -> (y)`: `y = max(x, 0)^2`.
#[derive(Debug)]
struct SquaredRelu;

/// `(dy, x) -> (dx)`: `dx = 2 max(x, 0) dy`.
#[derive(Debug)]
struct SquaredReluGrad;

impl CustomOp for SquaredRelu {
    fn name(&self) -> &str {
        "squared_relu"
    }

    /// Input and output have the same three indices. The op is elementwise, so any index may be split over any mesh
    /// axis.
    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("btc->btc")
    }

    fn kernel(&self, _inputs: &[Region], _outputs: &[Region]) -> Arc<dyn CustomKernel> {
        Arc::new(Self)
    }

    fn backward(&self, g: &mut Graph, inputs: &[Var], _outputs: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>> {
        let dx = grads[0].map(|dy| g.custom(Arc::new(SquaredReluGrad), &[dy, inputs[0]])[0]);
        vec![dx]
    }
}

impl CustomKernel for SquaredRelu {
    fn name(&self) -> &str {
        "squared_relu"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        let ([x], [y]) = (&args.reads[..], &mut args.writes[..]) else { return Err(not_floats(self)) };
        let (CpuSlice::F32(x), CpuSliceMut::F32(y)) = (&x.data, &mut y.data) else { return Err(not_floats(self)) };
        y.iter_mut().zip(*x).for_each(|(y, x)| *y = x.max(0.0).powi(2));
        Ok(())
    }
}

impl CustomOp for SquaredReluGrad {
    fn name(&self) -> &str {
        "squared_relu_grad"
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        // The op is linear in dy (input 0), so dy may be a partial sum: no reduction is needed before this op.
        Rule::parse("btc,btc->btc")?.linear(&[&[0]])
    }

    fn kernel(&self, _inputs: &[Region], _outputs: &[Region]) -> Arc<dyn CustomKernel> {
        Arc::new(Self)
    }

    fn backward(&self, _: &mut Graph, _: &[Var], _: &[Var], _: &[Option<Var>]) -> Vec<Option<Var>> {
        // This op is itself a gradient, and second derivatives are not supported.
        vec![None, None]
    }
}

impl CustomKernel for SquaredReluGrad {
    fn name(&self) -> &str {
        "squared_relu_grad"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        let ([dy, x], [dx]) = (&args.reads[..], &mut args.writes[..]) else { return Err(not_floats(self)) };
        let (CpuSlice::F32(dy), CpuSlice::F32(x), CpuSliceMut::F32(dx)) = (&dy.data, &x.data, &mut dx.data) else {
            return Err(not_floats(self));
        };
        dx.iter_mut().zip(dy.iter().zip(*x)).for_each(|(dx, (dy, x))| *dx = 2.0 * x.max(0.0) * dy);
        Ok(())
    }
}

fn not_floats(kernel: &impl CustomKernel) -> KernelError {
    KernelError::Custom { name: kernel.name().into(), message: "expected float tensors and one result".into() }
}

const BATCH: usize = 8;
const LENGTH: usize = 16;
const WORDS: usize = 32;
const STEPS: usize = 60;

/// Trains a small model on this mesh, and returns the loss of each step.
fn train(mesh: &str) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let mesh = Mesh::parse(mesh)?;
    let mut g = Graph::new(&mesh);
    let batch_layout = nn::batch_layout(&g);
    let (column, row) = match mesh.axis("tensor") {
        Ok(_) => (Parallel::Column("tensor"), Parallel::Row("tensor")),
        Err(_) => (Parallel::Replicated, Parallel::Replicated),
    };
    let ids = g.input("ids", &[BATCH, LENGTH], DType::I32, batch_layout.clone());
    let targets = g.input("targets", &[BATCH, LENGTH], DType::I32, batch_layout);
    let x = nn::embedding(&mut g, "embedding", ids, WORDS, 32, Parallel::Replicated);
    let hidden = nn::linear(&mut g, "hidden", x, 128, column);
    let hidden = g.custom(Arc::new(SquaredRelu), &[hidden])[0];
    let branch = nn::linear(&mut g, "out", hidden, 32, row);
    let x = g.add(x, branch);
    let x = nn::layer_norm(&mut g, "norm", x);
    let logits = nn::linear(&mut g, "head", x, WORDS, Parallel::Replicated);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());

    let mut session = Session::start(compile(g, &CompileOptions::default())?, &SessionOptions::default())?;
    let mut losses = Vec::new();
    for step in 0..STEPS {
        // The model learns that word 5 w + 3 follows word w.
        let ids: Vec<i32> = (0..BATCH * LENGTH).map(|i| ((i * 7 + step) % WORDS) as i32).collect();
        let targets = ids.iter().map(|w| (5 * w + 3) % WORDS as i32).collect();
        let tensor = |data| HostTensor::i32(&[BATCH, LENGTH], data);
        let report = session.step(&[("ids", tensor(ids)), ("targets", tensor(targets))], 1e-2)?;
        losses.push(report.loss.ok_or("the program minimises a loss, so a step reports one")?);
    }
    session.shutdown()?;
    Ok(losses)
}

fn main() -> std::process::ExitCode {
    program::run(compare)
}

fn compare() -> Result<(), Box<dyn std::error::Error>> {
    let one = train("data=1")?;
    for step in (0..STEPS).filter(|step| step % 10 == 0 || step + 1 == STEPS) {
        program::print(format!("step {step:>2}  loss {:.4}", one[step]));
    }
    // If the rule allowed a split that the kernel cannot do, these losses would differ. The test below detects a wrong
    // gradient.
    for mesh in ["data=2", "tensor=2", "data=2,tensor=2"] {
        let difference = train(mesh)?.iter().zip(&one).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        if difference.is_nan() || difference > 1e-3 {
            return Err(format!("losses on {mesh} differ from those of one device by {difference:.1e}").into());
        }
        program::print(format!("mesh {mesh}: losses agree with those of one device within {difference:.1e}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(kernel: &dyn CustomKernel, reads: &[&[f32]]) -> Vec<f32> {
        let (shape, mut out) = ([reads[0].len()], vec![0.0; reads[0].len()]);
        let reads = reads.iter().map(|data| CpuRead { shape: &shape, data: CpuSlice::F32(data) }).collect();
        let writes = vec![CpuWrite { shape: &shape, data: CpuSliceMut::F32(&mut out) }];
        kernel.run_cpu(CpuArgs { reads, writes, accumulate: false }).unwrap();
        out
    }

    #[test]
    fn the_gradient_is_the_difference_quotient() {
        let (x, dy, h) = ([-1.5, -0.25, 0.5, 2.0], [1.0, 2.0, -1.0, 0.5], 1e-2);
        let at = |shift: f32| launch(&SquaredRelu, &[&x.map(|x| x + shift)]);
        let (above, below, dx) = (at(h), at(-h), launch(&SquaredReluGrad, &[&dy, &x]));
        for i in 0..x.len() {
            let expected = dy[i] * (above[i] - below[i]) / (2.0 * h);
            assert!((dx[i] - expected).abs() < 1e-3, "gradient at x = {}: got {}, expected {expected}", x[i], dx[i]);
        }
    }
}
