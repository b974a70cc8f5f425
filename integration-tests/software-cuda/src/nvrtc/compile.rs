//! Compiles CUDA C++ to a host library with g++. Each text is compiled once.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::nvrtc::{image, source};

/// The shim's headers by name.
const SHIM: &[(&str, &str)] = &[
    ("software_cuda.h", include_str!("../../shim/software_cuda.h")),
    ("types.h", include_str!("../../shim/types.h")),
    ("access.h", include_str!("../../shim/access.h")),
    ("fibers.h", include_str!("../../shim/fibers.h")),
    ("launch.h", include_str!("../../shim/launch.h")),
    ("math.h", include_str!("../../shim/math.h")),
    ("device.h", include_str!("../../shim/device.h")),
    ("cuda_bf16.h", include_str!("../../shim/cuda_bf16.h")),
    ("cuda_fp16.h", include_str!("../../shim/cuda_fp16.h")),
    ("mma.h", include_str!("../../shim/mma.h")),
];

const FLAGS: &[&str] = &[
    "-O2",
    "-fPIC",
    "-w",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-gnu-unique",
    "-fno-threadsafe-statics",
    "-fno-strict-aliasing",
    "-fno-tree-vectorize",
    "-fno-tree-loop-distribute-patterns",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "--param=tsan-distinguish-volatile=0",
];

/// A program passed to NVRTC.
pub(crate) struct Program {
    /// Text of the program.
    pub text: String,
    /// Name of the program in messages.
    pub name: String,
    /// Names and texts of the headers.
    pub headers: Vec<(String, String)>,
}

/// Options that have no effect here, except that the architecture sets `__CUDA_ARCH__`.
const IGNORED: &[&str] = &[
    "--gpu-architecture",
    "-arch",
    "--use_fast_math",
    "-use_fast_math",
    "--fmad",
    "-fmad",
    "--ftz",
    "--prec-sqrt",
    "--prec-div",
    "--maxrregcount",
    "--extra-device-vectorization",
    "--device-debug",
    "--generate-line-info",
    "-lineinfo",
    "-G",
    "--default-device",
    "-default-device",
    "--restrict",
    "--disable-warnings",
    "-w",
    "--ptxas-options",
    "-Xptxas",
    "--split-compile",
    "--minimal",
    "--diag-suppress",
    "-diag-suppress",
];

/// Translates NVRTC's options to options of g++. Returns an error for an unknown option.
fn translate(options: &[String]) -> Result<Vec<String>, String> {
    let mut out = Vec::new();
    let mut architecture = 900;
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        let (name, value) = option.split_once('=').map_or((option.as_str(), None), |(n, v)| (n, Some(v.to_string())));
        let value = |rest: &mut std::slice::Iter<String>| value.clone().or_else(|| rest.next().cloned());
        if let Some(define) = option.strip_prefix("-D").filter(|d| !d.is_empty()) {
            out.push(format!("-D{define}"));
        } else if let Some(folder) = option.strip_prefix("-I").filter(|f| !f.is_empty()) {
            out.push(format!("-I{folder}"));
        } else if matches!(name, "--define-macro" | "-D") {
            out.push(format!("-D{}", value(&mut rest).ok_or("a macro is missing after -D")?));
        } else if matches!(name, "--include-path" | "-I") {
            out.push(format!("-I{}", value(&mut rest).ok_or("a folder is missing after -I")?));
        } else if matches!(name, "--std" | "-std") {
            out.push(format!("-std={}", value(&mut rest).ok_or("a standard is missing after -std")?));
        } else if IGNORED.contains(&name) {
            let takes_value =
                matches!(name, "--gpu-architecture" | "-arch" | "--maxrregcount" | "-Xptxas" | "--ptxas-options");
            let given = if takes_value { value(&mut rest) } else { None };
            if matches!(name, "--gpu-architecture" | "-arch") {
                let digits: String = given.unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
                architecture = digits.parse::<u32>().map_or(900, |n| n * 10);
            }
        } else {
            return Err(format!("unrecognized option {option} found"));
        }
    }
    if !out.iter().any(|o| o.starts_with("-std=")) {
        out.push("-std=c++17".into());
    }
    out.extend(["-D__CUDACC__=1", "-D__CUDACC_RTC__=1", "-D__CUDACC_VER_MAJOR__=13"].map(String::from));
    out.push(format!("-D__CUDA_ARCH__={architecture}"));
    Ok(out)
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|e| format!("cannot run g++: {e}; install g++, which the software CUDA device needs"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    String::from_utf8(output.stdout).map_err(|e| format!("the preprocessed text is not UTF-8: {e}"))
}

