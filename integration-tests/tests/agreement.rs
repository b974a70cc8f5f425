//! If ranks pass different values to a call, the call fails on all ranks and changes nothing, and the error names the
//! value. A resume also compares the declared values. The processes are threads, each with its own session.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::ObjectStore;
use object_store::memory::InMemory;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use shardflow::checkpoint::{CheckpointError, Cursor, Saver, SaverOptions, Store};
use shardflow::cluster::{Cluster, ClusterOptions};
use shardflow::exit::Exit;
use shardflow::graph::Graph;
use shardflow::nn::{self, GptConfig};
use shardflow::passes::compile;
use shardflow::placement::Mesh;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::prelude::{DType, Declarations, Layout, OnResume};
use shardflow::session::{Batch, Outputs, Session, SessionError, SessionOptions};
use shardflow_integration_tests::faulty::{FaultyStore, StoreFault};
use shardflow_integration_tests::together;
use shardflow_integration_tests::training::{LEARNING_RATE, Model, ONE, Scratch, bits, options, vocabulary, within};
use shardflow_kernels::tensor::{HostData, HostTensor};

const SECONDS: u64 = 120;
const MICRO_BATCHES: usize = 2;

fn model() -> Model {
    Model { layers: 2, heads: 2, width: 16, context: 8, batch: 4, dropout: 0.1, max_norm: 1.0 }
}

fn start(mesh: &str, options: &SessionOptions) -> Session {
    model().session_with(mesh, &self::options(MICRO_BATCHES, OneFOneB), options)
}

fn local_session(mesh: &str) -> Session {
    start(mesh, &SessionOptions::default())
}

/// Runs `work` on each rank, and returns the results by rank.
fn run_ranks<T: Send>(name: &str, processes: u32, work: impl Fn(u32, Cluster) -> T + Sync) -> Vec<T> {
    let name = format!("agreement-{name}");
    together::run_ranks(&name, processes, &ClusterOptions::default(), |rank, options| work(rank, options.cluster))
}

fn options_with(cluster: Cluster) -> SessionOptions {
    SessionOptions { cluster, ..SessionOptions::default() }
}

/// Returns the tensor with other tokens of the vocabulary at these elements.
fn changed(tensor: &HostTensor, elements: impl Iterator<Item = usize>) -> HostTensor {
    let mut tensor = tensor.clone();
    let HostData::I32(tokens) = &mut tensor.data else { panic!("tokens are integers") };
    elements.for_each(|element| tokens[element] = (tokens[element] + 1) % 46);
    tensor
}

/// Trains in one process, and returns the bits of the losses.
fn losses(mesh: &str, steps: usize) -> Vec<u32> {
    let mut session = local_session(mesh);
    (0..steps).map(|_| model().step(&mut session).loss.expect("a loss").to_bits()).collect()
}

/// Returns the text of the error. The error must be a disagreement of ranks.
fn disagreement_text<T>(result: Result<T, SessionError>) -> String {
    match result {
        Err(error @ SessionError::Disagreement(_)) => {
            assert_eq!(error.exit(), Exit::Refused, "{error}");
            error.to_string()
        }
        Err(error) => panic!("expected a disagreement, got {error}"),
        Ok(_) => panic!("expected a disagreement, got success"),
    }
}

/// A function that loads a file and returns the session's notes on the load.
type LoadFile = fn(&mut Session, &Path) -> Result<Vec<String>, SessionError>;
/// A function that loads a saved state and returns the session's notes on the load.
type Load<'a> = &'a dyn Fn(&mut Session) -> Result<Vec<String>, SessionError>;

/// The failed step changes nothing. The next steps use equal learning rates, and have the losses of an undisturbed run.
#[test]
fn learning_rates_are_compared_in_each_step() {
    within(SECONDS, || {
        let expected = losses("data=2", 3);
        let ranks = run_ranks("lr", 2, |rank, cluster| {
            let mut session = start("data=2", &options_with(cluster));
            let mut losses = vec![model().step(&mut session).loss];
            let rate = if rank == 1 { 0.25 } else { 0.5 };
            let error = disagreement_text(session.step(&model().batch(1), rate));
            losses.extend((1..3).map(|_| model().step(&mut session).loss));
            session.shutdown().expect("a clean shutdown");
            (error, losses.into_iter().map(|loss| loss.expect("a loss").to_bits()).collect::<Vec<_>>())
        });
        for (error, losses) in ranks {
            let expected_error = "step 2: the ranks differ in learning_rate: rank 0 has 0.5; rank 1 has 0.25; give every rank the same value";
            assert_eq!(error, expected_error);
            assert_eq!(losses, expected);
        }
    });
}

