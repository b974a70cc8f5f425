//! Common layers, each built from a few graph builder calls. Parameter names are the names in checkpoints.

use std::panic::Location;

use shardflow_kernels::tensor::DType;

use crate::graph::builder::Layout;
use crate::graph::{Graph, Var};
use crate::init::Init;
use crate::placement::Mesh;
use shardflow_job::text::counted;

/// How a layer's weight is split over a mesh axis, in the terms of Megatron-LM (Shoeybi et al. 2019,
/// <https://arxiv.org/abs/1909.08053>).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parallel<'a> {
    /// Every device holds the whole weight.
    #[default]
    Replicated,
    /// Output features are split over this mesh axis, and so is the output.
    Column(&'a str),
    /// Input features are split over this mesh axis. The output is a partial sum, which is reduced before any op that
    /// cannot read partial sums.
    Row(&'a str),
}

impl Parallel<'_> {
    /// The weight's layout; `out_dim` and `in_dim` are the dims of output and input features.
    fn layout(self, out_dim: usize, in_dim: usize) -> Layout {
        match self {
            Self::Replicated => Layout::broadcast(),
            Self::Column(axis) => Layout::split(axis, out_dim),
            Self::Row(axis) => Layout::split(axis, in_dim),
        }
    }
}

/// Standard deviation of initial weights, as in GPT-2.
pub const INIT_STD: f64 = 0.02;

/// Letters of a linear layer's leading dims.
const LEADING: &str = "btdefgh";

/// `x [.., c] -> [.., out]`: `x W^T` with `W [out, c]`, no bias, for 1 to 7 leading dims. The weight is `NAME.weight`.
#[track_caller]
pub fn linear(g: &mut Graph, name: &str, x: Var, out: usize, parallel: Parallel<'_>) -> Var {
    g.layer(Location::caller(), |g| {
        let width = g.shape(x).last().copied().unwrap_or(0);
        let init = Init::Normal { std: INIT_STD };
        let weight = g.parameter(&format!("{name}.weight"), &[out, width], init, parallel.layout(0, 1));
        let lead = &LEADING[..g.shape(x).len().saturating_sub(1).min(LEADING.len())];
        g.einsum(&format!("{lead}c,oc->{lead}o"), x, weight)
    })
}

/// Layer norm over the last dim, with eps 1e-5, a weight and no bias. The weight is `NAME.weight`.
#[track_caller]
pub fn layer_norm(g: &mut Graph, name: &str, x: Var) -> Var {
    g.layer(Location::caller(), |g| {
        let width = g.shape(x).last().copied().unwrap_or(0);
        let weight = g.parameter(&format!("{name}.weight"), &[width], Init::Ones, Layout::broadcast());
        g.layer_norm(x, weight, 1e-5)
    })
}

/// `ids [b, t] -> [b, t, width]` from the table `NAME.weight [rows, width]`. [`Parallel::Column`] splits the rows
/// (vocabulary-parallel), [`Parallel::Row`] the width.
#[track_caller]
pub fn embedding(g: &mut Graph, name: &str, ids: Var, rows: usize, width: usize, parallel: Parallel<'_>) -> Var {
    g.layer(Location::caller(), |g| {
        let (init, layout) = (Init::Normal { std: INIT_STD }, parallel.layout(0, 1));
        let table = g.parameter(&format!("{name}.weight"), &[rows, width], init, layout);
        g.embedding(ids, table)
    })
}

