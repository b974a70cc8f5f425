//! The float64 reference and helpers for the tests of this crate.

pub mod default_model;
pub mod faulty;
pub mod large;
pub mod measure;
pub mod reference;
pub mod relay;
pub mod together;
pub mod training;
