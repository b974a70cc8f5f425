//! Checks the repository's layout and style: imports between crates, layers of modules, purity of the protocol, headers
//! of files, lengths of files and functions, `unsafe`, sleeps in tests, links of the docs, banned phrases, and names of
//! public types.
//!
//! The rules are pure functions of file texts. `tidy/rule_tests.rs` tests each rule on a small bad input.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

#[path = "tidy/layers.rs"]
mod layers;
#[path = "tidy/rule_tests.rs"]
mod rule_tests;

/// For each crate: its folder, its name in code, and the crates that it may import.
const CRATES: &[(&str, &str, &[&str])] = &[
    ("kernels", "shardflow_kernels", &[]),
    ("actors/job", "shardflow_job", &[]),
    ("actors", "shardflow_actors", &["shardflow_kernels", "shardflow_job"]),
    ("runtime", "shardflow", &["shardflow_kernels", "shardflow_job", "shardflow_actors"]),
    ("examples", "shardflow_examples", &["shardflow_kernels", "shardflow_actors", "shardflow"]),
    ("integration-tests", "shardflow_integration_tests", &["shardflow_kernels", "shardflow_actors", "shardflow"]),
];

/// Modules of `actors` with side effects. All other modules are pure: they can be simulated, fuzzed and replayed.
const ACTORS_IMPURE: &[&str] = &["lib", "error", "shell", "bus", "supervisor", "watchdog", "loaded", "remote"];
/// Paths that pure modules of `actors` may not use.
const IMPURE_PATHS: &[&str] =
    &["tokio", "ractor", "crossbeam_channel", "shardflow_kernels", "std::time", "std::thread", "Instant", "SystemTime"];

/// Files that may hold `unsafe`.
const UNSAFE_FILES: &[&str] = &[
    "kernels/src/clock.rs",
    "integration-tests/software-cuda/src/control.rs",
    "integration-tests/software-cuda/src/cublaslt.rs",
    "integration-tests/software-cuda/src/cublaslt/product.rs",
    "integration-tests/software-cuda/src/cudnn.rs",
    "integration-tests/software-cuda/src/cudnn/evaluate.rs",
    "integration-tests/software-cuda/src/driver/memory.rs",
    "integration-tests/software-cuda/src/driver/module.rs",
    "integration-tests/software-cuda/src/exit.rs",
    "integration-tests/software-cuda/src/export.rs",
    "integration-tests/software-cuda/src/kernel.rs",
    "integration-tests/software-cuda/src/memory.rs",
    "integration-tests/software-cuda/src/nccl/data.rs",
    "integration-tests/software-cuda/src/nvrtc.rs",
    "integration-tests/software-cuda/src/run.rs",
    "integration-tests/software-cuda/src/shadow.rs",
    "integration-tests/software-cuda/tests/gpu/api.rs",
    "integration-tests/software-cuda/tests/gpu/bugs_memory.rs",
    "integration-tests/software-cuda/tests/gpu/bugs_nccl.rs",
    "integration-tests/software-cuda/tests/gpu/faults.rs",
    "integration-tests/software-cuda/tests/gpu/graphs.rs",
    "integration-tests/software-cuda/tests/gpu/processes.rs",
    "integration-tests/software-cuda/tests/gpu/products.rs",
    "integration-tests/software-cuda/tests/gpu/schedules.rs",
    "kernels/src/collective/board.rs",
    "kernels/src/collective/exchange.rs",
    "kernels/src/collective/exchange/tests.rs",
    "kernels/src/collective/in_process.rs",
    "kernels/src/collective/mpi.rs",
    "kernels/src/collective/mpi/calls.rs",
    "kernels/src/collective/shared_memory.rs",
    "kernels/src/cpu/attention.rs",
    "kernels/src/cpu/launch.rs",
    "kernels/src/cpu/matmul.rs",
    "kernels/src/cpu/pool.rs",
    "kernels/src/cpu/widen.rs",
    "kernels/src/cuda/blas.rs",
    "kernels/src/cuda/context.rs",
    "kernels/src/cuda/cudnn.rs",
    "kernels/src/cuda/cudnn/api.rs",
    "kernels/src/cuda/cudnn/descriptor.rs",
    "kernels/src/cuda/event.rs",
    "kernels/src/cuda/gpu.rs",
    "kernels/src/cuda/raw_stream.rs",
    "kernels/src/cuda/library.rs",
    "kernels/src/cuda/memory.rs",
    "kernels/src/cuda/module.rs",
    "kernels/src/cuda/nccl/api.rs",
    "kernels/src/cuda/nccl/comm.rs",
    "kernels/src/cuda/progress.rs",
    "kernels/src/cuda/record.rs",
    "kernels/src/cuda/staged.rs",
    "kernels/src/memory.rs",
    "kernels/src/memory/raw_io.rs",
    "kernels/src/memory/shared.rs",
    "kernels/src/bound.rs",
    "kernels/src/cpu/args.rs",
    "kernels/src/cuda/device_memory.rs",
    "kernels/src/cuda/probe.rs",
    "kernels/src/cuda/status.rs",
    "kernels/src/memory/heap.rs",
];

