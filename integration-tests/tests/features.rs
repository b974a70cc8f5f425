//! `cargo test -p CRATE` uses the same dependency features as `cargo test --workspace`, so it reuses that build.

use std::collections::BTreeSet;
use std::process::Command;

const CRATES: [&str; 7] = [
    "shardflow-kernels",
    "shardflow-job",
    "shardflow-actors",
    "shardflow",
    "shardflow-examples",
    "shardflow-integration-tests",
    "shardflow-software-cuda",
];

/// Returns each package that `cargo` builds for a selection, with the package's features.
fn packages(selection: &[&str]) -> BTreeSet<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["tree", "--offline", "--locked", "--prefix", "none", "--format", "{p} {f}"]).args(selection);
    let output = cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).output().expect("cargo runs");
    assert!(output.status.success(), "{cargo:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|line| line.trim_end_matches("(*)").trim().to_owned()).filter(|line| !line.is_empty()).collect()
}

#[test]
fn the_tests_of_one_crate_reuse_the_build_of_the_workspace() {
    let workspace = packages(&["--workspace", "--edges", "normal,build,dev"]);
    assert!(workspace.len() > 100, "{workspace:?}");
    let select = |name: &str| packages(&["--package", name, "--edges", "normal,build,dev"]);
    let mut selections: Vec<_> = CRATES.iter().map(|name| (*name, select(name))).collect();
    selections.push(("cargo build", packages(&["--workspace", "--edges", "normal,build"])));
    let name = |package: &str| package.split(' ').take(2).collect::<Vec<_>>().join(" ");
    for (selection, built) in selections {
        let differing: Vec<String> = built
            .difference(&workspace)
            .map(|package| {
                let of_all = workspace.iter().find(|other| name(other) == name(package));
                format!("{package}\n  in the workspace: {}", of_all.map_or("not built", String::as_str))
            })
            .collect();
        let todo = "give these packages the workspace's features in integration-tests/features/Cargo.toml";
        assert!(differing.is_empty(), "{selection}: {todo}:\n{}", differing.join("\n"));
    }
}
