//! Planted mistakes in kernels and products.

use crate::api::Arg::{I, P};
use crate::api::{alloc, filled, free, launch, stream, wait};
use crate::bugs::{Bug, LoadedKernels, run_all};
use crate::{cuda, products};

/// The mistakes.
pub const BUGS: &[Bug] = &[
    Bug { name: "__syncthreads missing in a reduction", kinds: &["shared-race", "uninitialised"], run: reduction },
    Bug { name: "__syncthreads missing around a tile", kinds: &["shared-race", "uninitialised"], run: tile },
    Bug { name: "__syncthreads missing in place, in global memory", kinds: &["race-in-launch"], run: in_place },
    Bug { name: "__syncwarp missing", kinds: &["shared-race", "uninitialised"], run: warp },
    Bug { name: "shuffle instead of __syncwarp", kinds: &["shared-race", "uninitialised"], run: shuffled },
    Bug { name: "uninitialised shared memory", kinds: &["uninitialised"], run: fresh_tile },
    Bug { name: "dynamic shared memory too small", kinds: &["bounds"], run: small_tile },
    Bug { name: "blocks add without atomics", kinds: &["race-in-launch"], run: blocks },
    Bug { name: "barrier that some threads never reach", kinds: &["barrier", "warp"], run: half_barrier },
    Bug { name: "lanes of a warp in different warp functions", kinds: &["warp"], run: functions },
    Bug { name: "two streams share a workspace", kinds: &["race"], run: workspace },
    Bug { name: "product reads what another stream still writes", kinds: &["race"], run: product_input },
    Bug { name: "product with too long a leading dimension", kinds: &["bounds", "uninitialised"], run: product_bounds },
];

/// In the child: runs all programs of this file.
pub fn check() {
    run_all(BUGS, 1);
}

fn with_buffers(n: usize, run: impl FnOnce(u64, u64, cudarc::driver::sys::CUstream)) {
    let (x, out, s) = (filled(&vec![1.0; n]), alloc(n), stream());
    run(x, out, s);
    wait(s);
    free(x);
    free(out);
    cuda!(cuStreamDestroy_v2(s));
}

fn reduction(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "row_sum_no_barrier" } else { "row_sum" };
    with_buffers(400, |x, out, s| launch(loaded.kernel(name), (4, 96), 0, s, &[P(out), P(x), I(100)]));
}

fn tile(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "reverse_no_barrier" } else { "reverse" };
    with_buffers(256, |x, out, s| launch(loaded.kernel(name), (2, 128), 512, s, &[P(out), P(x), I(128)]));
}

fn in_place(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "normalise_no_barrier" } else { "normalise" };
    with_buffers(256, |x, _, s| launch(loaded.kernel(name), (2, 128), 0, s, &[P(x), I(128)]));
}

fn warp(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "rotate_no_barrier" } else { "rotate" };
    with_buffers(64, |x, out, s| launch(loaded.kernel(name), (1, 64), 0, s, &[P(out), P(x)]));
}

fn shuffled(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "rotate_shuffle" } else { "rotate" };
    with_buffers(64, |x, out, s| launch(loaded.kernel(name), (1, 64), 0, s, &[P(out), P(x)]));
}

fn fresh_tile(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "reverse_uninitialised" } else { "reverse" };
    with_buffers(64, |x, out, s| launch(loaded.kernel(name), (1, 64), 256, s, &[P(out), P(x), I(64)]));
}

fn small_tile(loaded: &LoadedKernels, planted: bool) {
    let bytes = if planted { 252 } else { 256 };
    with_buffers(64, |x, out, s| launch(loaded.kernel("reverse"), (1, 64), bytes, s, &[P(out), P(x), I(64)]));
}

fn blocks(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "count_blocks_plainly" } else { "count_blocks" };
    with_buffers(64, |x, _, s| launch(loaded.kernel(name), (3, 32), 0, s, &[P(x)]));
}

fn functions(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "vote_apart" } else { "vote_together" };
    with_buffers(64, |_, out, s| launch(loaded.kernel(name), (1, 64), 0, s, &[P(out)]));
}

fn half_barrier(loaded: &LoadedKernels, planted: bool) {
    let name = if planted { "half_barrier" } else { "whole_barrier" };
    with_buffers(64, |_, out, s| launch(loaded.kernel(name), (1, 64), 0, s, &[P(out)]));
}

fn workspace(_: &LoadedKernels, planted: bool) {
    let (x, second, work) = (filled(&[1.0; 64]), stream(), [alloc(4096), alloc(4096)]);
    with_buffers(64, |out, out2, s| {
        wait(s);
        let gemm = products::Gemm { workspace: (work[0], 16384), ..products::Gemm::square(x, x, out, 8) };
        gemm.run(s);
        let own = work[usize::from(!planted)];
        products::Gemm { d: out2, workspace: (own, 16384), ..gemm }.run(second);
        wait(second);
    });
    cuda!(cuStreamDestroy_v2(second));
    work.into_iter().for_each(free);
    free(x);
}

fn product_input(_: &LoadedKernels, planted: bool) {
    let second = stream();
    with_buffers(64, |x, out, s| {
        cuda!(cuMemsetD8Async(x, 0, 256, second));
        if !planted {
            crate::api::order(second, s);
        }
        products::Gemm::square(x, x, out, 8).run(s);
        wait(second);
    });
    cuda!(cuStreamDestroy_v2(second));
}

fn product_bounds(_: &LoadedKernels, planted: bool) {
    with_buffers(64, |x, out, s| {
        let gemm = products::Gemm::square(x, x, out, 8);
        products::Gemm { leading_a: 8 + i64::from(planted), ..gemm }.run(s);
    });
}
