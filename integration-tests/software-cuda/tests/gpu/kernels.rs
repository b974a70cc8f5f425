//! Checks that the test kernels compute the right values, without findings, under every policy.

use shardflow_software_cuda::POLICIES;

use crate::api::Arg::{F, I, P};
use crate::api::{self, alloc, filled, free, function, launch, read, stream};
use crate::{child, cuda};

fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Allocates device memory with these numbers as bf16, two per word.
fn bf16_buffer(values: &[f32]) -> u64 {
    let words: Vec<f32> = values
        .chunks(2)
        .map(|pair| f32::from_bits(u32::from(bf16(pair[0])) | u32::from(pair.get(1).map_or(0, |x| bf16(*x))) << 16))
        .collect();
    filled(&words)
}

/// In the child: checks the results of all test kernels.
pub fn check_kernels() {
    api::use_device(0);
    let (module, s) = (api::module(), stream());
    let kernel = |name| function(module, name);
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let (a, out) = (filled(&x), alloc(1024));

    launch(kernel("add"), (4, 256), 0, s, &[P(out), P(a), P(a), I(1000)]);
    assert_eq!(read(out, 1000, s), x.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
    launch(kernel("row_sum"), (10, 96), 0, s, &[P(out), P(a), I(100)]);
    let sums: Vec<f32> = x.chunks(100).map(|row| row.iter().sum()).collect();
    assert_eq!(read(out, 10, s), sums);
    launch(kernel("reverse"), (5, 200), 800, s, &[P(out), P(a), I(200)]);
    assert_eq!(read(out, 200, s), x[..200].iter().rev().copied().collect::<Vec<_>>());
    launch(kernel("rotate"), (1, 64), 0, s, &[P(out), P(a)]);
    assert_eq!(read(out, 64, s)[..33], [&x[1..32], &[0.0, 33.0]].concat());
    launch(kernel("whole_barrier"), (1, 64), 0, s, &[P(out)]);
    launch(kernel("copy_wide"), (2, 128), 0, s, &[P(out), P(a), I(250)]);
    assert_eq!(read(out, 1000, s), x);
    launch(kernel("normalise"), (10, 100), 0, s, &[P(out), I(100)]);
    assert!((read(out, 100, s)[99] - 99.0 / 4950.0).abs() < 1e-6);

    cuda!(cuMemsetD32Async(out, 0, 1, s));
    launch(kernel("count_blocks"), (7, 64), 0, s, &[P(out)]);
    assert_eq!(read(out, 1, s), [7.0]);
    launch(kernel("warp_functions"), (1, 64), 0, s, &[P(out)]);
    assert!(read(out, 64, s).iter().all(|v| v.to_bits() == 511), "{:?}", read(out, 64, s).map_bits());

    let h = bf16_buffer(&x[..33]);
    launch(kernel("scale_pairs"), (1, 32), 0, s, &[P(h), F(2.0), I(33)]);
    launch(kernel("scale_singly"), (2, 32), 0, s, &[P(h), F(2.0), I(33)]);
    let expected: Vec<u32> =
        (0..16).map(|i| u32::from(bf16(8.0 * i as f32)) | u32::from(bf16(8.0 * i as f32 + 4.0)) << 16).collect();
    assert_eq!(read(h, 16, s).map_bits(), expected);

    let (ma, mb): (Vec<f32>, Vec<f32>) = (0..256).map(|i| ((i % 7) as f32 - 3.0, (i % 5) as f32 - 2.0)).unzip();
    let (da, db) = (bf16_buffer(&ma), bf16_buffer(&mb));
    launch(kernel("tile_product"), (1, 32), 0, s, &[P(out), P(da), P(db)]);
    let product = |i: usize, j: usize| 2.0 * (0..16).map(|k| ma[i * 16 + k] * mb[j * 16 + k]).sum::<f32>();
    assert_eq!(read(out, 256, s), (0..256).map(|n| product(n / 16, n % 16)).collect::<Vec<_>>());

    for address in [a, out, h, da, db] {
        free(address);
    }
    cuda!(cuStreamDestroy_v2(s));
    cuda!(cuModuleUnload(module));
}

trait Bits {
    fn map_bits(&self) -> Vec<u32>;
}

impl Bits for Vec<f32> {
    fn map_bits(&self) -> Vec<u32> {
        self.iter().map(|v| v.to_bits()).collect()
    }
}

/// In the child: checks the errors and options of the compiler.
pub fn check_compiler() {
    api::use_device(0);
    let log = api::compile("extern \"C\" __global__ void f(float* x) {\n  x[0] = undeclared;\n}\n", &[]).unwrap_err();
    assert!(log.contains("kernels.cu:2") && log.contains("undeclared"), "{log}");
    let text = "extern \"C\" __global__ void __launch_bounds__(64) f(float* x) { x[0] = N; }";
    let image = api::compile(text, &["-DN=3", "--std=c++17"]).unwrap();
    let mut module = std::ptr::null_mut();
    cuda!(cuModuleLoadData(&mut module, image.as_ptr().cast()));
    let (f, s, x) = (function(module, "f"), stream(), alloc(1));
    launch(f, (1, 1), 0, s, &[P(x)]);
    assert_eq!(read(x, 1, s), [3.0]);
    let refused = api::try_launch(f, (1, 96), 0, s, &[P(x)]);
    assert_eq!(refused, cudarc::driver::sys::CUresult::CUDA_ERROR_INVALID_VALUE, "96 threads exceed the launch bounds");
    free(x);
    cuda!(cuStreamDestroy_v2(s));
}

#[test]
fn kernels_compute_the_right_values() {
    for (policy, _) in POLICIES {
        for seed in 1..4 {
            child::expect_clean("kernels", 1, policy, seed);
        }
    }
}

#[test]
fn the_compiler_reports_errors_and_accepts_options() {
    child::expect_clean("compiler", 1, "random", 1);
}