/// Elements that a rank does not feed may differ. Elements that several ranks feed are compared in every micro-batch.
#[test]
fn elements_that_several_ranks_feed_are_compared_in_each_step() {
    within(SECONDS, || {
        // Of three processes, the first has devices 0 and 1. The other two have one device each, and feed the second
        // half of the samples.
        for (mesh, processes, changing, expected) in [
            ("tensor=2", 2, 1, Some("rank 0 has")),
            ("stage=2", 2, 1, None),
            ("data=2", 2, 1, None),
            ("data=2,tensor=2", 3, 2, Some("rank 1 has")),
            ("data=2,tensor=2", 3, 0, None),
            ("data=2,tensor=2", 3, 2, None),
        ] {
            let expected_losses = losses(mesh, 2);
            let name = format!("data-{processes}-{changing}-{}", mesh.replace([',', '='], "-"));
            let ranks = run_ranks(&name, processes, |rank, cluster| {
                let mut session = start(mesh, &options_with(cluster));
                let [(ids, tokens), (targets, other)] = model().batch(0);
                // A micro-batch has two samples. Sample 3 is in the second half of the last micro-batch.
                let of_sample = |sample: usize| sample * model().context..(sample + 1) * model().context;
                // Samples that this rank does not feed if the mesh has the axis `data`.
                let peer_samples = if rank == 0 { [1, 3] } else { [0, 2] };
                let elements: Vec<usize> = match expected {
                    Some(_) if rank == changing => of_sample(3).collect(),
                    None if rank == changing && mesh.starts_with("data") => {
                        peer_samples.into_iter().flat_map(of_sample).collect()
                    }
                    // Only the first stage feeds token ids.
                    None if rank == changing => (0..tokens.elements_held()).collect(),
                    _ => Vec::new(),
                };
                let inputs = [(ids, changed(&tokens, elements.into_iter())), (targets, other)];
                let first = session.step(&inputs, LEARNING_RATE);
                let first = match expected {
                    Some(_) => Err(disagreement_text(first)),
                    None => Ok(first.unwrap_or_else(|e| panic!("{mesh}: {e}")).loss.expect("a loss").to_bits()),
                };
                // The session can continue after the failed step.
                let next = model().step(&mut session).loss.expect("a loss").to_bits();
                session.shutdown().expect("a clean shutdown");
                (first, next)
            });
            for (first, next) in ranks {
                match (first, expected) {
                    (Ok(loss), _) => assert_eq!([loss, next], expected_losses[..], "{mesh}"),
                    (Err(error), Some(rank)) => {
                        assert!(error.starts_with("step 1: the ranks differ in input ids: "), "{mesh}: {error}");
                        assert!(
                            error.contains(rank) && error.contains(&format!("rank {changing} has ")),
                            "{mesh}: {error}"
                        );
                        assert_eq!(next, expected_losses[0], "{mesh}: the repeated first step");
                    }
                    (Err(error), None) => panic!("{mesh}: {error}"),
                }
            }
        }
    });
}

/// Each rank supplies only the samples of its data coordinate, and the losses equal those of the whole batch. Ranks
/// with the same data coordinate must supply the same samples.
#[test]
fn ranks_may_supply_only_their_part_of_a_batch() {
    within(SECONDS, || {
        let meshes =
            [("data=2", 2), ("tensor=2", 2), ("data=2,tensor=2", 3), ("data=2,tensor=2", 4), ("data=2,stage=2", 4)];
        for (mesh, processes) in meshes {
            let expected = losses(mesh, 2);
            let name = format!("local-{processes}-{}", mesh.replace([',', '='], "-"));
            let ranks = run_ranks(&name, processes, |rank, cluster| {
                let mut session = start(mesh, &options_with(cluster));
                let whole = model().batch(0);
                let part = session.local_batch(&whole).expect("a batch that fits");
                let samples = if mesh.starts_with("data") { 2 } else { 4 };
                for (name, tensor) in &part {
                    assert_eq!(tensor.shape, [samples, model().context], "{mesh}: {name} of rank {rank}");
                }
                let inputs = if mesh.contains("stage") { 1 } else { 2 };
                assert_eq!(part.len(), inputs, "{mesh}: a stage feeds only its own inputs");
                let mut found = vec![session.step(Batch::Local(&part), LEARNING_RATE).expect("a step").loss];
                // A rank may switch between its part and the whole batch.
                found.push(model().step(&mut session).loss);
                session.shutdown().expect("a clean shutdown");
                found.into_iter().map(|loss| loss.expect("a loss").to_bits()).collect::<Vec<_>>()
            });
            ranks.iter().for_each(|found| assert_eq!(*found, expected, "{mesh} on {processes}"));
        }
    });
}

