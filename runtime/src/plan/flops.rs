//! Counts the floating-point operations of a step's matrix products and attention, to compare with a machine's peak.
//!
//! A product of `[m, k]` and `[k, n]` counts `2 m n k`. Attention over `t` tokens counts `4 t^2 d` in forward and
//! `8 t^2 d` in backward for each head of depth `d`. Masking is ignored, as in Chowdhery et al. 2022
//! (<https://arxiv.org/abs/2204.02311>, appendix B). Other ops are not counted.

use shardflow_kernels::op::Op;

use crate::graph::{Graph, NodeOp, Rate};

/// Floating-point operations of one step, summed over all devices. Each product counts once, however it is split.
pub fn step_flops(graph: &Graph, micro_batches: usize) -> u64 {
    let mut total = 0;
    for node in graph.nodes() {
        let NodeOp::Kernel(op) = &node.op else { continue };
        let shape = |input: usize| graph.shape(node.inputs[input]);
        // `b h t^2 d` for the shape `[b, t, h, d]`.
        let scores = |input: usize| match shape(input) {
            &[batch, time, heads, depth] => batch * heads * time * time * depth,
            _ => 0,
        };
        let flops = match op {
            Op::Einsum(einsum) => {
                let dims = einsum.gemm_dims(shape(0), shape(1));
                dims.map_or(0, |dims| 2 * dims.m * dims.n * dims.k)
            }
            Op::Attention { .. } => 4 * scores(0),
            Op::AttentionGrad { .. } => 8 * scores(1),
            _ => 0,
        };
        let per_micro_batch = node.outputs.first().is_some_and(|out| graph.tensor(*out).rate == Rate::MicroBatch);
        total += flops as u64 * if per_micro_batch { micro_batches as u64 } else { 1 };
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::GptConfig;
    use crate::plan::Schedule;
    use crate::plan::tests::{GPT, gpt};

    /// Per token, `N` weights take `6 N` operations, and each feature of attention takes `12 t` with `t` tokens of
    /// context.
    #[test]
    fn flops_of_a_gpt_equal_the_formula_on_any_mesh() {
        let GptConfig { vocabulary, layers, width, context, batch, .. } = GPT;
        let weights = layers * 12 * width * width + vocabulary * width;
        let tokens = batch * context;
        let expected = tokens * (6 * weights + layers * 12 * context * width);
        for (mesh, micro_batches) in [("data=1", 1), ("data=1", 4), ("data=2,stage=2,tensor=2", 2)] {
            let plan = gpt(mesh, micro_batches, Schedule::OneFOneB);
            assert_eq!(step_flops(&plan.graph, micro_batches), expected as u64, "{mesh}, {micro_batches}");
        }
    }
}
