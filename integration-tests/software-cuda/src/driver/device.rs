//! The driver's functions for devices and contexts.
#![allow(unsafe_code, non_snake_case)]

use std::ffi::{c_char, c_int, c_uint};

use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute, CUresult, CUuuid};

use crate::export::exports;
use crate::memory::Place;
use crate::scheduler::synchronise_device;
use crate::world::{State, current_device, lock, machine, set_current_device};

const DRIVER_VERSION: c_int = 13000;
const NAME: &[u8] = b"software CUDA device\0";

/// Returns an attribute of a device. Each attribute that programs query has the value of an H100.
fn attribute(attribute: CUdevice_attribute, device: CUdevice) -> c_int {
    use CUdevice_attribute::*;
    match attribute {
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => 9,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => 0,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => 4,
        CU_DEVICE_ATTRIBUTE_WARP_SIZE => 32,
        CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK
        | CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X
        | CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y => 1024,
        CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z => 64,
        CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X => c_int::MAX,
        CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y | CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z => 65535,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK => 48 << 10,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => machine().config.shared_bytes as c_int,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR => 228 << 10,
        CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR => 2048,
        CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK => 65536,
        CU_DEVICE_ATTRIBUTE_CLOCK_RATE => 1_000_000,
        CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE => 50 << 20,
        CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID => device,
        CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED
        | CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING
        | CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS
        | CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED
        | CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY
        | CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT => 1,
        _ => 0,
    }
}

fn check_device(state: &State, device: CUdevice) -> Result<usize, CUresult> {
    usize::try_from(device).ok().filter(|d| *d < state.devices.len()).ok_or(CUresult::CUDA_ERROR_INVALID_DEVICE)
}

fn context_of(device: usize) -> CUcontext {
    ((device + 1) << 8) as CUcontext
}

fn device_of(state: &State, context: CUcontext) -> Result<usize, CUresult> {
    let index = context as usize;
    let device = (index >> 8).wrapping_sub(1);
    if index & 0xff != 0 || device >= state.devices.len() {
        return Err(CUresult::CUDA_ERROR_INVALID_CONTEXT);
    }
    Ok(device)
}

