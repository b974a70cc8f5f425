//! The results of a step do not depend on the number of micro-batches. This includes outputs of every kind and dropout
//! masks. A program for which this is impossible is refused, and the error names the user's line.

use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow::prelude::*;
use shardflow_integration_tests::training::{LEARNING_RATE, bits, relative, within};
use shardflow_kernels::collective::ReduceOp;

const COUNTS: [usize; 3] = [1, 2, 4];

fn values(shape: &[usize], factor: f32) -> HostTensor {
    let count = shape.iter().product::<usize>();
    HostTensor::f32(shape, (0..count).map(|i| (i as f32 * factor + 0.3).sin()).collect())
}

fn options(micro_batches: usize) -> CompileOptions {
    CompileOptions { micro_batches, mode: Some(Mode::Training), ..CompileOptions::default() }
}

fn started(g: Graph, micro_batches: usize) -> Session {
    let plan = compile(g, &options(micro_batches)).unwrap_or_else(|e| panic!("{micro_batches} micro-batches: {e}"));
    Session::start(plan, &SessionOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn graph(mesh: &str) -> Graph {
    Graph::new(&Mesh::parse(mesh).expect("a mesh"))
}

/// `x [b, t] -> y [t]`: y is the maximum of x over the batch.
#[derive(Debug)]
struct Largest;

impl CustomOp for Largest {
    fn name(&self) -> &str {
        "largest"
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("bt->t")?.reduce('b', ReduceOp::Max)
    }

    fn kernel(&self, _: &[Region], _: &[Region]) -> Arc<dyn CustomKernel> {
        Arc::new(Self)
    }

    fn backward(&self, _: &mut Graph, _: &[Var], _: &[Var], _: &[Option<Var>]) -> Vec<Option<Var>> {
        vec![None]
    }
}

impl CustomKernel for Largest {
    fn name(&self) -> &str {
        "largest"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        let ([x], [y]) = (&args.reads[..], &mut args.writes[..]) else { panic!("one read, one write") };
        let (CpuSlice::F32(x), CpuSliceMut::F32(y)) = (&x.data, &mut y.data) else { panic!("floats") };
        let width = y.len();
        for (column, y) in y.iter_mut().enumerate() {
            *y = x.iter().skip(column).step_by(width).fold(f32::NEG_INFINITY, |most, x| most.max(*x));
        }
        Ok(())
    }
}

/// Returns a classifier with an output of each kind. The batch dim of `later` is 1.
fn every_kind(mesh: &str) -> Graph {
    let mut g = graph(mesh);
    let split = |dim| if mesh.starts_with("data") { Layout::split("data", dim) } else { Layout::broadcast() };
    let x = g.input("x", &[8, 4], DType::F32, split(0));
    let later = g.input_with_batch_dim("later", &[3, 4, 2], 1, DType::F32, split(1));
    let targets = g.input("targets", &[8], DType::I32, split(0));
    let others = g.input("others", &[8], DType::I32, split(0));
    let rate = g.step_input("rate", &[4], DType::F32);
    let w = g.parameter("w", &[4, 4], Init::Normal { std: 0.5 }, Layout::broadcast());
    let logits = g.einsum("bi,oi->bo", x, w);
    let loss = g.cross_entropy(logits, targets);
    let another = g.cross_entropy(logits, others);
    let half = g.scale(another, 0.5);
    let moment = g.einsum("bi,bj->ij", x, x);
    let projected = g.einsum("ij,kj->ik", moment, w);
    let column = g.einsum("tbi,tbj->ij", later, later);
    let doubled = g.scale(later, 2.0);
    let table = g.scale(w, 3.0);
    let rates = g.scale(rate, 2.0);
    let largest = g.custom(Arc::new(Largest), &[x])[0];
    for (name, var) in [
        ("logits", logits),
        ("another", another),
        ("half", half),
        ("moment", moment),
        ("projected", projected),
        ("column", column),
        ("doubled", doubled),
        ("table", table),
        ("rates", rates),
        ("largest", largest),
        ("x", x),
        ("the loss again", loss),
    ] {
        g.output(name, var);
    }
    g.minimize(loss, AdamW::default());
    g
}

fn inputs_of_every_kind() -> Vec<(&'static str, HostTensor)> {
    let classes = |step: i32| HostTensor::i32(&[8], (0..8).map(|i| i * step % 4).collect());
    vec![
        ("x", values(&[8, 4], 0.7)),
        ("later", values(&[3, 4, 2], 1.3)),
        ("targets", classes(1)),
        ("others", classes(3)),
        ("rate", values(&[4], 0.9)),
    ]
}

fn assert_same(case: &str, got: &BTreeMap<String, HostTensor>, want: &BTreeMap<String, HostTensor>) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{case}");
    for (name, want) in want {
        let got = &got[name];
        assert_eq!(got.shape, want.shape, "{case}: {name}");
        for (a, b) in got.as_f32().expect("floats").iter().zip(want.as_f32().expect("floats")) {
            assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{case}: {name} is {got:?}, not {want:?}");
        }
    }
}

#[test]
fn outputs_do_not_depend_on_the_number_of_micro_batches() {
    within(120, || {
        let step = |mesh: &str, count| {
            let mut session = started(every_kind(mesh), count);
            session.step(&inputs_of_every_kind(), 1e-2).expect("a step").outputs
        };
        let whole = step("data=1", 1);
        for (name, shape) in [
            ("logits", &[8, 4][..]),
            ("another", &[]),
            ("half", &[]),
            ("moment", &[4, 4]),
            ("column", &[2, 2]),
            ("doubled", &[3, 4, 2]),
            ("table", &[4, 4]),
            ("rates", &[4]),
            ("largest", &[4]),
        ] {
            assert_eq!(whole[name].shape, shape, "{name}");
        }
        assert_eq!(whole["loss"], whole["the loss again"]);
        for (mesh, count) in ["data=1", "data=2"].iter().flat_map(|mesh| COUNTS.map(|count| (mesh, count))) {
            assert_same(&format!("mesh {mesh}, {count} micro-batches"), &step(mesh, count), &whole);
        }
    });
}

#[test]
fn outputs_are_combined_as_requested() {
    within(60, || {
        let outputs = |count| {
            let mut g = graph("data=1");
            let x = g.input("x", &[8, 4], DType::F32, Layout::broadcast());
            let moment = g.einsum("bi,bj->ij", x, x);
            let bent = g.gelu(moment);
            g.output_with("each", bent, Combine::Stack);
            g.output_with("sum", bent, Combine::Sum);
            g.output_with("max", bent, Combine::Max);
            g.output_with("once", bent, Combine::First);
            g.output_with("columns", bent, Combine::Concat(1));
            g.output_with("apart", x, Combine::Stack);
            started(g, count).step(&[("x", values(&[8, 4], 0.7))], 0.0).expect("a step").outputs
        };
        let got = outputs(4);
        let each = got["each"].as_f32().expect("floats");
        assert_eq!((&got["each"].shape[..], each.len()), (&[4, 4, 4][..], 64));
        let of = |name: &str| got[name].as_f32().expect("floats").to_vec();
        for i in 0..16 {
            let terms = [each[i], each[16 + i], each[32 + i], each[48 + i]];
            assert_eq!(of("sum")[i], ((terms[0] + terms[1]) + terms[2]) + terms[3], "summed in order");
            assert_eq!(of("max")[i], terms.into_iter().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(of("once")[i], terms[0]);
            for (m, term) in terms.iter().enumerate() {
                assert_eq!(of("columns")[i / 4 * 16 + m * 4 + i % 4], *term);
            }
        }
        assert_eq!(got["columns"].shape, [4, 16]);
        assert_eq!(got["apart"], HostTensor { shape: vec![4, 2, 4], ..values(&[8, 4], 0.7) });
        assert_eq!((&outputs(1)["each"].shape[..], &outputs(1)["sum"].shape[..]), (&[1, 4, 4][..], &[4, 4][..]));
    });
}

/// A program, and the parts that the error text must contain if the batch is divided.
type Refused = (fn(&mut Graph), &'static [&'static str]);

fn floats(g: &mut Graph, name: &str, shape: &[usize]) -> Var {
    g.input(name, shape, DType::F32, Layout::broadcast())
}

fn loss(g: &mut Graph) -> Var {
    let x = floats(g, "x", &[8, 4]);
    let targets = g.input("targets", &[8], DType::I32, Layout::broadcast());
    let w = g.parameter("w", &[4, 4], Init::Ones, Layout::broadcast());
    let logits = g.einsum("bi,oi->bo", x, w);
    g.cross_entropy(logits, targets)
}

const REFUSED: &[Refused] = &[
    (
        |g| {
            let x = floats(g, "x", &[8, 4]);
            let sum = g.einsum("bi,bj->ij", x, x);
            let y = g.gelu(sum);
            g.output("y", y)
        },
        &[
            "y: ",
            "combine the values of 2 micro-batches: gelu at ",
            "is one term of a sum",
            "`output_with`",
            "`Combine::Stack`",
        ],
    ),
    (
        |g| {
            let x = floats(g, "x", &[8, 4]);
            let sum = g.einsum("bi,bj->ij", x, x);
            let y = g.einsum("ij,jk->ik", sum, sum);
            let z = g.scale(y, 2.0);
            g.output("z", z)
        },
        &["z: ", "einsum at ", "is one term of a sum"],
    ),
    (
        |g| {
            let (x, y) = (floats(g, "x", &[8, 4]), floats(g, "y", &[4, 4]));
            let z = g.einsum("ij,kj->ik", x, y);
            g.output("z", z)
        },
        &["z: ", "x is divided along dim 0, y is divided along dim 0"],
    ),
    (
        |g| {
            let x = floats(g, "x", &[8]);
            let w = g.parameter("w", &[8], Init::Ones, Layout::broadcast());
            let y = g.layer_norm(x, w, 1e-5);
            g.output("y", y)
        },
        &["layer_norm: in each of 2 micro-batches", "8", "4", "`input_with_batch_dim`"],
    ),
    (
        |g| {
            let x = floats(g, "x", &[8, 4]);
            let y = g.step_input("y", &[8, 4], DType::F32);
            let z = g.add(x, y);
            g.output("z", z)
        },
        &["add: in each of 2 micro-batches", "y is the same in each micro-batch", "`input_with_batch_dim`"],
    ),
    (
        |g| {
            let loss = loss(g);
            let w = g.parameters()[0];
            let squares = g.einsum("oi,oi->", w, w);
            let loss = g.add(loss, squares);
            g.minimize(loss, AdamW::default())
        },
        &[
            "minimize: with 2 micro-batches, the loss must be a sum over the micro-batches, but ",
            "add at ",
            "is the same in each micro-batch",
        ],
    ),
    (
        |g| {
            let of_batch = loss(g);
            g.output("of_batch", of_batch);
            let w = g.parameters()[0];
            let squares = g.einsum("oi,oi->", w, w);
            g.minimize(squares, AdamW::default())
        },
        &["minimize: ", "does not depend on the batch, and would be counted 2 times"],
    ),
    (
        |g| {
            let loss = loss(g);
            let loss = g.gelu(loss);
            g.minimize(loss, AdamW::default())
        },
        &["minimize: ", "gelu at ", "is one term of a sum"],
    ),
    (
        |g| {
            let x = floats(g, "x", &[8, 4]);
            let sum = g.einsum("bi,bj->ij", x, x);
            let bent = g.gelu(sum);
            let y = g.dropout(bent, 0.5, 1);
            g.output_with("y", y, Combine::Stack)
        },
        &["an element's position in the whole batch is unknown", "gelu at ", "`micro_batches: 1`"],
    ),
];

/// Each program compiles with an undivided batch. With a divided batch, its only error names a line of this file.
#[test]
fn programs_that_depend_on_the_number_of_micro_batches_are_refused() {
    for (build, wants) in REFUSED {
        let compiled = |count| {
            let mut g = graph("data=1");
            build(&mut g);
            compile(g, &options(count))
        };
        compiled(1).unwrap_or_else(|e| panic!("{wants:?}: {e}"));
        let Err(CompileError::Graph(errors)) = compiled(2) else { panic!("expected an error with {wants:?}") };
        assert_eq!(errors.len(), 1, "{errors:?}");
        let text = errors[0].to_string();
        assert!(wants.iter().all(|want| text.contains(want)), "expected {wants:?}, got: {text}");
        assert!(text.lines().last().is_some_and(|line| line.contains("micro_batches.rs:")), "{text}");
    }
}

/// A program, and a part that the error text must contain.
type Wrong = (fn(&mut Graph), &'static str);

#[test]
fn wrong_dims_of_batches_and_outputs_are_refused() {
    let cases: &[Wrong] = &[
        (
            |g| {
                let x = g.input_with_batch_dim("x", &[8, 4], 2, DType::F32, Layout::broadcast());
                g.output("x", x)
            },
            "x: the batch is dim 2, but the shape [8, 4] has 2 dims",
        ),
        (
            |g| {
                let x = g.input_with_batch_dim("x", &[8, 3], 1, DType::F32, Layout::broadcast());
                g.output("x", x)
            },
            "x: a batch of 3 does not divide into 2 micro-batches",
        ),
        (
            |g| {
                let x = floats(g, "x", &[8, 4]);
                g.input_with_batch_dim("x", &[8, 4], 1, DType::F32, Layout::broadcast());
                g.output("x", x)
            },
            "with the batch as dim 0, but this one is F32 [8, 4] with the batch as dim 1",
        ),
        (
            |g| {
                let x = floats(g, "x", &[8, 4]);
                g.output_with("x", x, Combine::Concat(2))
            },
            "x: `Combine::Concat(2)` is given, but the shape [8, 4] has 2 dims",
        ),
        (
            |g| {
                let x = g.input("x", &[8], DType::I32, Layout::broadcast());
                g.output_with("x", x, Combine::Sum)
            },
            "x: `Combine::Sum` requires F32, got I32",
        ),
    ];
    for (build, want) in cases {
        let mut g = graph("data=1");
        build(&mut g);
        let Err(CompileError::Graph(errors)) = compile(g, &options(2)) else { panic!("expected error: {want}") };
        let text = errors[0].to_string();
        assert!(errors.len() == 1 && text.contains(want) && text.contains("micro_batches.rs:"), "{want}: {errors:?}");
    }
}

/// Returns the results of dropout on tensors of ones, that is, its masks. Three tensors have the batch in different
/// dims, and one more tensor has another batch size.
fn masks(mesh: &str, micro_batches: usize, seed: u64, steps: usize) -> BTreeMap<String, HostTensor> {
    let mut g = graph(mesh);
    let has = |axis: &str| mesh.contains(axis);
    let mut inputs = Vec::new();
    // The first input has another batch size.
    for (name, shape, batch_dim) in
        [("other", [12, 5, 3], 0), ("first", [4, 6, 5], 0), ("second", [6, 8, 5], 1), ("third", [6, 5, 4], 2)]
    {
        let mut layout = Layout::broadcast();
        if has("data") {
            layout = layout.and_split("data", batch_dim);
        }
        if has("tensor") {
            layout = layout.and_split("tensor", (batch_dim + 1) % 3);
        }
        if has("stage") {
            g.place_at("stage", 0);
        }
        let x = g.input_with_batch_dim(name, &shape, batch_dim, DType::F32, layout);
        if has("stage") {
            g.place_at("stage", 1);
        }
        let y = g.dropout(x, 0.4, 7);
        g.output(name, y);
        inputs.push((name, HostTensor::f32(&shape, vec![1.0; shape.iter().product()])));
    }
    let w = g.parameter("w", &[5, 3], Init::Ones, Layout::broadcast());
    let dropped = g.dropout(w, 0.4, 7);
    g.output("weights", dropped);
    let plan = compile(g, &options(micro_batches)).unwrap_or_else(|e| panic!("{mesh}: {e}"));
    let mut session = Session::start(plan, &SessionOptions { seed, ..SessionOptions::default() }).expect("starts");
    (0..steps).map(|_| session.step(&inputs, 0.0).expect("a step").outputs).last().expect("a step")
}

#[test]
fn masks_depend_only_on_the_position_in_the_whole_tensor() {
    within(120, || {
        let whole = masks("data=1", 1, 5, 1);
        for (name, mask) in &whole {
            let kept = mask.as_f32().expect("floats").iter().filter(|y| **y != 0.0).count();
            assert!(kept > 0 && kept < mask.elements_held(), "{name}: {kept} kept");
        }
        for mesh in
            ["data=1", "data=2", "data=3", "tensor=2", "tensor=3", "data=2,tensor=2", "stage=2", "data=2,stage=2"]
        {
            for count in COUNTS {
                let got = masks(mesh, count, 5, 1);
                assert!(bits(&got) == bits(&whole), "mesh {mesh}, {count} micro-batches: the masks differ");
            }
        }
        for (change, other) in [("seed", masks("data=1", 2, 6, 1)), ("step", masks("data=1", 2, 5, 2))] {
            assert!(other.iter().all(|(name, mask)| *mask != whole[name]), "another {change} gives the same mask");
        }
    });
}

/// The gradient of an element that dropout drops is 0. Without weight decay, an update therefore changes exactly those
/// elements of a parameter that dropout keeps.
#[test]
fn dropped_parameters_are_not_updated() {
    within(60, || {
        for count in COUNTS {
            let mut g = graph("data=1");
            let x = floats(&mut g, "x", &[8, 4]);
            let targets = g.input("targets", &[8], DType::I32, Layout::broadcast());
            let w = g.parameter("w", &[6, 4], Init::Ones, Layout::broadcast());
            let dropped = g.dropout(w, 0.5, 3);
            g.output("dropped", dropped);
            let logits = g.einsum("bi,oi->bo", x, dropped);
            let loss = g.cross_entropy(logits, targets);
            g.minimize(loss, AdamW { weight_decay: 0.0, ..AdamW::default() });
            let mut session = started(g, count);
            let targets = HostTensor::i32(&[8], (0..8).map(|i| i % 6).collect());
            let inputs = [("x", values(&[8, 4], 0.7)), ("targets", targets)];
            let report = session.step(&inputs, LEARNING_RATE).expect("a step");
            let is_kept: Vec<bool> =
                report.outputs["dropped"].as_f32().expect("floats").iter().map(|w| *w != 0.0).collect();
            let parameters = session.parameters().expect("parameters");
            let is_updated: Vec<bool> = parameters["w"].as_f32().expect("floats").iter().map(|w| *w != 1.0).collect();
            assert!(is_kept.contains(&true) && is_kept.contains(&false), "{is_kept:?}");
            assert_eq!(is_updated, is_kept, "{count} micro-batches");
        }
    });
}

/// For any batch dim, dropout masks the gradient in the same way as the value, so the trained parameters agree.
#[test]
fn gradients_are_masked_like_values() {
    within(120, || {
        let trained = |mesh: &str, micro_batches: usize| {
            let mut g = graph(mesh);
            let split = |dim| if mesh == "data=2" { Layout::split("data", dim) } else { Layout::broadcast() };
            let x = g.input_with_batch_dim("x", &[3, 8, 4], 1, DType::F32, split(1));
            let targets = g.input_with_batch_dim("targets", &[3, 8], 1, DType::I32, split(1));
            let w = g.parameter("w", &[4, 4], Init::Normal { std: 0.5 }, Layout::broadcast());
            let h = g.einsum("tbi,oi->tbo", x, w);
            let h = g.dropout(h, 0.5, 3);
            let h = g.gelu(h);
            let v = g.parameter("v", &[5, 4], Init::Normal { std: 0.5 }, Layout::broadcast());
            let logits = g.einsum("tbi,oi->tbo", h, v);
            let loss = g.cross_entropy(logits, targets);
            g.minimize(loss, AdamW::default());
            let mut session = started(g, micro_batches);
            let targets = HostTensor::i32(&[3, 8], (0..24).map(|i| i % 5).collect());
            let inputs = [("x", values(&[3, 8, 4], 0.7)), ("targets", targets)];
            let mut step = |_| session.step(&inputs, LEARNING_RATE).expect("a step").loss.expect("a loss");
            let losses: Vec<f32> = (0..5).map(&mut step).collect();
            (losses, session.parameters().expect("parameters"))
        };
        let (losses, whole) = trained("data=1", 1);
        for (mesh, count) in [("data=1", 2), ("data=1", 4), ("data=2", 1), ("data=2", 2), ("data=2", 4)] {
            let (got, parameters) = trained(mesh, count);
            for (a, b) in got.iter().zip(&losses) {
                assert!(relative((*a).into(), (*b).into()) < 1e-5, "{mesh}, {count}: got {got:?}, expected {losses:?}");
            }
            assert_same(&format!("{mesh}, {count} micro-batches"), &parameters, &whole);
        }
    });
}
