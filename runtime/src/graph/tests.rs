//! Tests the error messages of invalid programs, with the user's source lines, and `explain` of valid programs.
//! The expected texts show the source line itself instead of its number, so they stay valid when lines move.

use std::sync::Arc;

use expect_test::expect;
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::CustomKernel;
use shardflow_kernels::tensor::{DType, Region};

use super::builder::Layout;
use super::{AdamW, CustomOp, Graph, GraphError, Var};
use crate::init::Init;
use crate::layout_error::LayoutError;
use crate::nn::{self, GptConfig, Parallel};
use crate::passes::mode::Mode;
use crate::passes::precision::Precision;
use crate::passes::{Boxing, CompileError, CompileOptions, compile};
use crate::placement::Mesh;
use crate::plan::{Plan, Schedule};
use crate::sbp::rule::Rule;

/// Replaces every `tests.rs:LINE` by that source line.
fn with_source_lines(text: &str) -> String {
    let source: Vec<&str> = include_str!("tests.rs").lines().collect();
    let mut parts = text.split("runtime/src/graph/tests.rs:");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let digits = part.chars().take_while(char::is_ascii_digit).count();
        let line: usize = part[..digits].parse().expect("a line number follows");
        out.push_str(&format!("`{}`{}", source[line - 1].trim(), &part[digits..]));
    }
    out
}

fn compiled(mesh: &str, options: &CompileOptions, build: impl FnOnce(&mut Graph)) -> Result<Plan, CompileError> {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    build(&mut g);
    compile(g, options)
}

fn error_with(mesh: &str, options: &CompileOptions, build: impl FnOnce(&mut Graph)) -> String {
    with_source_lines(&compiled(mesh, options, build).expect_err("an invalid program").to_string())
}

fn error(mesh: &str, build: impl FnOnce(&mut Graph)) -> String {
    error_with(mesh, &CompileOptions::default(), build)
}

#[track_caller]
fn floats(g: &mut Graph, name: &str, shape: &[usize]) -> Var {
    g.input(name, shape, DType::F32, Layout::broadcast())
}

const GPT: GptConfig = GptConfig { vocabulary: 8, layers: 2, heads: 2, width: 4, context: 3, batch: 4, dropout: 0.0 };

