//! Programs that are not a simple chain of layers: tensors that skip stages, a parameter that is used twice, devices
//! without data, and outputs without inputs. For invalid programs, `compile` and `step` report the user's line.

use std::collections::BTreeMap;

use shardflow::cluster::{ClusterOptions, Transport};
use shardflow::passes::precision::Precision;
use shardflow::placement::Placement;
use shardflow::prelude::*;
use shardflow_integration_tests::together::run_ranks;
use shardflow_integration_tests::training::{relative, within};

const BATCH: usize = 6;
const LENGTH: usize = 3;
const TOKENS: usize = 11;
const WIDTH: usize = 6;
const STAGES: usize = 4;
/// Maximum norm. It is below the norm of the first gradients, so these are clipped.
const MAX_NORM: f32 = 0.02;
const WEIGHTS: Init = Init::Normal { std: 0.3 };

fn tokens(seed: usize) -> HostTensor {
    let token = |i: usize| ((i * 7 + i * i * 3 + seed * i) % TOKENS) as i32;
    HostTensor::i32(&[BATCH, LENGTH], (0..BATCH * LENGTH).map(token).collect())
}

/// Places the next ops on the stage that holds this quarter of the model.
fn place(g: &mut Graph, quarter: usize) {
    let stages = g.mesh().axis("stage").map(|axis| g.mesh().axes()[axis].size);
    if let Ok(stages) = stages {
        g.place_at("stage", quarter * stages / STAGES);
    }
}

fn split_rows(g: &Graph) -> Layout {
    if g.mesh().axis("tensor").is_ok() { Layout::split("tensor", 0) } else { Layout::broadcast() }
}

fn input(g: &mut Graph, name: &str) -> Var {
    let layout = nn::batch_layout(g);
    g.input(name, &[BATCH, LENGTH], DType::I32, layout)
}

fn layer(g: &mut Graph, name: &str, x: Var) -> Var {
    let h = nn::linear(g, name, x, WIDTH, Parallel::Replicated);
    let h = g.gelu(h);
    g.add(x, h)
}

/// One table is the embedding on the first stage and the head on the last stage. The stage of `owner` holds the table.
fn tied_on(g: &mut Graph, owner: usize) -> Var {
    place(g, 0);
    let ids = input(g, "ids");
    place(g, owner);
    let layout = split_rows(g);
    let table = g.parameter("table", &[TOKENS, WIDTH], WEIGHTS, layout);
    place(g, 0);
    let mut x = g.embedding(ids, table);
    for quarter in 0..STAGES {
        place(g, quarter);
        x = layer(g, &format!("layer {quarter}"), x);
    }
    let logits = g.einsum("btc,vc->btv", x, table);
    let targets = input(g, "targets");
    g.cross_entropy(logits, targets)
}

fn tied(g: &mut Graph) -> Var {
    tied_on(g, 0)
}

fn tied_late(g: &mut Graph) -> Var {
    tied_on(g, STAGES - 1)
}

/// All stages use one matrix. The stage of the third quarter of the model holds this matrix.
fn shared_by_all(g: &mut Graph) -> Var {
    place(g, 2);
    let shared = g.parameter("shared", &[WIDTH, WIDTH], WEIGHTS, Layout::broadcast());
    place(g, 0);
    let ids = input(g, "ids");
    let mut x = nn::embedding(g, "table", ids, TOKENS, WIDTH, Parallel::Replicated);
    for quarter in 0..STAGES {
        place(g, quarter);
        let h = g.einsum("btc,dc->btd", x, shared);
        let h = g.gelu(h);
        x = g.add(x, h);
    }
    let logits = nn::linear(g, "head", x, TOKENS, Parallel::Replicated);
    let targets = input(g, "targets");
    g.cross_entropy(logits, targets)
}

