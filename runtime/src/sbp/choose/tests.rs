//! Tests of the layout search: layouts of known models, the optimum for small problems, the time for large problems.

use std::time::{Duration, Instant};

use expect_test::{Expect, expect};

use super::*;
use crate::placement::Mesh;

const SECONDS_PER_FLOP: f64 = 1e-11;

struct Builder {
    placement: Placement,
    problem: Problem,
}

impl Builder {
    fn new(mesh: &str) -> Self {
        Self { placement: Mesh::parse(mesh).unwrap().whole(), problem: Problem::default() }
    }

    fn tensor(&mut self, name: &str, shape: &[usize], pinned: Option<&str>) -> usize {
        let (placement, sbp) = (self.placement.clone(), pinned.map(|text| NdSbp::parse(text).unwrap()));
        let pinned = sbp.map(|sbp| PlacedLayout { placement, sbp });
        let shape = shape.to_vec();
        self.problem.tensors.push(TensorSpec { name: name.into(), shape, dtype: DType::F32, pinned, is_output: false });
        self.problem.tensors.len() - 1
    }

    /// An op with one output. `flops` is the work per element of its largest operand.
    fn op(&mut self, name: &str, rule: Rule, inputs: &[usize], flops: usize) -> usize {
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|&t| self.problem.tensors[t].shape.clone()).collect();
        let out_shape = rule.infer_shapes(&shapes).unwrap().remove(0);
        let largest = shapes.iter().chain([&out_shape]).map(|s| s.iter().product::<usize>()).max().unwrap();
        let output = self.tensor(name, &out_shape, None);
        let seconds = (flops * largest) as f64 * SECONDS_PER_FLOP;
        let (tensors, place) = (&self.problem.tensors, &self.placement);
        let (inputs, outputs, candidates) = (inputs.to_vec(), vec![output], Vec::new());
        let mut node = NodeSpec { name: name.into(), placement: place.clone(), inputs, outputs, candidates };
        node.add_candidates(&rule, tensors, seconds, rule.signatures(place.axes().len())).unwrap();
        self.problem.nodes.push(node);
        output
    }

    fn product(&mut self, name: &str, rule: &str, a: usize, b: usize) -> usize {
        let smaller = self.problem.tensors[b].shape.iter().min().copied().unwrap();
        self.op(name, Rule::parse(rule).unwrap().linear(&[&[0], &[1]]).unwrap(), &[a, b], 2 * smaller)
    }

    fn gelu(&mut self, name: &str, x: usize) -> usize {
        self.op(name, Rule::parse("btc->btc").unwrap(), &[x], 20)
    }

    fn norm(&mut self, name: &str, x: usize, weight: usize) -> usize {
        self.op(name, Rule::parse("btc,c->btc").unwrap().fixed("c").unwrap(), &[x, weight], 8)
    }

    fn add(&mut self, name: &str, a: usize, b: usize) -> usize {
        self.op(name, Rule::parse("btc,btc->btc").unwrap().linear(&[&[0, 1]]).unwrap(), &[a, b], 1)
    }

    /// Adds two products with new weights of these layouts, and a GELU between the products.
    fn mlp(&mut self, x: usize, width: usize, hidden: usize, [up, down]: [&str; 2]) -> usize {
        let up = self.tensor("up", &[hidden, width], Some(up));
        let down = self.tensor("down", &[width, hidden], Some(down));
        let h = self.product("h", "btc,hc->bth", x, up);
        let a = self.gelu("a", h);
        self.product("y", "bth,ch->btc", a, down)
    }

    /// The objective of the choice by elimination, which `choose` uses for large problems.
    fn eliminated_seconds(&self) -> f64 {
        let mut planner = Planner::default();
        let mut chooser = Chooser::new(&self.problem, &mut planner).unwrap();
        let candidates = chooser.eliminate();
        chooser.objective_seconds(&candidates)
    }

    fn choose(&self) -> Choice {
        choose(&self.problem, &mut Planner::default()).unwrap()
    }
}

