//! The primary context of a GPU. It is opened once, and each thread that uses the GPU binds it. The context also
//! converts status codes to errors.
//!
//! - CONTEXT-1: an error that makes the context unusable is stored as `lost`. Pending work and later calls then fail.
#![allow(unsafe_code)]

use std::fmt::Display;
use std::sync::OnceLock;

use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use super::library;
use super::status::{check_code, static_text, unavailable};
use crate::error::{KernelError, Result};

/// A handle of a CUDA library, usable from any thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw<T>(pub(crate) T);

// SAFETY: handles of the driver, cuBLASLt and NCCL may be used from any thread. If only one thread at a time may use a
// handle, its owner keeps it behind a mutex.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: see `Send`.
unsafe impl<T> Sync for Raw<T> {}

#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) ordinal: usize,
    pub(crate) name: String,
    device: sys::CUdevice,
    pub(crate) handle: Raw<sys::CUcontext>,
    pub(crate) capability: (i32, i32),
    /// Maximum dynamic shared memory of a block (opt-in limit), in bytes.
    pub(crate) shared_bytes_max: usize,
    lost: OnceLock<KernelError>,
}

const STICKY: &[CUresult] = &[
    CUresult::CUDA_ERROR_DEINITIALIZED,
    CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
    CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
    CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
    CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
    CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
    CUresult::CUDA_ERROR_ASSERT,
    CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
    CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
    CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
    CUresult::CUDA_ERROR_INVALID_PC,
    CUresult::CUDA_ERROR_LAUNCH_FAILED,
    CUresult::CUDA_ERROR_UNKNOWN,
];

fn device_attribute(device: sys::CUdevice, attribute: CUdevice_attribute, place: &str) -> Result<i32> {
    let mut value = 0;
    // SAFETY: the call writes one integer to a local. `library::driver` has called `cuInit`.
    check_code(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) }, "cuDeviceGetAttribute", &place)?;
    Ok(value)
}

/// Returns a device's handle, name and compute capability. The caller has called [`library::driver`].
pub(super) fn describe_device(ordinal: usize, place: &str) -> Result<(sys::CUdevice, String, (i32, i32))> {
    let (mut device, mut name) = (0, [0; 256]);
    let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
    // SAFETY: each call writes to a local of the type that the call declares. The name ends with a 0 in the buffer.
    let name = unsafe {
        check_code(sys::cuDeviceGet(&mut device, ordinal), "cuDeviceGet", &place)?;
        check_code(sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device), "cuDeviceGetName", &place)?;
        static_text(name.as_ptr())
    };
    Ok((device, name, (device_attribute(device, MAJOR, place)?, device_attribute(device, MINOR, place)?)))
}

impl Context {
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        let count = library::driver()?.devices;
        let place = format!("cuda device {ordinal}");
        if ordinal >= count {
            let what = format!("{place} does not exist; the driver reports {count} devices");
            return Err(unavailable(what, "set CUDA_VISIBLE_DEVICES, or use fewer devices in the mesh"));
        }
        let (device, name, capability) = describe_device(ordinal, &place)?;
        let shared_bytes_max = device_attribute(device, SHARED, &place)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the call writes a handle to a local.
        check_code(unsafe { sys::cuDevicePrimaryCtxRetain(&mut handle, device) }, "cuDevicePrimaryCtxRetain", &place)?;
        let context = Self {
            ordinal,
            name,
            device,
            handle: Raw(handle),
            capability,
            shared_bytes_max: usize::try_from(shared_bytes_max).unwrap_or(0),
            lost: OnceLock::new(),
        };
        context.bind()?;
        Ok(context)
    }

    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context stays retained while `self` lives.
        self.check(unsafe { sys::cuCtxSetCurrent(self.handle.0) }, "cuCtxSetCurrent", &self.place())
    }

    /// Binds the context in a `Drop`. Returns false if the context is lost. Driver calls may then hang, and nothing is
    /// left to free.
    pub(crate) fn bind_to_drop(&self) -> bool {
        self.lost().is_none() && self.bind().is_ok()
    }

    /// Enables access from this GPU to all present and future allocations on `other`, if the machine supports it.
    pub(crate) fn enable_peer_access(&self, other: &Context) -> Result<()> {
        let (mut can_access, place) = (0, format!("{} to {}", self.place(), other.place()));
        // SAFETY: the call writes one integer to a local.
        let result = unsafe { sys::cuDeviceCanAccessPeer(&mut can_access, self.device, other.device) };
        self.check(result, "cuDeviceCanAccessPeer", &place)?;
        if can_access == 0 {
            tracing::debug!(place, "no peer access: copies between these GPUs go through host memory");
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both contexts are retained; the call takes no flags.
        match unsafe { sys::cuCtxEnablePeerAccess(other.handle.0, 0) } {
            CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            // A machine without NVSwitch may allow only eight peers. Copies still work, through host memory.
            CUresult::CUDA_ERROR_TOO_MANY_PEERS => {
                tracing::warn!(place, "the driver allows no more peers: copies go through host memory");
                Ok(())
            }
            result => self.check(result, "cuCtxEnablePeerAccess", &place),
        }
    }

    pub(crate) fn place(&self) -> String {
        format!("cuda device {} ({})", self.ordinal, self.name)
    }

    pub(crate) fn lost(&self) -> Option<&KernelError> {
        self.lost.get()
    }

    /// Marks the context as lost (CONTEXT-1). Keeps and returns the first error.
    pub(crate) fn mark_lost(&self, error: KernelError) -> KernelError {
        self.lost.get_or_init(|| error).clone()
    }

    pub(crate) fn check_alive(&self) -> Result<()> {
        self.lost().map_or(Ok(()), |error| Err(error.clone()))
    }

    pub(crate) fn check(&self, result: CUresult, call: &'static str, place: &dyn Display) -> Result<()> {
        match check_code(result, call, place) {
            Err(error) if STICKY.contains(&result) => Err(self.mark_lost(error)),
            checked => checked,
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.lost().is_some() {
            return;
        }
        // SAFETY: the context was retained once in `open`. An error here cannot be handled.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
