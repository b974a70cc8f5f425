//! A plain GPT in float64 on one thread. It is the reference for every layout. Apart from `shardflow::init`, which
//! generates the initial weights, it shares no code with the library.
//!
//! The model has no biases, an exact GELU, layer norms with eps 1e-5, causal attention and an untied head. AdamW decays
//! only matrices.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use shardflow::init::{Init, fill, mix};
use shardflow_kernels::tensor::Region;

/// A model, its data and its training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReferenceConfig {
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads. Their number divides `width`.
    pub heads: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Tokens per sample.
    pub context: usize,
    /// Samples per step.
    pub batch: usize,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Standard deviation of the initial matrices; 0.02 by default.
    pub init_std: f64,
    /// Learning rate.
    pub lr: f64,
    /// Gradients with a larger norm are scaled down to this norm.
    pub max_norm: f64,
}

impl ReferenceConfig {
    /// Returns the default training for a model of this size.
    pub fn new(layers: usize, heads: usize, width: usize, context: usize, batch: usize) -> Self {
        Self { layers, heads, width, context, batch, seed: 1337, init_std: 0.02, lr: 1e-3, max_norm: f64::INFINITY }
    }
}

/// Row-major values of tensors by parameter name, such as `h.0.attn.q.weight`.
pub type Tensors = BTreeMap<String, Vec<f64>>;

/// Returns the names and shapes of the parameters of a model.
pub fn parameter_shapes(config: &ReferenceConfig, vocab: usize) -> BTreeMap<String, Vec<usize>> {
    let (width, mut shapes) = (config.width, BTreeMap::new());
    let mut add = |name: String, shape: &[usize]| shapes.insert(name, shape.to_vec());
    add("wte.weight".into(), &[vocab, width]);
    add("wpe.weight".into(), &[config.context, width]);
    for layer in 0..config.layers {
        for matrix in ["q", "k", "v", "proj"] {
            add(format!("h.{layer}.attn.{matrix}.weight"), &[width, width]);
        }
        add(format!("h.{layer}.mlp.fc.weight"), &[4 * width, width]);
        add(format!("h.{layer}.mlp.proj.weight"), &[width, 4 * width]);
        add(format!("h.{layer}.ln1.weight"), &[width]);
        add(format!("h.{layer}.ln2.weight"), &[width]);
    }
    add("lnf.weight".into(), &[width]);
    add("head.weight".into(), &[vocab, width]);
    shapes
}

/// Returns the initial parameters: the f32 values from which every program starts.
pub fn initial_parameters(config: &ReferenceConfig, vocab: usize) -> Tensors {
    let make = |(name, shape): (String, Vec<usize>)| {
        let init = if shape.len() == 1 { Init::Ones } else { Init::Normal { std: config.init_std } };
        let mut values = vec![0.0; shape.iter().product()];
        fill(init, config.seed, &name, &shape, &Region::whole(&shape), &mut values);
        (name, values.into_iter().map(f64::from).collect())
    };
    parameter_shapes(config, vocab).into_iter().map(make).collect()
}

/// Converts a text to ids: the distinct bytes of the text are numbered in ascending order. Returns the number of
/// distinct bytes, and the ids of the first nine tenths of the text.
pub fn tokens(text: &[u8]) -> (usize, Vec<usize>) {
    let mut alphabet = text.to_vec();
    alphabet.sort_unstable();
    alphabet.dedup();
    let id = |b: &u8| alphabet.partition_point(|a| a < b);
    (alphabet.len(), text[..text.len() * 9 / 10].iter().map(id).collect())
}

/// Returns the ids and targets of a step, each `[batch, context]`.
pub fn batch(config: &ReferenceConfig, train: &[usize], step: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for sample in step * config.batch..(step + 1) * config.batch {
        let start = (mix(4242 + sample as u64) % (train.len() - config.context) as u64) as usize;
        ids.extend(&train[start..start + config.context]);
        targets.extend(&train[start + 1..start + config.context + 1]);
    }
    (ids, targets)
}

/// Returns the loss of the initial model on the first batch, and its gradients by parameter name.
pub fn first_step(config: &ReferenceConfig, text: &[u8]) -> (f64, Tensors) {
    let (vocab, train) = tokens(text);
    let (ids, targets) = batch(config, &train, 0);
    loss_and_gradients(config, &initial_parameters(config, vocab), &ids, &targets)
}