/// Multi-head causal self-attention of `x [b, t, c]`. If `axis` is given, heads are split over this mesh axis: `q`, `k`
/// and `v` by column, and `proj` by row. The parameters are `NAME.{q,k,v}.weight [heads, head_dim, c]` and
/// `NAME.proj.weight [c, heads, head_dim]`; checkpoints store them as `[c, c]`.
#[track_caller]
pub fn attention(g: &mut Graph, name: &str, x: Var, heads: usize, axis: Option<&str>) -> Var {
    g.layer(Location::caller(), |g| {
        let width = g.shape(x).last().copied().unwrap_or(0);
        if heads == 0 || width % heads != 0 {
            if !g.is_poisoned(&[x]) {
                let hint =
                    if heads == 0 { "give at least one head".into() } else { format!("choose a multiple of {heads}") };
                let message = format!("a width of {width} does not divide into {heads} heads; {hint}");
                g.refuse(name, message);
            }
            return x;
        }
        let head_dim = width / heads;
        let init = Init::Normal { std: INIT_STD };
        let layout = |dim: usize| axis.map_or(Layout::broadcast(), |axis| Layout::split(axis, dim));
        let project = |g: &mut Graph, part: &str| {
            let weight = g.parameter(&format!("{name}.{part}.weight"), &[heads, head_dim, width], init, layout(0));
            g.saved_as(weight, &[width, width]);
            g.einsum("btc,hdc->bthd", x, weight)
        };
        let (q, k, v) = (project(g, "q"), project(g, "k"), project(g, "v"));
        let out = g.attention(q, k, v);
        let weight = g.parameter(&format!("{name}.proj.weight"), &[width, heads, head_dim], init, layout(1));
        g.saved_as(weight, &[width, width]);
        g.einsum("bthd,chd->btc", out, weight)
    })
}

/// Sizes of a [`gpt`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptConfig {
    /// Tokens in the vocabulary.
    pub vocabulary: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Number of attention heads; `width` must be a multiple of this number.
    pub heads: usize,
    /// Features per token.
    pub width: usize,
    /// Tokens per sequence.
    pub context: usize,
    /// Sequences per step, over all data shards.
    pub batch: usize,
    /// Dropout probability in training, after the embedding and in each residual branch.
    pub dropout: f32,
}

/// Maximum number of layers of a [`gpt`]. The limit catches a typing error before the program is built.
pub const LAYERS_MAX: usize = 1024;

/// A size of a [`gpt`] model does not divide evenly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{size} = {value} is not a multiple of {divisor} = {parts}")]
pub struct UnevenSize {
    /// The size: `width`, `batch` or `layers`.
    pub size: &'static str,
    /// Value of the size.
    pub value: usize,
    /// Name of the parts: `heads`, `micro-batches`, or the mesh axis `stage`.
    pub divisor: &'static str,
    /// Number of parts.
    pub parts: usize,
}

impl UnevenSize {
    /// The smallest larger value that divides evenly.
    pub fn next_value(&self) -> usize {
        self.value.div_ceil(self.parts).saturating_mul(self.parts)
    }

    /// Up to 16 numbers of parts that divide the value evenly, smallest first, as text.
    pub fn possible_parts(&self) -> String {
        let divisors = (1..=self.value.min(4096)).filter(|parts| self.value.is_multiple_of(*parts)).take(16);
        divisors.map(|parts| parts.to_string()).collect::<Vec<_>>().join(", ")
    }
}

impl GptConfig {
    /// Checks that the width divides among the heads, the batch among the micro-batches, and the layers among the
    /// mesh's stages. `compile` also refuses an uneven model; this check needs no graph. All sizes must be at least 1.
    ///
    /// # Errors
    /// Returns the first size that does not divide evenly.
    pub fn check(&self, mesh: &Mesh, micro_batches: usize) -> Result<(), UnevenSize> {
        let all = [
            ("width", self.width, "heads", self.heads),
            ("batch", self.batch, "micro-batches", micro_batches),
            ("layers", self.layers, "stage", mesh.size("stage")),
        ];
        let uneven = all.into_iter().find(|(_, value, _, parts)| !value.is_multiple_of(*parts));
        uneven.map_or(Ok(()), |(size, value, divisor, parts)| Err(UnevenSize { size, value, divisor, parts }))
    }
}

/// A GPT without biases. If the mesh has these axes, layers are split evenly over `stage`, the batch over `pod` and
/// `data`, and heads, hidden features and the vocabulary over `tensor`. Returns the logits `[b, t, vocabulary]`, which
/// stay on the last stage. The host feeds `ids`, i32 `[batch, context]`.
#[track_caller]
pub fn gpt(g: &mut Graph, config: &GptConfig) -> Var {
    g.layer(Location::caller(), |g| build_gpt(g, config))
}

