//! A GPU's primary context: opened once, current on whichever thread binds it, and the one place where the driver's codes
//! become errors.
//!
//! - CONTEXT-1: an error after which no call on the context can succeed is kept as `lost`. It fails all that is pending and
//!   surfaces at the next call, whoever makes it.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fmt::{self, Display};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use super::library;
use crate::error::KernelError;

/// A handle of a CUDA library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw<T>(pub(crate) T);

// SAFETY: handles of the driver, cuBLASLt and NCCL are used from any thread; those that may be used by one thread at a
// time are kept behind a mutex by whoever owns them.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as for `Send`.
unsafe impl<T> Sync for Raw<T> {}

/// See the module.
pub(crate) struct Context {
    ordinal: usize,
    name: String,
    device: sys::CUdevice,
    handle: Raw<sys::CUcontext>,
    /// Compute capability, major and minor.
    capability: (i32, i32),
    /// Dynamic shared memory that a block may ask for.
    shared_bytes_max: usize,
    lost: OnceLock<KernelError>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("ordinal", &self.ordinal).field("name", &self.name).finish()
    }
}

/// Codes after which the context is of no more use.
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

impl Context {
    /// Retains the primary context of the GPU of this ordinal.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] where there is no driver, an old one or no such device; [`KernelError::Cuda`].
    pub(crate) fn open(ordinal: usize) -> Result<Self, KernelError> {
        let count = library::driver()?.devices;
        let place = format!("cuda device {ordinal}");
        if ordinal >= count {
            let what = format!("there is no {place}; the driver shows {count}");
            return Err(library::unavailable(what, "set CUDA_VISIBLE_DEVICES, or name fewer devices in the mesh"));
        }
        let (mut device, mut handle, mut name) = (0, std::ptr::null_mut(), [0; 256]);
        let ordinal_c = i32::try_from(ordinal).unwrap_or(i32::MAX);
        // SAFETY: all pointers are to locals of the types that the calls write; `cuInit` was called by `library::driver`.
        unsafe {
            checked(sys::cuDeviceGet(&mut device, ordinal_c), "cuDeviceGet", &place)?;
            let named = sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device);
            checked(named, "cuDeviceGetName", &place)?;
            checked(sys::cuDevicePrimaryCtxRetain(&mut handle, device), "cuDevicePrimaryCtxRetain", &place)?;
        }
        // SAFETY: the driver ended the name with a 0 within the buffer, whose last byte is one in any case.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let mut context = Self {
            ordinal,
            name,
            device,
            handle: Raw(handle),
            capability: (0, 0),
            shared_bytes_max: 0,
            lost: OnceLock::new(),
        };
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
        };
        context.capability = (context.attribute(MAJOR)?, context.attribute(MINOR)?);
        context.shared_bytes_max = usize::try_from(context.attribute(SHARED)?).unwrap_or(0);
        context.bind()?;
        Ok(context)
    }

    pub(crate) fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32, KernelError> {
        let mut value = 0;
        // SAFETY: writes one integer to a local.
        let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
        self.check(result, "cuDeviceGetAttribute", &self.place())?;
        Ok(value)
    }

    /// Makes it current on this thread.
    pub(crate) fn bind(&self) -> Result<(), KernelError> {
        // SAFETY: the context is retained as long as `self` lives.
        self.check(unsafe { sys::cuCtxSetCurrent(self.handle.0) }, "cuCtxSetCurrent", &self.place())
    }

    /// For whoever gives something back: makes it current, unless it is lost. Then the driver has nothing to give back, and a
    /// device that does not answer may let no call return.
    pub(crate) fn bind_to_drop(&self) -> bool {
        self.lost().is_none() && self.bind().is_ok()
    }

    /// Lets this GPU read and write `other`'s memory, all that is allocated there and will be, where the machine can.
    pub(crate) fn reach(&self, other: &Context) -> Result<(), KernelError> {
        let (mut can, place) = (0, format!("{} to {}", self.place(), other.place()));
        // SAFETY: writes one integer to a local.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, other.device) };
        self.check(asked, "cuDeviceCanAccessPeer", &place)?;
        if can == 0 {
            tracing::debug!(place, "no peer access: what one GPU copies from the other goes through the host's memory");
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both contexts are retained; the call takes no flags.
        match unsafe { sys::cuCtxEnablePeerAccess(other.handle.0, 0) } {
            CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            // A machine without NVSwitch may allow eight. Copies still work, through the host's memory.
            CUresult::CUDA_ERROR_TOO_MANY_PEERS => {
                tracing::warn!(place, "the driver allows no more peers: copies go through the host's memory");
                Ok(())
            }
            result => self.check(result, "cuCtxEnablePeerAccess", &place),
        }
    }

    /// Where it is, for errors.
    pub(crate) fn place(&self) -> String {
        format!("cuda device {} ({})", self.ordinal, self.name)
    }

    /// As the driver knows it.
    pub(crate) fn raw(&self) -> sys::CUcontext {
        self.handle.0
    }

    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, major and minor.
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Dynamic shared memory that a block may have once it is allowed on the function, bytes.
    pub(crate) fn shared_bytes_max(&self) -> usize {
        self.shared_bytes_max
    }

    /// The error that ended it, if one has (CONTEXT-1).
    pub(crate) fn lost(&self) -> Option<&KernelError> {
        self.lost.get()
    }

    /// Ends it (CONTEXT-1); the first error is kept, and returned.
    pub(crate) fn lose(&self, error: KernelError) -> KernelError {
        self.lost.get_or_init(|| error).clone()
    }

    /// # Errors
    /// The error that ended the context, if one has.
    pub(crate) fn check_alive(&self) -> Result<(), KernelError> {
        self.lost().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Turns a result into an error that names code, call and place.
    pub(crate) fn check(&self, result: CUresult, call: &'static str, place: &dyn Display) -> Result<(), KernelError> {
        match checked(result, call, place) {
            Err(error) if STICKY.contains(&result) => Err(self.lose(error)),
            checked => checked,
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.lost().is_some() {
            return;
        }
        // SAFETY: retained once in `open`. An error leaves nothing to be done.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// As [`Context::check`], where there is no context yet.
pub(crate) fn checked(result: CUresult, call: &'static str, place: &dyn Display) -> Result<(), KernelError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
    // SAFETY: both write a pointer to a local; what they point to is static, or null for an unknown code.
    let (name, text) = unsafe {
        let _ = sys::cuGetErrorName(result, &mut name);
        let _ = sys::cuGetErrorString(result, &mut text);
        (static_text(name), static_text(text))
    };
    Err(KernelError::Cuda { place: place.to_string(), call, code: result as u32, name, text })
}

/// # Safety
/// Null, or a text that ends with 0.
pub(crate) unsafe fn static_text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return "unknown".to_owned();
    }
    // SAFETY: the contract.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
