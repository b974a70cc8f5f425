//! Thin wrappers of cudarc's `sys` for the tests of the software device.
//!
//! Objects are destroyed explicitly, because some tests leak them on purpose.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_void};

use cudarc::driver::sys::{self, CUevent, CUfunction, CUmodule, CUresult, CUstream};
use cudarc::nvrtc::sys as nvrtc;

/// Calls a driver function, which must succeed.
macro_rules! cuda {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: pointers point to values of the function's types; handles come from the driver.
        let code = unsafe { cudarc::driver::sys::$name($($arg),*) };
        assert_eq!(code, cudarc::driver::sys::CUresult::CUDA_SUCCESS, "{}", stringify!($name));
    }};
}

pub(crate) use cuda;

/// Returns a symbol of the software device's control interface.
pub fn control<F: Copy>(name: &str) -> F {
    // SAFETY: callers pass the type of the named symbol.
    unsafe { *sys::culib().get::<F>(name.as_bytes()).expect("the software device is loaded") }
}

/// Waits for all submitted work, then returns the findings.
pub fn findings() -> Vec<(String, String)> {
    let report = control::<extern "C" fn() -> *const std::ffi::c_char>("software_cuda_report")();
    // SAFETY: the text ends with NUL, and is never freed.
    let report: serde_json::Value = serde_json::from_slice(unsafe { CStr::from_ptr(report) }.to_bytes()).unwrap();
    let text = |f: &serde_json::Value, key: &str| f[key].as_str().unwrap().to_string();
    report["findings"].as_array().unwrap().iter().map(|f| (text(f, "kind"), text(f, "message"))).collect()
}

/// Clears the findings and sets the schedule.
pub fn begin(policy: &str, seed: u64) {
    control::<extern "C" fn()>("software_cuda_forget_findings")();
    let name = CString::new(policy).unwrap();
    // SAFETY: the type is the function's type; the text ends with NUL.
    let schedule = control::<unsafe extern "C" fn(*const std::ffi::c_char, u64) -> u32>("software_cuda_schedule");
    // SAFETY: the text ends with NUL.
    assert_eq!(unsafe { schedule(name.as_ptr(), seed) }, 1);
}

/// Returns the number of calls of a function, or of a class of functions.
pub fn calls(name: &str) -> u64 {
    let name = CString::new(name).unwrap();
    // SAFETY: the type is the function's type; the text ends with NUL.
    let count = control::<unsafe extern "C" fn(*const std::ffi::c_char) -> u64>("software_cuda_call_count");
    // SAFETY: the text ends with NUL.
    unsafe { count(name.as_ptr()) }
}

/// Compiles a text with NVRTC. Returns the image, or the compiler's log as an error.
pub fn compile(text: &str, options: &[&str]) -> Result<Vec<u8>, String> {
    let (text, name) = (CString::new(text).unwrap(), c"kernels.cu");
    let options: Vec<CString> = options.iter().map(|o| CString::new(*o).unwrap()).collect();
    let options: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    let (mut program, mut bytes) = (std::ptr::null_mut(), 0);
    // SAFETY: all texts end with NUL, and buffers have the lengths that NVRTC returns.
    unsafe {
        nvrtc::nvrtcCreateProgram(&mut program, text.as_ptr(), name.as_ptr(), 0, std::ptr::null(), std::ptr::null());
        let code = nvrtc::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        if code != nvrtc::nvrtcResult::NVRTC_SUCCESS {
            nvrtc::nvrtcGetProgramLogSize(program, &mut bytes);
            let mut log = vec![0u8; bytes];
            nvrtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
            nvrtc::nvrtcDestroyProgram(&mut program);
            return Err(String::from_utf8_lossy(&log).into_owned());
        }
        nvrtc::nvrtcGetCUBINSize(program, &mut bytes);
        let mut image = vec![0u8; bytes];
        nvrtc::nvrtcGetCUBIN(program, image.as_mut_ptr().cast());
        nvrtc::nvrtcDestroyProgram(&mut program);
        Ok(image)
    }
}

