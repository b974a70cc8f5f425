//! Runs steps of CUDA launches on the host: each module's text is compiled by g++ against the shim into a program that
//! is sent kernels and memory. Imports the public API of kernels.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use half::bf16;
use shardflow_kernels::cuda::source::{MODULES, Module};
use shardflow_kernels::cuda::step::{
    Arg, Element, Epilogue, ErrorRecord, Kernel, Matrix, Operand, Place, Product, Step,
};

const SHIM: [(&str, &str); 2] =
    [("cuda_bf16.h", include_str!("shim/cuda_bf16.h")), ("mma.h", include_str!("shim/mma.h"))];

/// Where things lie in the memory that kernels see.
pub struct Layout {
    pub reads: Vec<usize>,
    pub writes: Vec<usize>,
    pub workspace: usize,
    pub record: usize,
}

impl Layout {
    fn place(&self, place: Place) -> usize {
        place.offset_bytes
            + match place.operand {
                Operand::Read(i) => self.reads[i],
                Operand::Write(i) => self.writes[i],
                Operand::Workspace => self.workspace,
            }
    }
}

/// The index that launches are told they have.
pub const LAUNCH_INDEX: u32 = 7;

/// Builds a module's program, unless one of the same text is there. Each by one test at a time.
fn program(module: &Module) -> PathBuf {
    static BUILDING: [Mutex<()>; MODULES.len()] = [const { Mutex::new(()) }; MODULES.len()];
    let kernels = module.functions().map(|name| {
        format!("{{\"{name}\", [](const uint64_t* a) {{ shim::call(&{name}, a); }}, shim::arity(&{name})}},\n")
    });
    let kernels: String = kernels.collect();
    let text = format!(
        "{}\nstatic const shim::Entry entries[] = {{\n{kernels}}};\n\
         int main() {{ return shim::serve(entries, sizeof(entries) / sizeof(*entries)); }}\n",
        module.text
    );
    let mut hasher = DefaultHasher::new();
    (SHIM, &text).hash(&mut hasher);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda_text");
    let name = format!("{}-{:016x}", module.name, hasher.finish());
    let program = folder.join(&name);
    let place = MODULES.iter().position(|other| other.name == module.name).unwrap_or_default();
    let _building = BUILDING[place].lock().unwrap_or_else(|poison| poison.into_inner());
    if program.exists() {
        return program;
    }
    std::fs::create_dir_all(&folder).expect("a folder for programs");
    // Beside the source, where its includes are looked for; other modules are built at the same time.
    let sources = folder.join(format!("{name}.sources"));
    std::fs::create_dir_all(&sources).expect("a folder for sources");
    for (name, text) in SHIM {
        std::fs::write(sources.join(name), text).expect("the shim");
    }
    let source = sources.join("module.cpp");
    std::fs::write(&source, text).expect("the source");
    let unfinished = folder.join(format!("{name}.{}", std::process::id()));
    let result = Command::new("g++")
        .args(["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-U_FORTIFY_SOURCE", "-I"])
        .args([&sources, &source, Path::new("-o"), &unfinished])
        .output()
        .expect("g++ runs");
    assert!(result.status.success(), "{}: {}", module.name, String::from_utf8_lossy(&result.stderr));
    std::fs::rename(&unfinished, &program).expect("the program");
    program
}

/// True when there is a compiler; else says that it is missed.
pub fn compiler() -> bool {
    let found = Command::new("g++").arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success());
    if !found {
        println!("SKIPPED: it needs g++");
    }
    found
}

/// Modules' programs, as they are asked for.
#[derive(Default)]
pub struct Machine {
    programs: HashMap<&'static str, Child>,
}

impl Machine {
    /// Runs a step on memory.
    pub fn run(&mut self, step: &Step, layout: &Layout, memory: &mut [u8]) {
        match step {
            Step::Kernel(kernel) => self.kernel(kernel, layout, memory),
            Step::Product(product) => run_product(product, layout, memory),
            Step::Copy { from, to, bytes } => {
                let (from, to) = (layout.place(*from), layout.place(*to));
                memory.copy_within(from..from + bytes, to);
            }
            Step::Fill { to, word, words } => {
                let to = layout.place(*to);
                memory[to..to + words * 4].copy_from_slice(&word.to_ne_bytes().repeat(*words));
            }
        }
    }

