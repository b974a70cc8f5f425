//! Tests each rule in `tidy.rs` on a small bad input.

use super::*;

/// Formats findings as `line rule`.
fn found(findings: Vec<Finding>) -> Vec<String> {
    findings.into_iter().map(|f| format!("{} {}", f.line, f.rule)).collect()
}

fn source<'a>(path: &'a str, text: &'a str) -> Source<'a> {
    Source { path, text }
}

#[test]
fn code_is_separated_from_comments_and_literals() {
    let text = "a // b\nc /* d /* e */ f\n g */ h \"i \\\" j\" k r#\"l \" m\"# n '\"' o 'p q '\\'' r";
    let code = code_only(text);
    let words: Vec<&str> = code.split_whitespace().collect();
    assert_eq!(words, ["a", "c", "h", "k", "n", "o", "'p", "q", "r"]);
    assert_eq!(code.lines().count(), text.lines().count());
}

#[test]
fn missing_headers_and_long_files_are_found() {
    assert_eq!(found(check_header(&source("a/src/mod.rs", "use b;\n"))), ["1 header", "1 mod.rs"]);
    let long = format!("//! Long.\n{}", "fn f() {}\n".repeat(LINES_MAX));
    assert_eq!(found(check_header(&source("a/src/b.rs", &long))), [format!("{} length", LINES_MAX + 1)]);
    assert_eq!(found(check_header(&source("a/src/b/tests.rs", &long))), [""; 0]);
    let tested = format!("//! Short.\n#[cfg(test)]\n{}", "fn f() {}\n".repeat(LINES_MAX));
    assert_eq!(found(check_header(&source("a/src/b.rs", &tested))), [""; 0]);
}

#[test]
fn unfinished_code_and_sleeps_in_tests_are_found() {
    let text = "fn f() { todo!() } // dbg!(x)\nfn g() { dbg!(1); thread::sleep(t) }\n#[cfg(test)]\nfn h() { sleep(t) }";
    assert_eq!(
        found(check_macros_and_sleeps(&source("a/src/b.rs", text))),
        ["1 unfinished", "2 unfinished", "4 sleep"]
    );
    assert_eq!(found(check_macros_and_sleeps(&source("a/tests/b.rs", "tokio::time::sleep(t).await"))), ["1 sleep"]);
}

#[test]
fn long_functions_are_found() {
    let method = |lines: usize| {
        let body = "        work();\n".repeat(lines - 3);
        format!("trait T {{\n    fn short(&self);\n    fn long(\n        &self,\n    ) {{\n{body}    }}\n}}\n")
    };
    let lengths = |lines| found(check_function_lengths(&source("a/src/b.rs", &method(lines))));
    assert_eq!(lengths(FUNCTION_LINES_MAX - 1), [""; 0]);
    assert_eq!(lengths(FUNCTION_LINES_MAX), ["3 function length"]);
}

#[test]
fn unlisted_and_unexplained_unsafe_code_is_found() {
    let text = "unsafe fn f() {}\ntype F = unsafe fn(u8);\n// unsafe { }\n#![allow(unsafe_code)]";
    assert_eq!(found(check_unsafe(&source("a/src/b.rs", text))), ["1 unsafe", "1 safety comment"]);
    let near = "// SAFETY: the slot is not shared until it is published\n\n\n\n\n\nunsafe { run() }";
    assert_eq!(found(check_unsafe(&source(UNSAFE_FILES[0], near))), [""; 0]);
    let far = format!("// SAFETY: far away\n\n{}", near.split_once('\n').unwrap().1);
    assert_eq!(found(check_unsafe(&source(UNSAFE_FILES[0], &far))), ["8 safety comment"]);
}

