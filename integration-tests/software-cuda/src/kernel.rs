//! Loads compiled libraries and runs their kernels.
//!
//! The layout of [`Kernel`] matches `shim/launch.h`.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use crate::shadow::{Accessor, Checker};
use crate::world::{Launch, lock};

/// Maximum number of arguments of a kernel.
pub const ARGUMENTS_MAX: usize = 64;
/// Maximum number of threads of a block.
pub const THREADS_MAX: u32 = 1024;
/// Maximum dynamic shared memory of a block; the shim's array has the same size.
pub const SHARED_BYTES_MAX: usize = 227 << 10;
/// Bytes of a fiber's stack. If this were a power of two, all stacks would compete for the same few cache lines.
const STACK_BYTES: usize = (64 << 10) + 33 * 64;
const SCRATCH_BYTES: usize = 32 * 4096;
/// Maximum number of bytes of a library's static and dynamic shared memory that are checked.
const SHARED_CHECKED_BYTES: usize = 2 << 20;
/// Size of `SharedCell` in `shim/access.h`. Each word of shared memory has one.
const SHARED_CELL_BYTES: usize = 32;

/// Marks an argument that points to a table of pointers. The kernel may then access memory to which no argument points.
const ARGUMENT_IS_TABLE: u8 = 2;

/// The description of a kernel in its compiled library.
#[repr(C)]
pub(crate) struct Kernel {
    invoke: *const c_void,
    arguments: u32,
    sizes: [u32; ARGUMENTS_MAX],
    kinds: [u8; ARGUMENTS_MAX],
    static_shared_bytes: u32,
    threads_max: u32,
    // SAFETY: this line is only a type. `launch` states why the call is sound.
    run: unsafe extern "C" fn(*const Kernel, *const *const u8, *const u32, usize, *mut Checker) -> i32,
}

// SAFETY: a kernel's description never changes once its library is loaded, and libraries stay loaded.
unsafe impl Sync for Kernel {}
// SAFETY: a kernel's description never changes once its library is loaded, and libraries stay loaded.
unsafe impl Send for Kernel {}

impl Kernel {
    /// Returns the maximum number of threads per block that the kernel's launch bounds permit.
    pub fn threads_max(&self) -> u32 {
        self.threads_max
    }

    /// Sizes of the arguments in bytes.
    pub fn argument_bytes(&self) -> &[u32] {
        &self.sizes[..self.arguments as usize]
    }
}

/// A compiled library that is loaded.
#[derive(Clone)]
pub(crate) struct Library {
    handle: usize,
}

/// Loads a compiled library. The library stays loaded, because queued launches may use it.
pub fn load(path: &Path) -> Result<Library, String> {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: `nvrtc` has compiled the library. Its constructors only fill in descriptions of kernels.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        // SAFETY: after a failure `dlerror` returns a text that ends with NUL.
        return Err(unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned());
    }
    Ok(Library { handle: handle as usize })
}

/// A kernel with its name and driver attributes.
pub(crate) struct Function {
    /// The kernel's name.
    pub name: Arc<str>,
    /// The kernel's description in its library.
    pub kernel: &'static Kernel,
    /// Dynamic shared memory that launches may request.
    pub shared_bytes_max: usize,
}

impl Library {
    /// Returns the kernel with this name.
    pub fn kernel(&self, name: &str) -> Option<&'static Kernel> {
        let symbol = CString::new(format!("software_cuda_kernel_{name}")).ok()?;
        // SAFETY: the handle belongs to a loaded library. If the symbol exists, it is a `Kernel` of that library.
        unsafe { (libc::dlsym(self.handle as *mut c_void, symbol.as_ptr()) as *const Kernel).as_ref() }
    }
}

/// Returns the functions of all modules, by handle.
pub fn functions() -> &'static Mutex<HashMap<u64, Function>> {
    static FUNCTIONS: OnceLock<Mutex<HashMap<u64, Function>>> = OnceLock::new();
    FUNCTIONS.get_or_init(Mutex::default)
}

struct KernelBuffers {
    stacks: usize,
    scratch: usize,
    shared_cells: usize,
    generation: Mutex<u64>,
}

fn kernel_buffers() -> &'static KernelBuffers {
    static ROOMS: OnceLock<KernelBuffers> = OnceLock::new();
    let map = |bytes: usize| {
        // SAFETY: a new anonymous mapping at an address that the OS selects overlaps nothing.
        let at = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED, "cannot reserve {bytes} bytes for stacks of fibers");
        at as usize
    };
    ROOMS.get_or_init(|| KernelBuffers {
        stacks: map(STACK_BYTES * THREADS_MAX as usize),
        scratch: map(SCRATCH_BYTES),
        shared_cells: map(SHARED_CHECKED_BYTES / 4 * SHARED_CELL_BYTES),
        generation: Mutex::new(1),
    })
}

/// Returns the addresses in the arguments, or `None` if an argument points to a table of pointers.
fn addresses(launch: &Launch) -> Option<Vec<usize>> {
    if launch.kernel.kinds[..launch.arguments.len()].contains(&ARGUMENT_IS_TABLE) {
        return None;
    }
    let words = launch.arguments.iter().flat_map(|a| a.chunks_exact(size_of::<usize>()));
    Some(words.map(|w| usize::from_ne_bytes(w.try_into().expect("a chunk has eight bytes"))).collect())
}

/// Runs a kernel. Its blocks run one after another in an order derived from the seed.
pub fn launch(accessor: &mut Accessor, launch: &Launch, seed: u64) {
    if let Some(addresses) = addresses(launch) {
        accessor.allow_only(&addresses);
    }
    let kernel_buffers = kernel_buffers();
    let mut generation = lock(&kernel_buffers.generation);
    let blocks: u64 = launch.dims[..3].iter().map(|d| u64::from(*d)).product();
    let mut checker = accessor.checker();
    checker.stacks = kernel_buffers.stacks;
    checker.stack_bytes = STACK_BYTES;
    checker.scratch = kernel_buffers.scratch;
    checker.shared_cells = kernel_buffers.shared_cells;
    checker.seed = crate::world::mix(seed);
    checker.generation = *generation;
    let arguments: Vec<*const u8> = launch.arguments.iter().map(|a| a.as_ptr()).collect();
    // SAFETY: the arguments' number and sizes match the description. The checker and its accessor do not move.
    unsafe {
        (launch.kernel.run)(launch.kernel, arguments.as_ptr(), launch.dims.as_ptr(), launch.shared_bytes, &mut checker);
    }
    *generation += blocks;
}

/// Copies a launch's arguments.
///
/// # Safety
///
/// `pointers` must point to one pointer per argument of the kernel. Each of them must point to a value of its
/// argument's type.
pub unsafe fn copy_arguments(kernel: &Kernel, pointers: *mut *mut c_void) -> Vec<Vec<u8>> {
    let sizes = kernel.argument_bytes().iter().enumerate();
    // SAFETY: the caller keeps the contract above.
    sizes
        .map(|(i, size)| unsafe { std::slice::from_raw_parts((*pointers.add(i)).cast(), *size as usize).to_vec() })
        .collect()
}

/// Copies a C string. The copy of a null pointer is empty.
///
/// # Safety
///
/// `text` must be null or end with NUL.
pub unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller keeps the contract above.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