#[test]
fn wrong_parts_of_a_batch_are_named() {
    within(SECONDS, || {
        let ranks = run_ranks("wrong-local", 4, |rank, cluster| {
            let mut session = start("data=2,tensor=2", &options_with(cluster));
            let whole = model().batch(0);
            let error = session.step(Batch::Local(&whole), LEARNING_RATE).expect_err("the whole batch").to_string();
            let mut part = session.local_batch(&whole).expect("a batch that fits");
            // Ranks 2 and 3 have the second data coordinate.
            if rank == 3 {
                part[0].1 = changed(&part[0].1, 0..1);
            }
            let difference = disagreement_text(session.step(Batch::Local(&part), LEARNING_RATE));
            session.shutdown().expect("a clean shutdown");
            (error, difference)
        });
        for (error, difference) in ranks {
            assert!(error.contains("ids") && error.contains("I32 [2, 8] as this rank"), "{error}");
            assert!(difference.starts_with("step 1: the ranks differ in input ids: rank 2 has"), "{difference}");
            assert!(difference.contains("; rank 3 has") && !difference.contains("rank 0"), "{difference}");
        }
        let ranks = run_ranks("wrong-stage", 2, |rank, cluster| {
            let mut session = start("stage=2", &options_with(cluster));
            let whole = model().batch(0);
            let error = session.step(Batch::Local(&whole), LEARNING_RATE).expect_err("the whole batch").to_string();
            let part = session.local_batch(&whole).expect("a batch that fits");
            session.step(Batch::Local(&part), LEARNING_RATE).expect("a step");
            session.shutdown().expect("a clean shutdown");
            (rank, error)
        });
        for (rank, error) in ranks {
            assert!(error.contains(["targets", "ids"][rank as usize]), "{error}");
            assert!(error.contains("no device of this rank reads it"), "{error}");
        }
    });
}

/// Two stages read one input, and the first stage splits it by rows over `data`. Elements that several ranks feed are
/// compared. If the second stage splits the input by columns, two ranks have only some elements of a row in common.
#[test]
fn an_input_of_several_placements_is_one_tensor() {
    within(SECONDS, || {
        let plan = |mesh: &str, second_layout: Layout| {
            let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
            g.place_at("stage", 0);
            let x = g.input("x", &[4, 4], DType::F32, Layout::split("data", 0));
            let doubled = g.scale(x, 2.0);
            g.place_at("stage", 1);
            let x = g.input("x", &[4, 4], DType::F32, second_layout);
            let sum = g.add(doubled, x);
            g.output("sum", sum);
            compile(g, &options(MICRO_BATCHES, OneFOneB)).expect("a plan")
        };
        let x = |changed: Option<usize>| {
            let value = |element: usize| if changed == Some(element / 4) { -1.0 } else { element as f32 };
            HostTensor::f32(&[4, 4], (0..16).map(value).collect())
        };
        // With four processes, ranks 0 and 2 hold the first and second row of each micro-batch on the first stage.
        for (mesh, second_dim, processes, changing, row, differ) in [
            ("data=1,stage=2", None, 2, 1, 2, true),
            ("data=2,stage=2", None, 4, 2, 3, true),
            ("data=2,stage=2", None, 4, 2, 2, false),
            ("data=2,stage=2", None, 4, 0, 3, false),
            ("data=2,stage=2", Some(1), 4, 2, 3, true),
            ("data=2,stage=2", Some(1), 4, 2, 2, false),
        ] {
            let name = format!("placements-{processes}-{changing}-{row}-{}", second_dim.is_some());
            let sums = run_ranks(&name, processes, |rank, cluster| {
                let plan = plan(mesh, second_dim.map_or(Layout::broadcast(), |dim| Layout::split("data", dim)));
                let mut session =
                    Session::start(plan, &options_with(cluster)).unwrap_or_else(|e| panic!("{mesh}: {e}"));
                let first = session.step(&[("x", x((rank == changing).then_some(row)))], 0.0);
                let first = if differ { Err(disagreement_text(first)) } else { Ok(first.expect("a step")) };
                let next = session.step(&[("x", x(None))], 0.0).expect("a step");
                session.shutdown().expect("a clean shutdown");
                first.map(|report| report.outputs["sum"] == next.outputs["sum"])
            });
            for sum in sums {
                match sum {
                    Err(error) => {
                        assert!(error.starts_with("step 1: the ranks differ in input x: "), "{name}: {error}")
                    }
                    Ok(same) => assert!(same, "{name}: the sums differ"),
                }
            }
        }
    });
}

