//! Empty on purpose: `Cargo.toml` unifies the features of dependencies.
