//! Nothing: `Cargo.toml` unifies the features of dependencies.