/// Rank 0 gets all outputs. An option selects whether other ranks get all, or only those that decide about the update.
#[test]
fn outputs_go_to_the_ranks_that_want_them() {
    within(SECONDS, || {
        let plan = || {
            let mut g = Graph::new(&Mesh::parse("data=2,stage=2").expect("a mesh"));
            g.place_at("stage", 0);
            let x = g.input("x", &[4, 4], DType::F32, Layout::split("data", 0));
            let doubled = g.scale(x, 2.0);
            g.output("doubled", doubled);
            g.place_at("stage", 1);
            let quadrupled = g.scale(doubled, 2.0);
            g.output("quadrupled", quadrupled);
            compile(g, &options(MICRO_BATCHES, OneFOneB)).expect("a plan")
        };
        let times = |factor: f32| HostTensor::f32(&[4, 4], (0..16).map(|value| factor * value as f32).collect());
        for (outputs, name) in [(Outputs::AllRanks, "outputs-all"), (Outputs::FirstRank, "outputs-first")] {
            let found = run_ranks(name, 4, |_, cluster| {
                let session = SessionOptions { outputs, ..options_with(cluster) };
                let mut session = Session::start(plan(), &session).unwrap_or_else(|e| panic!("{e}"));
                let reports = [(); 2].map(|()| session.step(&[("x", times(1.0))], 0.0).expect("a step"));
                session.shutdown().expect("a clean shutdown");
                reports.map(|report| report.outputs)
            });
            for (rank, reports) in found.into_iter().enumerate() {
                for report in reports {
                    let all = BTreeMap::from([("doubled".into(), times(2.0)), ("quadrupled".into(), times(4.0))]);
                    let gets_all = rank == 0 || outputs == Outputs::AllRanks;
                    assert_eq!(report, if gets_all { all } else { BTreeMap::new() }, "{name}: rank {rank}");
                }
            }
        }
        // All ranks must agree on this option.
        let errors = run_ranks("outputs-differ", 2, |rank, cluster| {
            let outputs = if rank == 0 { Outputs::AllRanks } else { Outputs::FirstRank };
            let session = SessionOptions { outputs, ..options_with(cluster) };
            Session::start(plan(), &session).err().expect("they differ").to_string()
        });
        assert!(
            errors.iter().all(|error| error.contains("differ in their outputs: AllRanks and FirstRank")),
            "{errors:?}"
        );
    });
}

/// If one rank has a different file or no file, no rank loads anything, and all ranks can continue.
#[test]
fn loaded_files_are_compared_before_anything_changes() {
    within(SECONDS, || {
        let scratch = Scratch::new("agreement-files");
        let path = |name: &str| scratch.path().join(name);
        let mut session = local_session(ONE);
        model().step(&mut session);
        session.save(&path("one")).expect("saved");
        let parameters = session.parameters().expect("parameters");
        model().step(&mut session);
        session.save(&path("two")).expect("saved");
        let fresh = local_session(ONE).parameters().expect("parameters");
        for mesh in ["data=2", "tensor=2", "stage=2"] {
            run_ranks(&format!("files-{mesh}"), 2, |rank, cluster| {
                let mut session = start(mesh, &options_with(cluster));
                let file = |other: &str| path(if rank == 1 { other } else { "one" });
                let is_fresh = |session: &Session| bits(&session.parameters().expect("parameters")) == bits(&fresh);
                let error = disagreement_text(session.init_from(&file("two")));
                assert!(error.contains(": the ranks differ in tensor "), "{error}");
                let error = disagreement_text(session.restore(&file("two")));
                assert!(error.contains(": the ranks differ in number of steps: rank 0 has 1; rank 1 has 2"), "{error}");
                let mut changed_parameters = parameters.clone();
                // Only the second stage holds the last layer's parameters.
                if let (1, Some(HostData::F32(values))) =
                    (rank, changed_parameters.get_mut("lnf.weight").map(|t| &mut t.data))
                {
                    values[0] += 1.0;
                }
                let error = disagreement_text(session.set_parameters(&changed_parameters));
                assert!(error.contains("(memory): the ranks differ in tensor lnf.weight: "), "{error}");
                let error = session.restore(&file("missing")).expect_err("one rank has no file").to_string();
                let expected = if rank == 1 { "No such file" } else { "rank 1 cannot load it; see the log of rank 1" };
                assert!(error.contains(expected), "rank {rank}: {error}");
                assert!(is_fresh(&session), "something was loaded");
                session.restore(&file("one")).expect("the same on both");
                assert!(bits(&session.parameters().expect("parameters")) == bits(&parameters));
                model().step(&mut session);
                session.shutdown().expect("a clean shutdown");
            });
        }
    });
}

