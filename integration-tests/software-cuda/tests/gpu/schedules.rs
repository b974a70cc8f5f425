//! Checks the order of execution under each policy with host functions on separate streams.

use std::ffi::c_void;
use std::sync::Mutex;

use crate::api::{self, block_device, stream, wait};
use crate::{child, cuda};

static EXECUTED: Mutex<Vec<usize>> = Mutex::new(Vec::new());

// SAFETY: the function accepts any number as its argument.
unsafe extern "C" fn record(number: *mut c_void) {
    EXECUTED.lock().unwrap().push(number as usize);
}

/// Submits operations to eight streams while the device is blocked, and returns their execution order.
fn order_of(policy: &str, seed: u64) -> Vec<usize> {
    api::begin(policy, seed);
    let (first, streams) = (stream(), [(); 8].map(|()| stream()));
    let held = block_device(first);
    for (number, s) in streams.iter().enumerate() {
        cuda!(cuLaunchHostFunc(*s, Some(record), number as *mut c_void));
    }
    drop(held);
    streams.iter().for_each(|s| wait(*s));
    wait(first);
    for s in streams.into_iter().chain([first]) {
        cuda!(cuStreamDestroy_v2(s));
    }
    std::mem::take(&mut EXECUTED.lock().unwrap())
}

/// In the child: checks each policy.
pub fn check() {
    api::use_device(0);
    let up: Vec<usize> = (0..8).collect();
    assert_eq!(order_of("in-order", 1), up);
    assert_eq!(order_of("lazy", 1), up);
    // The blocking operation may run before or after the first submission. After that, the latest submission runs
    // first.
    let down = order_of("adversarial", 1);
    assert!(down.starts_with(&[7, 6, 5, 4, 3, 2, 1]) || down.starts_with(&[0, 7, 6, 5, 4, 3, 2]), "{down:?}");
    for policy in ["random", "starve"] {
        let orders: std::collections::BTreeSet<_> = (0..8).map(|seed| order_of(policy, seed)).collect();
        assert!(orders.len() > 4, "{policy}: {orders:?}");
    }
}

#[test]
fn policies_set_the_order_of_execution() {
    child::expect_clean("schedules", 1, "in-order", 1);
}