    fn kernel(&mut self, kernel: &Kernel, layout: &Layout, memory: &mut [u8]) {
        let name = kernel.function;
        let module = MODULES.iter().find(|module| module.functions().any(|function| function == name));
        let module = module.unwrap_or_else(|| panic!("no module has {name}"));
        let index = module.functions().position(|function| function == name).unwrap_or_default();
        let child = self.programs.entry(module.name).or_insert_with(|| {
            let mut command = Command::new(program(module));
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the module's program starts")
        });
        let threads: u32 = kernel.block.iter().product();
        assert!(!kernel.grid.contains(&0) && (1..=1024).contains(&threads), "{kernel:?}");
        let args: Vec<(u64, u64)> = kernel.args.iter().map(|arg| value(*arg, layout)).collect();
        let geometry = kernel.grid.iter().chain(&kernel.block).map(|&n| u64::from(n));
        let mut request = vec![index as u64];
        request.extend(geometry);
        request.extend([u64::from(kernel.shared_bytes), args.len() as u64, memory.len() as u64]);
        request.extend(args.iter().flat_map(|(pointer, value)| [pointer, value]));
        let request: Vec<u8> = request.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (stdin, stdout) = (child.stdin.as_mut().expect("piped"), child.stdout.as_mut().expect("piped"));
        let sent = stdin.write_all(&request).and_then(|()| stdin.write_all(memory)).and_then(|()| stdin.flush());
        // What is wrong stands in the program's standard error.
        sent.and_then(|()| stdout.read_exact(memory)).unwrap_or_else(|error| panic!("{kernel:?}: {error}"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for (_, mut child) in self.programs.drain() {
            drop(child.stdin.take());
            // It ends at the end of its input.
            let _ = child.wait();
        }
    }
}

/// Whether an argument is an offset into memory, and its bits.
fn value(arg: Arg, layout: &Layout) -> (u64, u64) {
    match arg {
        Arg::Pointer(place) => (1, layout.place(place) as u64),
        Arg::ErrorRecord => (1, layout.record as u64),
        Arg::Null => (0, 0),
        Arg::LaunchIndex => (0, u64::from(LAUNCH_INDEX)),
        Arg::I32(value) => (0, u64::from(value as u32)),
        Arg::U32(value) => (0, u64::from(value)),
        Arg::I64(value) => (0, value as u64),
        Arg::U64(value) => (0, value),
        Arg::F32(value) => (0, u64::from(value.to_bits())),
        Arg::F64(value) => (0, value.to_bits()),
    }
}

/// An element of a matrix, as a float.
fn float(memory: &[u8], at: usize, element: Element) -> f32 {
    match element {
        Element::F32 => f32::from_ne_bytes(memory[at..at + 4].try_into().expect("four bytes")),
        Element::Bf16 => bf16::from_ne_bytes(memory[at..at + 2].try_into().expect("two bytes")).to_f32(),
    }
}

/// The product of floats by its definition.
fn run_product(product: &Product, layout: &Layout, memory: &mut [u8]) {
    assert!(product.batch == 1 && product.epilogue == Epilogue::None, "{product:?}");
    let at = |matrix: &Matrix, transposed: bool, row: u64, column: u64| {
        let (row, column) = if transposed { (column, row) } else { (row, column) };
        assert!(row < matrix.rows && column < matrix.columns, "{matrix:?}");
        layout.place(matrix.place) + matrix.element.bytes() * (row + column * matrix.leading as u64) as usize
    };
    for column in 0..product.n {
        for row in 0..product.m {
            let term = |k| {
                let a = float(memory, at(&product.a, product.a_transposed, row, k), product.a.element);
                let b = float(memory, at(&product.b, product.b_transposed, k, column), product.b.element);
                f64::from(a) * f64::from(b)
            };
            let sum = f64::from(product.alpha) * (0..product.k).map(term).sum::<f64>();
            let place = at(&product.d, false, row, column);
            let before = if product.beta == 0.0 { 0.0 } else { product.beta * float(memory, place, product.d.element) };
            let result = sum as f32 + before;
            match product.d.element {
                Element::F32 => memory[place..place + 4].copy_from_slice(&result.to_ne_bytes()),
                Element::Bf16 => memory[place..place + 2].copy_from_slice(&bf16::from_f32(result).to_ne_bytes()),
            }
        }
    }
}

/// What the launches left in the record.
pub fn record(memory: &[u8], layout: &Layout) -> Option<ErrorRecord> {
    let word = |i: usize| {
        let at = layout.record + 4 * i;
        u32::from_ne_bytes(memory[at..at + 4].try_into().expect("four bytes"))
    };
    ErrorRecord::decode(std::array::from_fn(word))
}
