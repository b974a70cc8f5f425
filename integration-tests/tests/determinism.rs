//! A program gives the same bits in every run, for any timing and any number of threads.

use shardflow::passes::CompileOptions;
use shardflow::plan::Schedule::OneFOneB;
use shardflow_integration_tests::training::{Model, ONE, options, within};

fn check(threads_per_device: usize, runs: usize) {
    within(240, move || {
        let model = Model { batch: 8, dropout: 0.1, max_norm: 0.5, ..Model::default() };
        let options = CompileOptions { micro_batches: 4, threads_per_device, ..CompileOptions::default() };
        let first = model.train("data=2,stage=2,tensor=2", &options, 3);
        for run in 1..runs {
            let again = model.train("data=2,stage=2,tensor=2", &options, 3);
            assert!(again.bits() == first.bits(), "run {run}: got {:?}, expected {:?}", again.losses, first.losses);
        }
    });
}

#[test]
fn twenty_runs_give_the_same_bits() {
    check(1, 20);
}

/// The threads of one device share the work of a kernel. Reductions keep their order.
#[test]
fn twenty_runs_with_two_threads_per_device_give_the_same_bits() {
    check(2, 20);
}

/// Compares losses, norms and weights of a training that is large enough for several threads. The norm is over the
/// whole model, so one changed gradient bit changes all later values.
#[test]
fn bits_do_not_depend_on_threads_or_stages() {
    within(400, || {
        let model = Model { layers: 2, heads: 4, width: 128, context: 64, batch: 12, dropout: 0.1, max_norm: 0.5 };
        let train = |mesh, threads_per_device| {
            model.train(mesh, &CompileOptions { threads_per_device, ..options(2, OneFOneB) }, 22)
        };
        let one = train(ONE, 1);
        for (mesh, threads) in [(ONE, 2), (ONE, 3), ("stage=2", 1), ("stage=2", 3)] {
            let other = train(mesh, threads);
            let at = one.losses.iter().zip(&other.losses).position(|(a, b)| a.to_bits() != b.to_bits());
            assert!(at.is_none(), "{mesh} on {threads} threads: the loss of step {at:?} differs");
            assert!(one.bits() == other.bits(), "{mesh} on {threads} threads: norms or weights differ");
        }
    });
}
