//! How many operations a step's products and attention take: what a machine's peak is compared with.
//!
//! A product of `[m, k]` and `[k, n]` takes `2 m n k`; attention over `t` tokens with heads of depth `d` takes `4 t^2 d` a head
//! forward and `8 t^2 d` backward, as if nothing were masked, as Chowdhery et al. 2022 count (<https://arxiv.org/abs/2204.02311>,
//! appendix B). All else is left out.

use shardflow_kernels::op::Op;

use crate::graph::{Graph, NodeOp, Rate};

/// Operations of one step, over all devices: each logical product is counted once, however it is split.
pub fn step_flops(graph: &Graph, micro_batches: usize) -> u64 {
    let mut total = 0;
    for node in graph.nodes() {
        let NodeOp::Kernel(op) = &node.op else { continue };
        let shape = |input: usize| graph.shape(node.inputs[input]);
        let flops = match op {
            Op::Einsum(einsum) => {
                let dims = einsum.gemm_dims(shape(0), shape(1));
                dims.map_or(0, |dims| 2 * dims.m * dims.n * dims.k)
            }
            Op::Attention { .. } => 4 * scores(shape(0)),
            Op::AttentionGrad { .. } => 8 * scores(shape(1)),
            _ => 0,
        };
        let is_each = node.outputs.first().is_some_and(|out| graph.tensor(*out).rate == Rate::MicroBatch);
        total += flops as u64 * if is_each { micro_batches as u64 } else { 1 };
    }
    total
}

/// `b t h d` as `b h t^2 d`.
fn scores(q: &[usize]) -> usize {
    match q {
        &[batch, time, heads, depth] => batch * heads * time * time * depth,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{self, GptConfig};
    use crate::passes::{CompileOptions, compile};
    use crate::placement::Mesh;

    /// `6 N` for each token and weight of a product, and `12 t` for each token and feature of attention, whatever the mesh.
    #[test]
    fn a_gpt_takes_what_the_formula_says() {
        let (vocabulary, layers, width, context, batch) = (40, 4, 16, 8, 8);
        let config = GptConfig { vocabulary, layers, heads: 2, width, context, batch, dropout: 0.0 };
        let weights = layers * 12 * width * width + vocabulary * width;
        let tokens = batch * context;
        let expected = tokens * (6 * weights + layers * 12 * context * width);
        for (mesh, micro_batches) in [("data=1", 1), ("data=1", 4), ("data=2,stage=2,tensor=2", 2)] {
            let mut g = Graph::new(&Mesh::parse(mesh).unwrap());
            let logits = nn::gpt(&mut g, &config);
            let layout = nn::batch_layout(&g);
            let targets = g.input("targets", &[batch, context], shardflow_kernels::tensor::DType::I32, layout);
            let loss = g.cross_entropy(logits, targets);
            g.minimize(loss, crate::graph::AdamW::default());
            let plan = compile(g, &CompileOptions { micro_batches, ..CompileOptions::default() }).unwrap();
            assert_eq!(step_flops(&plan.graph, micro_batches), expected as u64, "{mesh}, {micro_batches}");
        }
    }
}
