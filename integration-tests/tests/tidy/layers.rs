//! Checks the imports between the modules of each crate against the lists of layers in `docs/architecture.md`.
//!
//! On that page, each crate has a heading and a numbered list of its layers, with the lowest layer first. The entries
//! of a layer are paths of modules. A module belongs to the longest entry with which its path begins. The module may
//! import modules of the same entry and of lower layers. Circles of imports are forbidden, even within one entry.

use std::collections::{BTreeMap, BTreeSet};

use super::{Finding, Source, code_only, finding, tests_start};

/// The file with the lists, the heading of their section, and the crates that must have a list.
pub(super) const PAGE: &str = "docs/architecture.md";
const HEADING: &str = "## Layers";
const LAYERED: &[&str] = &["kernels", "actors/job", "actors", "runtime"];

/// For each crate, the number of the layer of each entry.
type Layers = BTreeMap<String, BTreeMap<String, usize>>;

/// Reads the lists of layers.
fn layers(page: &str) -> Layers {
    let section = page.split(HEADING).nth(1).unwrap_or("").split("\n## ").next().unwrap_or("");
    let quoted = |text: &str| -> Vec<String> { text.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let list = |text: &str| {
        let (heading, body) = text.split_once('\n')?;
        let is_layer = |line: &&str| line.starts_with(|c: char| c.is_ascii_digit());
        let entries = body.lines().filter(is_layer).enumerate();
        let entries = entries.flat_map(|(layer, line)| quoted(line).into_iter().map(move |entry| (entry, layer)));
        Some((quoted(heading).pop()?, entries.collect()))
    };
    section.split("\n### ").skip(1).filter_map(list).collect()
}

/// Returns the crate's folder and the module of a source file, or `None` for tests, binaries and the root of a crate.
fn module<'a>(source: &Source<'a>, crates: &Layers) -> Option<(&'a str, String)> {
    let (folder, file) = source.path.split_once("/src/")?;
    let is_part = crates.contains_key(folder) && file != "lib.rs" && !file.starts_with("bin/");
    (is_part && tests_start(source) > 0).then(|| (folder, file.trim_end_matches(".rs").replace('/', "::")))
}

