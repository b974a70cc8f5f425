//! Status codes of the CUDA libraries as errors.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};
use std::fmt::Display;

use cudarc::driver::sys::{self, CUresult};

use crate::error::{KernelError, Result};

pub(crate) fn unavailable(what: impl Into<String>, hint: &str) -> KernelError {
    KernelError::Unavailable { what: what.into(), hint: hint.to_owned() }
}

/// Converts a status code to an error when there is no context yet.
pub(crate) fn check_code(result: CUresult, call: &'static str, place: &dyn Display) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
    // SAFETY: both calls write a pointer to a local. The strings are static, or null for an unknown code.
    let (name, text) = unsafe {
        let _ = sys::cuGetErrorName(result, &mut name);
        let _ = sys::cuGetErrorString(result, &mut text);
        (static_text(name), static_text(text))
    };
    Err(KernelError::Cuda { place: place.to_string(), call, code: result as u32, name, text })
}

/// # Safety
/// `text` is null or a static string terminated by 0.
pub(crate) unsafe fn static_text(text: *const c_char) -> String {
    if text.is_null() {
        return "unknown".to_owned();
    }
    // SAFETY: the caller guarantees that `text` is a static string terminated by 0.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