/// The data passes through all stages two or four times, so devices hold several chunks. The head is on stage 0.
fn returning(g: &mut Graph) -> Var {
    let stages = g.mesh().axis("stage").map_or(1, |axis| g.mesh().axes()[axis].size);
    let visit = |g: &mut Graph, chunk: usize| {
        if stages > 1 {
            g.place_at("stage", chunk % stages);
        }
    };
    visit(g, 0);
    let ids = input(g, "ids");
    let mut x = nn::embedding(g, "table", ids, TOKENS, WIDTH, Parallel::Replicated);
    for chunk in 0..2 * STAGES {
        visit(g, chunk);
        x = layer(g, &format!("layer {chunk}"), x);
    }
    visit(g, 0);
    let logits = nn::linear(g, "head", x, TOKENS, Parallel::Replicated);
    let targets = input(g, "targets");
    g.cross_entropy(logits, targets)
}

/// The embedding before the stages and the head after them share a table, and both are on the whole mesh.
fn whole_mesh_ends(g: &mut Graph) -> Var {
    let whole = g.mesh().whole();
    let ids = input(g, "ids");
    let layout = split_rows(g);
    let table = g.parameter("table", &[TOKENS, WIDTH], WEIGHTS, layout);
    let mut x = g.embedding(ids, table);
    for quarter in 0..STAGES {
        place(g, quarter);
        x = layer(g, &format!("layer {quarter}"), x);
    }
    g.place(whole);
    let logits = g.einsum("btc,vc->btv", x, table);
    let targets = input(g, "targets");
    g.cross_entropy(logits, targets)
}

/// Each layer is on two neighbouring stages, which split the features. Every device is therefore in several placements.
fn overlapping(g: &mut Graph) -> Var {
    let count = g.mesh().device_count();
    let pair = |g: &mut Graph, first: usize| {
        if count > 1 {
            let devices = vec![first % count, (first + 1) % count];
            g.place(Placement::of(devices, &[("pair", 2)]).expect("two devices"));
        }
    };
    let split = |g: &Graph| if g.mesh().device_count() > 1 { Layout::split("pair", 0) } else { Layout::broadcast() };
    pair(g, 0);
    let ids = g.input("ids", &[BATCH, LENGTH], DType::I32, Layout::broadcast());
    let mut x = nn::embedding(g, "table", ids, TOKENS, WIDTH, Parallel::Replicated);
    for quarter in 0..STAGES {
        pair(g, quarter);
        let layout = split(g);
        let w = g.parameter(&format!("w{quarter}"), &[WIDTH, WIDTH], WEIGHTS, layout);
        let h = g.einsum("btc,dc->btd", x, w);
        let h = g.gelu(h);
        x = g.add(x, h);
    }
    let logits = nn::linear(g, "head", x, TOKENS, Parallel::Replicated);
    let targets = g.input("targets", &[BATCH, LENGTH], DType::I32, Layout::broadcast());
    g.cross_entropy(logits, targets)
}

/// The last two stages also read outputs of the first two stages. Only the first stage gets ids and targets.
fn skipping(g: &mut Graph) -> Var {
    place(g, 0);
    let (ids, targets) = (input(g, "ids"), input(g, "targets"));
    let table = g.parameter("table", &[TOKENS, WIDTH], WEIGHTS, Layout::broadcast());
    let mut x = g.embedding(ids, table);
    let mut made = vec![x];
    for quarter in 0..STAGES {
        place(g, quarter);
        x = layer(g, &format!("layer {quarter}"), x);
        if quarter >= 2 {
            x = g.add(x, made[quarter - 2]);
        }
        made.push(x);
    }
    let again = nn::embedding(g, "again", ids, TOKENS, WIDTH, Parallel::Replicated);
    let x = g.add(x, again);
    let logits = nn::linear(g, "head", x, TOKENS, Parallel::Replicated);
    g.cross_entropy(logits, targets)
}

/// Two parameters are on all devices, and each other parameter is on one stage. A device's update has two placements.
fn two_placements(g: &mut Graph) -> Var {
    let table = g.parameter("table", &[TOKENS, WIDTH], WEIGHTS, Layout::broadcast());
    let last = g.parameter("last", &[LENGTH, WIDTH], WEIGHTS, Layout::broadcast());
    place(g, 0);
    let ids = input(g, "ids");
    let mut x = g.embedding(ids, table);
    for quarter in 0..STAGES {
        place(g, quarter);
        x = layer(g, &format!("layer {quarter}"), x);
    }
    x = g.add(x, last);
    let logits = nn::linear(g, "head", x, TOKENS, Parallel::Replicated);
    let targets = input(g, "targets");
    g.cross_entropy(logits, targets)
}

