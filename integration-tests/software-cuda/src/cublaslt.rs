//! cuBLASLt's functions.

pub mod product;
