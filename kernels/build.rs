//! Passes the optimisation level to the crate, because unoptimised kernels are too slow for training.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=SHARDFLOW_OPT_LEVEL={}", std::env::var("OPT_LEVEL").unwrap_or_default());
}
