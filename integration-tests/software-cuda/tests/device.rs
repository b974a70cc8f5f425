//! Tests of the software device alone: its kernels, its schedules, and the detection of planted mistakes.
//!
//! Each test starts this program again. The child's dynamic linker loads the software device instead of NVIDIA's
//! libraries.
#![allow(unsafe_code)]

#[path = "gpu/api.rs"]
mod api;
#[path = "gpu/bugs.rs"]
mod bugs;
#[path = "gpu/bugs_kernel.rs"]
mod bugs_kernel;
#[path = "gpu/bugs_memory.rs"]
mod bugs_memory;
#[path = "gpu/bugs_nccl.rs"]
mod bugs_nccl;
#[path = "gpu/child.rs"]
mod child;
#[path = "gpu/faults.rs"]
mod faults;
#[path = "gpu/graphs.rs"]
mod graphs;
#[path = "gpu/kernels.rs"]
mod kernels;
#[path = "gpu/processes.rs"]
mod processes;
#[path = "gpu/products.rs"]
mod products;
#[path = "gpu/schedules.rs"]
mod schedules;

use api::{cuda, nccl};

/// The cases that child processes run.
const CASES: &[(&str, fn())] = &[
    ("kernels", kernels::check_kernels),
    ("compiler", kernels::check_compiler),
    ("products", products::check),
    ("graphs", graphs::check),
    ("schedules", schedules::check),
    ("killed", faults::check_killed),
    ("hung", faults::check_hung),
    ("leaks", faults::check_leaks),
    ("counters", faults::check_counters),
    ("rank threads", faults::check_rank_threads),
    ("processes", processes::check_together),
    ("processes disagree", processes::check_lengths),
    ("processes on the same devices", processes::check_same_devices),
    ("a process never calls", processes::check_missing),
    ("a send is not announced", processes::check_unannounced),
    ("a process dies", processes::check_gone),
    ("bugs of memory", bugs_memory::check),
    ("bugs of kernels", bugs_kernel::check),
    ("bugs of collectives", bugs_nccl::check),
];

#[test]
#[ignore = "run by the other tests, on the software device"]
fn child() {
    child::run(CASES);
}

#[test]
fn mistakes_of_streams_and_memory_are_found() {
    bugs::expect_found("bugs of memory", 2);
}

#[test]
fn mistakes_inside_kernels_are_found() {
    bugs::expect_found("bugs of kernels", 1);
}

#[test]
fn mistakes_of_collectives_are_found() {
    bugs::expect_found("bugs of collectives", 2);
}
