//! Libraries and programs that some runs need, found by file name without loading or running them.

use std::path::{Path, PathBuf};
use std::{env, fs};

use super::finding::{Finding, FindingStatus, not_ok, ok};

const PROGRAMS: [(&str, &str); 3] = [
    ("mpirun", "apt install openmpi-bin"),
    ("srun", "apt install slurm-client"),
    ("kubectl", "see https://kubernetes.io/docs/tasks/tools"),
];

pub(super) fn examine() -> Vec<Finding> {
    let mut found =
        vec![finding("libmpi", find_library("libmpi.so", &library_folders()), "apt install libopenmpi-dev")];
    let paths = env::var_os("PATH").unwrap_or_default();
    let find_program = |name: &str| env::split_paths(&paths).map(|f| f.join(name)).find(|path| path.is_file());
    found.extend(PROGRAMS.map(|(name, hint)| finding(name, find_program(name), hint)));
    found
}

fn finding(name: &'static str, path: Option<PathBuf>, hint: &str) -> Finding {
    match path {
        Some(path) => ok(name, path.display().to_string()),
        None => not_ok(name, FindingStatus::Absent, "not found", hint),
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

fn find_library(file: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    let is_match = |name: &String| name.strip_prefix(file).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    folders.iter().find_map(|folder| names(folder).iter().find(|name| is_match(name)).map(|name| folder.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path().join("none"), folder.path().to_path_buf()];
        let find = || find_library("libmpi.so", &folders);
        fs::write(folder.path().join("libmpicxx.so.40"), "").unwrap();
        fs::write(folder.path().join("libmpi.socket"), "").unwrap();
        assert_eq!(find(), None);
        fs::write(folder.path().join("libmpi.so.40"), "").unwrap();
        assert_eq!(find(), Some(folder.path().join("libmpi.so.40")));
        let text = "# a\n/usr/local/cuda/lib64 # b\ninclude x\n\n/opt/lib\n";
        assert_eq!(configured_folders(text), ["/usr/local/cuda/lib64", "/opt/lib"].map(PathBuf::from));
    }
}
