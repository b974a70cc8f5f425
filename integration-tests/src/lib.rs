//! References and helpers for the tests of this crate.