/// The saved model after some steps.
fn saved(build: fn(&mut Graph) -> Var, mesh: &str, max_norm: f32, steps: usize) -> Vec<u8> {
    let mut g = graph(mesh);
    let loss = build(&mut g);
    g.minimize(loss, AdamW { max_norm, ..AdamW::default() });
    let plan = compile(g, &CompileOptions::default()).unwrap_or_else(|e| panic!("{mesh}: {e}"));
    let mut session = Session::start(plan, &SessionOptions::default()).expect("a session");
    for seed in 0..steps {
        let inputs = [("ids", tokens(seed)), ("targets", tokens(seed + 1))];
        session.step(&inputs, 1e-2).unwrap_or_else(|e| panic!("{mesh}: {e}"));
    }
    let path = std::env::temp_dir().join(format!("shardflow-saved-{mesh}-{}", std::process::id()));
    session.save(&path).expect("saved");
    let bytes = std::fs::read(&path).expect("a saved file");
    std::fs::remove_file(&path).expect("a saved file");
    bytes
}

/// One norm clips all gradients. The test compares moments, because AdamW's updates hide the scale of a gradient.
#[test]
fn clipping_uses_the_norm_over_all_placements() {
    within(60, || {
        let moments = |mesh: &str| {
            let bytes = saved(two_placements, mesh, 0.01, 1);
            let file = safetensors::SafeTensors::deserialize(&bytes).expect("whole");
            let data = file.tensor("adamw.m/table").expect("is trained").data().to_vec();
            data.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect::<Vec<_>>()
        };
        let want = moments("data=1");
        let largest = want.iter().fold(0.0f32, |most, m| most.max(m.abs()));
        assert!(largest > 1e-5);
        for mesh in ["stage=2", "stage=4"] {
            let got = moments(mesh);
            // The limit is low enough to detect a norm without the gradients of one placement.
            let difference = got.iter().zip(&want).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / largest;
            assert!(difference < 1e-5, "{mesh}: the moments differ by {difference} of the largest");
        }
    });
}

/// Returns the losses and the gradient norms of five steps.
type Results = (Vec<f32>, Vec<f64>);

fn train(build: fn(&mut Graph) -> Var, mesh: &str, micro_batches: usize, schedule: Schedule) -> Results {
    let options = CompileOptions { micro_batches, schedule, ..CompileOptions::default() };
    train_with(build, mesh, &options, &SessionOptions::default())
}

fn train_with(build: fn(&mut Graph) -> Var, mesh: &str, options: &CompileOptions, session: &SessionOptions) -> Results {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let loss = build(&mut g);
    g.minimize(loss, AdamW { max_norm: MAX_NORM, ..AdamW::default() });
    let case = format!("mesh {mesh}, {} micro-batches, {:?}", options.micro_batches, options.schedule);
    let plan = compile(g, options).unwrap_or_else(|e| panic!("{case}: {e}"));
    let mut session = Session::start(plan, session).unwrap_or_else(|e| panic!("{case}: {e}"));
    let mut step = |_| {
        let inputs = [("ids", tokens(0)), ("targets", tokens(1))];
        session.step(&inputs, 1e-2).unwrap_or_else(|e| panic!("{case}: {e}"))
    };
    let reports: Vec<StepReport> = (0..5).map(&mut step).collect();
    let losses = reports.iter().filter_map(|r| r.loss).collect();
    let norms = reports.iter().filter_map(|r| r.grad_norm).collect();
    session.shutdown().unwrap_or_else(|e| panic!("{case}: {e}"));
    (losses, norms)
}

