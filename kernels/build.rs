//! Passes the optimization level to the crate, so that the runtime can warn about slow, unoptimized kernels.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=SHARDFLOW_OPT_LEVEL={}", std::env::var("OPT_LEVEL").unwrap_or_default());
}
