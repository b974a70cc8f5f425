//! Tests copies that bypass the caches. The conformance suite's tensors are too small for these copies.

use std::sync::Arc;

use super::*;
use crate::collective::in_process::InProcess;
use crate::device::Device;
use crate::tensor::HostTensor;

#[test]
fn a_streamed_copy_equals_its_source() {
    let device = Device::cpu(0, 1, Arc::new(InProcess::new()));
    const ALL: usize = 600;
    let numbers = HostTensor::i32(&[ALL], (0..ALL as i32).collect());
    let zeros = HostTensor::i32(&[ALL], vec![0; ALL]);
    let (x, y) = (device.arena(4 * ALL).unwrap(), device.arena(4 * ALL).unwrap());
    x.write_host(0, &numbers).unwrap();
    let posted = |arena| Posted::checked(arena, 0, ALL).unwrap();
    // Test every alignment within a cache line, and runs with and without whole lines, below and above STREAM_RUN_MIN.
    for (from, to) in (0..17).flat_map(|from| (0..17).map(move |to| (from, to))) {
        for len in [0, 1, 15, 16, 17, 31, 64, 100, STREAM_RUN_MIN, 500] {
            y.write_host(0, &zeros).unwrap();
            // SAFETY: both ranges are inside, and no other thread accesses the memory.
            unsafe { stream(posted(&x).at(from), posted(&y).at(to), len) };
            let got = y.read_host(0, &[ALL], DType::I32).unwrap();
            let expected = |i: usize| if (to..to + len).contains(&i) { (from + i - to) as i32 } else { 0 };
            assert_eq!(got, HostTensor::i32(&[ALL], (0..ALL).map(expected).collect()), "{len} from {from} to {to}");
        }
    }
}
