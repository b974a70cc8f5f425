//! Policies differ as they should: what is executed first is seen by host functions on streams of their own.

use std::ffi::c_void;
use std::sync::Mutex;

use crate::api::{self, hold, stream, wait};
use crate::{child, cuda};

static SEEN: Mutex<Vec<usize>> = Mutex::new(Vec::new());

// SAFETY: any number may be passed.
unsafe extern "C" fn see(number: *mut c_void) {
    SEEN.lock().unwrap().push(number as usize);
}

/// The order in which operations of eight streams are executed that were submitted while the device was held up.
fn order_of(policy: &str, seed: u64) -> Vec<usize> {
    api::begin(policy, seed);
    let (first, streams) = (stream(), [(); 8].map(|()| stream()));
    let held = hold(first);
    for (number, s) in streams.iter().enumerate() {
        cuda!(cuLaunchHostFunc(*s, Some(see), number as *mut c_void));
    }
    drop(held);
    streams.iter().for_each(|s| wait(*s));
    wait(first);
    for s in streams.into_iter().chain([first]) {
        cuda!(cuStreamDestroy_v2(s));
    }
    std::mem::take(&mut SEEN.lock().unwrap())
}

/// In the child.
pub fn check() {
    api::use_device(0);
    let up: Vec<usize> = (0..8).collect();
    assert_eq!(order_of("in-order", 1), up);
    assert_eq!(order_of("lazy", 1), up);
    // The holder and the last one are one operation each: whichever comes first, the youngest is next.
    let down = order_of("adversarial", 1);
    assert!(down.starts_with(&[7, 6, 5, 4, 3, 2, 1]) || down.starts_with(&[0, 7, 6, 5, 4, 3, 2]), "{down:?}");
    for policy in ["random", "starve"] {
        let orders: std::collections::BTreeSet<_> = (0..8).map(|seed| order_of(policy, seed)).collect();
        assert!(orders.len() > 4, "{policy}: {orders:?}");
    }
}

#[test]
fn policies_differ() {
    child::expect_clean("schedules", 1, "in-order", 1);
}