#[test]
fn imports_against_the_arrows_are_found() {
    let text = "use shardflow_kernels::op;\n// shardflow::graph\nuse shardflow::graph;\nlet shardflow = 1;";
    assert_eq!(found(check_imports(&source("actors/src/a.rs", text))), ["3 arrows"]);
    assert_eq!(found(check_imports(&source("kernels/src/a.rs", text))), ["3 arrows"]);
    assert_eq!(found(check_imports(&source("kernels/src/a.rs", "use shardflow_actors::spec;"))), ["1 arrows"]);
    assert_eq!(found(check_imports(&source("examples/src/a.rs", text))), [""; 0]);
    let manifest = "[package]\nname = \"shardflow-kernels\"\n[dev-dependencies]\nshardflow-actors.workspace = true\n";
    assert_eq!(found(check_manifest(&source("kernels/Cargo.toml", manifest))), ["4 arrows"]);
    assert_eq!(found(check_manifest(&source("runtime/Cargo.toml", manifest))), [""; 0]);
}

#[test]
fn impure_paths_in_pure_modules_are_found() {
    let text = "//! No tokio.\nuse tokio::sync;\nuse std::collections::BTreeMap;\nuse std::{fmt, time::Duration};\n\
                let t = std::time::Duration::ZERO;\nlet time = std::cmp::max(thread, 1);";
    assert_eq!(found(check_purity(&source("actors/src/protocol.rs", text))), ["2 purity", "4 purity", "5 purity"]);
    assert_eq!(found(check_purity(&source("actors/src/protocol/step.rs", "use shardflow_kernels::op;"))), ["1 purity"]);
    assert_eq!(found(check_purity(&source("actors/src/shell/queue.rs", text))), [""; 0]);
}

#[test]
fn broken_links_are_found() {
    let text = "[a](b.md) [c](../d.md#e) `[f](g.md)`\n```\n[h](i.md)\n```\n[j](https://k) [l](#m) [draft]()";
    let page = source("docs/adr/x.md", text);
    let findings = check_links(&page, |path| path == "docs/d.md");
    assert_eq!(
        findings.iter().map(Finding::to_string).collect::<Vec<_>>(),
        ["docs/adr/x.md:1: links: docs/adr/b.md does not exist: correct the link"]
    );
    let summary = source("docs/SUMMARY.md", "- [a](a.md)\n  - [b](adr/b.md)");
    let pages = ["docs/SUMMARY.md", "docs/a.md", "docs/adr/b.md", "docs/c.md"];
    assert_eq!(check_summary(&summary, &pages)[0].todo, "docs/c.md is not in the book: link it here");
    assert_eq!(check_summary(&summary, &pages[..3]), []);
}

#[test]
fn phrases_are_found_in_prose_only() {
    for phrase in PHRASES.iter().map(|phrase| phrase.replace('~', "")) {
        let (capital, broken) = (phrase.to_uppercase(), phrase.replace(' ', "\n/// "));
        let text = format!("//! A {phrase}.\n/// A {broken}\nfn f() {{}}\nlet s = \"{capital}\"; // ok");
        let lines = found(check_phrases(&source("a/src/b.rs", &text)));
        assert_eq!(lines.iter().map(|line| &line[..1]).collect::<Vec<_>>()[..2], ["1", "2"], "{phrase}");
        assert_eq!(lines.len(), 3, "{phrase}: {lines:?}");
        assert_eq!(found(check_phrases(&source("a/README.md", &format!("# {phrase}\n`{phrase}`")))).len(), 2);
        // These texts are permitted: names in code, parts of words, and words with punctuation between them.
        let name = phrase.replace(' ', "_");
        let fine = format!("//! `{name}_x`, {}.\nfn {name}() {{ x.{name}() }}", phrase.replace(' ', ", "));
        let expected = usize::from(!phrase.contains(' '));
        assert_eq!(found(check_phrases(&source("a/src/b.rs", &fine))).len(), expected, "{phrase}");
    }
}