/// Each rank sees its own folder. The folders have checkpoints of the same step, but of two trainings, which differ in
/// the seed or in the learning rate.
#[test]
fn checkpoints_of_folders_that_ranks_do_not_share_are_compared() {
    within(SECONDS, || {
        let scratch = Scratch::new("agreement-folders");
        for (folder, seed, rate) in [("first", 0, 0.5), ("seed", 1, 0.5), ("rate", 0, 0.25)] {
            let mut session = start(ONE, &SessionOptions { seed, ..SessionOptions::default() });
            session.step(&model().batch(0), rate).expect("a step");
            checkpoint(&session, &scratch.path().join(folder));
        }
        for (other, expected) in [
            ("seed", "the ranks differ in seed: rank 0 has 0; rank 1 has 1"),
            ("rate", "the ranks differ in manifest: "),
        ] {
            run_ranks(&format!("own-folders-{other}"), 2, |rank, cluster| {
                let mut session = start("stage=2", &options_with(cluster));
                let store = store(&scratch.path().join(if rank == 1 { other } else { "first" }));
                let error = disagreement_text(session.restore_newest(&store));
                assert!(error.contains(expected), "{error}");
                let reader = store.read(1).expect("a checkpoint");
                let error = disagreement_text(session.restore_checkpoint(&reader));
                assert!(error.contains(expected), "{error}");
                assert_eq!(session.steps(), 0);
            });
        }
    });
}

/// If a rank fails outside of a step, for example on a full disk, the other ranks end with that rank's cause and exit
/// code.
#[test]
fn an_abort_of_one_rank_ends_the_others_with_its_cause() {
    within(SECONDS, || {
        let ranks = run_ranks("abort", 2, |rank, cluster| {
            let mut session = start("data=2", &options_with(cluster));
            model().step(&mut session);
            if rank == 1 {
                session.abort(Exit::CannotWrite, &"disk full");
                return None;
            }
            let begin = Instant::now();
            let error = session.step(&model().batch(1), LEARNING_RATE).map(drop).expect_err("rank 1 is gone");
            Some((error.to_string(), error.exit(), error.first_cause_rank(), begin.elapsed()))
        });
        let (text, exit, rank, time) = ranks[0].clone().expect("an error");
        assert!(text.contains("rank 1: disk full"), "{text}");
        assert_eq!((exit, rank), (Exit::CannotWrite, Some(1)), "{text}");
        assert!(time < Duration::from_secs(10), "{time:?}");
    });
}

/// Both ranks see one store, but one of the ranks cannot write to it.
#[test]
fn each_rank_must_be_able_to_write_checkpoints() {
    within(SECONDS, || {
        for reader in [0, 1] {
            let backend: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let errors = run_ranks(&format!("probe-{reader}"), 2, |rank, cluster| {
                let mut session = start("data=2", &options_with(cluster));
                let first = if rank == reader { 0 } else { usize::MAX };
                let full = FaultyStore::new(backend.clone(), StoreFault::Full, first, None);
                let store = Store::with(Arc::new(full), "run").expect("a store");
                let error = session.saver(&store, SaverOptions::default()).map(drop).expect_err("refused");
                assert_eq!(error.exit(), Exit::CannotWrite, "{error}");
                error.to_string()
            });
            let (own, other) = (&errors[reader as usize], &errors[1 - reader as usize]);
            assert!(own.contains("No space left on device"), "{own}");
            assert!(other.contains(&format!("rank {reader} cannot use this store; see")), "{other}");
        }
    });
}

#[test]
fn declared_values_are_compared_before_a_session_starts() {
    within(SECONDS, || {
        let errors = run_ranks("declared", 2, |rank, cluster| {
            let declared = Declarations::default().declare("tokenizer", format!("v{rank}"), OnResume::Free);
            let options = SessionOptions { declared, ..options_with(cluster) };
            let plan = model().plan("data=2", &self::options(MICRO_BATCHES, OneFOneB));
            let error = Session::start(plan, &options).err().expect("two values");
            assert_eq!(error.exit(), Exit::Refused, "{error}");
            error.to_string()
        });
        for error in errors {
            assert!(error.contains("differ in their tokenizer: v0 and v1; give every rank the same value"), "{error}");
        }
        let declared = Declarations::default().declare("seed", 1, OnResume::Free);
        let plan = model().plan(ONE, &self::options(MICRO_BATCHES, OneFOneB));
        let options = SessionOptions { declared, ..SessionOptions::default() };
        let error = Session::start(plan, &options).err().expect("a name of every session's");
        assert_eq!(error.exit(), Exit::Refused, "{error}");
    });
}

fn store(folder: &Path) -> Store {
    Store::open(folder.to_str().expect("a path of UTF-8")).expect("a folder")
}

