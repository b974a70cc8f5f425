//! Libraries and programs that some runs need, found by file name without loading or running them.

use std::path::{Path, PathBuf};
use std::{env, fs};

use super::{Finding, FindingStatus};

/// A library or program, and how to install it.
struct Software {
    group: &'static str,
    name: &'static str,
    /// File name prefixes; any of them matches.
    files: &'static [&'static str],
    hint: &'static str,
}

const LIBRARIES: &[Software] =
    &[Software { group: "cluster", name: "libmpi", files: &["libmpi.so"], hint: "apt install libopenmpi-dev" }];

const PROGRAMS: &[Software] = &[
    Software { group: "cluster", name: "mpirun", files: &["mpirun"], hint: "apt install openmpi-bin" },
    Software { group: "cluster", name: "srun", files: &["srun"], hint: "apt install slurm-client" },
    Software {
        group: "cluster",
        name: "kubectl",
        files: &["kubectl"],
        hint: "see https://kubernetes.io/docs/tasks/tools",
    },
];

pub(super) fn examine() -> Vec<Finding> {
    let folders = library_folders();
    let libraries = LIBRARIES.iter().map(|software| finding(software, find_library(software, &folders)));
    let mut found: Vec<Finding> = libraries.collect();
    let paths = env::var_os("PATH").unwrap_or_default();
    let programs: Vec<PathBuf> = env::split_paths(&paths).collect();
    let find_program = |item: &Software| programs.iter().map(|f| f.join(item.files[0])).find(|path| path.is_file());
    found.extend(PROGRAMS.iter().map(|software| finding(software, find_program(software))));
    found
}

fn finding(software: &Software, path: Option<PathBuf>) -> Finding {
    match path {
        Some(path) => Finding::new(software.group, software.name, FindingStatus::Ok, path.display().to_string()),
        None => Finding::new(software.group, software.name, FindingStatus::Absent, "not found").hint(software.hint),
    }
}

/// Names in a folder, sorted; empty if it cannot be read.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The dynamic linker's search folders, and the usual folders of CUDA.
fn library_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        env::var_os("LD_LIBRARY_PATH").map(|paths| env::split_paths(&paths).collect()).unwrap_or_default();
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        folders.extend(env::var_os(home).map(|home| Path::new(&home).join("lib64")));
    }
    let configured = Path::new("/etc/ld.so.conf.d");
    for name in names(configured).iter().filter(|name| name.ends_with(".conf")) {
        folders.extend(configured_folders(&fs::read_to_string(configured.join(name)).unwrap_or_default()));
    }
    let usual = ["/usr/local/cuda/lib64", "/usr/local/lib", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];
    folders.extend(usual.map(PathBuf::from));
    folders.extend(["/lib", "/usr/lib"].map(|lib| Path::new(lib).join(format!("{}-linux-gnu", env::consts::ARCH))));
    folders
}

/// Folders in a file of `/etc/ld.so.conf.d`.
fn configured_folders(text: &str) -> Vec<PathBuf> {
    let line = |line: &str| line.split('#').next().unwrap_or("").trim().to_string();
    text.lines().map(line).filter(|line| line.starts_with('/')).map(PathBuf::from).collect()
}

fn find_library(software: &Software, folders: &[PathBuf]) -> Option<PathBuf> {
    let is_match = |name: &String| {
        let rest = software.files.iter().find_map(|file| name.strip_prefix(file));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    folders.iter().find_map(|folder| names(folder).iter().find(|name| is_match(name)).map(|name| folder.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().join("none"), folder.path().to_path_buf()];
        let find = || find_library(&LIBRARIES[0], &folders);
        fs::write(folder.path().join("libmpicxx.so.40"), "").unwrap();
        fs::write(folder.path().join("libmpi.socket"), "").unwrap();
        assert_eq!(find(), None);
        fs::write(folder.path().join("libmpi.so.40"), "").unwrap();
        assert_eq!(find(), Some(folder.path().join("libmpi.so.40")));
        let text = "# a\n/usr/local/cuda/lib64 # b\ninclude x\n\n/opt/lib\n";
        assert_eq!(configured_folders(text), ["/usr/local/cuda/lib64", "/opt/lib"].map(PathBuf::from));
    }
}
