//! AdamW's settings, and upper bounds of the values that it writes.
//!
//! # A step whose update would not be finite
//!
//! Finite gradients can still make a parameter or a moment infinite, because AdamW squares them. The host decides
//! whether to apply an update. It knows the gradients' norm `g` and the learning rate, but not the elements. So it
//! keeps upper bounds (`Bounds`) across steps: `P` of `|p|` (parameters), and `M` and `V` of the moments `|m|` and `v`.
//! It skips an update if a bound exceeds the largest float. No element exceeds its bound, and the check is cheap.
//!
//! The gradient `x` of an element after clipping satisfies `|x| <= G = min(g, max_norm)`. The new values are
//! `m' = b1 m + (1 - b1) x`, `v' = b2 v + (1 - b2) x^2` and `p'` as below. Their bounds are:
//!
//! - `M' = b1 M + (1 - b1) G` and `V' = b2 V + (1 - b2) G^2`.
//! - If `|m| <= Q sqrt(v)` for all elements, then `|m'| <= b1 Q sqrt(v) + (1 - b1) |x|`. By Cauchy and Schwarz, this is
//!   at most `Q' sqrt(v')` with `Q' = sqrt(b1^2 Q^2 / b2 + (1 - b1)^2 / (1 - b2))`. Moments start at 0, with `Q = 0`;
//!   for moments from a checkpoint, `Q` is unknown and counts as infinite.
//! - `p' = p (1 - lr decay) - s m' / (r sqrt(v') + eps)` with `s = lr / (1 - b1^t) <= lr / (1 - b1)` and
//!   `r = 1 / sqrt(1 - b2^t) >= 1`. The quotient without `s` is at most `Q'`, and at most `M' / eps`. Hence
//!   `P' = P max(1, |1 - lr decay|) + s min(Q', M' / eps)`, if `s M'` is a finite float. The 1 covers tensors without
//!   decay.
//!
//! Rounding: `ROUNDING` is far above the rounding error of the few operations of a step. Underflow: a square below
//! `2^-150` rounds to 0, so `v` loses up to `2^-148 / (1 - b2)`. The bound of the quotient then becomes
//! `Q' max(1, t / eps)` with `t = 2^-74 / sqrt(1 - b2)`.

/// A factor that exceeds 1 by more than the relative rounding error of one step's operations.
const ROUNDING: f64 = 1.0 + 1.0 / (1 << 21) as f64;

/// A few times the smallest subnormal float, `2^-149`, and so above the absolute rounding error of subnormal floats.
const SMALLEST: f64 = f64::from_bits((1023 - 146) << 52);

/// AdamW's settings, see [`shardflow_kernels::op::Op::AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay rates of the first and second moment.
    pub betas: (f32, f32),
    /// The number added to the denominator.
    pub eps: f32,
    /// Decoupled weight decay, applied to tensors with two or more dims.
    pub weight_decay: f32,
    /// Maximum global gradient norm; infinity disables clipping.
    pub max_norm: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, max_norm: f32::INFINITY }
    }
}

/// Writes the settings without the maximum norm.
impl std::fmt::Display for AdamW {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { betas: (beta1, beta2), eps, weight_decay, .. } = self;
        write!(f, "AdamW, betas {beta1} and {beta2}, eps {eps:e}, weight decay {weight_decay}")
    }
}

impl AdamW {
    pub(crate) fn invalid(&self) -> Option<String> {
        let Self { betas: (beta1, beta2), eps, weight_decay, max_norm } = *self;
        // Each condition is false for NaN.
        let conditions = [
            ((0.0..1.0).contains(&beta1) && (0.0..1.0).contains(&beta2), "betas must be at least 0 and below 1"),
            (
                eps > 0.0 && eps.is_finite(),
                "eps must be finite and above 0, or an element without a gradient becomes NaN",
            ),
            (weight_decay >= 0.0 && weight_decay.is_finite(), "weight_decay must be finite and not negative"),
            (max_norm > 0.0, "max_norm must be above 0; infinity disables clipping"),
        ];
        conditions.iter().find(|(holds, _)| !holds).map(|(_, rule)| format!("{rule}: got {self:?}"))
    }

    /// The bounds after the update of a step with this gradient norm, given the bounds before it.
    pub(crate) fn bounds_after(&self, before: Bounds, norm: f64, learning_rate: f32) -> Bounds {
        let [beta1, beta2, eps] = [self.betas.0, self.betas.1, self.eps].map(f64::from);
        let rate = f64::from(learning_rate).abs();
        let gradient = norm.min(f64::from(self.max_norm)) * ROUNDING + 2f64.powi(-74);
        let first = (beta1 * before.first + (1.0 - beta1) * gradient) * ROUNDING;
        let second = (beta2 * before.second + (1.0 - beta2) * gradient * gradient) * ROUNDING + SMALLEST;
        let kept = if beta1 == 0.0 { 0.0 } else { (beta1 * before.ratio).powi(2) / beta2 };
        let ratio = (kept + (1.0 - beta1).powi(2) / (1.0 - beta2)).sqrt() * ROUNDING;
        let small = 2f64.powi(-74) / (1.0 - beta2).sqrt();
        let quotient = (ratio * (small / eps).max(1.0)).min(first / eps);
        let step_size = rate / (1.0 - beta1);
        let change = if step_size * first > f64::from(f32::MAX) { f64::INFINITY } else { step_size * quotient };
        let keep = (1.0 - f64::from(learning_rate) * f64::from(self.weight_decay)).abs().max(1.0);
        Bounds { parameter: (before.parameter * keep + change) * ROUNDING, first, second, ratio }
    }
}