/// Makes a device current on this thread.
pub fn use_device(device: i32) {
    let mut context = std::ptr::null_mut();
    cuda!(cuInit(0));
    cuda!(cuDevicePrimaryCtxRetain(&mut context, device));
    cuda!(cuCtxSetCurrent(context));
}

/// Gives the current device access to another device's memory.
pub fn enable_peer_access(peer: sys::CUcontext) {
    // SAFETY: the context comes from the driver.
    let code = unsafe { sys::cuCtxEnablePeerAccess(peer, 0) };
    assert!(matches!(code, CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED));
}

/// Loads the kernels of the tests on the current device.
pub fn module() -> CUmodule {
    let image =
        compile(include_str!("kernels.cu"), &["--gpu-architecture=sm_90"]).unwrap_or_else(|log| panic!("{log}"));
    let mut module = std::ptr::null_mut();
    cuda!(cuModuleLoadData(&mut module, image.as_ptr().cast()));
    module
}

/// Returns a kernel of a module.
pub fn function(module: CUmodule, name: &str) -> CUfunction {
    let (mut function, name) = (std::ptr::null_mut(), CString::new(name).unwrap());
    cuda!(cuModuleGetFunction(&mut function, module, name.as_ptr()));
    function
}

/// Creates a stream that does not synchronise with the NULL stream.
pub fn stream() -> CUstream {
    let mut stream = std::ptr::null_mut();
    cuda!(cuStreamCreate(&mut stream, 1));
    stream
}

/// Creates an event that does not record times.
pub fn event() -> CUevent {
    let mut event = std::ptr::null_mut();
    cuda!(cuEventCreate(&mut event, 2));
    event
}

/// Makes `later` wait for the work submitted to `earlier` so far.
pub fn order(earlier: CUstream, later: CUstream) {
    let event = event();
    cuda!(cuEventRecord(event, earlier));
    cuda!(cuStreamWaitEvent(later, event, 0));
    cuda!(cuEventDestroy_v2(event));
}

/// Waits for a stream.
pub fn wait(stream: CUstream) {
    cuda!(cuStreamSynchronize(stream));
}

/// Allocates device memory for this number of f32.
pub fn alloc(count: usize) -> u64 {
    let mut address = 0;
    cuda!(cuMemAlloc_v2(&mut address, count * 4));
    address
}

/// Allocates device memory with these values.
pub fn filled(values: &[f32]) -> u64 {
    let address = alloc(values.len());
    cuda!(cuMemcpyHtoD_v2(address, values.as_ptr().cast(), values.len() * 4));
    address
}

/// Frees device memory after waiting for the device.
pub fn free(address: u64) {
    cuda!(cuMemFree_v2(address));
}

/// Reads device memory on a stream, and waits for the copy.
pub fn read(address: u64, count: usize, stream: CUstream) -> Vec<f32> {
    let mut values = vec![0.0f32; count];
    cuda!(cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), address, count * 4, stream));
    wait(stream);
    values
}

/// Allocates pinned memory for this number of f32.
pub fn pinned(count: usize) -> *mut f32 {
    let mut address: *mut c_void = std::ptr::null_mut();
    cuda!(cuMemHostAlloc(&mut address, count * 4, 0));
    address.cast()
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub enum Arg {
    P(u64),
    I(i32),
    L(i64),
    F(f32),
}

/// Launches a kernel and returns the driver's result.
pub fn try_launch(f: CUfunction, dims: (u32, u32), shared: u32, stream: CUstream, args: &[Arg]) -> CUresult {
    let mut words: Vec<u64> = args
        .iter()
        .map(|arg| match *arg {
            Arg::P(p) => p,
            Arg::I(i) => u64::from(i as u32),
            Arg::L(l) => l as u64,
            Arg::F(x) => u64::from(x.to_bits()),
        })
        .collect();
    let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
    // SAFETY: for each argument there is a pointer to a word that is at least as long as the argument.
    unsafe {
        let extra = std::ptr::null_mut();
        sys::cuLaunchKernel(f, dims.0, 1, 1, dims.1, 1, 1, shared, stream, pointers.as_mut_ptr(), extra)
    }
}

/// Launches a kernel with `dims.0` blocks of `dims.1` threads.
pub fn launch(f: CUfunction, dims: (u32, u32), shared: u32, stream: CUstream, args: &[Arg]) {
    assert_eq!(try_launch(f, dims, shared, stream, args), CUresult::CUDA_SUCCESS);
}

/// Calls an NCCL function, which must succeed.
macro_rules! nccl {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: pointers point to values of the function's types; handles come from the library.
        let code = unsafe { cudarc::nccl::sys::$name($($arg),*) };
        assert_eq!(code, cudarc::nccl::sys::ncclResult_t::ncclSuccess, "{}", stringify!($name));
    }};
}

