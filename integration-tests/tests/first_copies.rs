//! Of equal copies on several devices, only the first one goes to process 0. If copies of a parameter
//! differ, all ranks return an error. The processes are threads, each with its own session.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use shardflow::cluster::{Advertise, ClusterOptions, Transport};
use shardflow::job::transport::Address;
use shardflow::plan::HostTransfer;
use shardflow::prelude::*;
use shardflow_integration_tests::relay::{Relay, RelayOptions};
use shardflow_integration_tests::together::{self, cluster_at};
use shardflow_integration_tests::training::{LEARNING_RATE, Model, Scratch, bits, options, within};
use shardflow_kernels::tensor::element_count;

const SECONDS: u64 = 120;

/// Runs `work` on each rank, and returns the results by rank.
fn run_ranks<T: Send>(name: &str, processes: u32, work: impl Fn(u32, SessionOptions) -> T + Sync) -> Vec<T> {
    together::run_ranks(&format!("copies-{name}"), processes, &ClusterOptions::default(), work)
}

/// The devices from which the host fetches each output. The devices of one data rank have the same loss (if any), but
/// different parts of the gradients. The data ranks have different losses, but equal gradients.
#[test]
fn outputs_are_fetched_from_devices_with_first_copies() {
    let fetched = |mesh: &str| {
        let plan = Model { layers: 2, ..Model::default() }.plan(mesh, &options(2, Schedule::OneFOneB)).instance();
        let mut devices: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
        for (actor, actions) in plan.spec.actors.values().zip(plan.actions.values()) {
            let hosts = actions.iter().filter_map(|action| action.host.as_ref());
            for var in hosts.filter(|host| host.transfer == HostTransfer::Fetch).flat_map(|host| &host.vars) {
                let name = plan.graph.tensor(*var).name.split('.').next().unwrap_or_default().to_owned();
                devices.entry(name).or_default().insert(actor.device);
            }
        }
        devices.into_iter().map(|(name, devices)| format!("{name} {devices:?}")).collect::<Vec<_>>().join(", ")
    };
    assert_eq!(fetched("data=2,tensor=2"), "grad_squares {0, 1}, loss {0, 2}");
    assert_eq!(fetched("data=3"), "grad_squares {0}, loss {0, 1, 2}");
    assert_eq!(fetched("tensor=3"), "grad_squares {0, 1, 2}, loss {0}");
    assert_eq!(fetched("data=2,stage=2"), "grad_squares {0, 1}, loss {1, 3}");
}

/// Returns the number of bytes that two processes exchange over TCP while they call `gather`.
fn bytes_of(mesh: &str, gather: impl Fn(&Session) + Sync) -> u64 {
    let relay = Arc::new(Relay::new(RelayOptions { seed: 1, long_stall: None, records: false }));
    let folder = Scratch::new("copies-bytes");
    let socket = folder.path().join("meet.sock");
    let bound = Address::Unix(socket.clone());
    let Address::Unix(front) = relay.connections(&bound).expect("a relay") else { panic!("expected a Unix socket") };
    let barrier = Barrier::new(2);
    let run = |process| {
        let advertise = Some(relay.clone() as Arc<_>);
        let cluster = ClusterOptions { transport: Transport::Tcp, advertise, ..ClusterOptions::default() };
        let cluster = cluster_at(if process == 0 { &socket } else { &front }, process, 2, cluster);
        let session = SessionOptions { cluster, ..SessionOptions::default() };
        let session = Model::default().session_with(mesh, &options(1, Schedule::GPipe), &session);
        barrier.wait();
        let before = relay.counts().bytes;
        gather(&session);
        barrier.wait();
        let bytes = relay.counts().bytes - before;
        session.shutdown().unwrap_or_else(|e| panic!("process {process}: {e}"));
        bytes
    };
    thread::scope(|scope| {
        let threads = [0, 1].map(|process| scope.spawn(move || run(process)));
        threads.map(|thread| thread.join().expect("a rank has printed its error")).into_iter().max().unwrap_or(0)
    })
}