fn checkpoint(session: &Session, folder: &Path) {
    let (agree, member) = session.agreement().expect("room for snapshots");
    let options = SaverOptions { member, ..SaverOptions::default() };
    let mut saver = Saver::new(store(folder), agree, options).expect("a thread");
    saver.save(session, Cursor::new()).expect("a snapshot");
    let report = saver.wait(std::time::Duration::from_secs(SECONDS)).expect("in time").expect("a save");
    report.result.expect("committed");
}

/// Starts a session of the model with only this number of layers, and with these options.
fn with_layers(layers: usize, options: &SessionOptions) -> Session {
    Model { layers, ..model() }.session_with(ONE, &self::options(MICRO_BATCHES, OneFOneB), options)
}

#[test]
fn parameters_that_the_program_lacks_are_refused_unless_it_names_them() {
    within(SECONDS, || {
        let scratch = Scratch::new("agreement-lacks");
        let (file, folder) = (scratch.path().join("model"), scratch.path().join("run"));
        let mut large = local_session(ONE);
        model().step(&mut large);
        large.save(&file).expect("saved");
        checkpoint(&large, &folder);
        let all = large.parameters().expect("parameters");
        let mut small = with_layers(1, &SessionOptions::default());
        let newest = |session: &mut Session| session.restore_newest(&store(&folder)).map(|restored| restored.notes);
        let all_ways: [(&str, LoadFile); 2] = [
            ("restore", |session, file| session.restore(file)),
            ("init_from", |session, file| session.init_from(file)),
        ];
        let check = |error: SessionError| {
            let is_unfit = matches!(error, SessionError::Checkpoint(CheckpointError::Unfit { .. }));
            assert!(is_unfit && error.exit() == Exit::BadData, "{error}");
            assert!(error.to_string().contains("such as h.1."), "{error}");
        };
        for (_, way) in &all_ways {
            check(way(&mut small, &file).expect_err("a layer too many"));
        }
        check(newest(&mut small).expect_err("a layer too many"));

        let ignoring: Vec<String> = all.keys().filter(|name| name.starts_with("h.1.")).cloned().collect();
        let options = SessionOptions { ignoring: ignoring.clone(), ..SessionOptions::default() };
        let states = format!("{} optimizer states are skipped: the program does not need them", 2 * ignoring.len());
        let kept: BTreeMap<_, _> = all.iter().filter(|(name, _)| !ignoring.contains(name)).collect();
        let loaded = |session: &Session| {
            let own = session.parameters().expect("parameters");
            own.len() == kept.len() && own.iter().all(|(name, tensor)| kept[name] == tensor)
        };
        for (name, way) in &all_ways {
            let mut small = with_layers(1, &options);
            let notes = way(&mut small, &file).unwrap_or_else(|e| panic!("{name}: {e}"));
            // `init_from` loads only weights, so it skips all optimizer states.
            let expected =
                if *name == "init_from" { format!("{} optimizer states", 2 * all.len()) } else { states.clone() };
            assert!(loaded(&small) && notes[0].contains(&expected), "{name}: {notes:?}");
        }
        let mut small = with_layers(1, &options);
        let notes = newest(&mut small).expect("ignores the parameters");
        assert!(loaded(&small) && notes.len() == 1 && notes[0].contains(&states), "{notes:?}");
    });
}

/// A program without an optimizer does not need the optimizer states of a file.
#[test]
fn a_program_that_only_computes_leaves_optimizer_states_out() {
    within(SECONDS, || {
        let scratch = Scratch::new("agreement-states");
        let mut trained = local_session(ONE);
        model().step(&mut trained);
        trained.save(&scratch.path().join("model")).expect("saved");
        checkpoint(&trained, &scratch.path().join("run"));
        let mut g = Graph::new(&Mesh::parse(ONE).expect("a mesh"));
        let Model { layers, heads, width, context, batch, .. } = model();
        let config = GptConfig { vocabulary: vocabulary(), layers, heads, width, context, batch, dropout: 0.0 };
        let logits = nn::gpt(&mut g, &config);
        g.output("logits", logits);
        let plan = compile(g, &options(1, OneFOneB)).expect("a plan");
        let mut session = Session::start(plan, &SessionOptions::default()).expect("a session");
        let count = 2 * trained.parameters().expect("parameters").len();
        let expected = format!("{count} optimizer states are skipped: the program does not need them");
        let restored = session.restore_newest(&store(&scratch.path().join("run"))).expect("a checkpoint");
        assert!(restored.notes.len() == 1 && restored.notes[0].ends_with(&expected), "{:?}", restored.notes);
        let notes = session.restore(&scratch.path().join("model")).expect("a file");
        assert!(notes.len() == 1 && notes[0].ends_with(&expected), "{notes:?}");
        assert_eq!(bits(&session.parameters().expect("parameters")), bits(&trained.parameters().expect("parameters")));
    });
}