/// Banned phrases, which plain terms must replace. Each contains a `~`, which the rule removes, so the list itself
/// passes.
const PHRASES: &[&str] = &[
    "te~ll",
    "te~lls",
    "to~ld",
    "so ~many",
    "who~ever",
    "an infinity or ~no number",
    "put ~down to",
    "made ~use of",
    "what ~becomes of",
];

const TYPE_KEYWORDS: &[&str] = &["struct", "enum", "trait", "type", "union"];

const LINES_MAX: usize = 700;
const FUNCTION_LINES_MAX: usize = 70;
const SAFETY_LINES_MAX: usize = 6;

/// A file. The path is relative to the repository's root, with `/` as the separator.
struct Source<'a> {
    path: &'a str,
    text: &'a str,
}

/// A broken rule.
#[derive(Debug, PartialEq)]
struct Finding {
    path: String,
    /// Number of the line, counted from 1.
    line: usize,
    rule: &'static str,
    todo: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule, self.todo)
    }
}

fn finding(source: &Source, line: usize, rule: &'static str, todo: impl Into<String>) -> Finding {
    Finding { path: source.path.into(), line, rule, todo: todo.into() }
}

/// Replaces each character of comments and literals by a space, but keeps line ends.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut i = 0;
    while i < chars.len() {
        let raw_hashes = (at(i) == 'r' && (i == 0 || !is_name(at(i - 1)) || at(i - 1) == 'b'))
            .then(|| chars[i + 1..].iter().take_while(|c| **c == '#').count())
            .filter(|hashes| at(i + 1 + hashes) == '"');
        let end = if at(i) == '/' && at(i + 1) == '/' {
            (i..chars.len()).find(|j| at(*j) == '\n').unwrap_or(chars.len())
        } else if at(i) == '/' && at(i + 1) == '*' {
            block_comment_end(&chars, i)
        } else if let Some(hashes) = raw_hashes {
            let closes = |j: &usize| at(*j) == '"' && (1..=hashes).all(|k| at(j + k) == '#');
            (i + hashes + 2..chars.len()).find(closes).map_or(chars.len(), |j| j + hashes + 1)
        } else if at(i) == '"' {
            literal_end(&chars, i)
        } else if at(i) == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            // This is a character literal, not a lifetime.
            literal_end(&chars, i)
        } else {
            out.push(at(i));
            i += 1;
            continue;
        };
        out.extend(chars[i..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
        i = end;
    }
    out
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                i += 1;
                continue;
            }
        }
        i += 2;
        if depth == 0 {
            return i;
        }
    }
    chars.len()
}