/// Returns a path that no other thread or process uses.
fn unique_path(folder: &Path, ending: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    folder.join(format!("partial-{}-{}{ending}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// Writes a file atomically, unless it exists.
fn write(path: &Path, text: &str) -> Result<(), String> {
    if path.exists() {
        return Ok(());
    }
    let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
    let folder = path.parent().expect("a file has a folder");
    std::fs::create_dir_all(folder).map_err(failed)?;
    let partial = unique_path(folder, "");
    std::fs::write(&partial, text).and_then(|()| std::fs::rename(&partial, path)).map_err(failed)
}

fn write_all<'a>(folder: &Path, files: impl Iterator<Item = (&'a str, &'a str)>) -> Result<(), String> {
    files.into_iter().try_for_each(|(name, text)| write(&folder.join(name), text))
}

/// Compiles a program and returns its image, or g++'s messages.
pub fn compile(program: &Program, options: &[String], cache: &Path) -> Result<String, String> {
    let options = translate(options)?;
    let shim_texts: Vec<&str> = SHIM.iter().map(|s| s.1).collect();
    let shim_digest = image::digest(&shim_texts);
    let shim = cache.join(format!("shim-{shim_digest}"));
    write_all(&shim, SHIM.iter().copied())?;
    let given: Vec<&str> = program.headers.iter().flat_map(|(n, t)| [n.as_str(), t.as_str()]).collect();
    let headers = cache.join(format!("headers-{}", image::digest(&given)));
    write_all(&headers, program.headers.iter().map(|(n, t)| (n.as_str(), t.as_str())))?;

    // The source has its own folder. Quoted includes then find no other files, as in NVRTC.
    let name = Path::new(&program.name).file_name().unwrap_or(OsStr::new("program.cu"));
    let source = cache.join(format!("source-{}", image::digest(&[&program.text]))).join(name);
    write(&source, &program.text)?;
    let mut command = Command::new("g++");
    command.args(["-E", "-x", "c++"]).args(&options).arg("-I").arg(&headers).arg("-I").arg(&shim);
    let preprocessed = run(command.args(["-include", "software_cuda.h"]).arg(&source))?;
    let (text, kernels) = source::rewrite(&preprocessed)?;
    if kernels.is_empty() {
        return Err(format!("{}: contains no kernel", program.name));
    }
    let standard = options.iter().find(|o| o.starts_with("-std=")).expect("`translate` adds a standard");
    let digest = image::digest(&[&text, &shim_digest, standard, &FLAGS.join(" ")]);
    let library = image::path(&digest, cache);
    if !library.exists() {
        // Processes that start together need the same kernels. One process compiles each kernel, and the others wait.
        let lock_file = std::fs::File::create(library.with_extension("lock")).and_then(|f| f.lock().map(|()| f));
        let _lock_file = lock_file.map_err(|e| format!("cannot lock {}: {e}", library.display()))?;
        if library.exists() {
            return Ok(image::image(&digest));
        }
        let (rewritten, object, partial) =
            (unique_path(cache, ".ii"), unique_path(cache, ".o"), unique_path(cache, ".so"));
        write(&rewritten, &text)?;
        let mut command = Command::new("g++");
        command.arg(standard).args(FLAGS).args(["-x", "c++", "-fpreprocessed", "-c"]).arg(&rewritten);
        let compiled = run(command.arg("-o").arg(&object));
        // Link without the sanitizer's library, because the shim defines the functions of that library.
        let linked = compiled
            .and_then(|_| run(Command::new("g++").args(["-shared", "-o"]).arg(&partial).arg(&object).args(["-lm"])));
        // Ignore errors, because leftover temporary files are harmless.
        let _ = (std::fs::remove_file(&rewritten), std::fs::remove_file(&object));
        linked?;
        std::fs::rename(&partial, &library).map_err(|e| format!("cannot write {}: {e}", library.display()))?;
    }
    Ok(image::image(&digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_translated() {
        let options = ["--gpu-architecture=sm_80", "-DN=3", "--define-macro=M", "-I", "x", "--use_fast_math"];
        let out = translate(&options.map(String::from)).unwrap();
        for expected in ["-DN=3", "-DM", "-Ix", "-std=c++17", "-D__CUDA_ARCH__=800"] {
            assert!(out.iter().any(|o| o == expected), "{expected} is not in {out:?}");
        }
        assert!(translate(&["--use_fast_maths".into()]).unwrap_err().contains("--use_fast_maths"));
    }
}
