//! The driver's functions for modules, kernels and launches.
#![allow(unsafe_code, non_snake_case)]

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::sys::{
    CUfunction, CUfunction_attribute, CUjit_option, CUlaunchConfig, CUmodule, CUresult, CUstream,
};

use crate::export::exports;
use crate::findings::count_launch;
use crate::kernel::{Function, Library, SHARED_BYTES_MAX, THREADS_MAX, copy_arguments, functions, load, text};
use crate::nvrtc::image;
use crate::world::{Launch, OpKind, lock, machine};

const SHARED_BYTES_DEFAULT: usize = 48 << 10;

fn modules() -> &'static Mutex<HashMap<u64, Library>> {
    static MODULES: OnceLock<Mutex<HashMap<u64, Library>>> = OnceLock::new();
    MODULES.get_or_init(Mutex::default)
}

/// # Safety
///
/// `image` must point to an image that ends with NUL.
unsafe fn load_image(module: *mut CUmodule, image: *const c_void) -> Result<(), CUresult> {
    machine().state().device()?;
    // SAFETY: the caller keeps the contract above.
    let text = unsafe { text(image.cast()) };
    let Some(path) = image::library_path(&text, &machine().config.cache) else {
        eprintln!("software-cuda: cannot load an image that the software NVRTC did not create");
        return Err(CUresult::CUDA_ERROR_INVALID_IMAGE);
    };
    let library = load(&path).map_err(|error| {
        eprintln!("software-cuda: cannot load {}: {error}", path.display());
        CUresult::CUDA_ERROR_INVALID_IMAGE
    })?;
    let handle = machine().state().handle();
    lock(modules()).insert(handle, library);
    // SAFETY: the caller passed a pointer to a module.
    unsafe { *module = handle as CUmodule };
    Ok(())
}

/// # Safety
///
/// `arguments` must point to one pointer per argument of the function.
unsafe fn launch(
    function: CUfunction,
    dims: [u32; 6],
    shared_bytes: usize,
    stream: CUstream,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Result<(), CUresult> {
    let functions = lock(functions());
    let found = functions.get(&(function as u64)).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
    let threads = dims[3..].iter().try_fold(1u32, |a, b| a.checked_mul(*b)).unwrap_or(u32::MAX);
    let is_odd = dims.contains(&0) || threads > THREADS_MAX.min(found.kernel.threads_max()) || dims[5] > 64;
    if is_odd || dims[1] > 65535 || dims[2] > 65535 || !extra.is_null() {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    if shared_bytes > found.shared_bytes_max {
        eprintln!("software-cuda: {} requests {shared_bytes} bytes of shared memory, over its maximum", found.name);
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    let (kernel, name) = (found.kernel, found.name.clone());
    drop(functions);
    // SAFETY: the caller keeps the contract above.
    let arguments = unsafe { copy_arguments(kernel, arguments) };
    let mut state = machine().state();
    let handle = state.stream(stream as u64)?;
    if state.streams[&handle].device != state.device()? {
        return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
    }
    count_launch(&name);
    let launch = Launch { kernel, arguments, dims, shared_bytes };
    state.submit(machine(), handle, OpKind::Launch(Box::new(launch)), name);
    Ok(())
}

exports! { driver;
    fn cuModuleLoadData(module: *mut CUmodule, image: *const c_void) -> CUresult {
        load_image(module, image)
    }

    fn cuModuleLoadDataEx(
        module: *mut CUmodule,
        image: *const c_void,
        _count: c_uint,
        _options: *mut CUjit_option,
        _values: *mut *mut c_void,
    ) -> CUresult {
        load_image(module, image)
    }

    fn cuModuleUnload(module: CUmodule) -> CUresult {
        lock(modules()).remove(&(module as u64)).map(|_| ()).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)
    }

    fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char) -> CUresult {
        let library = lock(modules()).get(&(module as u64)).cloned().ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        let name: Arc<str> = text(name).into();
        let kernel = library.kernel(&name).ok_or(CUresult::CUDA_ERROR_NOT_FOUND)?;
        let handle = machine().state().handle();
        let shared_bytes_max = SHARED_BYTES_DEFAULT;
        lock(functions()).insert(handle, Function { name, kernel, shared_bytes_max });
        *function = handle as CUfunction;
        Ok(())
    }

    fn cuFuncGetAttribute(value: *mut c_int, attribute: CUfunction_attribute, function: CUfunction) -> CUresult {
        use CUfunction_attribute::*;
        let functions = lock(functions());
        let found = functions.get(&(function as u64)).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        *value = match attribute {
            CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK => found.kernel.threads_max() as c_int,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES => found.shared_bytes_max as c_int,
            CU_FUNC_ATTRIBUTE_NUM_REGS => 32,
            CU_FUNC_ATTRIBUTE_PTX_VERSION | CU_FUNC_ATTRIBUTE_BINARY_VERSION => 90,
            _ => 0,
        };
        Ok(())
    }

    fn cuFuncSetAttribute(function: CUfunction, attribute: CUfunction_attribute, value: c_int) -> CUresult {
        let mut functions = lock(functions());
        let found = functions.get_mut(&(function as u64)).ok_or(CUresult::CUDA_ERROR_INVALID_HANDLE)?;
        if attribute == CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES {
            let bytes_max = SHARED_BYTES_MAX.min(machine().config.shared_bytes);
            let bytes = usize::try_from(value).ok().filter(|b| *b <= bytes_max);
            found.shared_bytes_max = bytes.ok_or(CUresult::CUDA_ERROR_INVALID_VALUE)?;
        }
        Ok(())
    }

    fn cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        arguments: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> CUresult {
        let dims = [grid_x, grid_y, grid_z, block_x, block_y, block_z];
        launch(function, dims, shared_bytes as usize, stream, arguments, extra)
    }

    fn cuLaunchKernelEx(
        config: *const CUlaunchConfig,
        function: CUfunction,
        arguments: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> CUresult {
        let c = &*config;
        let dims = [c.gridDimX, c.gridDimY, c.gridDimZ, c.blockDimX, c.blockDimY, c.blockDimZ];
        launch(function, dims, c.sharedMemBytes as usize, c.hStream, arguments, extra)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        function: CUfunction,
        block_threads: c_int,
        shared_bytes: usize,
    ) -> CUresult {
        if !lock(functions()).contains_key(&(function as u64)) {
            return Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
        }
        let by_threads = 2048 / block_threads.max(1);
        let by_memory = ((228 << 10) / (shared_bytes + 1024)) as c_int;
        *blocks = by_threads.min(by_memory).min(32);
        Ok(())
    }
}
