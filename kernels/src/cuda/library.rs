//! Which CUDA libraries this machine has, and what to do about those that are missing: each is looked for before its first
//! use, since a call into a missing one would panic.
#![allow(unsafe_code)]

use std::fmt::{self, Display};
use std::{env, fs};

use cudarc::{cublaslt, driver::sys, nvrtc};

use super::context::checked;
use super::cudnn::api::Api as Cudnn;
use super::nccl::Api;
use crate::error::KernelError;

/// The oldest driver whose CUDA is that of the libraries and of the cubins: `1000 * major + 10 * minor`.
const DRIVER_MIN: i32 = 13_000;

/// What gives CUDA 13.0.
const DRIVER_HINT: &str = "install NVIDIA's driver of version 580 or newer (Debian: apt install nvidia-driver), or run the \
     container with --gpus all; without a GPU choose the device cpu";

/// What a driver is told by the environment when it starts, where nobody has said otherwise. Whoever starts processes sets
/// them; a program that starts the driver while it has one thread does so itself.
pub const SETTINGS: [(&str, &str); 3] = [
    // Libraries load all their kernels at once, and none behind a collective that waits for another GPU.
    ("CUDA_MODULE_LOADING", "EAGER"),
    // The kernels' data, which follows the variable above by the guide of CUDA 13; earlier guides left that open.
    ("CUDA_MODULE_DATA_LOADING", "EAGER"),
    // The most there are: streams that share one wait for each other.
    (QUEUES, "32"),
];

/// The variable that says how many hardware queues a GPU's streams have.
pub const QUEUES: &str = "CUDA_DEVICE_MAX_CONNECTIONS";

/// A library above the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// Products.
    CublasLt,
    /// The run-time compiler.
    Nvrtc,
    /// Collectives between GPUs.
    Nccl,
    /// Fused attention; without it our own kernels do that.
    Cudnn,
}

/// What `shardflow doctor` tells of CUDA.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Version of the driver's CUDA, such as `13.0`; or why there is none.
    pub driver: Result<String, KernelError>,
    /// Each device, or what kept it from being asked.
    pub devices: Vec<Result<DeviceFacts, KernelError>>,
    /// Each library's version, or why it cannot be used.
    pub libraries: Vec<(Library, Result<String, KernelError>)>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// As the driver calls it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Memory, in bytes.
    pub bytes_total: usize,
}

/// The driver, started.
pub(crate) struct Driver {
    /// Of its CUDA.
    pub(crate) version: i32,
    /// How many it shows.
    pub(crate) devices: usize,
}

pub(crate) fn unavailable(what: impl Into<String>, hint: &str) -> KernelError {
    KernelError::Unavailable { what: what.into(), hint: hint.to_owned() }
}

/// `13000` as `13.0`.
fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Sets [`SETTINGS`] where that is sound: no other thread can be looking at the environment.
fn set_environment() {
    if !fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1) {
        return;
    }
    for (name, value) in SETTINGS.iter().filter(|(name, _)| env::var_os(name).is_none()) {
        // SAFETY: this is the process's only thread.
        unsafe { env::set_var(name, value) };
    }
}

/// Starts the driver.
///
/// # Errors
/// [`KernelError::Unavailable`] where there is none, or an old one.
pub(crate) fn driver() -> Result<Driver, KernelError> {
    // SAFETY: loads the library and lets it go again; its initialisers are NVIDIA's.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("no CUDA driver (libcuda.so.1) is on this machine", DRIVER_HINT));
    }
    set_environment();
    let (mut version, mut count) = (0, 0);
    // SAFETY: writes to a local; every driver has this call, and it needs no initialisation.
    checked(unsafe { sys::cuDriverGetVersion(&mut version) }, "cuDriverGetVersion", &"cuda")?;
    check_version(version)?;
    // SAFETY: needs nothing.
    let started = unsafe { sys::cuInit(0) };
    if started == sys::CUresult::CUDA_ERROR_NO_DEVICE {
        return Ok(Driver { version, devices: 0 });
    }
    checked(started, "cuInit", &"cuda")?;
    // SAFETY: writes to a local.
    checked(unsafe { sys::cuDeviceGetCount(&mut count) }, "cuDeviceGetCount", &"cuda")?;
    Ok(Driver { version, devices: usize::try_from(count).unwrap_or(0) })
}

fn check_version(version: i32) -> Result<(), KernelError> {
    if version >= DRIVER_MIN {
        return Ok(());
    }
    let what = format!("the CUDA driver is too old: it has CUDA {}, {} is needed", dotted(version), dotted(DRIVER_MIN));
    Err(unavailable(what, DRIVER_HINT))
}

impl Library {
    /// All of them.
    pub const ALL: [Library; 4] = [Library::CublasLt, Library::Nvrtc, Library::Nccl, Library::Cudnn];

