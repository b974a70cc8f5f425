//! NCCL's functions, loaded at run time. cudarc never tries `libnccl.so.2`, the only file name in NVIDIA's packages.
//! Types come from cudarc. Status codes stay plain numbers, as a newer library may return unknown codes.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use crate::cuda::library::{Library, dotted_patch, dynamic_library};
use crate::cuda::status::static_text;
use crate::error::{KernelError, Result};

/// The oldest supported version: `10000 * major + 100 * minor + patch`. Before 2.24, members in one process may read
/// each other's buffers directly, even if their GPUs have no access to these buffers. Before 2.18, a non-blocking
/// communicator may read its configuration after the caller has freed the configuration.
const VERSION_MIN: usize = 22_400;

pub(crate) const SUCCESS: u32 = 0;
/// A CUDA call inside NCCL failed. The device's streams report the CUDA error itself.
pub(super) const UNHANDLED_CUDA_ERROR: u32 = 1;
/// Another member failed or its process ended.
pub(super) const REMOTE_ERROR: u32 = 6;
/// `ncclInProgress`: a non-blocking call has not completed.
pub(crate) const IN_PROGRESS: u32 = 7;

type Stream = *mut c_void;

/// The first fields of `ncclConfig_t`, as of version 2.17. Later versions detect by `size` that the later fields are
/// missing.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    ctas_min: c_int,
    ctas_max: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    pub(crate) fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            ctas_min: UNDEFINED,
            ctas_max: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

dynamic_library! {
    ["libnccl.so.2", "libnccl.so"]
    version: b"ncclGetVersion\0" = fn(*mut c_int) -> u32;
    unique_id: b"ncclGetUniqueId\0" = fn(*mut ncclUniqueId) -> u32;
    init: b"ncclCommInitRankConfig\0" = fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> u32;
    async_error: b"ncclCommGetAsyncError\0" = fn(ncclComm_t, *mut u32) -> u32;
    abort: b"ncclCommAbort\0" = fn(ncclComm_t) -> u32;
    finalize: b"ncclCommFinalize\0" = fn(ncclComm_t) -> u32;
    destroy: b"ncclCommDestroy\0" = fn(ncclComm_t) -> u32;
    group_start: b"ncclGroupStart\0" = fn() -> u32;
    group_end: b"ncclGroupEnd\0" = fn() -> u32;
    all_reduce: b"ncclAllReduce\0"
        = fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, Stream) -> u32;
    reduce_scatter: b"ncclReduceScatter\0"
        = fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, Stream) -> u32;
    all_gather: b"ncclAllGather\0" = fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, Stream) -> u32;
    broadcast: b"ncclBroadcast\0"
        = fn(*const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> u32;
    send: b"ncclSend\0" = fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> u32;
    receive: b"ncclRecv\0" = fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, Stream) -> u32;
    error_string: b"ncclGetErrorString\0" = fn(u32) -> *const c_char;
    last_error: b"ncclGetLastError\0" = fn(ncclComm_t) -> *const c_char;
}

impl Api {
    pub(crate) fn get() -> Result<&'static Self> {
        static API: OnceLock<Option<Api>> = OnceLock::new();
        let api = API.get_or_init(Self::load).as_ref().ok_or_else(|| Library::Nccl.missing())?;
        Library::Nccl.check_version(api.number()?, VERSION_MIN)?;
        Ok(api)
    }

    fn number(&self) -> Result<usize> {
        let mut version = 0;
        // SAFETY: the call writes to a local.
        self.check(unsafe { (self.version)(&mut version) }, "ncclGetVersion", "nccl")?;
        Ok(usize::try_from(version).unwrap_or(0))
    }

    /// The version as text, such as `2.28.3`.
    pub(crate) fn version(&self) -> Result<String> {
        self.number().map(dotted_patch)
    }

    /// Converts a status code to an error. A call in progress is not an error.
    pub(crate) fn check(&self, code: u32, call: &'static str, place: &str) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both functions return static strings. The last error needs no communicator.
        let (name, text) =
            unsafe { (static_text((self.error_string)(code)), static_text((self.last_error)(std::ptr::null_mut()))) };
        Err(KernelError::Cuda { place: place.to_owned(), call, code, name, text })
    }
}
