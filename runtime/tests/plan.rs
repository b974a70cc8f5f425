//! `shardflow plan` prints a program's plan, which the program writes to the files that environment variables name. The
//! command prints the program's own errors only if there is no plan.

use std::process::{Command, Output};

fn plan(flags: &[&str], script: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardflow"));
    command.arg("plan").args(flags).args(["--", "sh", "-c", script]);
    command.output().expect("shardflow")
}

#[test]
fn the_plan_is_printed_or_written_to_files() {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    // The program's exit code does not matter: `Session::start` returns an error, and `main` may return this error.
    for end in ["", "; exit 1"] {
        let output = plan(&[], &format!("echo noise; echo a plan > $SHARDFLOW_PLAN_TEXT{end}"));
        assert!(output.status.success());
        assert_eq!(text(&output.stdout), "a plan\n");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (html, dot) = (folder.path().join("p.html"), folder.path().join("p.dot"));
    let flags = ["--html", html.to_str().expect("text"), "--dot", dot.to_str().expect("text")];
    let script = "echo page > $SHARDFLOW_PLAN_HTML; echo graph > $SHARDFLOW_PLAN_DOT; echo x > $SHARDFLOW_PLAN_TEXT";
    let output = plan(&flags, script);
    let written = format!("the plan is in {}\nthe plan is in {}\n", html.display(), dot.display());
    assert!(output.status.success() && text(&output.stdout) == written, "{output:?}");
    let read = |path| std::fs::read_to_string(path).expect("a file");
    assert_eq!((read(html), read(dot)), ("page\n".to_owned(), "graph\n".to_owned()));
    let error = "error: sh ended without starting a session";
    for (script, code) in [("echo why >&2; exit 78", 78), ("echo why >&2", 2)] {
        let output = plan(&[], script);
        let err = text(&output.stderr);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(code), ""), "{err}");
        assert!(err.starts_with("why\n") && err.contains(error), "{err}");
    }
}
