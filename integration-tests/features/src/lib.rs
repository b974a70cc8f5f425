//! Intentionally empty: this crate's `Cargo.toml` unifies the features of dependencies.