/// The order of sums does not depend on stages, schedules and buckets, if `same_bits`. With 6 micro-batches of one sample,
/// most of the devices of `data=3` have no data on any stage.
fn check_program(build: fn(&mut Graph) -> Var, same_bits: bool) {
    within(120, move || {
        for micro_batches in [1, 3, 6] {
            let expected = train(build, "data=1", micro_batches, Schedule::OneFOneB);
            assert!(expected.0[4] < expected.0[0] - 0.01 && expected.1[0] > MAX_NORM.into(), "{expected:?}");
            for mesh in ["stage=4,tensor=2", "data=2,stage=2,tensor=2"] {
                for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
                    let got = train(build, mesh, micro_batches, schedule);
                    check_near(&got, &expected, &format!("mesh {mesh}, {micro_batches} micro-batches, {schedule:?}"));
                }
            }
            for data in [1, 2, 3] {
                let with_data = train(build, &format!("data={data}"), micro_batches, Schedule::OneFOneB);
                check_near(&with_data, &expected, &format!("data={data}, {micro_batches} micro-batches"));
                for (stages, schedule, bucket_bytes) in
                    [(2, Schedule::GPipe, 1), (2, Schedule::OneFOneB, 100), (4, Schedule::OneFOneB, usize::MAX)]
                {
                    let options = CompileOptions { micro_batches, schedule, bucket_bytes, ..CompileOptions::default() };
                    let mesh = format!("data={data},stage={stages}");
                    let got = train_with(build, &mesh, &options, &SessionOptions::default());
                    let case = format!("mesh {mesh}, {micro_batches} micro-batches, buckets of {bucket_bytes} bytes");
                    check_near(&got, &expected, &case);
                    assert!(!same_bits || got == with_data, "{case}: got {got:?}, expected {with_data:?}");
                }
            }
        }
    });
}

fn check_near(got: &Results, expected: &Results, case: &str) {
    for (a, b) in got.0.iter().zip(&expected.0) {
        assert!(relative((*a).into(), (*b).into()) < 1e-4, "{case}: {:?}, expected {:?}", got.0, expected.0);
    }
    for (a, b) in got.1.iter().zip(&expected.1) {
        assert!(relative(*a, *b) < 1e-3, "{case}: got {:?}, expected {:?}", got.1, expected.1);
    }
}

#[test]
fn a_table_can_be_used_on_the_first_and_the_last_stage() {
    check_program(tied, true);
}

/// In groups of 5 and 10 devices, values are added in different orders.
#[test]
fn the_norm_that_clips_does_not_depend_on_stages() {
    within(60, || {
        let expected = saved(tied, "tensor=5", MAX_NORM, 20);
        for mesh in ["stage=2,tensor=5", "tensor=5,stage=2"] {
            assert!(saved(tied, mesh, MAX_NORM, 20) == expected, "{mesh}");
        }
    });
}

#[test]
fn the_last_stage_can_own_a_table_of_the_first() {
    check_program(tied_late, true);
}

#[test]
fn a_parameter_can_have_readers_on_all_stages() {
    check_program(shared_by_all, true);
}

#[test]
fn a_device_can_hold_several_chunks() {
    check_program(returning, true);
}

#[test]
fn layers_on_the_whole_mesh_can_feed_and_follow_stages() {
    check_program(whole_mesh_ends, false);
}

#[test]
fn placements_can_overlap() {
    check_program(overlapping, false);
}

#[test]
fn tensors_and_inputs_can_skip_stages() {
    check_program(skipping, true);
}

/// Chunks, overlapping placements and shared weights also work if their registers cross processes.
#[test]
fn programs_have_the_same_bits_in_one_process_and_in_several() {
    let programs: [fn(&mut Graph) -> Var; 7] =
        [tied, tied_late, shared_by_all, returning, whole_mesh_ends, overlapping, skipping];
    within(300, move || {
        for (index, build) in programs.into_iter().enumerate() {
            for (mesh, processes) in
                [("stage=4", 2), ("stage=4", 4), ("data=2,stage=2,tensor=2", 3), ("data=3", 3), ("data=6", 4)]
            {
                let expected = train(build, mesh, 3, Schedule::OneFOneB);
                let options = CompileOptions { micro_batches: 3, bucket_bytes: 100, ..CompileOptions::default() };
                for transport in [Transport::Auto, Transport::Tcp] {
                    let cluster = ClusterOptions { transport, ..ClusterOptions::default() };
                    let name = format!("programs-{index}-{processes}-{transport:?}");
                    let ranks =
                        run_ranks(&name, processes, &cluster, |_, session| train_with(build, mesh, &options, &session));
                    assert!(ranks.iter().all(|got| *got == expected), "{name} on {mesh}: {ranks:?}, not {expected:?}");
                }
            }
        }
    });
}

