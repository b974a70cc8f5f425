//! The software device on its own: kernels, schedules, planted bugs. Imports its parts in `gpu`, and cudarc's `sys`.
//!
//! Each test starts this program again, so that the dynamic linker finds the device in the place of NVIDIA's libraries.
#![allow(unsafe_code)]

#[path = "gpu/api.rs"]
mod api;
#[path = "gpu/child.rs"]
mod child;
#[path = "gpu/kernels.rs"]
mod kernels;

#[test]
#[ignore = "run by the other tests, on the software device"]
fn child() {
    child::run(&[kernels::CASES].concat());
}
