//! AdamW's settings, and upper bounds of what it writes.
//!
//! # A step whose update would not be finite
//!
//! Finite gradients can still make a parameter or a moment infinite: AdamW squares them. The host decides on the update, and it
//! knows the gradients' norm `g`, the learning rate and nothing of single elements. So it carries, from step to step, a bound of
//! the magnitude of all parameters `p` and of each moment (`Bounds`), and calls the update off where a bound passes the largest
//! float. Sound, because no element is above its bound; cheap, because a step costs the host a dozen operations.
//!
//! An element's gradient, after clipping, is at most `G = min(g, max_norm)`. From `m' = b1 m + (1 - b1) x`,
//! `v' = b2 v + (1 - b2) x^2` with `|x| <= G`:
//!
//! - `M' = b1 M + (1 - b1) G` and `V' = b2 V + (1 - b2) G^2`.
//! - If `|m| <= Q sqrt(v)` for all elements, then `|m'| <= b1 Q sqrt(v) + (1 - b1) |x|`, which by Cauchy and Schwarz is at most
//!   `sqrt(b1^2 Q^2 / b2 + (1 - b1)^2 / (1 - b2)) sqrt(v')`: that root is `Q'`. Moments start at 0, with `Q = 0`; nothing is
//!   known of those of a file.
//! - `p' = p (1 - lr decay) - s m' / (r sqrt(v') + eps)` with `s = lr / (1 - b1^t) <= lr / (1 - b1)` and `r >= 1`, so the quotient
//!   is at most `Q'` and at most `M' / eps`. Hence `P' = P max(1, |1 - lr decay|) + s min(Q', M' / eps)`, if `s M'` is a float
//!   itself; tensors without decay keep the 1.
//!
//! Rounding: `ROUNDING` is far above the rounding of the few operations of a step. Floats that are too small count as 0: a square
//! below `2^-150` loses up to `2^-148 / (1 - b2)` of `v`, which moves the bound of the quotient to `Q' max(1, t / eps)`,
//! `t = 2^-74 / sqrt(1 - b2)`.

/// Above the rounding of one step's operations, relative.
const ROUNDING: f64 = 1.0 + 1.0 / (1 << 21) as f64;

/// A few times the smallest float, `2^-149`, to which numbers below a float's usual precision are rounded.
const SMALLEST: f64 = f64::from_bits((1023 - 146) << 52);

/// AdamW's settings, see [`shardflow_kernels::op::Op::AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay rates of the moments.
    pub betas: (f32, f32),
    /// Added to the denominator.
    pub eps: f32,
    /// Decoupled decay, applied to tensors of two dims or more.
    pub weight_decay: f32,
    /// Largest global gradient norm; infinite means no clipping.
    pub max_norm: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, max_norm: f32::INFINITY }
    }
}

impl AdamW {
    /// What is wrong with the settings, if anything is.
    pub(crate) fn wrong(&self) -> Option<String> {
        let Self { betas: (beta1, beta2), eps, weight_decay, max_norm } = *self;
        // Written so that a NaN fails too.
        let fine = [
            ((0.0..1.0).contains(&beta1) && (0.0..1.0).contains(&beta2), "betas must be at least 0 and below 1"),
            (
                eps > 0.0 && eps.is_finite(),
                "eps must be finite and above 0, or an element without a gradient becomes NaN",
            ),
            (weight_decay >= 0.0 && weight_decay.is_finite(), "weight_decay must be finite and not negative"),
            (max_norm > 0.0, "max_norm must be above 0; infinity means no clipping"),
        ];
        fine.iter().find(|(fine, _)| !fine).map(|(_, rule)| format!("{rule}: got {self:?}"))
    }

    /// Bounds of what the update of a step with gradients of this norm leaves, given those from before it.
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

/// Upper bounds of the magnitude of what an optimizer writes, over all elements of all devices: the same on all processes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Bounds {
    /// Of parameters.
    pub(crate) parameter: f64,
    /// Of first moments.
    pub(crate) first: f64,
    /// Of second moments.
    pub(crate) second: f64,
    /// Of a first moment over the root of its second one.
    pub(crate) ratio: f64,
}

impl Bounds {
    /// Before what a file holds is written: nothing is known of how its moments go together.
    pub(crate) const OF_A_FILE: Self = Self { parameter: 0.0, first: 0.0, second: 0.0, ratio: f64::INFINITY };

    /// What may not be finite any more, if anything.
    pub(crate) fn overflow(&self) -> Option<&'static str> {
        let Self { parameter, first, second, .. } = *self;
        let parts = [("a second moment", second), ("a first moment", first), ("a parameter", parameter)];
        let is_float = |bound: f64| bound <= f64::from(f32::MAX);
        // A NaN is none.
        parts.into_iter().find(|(_, bound)| !is_float(*bound)).map(|(name, _)| name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An element by itself, in floats, as the kernels compute it.
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

    /// Whatever gradients and learning rates come: what the bounds allow is finite and within them.
    #[test]
    fn no_element_passes_its_bound() {
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
            // Exponents of ten, of which a few lead out of a float's range.
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
                assert!(inside, "trial {trial}, step {step}, {adamw:?}: {p} {m} {v} against {bounds:?}");
            }
        }
        assert!((100..12_000).contains(&refused), "{refused} of 23600 steps were refused");
    }

    /// Trainings that are in order are never called off, however long.
    #[test]
    fn usual_steps_stay_far_below_the_bounds() {
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
    fn what_cannot_be_held_is_named() {
        let adamw = AdamW::default();
        let named =
            |norm, rate| adamw.bounds_after(Bounds { parameter: 1.0, ..Bounds::default() }, norm, rate).overflow();
        assert_eq!(named(1e18, 1e-3), None);
        assert_eq!(named(1e21, 1e-3), Some("a second moment"));
        assert_eq!(named(1.0, f32::MAX), Some("a parameter"));
        let clipped = AdamW { max_norm: 1.0, ..adamw };
        assert_eq!(clipped.bounds_after(Bounds::default(), 1e30, 1e-3).overflow(), None);
    }
}
