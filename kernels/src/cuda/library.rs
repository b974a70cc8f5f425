//! Finds the CUDA libraries, or reports how to install them. Before a library is used, `driver` or `Library::require`
//! must have found it, because cudarc panics if it is missing.
#![allow(unsafe_code)]

use std::fmt::{self, Display};
use std::{env, fs};

use cudarc::{cublaslt, driver::sys, nvrtc};

use super::status::{check_code, unavailable};
use crate::error::{KernelError, Result};

/// The oldest driver that libraries and cubins support, given by its CUDA version: `1000 * major + 10 * minor`.
const DRIVER_MIN: i32 = 13_000;

const DRIVER_HINT: &str = "install NVIDIA's driver of version 580 or newer (Debian: apt install nvidia-driver), or run the \
     container with --gpus all; without a GPU, choose the device cpu";

/// Environment variables that the driver reads when it starts, and their values. Variables that are already set keep
/// their values. The launcher sets the variables for its processes. A single-threaded process sets them when it starts
/// the driver.
pub const SETTINGS: [(&str, &str); 3] = [
    // Load all kernels with their library. A later load could block behind a collective that waits for another GPU.
    ("CUDA_MODULE_LOADING", "EAGER"),
    // The same for kernel data. The CUDA 13 guide says that the variable above implies this one; older guides do not.
    ("CUDA_MODULE_DATA_LOADING", "EAGER"),
    // The maximum number of queues, because streams that share a queue wait for each other.
    (QUEUES, "32"),
];

/// Environment variable for the number of hardware queues of a GPU.
pub const QUEUES: &str = "CUDA_DEVICE_MAX_CONNECTIONS";

/// A CUDA library other than the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Matrix products.
    CublasLt,
    /// The run-time compiler.
    Nvrtc,
    /// Collectives between GPUs.
    Nccl,
    /// Fused attention; without it Shardflow's kernels run attention.
    Cudnn,
}

pub(crate) struct Driver {
    pub(crate) version: i32,
    pub(crate) devices: usize,
}

