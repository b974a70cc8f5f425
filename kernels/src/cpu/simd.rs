//! Vector loops in plain Rust. `pulp` compiles them for AVX-512, AVX2 and the baseline, and selects one at run time.
//! Loops run over single elements: compilers vectorize these best. An element's value does not depend on its index.

/// Number of independent partial sums, which let compilers vectorize sums. Element i is added to partial sum i mod 16.
pub(crate) const LANES: usize = 16;

/// Number of elements that a fold computes before it sums them. These elements fit in L1.
const BLOCK: usize = 256;

#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    /// The operand is the memory that is also written (in place).
    Same,
    Other(&'a [f32]),
}

impl<'a> Operand<'a> {
    /// The part of this operand for a range of the output.
    pub(crate) fn range(self, range: std::ops::Range<usize>) -> Operand<'a> {
        match self {
            Operand::Same => Operand::Same,
            Operand::Other(slice) => Operand::Other(&slice[range]),
        }
    }
}

/// Runs `work`, compiled for the best instruction set of this machine. `work` and its closures must be
/// `#[inline(always)]`. Otherwise they are compiled for the baseline, where a fused multiply-add is a function call.
#[inline(always)]
pub(crate) fn dispatch<R>(work: impl FnMut() -> R) -> R {
    struct Inlined<F>(F);
    // Calls the closure as `FnMut`: the shim that calls a closure as `FnOnce` is not always inlined.
    impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Inlined<F> {
        type Output = R;

        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Inlined(work))
}

/// Calls [`dispatch`] or a loop of this module. Its closure is inlined, as [`dispatch`] requires.
macro_rules! inlined {
    // This rule moves the arguments before the closure into the brackets, one token at a time.
    (@ $call:ident [$($before:tt)*] || $body:expr) => {
        $call(
            $($before)*
            #[inline(always)]
            || $body,
        )
    };
    (@ $call:ident [$($before:tt)*] |$($x:pat_param),*| $body:expr) => {
        $call(
            $($before)*
            #[inline(always)]
            |$($x),*| $body,
        )
    };
    (@ $call:ident [$($before:tt)*] $next:tt $($rest:tt)*) => {
        inlined!(@ $call [$($before)* $next] $($rest)*)
    };
    ($call:ident($($arguments:tt)*)) => {
        inlined!(@ $call [] $($arguments)*)
    };
}
pub(crate) use inlined;

/// `y[i] = f([inputs[0][i], ..])`. Call this inside [`dispatch`].
#[inline(always)]
pub(crate) fn map<const N: usize>(inputs: [&[f32]; N], y: &mut [f32], f: impl Fn([f32; N]) -> f32) {
    let len = y.len();
    let inputs = inputs.map(
        #[inline(always)]
        |input| &input[..len],
    );
    for i in 0..len {
        y[i] = f(inputs.map(
            #[inline(always)]
            |input| input[i],
        ));
    }
}

/// `y[i] = f(y[i], [inputs[0][i], ..])`. Call this inside [`dispatch`].
#[inline(always)]
pub(crate) fn update<const N: usize>(y: &mut [f32], inputs: [&[f32]; N], f: impl Fn(f32, [f32; N]) -> f32) {
    let len = y.len();
    let inputs = inputs.map(
        #[inline(always)]
        |input| &input[..len],
    );
    for i in 0..len {
        y[i] = f(
            y[i],
            inputs.map(
                #[inline(always)]
                |input| input[i],
            ),
        );
    }
}

/// Like [`map`], with one input, which may be `y` itself. Call this inside [`dispatch`].
#[inline(always)]
pub(crate) fn map_operand(x: Operand<'_>, y: &mut [f32], f: impl Fn(f32) -> f32) {
    match x {
        Operand::Same => inlined!(update(y, [], |x, []| f(x))),
        Operand::Other(x) => inlined!(map([x], y, |[x]| f(x))),
    }
}

/// Like [`map`], with two inputs. Each may be `y` itself. Call this inside [`dispatch`].
#[inline(always)]
pub(crate) fn map_operands(a: Operand<'_>, b: Operand<'_>, y: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    match (a, b) {
        (Operand::Same, Operand::Same) => inlined!(update(y, [], |x, []| f(x, x))),
        (Operand::Same, Operand::Other(b)) => inlined!(update(y, [b], |a, [b]| f(a, b))),
        (Operand::Other(a), Operand::Same) => inlined!(update(y, [a], |b, [a]| f(a, b))),
        (Operand::Other(a), Operand::Other(b)) => inlined!(map([a, b], y, |[a, b]| f(a, b))),
    }
}

#[inline(always)]
fn add_to_partial_sums(sums: &mut [f32; LANES], x: &[f32]) {
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        for j in 0..LANES {
            sums[j] += block[j];
        }
    }
    for (sum, x) in sums.iter_mut().zip(tail) {
        *sum += x;
    }
}

