//! The command `shardflow`.
fn main() {}
