//! Counter-based initial weights: an element depends only on the seed, the parameter's name and the element's index in
//! the whole parameter. Every shard computes its own part, and every layout starts from the same bits.

use shardflow_kernels::hash::{SplitMix64, fnv1a};
use shardflow_kernels::tensor::Region;

/// How a parameter is initialized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with mean 0.
    Normal {
        /// Standard deviation. The type is f64, so that 0.02 is rounded to f64 and not to f32.
        std: f64,
    },
    Ones,
    Zeros,
}

impl Init {
    pub(crate) fn magnitude_bound(self) -> f64 {
        match self {
            // `standard_normal` is largest for u = 2^-54: sqrt(-2 ln u) is then below 8.66.
            Init::Normal { std } => 8.7 * std.abs(),
            Init::Ones => 1.0,
            Init::Zeros => 0.0,
        }
    }
}

/// SplitMix64's output function of a counter. Steele, Lea and Flood 2014, <https://doi.org/10.1145/2660193.2660195>.
pub fn mix(counter: u64) -> u64 {
    SplitMix64(counter).draw()
}

/// Element `index` of the standard normal sequence of `key`. It is the cosine branch of the Box-Muller transform,
/// applied to the counters `2 index` and `2 index + 1`. <https://doi.org/10.1214/aoms/1177706645>
fn standard_normal(key: u64, index: u64) -> f64 {
    let counter = key.wrapping_add(index.wrapping_mul(2));
    let unit = 1.0 / (1u64 << 53) as f64;
    // Adding 0.5 keeps u1 above 0: the logarithm of 0 is undefined.
    let u1 = ((mix(counter) >> 11) as f64 + 0.5) * unit;
    let u2 = (mix(counter.wrapping_add(1)) >> 11) as f64 * unit;
    (-2.0 * u1.ln()).sqrt() * (2.0 * std::f64::consts::PI * u2).cos()
}

/// Writes the initial values in `region` of the parameter `name` to `out`, row-major. The whole parameter has `shape`.
/// Elements are numbered row-major, so `[heads, head_dim, width]` and `[heads * head_dim, width]` get the same values.
///
/// # Panics
/// When `region` is not inside `shape`, or `out.len()` is not `region.element_count()`.
pub fn fill(init: Init, seed: u64, name: &str, shape: &[usize], region: &Region, out: &mut [f32]) {
    assert_eq!(
        out.len(),
        region.element_count(),
        "{name}: the buffer does not have the number of elements of region {region:?}"
    );
    assert!(
        shape.len() == region.start.len()
            && shape.len() == region.size.len()
            && (0..shape.len()).all(|d| region.start[d] + region.size[d] <= shape[d]),
        "{name}: region {region:?} is not inside shape {shape:?}"
    );
    let std = match init {
        Init::Normal { std } => std,
        Init::Ones => return out.fill(1.0),
        Init::Zeros => return out.fill(0.0),
    };
    let key = mix(seed ^ fnv1a(name));
    for (value, index) in out.iter_mut().zip(region.runs(shape).into_iter().flatten()) {
        *value = (standard_normal(key, index as u64) * std) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(name: &str, shape: &[usize], region: &Region) -> Vec<f32> {
        let mut out = vec![f32::NAN; region.element_count()];
        fill(Init::Normal { std: 0.02 }, 1337, name, shape, region, &mut out);
        out
    }

    #[test]
    fn hashes_have_their_known_values() {
        assert_eq!(mix(0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(fnv1a(""), 0xCBF2_9CE4_8422_2325);
        assert_eq!(fnv1a("wte.weight"), 0x61D3_A46D_83BC_4189);
    }

    /// The expected values come from the same formulas in numpy.
    #[test]
    fn values_equal_those_of_numpy() {
        let shape = [65, 128];
        let all = normal("wte.weight", &shape, &Region::whole(&shape));
        let expected = [-0.020_832_26_f32, -0.002_899_026, 0.015_812_693, 0.008_699_37];
        for (got, want) in all.iter().zip(expected) {
            // The platform's `ln` and `cos` may differ in the last bit.
            assert!((got - want).abs() <= want.abs() * f32::EPSILON, "got {got}, expected {want}");
        }
        let mean = all.iter().map(|v| f64::from(*v)).sum::<f64>() / all.len() as f64;
        let square = all.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / all.len() as f64;
        assert!(mean.abs() < 0.001 && (square.sqrt() - 0.02).abs() < 0.001, "mean {mean}, std {}", square.sqrt());
    }

    #[test]
    fn a_region_has_the_values_of_the_whole_parameter() {
        let shape = [3, 4, 5];
        let all = normal("w", &shape, &Region::whole(&shape));
        let region = Region { start: vec![1, 2, 1], size: vec![2, 2, 3] };
        let part = normal("w", &shape, &region);
        let mut expected = Vec::new();
        for i in 1..3 {
            for j in 2..4 {
                expected.extend((1..4).map(|k| all[(i * 4 + j) * 5 + k]));
            }
        }
        assert_eq!(part, expected);
        // Merged leading dims keep the row-major order, and with it the values.
        assert_eq!(all, normal("w", &[12, 5], &Region::whole(&[12, 5])));
        assert_ne!(all, normal("w2", &shape, &Region::whole(&shape)));
    }

    #[test]
    fn scalar_empty_and_constant_parameters_are_filled() {
        assert_eq!(normal("s", &[], &Region::whole(&[])).len(), 1);
        assert!(normal("e", &[2, 3], &Region { start: vec![2, 0], size: vec![0, 3] }).is_empty());
        let mut out = [f32::NAN; 2];
        fill(Init::Ones, 1, "v", &[4], &Region { start: vec![1], size: vec![2] }, &mut out);
        assert_eq!(out, [1.0, 1.0]);
        fill(Init::Zeros, 1, "v", &[4], &Region { start: vec![1], size: vec![2] }, &mut out);
        assert_eq!(out, [0.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "is not inside shape")]
    fn a_region_outside_the_shape_panics() {
        normal("w", &[2, 2], &Region { start: vec![1, 0], size: vec![2, 2] });
    }
}