fn check(builder: &Builder, expected: Expect) {
    let choice = builder.choose();
    assert_eq!(choice, builder.choose());
    let tensors = &builder.problem.tensors;
    let layouts =
        tensors.iter().zip(&choice.layouts).map(|(tensor, layout)| format!("{}: {}", tensor.name, layout.sbp));
    let conversions = choice.conversions.iter();
    let conversions = conversions.map(|(t, from, to)| format!("{}: {} -> {}", tensors[*t].name, from.sbp, to.sbp));
    expected.assert_eq(&layouts.chain(conversions).collect::<Vec<_>>().join("; "));
}

/// Shoeybi et al. 2019, <https://arxiv.org/abs/1909.08053>, split the first weight by columns and the second by rows.
#[test]
fn megatron_keeps_the_hidden_split_and_reduces_once() {
    let mut b = Builder::new("tensor=2");
    let x = b.tensor("x", &[4, 64, 256], Some("B"));
    let y = b.mlp(x, 256, 1024, ["S0", "S1"]);
    b.problem.tensors[y].pinned = b.problem.tensors[x].pinned.clone();
    check(&b, expect!["x: (B); up: (S0); down: (S1); h: (S2); a: (S2); y: (B); y: (P) -> (B)"]);
}

#[test]
fn data_parallelism_keeps_the_batch_split_and_the_gradient_partial() {
    let mut b = Builder::new("data=2");
    let x = b.tensor("x", &[8, 64, 256], Some("S0"));
    let w = b.tensor("w", &[256, 256], Some("B"));
    let dy = b.tensor("dy", &[8, 64, 256], Some("S0"));
    let y = b.product("y", "btc,vc->btv", x, w);
    let z = b.gelu("z", y);
    b.add("s", z, dy);
    b.product("dw", "btv,btc->vc", dy, x);
    b.product("dx", "btv,vc->btc", dy, w);
    check(&b, expect!["x: (S0); w: (B); dy: (S0); y: (S0); z: (S0); s: (S0); dw: (P); dx: (S0)"]);
}

#[test]
fn data_and_tensor_parallelism_combine() {
    let mut b = Builder::new("data=2,tensor=2");
    let x = b.tensor("x", &[8, 64, 256], Some("S0,B"));
    let y = b.mlp(x, 256, 1024, ["B,S0", "B,S1"]);
    b.add("out", x, y);
    check(
        &b,
        expect![
            "x: (S0, B); up: (B, S0); down: (B, S1); h: (S0, S2); a: (S0, S2); y: (S0, P); out: (S0, S0); x: (S0, B) -> (S0, S0); y: (S0, P) -> (S0, S0)"
        ],
    );
}

/// Slicing would halve the small compute time of each norm, but the product needs the whole tensor.
#[test]
fn a_chain_is_not_sliced_if_it_must_be_gathered() {
    let mut b = Builder::new("tensor=2");
    let x = b.tensor("x", &[4, 64, 256], Some("B"));
    let up = b.tensor("up", &[1024, 256], Some("S0"));
    let scale = b.tensor("scale", &[256], Some("B"));
    let mut t = x;
    for name in ["n0", "n1", "n2", "n3"] {
        t = b.norm(name, t, scale);
    }
    b.product("h", "btc,hc->bth", t, up);
    check(&b, expect!["x: (B); up: (S0); scale: (B); n0: (B); n1: (B); n2: (B); n3: (B); h: (S2)"]);
}

#[test]
fn a_split_tensor_is_transferred_to_the_next_stage() {
    let mesh = Mesh::parse("stage=2,tensor=2").unwrap();
    let mut b = Builder::new("tensor=2");
    b.placement = mesh.at("stage", 0).unwrap();
    let x = b.tensor("x", &[4, 64, 256], Some("B"));
    let up = b.tensor("up", &[1024, 256], Some("S0"));
    let h = b.product("h", "btc,hc->bth", x, up);
    b.placement = mesh.at("stage", 1).unwrap();
    let down = b.tensor("down", &[256, 1024], Some("S1"));
    b.product("y", "bth,ch->btc", h, down);
    check(&b, expect!["x: (B); up: (S0); h: (S2); down: (S1); y: (P); h: (S2) -> (S2)"]);
    assert_eq!(b.choose().layouts[4].placement, mesh.at("stage", 1).unwrap());
}

