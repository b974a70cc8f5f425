//! Passes the optimisation level on to the crate: unoptimised kernels are too slow to train with.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=SHARDFLOW_OPT_LEVEL={}", std::env::var("OPT_LEVEL").unwrap_or_default());
}