/// A load of weights discards moments and the counts of steps and updates. The next steps are therefore the same as in
/// a session that began with these weights.
#[test]
fn optimizer_state_is_fresh_after_a_load_of_weights() {
    within(SECONDS, || {
        let scratch = Scratch::new("agreement-fresh");
        let file = scratch.path().join("model");
        let mut first = local_session(ONE);
        (0..3).for_each(|_| drop(model().step(&mut first)));
        first.save(&file).expect("saved");
        let train = |session: &mut Session| {
            let notes = session.init_from(&file).expect("a good file");
            assert!(notes.iter().any(|line| line.ends_with("optimizer state is fresh")), "{notes:?}");
            assert_eq!(session.steps(), 0);
            (0..3).for_each(|_| drop(model().step(session)));
            bits(&session.parameters().expect("parameters"))
                .into_iter()
                .map(|(n, b)| (n.to_owned(), b))
                .collect::<Vec<_>>()
        };
        let expected = train(&mut local_session(ONE));
        assert!(train(&mut first) == expected, "the load has not discarded all state of earlier steps");
    });
}

#[test]
fn tensors_of_16_bits_are_converted_and_other_types_named() {
    within(SECONDS, || {
        let scratch = Scratch::new("agreement-types");
        let path = scratch.path().join("model");
        let mut session = local_session(ONE);
        let parameters = session.parameters().expect("parameters");
        let mut write = |dtype: Dtype, bytes_of: &dyn Fn(f32) -> Vec<u8>| {
            let bytes =
                |t: &HostTensor| t.as_f32().expect("floats").iter().flat_map(|v| bytes_of(*v)).collect::<Vec<u8>>();
            let all: Vec<_> = parameters.iter().map(|(name, t)| (name.clone(), t.shape.clone(), bytes(t))).collect();
            let view = |shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).expect("a view");
            let views = all.iter().map(|(name, shape, bytes)| (name, view(shape, bytes))).collect::<Vec<_>>();
            std::fs::write(&path, safetensors::serialize(views, None).expect("a file")).expect("written");
            session.init_from(&path).map(|_| session.parameters().expect("parameters"))
        };
        let upper = |value: f32| value.to_bits() & 0xFFFF_0000;
        let loaded =
            write(Dtype::BF16, &|value| ((value.to_bits() >> 16) as u16).to_le_bytes().to_vec()).expect("bf16");
        for (name, tensor) in &loaded {
            let expected: Vec<u32> = parameters[name].as_f32().expect("floats").iter().map(|v| upper(*v)).collect();
            assert_eq!(bits(&loaded)[name.as_str()], expected, "{name}");
            assert_eq!(tensor.shape, parameters[name].shape);
        }
        // The f16 values 1.5 and -2^-24, which is the negative number of the smallest magnitude.
        for (half, expected) in [(0x3E00u16, 1.5), (0x8001, -(2f32.powi(-24)))] {
            let loaded = write(Dtype::F16, &|_| half.to_le_bytes().to_vec()).expect("f16");
            assert!(loaded.values().all(|t| t.as_f32().expect("floats").iter().all(|v| *v == expected)), "{expected}");
        }
        let error = write(Dtype::F64, &|value| f64::from(value).to_le_bytes().to_vec()).expect_err("f64").to_string();
        assert!(error.contains(" is F64, expected F32, F16 or BF16; convert the file"), "{error}");
        assert!(!error.contains("other sizes"), "{error}");
    });
}