/// Process 0 has the first copy of each replicated parameter, so the other process sends none.
#[test]
fn a_copy_of_a_parameter_is_sent_only_to_processes_that_get_the_whole() {
    within(SECONDS, || {
        let plan = Model::default().plan("data=2", &options(1, Schedule::GPipe));
        let sizes = plan.graph.parameters().into_iter().map(|parameter| 4 * element_count(plan.graph.shape(parameter)));
        let all = sizes.sum::<usize>() as u64;
        let on_first = |session: &Session| drop(session.parameters_on_first().expect("parameters"));
        let bytes = bytes_of("data=2", on_first);
        assert!(bytes < all / 4, "{bytes} bytes were sent for parameters of {all} bytes");
        let bytes = bytes_of("data=2", |session| drop(session.parameters().expect("parameters")));
        assert!((all..all + all / 4).contains(&bytes), "{bytes} bytes were sent for parameters of {all} bytes");
        // Process 1 has half of most parameters.
        let bytes = bytes_of("tensor=2", on_first);
        assert!((all / 4..3 * all / 4).contains(&bytes), "{bytes} bytes were sent for parameters of {all} bytes");
        let folder = Scratch::new("copies-saved");
        let bytes = bytes_of("data=2", |session| session.save(&folder.path().join("saved")).expect("cannot save"));
        assert!(bytes < all / 2, "{bytes} bytes were sent to save parameters of {all} bytes");
    });
}

#[test]
fn whole_parameters_are_equal_for_any_number_of_processes() {
    within(SECONDS, || {
        let model = Model { layers: 2, dropout: 0.1, max_norm: 1.0, ..Model::default() };
        let result = |options: &SessionOptions, path: &Path| {
            let mut session = model.session_with("data=2,tensor=2", &self::options(2, Schedule::OneFOneB), options);
            let reports = [(); 2].map(|()| model.step(&mut session));
            let norms = reports.map(|report| (report.loss.map(f32::to_bits), report.grad_norm.map(f64::to_bits)));
            let (all, first) = (session.parameters().expect("all"), session.parameters_on_first().expect("first"));
            session.save(path).expect("cannot save");
            session.shutdown().expect("a clean shutdown");
            (norms, all, first)
        };
        let folder = Scratch::new("copies-equal");
        let path = |name: &str| folder.path().join(name);
        let (norms, all, first) = result(&SessionOptions::default(), &path("one"));
        assert!(first.is_some_and(|first| bits(&first) == bits(&all)));
        for processes in [2, 4] {
            let saved = path(&processes.to_string());
            let ranks = run_ranks(&format!("equal-{processes}"), processes, |_, options| result(&options, &saved));
            for (rank, (own_norms, own, own_first)) in ranks.into_iter().enumerate() {
                assert!(own_norms == norms && bits(&own) == bits(&all), "rank {rank} of {processes} has other values");
                let first = own_first.map(|own| bits(&own) == bits(&all));
                assert_eq!(first, (rank == 0).then_some(true), "rank {rank} got wrong parameters_on_first");
            }
            let files = [saved, path("one")].map(|path| std::fs::read(path).expect("cannot read the saved file"));
            assert!(files[0] == files[1], "{processes} processes saved other bytes than one process");
        }
    });
}

/// An op that copies its input. Its gradient alternates between 1 and -1, so devices get different gradients.
#[derive(Clone, Debug)]
struct Alternating {
    is_backward: bool,
    fired: Arc<AtomicUsize>,
}

impl CustomOp for Alternating {
    fn name(&self) -> &str {
        "alternating"
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("ab->ab")
    }

    fn kernel(&self, _: &[Region], _: &[Region]) -> Arc<dyn CustomKernel> {
        Arc::new(self.clone())
    }

    fn backward(&self, g: &mut Graph, _: &[Var], _: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>> {
        let op = Self { is_backward: true, ..self.clone() };
        vec![grads[0].map(|dy| g.custom(Arc::new(op), &[dy])[0])]
    }
}

impl CustomKernel for Alternating {
    fn name(&self) -> &str {
        "alternating"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        let (CpuSlice::F32(from), CpuSliceMut::F32(to)) = (&args.reads[0].data, &mut args.writes[0].data) else {
            panic!("floats");
        };
        to.copy_from_slice(from);
        if self.is_backward {
            to.fill(if self.fired.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) { 1.0 } else { -1.0 });
        }
        Ok(())
    }
}