#[test]
fn two_public_types_of_one_name_are_found() {
    let first = source("a/src/b.rs", "pub struct Node;\npub(crate) enum Edge {}\nstruct Path;\npub trait Walk {}\n");
    let text = "// pub struct Walk;\npub enum Edge {}\npub unsafe trait Walk {}\npub type Path = u8;\n\
                pub fn Node() {}\n    pub union Node { x: u8 }\n#[cfg(test)]\npub struct Edge;\n\
                #[cfg(test)]\nmod tests {\n    pub struct Node;\n}";
    let findings = check_type_names(&[first, source("c/src/d.rs", text)]);
    let todo = "rename one, or make it `pub(crate)`";
    assert_eq!(
        findings.iter().map(Finding::to_string).collect::<Vec<_>>(),
        [
            format!("c/src/d.rs:3: type name: a/src/b.rs has a public Walk, too: {todo}"),
            format!("c/src/d.rs:6: type name: a/src/b.rs has a public Node, too: {todo}"),
        ]
    );
    let test = source("a/tests/e.rs", "pub struct Node;");
    assert_eq!(check_type_names(&[source("a/src/b.rs", "pub struct Node;"), test]), []);
}

#[test]
fn imports_against_the_layers_and_circles_are_found() {
    let page = "# A\n## Layers\n\nText.\n\n### `actors`\n\n1. `a`, `a::low`\n2. `b`\n3. `c`\n\n## B\n### `x`\n1. `y`\n";
    let check = |files: &[(&str, &str)]| {
        let page = [source(layers::PAGE, page)].into_iter();
        let sources: Vec<Source> = page.chain(files.iter().map(|(path, text)| source(path, text))).collect();
        let findings = layers::check(&sources).into_iter();
        findings.filter(|f| f.path != layers::PAGE).map(|f| format!("{} {}", f.path, f.line)).collect::<Vec<_>>()
    };
    let good = [
        ("actors/src/lib.rs", "pub use c::C;\n"),
        ("actors/src/a.rs", "use std::fmt;\n"),
        ("actors/src/a/low.rs", ""),
        (
            "actors/src/b.rs",
            "use crate::{a::{self, A}, b::child::X};\nuse other::c;\n#[cfg(test)]\nmod tests {\n use crate::c;\n}\n",
        ),
        ("actors/src/b/child.rs", "// crate::c\nuse crate::a::A as C;\n"),
        ("actors/src/c.rs", "fn f() -> crate::b::B { crate::a::f() }\n"),
    ];
    assert_eq!(check(&good), [""; 0]);
    assert_eq!(
        check(&[good[1], ("actors/src/b.rs", "//!\nuse crate::a;\nuse crate::{\n c::C};\n"), good[5]]).len(),
        2,
        "order, circle"
    );
    assert_eq!(
        check(&[("actors/src/a.rs", "//!\nfn f() { crate::b::f() }\n"), ("actors/src/b.rs", "")]),
        ["actors/src/a.rs 2"]
    );
    // Entries of one layer must not import each other. A longer entry is separate from an entry that is its beginning.
    assert_eq!(
        check(&[("actors/src/a.rs", ""), ("actors/src/a/low.rs", "use super::A;\n")]),
        ["actors/src/a/low.rs 1"]
    );
    for parent in ["use child::X;\n", "fn f() { child::f() }\n"] {
        let circle = [("actors/src/b.rs", parent), ("actors/src/b/child.rs", "use super::B;\n")];
        assert_eq!(check(&circle), ["actors/src/b.rs 1"], "{parent}");
    }
    assert_eq!(check(&[("actors/src/new.rs", "")]), ["actors/src/new.rs 1"], "it is in no layer");
    assert_eq!(check(&[("benches/src/new.rs", "use crate::y;\n")]), [""; 0], "its crate is not in the table");
    let on_page = |files: &[(&str, &str)], page| {
        let page = [source(layers::PAGE, page)].into_iter();
        let sources: Vec<Source> = page.chain(files.iter().map(|(path, text)| source(path, text))).collect();
        layers::check(&sources).into_iter().filter(|f| f.path == layers::PAGE).map(|f| f.todo).collect::<Vec<_>>()
    };
    let missing = |folder| format!("{folder} has no list of layers under \"## Layers\"");
    let others = ["kernels", "actors/job", "runtime"].map(missing);
    assert_eq!(on_page(&good, page), others);
    assert_eq!(on_page(&good[..4], page), [&others[..], &["actors has no module c".to_owned()]].concat());
    assert_eq!(on_page(&[], "# A").len(), 4);
}