/// Returns the index after the quote that closes the literal whose opening quote is at `start`.
fn literal_end(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != chars[start] {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(chars.len())
}

/// Returns the names (identifiers and keywords) in a line of code, each with the rest of the line.
fn names(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    line.char_indices().filter_map(move |(start, c)| {
        let begins = is_name(c) && !line[..start].ends_with(is_name);
        let end = line[start..].find(|c| !is_name(c)).map_or(line.len(), |n| start + n);
        begins.then(|| (&line[start..end], &line[end..]))
    })
}

/// Returns the index of the line where tests begin: `usize::MAX` without tests, 0 if the whole file is tests.
fn tests_start(source: &Source) -> usize {
    if source.path.contains("/tests/") || source.path.ends_with("/tests.rs") {
        return 0;
    }
    source.text.lines().position(|l| l.trim() == "#[cfg(test)]").unwrap_or(usize::MAX)
}

fn check_header(source: &Source) -> Vec<Finding> {
    let mut found = Vec::new();
    if !source.text.starts_with("//!") {
        found.push(finding(source, 1, "header", "open with `//!`: the file's one job"));
    }
    if source.path.ends_with("/mod.rs") {
        found.push(finding(source, 1, "mod.rs", "name it after its module, and put it beside the module's folder"));
    }
    let (tests, lines) = (tests_start(source), source.text.lines().count());
    if tests.min(lines) > LINES_MAX {
        let todo = format!(
            "{} lines before the tests, more than {LINES_MAX}: split off a part with one job",
            tests.min(lines)
        );
        found.push(finding(source, LINES_MAX + 1, "length", todo));
    }
    found
}

fn check_macros_and_sleeps(source: &Source) -> Vec<Finding> {
    let (code, tests) = (code_only(source.text), tests_start(source));
    let mut found = Vec::new();
    for (i, line) in code.lines().enumerate() {
        for (name, rest) in names(line) {
            if ["todo", "unimplemented", "dbg"].contains(&name) && rest.starts_with('!') {
                found.push(finding(source, i + 1, "unfinished", format!("finish the code and remove `{name}!`")));
            }
            if name == "sleep" && rest.starts_with('(') && i >= tests {
                let todo = "a test sleeps: use virtual time, or wait for the event with a timeout";
                found.push(finding(source, i + 1, "sleep", todo));
            }
        }
    }
    found
}

/// Relies on rustfmt: a function ends at the first line that holds only `}` with the indentation of its first line.
fn check_function_lengths(source: &Source) -> Vec<Finding> {
    let code = code_only(source.text);
    let lines: Vec<&str> = code.lines().map(str::trim_end).collect();
    let mut found = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let is_qualifier = |name: &str| ["pub", "crate", "super", "const", "async", "unsafe", "extern"].contains(&name);
        let mut item = names(line).skip_while(|(name, _)| is_qualifier(name));
        let (Some(("fn", _)), Some((name, _))) = (item.next(), item.next()) else { continue };
        let signature_end = lines[i..].iter().find(|line| line.ends_with(['{', ';', '}']));
        if signature_end.is_none_or(|line| !line.ends_with('{')) {
            continue;
        }
        let end = format!("{}}}", &line[..line.len() - line.trim_start().len()]);
        let length = 1 + lines[i..].iter().position(|line| *line == end).unwrap_or(0);
        if length > FUNCTION_LINES_MAX {
            let todo = format!("`{name}` has {length} lines: split it, the maximum is {FUNCTION_LINES_MAX}");
            found.push(finding(source, i + 1, "function length", todo));
        }
    }
    found
}

