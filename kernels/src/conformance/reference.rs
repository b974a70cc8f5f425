//! Simple f64 versions of the ops, as the papers define them.

/// Computes `erf` by a series (small arguments) or a continued fraction (large arguments). The error is about 1e-15.
pub(super) fn erf(x: f64) -> f64 {
    if x < 0.0 {
        return -erf(-x);
    }
    let scale = 2.0 / std::f64::consts::PI.sqrt();
    if x < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return scale * sum;
    }
    let tail = (1..200).rev().fold(0.0, |tail, n| 0.5 * f64::from(n) / (x + tail));
    1.0 - (-x * x).exp() / std::f64::consts::PI.sqrt() / (x + tail)
}

pub(super) fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))
}

/// The derivative of a scalar function by central differences.
pub(super) fn derivative(f: impl Fn(f64) -> f64, x: f64) -> f64 {
    let h = 1e-4;
    // A formula of fourth order in `h`: its error and the rounding error in f64 are both far below f32 precision.
    (8.0 * (f(x + h) - f(x - h)) - (f(x + 2.0 * h) - f(x - 2.0 * h))) / (12.0 * h)
}

/// The gradient of `loss` at `x` by central differences. Tests compare the analytic gradients with it.
#[cfg(test)]
fn gradient(loss: impl Fn(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    let slope = |i: usize| {
        let loss_at = |value| {
            let mut point = x.to_vec();
            point[i] = value;
            loss(&point)
        };
        derivative(loss_at, x[i])
    };
    (0..x.len()).map(slope).collect()
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `[m, k] [k, n] -> [m, n]`.
pub(super) fn matmul(a: &[f64], b: &[f64], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let at = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum();
    (0..m * n).map(|place| at(place / n, place % n)).collect()
}

/// Transposes `[rows, columns]` to `[columns, rows]`.
pub(super) fn transpose(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..x.len()).map(|place| x[place % rows * columns + place / rows]).collect()
}

/// Returns `(y, mean, rstd)`.
pub(super) fn layer_norm(x: &[f64], weight: &[f64], eps: f64) -> [Vec<f64>; 3] {
    let width = weight.len();
    let [mut y, mut means, mut rstds] = [vec![], vec![], vec![]];
    for row in x.chunks_exact(width.max(1)) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let rstd = 1.0 / (variance + eps).sqrt();
        y.extend(row.iter().zip(weight).map(|(x, weight)| (x - mean) * rstd * weight));
        means.push(mean);
        rstds.push(rstd);
    }
    [y, means, rstds]
}

/// Returns `(dx, dweight)`. This file's tests compare the result with that of [`gradient`].
pub(super) fn layer_norm_grad(dy: &[f64], x: &[f64], weight: &[f64], eps: f64) -> [Vec<f64>; 2] {
    let width = weight.len();
    let (mut dx, mut dweight) = (vec![], vec![0.0; width]);
    let [_, means, rstds] = layer_norm(x, weight, eps);
    for (row, (x, dy)) in x.chunks_exact(width.max(1)).zip(dy.chunks_exact(width.max(1))).enumerate() {
        let normed: Vec<f64> = x.iter().map(|x| (x - means[row]) * rstds[row]).collect();
        let g: Vec<f64> = dy.iter().zip(weight).map(|(dy, weight)| dy * weight).collect();
        let (g_mean, gn_mean) = (g.iter().sum::<f64>() / width as f64, dot(&g, &normed) / width as f64);
        for i in 0..width {
            dx.push(rstds[row] * (g[i] - g_mean - normed[i] * gn_mean));
            dweight[i] += dy[i] * normed[i];
        }
    }
    [dx, dweight]
}

/// Extents `[b, t, h, d]`.
pub(super) type AttentionShape = [usize; 4];

fn place([_, time, heads, depth]: AttentionShape, b: usize, t: usize, h: usize) -> usize {
    ((b * time + t) * heads + h) * depth
}

/// Probabilities and log-sum-exp of one query row.
fn probabilities(q: &[f64], k: &[f64], shape: AttentionShape, scale: f64, [b, t, h]: [usize; 3]) -> (Vec<f64>, f64) {
    let depth = shape[3];
    let query = &q[place(shape, b, t, h)..][..depth];
    let scores: Vec<f64> = (0..=t).map(|s| scale * dot(query, &k[place(shape, b, s, h)..][..depth])).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    (scores.iter().map(|score| (score - max).exp() / sum).collect(), max + sum.ln())
}