/// Declares `Api`: the functions of a library that is loaded at run time. The given file names are tried in order.
macro_rules! dynamic_library {
    ([$($file:literal),*] $($field:ident: $symbol:literal = fn($($arg:ty),*) -> $out:ty;)*) => {
        #[derive(Debug)]
        pub(crate) struct Api {
            // SAFETY: this only declares function types. Each caller states why its call is sound.
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> $out,)*
            /// Keeps the functions loaded.
            _library: libloading::Library,
        }

        impl Api {
            fn load() -> Option<Self> {
                // SAFETY: only NVIDIA's initializers run. The signatures are those of NVIDIA's header.
                unsafe {
                    let library = [$($file),*].iter().find_map(|name| libloading::Library::new(*name).ok())?;
                    Some(Self {
                        $($field: *library.get::<unsafe extern "C" fn($($arg),*) -> $out>($symbol).ok()?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}
pub(super) use dynamic_library;

/// Formats `13000` as `13.0`.
pub(super) fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Formats a library's version: `130002` as `13.0.2`. NCCL before 2.9 used `1000 * major + 100 * minor + patch`.
pub(super) fn dotted_patch(version: usize) -> String {
    let major = if version < 10_000 { 1_000 } else { 10_000 };
    format!("{}.{}.{}", version / major, version % major / 100, version % 100)
}

/// Sets [`SETTINGS`] if this is the only thread. Otherwise another thread could read the environment at the same time.
fn set_environment() {
    if !fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1) {
        return;
    }
    for (name, value) in SETTINGS.iter().filter(|(name, _)| env::var_os(name).is_none()) {
        // SAFETY: this is the only thread of the process.
        unsafe { env::set_var(name, value) };
    }
}

pub(crate) fn driver() -> Result<Driver> {
    // SAFETY: the call loads and unloads the library. Only NVIDIA's initializers run.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("no CUDA driver (libcuda.so.1) on this machine", DRIVER_HINT));
    }
    set_environment();
    let (mut version, mut count) = (0, 0);
    // SAFETY: the call writes to a local. Every driver has this function, which needs no initialization.
    check_code(unsafe { sys::cuDriverGetVersion(&mut version) }, "cuDriverGetVersion", &"cuda")?;
    check_version(version)?;
    // SAFETY: the call has no preconditions.
    let result = unsafe { sys::cuInit(0) };
    if result == sys::CUresult::CUDA_ERROR_NO_DEVICE {
        return Ok(Driver { version, devices: 0 });
    }
    check_code(result, "cuInit", &"cuda")?;
    // SAFETY: the call writes to a local.
    check_code(unsafe { sys::cuDeviceGetCount(&mut count) }, "cuDeviceGetCount", &"cuda")?;
    Ok(Driver { version, devices: usize::try_from(count).unwrap_or(0) })
}

fn check_version(version: i32) -> Result<()> {
    if version >= DRIVER_MIN {
        return Ok(());
    }
    let what = format!("the driver is too old: found CUDA {}, need {} or newer", dotted(version), dotted(DRIVER_MIN));
    Err(unavailable(what, DRIVER_HINT))
}

impl Library {
    /// All libraries.
    pub const ALL: [Library; 4] = [Library::CublasLt, Library::Nvrtc, Library::Nccl, Library::Cudnn];

    /// The file name without its version.
    pub fn name(self) -> &'static str {
        match self {
            Library::CublasLt => "libcublasLt",
            Library::Nvrtc => "libnvrtc",
            Library::Nccl => "libnccl",
            Library::Cudnn => "libcudnn",
        }
    }

    /// How to install the library.
    pub fn hint(self) -> &'static str {
        match self {
            Library::CublasLt => {
                "apt install libcublas-13-0 (NVIDIA's repository), or pip install nvidia-cublas and add its lib folder to \
                 LD_LIBRARY_PATH"
            }
            Library::Nvrtc => {
                "apt install cuda-nvrtc-13-0 (NVIDIA's repository), or pip install nvidia-cuda-nvrtc nvidia-cuda-runtime \
                 nvidia-cuda-crt and add the lib folder to LD_LIBRARY_PATH"
            }
            Library::Nccl => {
                "install version 2.24 or newer: apt install libnccl2 (NVIDIA's repository), or pip install \
                 nvidia-nccl-cu13 and add its lib folder to LD_LIBRARY_PATH"
            }
            Library::Cudnn => {
                "optional, for attention in bf16: apt install cudnn9-cuda-13 (NVIDIA's repository), or pip install \
                 nvidia-cudnn-cu13 and add its lib folder to LD_LIBRARY_PATH"
            }
        }
    }

    pub(crate) fn require(self) -> Result<()> {
        // SAFETY: as in `driver`.
        let present = unsafe {
            match self {
                Library::CublasLt => cublaslt::sys::is_culib_present(),
                Library::Nvrtc => nvrtc::sys::is_culib_present(),
                // `Api::get` of `nccl` and of `cudnn` loads and checks these libraries.
                Library::Nccl | Library::Cudnn => true,
            }
        };
        if present { Ok(()) } else { Err(self.missing()) }
    }

    pub(crate) fn check_version(self, found: usize, needed: usize) -> Result<()> {
        if found >= needed {
            return Ok(());
        }
        let [found, needed] = [found, needed].map(dotted_patch);
        Err(unavailable(format!("{self} is too old: found {found}, need {needed} or newer"), self.hint()))
    }

    pub(crate) fn missing(self) -> KernelError {
        unavailable(format!("{} is not installed on this machine", self.name()), self.hint())
    }
}

impl Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_formatted_with_dots() {
        assert_eq!([13_000, 12_080, 11_020].map(dotted), ["13.0", "12.8", "11.2"]);
        assert_eq!([130_002, 121_100].map(dotted_patch), ["13.0.2", "12.11.0"]);
        assert_eq!([22_803, 22_400, 21_805, 2_708].map(dotted_patch), ["2.28.3", "2.24.0", "2.18.5", "2.7.8"]);
    }

    #[test]
    fn the_error_for_an_old_driver_names_the_required_version() {
        assert_eq!(check_version(13_000), Ok(()));
        let message = check_version(12_080).unwrap_err().to_string();
        let expected =
            "the driver is too old: found CUDA 12.8, need 13.0 or newer: install NVIDIA's driver of version 580";
        assert!(message.starts_with(expected), "{message}");
    }
}
