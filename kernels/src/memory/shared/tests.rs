//! Tests shared arenas, and peers' mappings of them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::channel;

use super::*;
use crate::collective::in_process::InProcess;
use crate::device::Device;
use crate::memory::{Arena, Base};
use crate::op::{Buffer, Launch, Op, Program};
use crate::stream::{Notification, Submission};
use crate::tensor::{DType, HostTensor};

fn descriptor_of(arena: &Arena) -> OwnedFd {
    arena.descriptor().unwrap().try_clone_to_owned().unwrap()
}

#[test]
fn a_peer_sees_writes_and_cannot_write_through_a_read_only_mapping() {
    let device = Device::cpu(0, 1, Arc::new(InProcess::new()));
    let arena = device.shared_arena(256).unwrap();
    assert_eq!((device.bytes_allocated(), device.allocation_count()), (256, 1));
    let reader = Arena::map_peer(descriptor_of(&arena), 256, Access::Read).unwrap();
    let writer = Arena::map_peer(descriptor_of(&arena), 256, Access::ReadWrite).unwrap();
    assert!(!reader.same(&arena) && !reader.is_writable() && writer.is_writable());
    assert_eq!(reader.read_host(64, &[2], DType::F32).unwrap(), HostTensor::f32(&[2], vec![0.0; 2]));
    let x = HostTensor::f32(&[2], vec![1.5, -2.0]);
    writer.write_host(64, &x).unwrap();
    assert_eq!(reader.read_host(64, &[2], DType::F32).unwrap(), x);
    assert_eq!(arena.read_host(64, &[2], DType::F32).unwrap(), x);
    assert!(matches!(reader.write_host(64, &x), Err(KernelError::Arguments { .. })));

    let stream = device.stream("test", 1).unwrap();
    let launch = |arena: &Arena, workspace: bool| {
        let buffer = |base| Buffer { base, offset: 64, shape: vec![2], dtype: DType::F32 };
        let launch = Launch {
            op: Op::Scale { factor: 2.0 },
            reads: vec![buffer(0)],
            writes: vec![buffer(usize::from(!workspace))],
            accumulate: false,
            workspace: workspace.then(|| buffer(1)),
        };
        let program = Arc::new(Program { name: "test".to_owned(), launches: vec![launch], signals: vec![] });
        let (sender, notifications) = channel();
        let notify = Box::new(move |notification| drop(sender.send(notification)));
        let bases = [if workspace { &writer } else { &reader }, arena];
        let bases = bases.map(|arena| Base { arena: arena.clone(), offset: 0 }).to_vec();
        stream.submit(Submission { program, bases, repeat: false, notify }).unwrap();
        notifications.recv().unwrap()
    };
    for workspace in [false, true] {
        assert!(matches!(launch(&reader, workspace), Notification::Failed(KernelError::Arguments { .. })));
    }
    // A launch can read a peer's memory.
    let own = device.arena(128).unwrap();
    assert_eq!(launch(&own, false), Notification::Done);
    assert_eq!(own.read_host(64, &[2], DType::F32).unwrap().as_f32(), Some(&[3.0, -4.0][..]));
    drop((stream, arena, own));
    assert_eq!((device.bytes_allocated(), device.bytes_peak(), device.allocation_count()), (0, 384, 2));
}

#[test]
fn empty_memory_can_be_mapped_and_excessive_sizes_are_rejected() {
    let device = Device::cpu(3, 1, Arc::new(InProcess::new()));
    let arena = device.shared_arena(0).unwrap();
    let peer = Arena::map_peer(descriptor_of(&arena), 0, Access::Read).unwrap();
    assert_eq!(peer.read_host(0, &[0], DType::I32).unwrap(), HostTensor::i32(&[0], vec![]));
    assert_eq!(device.arena(8).unwrap().descriptor().map(|_| ()), None);
    for bytes in [usize::MAX / 2, 1 << 55] {
        assert_eq!(device.shared_arena(bytes).unwrap_err(), KernelError::OutOfMemory { device: 3, bytes });
    }
    assert_eq!(device.bytes_allocated(), 0);
}

#[test]
fn unsealed_and_wrongly_sized_memory_of_a_peer_is_rejected() {
    let expect_rejected = |file: &dyn AsFd, bytes: usize, what: &str| {
        let file = file.as_fd().try_clone_to_owned().unwrap();
        let error = Arena::map_peer(file, bytes, Access::Read).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    let arena = Arena::shared_by_processes(4096).unwrap();
    expect_rejected(&arena.descriptor().unwrap(), 4095, "expected 4095 bytes, got 4096 bytes");
    expect_rejected(&arena.descriptor().unwrap(), 8192, "expected 8192 bytes, got 4096 bytes");
    // The size is not sealed: the peer could truncate the file, and a later read would fault.
    let open = memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&open, 4096).unwrap();
    expect_rejected(&open, 4096, "seals");
    fcntl_add_seals(&open, SealFlags::GROW | SealFlags::SEAL).unwrap();
    expect_rejected(&open, 4096, "seals");
    // A file on disk has no seals.
    let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    expect_rejected(&file, file.metadata().unwrap().len() as usize, "sealed memfd");
    expect_rejected(&std::net::TcpListener::bind("127.0.0.1:0").unwrap(), 4096, "expected 4096 bytes");
    // The size of sealed memory cannot be changed.
    assert!(ftruncate(arena.descriptor().unwrap(), 0).is_err());
}
