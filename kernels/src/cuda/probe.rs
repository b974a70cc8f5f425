//! Probes the CUDA installation of this machine, for `shardflow doctor`.
#![allow(unsafe_code)]

use cudarc::{cublaslt, driver::sys, nvrtc};

use super::context::describe_device;
use super::cudnn::api::Api as Cudnn;
use super::library::{Library, dotted, dotted_patch, driver};
use super::nccl::api::Api as Nccl;
use super::status::{check_code, unavailable};
use crate::error::Result;

/// What `shardflow doctor` reports about CUDA.
#[derive(Clone, Debug)]
pub struct Probe {
    /// CUDA version of the driver, such as `13.0`, or why there is no driver.
    pub driver: Result<String>,
    /// Each device, or why the query failed.
    pub devices: Vec<Result<DeviceFacts>>,
    /// Each library's version, or why it cannot be used.
    pub libraries: Vec<(Library, Result<String>)>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// The driver's name for the device.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Total memory, in bytes.
    pub bytes_total: usize,
}

/// Probes the driver, devices, memory and libraries. Creates no context, so it allocates no device memory.
pub fn probe() -> Probe {
    let libraries = Library::ALL.map(|library| (library, version(library))).into();
    match driver() {
        Err(error) => Probe { driver: Err(error), devices: Vec::new(), libraries },
        Ok(driver) => {
            let devices = (0..driver.devices).map(device_facts).collect();
            Probe { driver: Ok(dotted(driver.version)), devices, libraries }
        }
    }
}

fn device_facts(ordinal: usize) -> Result<DeviceFacts> {
    let place = format!("cuda device {ordinal}");
    let (device, name, capability) = describe_device(ordinal, &place)?;
    let mut bytes_total = 0;
    // SAFETY: the call writes to a local.
    check_code(unsafe { sys::cuDeviceTotalMem_v2(&mut bytes_total, device) }, "cuDeviceTotalMem", &place)?;
    Ok(DeviceFacts { name, capability, bytes_total })
}

fn version(library: Library) -> Result<String> {
    library.require()?;
    match library {
        // SAFETY: the call has no preconditions.
        Library::CublasLt => Ok(dotted_patch(unsafe { cublaslt::sys::cublasLtGetVersion() })),
        Library::Nvrtc => {
            let (mut major, mut minor) = (0, 0);
            // SAFETY: the call writes to locals.
            let result = unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
            if result == nvrtc::sys::nvrtcResult::NVRTC_SUCCESS {
                return Ok(format!("{major}.{minor}"));
            }
            Err(unavailable("libnvrtc reports no version", library.hint()))
        }
        Library::Nccl => Nccl::get()?.version(),
        Library::Cudnn => Ok(Cudnn::get()?.version()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For machines without a driver, as in CI: `probe` must report everything that is missing, and must not panic.
    #[test]
    fn the_probe_reports_what_a_machine_without_cuda_lacks() {
        let probe = probe();
        let Err(error) = &probe.driver else { return };
        assert!(error.to_string().starts_with("no CUDA driver (libcuda.so.1) on this machine: install"), "{error}");
        for (library, version) in &probe.libraries {
            if let Err(error) = version {
                assert!(error.to_string().contains(library.name()), "{error}");
            }
        }
        assert_eq!(crate::cuda::gpu::Gpu::open(0).unwrap_err(), *error);
    }
}
