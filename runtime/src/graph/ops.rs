//! What the planner needs about each kernel op: its factor rule, its element types and its attributes on one shard.
//! A new op is added here, in `passes::autodiff` and in the kernels crate.

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::{DType, Region};

use crate::layout_error::LayoutError;
use crate::sbp::rule::Rule;

/// Letters for `n` leading dims that an op treats alike, without the letters that the rules below name.
fn leading(n: usize) -> String {
    "abefgijlmnopqrsuxyz".chars().take(n).collect()
}

/// The factor rule of a kernel op whose inputs have these shapes.
///
/// Letters are factors; a factor of the inputs that is missing in the outputs is contracted.
pub fn rule(op: &Op, shapes: &[&[usize]]) -> Result<Rule, LayoutError> {
    let rank = |i: usize| shapes.get(i).map_or(0, |s| s.len());
    let lead = |n: usize| leading(n.max(1) - 1);
    match op {
        Op::Fill { .. } => Rule::new(&[] as &[&str], &[""]),
        Op::Copy | Op::Scale { .. } => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x}->{x}"))?.linear(&[&[0]])
        }
        Op::Add => {
            let x = leading(rank(0));
            let n = x.len().saturating_sub(rank(1));
            Rule::parse(&format!("{x},{}->{x}", &x[n..]))?.linear(&[&[0, 1]])
        }
        Op::Einsum(e) => Rule::parse(&format!("{},{}->{}", e.a, e.b, e.out))?.linear(&[&[0], &[1]]),
        Op::Embedding { .. } => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x},vc->{x}c"))?.linear(&[&[1]])
        }
        Op::EmbeddingGrad { .. } => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x},{x}c->vc"))?.linear(&[&[1]])
        }
        Op::LayerNorm { .. } => {
            let x = lead(rank(0));
            Rule::parse(&format!("{x}c,c->{x}c,{x},{x}"))?.fixed("c")
        }
        Op::LayerNormGrad => {
            let x = lead(rank(0));
            Rule::parse(&format!("{x}c,{x}c,c,{x},{x}->{x}c,c"))?.fixed("c")?.linear(&[&[0]])
        }
        Op::Gelu => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x}->{x}"))
        }
        Op::GeluGrad => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x},{x}->{x}"))?.linear(&[&[0]])
        }
        Op::Attention { .. } => Rule::parse("bthd,bthd,bthd->bthd,bht")?.fixed("td"),
        Op::AttentionGrad { .. } => {
            Rule::parse("bthd,bthd,bthd,bthd,bthd,bht->bthd,bthd,bthd")?.fixed("td")?.linear(&[&[0]])
        }
        Op::RowMax => {
            let x = lead(rank(0));
            Rule::parse(&format!("{x}v->{x}"))?.reduce('v', ReduceOp::Max)
        }
        Op::SumExpTarget { .. } => {
            let x = lead(rank(0));
            Rule::parse(&format!("{x}v,{x},{x}->{x},{x}"))
        }
        Op::TokenLoss { .. } => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x},{x},{x}->"))
        }
        Op::CrossEntropyGrad { .. } => {
            let x = lead(rank(1));
            Rule::parse(&format!(",{x}v,{x},{x},{x}->{x}v"))?.linear(&[&[0]])
        }
        Op::Dropout { .. } => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x},r->{x}"))?.fixed("r")?.linear(&[&[0]])
        }
        // AdamW reads (gradient, hyper-parameters, scale) and updates (parameter, m, v). It is elementwise in the
        // gradient and the three updated tensors.
        Op::AdamW { .. } => {
            let x = leading(rank(0));
            Rule::parse(&format!("{x},h,->{x},{x},{x}"))?.fixed("h")
        }
        // The output's rank of `SumLeading` does not follow from the inputs, see `sum_leading`.
        Op::SumLeading | Op::CopyRegion { .. } | Op::SumSquares { .. } | Op::ClipScale { .. } => Rule::parse("->"),
        // Inserted after the layout pass.
        Op::Cast => Rule::parse("->"),
        Op::Collective(_) | Op::Custom(_) => Rule::parse("->"),
    }
}

/// The rule of `SumLeading` from a tensor of rank `from` to one of rank `to`.
pub fn sum_leading(from: usize, to: usize) -> Result<Rule, LayoutError> {
    let x = leading(from);
    Rule::parse(&format!("{x}->{}", &x[from - to..]))?.linear(&[&[0]])
}

/// The required element type of an input; `None` if any type is accepted.
pub fn input_dtype(op: &Op, port: usize) -> Option<DType> {
    match (op, port) {
        (Op::Copy | Op::CopyRegion { .. } | Op::Collective(_) | Op::Custom(_), _) => None,
        (Op::Embedding { .. } | Op::EmbeddingGrad { .. }, 0) => Some(DType::I32),
        (Op::SumExpTarget { .. }, 2) | (Op::CrossEntropyGrad { .. }, 4) | (Op::Dropout { .. }, 1) => Some(DType::I32),
        _ => Some(DType::F32),
    }
}

/// Element types of the outputs.
pub fn output_dtypes(op: &Op, inputs: &[DType], outputs: usize) -> Vec<DType> {
    match op {
        Op::Copy => vec![inputs[0]; outputs],
        _ => vec![DType::F32; outputs],
    }
}

/// The op with the attributes of one shard: some depend on the shard's region of the whole tensors.
pub fn localize(op: &Op, inputs: &[Region], outputs: &[Region]) -> Op {
    match op {
        Op::Embedding { vocab, .. } => Op::Embedding { vocab_start: inputs[1].start[0], vocab: *vocab },
        Op::EmbeddingGrad { .. } => Op::EmbeddingGrad { vocab_start: outputs[0].start[0] },
        Op::SumExpTarget { vocab, .. } => {
            Op::SumExpTarget { vocab_start: *inputs[0].start.last().unwrap_or(&0), vocab: *vocab }
        }
        Op::CrossEntropyGrad { scale, .. } => {
            Op::CrossEntropyGrad { vocab_start: *inputs[1].start.last().unwrap_or(&0), scale: *scale }
        }
        Op::Dropout { p, seed, shape, stride, .. } => {
            Op::Dropout { p: *p, seed: *seed, shape: shape.clone(), start: inputs[0].start.clone(), stride: *stride }
        }
        other => other.clone(),
    }
}