exports! { driver;
    fn cuInit(_flags: c_uint) -> CUresult {
        match machine().config.devices {
            0 => Err(CUresult::CUDA_ERROR_NO_DEVICE),
            _ => Ok(()),
        }
    }

    fn cuDriverGetVersion(version: *mut c_int) -> CUresult {
        *version = DRIVER_VERSION;
        Ok(())
    }

    fn cuDeviceGetCount(count: *mut c_int) -> CUresult {
        *count = machine().config.devices as c_int;
        Ok(())
    }

    fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) -> CUresult {
        check_device(&machine().state(), ordinal)?;
        *device = ordinal;
        Ok(())
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, dev: CUdevice) -> CUresult {
        check_device(&machine().state(), dev)?;
        let bytes = (len.max(0) as usize).min(NAME.len());
        std::ptr::copy_nonoverlapping(NAME.as_ptr().cast(), name, bytes);
        Ok(())
    }

    fn cuDeviceGetAttribute(value: *mut c_int, queried: CUdevice_attribute, dev: CUdevice) -> CUresult {
        check_device(&machine().state(), dev)?;
        *value = attribute(queried, dev);
        Ok(())
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, dev: CUdevice) -> CUresult {
        check_device(&machine().state(), dev)?;
        *bytes = machine().config.memory_bytes;
        Ok(())
    }

    fn cuDeviceGetUuid_v2(uuid: *mut CUuuid, dev: CUdevice) -> CUresult {
        let device = check_device(&machine().state(), dev)?;
        let mut bytes = [0x5f; 16];
        bytes[15] = device as c_char;
        (*uuid).bytes = bytes;
        Ok(())
    }

    fn cuDevicePrimaryCtxRetain(pctx: *mut CUcontext, dev: CUdevice) -> CUresult {
        let mut state = machine().state();
        let device = check_device(&state, dev)?;
        state.devices[device].retained += 1;
        *pctx = context_of(device);
        Ok(())
    }

    fn cuDevicePrimaryCtxRelease_v2(dev: CUdevice) -> CUresult {
        let mut state = machine().state();
        let device = check_device(&state, dev)?;
        let retained = state.devices[device].retained.checked_sub(1).ok_or(CUresult::CUDA_ERROR_INVALID_CONTEXT)?;
        state.devices[device].retained = retained;
        Ok(())
    }

    fn cuCtxSetCurrent(ctx: CUcontext) -> CUresult {
        let device = if ctx.is_null() { None } else { Some(device_of(&machine().state(), ctx)?) };
        set_current_device(device);
        Ok(())
    }

    fn cuCtxGetCurrent(pctx: *mut CUcontext) -> CUresult {
        *pctx = current_device().map_or(std::ptr::null_mut(), context_of);
        Ok(())
    }

    fn cuCtxGetDevice(device: *mut CUdevice) -> CUresult {
        *device = machine().state().device()? as CUdevice;
        Ok(())
    }

    fn cuCtxSynchronize() -> CUresult {
        let device = machine().state().device()?;
        synchronise_device(machine(), device)
    }

    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> CUresult {
        machine().state().device()?;
        for (to, value) in [(least, 0), (greatest, -5)] {
            if !to.is_null() {
                *to = value;
            }
        }
        Ok(())
    }

    fn cuDeviceCanAccessPeer(can: *mut c_int, dev: CUdevice, peer: CUdevice) -> CUresult {
        let state = machine().state();
        *can = c_int::from(check_device(&state, dev)? != check_device(&state, peer)?);
        Ok(())
    }

    fn cuCtxEnablePeerAccess(peer: CUcontext, _flags: c_uint) -> CUresult {
        let state = machine().state();
        let (own, peer) = (state.device()?, device_of(&state, peer)?);
        if own == peer {
            return Err(CUresult::CUDA_ERROR_INVALID_DEVICE);
        }
        match lock(&machine().registry).peers.insert((own, peer)) {
            true => Ok(()),
            false => Err(CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED),
        }
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CUresult {
        let device = machine().state().device()?;
        *total = machine().config.memory_bytes;
        *free = *total - lock(&machine().registry).live_bytes(Place::Device(device));
        Ok(())
    }

    fn cuGetErrorName(error: CUresult, text: *mut *const c_char) -> CUresult {
        *text = error_text(error, false);
        Ok(())
    }

    fn cuGetErrorString(error: CUresult, text: *mut *const c_char) -> CUresult {
        *text = error_text(error, true);
        Ok(())
    }
}

/// Returns the error's name or description. Neither text is ever freed.
fn error_text(error: CUresult, is_long: bool) -> *const c_char {
    use CUresult::*;
    let long = match error {
        CUDA_SUCCESS => c"no error",
        CUDA_ERROR_INVALID_VALUE => c"invalid argument",
        CUDA_ERROR_OUT_OF_MEMORY => c"out of memory",
        CUDA_ERROR_NO_DEVICE => c"no CUDA-capable device is detected",
        CUDA_ERROR_INVALID_DEVICE => c"invalid device ordinal",
        CUDA_ERROR_INVALID_IMAGE => c"device kernel image is invalid",
        CUDA_ERROR_INVALID_CONTEXT => c"invalid device context",
        CUDA_ERROR_INVALID_HANDLE => c"invalid resource handle",
        CUDA_ERROR_NOT_FOUND => c"named symbol not found",
        CUDA_ERROR_NOT_READY => c"device not ready",
        CUDA_ERROR_ILLEGAL_ADDRESS => c"an illegal memory access was encountered",
        CUDA_ERROR_LAUNCH_TIMEOUT => c"the launch timed out and was terminated",
        CUDA_ERROR_LAUNCH_FAILED => c"unspecified launch failure",
        _ => c"an error of the software device",
    };
    if is_long {
        return long.as_ptr();
    }
    static NAMES: std::sync::Mutex<Vec<(CUresult, &'static std::ffi::CStr)>> = std::sync::Mutex::new(Vec::new());
    let mut names = lock(&NAMES);
    if let Some((_, name)) = names.iter().find(|n| n.0 == error) {
        return name.as_ptr();
    }
    let name = std::ffi::CString::new(format!("{error:?}")).expect("names of variants contain no NUL");
    let name: &'static std::ffi::CStr = Box::leak(name.into_boxed_c_str());
    names.push((error, name));
    name.as_ptr()
}
