//! The functions of NVRTC.
#![allow(unsafe_code, non_snake_case)]

pub mod compile;
pub mod image;
pub mod source;

use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock};

use cudarc::nvrtc::sys::{nvrtcProgram, nvrtcResult};

use crate::export::{exports, plain_exports};
use crate::kernel::text;
use crate::world::{lock, machine};

const ARCHITECTURES: &[c_int] = &[75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];

struct Unit {
    program: compile::Program,
    image: Option<String>,
    log: String,
}

fn units() -> &'static Mutex<HashMap<u64, Unit>> {
    static UNITS: OnceLock<Mutex<HashMap<u64, Unit>>> = OnceLock::new();
    UNITS.get_or_init(Mutex::default)
}

fn with_unit<T>(
    program: nvrtcProgram,
    get: impl FnOnce(&mut Unit) -> Result<T, nvrtcResult>,
) -> Result<T, nvrtcResult> {
    get(lock(units()).get_mut(&(program as u64)).ok_or(nvrtcResult::NVRTC_ERROR_INVALID_PROGRAM)?)
}

fn image_of(program: nvrtcProgram) -> Result<String, nvrtcResult> {
    with_unit(program, |unit| unit.image.clone().ok_or(nvrtcResult::NVRTC_ERROR_INVALID_INPUT))
}

/// # Safety
///
/// `to` must have room for the text and a NUL.
unsafe fn write_c_string(text: &str, to: *mut c_char) {
    // SAFETY: the caller keeps the contract above.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        *to.add(text.len()) = 0;
    }
}

exports! { nvrtc;
    fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> nvrtcResult {
        (*major, *minor) = (13, 0);
        Ok(())
    }

    fn nvrtcGetNumSupportedArchs(count: *mut c_int) -> nvrtcResult {
        *count = ARCHITECTURES.len() as c_int;
        Ok(())
    }

    fn nvrtcGetSupportedArchs(out: *mut c_int) -> nvrtcResult {
        std::ptr::copy_nonoverlapping(ARCHITECTURES.as_ptr(), out, ARCHITECTURES.len());
        Ok(())
    }

    fn nvrtcCreateProgram(
        out: *mut nvrtcProgram,
        source: *const c_char,
        name: *const c_char,
        count: c_int,
        headers: *const *const c_char,
        names: *const *const c_char,
    ) -> nvrtcResult {
        let headers = (0..count.max(0) as usize).map(|i| (text(*names.add(i)), text(*headers.add(i)))).collect();
        let name = if name.is_null() { "program.cu".to_string() } else { text(name) };
        let program = compile::Program { text: text(source), name, headers };
        let handle = machine().state().handle();
        lock(units()).insert(handle, Unit { program, image: None, log: String::new() });
        *out = handle as nvrtcProgram;
        Ok(())
    }

    fn nvrtcCompileProgram(program: nvrtcProgram, count: c_int, options: *const *const c_char) -> nvrtcResult {
        let options: Vec<String> = (0..count.max(0) as usize).map(|i| text(*options.add(i))).collect();
        // Remove the program from the map while it compiles, so that calls for other programs need not wait.
        let handle = program as u64;
        let mut unit = lock(units()).remove(&handle).ok_or(nvrtcResult::NVRTC_ERROR_INVALID_PROGRAM)?;
        machine().compiling.fetch_add(1, Ordering::Relaxed);
        let compiled = compile::compile(&unit.program, &options, &machine().config.cache);
        machine().state().last_progress = std::time::Instant::now();
        machine().compiling.fetch_sub(1, Ordering::Relaxed);
        let is_fine = compiled.is_ok();
        match compiled {
            Ok(image) => unit.image = Some(image),
            Err(log) => unit.log = log,
        }
        lock(units()).insert(handle, unit);
        if is_fine { Ok(()) } else { Err(nvrtcResult::NVRTC_ERROR_COMPILATION) }
    }

    fn nvrtcGetPTXSize(program: nvrtcProgram, bytes: *mut usize) -> nvrtcResult {
        *bytes = image_of(program)?.len() + 1;
        Ok(())
    }

    fn nvrtcGetPTX(program: nvrtcProgram, out: *mut c_char) -> nvrtcResult {
        write_c_string(&image_of(program)?, out);
        Ok(())
    }

    fn nvrtcGetCUBINSize(program: nvrtcProgram, bytes: *mut usize) -> nvrtcResult {
        *bytes = image_of(program)?.len() + 1;
        Ok(())
    }

    fn nvrtcGetCUBIN(program: nvrtcProgram, out: *mut c_char) -> nvrtcResult {
        write_c_string(&image_of(program)?, out);
        Ok(())
    }

    fn nvrtcGetProgramLogSize(program: nvrtcProgram, bytes: *mut usize) -> nvrtcResult {
        *bytes = with_unit(program, |unit| Ok(unit.log.len()))? + 1;
        Ok(())
    }

    fn nvrtcGetProgramLog(program: nvrtcProgram, out: *mut c_char) -> nvrtcResult {
        write_c_string(&with_unit(program, |unit| Ok(unit.log.clone()))?, out);
        Ok(())
    }

    fn nvrtcDestroyProgram(program: *mut nvrtcProgram) -> nvrtcResult {
        lock(units()).remove(&(*program as u64)).ok_or(nvrtcResult::NVRTC_ERROR_INVALID_PROGRAM)?;
        *program = std::ptr::null_mut();
        Ok(())
    }
}

plain_exports! { nvrtc;
    fn nvrtcGetErrorString(result: nvrtcResult) -> *const c_char {
        static_text(&format!("{result:?}"))
    }
}

/// Returns the text as a C string that is never freed. Equal texts share one C string.
pub fn static_text(text: &str) -> *const c_char {
    static TEXTS: Mutex<Vec<&'static std::ffi::CStr>> = Mutex::new(Vec::new());
    let mut texts = lock(&TEXTS);
    if let Some(known) = texts.iter().find(|t| t.to_bytes() == text.as_bytes()) {
        return known.as_ptr();
    }
    let owned = CString::new(text.replace('\0', " ")).expect("NULs were replaced");
    let kept: &'static std::ffi::CStr = Box::leak(owned.into_boxed_c_str());
    texts.push(kept);
    kept.as_ptr()
}
