//! cuDNN's functions, loaded at run time. Status codes stay plain numbers, as a newer library may return unknown codes.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptor_t as Raw,
    cudnnBackendDescriptorType_t as Kind, cudnnHandle_t,
};

use crate::cuda::library::{Library, dotted_patch, dynamic_library};
use crate::cuda::status::static_text;
use crate::error::{KernelError, Result};

/// The oldest tested version that accepts the graphs, as `10000 * major + 100 * minor`.
const VERSION_MIN: usize = 91_200;

/// Buffer size for the library's error message, in bytes.
const TEXT_BYTES: usize = 512;

pub(super) type Stream = *mut c_void;

dynamic_library! {
    ["libcudnn.so.9", "libcudnn.so"]
    version: b"cudnnGetVersion\0" = fn() -> usize;
    error_string: b"cudnnGetErrorString\0" = fn(u32) -> *const c_char;
    last_error: b"cudnnGetLastErrorString\0" = fn(*mut c_char, usize) -> ();
    create: b"cudnnCreate\0" = fn(*mut cudnnHandle_t) -> u32;
    destroy: b"cudnnDestroy\0" = fn(cudnnHandle_t) -> u32;
    set_stream: b"cudnnSetStream\0" = fn(cudnnHandle_t, Stream) -> u32;
    descriptor_create: b"cudnnBackendCreateDescriptor\0" = fn(Kind, *mut Raw) -> u32;
    descriptor_destroy: b"cudnnBackendDestroyDescriptor\0" = fn(Raw) -> u32;
    set_attribute: b"cudnnBackendSetAttribute\0" = fn(Raw, Attribute, Type, i64, *const c_void) -> u32;
    get_attribute: b"cudnnBackendGetAttribute\0" = fn(Raw, Attribute, Type, i64, *mut i64, *mut c_void) -> u32;
    finalize: b"cudnnBackendFinalize\0" = fn(Raw) -> u32;
    execute: b"cudnnBackendExecute\0" = fn(cudnnHandle_t, Raw, Raw) -> u32;
}

impl Api {
    pub(crate) fn get() -> Result<&'static Self> {
        static API: OnceLock<Option<Api>> = OnceLock::new();
        let api = API.get_or_init(Self::load).as_ref().ok_or_else(|| Library::Cudnn.missing())?;
        Library::Cudnn.check_version(api.number(), VERSION_MIN)?;
        Ok(api)
    }

    /// The version as `10000 * major + 100 * minor + patch`.
    pub(super) fn number(&self) -> usize {
        // SAFETY: the call has no preconditions.
        unsafe { (self.version)() }
    }

    /// The version as text, such as `9.12.0`.
    pub(crate) fn version(&self) -> String {
        dotted_patch(self.number())
    }

    pub(super) fn check(&self, code: u32, call: &'static str, place: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut text = [0; TEXT_BYTES];
        // SAFETY: `error_string` returns a static string. `last_error` keeps the 0 in the last byte of `text`.
        let (name, text) = unsafe {
            (self.last_error)(text.as_mut_ptr(), TEXT_BYTES - 1);
            (static_text((self.error_string)(code)), CStr::from_ptr(text.as_ptr()).to_string_lossy().trim().to_owned())
        };
        let text = if text.is_empty() { "no reason given".to_owned() } else { text };
        Err(KernelError::Cuda { place: place.to_owned(), call, code, name, text })
    }
}