#[inline(always)]
fn add_partial_sums(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            sums[j] += sums[j + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Sum of all elements, in an order that depends only on the number of elements. Call this inside [`dispatch`].
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    add_to_partial_sums(&mut sums, x);
    add_partial_sums(sums)
}

/// Sum of `f([inputs[0][i], ..])`, in an order that depends only on the element count. Call this inside [`dispatch`].
#[inline(always)]
pub(crate) fn fold<const N: usize>(inputs: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let len = inputs[0].len();
    let mut sums = [0.0; LANES];
    let mut values = [0.0; BLOCK];
    let mut start = 0;
    while start < len {
        let end = (start + BLOCK).min(len);
        let values = &mut values[..end - start];
        map(
            inputs.map(
                #[inline(always)]
                |input| &input[start..end],
            ),
            values,
            &f,
        );
        add_to_partial_sums(&mut sums, values);
        start = end;
    }
    add_partial_sums(sums)
}

/// Maximum of all elements except NaN; `-inf` if there are none. Call this inside [`dispatch`].
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

/// Returns `e^x` with a relative error below 2e-7. The result is 0 for x below -87.3, Inf for x above 88.7, and NaN for
/// NaN. Uses range reduction by powers of two (Cody and Waite 1980) and a polynomial for `e^r` with `|r| <= ln 2 / 2`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer in the low bits. `as i32` would saturate, and would not vectorize.
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
    // Scales in two steps, so that the scale does not overflow for results above 2^127.
    let bits = (rounded.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    let half = bits >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let value = p * scale(half) * scale(bits - half);
    if x < -87.3 { 0.0 } else { value }
}

/// The normal distribution's `(cumulative, density)` at x, for GELU: `Phi(x) = (1 + erf(x / sqrt 2)) / 2`. `Phi(-z) =
/// e^{-z^2/2} t P(t)` with `t = 1 / (1 + 0.27 z)`. The polynomial P interpolates at the 9 Chebyshev nodes for z up to
/// 13.5, with a relative error of 3e-8 before rounding. In total, the relative error is below 1e-6 for |x| < 5, and the
/// absolute error is below 2e-7 everywhere.
#[inline(always)]
pub(crate) fn normal(x: f32) -> (f32, f32) {
    const P: [f32; 9] = [
        0.028_988_64,
        -0.126_661_24,
        0.170_233_53,
        -0.069_816_08,
        0.108_303_25,
        0.071_824_397,
        0.101_872_48,
        0.107_533_85,
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
    (cumulative, e * 0.398_942_3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_has_f32_accuracy() {
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
    fn normal_has_the_documented_accuracy() {
        // Computes Phi by its series around 0: Marsaglia 2004, <https://doi.org/10.18637/jss.v011.i04>.
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
            // In the lower tail, cancellation makes the series inaccurate, so the relative error is not checked there.
            if x > -3.0 {
                assert!((f64::from(cumulative) / exact.0 - 1.0).abs() < 2e-6, "Phi({x}) = {cumulative}");
            }
        }
        assert_eq!((normal(40.0), normal(-40.0)), ((1.0, 0.0), (0.0, 0.0)));
    }

    #[test]
    fn an_element_does_not_depend_on_its_index() {
        let x: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let square = |x: &[f32]| {
            let mut y = vec![0.0; x.len()];
            dispatch(|| map([x], &mut y, |[x]| exp(x) * x));
            y
        };
        let whole = square(&x);
        for start in 0..x.len() {
            assert_eq!(square(&x[start..]), whole[start..]);
        }
    }

    /// Tests that, for each instruction set, the loops use the same fused multiply-adds, the same order of additions
    /// and the same approximations.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_vector_width_does_not_change_bits() {
        use pulp::Simd;

        struct Loops<'a>(&'a [f32], &'a mut Vec<f32>);
        impl pulp::WithSimd for Loops<'_> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                let Self(x, y) = self;
                y.resize(x.len(), 0.0);
                inlined!(map([x], y, |[x]| exp(x) * normal(x).0 + x / (1.0 + x.abs()).sqrt()));
                let fold = inlined!(fold([x], |[x]| x.mul_add(x, exp(x))));
                y.extend([sum(x), max(x), fold]);
            }
        }
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.7).sin() * 5.0).collect();
        let mut results: Vec<(&str, Vec<f32>)> = Vec::new();
        let mut run = |name, on: &dyn Fn(Loops<'_>)| {
            let mut y = Vec::new();
            on(Loops(&x, &mut y));
            results.push((name, y));
        };
        run("baseline", &|loops| Simd::vectorize(pulp::Scalar, loops));
        if let Some(simd) = pulp::x86::V3::try_new() {
            run("AVX2", &|loops| Simd::vectorize(simd, loops));
        }
        if let Some(simd) = pulp::x86::V4::try_new() {
            run("AVX-512", &|loops| Simd::vectorize(simd, loops));
        }
        for (name, y) in &results {
            let differs = y.iter().zip(&results[0].1).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{name}");
        }
    }
}