/// Starts a program with a parameter `w` on two devices. If all ranks share a counter `fired`, the copies of `w` differ
/// after a step.
fn alternating(fired: Option<&Arc<AtomicUsize>>, options: &SessionOptions) -> Session {
    let mut g = Graph::new(&Mesh::parse("tensor=2").expect("a mesh"));
    let x = g.input("x", &[4, 3], DType::F32, Layout::broadcast());
    let w = g.parameter("w", &[4, 3], Init::Zeros, Layout::broadcast());
    let other = g.parameter("other", &[4, 3], Init::Zeros, Layout::broadcast());
    let alternating = fired.map(|fired| Alternating { is_backward: false, fired: fired.clone() });
    let copied = alternating.map_or(w, |op| g.custom(Arc::new(op), &[w])[0]);
    let sum = g.add(x, copied);
    let sum = g.add(sum, other);
    let ids = g.input("ids", &[4], DType::I32, Layout::broadcast());
    let loss = g.cross_entropy(sum, ids);
    g.minimize(loss, AdamW::default());
    let plan = compile(g, &self::options(1, Schedule::GPipe)).unwrap_or_else(|e| panic!("{e}"));
    Session::start(plan, options).unwrap_or_else(|e| panic!("{e}"))
}

fn step(session: &mut Session) {
    let inputs = [("x", HostTensor::f32(&[4, 3], vec![0.5; 12])), ("ids", HostTensor::i32(&[4], vec![0, 1, 2, 0]))];
    session.step(&inputs, LEARNING_RATE).expect("a finite step");
}

/// All ranks return the same error, nothing hangs, and the session remains usable.
#[test]
fn copies_that_differ_are_an_error_on_all_ranks() {
    within(SECONDS, || {
        let folder = Scratch::new("copies-differ");
        let path = folder.path().join("saved");
        let errors = |options: SessionOptions, fired: Option<&Arc<AtomicUsize>>| {
            let mut session = alternating(fired, &options);
            session.parameters().expect("initial copies are equal");
            step(&mut session);
            let found = [
                session.parameters().err(),
                session.parameters_on_first().err(),
                session.save(&path).err(),
                session.parameters().err(),
            ];
            step(&mut session);
            session.shutdown().expect("a clean shutdown");
            found.map(|error| error.map(|error| (error.exit(), error.to_string())))
        };
        assert_eq!(errors(SessionOptions::default(), None), [const { None }; 4]);
        std::fs::remove_file(&path).expect("cannot remove the saved file");
        let text = |name: &str| {
            let text = format!(
                "{name} in layout (B): copies differ between devices; a kernel, a device or MPI computes wrong values"
            );
            Some((Exit::Internal, text))
        };
        let expected = [text("w"), text("w"), text("adamw.m/w"), text("w")];
        assert_eq!(errors(SessionOptions::default(), Some(&Arc::default())), expected);
        let fired = Arc::default();
        let ranks = run_ranks("differ", 2, |_, options| errors(options, Some(&fired)));
        assert_eq!(ranks, [expected.clone(), expected]);
        assert!(!path.exists(), "a file with wrong values was saved");
    });
}

/// Rank 0 cannot write the file. It still takes part in the exchange, so the other ranks succeed.
#[test]
fn a_failed_write_concerns_only_rank_0() {
    within(SECONDS, || {
        let folder = Scratch::new("copies-unwritable");
        let found = run_ranks("unwritable", 2, |_, options| {
            let mut session = alternating(None, &options);
            let saved = session.save(&folder.path().join("missing/saved"));
            step(&mut session);
            session.parameters().expect("parameters");
            session.shutdown().expect("a clean shutdown");
            saved.is_ok()
        });
        assert_eq!(found, [false, true]);
    });
}
