//! Vector loops: plain Rust over blocks of 16 floats, compiled for AVX-512, AVX2 and the baseline by `pulp`, which
//! picks one at run time. A tail is padded to a block, so an element's value does not depend on where it stands.
//! Imports nothing of this crate.

/// Floats worked on at once.
pub(crate) const LANES: usize = 16;

/// A block of floats.
pub(crate) type Lanes = [f32; LANES];

/// What an elementwise kernel reads.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// The very memory that is written.
    Same,
    /// Memory of its own.
    Other(&'a [f32]),
}

impl<'a> Operand<'a> {
    /// The part that goes with this range of the output.
    pub(crate) fn range(self, range: std::ops::Range<usize>) -> Operand<'a> {
        match self {
            Operand::Same => Operand::Same,
            Operand::Other(slice) => Operand::Other(&slice[range]),
        }
    }
}

/// Runs `work` compiled for the best instruction set that this machine has. `work`, and the closures in it, must be
/// `#[inline(always)]`: what is not inlined is compiled for the baseline, where a fused multiply-add is a call.
#[inline(always)]
pub(crate) fn dispatch<R>(work: impl FnMut() -> R) -> R {
    struct Inlined<F>(F);
    // Called as `FnMut`: as `FnOnce`, a closure goes through a shim that is not always inlined.
    impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Inlined<F> {
        type Output = R;

        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Inlined(work))
}

/// `y[i] = f(inputs[0][i], ..)`, block by block. To be called inside [`dispatch`].
#[inline(always)]
pub(crate) fn map<const N: usize>(inputs: [Operand<'_>; N], y: &mut [f32], f: impl Fn([Lanes; N]) -> Lanes) {
    map_indexed(
        inputs,
        y,
        #[inline(always)]
        |_, values| f(values),
    );
}

/// As [`map`], `f` being told the index of the block's first element too.
#[inline(always)]
pub(crate) fn map_indexed<const N: usize>(
    inputs: [Operand<'_>; N],
    y: &mut [f32],
    f: impl Fn(usize, [Lanes; N]) -> Lanes,
) {
    let len = y.len();
    for input in inputs {
        if let Operand::Other(slice) = input {
            assert_eq!(slice.len(), len);
        }
    }
    let (blocks, tail) = y.as_chunks_mut::<LANES>();
    for (i, block) in blocks.iter_mut().enumerate() {
        let values = inputs.map(
            #[inline(always)]
            |input| match input {
                Operand::Same => *block,
                Operand::Other(slice) => load(&slice[i * LANES..]),
            },
        );
        *block = f(i * LANES, values);
    }
    if !tail.is_empty() {
        let start = len - tail.len();
        let values = inputs.map(
            #[inline(always)]
            |input| match input {
                Operand::Same => load_tail(tail),
                Operand::Other(slice) => load_tail(&slice[start..]),
            },
        );
        tail.copy_from_slice(&f(start, values)[..tail.len()]);
    }
}

/// Applies `f` to each lane.
#[inline(always)]
pub(crate) fn each<const N: usize>(values: [Lanes; N], f: impl Fn([f32; N]) -> f32) -> Lanes {
    let mut out = [0.0; LANES];
    for j in 0..LANES {
        out[j] = f(values.map(
            #[inline(always)]
            |value| value[j],
        ));
    }
    out
}

/// The first 16 floats of a slice that has as many.
#[inline(always)]
pub(crate) fn load(slice: &[f32]) -> Lanes {
    *slice.first_chunk().expect("a whole block")
}

/// Up to 16 floats, padded with zeros.
#[inline(always)]
pub(crate) fn load_tail(slice: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes[..slice.len()].copy_from_slice(slice);
    lanes
}

/// Sum of a block in a fixed tree.
#[inline(always)]
pub(crate) fn sum(mut v: Lanes) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            v[j] += v[j + width];
        }
        width /= 2;
    }
    v[0]
}

/// Sum over `f` of all elements, in a fixed order that depends on the length alone. To be called inside [`dispatch`].
#[inline(always)]
pub(crate) fn fold<const N: usize>(inputs: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let len = inputs[0].len();
    let blocks = len / LANES;
    // Two chains of additions, to hide their latency.
    let mut sums = [[0f32; LANES]; 2];
    for i in 0..blocks {
        let value = each(
            inputs.map(
                #[inline(always)]
                |input| load(&input[i * LANES..]),
            ),
            &f,
        );
        let sum = &mut sums[i % 2];
        for j in 0..LANES {
            sum[j] += value[j];
        }
    }
    let valid = len % LANES;
    if valid > 0 {
        let value = each(
            inputs.map(
                #[inline(always)]
                |input| load_tail(&input[blocks * LANES..len]),
            ),
            &f,
        );
        for j in 0..LANES {
            sums[0][j] += if j < valid { value[j] } else { 0.0 };
        }
    }
    for j in 0..LANES {
        sums[0][j] += sums[1][j];
    }
    sum(sums[0])
}