    /// The file's name without its version.
    pub fn name(self) -> &'static str {
        match self {
            Library::CublasLt => "libcublasLt",
            Library::Nvrtc => "libnvrtc",
            Library::Nccl => "libnccl",
            Library::Cudnn => "libcudnn",
        }
    }

    /// How to get it.
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
                "apt install libnccl2 (NVIDIA's repository), or pip install nvidia-nccl-cu13 and add its lib folder to \
                 LD_LIBRARY_PATH; of version 2.24 or newer"
            }
            Library::Cudnn => {
                "optional, for attention in bf16: apt install cudnn9-cuda-13 (NVIDIA's repository), or pip install \
                 nvidia-cudnn-cu13 and add its lib folder to LD_LIBRARY_PATH"
            }
        }
    }

    /// # Errors
    /// [`KernelError::Unavailable`] where it is not on this machine.
    pub(crate) fn require(self) -> Result<(), KernelError> {
        // SAFETY: as in `driver`.
        let present = unsafe {
            match self {
                Library::CublasLt => cublaslt::sys::is_culib_present(),
                Library::Nvrtc => nvrtc::sys::is_culib_present(),
                Library::Nccl => return Api::get().map(|_| ()),
                Library::Cudnn => return Cudnn::get().map(|_| ()),
            }
        };
        if present { Ok(()) } else { Err(self.missing()) }
    }

    pub(crate) fn missing(self) -> KernelError {
        unavailable(format!("the library {} is not on this machine", self.name()), self.hint())
    }

    fn version(self) -> Result<String, KernelError> {
        self.require()?;
        match self {
            // SAFETY: needs nothing.
            Library::CublasLt => Ok(cublas_version(unsafe { cublaslt::sys::cublasLtGetVersion() })),
            Library::Nvrtc => {
                let (mut major, mut minor) = (0, 0);
                // SAFETY: writes to locals.
                let result = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
                if result == nvrtc::sys::nvrtcResult::NVRTC_SUCCESS {
                    return Ok(format!("{major}.{minor}"));
                }
                Err(unavailable("libnvrtc does not tell its version", self.hint()))
            }
            Library::Nccl => Api::get()?.version(),
            Library::Cudnn => Ok(Cudnn::get()?.version()),
        }
    }
}

/// `130002` as `13.0.2`.
fn cublas_version(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

impl Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Looks at driver, devices, memory and libraries. Opens no context, so it takes no memory on a device.
pub fn probe() -> Probe {
    let libraries = Library::ALL.map(|library| (library, library.version())).into();
    match driver() {
        Err(error) => Probe { driver: Err(error), devices: Vec::new(), libraries },
        Ok(driver) => {
            let devices = (0..driver.devices).map(facts).collect();
            Probe { driver: Ok(dotted(driver.version)), devices, libraries }
        }
    }
}

fn facts(ordinal: usize) -> Result<DeviceFacts, KernelError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let place = format!("cuda device {ordinal}");
    let (mut device, mut bytes_total, mut name) = (0, 0, [0; 256]);
    let mut capability = (0, 0);
    // SAFETY: each writes to locals of the types that it is declared with; the name ends with the buffer's last 0 at most.
    let name = unsafe {
        checked(sys::cuDeviceGet(&mut device, i32::try_from(ordinal).unwrap_or(i32::MAX)), "cuDeviceGet", &place)?;
        checked(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device), "cuDeviceGetName", &place)?;
        checked(sys::cuDeviceTotalMem_v2(&mut bytes_total, device), "cuDeviceTotalMem", &place)?;
        checked(sys::cuDeviceGetAttribute(&mut capability.0, MAJOR, device), "cuDeviceGetAttribute", &place)?;
        checked(sys::cuDeviceGetAttribute(&mut capability.1, MINOR, device), "cuDeviceGetAttribute", &place)?;
        super::context::static_text(name.as_ptr())
    };
    Ok(DeviceFacts { name, capability, bytes_total })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!([13_000, 12_080, 11_020].map(dotted), ["13.0", "12.8", "11.2"]);
        assert_eq!([130_002, 121_100].map(cublas_version), ["13.0.2", "12.11.0"]);
    }

    #[test]
    fn an_old_driver_is_named_with_what_is_needed() {
        assert_eq!(check_version(13_000), Ok(()));
        let told = check_version(12_080).unwrap_err().to_string();
        let expected =
            "the CUDA driver is too old: it has CUDA 12.8, 13.0 is needed: install NVIDIA's driver of version 580";
        assert!(told.starts_with(expected), "{told}");
    }

    /// Where there is a driver this says nothing; where there is none, as where CI runs, all must be told and nothing panic.
    #[test]
    fn a_machine_without_cuda_is_told_what_is_missing() {
        let probe = probe();
        let Err(error) = &probe.driver else { return };
        assert!(error.to_string().starts_with("no CUDA driver (libcuda.so.1) is on this machine: install"), "{error}");
        for (library, version) in &probe.libraries {
            if let Err(error) = version {
                assert!(error.to_string().contains(library.name()), "{error}");
            }
        }
        assert_eq!(super::super::gpu::Gpu::open(0).unwrap_err(), *error);
    }
}