fn graph(mesh: &str) -> Graph {
    Graph::new(&Mesh::parse(mesh).expect("a mesh"))
}

/// Runs three steps, and returns the report of the last step.
fn run(g: Graph, inputs: &[(&str, HostTensor)]) -> StepReport {
    let options = CompileOptions { micro_batches: 2, ..CompileOptions::default() };
    let plan = compile(g, &options).unwrap_or_else(|e| panic!("{e}"));
    let mut session = Session::start(plan, &SessionOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    let mut reports = (0..3).map(|_| session.step(inputs, 1e-2).unwrap_or_else(|e| panic!("{e}")));
    reports.by_ref().take(2).for_each(drop);
    reports.next().expect("three steps")
}

/// Ops that depend on no input also run in each step, but not before the step begins.
#[test]
fn outputs_need_no_input() {
    within(60, || {
        let mut g = graph("stage=2");
        g.place_at("stage", 0);
        let x = g.input("x", &[4, 2], DType::F32, Layout::broadcast());
        let y = g.scale(x, 2.0);
        g.output("y", y);
        g.place_at("stage", 1);
        let w = g.parameter("w", &[2, 2], Init::Ones, Layout::broadcast());
        let z = g.scale(w, 3.0);
        g.output("z", z);
        g.output("w", w);
        let report = run(g, &[("x", HostTensor::f32(&[4, 2], vec![1.0; 8]))]);
        assert_eq!(report.outputs["y"], HostTensor::f32(&[4, 2], vec![2.0; 8]));
        assert_eq!(report.outputs["w"], HostTensor::f32(&[2, 2], vec![1.0; 4]));
        // Both micro-batches compute this output with the same result.
        assert_eq!(report.outputs["z"], HostTensor::f32(&[2, 2], vec![3.0; 4]));
    });
}

/// If a matrix is never updated, another stage reads it directly from the matrix's own stage. After a load, the other
/// stage reads the new values.
#[test]
fn other_stages_can_read_weights_without_updates() {
    within(60, || {
        let program = |mesh: &str| {
            let mut g = graph(mesh);
            let stages = mesh != "data=1";
            let at = |g: &mut Graph, stage| {
                if stages {
                    g.place_at("stage", stage)
                }
            };
            at(&mut g, 0);
            let x = g.input("x", &[4, 8], DType::F32, Layout::broadcast());
            // This parameter occupies the start of the memory, so `w` has an offset.
            let first = g.parameter("first", &[8, 8], WEIGHTS, Layout::broadcast());
            let w = g.parameter("w", &[8, 8], WEIGHTS, Layout::broadcast());
            let hidden = g.einsum("bi,oi->bo", x, first);
            let hidden = g.einsum("bi,oi->bo", hidden, w);
            at(&mut g, 1);
            let y = g.einsum("bi,oi->bo", hidden, w);
            g.output("y", y);
            g
        };
        let x = HostTensor::f32(&[4, 8], (0..32).map(|i| (i as f32).sin()).collect());
        let loaded = |name: &str, step: f32| {
            (name.to_owned(), HostTensor::f32(&[8, 8], (0..64).map(|i| (i as f32 * step).cos()).collect()))
        };
        let loaded = BTreeMap::from([loaded("first", 0.7), loaded("w", 1.1)]);
        let outputs = |mesh: &str, precision| {
            let options = CompileOptions { micro_batches: 2, precision, ..CompileOptions::default() };
            let plan = compile(program(mesh), &options).unwrap_or_else(|e| panic!("{e}"));
            let mut session = Session::start(plan, &SessionOptions::default()).unwrap_or_else(|e| panic!("{e}"));
            let step = |session: &mut Session| {
                session.step(&[("x", x.clone())], 0.0).unwrap_or_else(|e| panic!("{e}")).outputs["y"].clone()
            };
            let made = [step(&mut session), step(&mut session)];
            session.set_parameters(&loaded).unwrap_or_else(|e| panic!("{e}"));
            [made, [step(&mut session), step(&mut session)]].concat()
        };
        let expected = outputs("data=1", Precision::F32);
        assert!(expected[0] == expected[1] && expected[1] != expected[2] && expected[2] == expected[3]);
        assert_eq!(outputs("stage=2", Precision::F32), expected);
        assert_eq!(outputs("stage=2", Precision::BF16), outputs("data=1", Precision::BF16));
        for (near, exact) in outputs("stage=2", Precision::BF16).iter().zip(&expected) {
            let (near, exact) = (near.as_f32().expect("floats"), exact.as_f32().expect("floats"));
            let most = exact.iter().fold(0.0f32, |most, y| most.max(y.abs()));
            assert!(near.iter().zip(exact).all(|(a, b)| (a - b).abs() < 0.03 * most), "{near:?}, expected {exact:?}");
        }
    });
}

#[derive(Debug)]
struct Gradients(&'static str);

impl CustomOp for Gradients {
    fn name(&self) -> &str {
        "gradients"
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("btc->btc")
    }

    fn kernel(&self, _: &[Region], _: &[Region]) -> std::sync::Arc<dyn CustomKernel> {
        unreachable!("the program is refused")
    }

    fn backward(&self, g: &mut Graph, _: &[Var], _: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>> {
        match (self.0, grads[0]) {
            ("small", Some(dy)) => vec![Some(g.einsum("btc,btd->cd", dy, dy))],
            _ => Vec::new(),
        }
    }
}

fn with_gradients(g: &mut Graph, fault: &'static str) {
    let ids = input(g, "ids");
    let x = nn::embedding(g, "table", ids, TOKENS, WIDTH, Parallel::Replicated);
    let x = g.custom(std::sync::Arc::new(Gradients(fault)), &[x])[0];
    let targets = input(g, "targets");
    let loss = g.cross_entropy(x, targets);
    g.minimize(loss, AdamW::default());
}

/// An invalid program, and a part that the error text must contain.
type Wrong = (fn(&mut Graph), &'static str);

/// Each program has exactly one error.
const WRONG: &[Wrong] = &[
    (|g| _ = g.input("x", &[4], DType::F32, Layout::broadcast()), "the program has no output"),
    (|_| {}, "the program has no output"),
    (
        |g| {
            let x = g.input("x", &[4, 5], DType::F32, Layout::broadcast());
            let t = g.input("t", &[4], DType::I32, Layout::broadcast());
            let loss = g.cross_entropy(x, t);
            g.minimize(loss, AdamW::default());
        },
        "the loss depends on no parameter",
    ),
    (
        |g| {
            let l = tied(g);
            g.parameter("unused", &[2, 2], WEIGHTS, Layout::broadcast());
            g.minimize(l, AdamW::default())
        },
        "unused: no output depends on this parameter",
    ),
    (
        |g| {
            let x = g.input("x", &[], DType::F32, Layout::broadcast());
            g.output("x", x)
        },
        "`step_input`",
    ),
    (
        |g| {
            let x = g.input("rng", &[4], DType::F32, Layout::broadcast());
            g.output("x", x)
        },
        "choose another",
    ),
    (
        |g| {
            let x = g.step_input("hyper", &[4], DType::F32);
            g.output("x", x)
        },
        "choose another",
    ),
    (
        |g| {
            input(g, "x");
            let x = g.input("x", &[4], DType::F32, Layout::broadcast());
            g.output("x", x)
        },
        "one tensor of the host",
    ),
    (
        |g| {
            let l = Layout::split("data", 0).and_split("data", 1);
            let x = g.input("x", &[4, 4], DType::F32, l);
            g.output("x", x)
        },
        "`data` twice",
    ),
    (
        |g| {
            let x = input(g, "ids");
            let y = g.gelu(x);
            g.output("y", y)
        },
        "input 0 (ids) is I32, but must be F32",
    ),
    (
        |g| {
            let x = g.input("x", &[4], DType::F32, Layout::broadcast());
            let y = nn::embedding(g, "table", x, 3, 2, Parallel::Replicated);
            g.output("y", y)
        },
        "input 0 (x) is F32, but must be I32",
    ),
    (
        |g| {
            let l = tied(g);
            g.minimize(l, AdamW::default());
            g.minimize(l, AdamW::default())
        },
        "minimise their sum",
    ),
    (
        |g| {
            let l = tied(g);
            g.minimize(l, AdamW { max_norm: -1.0, ..AdamW::default() })
        },
        "max_norm must be above 0",
    ),
    (
        |g| {
            let l = tied(g);
            g.minimize(l, AdamW { betas: (0.9, f32::NAN), ..AdamW::default() })
        },
        "betas must be",
    ),
    (
        |g| {
            let l = tied(g);
            let w = g.parameters()[0];
            g.output("w", w);
            g.minimize(l, AdamW::default())
        },
        "`Session::parameters`",
    ),
    (
        |g| {
            let w = g.parameter("w", &[1 << 40, 1 << 40], Init::Ones, Layout::broadcast());
            g.output("w", w)
        },
        "more elements than any device",
    ),
    (|g| with_gradients(g, "none"), "for each input: expected 1, got 0"),
    (|g| with_gradients(g, "small"), "a gradient of shape [3, 3, 6] for input 0, got [6, 6]"),
];

/// `compile` refuses each program, and the error names a line of this file.
#[test]
fn compile_reports_invalid_programs() {
    for (build, want) in WRONG {
        let mut g = graph("data=2");
        build(&mut g);
        let options = CompileOptions { micro_batches: 2, ..CompileOptions::default() };
        let Err(error) = compile(g, &options) else { panic!("expected the error {want}") };
        let CompileError::Graph(errors) = &error else { panic!("{want}: {error}") };
        let text = error.to_string();
        assert!(text.contains(want) && text.contains("programs.rs:"), "expected {want:?}, got: {text}");
        assert_eq!(errors.len(), 1, "{text}");
    }
}

#[test]
fn counts_out_of_range_are_refused() {
    for (micro_batches, threads_per_device, want) in [
        (0, 1, "micro_batches is 0"),
        (1 << 20, 1, "micro_batches is 1048576"),
        (2, 0, "threads_per_device is 0"),
        (2, 65, "threads_per_device is 65"),
    ] {
        let options = CompileOptions { micro_batches, threads_per_device, ..CompileOptions::default() };
        let text = compile(graph("data=2"), &options).map(drop).expect_err("out of range").to_string();
        assert!(text.contains(want), "{text}");
    }
    for mesh in ["data=100000000000", "data=4294967296,tensor=4294967296"] {
        let text = Mesh::parse(mesh).map(drop).expect_err("too many").to_string();
        assert!(text.contains(&format!("mesh {mesh} has more than")), "{text}");
    }
}

/// A step checks its tensors before anything runs.
#[test]
fn a_step_accepts_each_tensor_once_and_complete() {
    within(60, || {
        let mut g = graph("data=2");
        let x = g.input("x", &[4, 2], DType::F32, Layout::split("data", 0));
        let y = g.scale(x, 2.0);
        g.output("y", y);
        let plan = compile(g, &CompileOptions::default()).expect("a program");
        let mut session = Session::start(plan, &SessionOptions::default()).expect("a session");
        let good = HostTensor::f32(&[4, 2], vec![1.0; 8]);
        let short = HostTensor { shape: vec![4, 2], data: HostData::F32(vec![1.0; 3]) };
        let endless = vec![1 << 40, 1 << 40];
        let huge = HostTensor { shape: endless.clone(), data: HostData::F32(vec![1.0; 3]) };
        for (inputs, want) in [
            (vec![("x", good.clone()), ("x", short.clone())], "input x: expected one tensor, got two"),
            (vec![("x", short)], "input x: expected 8 elements for shape [4, 2], got 3"),
            (vec![("x", huge)], &format!("input x: expected {} elements for shape {endless:?}, got 3", usize::MAX)),
        ] {
            assert_eq!(session.step(&inputs, 0.0).expect_err("wrong").to_string(), want);
        }
        assert_eq!(session.step(&[("x", good)], 0.0).expect("good").outputs["y"].as_f32(), Some(&[2.0; 8][..]));
    });
}