fn build_gpt(g: &mut Graph, config: &GptConfig) -> Var {
    let stages = g.mesh().size("stage");
    if !config.layers.is_multiple_of(stages) {
        let message = format!(
            "{} cannot be divided over {stages} stages; choose a number of layers that is a multiple of {stages}",
            counted(config.layers, "layer")
        );
        g.refuse("gpt", message);
    }
    if config.layers > LAYERS_MAX {
        let message = format!("the model has {} layers, but the maximum is {LAYERS_MAX}", config.layers);
        g.refuse("gpt", message);
    }
    let tensor = g.mesh().axis("tensor").ok().map(|_| "tensor");
    let (column, row) = tensor.map_or_else(Default::default, |axis| (Parallel::Column(axis), Parallel::Row(axis)));
    let batch_layout = batch_layout(g);
    let per_stage = config.layers.div_ceil(stages).max(1);
    place_stage(g, 0);
    let ids = g.input("ids", &[config.batch, config.context], DType::I32, batch_layout);
    let mut x = embedding(g, "wte", ids, config.vocabulary, config.width, column);
    let init = Init::Normal { std: INIT_STD };
    let positions = g.parameter("wpe.weight", &[config.context, config.width], init, Layout::broadcast());
    x = g.add(x, positions);
    x = dropout(g, x, config.dropout, 0);
    for layer in 0..if config.layers > LAYERS_MAX { 0 } else { config.layers } {
        place_stage(g, layer / per_stage);
        let name = format!("h.{layer}");
        let normed = layer_norm(g, &format!("{name}.ln1"), x);
        let branch = attention(g, &format!("{name}.attn"), normed, config.heads, tensor);
        let branch = dropout(g, branch, config.dropout, 2 * layer as u64 + 1);
        x = g.add(x, branch);
        let normed = layer_norm(g, &format!("{name}.ln2"), x);
        let hidden = linear(g, &format!("{name}.mlp.fc"), normed, 4 * config.width, column);
        let hidden = g.gelu(hidden);
        let branch = linear(g, &format!("{name}.mlp.proj"), hidden, config.width, row);
        let branch = dropout(g, branch, config.dropout, 2 * layer as u64 + 2);
        x = g.add(x, branch);
    }
    let normed = layer_norm(g, "lnf", x);
    linear(g, "head", normed, config.vocabulary, column)
}

/// The layout of a batch: split over those of the axes `pod` and `data` that the mesh has.
pub fn batch_layout(g: &Graph) -> Layout {
    let axes = ["pod", "data"].into_iter().filter(|axis| g.mesh().axis(axis).is_ok());
    axes.fold(Layout::broadcast(), |layout, axis| layout.and_split(axis, 0))
}

/// Places all nodes that are added after this call on the stage `stage`, if the mesh has the axis `stage`.
fn place_stage(g: &mut Graph, stage: usize) {
    if let Ok(placement) = g.mesh().at("stage", stage) {
        g.place(placement);
    }
}

fn dropout(g: &mut Graph, x: Var, p: f32, seed: u64) -> Var {
    if p > 0.0 { g.dropout(x, p, seed) } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uneven_sizes_are_found_with_values_that_fit() {
        let config = GptConfig { vocabulary: 7, layers: 4, heads: 4, width: 128, context: 8, batch: 12, dropout: 0.0 };
        let mesh = Mesh::parse("data=5,stage=2").unwrap();
        assert_eq!(config.check(&mesh, 3), Ok(()), "the data axis may be uneven");
        let error = config.check(&mesh, 5).unwrap_err();
        assert_eq!(error.to_string(), "batch = 12 is not a multiple of micro-batches = 5");
        assert_eq!((error.next_value(), error.possible_parts().as_str()), (15, "1, 2, 3, 4, 6, 12"));
        let size = |config: GptConfig| config.check(&mesh, 1).unwrap_err().size;
        assert_eq!(size(GptConfig { heads: 3, ..config }), "width");
        assert_eq!(size(GptConfig { layers: 3, ..config }), "layers");
    }
}