#[test]
fn the_cost_is_the_sum_of_compute_and_boxing() {
    let mut b = Builder::new("tensor=2");
    let x = b.tensor("x", &[4, 64, 256], Some("B"));
    let up = b.tensor("up", &[1024, 256], Some("S0"));
    let down = b.tensor("down", &[256, 1024], Some("S1"));
    let h = b.product("h", "btc,hc->bth", x, up);
    b.product("y", "bth,ch->btc", h, down);
    let choice = b.choose();
    // The cost is that of two halved products and the output's all-reduce (CH-2): two latencies and 256 KiB.
    let compute = 2.0 * 0.5 * (4 * 64 * 1024 * 512) as f64 * SECONDS_PER_FLOP;
    let all_reduce = 2.0 * 5e-6 + (4 * 64 * 256 * 4) as f64 * 1e-10;
    assert!((choice.cost_seconds - compute - all_reduce).abs() < 1e-12, "{}", choice.cost_seconds);
    assert_eq!(choice.conversions, []);
    // A layout change that two nodes require is counted once (CH-1).
    let mut b = Builder::new("tensor=2");
    let x = b.tensor("x", &[4, 64, 256], Some("S0"));
    for name in ["p", "q"] {
        let w = b.tensor("w", &[256, 256], Some("S0"));
        let y = b.product(name, "btc,vc->btv", x, w);
        b.problem.nodes.last_mut().unwrap().candidates.retain(|c| c.signature.to_string() == "(B), (S0) -> (S2)");
        assert_eq!(b.problem.tensors[y].shape, [4, 64, 256]);
    }
    let (choice, gather) = (b.choose(), 5e-6 + (2 * 64 * 256 * 4) as f64 * 1e-10);
    let compute = 2.0 * 0.5 * (4 * 64 * 256 * 512) as f64 * SECONDS_PER_FLOP;
    assert_eq!(choice.conversions.len(), 1);
    assert!((choice.cost_seconds - compute - gather).abs() < 1e-12, "{}", choice.cost_seconds);
}

/// The least objective over all assignments.
fn exhaustive(problem: &Problem) -> f64 {
    let mut planner = Planner::default();
    let mut chooser = Chooser::new(problem, &mut planner).unwrap();
    let counts: Vec<usize> = problem.nodes.iter().map(|n| n.candidates.len()).collect();
    let (mut candidates, mut least) = (vec![0; counts.len()], f64::INFINITY);
    loop {
        least = least.min(chooser.objective_seconds(&candidates));
        let Some(n) = (0..counts.len()).find(|&n| candidates[n] + 1 < counts[n]) else { return least };
        candidates[n] += 1;
        candidates[..n].fill(0);
    }
}

#[test]
fn the_search_finds_the_optimum_of_small_problems() {
    let pins = ["B", "S0", "S1"];
    for (size, work) in [(16, 1), (256, 8)] {
        for (up_pin, down_pin) in pins.iter().flat_map(|u| pins.map(|d| (*u, d))) {
            for x_pin in ["B", "S0", "S2", "P"] {
                let mut b = Builder::new("x=2");
                let x = b.tensor("x", &[work, 8, size], Some(x_pin));
                let scale = b.tensor("scale", &[size], Some("B"));
                let n = b.norm("n", x, scale);
                let y = b.mlp(n, size, 2 * size, [up_pin, down_pin]);
                b.add("out", x, y);
                let (found, least) = (b.choose().cost_seconds, exhaustive(&b.problem));
                for found in [found, b.eliminated_seconds()] {
                    assert!(
                        found <= least * (1.0 + 1e-9),
                        "x {x_pin}, up {up_pin}, down {down_pin}: found {found}, least {least}"
                    );
                }
            }
        }
    }
}

