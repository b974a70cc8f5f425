//! Tests how much work the layout choice and the insertion of boxing take, for deep models and many axes.

use std::time::{Duration, Instant};

use super::*;
use crate::graph::{AdamW, NodeOp};
use crate::nn::GptConfig;
use crate::plan::tests::gpt_graph;

/// A GPT's graph with layouts and boxing, and the number of edges that the searches for boxing evaluated.
fn boxed(mesh: &str, layers: usize) -> (Graph, usize) {
    let config = GptConfig { vocabulary: 512, layers, heads: 8, width: 512, context: 256, batch: 32, dropout: 0.0 };
    let (mut graph, loss) = gpt_graph(mesh, &config);
    micro_batch::divide(&mut graph, 2);
    let grads = autodiff::backward(&mut graph, loss);
    optimizer::accumulate(&mut graph, loss);
    optimizer::add_update(&mut graph, &grads, AdamW::default());
    let (mut planner, start) = (Planner::default(), Instant::now());
    layout::choose(&mut graph, &mut planner);
    boxing::insert(&mut graph, &mut planner, Boxing::Automatic);
    eprintln!("{mesh}, {layers} layers: layouts and boxing in {:?}", start.elapsed());
    check_errors(&graph).unwrap();
    (graph, planner.edges_evaluated())
}

fn boxing_steps(graph: &Graph) -> usize {
    graph.nodes().iter().filter(|node| matches!(node.op, NodeOp::Boxing(_))).count()
}

#[test]
fn each_layer_of_a_deep_model_is_laid_out_alike_at_no_further_search() {
    let start = Instant::now();
    let (shallow, edges) = boxed("data=2,stage=2,tensor=2", 64);
    for layers in [128, 192] {
        let (deep, more_edges) = boxed("data=2,stage=2,tensor=2", layers);
        // Only one shape depends on the number of layers: the norms of all gradients.
        assert!(more_edges < edges + 10, "{more_edges} edges for {layers} layers, {edges} for 64");
        // As in Megatron, a layer has two all-reduces in forward and two in backward. Other steps occur per stage or
        // per model.
        let gradients = deep.parameters().len() - shallow.parameters().len();
        assert_eq!(boxing_steps(&deep) - boxing_steps(&shallow), 4 * (layers - 64) + gradients, "{layers} layers");
    }
    // The limit is ten times the usual duration, because the machine may be busy.
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn five_axes_are_searched_as_fast_as_three() {
    let (three, five) =
        (boxed("data=2,stage=2,tensor=2", 64).1, boxed("pod=2,data=2,stage=2,context=2,tensor=2", 64).1);
    // The search considers all axes for some layouts. A few more edges are therefore possible, but the number of edges
    // must not grow exponentially with the number of axes.
    assert!(five <= three * 3 / 2, "{five} edges on five axes, {three} on three");
}