/// The largest element; `-inf` of none. To be called inside [`dispatch`].
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut best = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for j in 0..LANES {
            best[j] = larger(best[j], block[j]);
        }
    }
    best.into_iter().chain(tail.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

/// `row = e^(row - max)`; returns the sum. To be called inside [`dispatch`].
#[inline(always)]
pub(crate) fn exp_sum(row: &mut [f32], max: f32) -> f32 {
    map(
        [Operand::Same],
        row,
        #[inline(always)]
        |values| {
            each(
                values,
                #[inline(always)]
                |[x]| exp(x - max),
            )
        },
    );
    fold(
        [row],
        #[inline(always)]
        |[x]| x,
    )
}

/// `e^x`, relative error below 2e-7; 0 below -87.3, infinity above 88.7, NaN for NaN.
/// Range reduction by powers of two (Cody and Waite 1980) and a polynomial for `e^r`, `|r| <= ln 2 / 2`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer that stands in the low bits; `as i32` saturates and does not vectorise.
    const MAGIC: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.4, 89.0);
    let rounded = clamped.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = rounded - MAGIC;
    let r = n.mul_add(-0.693_145_75, clamped);
    let r = n.mul_add(-1.428_606_8e-6, r);
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r * r, r) + 1.0;
    // Two steps, so that results above 2^127 do not overflow in the scale.
    let bits = (rounded.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let half = bits >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let value = p * scale(half) * scale(bits - half);
    if x < -87.3 { 0.0 } else { value }
}

/// The normal distribution's `(cumulative, density)` at x, which is what GELU needs: `Phi(x) = (1 + erf(x / sqrt 2)) / 2`.
/// `Phi(-z) = e^{-z^2/2} t P(t)` with `t = 1 / (1 + 0.27 z)`; P interpolates at the 9 Chebyshev nodes for z up to 13.5,
/// relative error 3e-8 before rounding. Relative error below 1e-6 for |x| < 5, absolute error below 2e-7 everywhere.
#[inline(always)]
pub(crate) fn normal(x: f32) -> (f32, f32) {
    const P: [f32; 9] = [
        0.028_988_641,
        -0.126_661_245,
        0.170_233_535,
        -0.069_816_084,
        0.108_303_25,
        0.071_824_397,
        0.101_872_48,
        0.107_533_847,
        0.107_721_191,
    ];
    let z = x.abs();
    let t = 1.0 / z.mul_add(0.27, 1.0);
    let e = exp(-0.5 * z * z);
    let mut p = P[0];
    for &c in &P[1..] {
        p = p.mul_add(t, c);
    }
    let lower = e * t * p;
    let cumulative = if x < 0.0 { lower } else { 1.0 - lower };
    (cumulative, e * 0.398_942_28)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_as_exact_as_f32_allows() {
        let mut worst = 0f64;
        for i in -87_000..88_700 {
            let x = i as f32 * 1e-3;
            let (got, exact) = (f64::from(exp(x)), f64::from(x).exp());
            worst = worst.max((got / exact - 1.0).abs());
        }
        assert!(worst < 2e-7, "relative error {worst}");
        assert_eq!([exp(f32::NEG_INFINITY), exp(-200.0), exp(0.0), exp(200.0)], [0.0, 0.0, 1.0, f32::INFINITY]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn normal_is_as_exact_as_it_says() {
        // Phi by its series around 0, Marsaglia 2004, <https://doi.org/10.18637/jss.v011.i04>.
        let exact = |x: f64| {
            let (mut term, mut sum) = (x, x);
            for n in 1..200 {
                term *= x * x / f64::from(2 * n + 1);
                sum += term;
            }
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            (0.5 + sum * density, density)
        };
        for i in -5000..5000 {
            let x = i as f32 * 1e-3;
            let ((cumulative, density), exact) = (normal(x), exact(f64::from(x)));
            assert!((f64::from(cumulative) - exact.0).abs() < 2e-7, "Phi({x}) = {cumulative}, not {}", exact.0);
            assert!((f64::from(density) / exact.1 - 1.0).abs() < 2e-6, "phi({x}) = {density}, not {}", exact.1);
            // The series loses the lower tail to cancellation, so relative error is looked at where it is sound.
            if x > -3.0 {
                assert!((f64::from(cumulative) / exact.0 - 1.0).abs() < 2e-6, "Phi({x}) = {cumulative}");
            }
        }
        assert_eq!((normal(40.0), normal(-40.0)), ((1.0, 0.0), (0.0, 0.0)));
    }

    #[test]
    fn an_element_does_not_depend_on_its_place() {
        let x: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let square = |x: &[f32]| {
            let mut y = vec![0.0; x.len()];
            dispatch(|| map([Operand::Other(x)], &mut y, |values| each(values, |[x]| exp(x) * x)));
            y
        };
        let whole = square(&x);
        for start in 0..x.len() {
            assert_eq!(square(&x[start..]), whole[start..]);
        }
    }
}
