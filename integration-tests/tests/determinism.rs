//! The same program gives the same bits, run after run, whatever the timing of threads.

use shardflow::passes::CompileOptions;
use shardflow_integration_tests::training::{Model, within};

fn check(threads_per_device: usize, runs: usize) {
    within(240, move || {
        let model = Model { batch: 8, dropout: 0.1, max_norm: 0.5, ..Model::default() };
        let options = CompileOptions { micro_batches: 4, threads_per_device, ..CompileOptions::default() };
        let first = model.train("data=2,stage=2,tensor=2", &options, 3);
        for run in 1..runs {
            let again = model.train("data=2,stage=2,tensor=2", &options, 3);
            assert!(again.bits() == first.bits(), "run {run}: {:?} against {:?}", again.losses, first.losses);
        }
    });
}

#[test]
fn twenty_runs_give_the_same_bits() {
    check(1, 20);
}

/// Threads of one device share a kernel's work; reductions keep their order.
#[test]
fn twenty_runs_on_two_threads_a_device_give_the_same_bits() {
    check(2, 20);
}