fn check_unsafe(source: &Source) -> Vec<Finding> {
    let (code, original) = (code_only(source.text), source.text.lines().collect::<Vec<_>>());
    let code: Vec<&str> = code.lines().collect();
    let mut found = Vec::new();
    for (i, line) in code.iter().enumerate() {
        for (_, rest) in names(line).filter(|(name, _)| *name == "unsafe") {
            let next = if rest.trim().is_empty() { code.get(i + 1).copied().unwrap_or("") } else { rest }.trim_start();
            // The type of a function pointer is not an unsafe operation, but an attribute like `unsafe(no_mangle)` is.
            if next.strip_prefix("fn").is_some_and(|after| after.trim_start().starts_with('(')) {
                continue;
            }
            if !UNSAFE_FILES.contains(&source.path) {
                let todo = "use safe code, or add this file to UNSAFE_FILES in tidy.rs and state why in the review";
                found.push(finding(source, i + 1, "unsafe", todo));
            }
            let above = &original[i.saturating_sub(SAFETY_LINES_MAX)..=i];
            if !above.iter().any(|l| l.contains("SAFETY:") || l.contains("# Safety")) {
                let todo = format!(
                    "state why this is sound in a comment `// SAFETY: ..`, at most {SAFETY_LINES_MAX} lines above"
                );
                found.push(finding(source, i + 1, "safety comment", todo));
            }
        }
    }
    found
}

fn check_imports(source: &Source) -> Vec<Finding> {
    // Take the crate with the longest folder that contains the file.
    let holds = |folder: &str| source.path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    let Some((folder, own, allowed)) = CRATES.iter().filter(|c| holds(c.0)).max_by_key(|c| c.0.len()) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for (i, line) in code_only(source.text).lines().enumerate() {
        for (name, rest) in names(line) {
            let is_crate = CRATES.iter().any(|c| c.1 == name) && rest.trim_start().starts_with("::");
            if is_crate && name != *own && !allowed.contains(&name) {
                let todo = format!(
                    "{folder} may not import {name}: the order is {{kernels, job}} <- actors <- runtime <- other crates"
                );
                found.push(finding(source, i + 1, "arrows", todo));
            }
        }
    }
    found
}

