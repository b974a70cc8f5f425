//! The planner's facts about each kernel op: its factor rule, its element types and its attributes on one shard.
//! A new op must be added here, in `passes::autodiff` and in the kernels crate.

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::{DType, Region};

use crate::layout_error::LayoutError;
use crate::sbp::rule::Rule;

/// Letters for `n` leading dims that an op treats alike. They are not used for other dims in the rules below.
fn leading(n: usize) -> String {
    "abefgijlmnopqrsuxyz".chars().take(n).collect()
}

/// The factor rule of a kernel op with inputs of these shapes. A factor (letter) that is in no output is contracted.
pub fn rule(op: &Op, shapes: &[&[usize]]) -> Result<Rule, LayoutError> {
    let rank = |i: usize| shapes.get(i).map_or(0, |s| s.len());
    let rows = |i: usize| leading(rank(i).saturating_sub(1));
    // `x` has letters for all dims of the first input, and `r` for all dims except the last one.
    let (x, r) = (leading(rank(0)), rows(0));
    let parse = |text: String| Rule::parse(&text);
    match op {
        Op::Fill { .. } => Rule::new(&[] as &[&str], &[""]),
        Op::Copy | Op::Scale { .. } => parse(format!("{x}->{x}"))?.linear(&[&[0]]),
        Op::Add => {
            let n = x.len().saturating_sub(rank(1));
            parse(format!("{x},{}->{x}", &x[n..]))?.linear(&[&[0, 1]])
        }
        Op::Einsum(e) => parse(format!("{},{}->{}", e.a, e.b, e.out))?.linear(&[&[0], &[1]]),
        Op::Embedding { .. } => parse(format!("{x},vc->{x}c"))?.linear(&[&[1]]),
        Op::EmbeddingGrad { .. } => parse(format!("{x},{x}c->vc"))?.linear(&[&[1]]),
        Op::LayerNorm { .. } => parse(format!("{r}c,c->{r}c,{r},{r}"))?.fixed("c"),
        Op::LayerNormGrad => parse(format!("{r}c,{r}c,c,{r},{r}->{r}c,c"))?.fixed("c")?.linear(&[&[0]]),
        Op::Gelu => parse(format!("{x}->{x}")),
        Op::GeluGrad => parse(format!("{x},{x}->{x}"))?.linear(&[&[0]]),
        Op::Attention { .. } => Rule::parse("bthd,bthd,bthd->bthd,bht")?.fixed("td"),
        Op::AttentionGrad { .. } => {
            Rule::parse("bthd,bthd,bthd,bthd,bthd,bht->bthd,bthd,bthd")?.fixed("td")?.linear(&[&[0]])
        }
        Op::RowMax => parse(format!("{r}v->{r}"))?.reduce('v', ReduceOp::Max),
        Op::SumExpTarget { .. } => parse(format!("{r}v,{r},{r}->{r},{r}")),
        Op::TokenLoss { .. } => parse(format!("{x},{x},{x}->")),
        Op::CrossEntropyGrad { .. } => {
            let r = rows(1);
            parse(format!(",{r}v,{r},{r},{r}->{r}v"))?.linear(&[&[0]])
        }
        Op::Dropout { .. } => parse(format!("{x},r->{x}"))?.fixed("r")?.linear(&[&[0]]),
        // The op reads the gradient, the hyper-parameters `h` and the scale, and updates the parameter, `m` and `v`. It
        // is elementwise except for `h` and the scale.
        Op::AdamW { .. } => parse(format!("{x},h,->{x},{x},{x}"))?.fixed("h"),
        // For `SumLeading`, see `sum_leading`. Passes after the layout pass insert the other ops of this list.
        Op::SumLeading | Op::CopyRegion { .. } | Op::SumSquares { .. } | Op::ClipScale { .. } => Rule::parse("->"),
        Op::Cast | Op::Collective(_) | Op::Custom(_) => Rule::parse("->"),
    }
}

/// The rule of `SumLeading` from a tensor of rank `from` to one of rank `to`.
pub fn sum_leading(from: usize, to: usize) -> Result<Rule, LayoutError> {
    let x = leading(from);
    Rule::parse(&format!("{x}->{}", &x[from - to..]))?.linear(&[&[0]])
}

/// The required element type of an input. All outputs are `F32`.
pub fn input_dtype(op: &Op, port: usize) -> DType {
    match (op, port) {
        (Op::Embedding { .. } | Op::EmbeddingGrad { .. }, 0) => DType::I32,
        (Op::SumExpTarget { .. }, 2) | (Op::CrossEntropyGrad { .. }, 4) | (Op::Dropout { .. }, 1) => DType::I32,
        _ => DType::F32,
    }
}

/// The op with its attributes for one shard. Some attributes depend on the shard's region of the whole tensors.
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