/// Trains from the initial parameters. Returns the loss of each step, before its update.
pub fn train(config: &ReferenceConfig, text: &[u8], steps: usize) -> Vec<f64> {
    let (vocab, train) = tokens(text);
    let mut parameters = initial_parameters(config, vocab);
    let zeros = |values: &Vec<f64>| (vec![0.0; values.len()], vec![0.0; values.len()]);
    let mut moments: BTreeMap<String, _> = parameters.iter().map(|(n, v)| (n.clone(), zeros(v))).collect();
    let mut losses = Vec::new();
    for step in 0..steps {
        let (ids, targets) = batch(config, &train, step);
        let (loss, gradients) = loss_and_gradients(config, &parameters, &ids, &targets);
        losses.push(loss);
        let norm = gradients.values().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let scale = (config.max_norm / (norm + 1e-6)).min(1.0);
        for (name, values) in &mut parameters {
            // The only vectors are the weights of layer norms, which do not decay.
            let decay = if name.contains("ln") { 0.0 } else { 0.1 };
            let (m, v) = moments.get_mut(name).expect("every parameter has moments");
            adam_w(values, &gradients[name], m, v, scale, config.lr, decay, step as i32 + 1);
        }
    }
    losses
}

/// Applies the update of AdamW, <https://arxiv.org/abs/1711.05101>, with the betas 0.9 and 0.99 and the eps 1e-8.
#[allow(clippy::too_many_arguments)]
fn adam_w(p: &mut [f64], g: &[f64], m: &mut [f64], v: &mut [f64], scale: f64, lr: f64, decay: f64, t: i32) {
    let (beta1, beta2) = (0.9, 0.99);
    for i in 0..p.len() {
        let g = scale * g[i];
        p[i] *= 1.0 - lr * decay;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let (m_hat, v_hat) = (m[i] / (1.0 - f64::powi(beta1, t)), v[i] / (1.0 - f64::powi(beta2, t)));
        p[i] -= lr * m_hat / (v_hat.sqrt() + 1e-8);
    }
}

/// The values of the forward pass that a layer's backward pass needs.
struct Saved {
    norm1: Norm,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    attention: Attention,
    norm2: Norm,
    fc: Vec<f64>,
    gelu: Vec<f64>,
}

/// Returns the mean loss of `ids` against `targets` (each `[samples, context]`), and the gradient for each parameter.
pub fn loss_and_gradients(config: &ReferenceConfig, p: &Tensors, ids: &[usize], targets: &[usize]) -> (f64, Tensors) {
    let width = config.width;
    let mut x = vec![0.0; ids.len() * width];
    for (row, id) in ids.iter().enumerate() {
        for c in 0..width {
            let position = row % config.context;
            x[row * width + c] = p["wte.weight"][id * width + c] + p["wpe.weight"][position * width + c];
        }
    }
    let mut saved = Vec::new();
    for layer in 0..config.layers {
        saved.push(layer_forward(config, p, layer, &mut x));
    }
    let norm = Norm::forward(&x, &p["lnf.weight"]);
    let logits = linear(&norm.y, &p["head.weight"], width);
    let (loss, dlogits) = cross_entropy(&logits, targets);

    let mut g: Tensors = p.iter().map(|(name, values)| (name.clone(), vec![0.0; values.len()])).collect();
    let dy = linear_backward(&dlogits, &norm.y, "head.weight", p, &mut g, width);
    let mut dx = norm.backward(&dy, "lnf.weight", p, &mut g);
    for (layer, saved) in saved.iter().enumerate().rev() {
        layer_backward(config, p, layer, saved, &mut dx, &mut g);
    }
    for (row, id) in ids.iter().enumerate() {
        let position = row % config.context;
        for c in 0..width {
            g.get_mut("wte.weight").expect("set above")[id * width + c] += dx[row * width + c];
            g.get_mut("wpe.weight").expect("set above")[position * width + c] += dx[row * width + c];
        }
    }
    (loss, g)
}

/// Adds attention and MLP of one layer to the residual stream `x`.
fn layer_forward(config: &ReferenceConfig, p: &Tensors, layer: usize, x: &mut [f64]) -> Saved {
    let (width, weight) = (config.width, |name: &str| &p[&format!("h.{layer}.{name}.weight")]);
    let norm1 = Norm::forward(x, weight("ln1"));
    let [q, k, v] = ["attn.q", "attn.k", "attn.v"].map(|name| linear(&norm1.y, weight(name), width));
    let attention = Attention::forward(config, &q, &k, &v);
    add(x, &linear(&attention.out, weight("attn.proj"), width));
    let norm2 = Norm::forward(x, weight("ln2"));
    let fc = linear(&norm2.y, weight("mlp.fc"), width);
    let gelu: Vec<f64> = fc.iter().map(|z| z * normal_cdf(*z)).collect();
    add(x, &linear(&gelu, weight("mlp.proj"), 4 * width));
    Saved { norm1, q, k, v, attention, norm2, fc, gelu }
}