fn check_manifest(source: &Source) -> Vec<Finding> {
    let Some((folder, _, allowed)) = CRATES.iter().find(|c| source.path == format!("{}/Cargo.toml", c.0)) else {
        return Vec::new();
    };
    let (mut found, mut in_dependencies) = (Vec::new(), false);
    for (i, line) in source.text.lines().enumerate() {
        if line.starts_with('[') {
            in_dependencies = line.contains("dependencies");
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or("").replace('-', "_");
        if in_dependencies && CRATES.iter().any(|c| c.1 == name) && !allowed.contains(&name.as_str()) {
            let todo = format!(
                "{folder} may not depend on {name}: the order is {{kernels, job}} <- actors <- runtime <- other crates"
            );
            found.push(finding(source, i + 1, "arrows", todo));
        }
    }
    found
}

fn check_purity(source: &Source) -> Vec<Finding> {
    let Some(module) = source.path.strip_prefix("actors/src/") else { return Vec::new() };
    let module = module.split(['/', '.']).next().unwrap_or("");
    if ACTORS_IMPURE.contains(&module) {
        return Vec::new();
    }
    let mut found = Vec::new();
    // Hashes and random numbers are pure, so every module may use them.
    let code = code_only(source.text).replace("shardflow_kernels::hash", "");
    for (i, line) in code.lines().enumerate().take(tests_start(source)) {
        let mentions = |path: &&&str| {
            names(line).any(|(name, rest)| match path.split_once("::") {
                // This includes `std::time`, and also `std::{.., time::..}`.
                Some((first, second)) => {
                    let part = rest.strip_prefix("::").unwrap_or("");
                    name == first
                        && names(part).any(|(n, _)| n == second)
                        && (part.starts_with('{') || part.starts_with(second))
                }
                None => name == **path,
            })
        };
        if let Some(path) = IMPURE_PATHS.iter().find(mentions) {
            let todo = format!("{path} in a pure module: move it to the shell, and pass its result as an event");
            found.push(finding(source, i + 1, "purity", todo));
        }
    }
    found
}

/// Returns the targets of the links in a Markdown text, with their line numbers. Skips code.
fn links(text: &str) -> Vec<(usize, String)> {
    let (mut found, mut in_code) = (Vec::new(), false);
    for (i, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        // The parts at odd indices are inline code.
        let prose: String =
            line.split('`').enumerate().map(|(n, part)| if n % 2 == 0 { part } else { "code" }).collect();
        for after in prose.split("](").skip(1) {
            if let Some((target, _)) = after.split_once(')') {
                found.push((i + 1, target.split('#').next().unwrap_or("").to_string()));
            }
        }
    }
    found
}

/// Returns the target of `link` in the file `from`, as a path from the repository's root.
fn resolve(from: &str, link: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "." | "" => {}
            ".." if parts.last().is_some_and(|p| *p != "..") => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn check_links(source: &Source, exists: impl Fn(&str) -> bool) -> Vec<Finding> {
    let is_file = |link: &str| !link.is_empty() && !link.contains("://") && !link.starts_with("mailto:");
    let broken = |(line, link): (usize, String)| {
        let target = resolve(source.path, &link);
        (is_file(&link) && !exists(&target))
            .then(|| finding(source, line, "links", format!("{target} does not exist: correct the link")))
    };
    links(source.text).into_iter().filter_map(broken).collect()
}

/// Checks that the book's summary has a link to every page under `docs/`.
fn check_summary(summary: &Source, pages: &[&str]) -> Vec<Finding> {
    let linked: Vec<String> = links(summary.text).iter().map(|(_, link)| resolve(summary.path, link)).collect();
    let missing = pages.iter().filter(|page| **page != summary.path && !linked.iter().any(|l| l == *page));
    missing.map(|page| finding(summary, 1, "summary", format!("{page} is not in the book: link it here"))).collect()
}

/// Returns the words of a text in lower case, with their line numbers. A separator other than whitespace or a comment
/// marker becomes an empty word.
fn words(text: &str) -> Vec<(usize, String)> {
    let mut words: Vec<(usize, String)> = Vec::new();
    for (i, line) in text.lines().enumerate() {
        for part in line.split_inclusive(|c: char| !c.is_alphanumeric() && c != '_') {
            let word = part.trim_end_matches(|c: char| !c.is_alphanumeric() && c != '_');
            let separator = &part[word.len()..];
            if !word.is_empty() {
                words.push((i + 1, word.to_lowercase()));
            }
            if !separator.trim().is_empty() && !["/", "!", "#", "*", ">"].contains(&separator) {
                words.push((i + 1, String::new()));
            }
        }
    }
    words
}

/// Rejects [`PHRASES`] in comments and literals of Rust files, and everywhere in other files.
fn check_phrases(source: &Source) -> Vec<Finding> {
    let is_rust = source.path.ends_with(".rs");
    let code = if is_rust { code_only(source.text) } else { String::new() };
    // Code is replaced by a separator, which no phrase contains.
    let mut code = code.chars();
    let prose = source.text.chars().map(|c| if code.next().is_some_and(|c| !c.is_whitespace()) { ';' } else { c });
    let words = words(&prose.collect::<String>());
    let mut found = Vec::new();
    for phrase in PHRASES.iter().map(|phrase| phrase.replace('~', "")) {
        let parts: Vec<&str> = phrase.split(' ').collect();
        let is_phrase = |window: &&[(usize, String)]| window.iter().map(|(_, word)| word).eq(&parts);
        for window in words.windows(parts.len()).filter(is_phrase) {
            let todo = format!("replace \"{phrase}\" by a plain term, such as \"reports\" or \"N\"");
            found.push(finding(source, window[0].0, "phrase", todo));
        }
    }
    found
}

/// Returns the public types of a Rust file with their line numbers. Skips the tests, which are at the end of the file.
fn public_types(source: &Source) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    if tests_start(source) == 0 {
        return found;
    }
    let code = code_only(source.text);
    let mut is_test = false;
    for (i, line) in code.lines().map(str::trim).enumerate() {
        if is_test && line.starts_with("mod ") && line.ends_with('{') {
            break;
        }
        let mut names = names(line).map(|(name, _)| name).filter(|name| *name != "unsafe");
        let is_type = line.starts_with("pub ") && names.nth(1).is_some_and(|name| TYPE_KEYWORDS.contains(&name));
        found.extend(names.next().filter(|_| is_type && !is_test).map(|name| (i + 1, name.to_string())));
        is_test = line == "#[cfg(test)]";
    }
    found
}

/// Rejects a public type whose name another public type of the workspace already has.
fn check_type_names(sources: &[Source]) -> Vec<Finding> {
    let (mut found, mut first) = (Vec::new(), HashMap::new());
    for source in sources.iter().filter(|source| source.path.ends_with(".rs")) {
        for (line, name) in public_types(source) {
            match first.get(&name) {
                Some(other) => {
                    let todo = format!("{other} has a public {name}, too: rename one, or make it `pub(crate)`");
                    found.push(finding(source, line, "type name", todo));
                }
                None => _ = first.insert(name, source.path),
            }
        }
    }
    found
}

/// Returns the sorted paths of all files with one of these endings. Skips hidden folders and `target`.
fn files(root: &Path, endings: &[&str]) -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![root.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a readable folder") {
            let entry = entry.expect("a readable folder");
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if entry.file_type().expect("a file's type").is_dir() {
                if !name.starts_with('.') && name != "target" {
                    folders.push(path);
                }
            } else if endings.iter().any(|e| name.ends_with(e)) {
                let relative = path.strip_prefix(root).expect("below the root");
                let parts: Vec<_> = relative.iter().map(|p| p.to_string_lossy()).collect();
                found.push(parts.join("/"));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn the_repository_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository");
    let endings =
        [".rs", ".md", ".toml", ".cu", ".cuh", ".h", ".js", ".mjs", ".css", ".html", ".py", ".sh", ".sbatch", ".yaml"];
    let paths = files(root, &endings);
    let pages: Vec<&str> =
        paths.iter().map(String::as_str).filter(|p| p.starts_with("docs/") && p.ends_with(".md")).collect();
    assert!(
        pages.contains(&"docs/SUMMARY.md") && paths.iter().any(|p| p == "kernels/src/lib.rs"),
        "wrong root {root:?}"
    );
    let read = |path: &String| std::fs::read_to_string(root.join(path)).expect("a readable file of UTF-8");
    let texts: Vec<String> = paths.iter().map(read).collect();
    let sources: Vec<Source> = paths.iter().zip(&texts).map(|(path, text)| Source { path, text }).collect();
    let mut found = check_type_names(&sources);
    found.extend(layers::check(&sources));
    for file in UNSAFE_FILES {
        let source = sources.iter().find(|source| source.path == *file);
        if source.is_none_or(|source| !code_only(source.text).contains("unsafe")) {
            let list = Source { path: "integration-tests/tests/tidy.rs", text: "" };
            found.push(finding(&list, 1, "unsafe", format!("{file} has no `unsafe`: remove it from UNSAFE_FILES")));
        }
    }
    for source in &sources {
        found.extend(check_phrases(source));
        if source.path.ends_with(".rs") {
            found.extend(check_header(source));
            found.extend(check_macros_and_sleeps(source));
            found.extend(check_function_lengths(source));
            found.extend(check_unsafe(source));
            found.extend(check_imports(source));
            found.extend(check_purity(source));
        } else if source.path.ends_with(".md") {
            found.extend(check_links(source, |target| root.join(target).exists()));
        } else {
            found.extend(check_manifest(source));
        }
        if source.path == "docs/SUMMARY.md" {
            found.extend(check_summary(source, &pages));
        }
    }
    let lines: Vec<String> = found.iter().map(Finding::to_string).collect();
    assert!(lines.is_empty(), "{} findings:\n{}", lines.len(), lines.join("\n"));
}
