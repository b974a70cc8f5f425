//! The CPU backend passes the suite of every backend, with one thread and with several.

use std::sync::Arc;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::conformance;
use shardflow_kernels::device::Device;

fn check(threads: usize) {
    let make = |n| {
        let engine = Arc::new(InProcess::new());
        (0..n).map(|rank| Device::cpu(rank, threads, engine.clone())).collect()
    };
    let failures = conformance::run(&make);
    let lines: Vec<String> = failures.iter().take(20).map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), lines.join("\n"));
}

#[test]
fn cpu_with_one_thread() {
    check(1);
}

#[test]
fn cpu_with_two_threads() {
    check(2);
}

#[test]
fn cpu_with_five_threads() {
    check(5);
}