/// Adds the paths of a tree of imports: `a::{b, c::d}` has the paths `a::b` and `a::c::d`.
fn expand(tree: &str, paths: &mut Vec<String>) {
    let Some((prefix, rest)) = tree.split_once('{') else {
        return paths.push(tree.split(" as ").next().unwrap_or("").split_whitespace().collect());
    };
    let (mut depth, mut start) = (0, 0);
    let body = rest.trim_end().strip_suffix('}').unwrap_or(rest);
    for (at, c) in body.char_indices().chain([(body.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !body[start..at].trim().is_empty() {
                    expand(&format!("{}{}", prefix.trim(), body[start..at].trim()), paths);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// Returns the part of a file before its test module.
fn without_tests(code: &str) -> &str {
    let is_module = |(at, _): &(usize, &str)| {
        let rest = code[*at..]["#[cfg(test)]".len()..].trim_start();
        rest.strip_prefix("mod ")
            .is_some_and(|rest| rest.split([';', '{']).next().is_some_and(|name| rest[name.len()..].starts_with('{')))
    };
    code.match_indices("#[cfg(test)]").find(is_module).map_or(code, |(at, _)| &code[..at])
}

/// Returns all paths that a module mentions, in `use` and elsewhere, with their line numbers.
fn mentioned(code: &str) -> Vec<(usize, String)> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < code.len() {
        let rest = &code[at..];
        let word = &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())];
        let mut length = word.len().max(rest.chars().next().map_or(1, char::len_utf8));
        match word {
            "use" => {
                length = rest.find(';').unwrap_or(rest.len());
                let mut paths = Vec::new();
                expand(&rest["use".len()..length], &mut paths);
                found.extend(paths.into_iter().map(|path| (line, path)));
            }
            _ if !word.is_empty() && rest[word.len()..].starts_with("::") => {
                length = rest.find(|c| !is_name(c) && c != ':').unwrap_or(rest.len());
                found.push((line, rest[..length].trim_end_matches(':').to_owned()));
            }
            _ => {}
        }
        line += rest[..length].matches('\n').count();
        at += length;
    }
    found
}

/// Returns the module of this crate to which a path leads, if any.
fn resolve(path: &str, own: &str, modules: &BTreeSet<&str>) -> Option<String> {
    let mut parts: Vec<&str> = own.split("::").collect();
    let mut rest = path.split("::").peekable();
    match rest.peek()? {
        &"crate" => {
            parts.clear();
            rest.next();
        }
        &"super" => {
            while rest.next_if_eq(&"super").is_some() {
                parts.pop();
            }
        }
        &"self" => drop(rest.next()),
        // The first part may be a child of the module. Otherwise, it is another crate.
        first if !modules.contains(format!("{own}::{first}").as_str()) => return None,
        _ => {}
    }
    parts.extend(rest);
    let lengths = (1..=parts.len()).rev();
    lengths.map(|length| parts[..length].join("::")).find(|module| modules.contains(module.as_str()))
}

/// Returns the entry of a module, and the entry's layer.
fn entry<'a>(module: &str, entries: &'a BTreeMap<String, usize>) -> Option<(&'a str, usize)> {
    let is_below = |entry: &&String| module == entry.as_str() || module.starts_with(&format!("{entry}::"));
    entries.keys().filter(is_below).max_by_key(|entry| entry.len()).map(|entry| (entry.as_str(), entries[entry]))
}

/// Returns the modules of a circle of imports that begins and ends at `start`, or none if there is no circle.
fn circle(start: &str, edges: &BTreeMap<&str, BTreeSet<String>>) -> Vec<String> {
    let mut paths = vec![vec![start.to_owned()]];
    let mut seen = BTreeSet::new();
    while let Some(path) = paths.pop() {
        for next in edges.get(path[path.len() - 1].as_str()).into_iter().flatten() {
            if next == start {
                return path;
            }
            if seen.insert(next.clone()) {
                paths.push([&path[..], std::slice::from_ref(next)].concat());
            }
        }
    }
    Vec::new()
}

/// Checks the modules of all crates in [`LAYERED`].
pub(super) fn check(sources: &[Source]) -> Vec<Finding> {
    let page = sources.iter().find(|source| source.path == PAGE).unwrap_or(&Source { path: PAGE, text: "" });
    let crates = layers(page.text);
    let missing = LAYERED.iter().filter(|folder| !crates.contains_key(**folder));
    let mut found: Vec<Finding> = missing
        .map(|folder| finding(page, 1, "layers", format!("{folder} has no list of layers under {HEADING:?}")))
        .collect();
    for (folder, entries) in &crates {
        let own = sources.iter().filter_map(|source| Some((source, module(source, &crates)?)));
        let own: Vec<_> =
            own.filter(|(_, (of, _))| of == folder).map(|(source, (_, module))| (source, module)).collect();
        let modules: BTreeSet<&str> = own.iter().map(|(_, module)| module.as_str()).collect();
        let unknown = entries.keys().filter(|entry| !modules.contains(entry.as_str()));
        found.extend(unknown.map(|entry| finding(page, 1, "layers", format!("{folder} has no module {entry}"))));
        let mut edges: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for (source, module) in &own {
            let Some((own_entry, own_layer)) = entry(module, entries) else {
                found.push(finding(source, 1, "layers", format!("add {module} to the layers in {PAGE}")));
                continue;
            };
            for (line, path) in mentioned(without_tests(&code_only(source.text))) {
                let Some(imported) = resolve(&path, module, &modules).filter(|imported| imported != module) else {
                    continue;
                };
                if let Some((entry, layer)) = entry(&imported, entries)
                    && entry != own_entry
                    && layer >= own_layer
                {
                    let todo = format!("{module} imports {imported}, which is not below it in the layers in {PAGE}");
                    found.push(finding(source, line, "layers", todo));
                }
                edges.entry(module).or_default().insert(imported);
            }
        }
        for (source, module) in &own {
            let circle = circle(module, &edges);
            // Report each circle only once, at the first of its modules.
            if !circle.is_empty() && circle.iter().all(|other| other >= module) {
                let todo = format!("these modules import each other in a circle: {}", circle.join(" -> "));
                found.push(finding(source, 1, "layers", todo));
            }
        }
    }
    found
}