/// Before the call, `dx` is the gradient with respect to the layer's output; after the call, to the input.
fn layer_backward(config: &ReferenceConfig, p: &Tensors, layer: usize, saved: &Saved, dx: &mut [f64], g: &mut Tensors) {
    let (width, name) = (config.width, |part: &str| format!("h.{layer}.{part}.weight"));
    let mut dfc = linear_backward(dx, &saved.gelu, &name("mlp.proj"), p, g, 4 * width);
    for (d, z) in dfc.iter_mut().zip(&saved.fc) {
        *d *= normal_cdf(*z) + z * (-z * z / 2.0).exp() / (2.0 * PI).sqrt();
    }
    let dy = linear_backward(&dfc, &saved.norm2.y, &name("mlp.fc"), p, g, width);
    add(dx, &saved.norm2.backward(&dy, &name("ln2"), p, g));

    let dout = linear_backward(dx, &saved.attention.out, &name("attn.proj"), p, g, width);
    let dqkv = saved.attention.backward(config, &dout, &saved.q, &saved.k, &saved.v);
    let mut dy = vec![0.0; dx.len()];
    for (part, d) in ["attn.q", "attn.k", "attn.v"].iter().zip(&dqkv) {
        add(&mut dy, &linear_backward(d, &saved.norm1.y, &name(part), p, g, width));
    }
    add(dx, &saved.norm1.backward(&dy, &name("ln1"), p, g));
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Computes `y = x w^T`, where x is `[rows, inputs]` and w is `[outputs, inputs]`.
fn linear(x: &[f64], w: &[f64], inputs: usize) -> Vec<f64> {
    let outputs = w.len() / inputs;
    // Transpose w first. The inner loop then runs along rows, and this is fast enough for a test.
    let mut transposed = vec![0.0; w.len()];
    for (i, value) in w.iter().enumerate() {
        transposed[i % inputs * outputs + i / inputs] = *value;
    }
    let mut y = vec![0.0; x.len() / inputs * outputs];
    for (x, y) in x.chunks(inputs).zip(y.chunks_mut(outputs)) {
        for (x, w) in x.iter().zip(transposed.chunks(outputs)) {
            y.iter_mut().zip(w).for_each(|(y, w)| *y += x * w);
        }
    }
    y
}

/// Returns `dx = dy w`, and adds `dy^T x` to `dw`.
fn linear_backward(dy: &[f64], x: &[f64], name: &str, p: &Tensors, g: &mut Tensors, inputs: usize) -> Vec<f64> {
    let (w, dw) = (&p[name], g.get_mut(name).expect("every parameter has a gradient"));
    let outputs = w.len() / inputs;
    let mut dx = vec![0.0; x.len()];
    for ((dy, x), dx) in dy.chunks(outputs).zip(x.chunks(inputs)).zip(dx.chunks_mut(inputs)) {
        for (o, dy) in dy.iter().enumerate() {
            let row = o * inputs..(o + 1) * inputs;
            dx.iter_mut().zip(&w[row.clone()]).for_each(|(dx, w)| *dx += dy * w);
            dw[row].iter_mut().zip(x).for_each(|(dw, x)| *dw += dy * x);
        }
    }
    dx
}

/// Layer norm without bias, <https://arxiv.org/abs/1607.06450>. Each row is as long as the weight.
struct Norm {
    y: Vec<f64>,
    normalized: Vec<f64>,
    rstd: Vec<f64>,
}

impl Norm {
    fn forward(x: &[f64], weight: &[f64]) -> Self {
        let n = weight.len() as f64;
        let mut norm = Self { y: Vec::new(), normalized: Vec::new(), rstd: Vec::new() };
        for row in x.chunks(weight.len()) {
            let mean = row.iter().sum::<f64>() / n;
            let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
            let rstd = 1.0 / (variance + 1e-5).sqrt();
            norm.rstd.push(rstd);
            for (x, weight) in row.iter().zip(weight) {
                norm.normalized.push((x - mean) * rstd);
                norm.y.push((x - mean) * rstd * weight);
            }
        }
        norm
    }

    fn backward(&self, dy: &[f64], name: &str, p: &Tensors, g: &mut Tensors) -> Vec<f64> {
        let (weight, dweight) = (&p[name], g.get_mut(name).expect("every parameter has a gradient"));
        let (len, n) = (weight.len(), weight.len() as f64);
        let mut dx = Vec::with_capacity(dy.len());
        for ((dy, normalized), rstd) in dy.chunks(len).zip(self.normalized.chunks(len)).zip(&self.rstd) {
            let d: Vec<f64> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
            let (mean, slope) = (d.iter().sum::<f64>() / n, dot(&d, normalized) / n);
            for i in 0..len {
                dweight[i] += dy[i] * normalized[i];
                dx.push(rstd * (d[i] - mean - normalized[i] * slope));
            }
        }
        dx
    }
}

/// Causal attention that stores all its probabilities.
struct Attention {
    out: Vec<f64>,
    /// `[sample, head, query, key]`, zero above the diagonal.
    probabilities: Vec<f64>,
}

impl Attention {
    /// Calls `f(query row, key row, first column, index of the probability)` for each query and each key to which the
    /// query attends.
    fn pairs(config: &ReferenceConfig, rows: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        let (t, heads) = (config.context, config.heads);
        for sample in 0..rows / t {
            for head in 0..heads {
                for query in 0..t {
                    for key in 0..=query {
                        let index = ((sample * heads + head) * t + query) * t + key;
                        f(sample * t + query, sample * t + key, head * (config.width / heads), index);
                    }
                }
            }
        }
    }

    fn forward(config: &ReferenceConfig, q: &[f64], k: &[f64], v: &[f64]) -> Self {
        let (width, size) = (config.width, config.width / config.heads);
        let rows = q.len() / width;
        let mut p = vec![f64::NEG_INFINITY; rows * config.heads * config.context];
        Self::pairs(config, rows, |i, j, c, index| {
            let (i, j) = (i * width + c, j * width + c);
            p[index] = dot(&q[i..i + size], &k[j..j + size]) / (size as f64).sqrt();
        });
        for row in p.chunks_mut(config.context) {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|s| *s = (*s - max).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|s| *s /= sum);
        }
        let mut out = vec![0.0; q.len()];
        Self::pairs(config, rows, |i, j, c, index| {
            for c in c..c + size {
                out[i * width + c] += p[index] * v[j * width + c];
            }
        });
        Self { out, probabilities: p }
    }

    /// Returns the gradients with respect to q, k and v.
    fn backward(&self, config: &ReferenceConfig, dout: &[f64], q: &[f64], k: &[f64], v: &[f64]) -> [Vec<f64>; 3] {
        let (width, size) = (config.width, config.width / config.heads);
        let (rows, p) = (q.len() / width, &self.probabilities);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; q.len()]);
        let mut ds = vec![0.0; p.len()];
        Self::pairs(config, rows, |i, j, c, index| {
            let (i, j) = (i * width + c, j * width + c);
            ds[index] = dot(&dout[i..i + size], &v[j..j + size]);
            for c in 0..size {
                dv[j + c] += p[index] * dout[i + c];
            }
        });
        for (ds, p) in ds.chunks_mut(config.context).zip(p.chunks(config.context)) {
            let mean = dot(ds, p);
            ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - mean));
        }
        Self::pairs(config, rows, |i, j, c, index| {
            let d = ds[index] / (size as f64).sqrt();
            for c in c..c + size {
                dq[i * width + c] += d * k[j * width + c];
                dk[j * width + c] += d * q[i * width + c];
            }
        });
        [dq, dk, dv]
    }
}

/// Returns the mean over the rows of `-log softmax(logits)[target]`, and its gradient for `logits`.
fn cross_entropy(logits: &[f64], targets: &[usize]) -> (f64, Vec<f64>) {
    let (vocab, n) = (logits.len() / targets.len(), targets.len() as f64);
    let (mut loss, mut dlogits) = (0.0, Vec::with_capacity(logits.len()));
    for (row, target) in logits.chunks(vocab).zip(targets) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|z| (z - max).exp()).sum();
        loss += (max + sum.ln() - row[*target]) / n;
        dlogits.extend((0..vocab).map(|c| ((row[c] - max).exp() / sum - f64::from(u8::from(c == *target))) / n));
    }
    (loss, dlogits)
}

/// Computes `(1 + erf(z / sqrt 2)) / 2` by the series `erf(x) = 2/sqrt(pi) exp(-x^2) sum 2^n x^(2n+1) / (2n+1)!!`
/// (Abramowitz and Stegun 7.1.6). All terms of this series have the sign of x, so no digits cancel.
fn normal_cdf(z: f64) -> f64 {
    let x = z / 2f64.sqrt();
    if x.abs() > 6.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    0.5 + sum * (-x * x).exp() / PI.sqrt()
}

#[cfg(test)]
mod tests;
