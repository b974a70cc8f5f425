//! Exports functions whose types match the declarations in cudarc.

/// A library's status type.
pub(crate) trait LibraryStatus: Copy {
    /// The status of a successful call.
    const OK: Self;
}

impl LibraryStatus for cudarc::driver::sys::CUresult {
    const OK: Self = Self::CUDA_SUCCESS;
}
impl LibraryStatus for cudarc::nvrtc::sys::nvrtcResult {
    const OK: Self = Self::NVRTC_SUCCESS;
}
impl LibraryStatus for cudarc::nccl::sys::ncclResult_t {
    const OK: Self = Self::ncclSuccess;
}
impl LibraryStatus for cudarc::cudnn::sys::cudnnStatus_t {
    const OK: Self = Self::CUDNN_STATUS_SUCCESS;
}
impl LibraryStatus for cudarc::cublaslt::sys::cublasStatus_t {
    const OK: Self = Self::CUBLAS_STATUS_SUCCESS;
}

/// Converts a result to a status.
pub fn status<S: LibraryStatus>(result: Result<(), S>) -> S {
    result.err().unwrap_or(S::OK)
}

/// Exports functions of a library that cudarc declares. The bodies return a `Result`, and the calls are counted. A
/// function whose signature differs from cudarc's `sys` does not compile.
macro_rules! exports {
    ($lib:ident; $(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty $body:block)*) => { $(
        /// # Safety
        ///
        /// The caller must keep the contract of the same function in NVIDIA's library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
            static CALLS: crate::findings::Counter = crate::findings::Counter::new(stringify!($name));
            CALLS.hit();
            // SAFETY: the caller keeps the contract of NVIDIA's function, so pointers are valid as it requires.
            let run = move || -> Result<(), $ret> { #[allow(unused_unsafe)] unsafe { $body } };
            crate::export::status(run())
        }
        // SAFETY: this line compares types and calls nothing.
        const _: unsafe fn($($ty),*) -> $ret = cudarc::$lib::sys::$name;
    )* };
}

/// Like [`exports!`], for functions that do not return a status.
macro_rules! plain_exports {
    ($lib:ident; $(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty $body:block)*) => { $(
        /// # Safety
        ///
        /// The caller must keep the contract of the same function in NVIDIA's library.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
            static CALLS: crate::findings::Counter = crate::findings::Counter::new(stringify!($name));
            CALLS.hit();
            $body
        }
        // SAFETY: this line compares types and calls nothing.
        const _: unsafe fn($($ty),*) -> $ret = cudarc::$lib::sys::$name;
    )* };
}

pub(crate) use exports;
pub(crate) use plain_exports;
