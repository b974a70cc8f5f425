//! The CPU backend passes the conformance suite with one thread and with several threads. The shared-memory engine
//! passes the collectives suite, with separate mappings per device, as if each device were a process.

use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow_kernels::collective::board::Board;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::shared_memory::SharedMemory;
use shardflow_kernels::conformance::{self, ConformanceFailure};
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Access, Arena};

fn check(threads: usize) {
    let make = |n| {
        let engine = Arc::new(InProcess::new());
        (0..n).map(|rank| Device::cpu(rank, threads, engine.clone())).collect()
    };
    report(&conformance::run(&make));
}

fn report(failures: &[ConformanceFailure]) {
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

fn mapped(arena: &Arena, access: Access) -> Result<Arena, KernelError> {
    let file = arena.descriptor().and_then(|file| file.try_clone_to_owned().ok()).expect("a shared arena");
    Arena::map_peer(file, arena.bytes(), access)
}

/// Creates `n` devices. Each simulated process has up to `devices_per_process` of these devices.
fn on_node(n: usize, devices_per_process: usize) -> Result<Vec<(Device, Arena)>, KernelError> {
    let groups = conformance::collectives_groups(n);
    let board = Board::create(&groups)?;
    // Allocates the memory before the engines are created.
    let allocator = Device::cpu(0, 1, Arc::new(InProcess::new()));
    let arenas = (0..n).map(|_| allocator.shared_arena(conformance::COLLECTIVES_ARENA_BYTES));
    let arenas = arenas.collect::<Result<Vec<_>, _>>()?;
    let mut devices = Vec::new();
    for first in (0..n).step_by(devices_per_process) {
        let own = first..n.min(first + devices_per_process);
        let mut all = BTreeMap::new();
        for (rank, arena) in arenas.iter().enumerate() {
            let arena = if own.contains(&rank) { arena.clone() } else { mapped(arena, Access::Read)? };
            all.insert(rank, arena);
        }
        let engine = Arc::new(SharedMemory::new(mapped(&board, Access::ReadWrite)?, &groups, all)?);
        devices.extend(own.map(|rank| (Device::cpu(rank, 1, engine.clone()), arenas[rank].clone())));
    }
    Ok(devices)
}

#[test]
fn on_node_with_one_device_per_process() {
    report(&conformance::run_collectives(&|n| on_node(n, 1)));
}

#[test]
fn on_node_with_two_devices_per_process() {
    report(&conformance::run_collectives(&|n| on_node(n, 2)));
}