pub(crate) use nccl;

/// Creates a communicator on each of the first `ranks` devices.
pub fn comms(ranks: usize) -> Vec<cudarc::nccl::sys::ncclComm_t> {
    let mut comms = vec![std::ptr::null_mut(); ranks];
    nccl!(ncclCommInitAll(comms.as_mut_ptr(), ranks as i32, std::ptr::null()));
    comms
}

/// Blocks the device in a host function until the returned sender is dropped or sends a value.
pub fn block_device(stream: CUstream) -> std::sync::mpsc::Sender<()> {
    // SAFETY: the driver calls this function with the argument passed below.
    unsafe extern "C" fn wait(receiver: *mut c_void) {
        // SAFETY: the box was created below, for this one call.
        let receiver = unsafe { Box::from_raw(receiver.cast::<std::sync::mpsc::Receiver<()>>()) };
        let _ = receiver.recv();
    }
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    cuda!(cuLaunchHostFunc(stream, Some(wait), Box::into_raw(Box::new(receiver)).cast()));
    sender
}

/// Records that the calling thread reads or writes pinned memory.
pub fn host_access(address: *mut f32, count: usize, is_write: bool) {
    let access = control::<extern "C" fn(u64, u64, u32)>("software_cuda_host_access");
    access(address as u64, count as u64 * 4, u32::from(is_write));
}

/// Returns the calling thread's clock as a token.
pub fn capture() -> u64 {
    control::<extern "C" fn() -> u64>("software_cuda_clock_capture")()
}

/// Joins a token into the calling thread's clock.
pub fn join(token: u64) {
    control::<extern "C" fn(u64)>("software_cuda_clock_join")(token);
}

/// Creates a non-blocking communicator. It may not be ready when this function returns.
pub fn join_ranks(id: cudarc::nccl::sys::ncclUniqueId, ranks: usize, rank: usize) -> cudarc::nccl::sys::ncclComm_t {
    use cudarc::nccl::sys::{ncclCommInitRankConfig, ncclConfig_t, ncclResult_t};
    let mut comm = std::ptr::null_mut();
    // SAFETY: a structure of numbers and pointers may consist of zero bytes.
    let mut config: ncclConfig_t = unsafe { std::mem::zeroed() };
    config.size = size_of_val(&config);
    config.blocking = 0;
    // SAFETY: the pointers point to local variables.
    let code = unsafe { ncclCommInitRankConfig(&mut comm, ranks as i32, id, rank as i32, &mut config) };
    assert!(matches!(code, ncclResult_t::ncclInProgress | ncclResult_t::ncclSuccess));
    comm
}

/// Polls until a communicator's last call, which returned `code`, has finished.
pub fn wait_for_call(comm: cudarc::nccl::sys::ncclComm_t, code: cudarc::nccl::sys::ncclResult_t) {
    use cudarc::nccl::sys::ncclResult_t;
    let mut state = code;
    while state == ncclResult_t::ncclInProgress {
        std::thread::yield_now();
        nccl!(ncclCommGetAsyncError(comm, &mut state));
    }
    assert_eq!(state, ncclResult_t::ncclSuccess);
}