#[test]
fn malformed_problems_are_refused() {
    let problem = || {
        let mut b = Builder::new("x=2");
        let x = b.tensor("x", &[4, 4, 4], Some("B"));
        b.gelu("y", x);
        b.problem
    };
    let why = |change: fn(&mut Problem)| {
        let mut problem = problem();
        change(&mut problem);
        choose(&problem, &mut Planner::default()).unwrap_err().to_string()
    };
    assert!(why(|p| p.tensors[0].pinned = None).contains("reads x, which has no layout yet"));
    assert!(why(|p| p.nodes.clear()).contains("y: no node produces it, and it has no pinned layout"));
    assert!(why(|p| p.nodes[0].candidates.clear()).contains("no candidates"));
    assert!(why(|p| p.nodes[0].inputs = vec![9]).contains("no tensor 9"));
    assert!(why(|p| p.nodes[0].inputs.clear()).contains("and the node differ in their numbers of inputs or outputs"));
    assert!(why(|p| p.nodes.push(p.nodes[0].clone())).contains("an earlier node produces or reads"));
    // There is no boxing from another layout to `Partial` for integers.
    let partial = |p: &mut Problem| {
        p.tensors.iter_mut().for_each(|t| t.dtype = DType::I32);
        let sbp = NdSbp::parse("P").unwrap();
        let signature = NdSignature { inputs: vec![sbp.clone()], outputs: vec![sbp] };
        p.nodes[0].candidates = vec![Candidate { signature, compute_seconds: 0.0 }];
    };
    assert!(why(partial).contains("the layouts of any candidate"));
}

/// If tables would be too large, variables are fixed. The sum over the other variables is still minimised.
#[test]
fn wide_problems_are_eliminated_within_bounds() {
    let size = 6;
    // Every two variables share a table. Equal values cost 1 ms; a first value other than 3 costs 1 s.
    let pair = |a: usize, b: usize| {
        let cost = |i: usize| f64::from(u8::from(i / size == i % size)) * 1e-3 + f64::from(u8::from(i / size != 3));
        let costs = (0..size * size).map(|i| Cost { seconds: cost(i), conversions: 0 }).collect();
        Table { variables: vec![a, b], costs }
    };
    let tables: Vec<Table> = (0..12).flat_map(|a| (a + 1..12).map(move |b| (a, b))).map(|(a, b)| pair(a, b)).collect();
    let found = minimise(&[size; 12], tables);
    assert!(!found.is_exact);
    assert_eq!(found.values[..11], [3; 11]);
    assert_ne!(found.values[11], 3, "the last variable is first in no table, so a value other than 3 costs less");
    // A chain of any length is solved exactly.
    let chain = minimise(&[size; 500], (0..499).map(|a| pair(a, a + 1)).collect());
    assert!(chain.is_exact);
    assert_eq!(chain.values[..499], [3; 499]);
}

/// A GPT-like stack: 50 layers of 8 nodes on two axes.
#[test]
fn large_problems_are_solved_in_time() {
    let mut b = Builder::new("data=2,tensor=4");
    let mut x = b.tensor("x", &[8, 128, 512], Some("S0,B"));
    for layer in 0..50 {
        let scale = b.tensor("scale", &[512], Some("B,B"));
        let wide = b.tensor("wide", &[512, 512], Some("B,S0"));
        let narrow = b.tensor("narrow", &[512, 512], Some("B,S1"));
        let n = b.norm("n", x, scale);
        let v = b.product("v", "btc,hc->bth", n, wide);
        let o = b.product("o", "bth,ch->btc", v, narrow);
        let r = b.add("r", x, o);
        let m = b.norm("m", r, scale);
        let y = b.mlp(m, 512, 2048, ["B,S0", "B,S1"]);
        x = b.add(&format!("x{layer}"), r, y);
    }
    assert_eq!(b.problem.nodes.len(), 450);
    let start = Instant::now();
    let choice = b.choose();
    let elapsed = start.elapsed();
    eprintln!("{} nodes in {elapsed:?}, {} conversions", b.problem.nodes.len(), choice.conversions.len());
    // The limit is ten times the usual duration, because the machine may be busy.
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
}