#[test]
fn mismatched_shapes_are_reported() {
    expect![[r#"
        add: cannot add [4] to [4, 6]: the second shape must be a suffix of the first
          at `g.add(a, b);`
        einsum: rule ik,kj->ij: factor k has size 5 in input 1, but size 6 in input 0; the inputs have shapes [4, 6], [5, 7]
          at `g.einsum("ik,kj->ij", a, c);`
        einsum: subscripts: expected a,b->out, got ik,kj>ij
          at `g.einsum("ik,kj>ij", a, c);`
        layer_norm: rule ac,c->ac,a,a: factor c has size 5 in input 1, but size 6 in input 0; the inputs have shapes [4, 6], [5]
          at `g.layer_norm(a, weight, 1e-5);`
        cross_entropy: targets are F32 [3], but must be I32 [4], the shape of the logits [4, 6] without the last dim
          at `g.cross_entropy(a, targets);`"#]]
    .assert_eq(&error("data=1", |g| {
        let (a, b, c) = (floats(g, "a", &[4, 6]), floats(g, "b", &[4]), floats(g, "c", &[5, 7]));
        let (weight, targets) = (floats(g, "weight", &[5]), floats(g, "targets", &[3]));
        g.add(a, b);
        g.einsum("ik,kj->ij", a, c);
        g.einsum("ik,kj>ij", a, c);
        g.layer_norm(a, weight, 1e-5);
        g.cross_entropy(a, targets);
    }));
}

#[test]
fn errors_inside_a_layer_name_the_line_that_calls_it() {
    expect![[r#"
        einsum: rule btdefghc,oc->btdefgho: input 0 needs 8 dims ("btdefghc"), got shape [1, 1, 1, 1, 1, 1, 1, 1, 1]; the inputs have shapes [1, 1, 1, 1, 1, 1, 1, 1, 1], [3, 1]
          at `nn::linear(g, "up", x, 3, Parallel::Replicated);`
        h.0.attn: a width of 6 does not divide into 4 heads; choose a multiple of 4
          at `nn::attention(g, "h.0.attn", y, 4, None);`
        h.0.attn: a width of 4 does not divide into 3 heads; choose a multiple of 3
          at `nn::gpt(g, &GptConfig { heads: 3, layers: 1, ..GPT });`"#]]
    .assert_eq(&error("data=1", |g| {
        let (x, y) = (floats(g, "x", &[1; 9]), floats(g, "y", &[2, 3, 6]));
        nn::linear(g, "up", x, 3, Parallel::Replicated);
        nn::attention(g, "h.0.attn", y, 4, None);
        nn::gpt(g, &GptConfig { heads: 3, layers: 1, ..GPT });
    }));
    expect![[r#"
        gpt: 4 layers cannot be divided over 3 stages; choose a number of layers that is a multiple of 3
          at `.assert_eq(&error("stage=3", |g| _ = nn::gpt(g, &GptConfig { layers: 4, ..GPT })));`"#]]
    .assert_eq(&error("stage=3", |g| _ = nn::gpt(g, &GptConfig { layers: 4, ..GPT })));
}

#[test]
fn invalid_layouts_and_placements_are_reported() {
    expect![[r#"
        x: the layout names mesh axis `tensor`, but the placement has the axes ["data"]
          at `let x = g.input("x", &[4, 6], DType::F32, Layout::split("tensor", 0));`
        weight: the layout splits dim 2 over `data`, but the shape [4, 6] has 2 dims
          at `g.parameter("weight", &[4, 6], Init::Ones, Layout::split("data", 2));`
        relayout: the layout names mesh axis `tensor`, but the placement has the axes ["data"]
          at `g.relayout(x, Layout::split("data", 0).and_split("tensor", 1));`
        placement: no mesh axis stage; the axes are: data
          at `g.place_at("stage", 1);`
        placement: mesh axis data has size 2, so coordinate 2 is out of range
          at `g.place_at("data", 2);`
        placement: device 3 is not in mesh data=2, which has 2 devices; use a placement of the graph's own mesh
          at `g.place(Mesh::parse("data=4").expect("a mesh").at("data", 3).expect("a device"));`"#]]
    .assert_eq(&error("data=2", |g| {
        let x = g.input("x", &[4, 6], DType::F32, Layout::split("tensor", 0));
        g.parameter("weight", &[4, 6], Init::Ones, Layout::split("data", 2));
        g.relayout(x, Layout::split("data", 0).and_split("tensor", 1));
        g.place_at("stage", 1);
        g.place_at("data", 2);
        g.place(Mesh::parse("data=4").expect("a mesh").at("data", 3).expect("a device"));
    }));
}

#[test]
fn invalid_programs_are_reported() {
    expect![[r#"
        weight: a parameter with this name already exists; give each parameter a unique name
          at `g.parameter("weight", &[5], Init::Ones, Layout::broadcast());`
        minimize: the loss has shape [4, 6]: only a scalar can be minimised
          at `g.minimize(weight, AdamW::default());`"#]]
    .assert_eq(&error("data=1", |g| {
        let weight = g.parameter("weight", &[4, 6], Init::Ones, Layout::broadcast());
        g.parameter("weight", &[5], Init::Ones, Layout::broadcast());
        g.minimize(weight, AdamW::default());
    }));
    expect![[r#"
        saved_as: shape [4, 6] cannot be saved as [5, 5]: the number of elements differs
          at `g.saved_as(weight, &[5, 5]);`
        adamw.m/w: names that start with `adamw.` are reserved for the optimizer's state; choose another name
          at `let w = g.parameter("adamw.m/w", &[2, 2], Init::Ones, Layout::broadcast());`
        saved_as: gelu.2 is not a parameter; only parameters are saved
          at `g.saved_as(y, &[4]);`
        dropout: p is 1: it must be at least 0 and below 1
          at `g.dropout(weight, 1.0, 0);`
        dropout: the program has dropout but minimises nothing; compile it with `mode: Some(Mode::Evaluation)` to disable dropout, or with `mode: Some(Mode::Training)` to keep it
          at `g.dropout(weight, 1.0, 0);`"#]]
    .assert_eq(&error("data=1", |g| {
        let weight = g.parameter("weight", &[4, 6], Init::Ones, Layout::broadcast());
        g.saved_as(weight, &[5, 5]);
        let w = g.parameter("adamw.m/w", &[2, 2], Init::Ones, Layout::broadcast());
        let y = g.gelu(w);
        g.saved_as(y, &[4]);
        g.dropout(weight, 1.0, 0);
    }));
    let x = |g: &mut Graph| _ = floats(g, "x", &[4, 6]);
    expect![[r#"
        x: a batch of 4 does not divide into 3 micro-batches; choose a batch that is a multiple of 3
          at `let x = |g: &mut Graph| _ = floats(g, "x", &[4, 6]);`"#]]
    .assert_eq(&error_with("data=1", &CompileOptions { micro_batches: 3, ..CompileOptions::default() }, x));
    expect!["mesh data=2,tensor=4 needs 8 devices, but only 4 are available; choose a smaller mesh"]
        .assert_eq(&error_with("data=2,tensor=4", &CompileOptions { devices: 4, ..CompileOptions::default() }, x));
}

/// `compile` reports all errors together, but omits errors that follow from others.
#[test]
fn errors_are_reported_together_and_once() {
    expect![[r#"
        add: cannot add [4] to [4, 6]: the second shape must be a suffix of the first
          at `let wrong = g.add(a, b);`
        weight: the layout names mesh axis `tensor`, but the placement has the axes ["data"]
          at `g.parameter("weight", &[4, 6], Init::Ones, Layout::split("tensor", 0));`
        einsum: subscripts: expected index i in exactly two of the three terms (an index in all three terms is a batch index, which needs a custom op), got ij,ij->i
          at `let loss = g.einsum("ij,ij->i", a, a);`"#]]
    .assert_eq(&error("data=2", |g| {
        let (a, b) = (floats(g, "a", &[4, 6]), floats(g, "b", &[4]));
        let wrong = g.add(a, b);
        let wrong = g.gelu(wrong);
        g.layer_norm(wrong, b, 1e-5);
        g.parameter("weight", &[4, 6], Init::Ones, Layout::split("tensor", 0));
        let loss = g.einsum("ij,ij->i", a, a);
        g.minimize(loss, AdamW::default());
    }));
}

/// A norm needs its whole weight. With `Boxing::Explicit`, the program must state the gather of a split weight. With
/// `Boxing::Automatic`, `explain` lists this gather.
#[test]
fn a_layout_change_is_an_error_under_explicit_boxing_and_listed_otherwise() {
    let build = |g: &mut Graph| {
        let x = floats(g, "x", &[2, 3, 4]);
        let weight = g.parameter("norm.weight", &[4], Init::Ones, Layout::split("tensor", 0));
        let x = g.layer_norm(x, weight, 1e-5);
        g.output("y", x);
    };
    expect![[r#"
        layer_norm: norm.weight needs a layout change that the program does not contain: all-gather over tensor: (S0) -> (B), 8 bytes; add it with `relayout`, or compile with `Boxing::Automatic`
          at `let x = g.layer_norm(x, weight, 1e-5);`"#]]
    .assert_eq(&error_with("tensor=2", &CompileOptions { boxing: Boxing::Explicit, ..CompileOptions::default() }, build));
    let explained = explain("tensor=2", &CompileOptions::default(), build);
    let changes = explained.lines().skip_while(|l| !l.starts_with("layout changes")).take_while(|l| !l.is_empty());
    expect![[r#"
        layout changes (bytes that the busiest device receives in a micro-batch; for norm and update, in a step)
          forward  x: slice over tensor: (B) -> (S0), 0 bytes  (`let x = g.layer_norm(x, weight, 1e-5);`)
          forward  norm.weight: all-gather over tensor: (S0) -> (B), 8 bytes  (`let x = g.layer_norm(x, weight, 1e-5);`)"#]].assert_eq(&changes.collect::<Vec<_>>().join("\n"));
}

fn explain(mesh: &str, options: &CompileOptions, build: impl FnOnce(&mut Graph)) -> String {
    with_source_lines(&compiled(mesh, options, build).unwrap_or_else(|e| panic!("{e}")).explain())
}

/// A classifier of two layers, column- and row-parallel if the mesh has a tensor axis.
fn classifier(g: &mut Graph) {
    let tensor = g.mesh().axis("tensor").is_ok();
    let parallel = |p| if tensor { p } else { Parallel::Replicated };
    let layout = nn::batch_layout(g);
    let ids = g.input("ids", &[8, 3], DType::I32, layout.clone());
    let x = nn::embedding(g, "table", ids, 5, 4, Parallel::Replicated);
    let x = nn::linear(g, "up", x, 16, parallel(Parallel::Column("tensor")));
    let x = g.gelu(x);
    let logits = nn::linear(g, "down", x, 5, parallel(Parallel::Row("tensor")));
    let targets = g.input("targets", &[8, 3], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
}

#[test]
fn explain_shows_a_plan_on_one_device() {
    expect![[r#"
        mesh data=1: 1 device; 1f1b, 1 micro-batch a step
        placement 0: devices [0] as data=1, 1 micro-batch in flight

        parameters
          table.weight             [5, 4]           (B) on placement 0
          up.weight                [16, 4]          (B) on placement 0
          down.weight              [5, 16]          (B) on placement 0

        layout changes (bytes that the busiest device receives in a micro-batch; for norm and update, in a step)

        actors
          device 0 compute, by credit
            forward: 1 a step, 7 launches, reads 3 registers, writes 2
            backward: 1 a step, 8 launches, reads 3 registers, writes 1
            norm: 1 a step, 4 launches, reads 1 register, writes 1
            update: 1 a step, 4 launches, reads 2 registers, writes 2
          device 0 copy, by credit
            feed (micro-batch): 1 a step, 2 launches, reads 0 registers, writes 1
            decide: 1 a step, 1 launch, reads 0 registers, writes 1
            fetch (step): 1 a step, 2 launches, reads 2 registers, writes 0

        registers (slots x bytes)
          device 0 feed (micro-batch)/ids (+1): 1 x 256 -> device 0 compute forward, device 0 compute backward
          device 0 parameters/table.weight: 1 x 128 -> device 0 compute forward
          device 0 forward/embedding.2 (+5): 1 x 4224 -> device 0 compute backward
          device 0 parameters/up.weight (+1): 1 x 576 -> device 0 compute forward, device 0 compute backward
          device 0 forward/loss.sum.20: 1 x 64 -> device 0 copy fetch (step)
          device 0 backward/einsum_grad.sum.21 (+2): 1 x 704 -> device 0 compute norm, device 0 compute update
          device 0 norm/grad_squares.24: 1 x 64 -> device 0 copy fetch (step)
          device 0 decide/hyper: 1 x 64 -> device 0 compute update

        memory (bytes)
          device 0: 11008 = 1408 fixed + 6080 in registers + 3072 scratch + 448 in staging
    "#]]
    .assert_eq(&explain("data=1", &CompileOptions::default(), classifier));
}

#[test]
fn explain_shows_a_data_and_tensor_parallel_plan() {
    let options = CompileOptions { micro_batches: 2, schedule: Schedule::GPipe, ..CompileOptions::default() };
    let text = explain("data=2,tensor=2", &options, classifier);
    // Devices 1 to 3 run the actors of device 0, but fetch less. The lines of an actor follow its name and are indented.
    let is_other = |line: &str| ["device 1", "device 2", "device 3"].iter().any(|d| line.trim_start().starts_with(d));
    let mut shown: Vec<&str> = Vec::new();
    let mut hidden = false;
    for line in text.lines() {
        hidden = if line.starts_with("    ") { hidden } else { is_other(line) };
        if !hidden {
            shown.push(line);
        }
    }
    expect![[r#"
        mesh data=2,tensor=2: 4 devices; gpipe, 2 micro-batches a step
        placement 0: devices [0, 1, 2, 3] as data=2,tensor=2, 2 micro-batches in flight

        parameters
          table.weight             [5, 4]           (B, B) on placement 0
          up.weight                [16, 4]          (B, S0) on placement 0
          down.weight              [5, 16]          (B, S1) on placement 0

        layout changes (bytes that the busiest device receives in a micro-batch; for norm and update, in a step)
          forward  einsum.7: all-reduce over tensor: (S0, P) -> (S0, B), 120 bytes  (`let loss = g.cross_entropy(logits, targets);`)
          norm     bucket 0: all-reduce of 2 gradients over data, while backward runs
          norm     bucket 1: all-reduce of 1 gradient over data+tensor, while backward runs

        actors
          device 0 compute, in order: 2 forward, 2 backward, norm, update
            forward: 2 a step, 8 launches, reads 3 registers, writes 2
            backward: 2 a step, 8 launches, reads 3 registers, writes 2
            norm: 1 a step, 4 launches, reads 4 registers, writes 1
            update: 1 a step, 4 launches, reads 5 registers, writes 2
          device 0 communication, in order: all-reduce bucket 0, all-reduce bucket 1
            all-reduce bucket 0: 1 a step, 1 launch, reads 1 register, writes 2
            all-reduce bucket 1: 1 a step, 1 launch, reads 1 register, writes 2
          device 0 copy, by credit
            feed (micro-batch): 2 a step, 2 launches, reads 0 registers, writes 1
            decide: 1 a step, 1 launch, reads 0 registers, writes 1
            fetch (step): 1 a step, 2 launches, reads 2 registers, writes 0

        registers (slots x bytes)
          device 0 all-reduce bucket 0/done: 1 x 0 -> device 0 compute norm
          device 0 all-reduce bucket 0/done: 1 x 0 -> device 0 compute update
          device 0 all-reduce bucket 1/done: 1 x 0 -> device 0 compute norm
          device 0 all-reduce bucket 1/done: 1 x 0 -> device 0 compute update
          device 0 feed (micro-batch)/ids (+1): 2 x 128 -> device 0 compute forward, device 0 compute backward
          device 0 parameters/table.weight: 1 x 128 -> device 0 compute forward
          device 0 forward/embedding.2 (+5): 2 x 768 -> device 0 compute backward
          device 0 parameters/up.weight (+1): 1 x 320 -> device 0 compute forward, device 0 compute backward
          device 0 forward/loss.sum.20: 1 x 64 -> device 0 copy fetch (step)
          device 0 backward/einsum_grad.sum.21 (+1): 1 x 320 -> device 0 compute norm, device 0 compute update, device 0 communication all-reduce bucket 0
          device 0 backward/embedding_grad.sum.23: 1 x 128 -> device 0 compute norm, device 0 compute update, device 0 communication all-reduce bucket 1
          device 0 norm/grad_squares.24: 1 x 64 -> device 0 copy fetch (step)
          device 0 decide/hyper: 1 x 64 -> device 0 compute update

        memory (bytes)
          device 0: 4608 = 896 fixed + 2880 in registers + 384 scratch + 448 in staging"#]].assert_eq(&shown.join("\n"));
}

fn mesh() -> Mesh {
    Mesh::parse("data=1").expect("a mesh")
}

/// A graph with one tensor of each kind that ops accept.
struct Fixture {
    g: Graph,
    x: Var,
    ids: Var,
    weight: Var,
}

fn fixture() -> Fixture {
    let mut g = Graph::new(&mesh());
    let ids = g.input("ids", &[4, 3], DType::I32, Layout::broadcast());
    let weight = g.parameter("w", &[5, 6], Init::Ones, Layout::broadcast());
    let x = g.embedding(ids, weight);
    Fixture { g, x, ids, weight }
}

/// The subject of the expected error, and a call that passes a tensor of another graph.
type Misuse = (&'static str, fn(&mut Fixture, Var));

/// The error names the lines of both graphs, and building continues.
#[test]
fn every_method_refuses_a_tensor_of_another_graph() {
    let calls: &[Misuse] = &[
        ("saved_as", |p, other| p.g.saved_as(other, &[72])),
        ("embedding", |p, other| _ = p.g.embedding(other, p.weight)),
        ("embedding", |p, other| _ = p.g.embedding(p.ids, other)),
        ("add", |p, other| _ = p.g.add(other, p.x)),
        ("add", |p, other| _ = p.g.add(p.x, other)),
        ("einsum", |p, other| _ = p.g.einsum("abc,xc->abx", other, p.weight)),
        ("einsum", |p, other| _ = p.g.einsum("abc,dbc->ad", p.x, other)),
        ("layer_norm", |p, other| _ = p.g.layer_norm(other, p.weight, 1e-5)),
        ("layer_norm", |p, other| _ = p.g.layer_norm(p.x, other, 1e-5)),
        ("gelu", |p, other| _ = p.g.gelu(other)),
        ("scale", |p, other| _ = p.g.scale(other, 2.0)),
        ("attention", |p, other| _ = p.g.attention(p.x, p.x, other)),
        ("dropout", |p, other| _ = p.g.dropout(other, 0.5, 0)),
        ("cross_entropy", |p, other| _ = p.g.cross_entropy(other, p.ids)),
        ("cross_entropy", |p, other| _ = p.g.cross_entropy(p.x, other)),
        ("relayout", |p, other| _ = p.g.relayout(other, Layout::broadcast())),
        ("double", |p, other| _ = p.g.custom(Arc::new(Double::default()), &[other])),
        ("minimize", |p, other| p.g.minimize(other, AdamW::default())),
        ("output", |p, other| p.g.output("z", other)),
        ("shape", |p, other| assert_eq!(p.g.shape(other), [1, 1, 1])),
        ("shape", |p, other| assert!(p.g.tensor(other).poisoned)),
        ("einsum", |p, other| _ = nn::linear(&mut p.g, "l", other, 3, Parallel::Replicated)),
        ("layer_norm", |p, other| _ = nn::layer_norm(&mut p.g, "n", other)),
        ("embedding", |p, other| _ = nn::embedding(&mut p.g, "e", other, 3, 2, Parallel::Replicated)),
        ("shape", |p, other| _ = nn::attention(&mut p.g, "a", other, 4, None)),
    ];
    for (index, (subject, call)) in calls.iter().enumerate() {
        // If the graph has no tensors of its own, the foreign tensor's index is out of range. If it has 9 tensors, the
        // index is also that of one of its tensors.
        for (own_tensors, want) in [(0, 4), (9, 4)] {
            let mut other = Graph::new(&mesh());
            let created: Vec<Var> = (0..want).map(|i| floats(&mut other, &format!("o{i}"), &[4, 3, 6])).collect();
            let mut p = fixture();
            for _ in 0..own_tensors {
                p.x = p.g.gelu(p.x);
            }
            p.g.output("y", p.x);
            call(&mut p, created[3]);
            // Some of the calls add dropout, which requires a mode.
            let options = CompileOptions { mode: Some(Mode::Training), ..CompileOptions::default() };
            let CompileError::Graph(errors) = compile(p.g, &options).expect_err("another graph's") else {
                panic!("{subject}: not an error of the graph")
            };
            let text = errors.iter().map(GraphError::to_string).collect::<Vec<_>>().join("\n");
            assert_eq!(errors.len(), 1, "call {index}: {text}");
            let text = with_source_lines(&text);
            assert!(text.starts_with(&format!("{subject}: ")), "call {index}: {text}");
            let created_at = "is a tensor of another graph, created at `let created: Vec<Var> = (0..want)";
            assert!(text.contains(created_at) && text.contains("\n  at `(\""), "call {index}: {text}");
        }
    }
}

/// A custom op with a configurable gradient, device kind and rule.
#[derive(Debug, Default)]
struct Double {
    gradient: Option<Var>,
    cpu_only: bool,
    rule: &'static str,
}

impl CustomOp for Double {
    fn name(&self) -> &str {
        "double"
    }

    fn runs_on(&self, device: DeviceKind) -> bool {
        !self.cpu_only || device == DeviceKind::Cpu
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse(if self.rule.is_empty() { "abc->abc" } else { self.rule })
    }

    fn kernel(&self, _: &[Region], _: &[Region]) -> Arc<dyn CustomKernel> {
        unreachable!("the program is refused")
    }

    fn backward(&self, _: &mut Graph, _: &[Var], _: &[Var], _: &[Option<Var>]) -> Vec<Option<Var>> {
        vec![self.gradient]
    }
}

#[test]
fn a_custom_op_must_return_gradients_of_its_graph() {
    let mut other = Graph::new(&mesh());
    let gradient = floats(&mut other, "foreign", &[4, 3, 6]);
    let mut p = fixture();
    let y = p.g.custom(Arc::new(Double { gradient: Some(gradient), ..Double::default() }), &[p.x])[0];
    let loss = p.g.cross_entropy(y, p.ids);
    p.g.minimize(loss, AdamW::default());
    expect![[r#"
        double: the gradient of input 0 is a tensor of another graph, created at `let gradient = floats(&mut other, "foreign", &[4, 3, 6]);`; use tensors of one graph only
          at `let y = p.g.custom(Arc::new(Double { gradient: Some(gradient), ..Double::default() }), &[p.x])[0];`"#]]
    .assert_eq(&with_source_lines(&compile(p.g, &CompileOptions::default()).expect_err("refused").to_string()));
}

#[test]
fn a_clone_accepts_only_tensors_from_before_the_clone() {
    let mut p = fixture();
    let mut clone = p.g.clone();
    let (first, second) = (p.g.gelu(p.x), clone.gelu(p.x));
    assert_eq!(first, second, "the same index in two graphs");
    for (mut graph, own, foreign) in [(p.g.clone(), first, second), (clone, second, first)] {
        let both = graph.add(own, p.x);
        graph.output("y", both);
        compile(graph.clone(), &CompileOptions::default()).expect("tensors of its own");
        graph.output("z", foreign);
        let text = compile(graph, &CompileOptions::default()).expect_err("refused").to_string();
        assert!(text.starts_with("output: input 0 is a tensor of another graph"), "{text}");
    }
}

#[test]
fn the_plan_hash_does_not_depend_on_graphs_created_before() {
    for precision in [Precision::F32, Precision::BF16] {
        let hash = || {
            let options = CompileOptions { micro_batches: 2, precision, ..CompileOptions::default() };
            compiled("data=2,tensor=2", &options, classifier).expect("a program").hash()
        };
        let first = hash();
        let mut other = Graph::new(&mesh());
        floats(&mut other, "x", &[2]);
        assert_eq!(hash(), first);
    }
}

#[test]
fn missing_outputs_and_unused_tensors_are_reported() {
    expect![[r#"
        program: the program has no output; call `minimize` or `output`
          at `let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));`"#]]
    .assert_eq(&error("data=1", |_| {}));
    expect![[r#"
        unused: no output depends on this input; remove it, or use it
          at `let unused = floats(g, "unused", &[4, 6]);`
        weight: no output depends on this parameter; remove it, or use it
          at `let weight = g.parameter("weight", &[6], Init::Ones, Layout::broadcast());`"#]]
    .assert_eq(&error("data=1", |g| {
        let x = floats(g, "x", &[4, 6]);
        let unused = floats(g, "unused", &[4, 6]);
        let weight = g.parameter("weight", &[6], Init::Ones, Layout::broadcast());
        g.gelu(unused);
        let sum = g.add(x, weight);
        g.layer_norm(sum, weight, 1e-5);
        g.output("x", x);
    }));
    expect![[r#"
        weight: a parameter cannot be the loss; minimise a scalar that an op computes
          at `let weight = g.parameter("weight", &[], Init::Ones, Layout::broadcast());`"#]]
    .assert_eq(&error("data=1", |g| {
        let weight = g.parameter("weight", &[], Init::Ones, Layout::broadcast());
        g.minimize(weight, AdamW::default());
    }));
    expect![[r#"
        minimize: the loss depends on no parameter, so nothing can be trained; make the loss depend on one, or use `output`
          at `g.minimize(loss, AdamW::default());`"#]]
    .assert_eq(&error("data=1", |g| {
        let logits = floats(g, "logits", &[4, 6]);
        let targets = g.input("targets", &[4], DType::I32, Layout::broadcast());
        let frozen = g.parameter("frozen", &[6], Init::Ones, Layout::broadcast());
        let shown = g.add(logits, frozen);
        g.output("shown", shown);
        let loss = g.cross_entropy(logits, targets);
        g.minimize(loss, AdamW::default());
    }));
}

#[test]
fn output_names_are_unique_and_not_reserved() {
    expect![[r#"
        y: another output already has this name; give each output a unique name
          at `g.output("y", y);`
        grad_squares: this name is reserved for an output of the session; choose another name
          at `g.output("grad_squares", y);`
        loss: another output already has this name; give each output a unique name
          at `g.output("loss", x);`"#]]
    .assert_eq(&error("data=1", |g| {
        classifier(g);
        let x = floats(g, "x", &[4, 6]);
        let y = g.gelu(x);
        g.output("y", x);
        g.output("y", y);
        g.output("grad_squares", y);
        g.output("loss", x);
    }));
}

#[test]
fn invalid_shapes_and_numbers_are_reported() {
    expect![[r#"
        x: dim 0 of shape [0, 6] is 0; each dim must be at least 1
          at `let x = floats(g, "x", &[0, 6]);`
        step: dim 1 of shape [3, 0] is 0; each dim must be at least 1
          at `g.step_input("step", &[3, 0], DType::F32);`
        weight: dim 0 of shape [0] is 0; each dim must be at least 1
          at `let weight = g.parameter("weight", &[0], Init::Normal { std: -1.0 }, Layout::broadcast());`
        weight: the standard deviation is -1: it must be finite and not negative
          at `let weight = g.parameter("weight", &[0], Init::Normal { std: -1.0 }, Layout::broadcast());`
        __metadata__: this name is reserved for the metadata of checkpoint files; choose another name
          at `g.parameter("__metadata__", &[2], Init::Ones, Layout::broadcast());`
        many: the shape [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1] has 17 dims; the maximum is 16
          at `floats(g, "many", &[1; 17]);`
        layer_norm: eps is NaN: it must be finite and not negative
          at `g.layer_norm(x, weight, f32::NAN);`
        layer_norm: rule ac,c->ac,a,a: factor c has size 0 in input 1, but size 6 in input 0; the inputs have shapes [0, 6], [0]
          at `g.layer_norm(x, weight, f32::NAN);`
        scale: the factor is inf: it must be finite
          at `g.scale(x, f32::INFINITY);`
        attn: a width of 6 does not divide into 0 heads; give at least one head
          at `nn::attention(g, "attn", x, 0, None);`
        einsum: the result has more than 16 dims; the inputs have shapes [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]
          at `g.einsum("abcdefghi,jklmnopqr->abcdefghijklmnopqr", a, b);`
        more: the shape [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1] has 25 dims; the maximum is 16
          at `let (more, none) = (floats(g, "more", &[1; 25]), floats(g, "none", &[]));`
        add: rule abefgijlmnopqrsuxyz,->abefgijlmnopqrsuxyz: input 0 needs 19 dims ("abefgijlmnopqrsuxyz"), got shape [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]; the inputs have shapes [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], []
          at `g.add(more, none);`"#]]
    .assert_eq(&error("data=1", |g| {
        let x = floats(g, "x", &[0, 6]);
        g.step_input("step", &[3, 0], DType::F32);
        let weight = g.parameter("weight", &[0], Init::Normal { std: -1.0 }, Layout::broadcast());
        g.parameter("__metadata__", &[2], Init::Ones, Layout::broadcast());
        floats(g, "many", &[1; 17]);
        g.layer_norm(x, weight, f32::NAN);
        g.scale(x, f32::INFINITY);
        nn::attention(g, "attn", x, 0, None);
        let (a, b) = (floats(g, "a", &[1; 9]), floats(g, "b", &[1; 9]));
        g.einsum("abcdefghi,jklmnopqr->abcdefghijklmnopqr", a, b);
        let (more, none) = (floats(g, "more", &[1; 25]), floats(g, "none", &[]));
        g.add(more, none);
    }));
}

/// A program that inspects shapes must still reach `compile`, which reports the error.
#[test]
fn results_of_invalid_ops_have_plausible_shapes() {
    let mut g = Graph::new(&mesh());
    let (a, b) = (floats(&mut g, "a", &[4, 6]), floats(&mut g, "b", &[5, 7]));
    let (x, deep) = (floats(&mut g, "x", &[2, 3, 6]), floats(&mut g, "deep", &[1; 9]));
    let custom = |rule| Arc::new(Double { rule, ..Double::default() });
    let created = [
        (g.einsum("ik,kj->ij", a, b), vec![4, 7]),
        (g.einsum("btc,dbc->td", x, b), vec![3, 5]),
        (g.einsum("ai,aj->aij", a, b), vec![4, 6, 7]),
        (g.einsum("nonsense", a, b), vec![4, 6]),
        (g.layer_norm(a, b, 1e-5), vec![4, 6]),
        (g.attention(a, a, x), vec![4, 6, 6, 1]),
        (g.cross_entropy(a, b), vec![]),
        (g.embedding(a, x), vec![4, 6, 3]),
        (g.add(a, b), vec![4, 6]),
        (nn::linear(&mut g, "l", deep, 9, Parallel::Replicated), vec![1, 1, 1, 1, 1, 1, 1, 9]),
        (nn::attention(&mut g, "a", x, 4, None), vec![2, 3, 6]),
        (g.custom(custom("abc,a->ab,c"), &[x])[1], vec![6]),
        (g.custom(custom("abc->ab1,cb"), &[x])[1], vec![6, 3]),
    ];
    for (index, (var, shape)) in created.iter().enumerate() {
        assert_eq!(g.shape(*var), shape, "call {index}");
    }
}

#[test]
fn a_custom_op_without_a_kernel_for_the_device_or_with_bf16_inputs_is_refused() {
    let on_gpus = CompileOptions { device: DeviceKind::Cuda, ..CompileOptions::default() };
    expect![[r#"
        double: the op has no kernel for cuda devices (`CustomOp::runs_on`); compile for another device kind
          at `let y = g.custom(Arc::new(Double { cpu_only: true, ..Double::default() }), &[x])[0];`"#]]
    .assert_eq(&error_with("data=1", &on_gpus, |g| {
        let x = floats(g, "x", &[2, 3, 6]);
        let y = g.custom(Arc::new(Double { cpu_only: true, ..Double::default() }), &[x])[0];
        g.output("y", y);
    }));
    expect![[r#"
        double: input 0 is BF16, but custom ops read F32 or I32; feed it as F32
          at `let y = g.custom(Arc::new(Double::default()), &[x])[0];`"#]]
    .assert_eq(&error("data=1", |g| {
        let x = g.input("x", &[2, 3, 6], DType::BF16, Layout::broadcast());
        let y = g.custom(Arc::new(Double::default()), &[x])[0];
        g.output("y", y);
    }));
}