/// Files and checkpoints record the declared values and the seed. A resume compares the values and takes over the seed.
#[test]
fn files_and_checkpoints_record_what_was_declared() {
    within(SECONDS, || {
        let scratch = Scratch::new("agreement-record");
        let (file, folder) = (scratch.path().join("model"), scratch.path().join("run"));
        let declared = |data: &str, batch: u32, heads: u32| {
            let all =
                Declarations::default().declare("data", data, OnResume::Same).declare("batch", batch, OnResume::Warn);
            let declared = all.declare("lr", batch, OnResume::Free).declare_model("heads", heads);
            SessionOptions { declared, ..SessionOptions::default() }
        };
        let mut first = start(ONE, &SessionOptions { seed: 7, ..declared("a", 4, 2) });
        (0..2).for_each(|_| drop(model().step(&mut first)));
        first.save(&file).expect("saved");
        checkpoint(&first, &folder);
        let exported = scratch.path().join("exported");
        shardflow::checkpoint::convert::export(&store(&folder).read(2).expect("it"), &exported).expect("exported");
        let bytes = std::fs::read(&file).expect("a file");
        assert!(std::fs::read(&exported).expect("a file") == bytes, "an export is the file that is saved");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
        let metadata = header.metadata().clone().expect("metadata");
        let value = |key: &str| metadata[key].clone();
        assert_eq!(
            [value("shardflow.declared.data"), value("shardflow.declared.heads"), value("shardflow.seed")],
            ["a", "2", "7"]
        );

        let ways: [(&str, Load<'_>); 3] = [
            ("file", &|session| session.restore(&file)),
            ("newest", &|session| session.restore_newest(&store(&folder)).map(|restored| restored.notes)),
            ("reader", &|session| session.restore_checkpoint(&store(&folder).read(2).expect("it"))),
        ];
        let losses = |session: &mut Session| (0..2).map(|_| model().step(session).loss).collect::<Vec<_>>();
        let expected = losses(&mut first);
        for (name, way) in ways {
            for (options, expected) in [
                (declared("b", 4, 2), "its data is a, but this program has b"),
                (declared("a", 4, 4), "its heads is 2"),
            ] {
                let error = way(&mut start(ONE, &options)).expect_err(name);
                assert!(error.to_string().contains(expected) && error.exit() == Exit::BadData, "{name}: {error}");
            }
            let mut resumed = start(ONE, &declared("a", 2, 2));
            let notes = way(&mut resumed).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(
                notes[0].contains("batch was 4 and is 2") && notes[1].contains("the seed 7 from "),
                "{name}: {notes:?}"
            );
            assert_eq!(
                (notes.len(), losses(&mut resumed)),
                (2, expected.clone()),
                "{name}: dropout continues with the seed"
            );
        }
        let error = start(ONE, &declared("a", 4, 4)).init_from(&file).expect_err("other heads").to_string();
        assert!(error.contains("its heads is 2, but this program has 4"), "{error}");
        start(ONE, &declared("b", 2, 2)).init_from(&file).expect("other data");
        // The session itself records the settings of the optimizer.
        assert!(value("shardflow.declared.optimizer").starts_with("AdamW, betas 0.9 and 0.99, eps 1e-8, weight decay"));
        let other = Model { max_norm: 2.0, ..model() };
        let mut other = other.session_with(ONE, &options(MICRO_BATCHES, OneFOneB), &declared("a", 4, 2));
        let notes = other.restore(&file).expect("the optimizer may differ").join("\n");
        assert!(notes.starts_with("maximum gradient norm was 1 and is 2 from here on\n"), "{notes}");
    });
}

/// Manifests of versions 1 and 2 have no declared values, and can still be loaded.
#[test]
fn older_checkpoints_are_loaded() {
    within(SECONDS, || {
        for (version, missing) in [(1, &["job", "updates", "declared"][..]), (2, &["updates", "declared"])] {
            let scratch = Scratch::new(&format!("agreement-version-{version}"));
            let declared = Declarations::default().declare("data", "a", OnResume::Same);
            let mut first = start(ONE, &SessionOptions { declared, ..SessionOptions::default() });
            model().step(&mut first);
            checkpoint(&first, scratch.path());
            let path = scratch.path().join("step-000000000001/manifest.json");
            let mut sealed: serde_json::Value =
                serde_json::from_slice(&std::fs::read(&path).expect("a manifest")).expect("JSON");
            assert_eq!(sealed["version"], 3);
            let body = sealed["body"].as_object_mut().expect("an object");
            missing.iter().for_each(|key| assert!(body.remove(*key).is_some(), "{key}"));
            let text = serde_json::to_string(&sealed["body"]).expect("JSON");
            sealed["blake3"] = blake3::hash(text.as_bytes()).to_hex().as_str().into();
            sealed["version"] = version.into();
            std::fs::write(&path, serde_json::to_vec(&sealed).expect("JSON")).expect("written");

            let declared = Declarations::default().declare("data", "b", OnResume::Same);
            let mut resumed = start(ONE, &SessionOptions { declared, ..SessionOptions::default() });
            let restored = resumed.restore_newest(&store(scratch.path())).expect("an older checkpoint");
            assert!(restored.damaged.is_empty() && restored.notes.is_empty(), "{restored:?}");
            // The second loss depends on the number of updates, which older manifests lack.
            for _ in 0..2 {
                assert_eq!(model().step(&mut resumed).loss, model().step(&mut first).loss);
            }
            // A program with fewer layers is still refused.
            let error = with_layers(1, &SessionOptions::default()).restore_newest(&store(scratch.path()));
            assert!(error.expect_err("a layer too many").to_string().contains("the program lacks "));
        }
    });
}