/// The kind of value that an update could make infinite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overflow {
    /// A parameter, which depends on the gradients and the learning rate.
    Parameter,
    /// A first moment, which depends on the gradients alone.
    FirstMoment,
    /// A second moment, which depends on the gradients alone.
    SecondMoment,
}

/// Upper bounds of the magnitude of all elements that the optimizer writes, on all devices; equal on all processes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Bounds {
    pub(crate) parameter: f64,
    pub(crate) first: f64,
    pub(crate) second: f64,
    /// Ratio of a first moment to the square root of its second moment.
    pub(crate) ratio: f64,
}

impl Bounds {
    /// The bounds before a checkpoint is loaded. The checkpoint's values then raise these bounds, except `ratio`, which
    /// is infinite because it is unknown.
    pub(crate) const OF_CHECKPOINT: Self = Self { parameter: 0.0, first: 0.0, second: 0.0, ratio: f64::INFINITY };

    /// The kind of value that may exceed the largest float, if any.
    pub(crate) fn overflow(&self) -> Option<Overflow> {
        let Self { parameter, first, second, .. } = *self;
        let parts =
            [(Overflow::SecondMoment, second), (Overflow::FirstMoment, first), (Overflow::Parameter, parameter)];
        let is_float = |bound: f64| bound <= f64::from(f32::MAX);
        // `is_float` is false for NaN.
        parts.into_iter().find(|(_, bound)| !is_float(*bound)).map(|(kind, _)| kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One element in f32, updated as the kernels do.
    struct Element {
        p: f32,
        m: f32,
        v: f32,
    }

    impl Element {
        fn update(&mut self, adamw: &AdamW, gradient: f32, learning_rate: f32, step: i32) {
            let AdamW { betas: (beta1, beta2), eps, weight_decay, .. } = *adamw;
            let correction = |beta: f32| 1.0 - f64::from(beta).powi(step);
            let step_size = (f64::from(learning_rate) / correction(beta1)) as f32;
            let root_correction = (1.0 / correction(beta2).sqrt()) as f32;
            self.m = beta1 * self.m + (1.0 - beta1) * gradient;
            self.v = beta2 * self.v + (1.0 - beta2) * gradient * gradient;
            let change = step_size * self.m / (self.v.sqrt() * root_correction + eps);
            self.p = self.p * (1.0 - learning_rate * weight_decay) - change;
        }
    }

    /// For random gradients and learning rates, every update that the bounds allow is finite and within the bounds.
    #[test]
    fn no_element_exceeds_its_bound() {
        let mut seed = 1u64;
        let mut unit = || {
            seed = crate::init::mix(seed);
            (seed >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut refused = 0;
        for trial in 0..400 {
            let betas = [(0.9, 0.99), (0.9, 0.999), (0.99, 0.5), (0.0, 0.0), (0.95, 0.9)][trial % 5];
            let eps = [1e-8, 1e-15, 1e-30, 1e-3][trial % 4];
            let adamw = AdamW { betas, eps, ..AdamW::default() };
            let mut element = Element { p: 1.0, m: 0.0, v: 0.0 };
            let mut bounds = Bounds { parameter: 1.0, ..Bounds::default() };
            // Exponents of ten. Some of the resulting values exceed the range of f32.
            let (low, high) = (-42.0 * unit(), 21.0 * unit());
            for step in 1..60 {
                let gradient = (10f64.powf(low + (high - low) * unit()) * (2.0 * unit() - 1.0)) as f32;
                let learning_rate = 10f64.powf(-4.0 + if unit() < 0.02 { 40.0 * unit() } else { 0.0 }) as f32;
                let norm = f64::from(gradient).abs();
                let after = adamw.bounds_after(bounds, norm, learning_rate);
                if after.overflow().is_some() {
                    refused += 1;
                    continue;
                }
                bounds = after;
                element.update(&adamw, gradient, learning_rate, step);
                let Element { p, m, v } = element;
                let inside = [(p, bounds.parameter), (m, bounds.first), (v, bounds.second)];
                let inside = inside.iter().all(|(value, bound)| f64::from(value.abs()) <= *bound);
                assert!(inside, "trial {trial}, step {step}, {adamw:?}: p {p}, m {m}, v {v} exceed {bounds:?}");
            }
        }
        assert!((100..12_000).contains(&refused), "{refused} of 23600 steps were refused");
    }

    /// No update of a normal training run is refused, even after millions of steps.
    #[test]
    fn bounds_of_normal_training_stay_far_below_the_largest_float() {
        for (eps, ratio) in [(1e-8, 0.0), (1e-15, 0.0), (1e-8, f64::INFINITY)] {
            let adamw = AdamW { eps, ..AdamW::default() };
            let mut bounds = Bounds { parameter: 10.0, ratio, ..Bounds::default() };
            for step in 0..3_000_000 {
                bounds = adamw.bounds_after(bounds, if step % 1000 == 0 { 1e6 } else { 3.0 }, 1e-2);
            }
            assert!(bounds.overflow().is_none() && bounds.parameter < 1e30, "{bounds:?}");
        }
    }

    #[test]
    fn the_overflowing_value_is_named() {
        let adamw = AdamW::default();
        let overflow =
            |norm, rate| adamw.bounds_after(Bounds { parameter: 1.0, ..Bounds::default() }, norm, rate).overflow();
        assert_eq!(overflow(1e18, 1e-3), None);
        assert_eq!(overflow(1e21, 1e-3), Some(Overflow::SecondMoment));
        assert_eq!(overflow(1.0, f32::MAX), Some(Overflow::Parameter));
        let clipped = AdamW { max_norm: 1.0, ..adamw };
        assert_eq!(clipped.bounds_after(Bounds::default(), 1e30, 1e-3).overflow(), None);
    }
}