fn query_rows([batch, time, heads, _]: AttentionShape) -> impl Iterator<Item = [usize; 3]> {
    let rows = (0..batch).flat_map(move |b| (0..heads).map(move |h| (b, h)));
    rows.flat_map(move |(b, h)| (0..time).map(move |t| [b, t, h]))
}

/// Returns `(o, lse)`.
pub(super) fn attention(q: &[f64], k: &[f64], v: &[f64], shape: AttentionShape, scale: f64) -> [Vec<f64>; 2] {
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![]);
    for [b, t, h] in query_rows(shape) {
        let (p, row_lse) = probabilities(q, k, shape, scale, [b, t, h]);
        for (s, p) in p.iter().enumerate() {
            for c in 0..shape[3] {
                o[place(shape, b, t, h) + c] += p * v[place(shape, b, s, h) + c];
            }
        }
        lse.push(row_lse);
    }
    [o, lse]
}

/// Returns `(dq, dk, dv)`. This file's tests compare the result with that of [`gradient`].
pub(super) fn attention_grad(d_o: &[f64], [q, k, v]: [&[f64]; 3], shape: AttentionShape, scale: f64) -> [Vec<f64>; 3] {
    let depth = shape[3];
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![0.0; x.len()]);
    for [b, t, h] in query_rows(shape) {
        let (p, _) = probabilities(q, k, shape, scale, [b, t, h]);
        let row = place(shape, b, t, h);
        let d_o = &d_o[row..row + depth];
        let dp: Vec<f64> = (0..=t).map(|s| dot(d_o, &v[place(shape, b, s, h)..][..depth])).collect();
        let delta = dot(&p, &dp);
        for s in 0..=t {
            let (key, ds) = (place(shape, b, s, h), scale * p[s] * (dp[s] - delta));
            for c in 0..depth {
                dq[row + c] += ds * k[key + c];
                dk[key + c] += ds * q[row + c];
                dv[key + c] += p[s] * d_o[c];
            }
        }
    }
    [dq, dk, dv]
}

/// Returns `scale * sum of -log softmax(logits)[target]`.
pub(super) fn cross_entropy(logits: &[f64], targets: &[usize], scale: f64) -> f64 {
    let vocab = logits.len() / targets.len().max(1);
    let token = |(row, target): (&[f64], &usize)| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + row.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln() - row[*target]
    };
    scale * logits.chunks_exact(vocab.max(1)).zip(targets).map(token).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f64) -> Vec<f64> {
        (0..count).map(|i| (i as f64 * 1.7 + seed).sin()).collect()
    }

    fn assert_close(a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-8, "{a} and {b} differ");
        }
    }

    #[test]
    fn erf_matches_known_values() {
        assert_close(
            &[erf(0.5), erf(1.0), erf(-2.0), erf(3.5)],
            &[0.520_499_877_813_046_5, 0.842_700_792_949_714_9, -0.995_322_265_018_952_7, 0.999_999_256_901_627_7],
        );
        assert!((erf(2.999_999_999) - erf(3.0)).abs() < 1e-12);
    }

    #[test]
    fn layer_norm_grad_is_the_gradient() {
        let (x, weight, dy) = (numbers(15, 0.1), numbers(5, 0.2), numbers(15, 0.3));
        let [dx, dweight] = layer_norm_grad(&dy, &x, &weight, 1e-3);
        assert_close(&dx, &gradient(|x| dot(&layer_norm(x, &weight, 1e-3)[0], &dy), &x));
        assert_close(&dweight, &gradient(|weight| dot(&layer_norm(&x, weight, 1e-3)[0], &dy), &weight));
    }

    #[test]
    fn attention_grad_is_the_gradient() {
        let shape = [2, 3, 2, 3];
        let [q, k, v, d_o] = [0.1, 0.2, 0.3, 0.4].map(|seed| numbers(36, seed));
        let [dq, dk, dv] = attention_grad(&d_o, [&q, &k, &v], shape, 0.7);
        assert_close(&dq, &gradient(|q| dot(&attention(q, &k, &v, shape, 0.7)[0], &d_o), &q));
        assert_close(&dk, &gradient(|k| dot(&attention(&q, k, &v, shape, 0.7)[0], &d_o), &k));
        assert_close(&dv, &gradient(|v| dot(&attention(&q, &k, v, shape, 0.7)[0], &d_o), &v));
    }
}
