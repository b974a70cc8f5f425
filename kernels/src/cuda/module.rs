//! Looks up kernels by name. A module is loaded when its first kernel is requested: from a cubin for the GPU's
//! architecture, if one is installed. Otherwise, the module is compiled from source at run time.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs};

use cudarc::driver::sys::{self, CUresult};
use cudarc::nvrtc::sys as nvrtc;
use parking_lot::Mutex;

use super::context::{Context, Raw};
use super::library::Library;
use super::source::{MODULES, Module};
use super::status::static_text;
use super::step::SHARED_BYTES_DEFAULT;
use crate::error::{KernelError, Result};

/// Environment variable for a directory of cubins (`NAME.ARCH.cubin`), searched before `cubins` next to the program.
pub const CUBINS: &str = "SHARDFLOW_CUBINS";

#[derive(Debug)]
pub(crate) struct Modules {
    context: Arc<Context>,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Raw<sys::CUmodule>>,
    functions: HashMap<&'static str, Function>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    pub(crate) handle: Raw<sys::CUfunction>,
    /// The limit of dynamic shared memory that is set on the function, in bytes.
    shared_bytes: u32,
}

impl Modules {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self { context: context.clone(), loaded: Mutex::default() }
    }

    /// Returns the kernel and allows it `shared_bytes` bytes of dynamic shared memory. Requires a bound context.
    pub(crate) fn function(&self, name: &'static str, shared_bytes: u32) -> Result<Function> {
        let mut loaded = self.loaded.lock();
        let place = format!("kernel {name} on {}", self.context.place());
        let mut function = match loaded.functions.get(name) {
            Some(function) => *function,
            None => {
                let module = MODULES.iter().find(|module| module.functions().any(|function| function == name));
                let module = module.ok_or_else(|| {
                    KernelError::arguments(name, "kernel", "a kernel of the backend's modules", "an unknown name")
                })?;
                let handle = match loaded.modules.get(module.name) {
                    Some(handle) => *handle,
                    None => self.load(module)?,
                };
                loaded.modules.insert(module.name, handle);
                let mut function = std::ptr::null_mut();
                let c_name = CString::new(name).unwrap_or_default();
                // SAFETY: the module is live and the name ends with 0. The call writes to a local.
                let result = unsafe { sys::cuModuleGetFunction(&mut function, handle.0, c_name.as_ptr()) };
                self.context.check(result, "cuModuleGetFunction", &place)?;
                Function { handle: Raw(function), shared_bytes: SHARED_BYTES_DEFAULT }
            }
        };
        if shared_bytes > function.shared_bytes {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is live.
            let result = unsafe { sys::cuFuncSetAttribute(function.handle.0, attribute, shared_bytes as i32) };
            self.context.check(result, "cuFuncSetAttribute", &place)?;
            function.shared_bytes = shared_bytes;
        }
        loaded.functions.insert(name, function);
        Ok(function)
    }

    /// Loads all kernels of a module. Requires the context to be bound.
    pub(crate) fn prepare(&self, module: &str) -> Result<()> {
        let mut functions = MODULES.iter().filter(|known| known.name == module).flat_map(Module::functions);
        functions.try_for_each(|function| self.function(function, 0).map(drop))
    }

    fn load(&self, module: &Module) -> Result<Raw<sys::CUmodule>> {
        let capability = self.context.capability;
        for path in cubins(module.name, capability) {
            if let Ok(image) = fs::read(&path)
                && let Ok(handle) = self.load_image(&image, &path.display().to_string())
            {
                return Ok(handle);
            }
        }
        let image = compile(module, capability)?;
        self.load_image(&image, module.name)
    }

    fn load_image(&self, image: &[u8], name: &str) -> Result<Raw<sys::CUmodule>> {
        let mut handle = std::ptr::null_mut();
        // PTX is text and must end with 0.
        let mut image = image.to_vec();
        image.push(0);
        // SAFETY: the image is a cubin, which contains its size, or PTX, which ends with 0. The call writes to a local.
        let result: CUresult = unsafe { sys::cuModuleLoadData(&mut handle, image.as_ptr().cast()) };
        self.context.check(result, "cuModuleLoadData", &format!("module {name} on {}", self.context.place()))?;
        Ok(Raw(handle))
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        if self.context.bind_to_drop() {
            for module in self.loaded.get_mut().modules.values() {
                // SAFETY: the module was loaded here and is unloaded once. All streams have ended.
                let _ = unsafe { sys::cuModuleUnload(module.0) };
            }
        }
    }
}

/// Candidate paths of a module's cubin, best first. A cubin with the suffix `a` runs only on its exact architecture.
fn cubins(module: &str, (major, minor): (i32, i32)) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = env::var_os(CUBINS).map(PathBuf::from).into_iter().collect();
    let program_folder = env::current_exe().ok().and_then(|path| Some(path.parent()?.join("cubins")));
    folders.extend(program_folder);
    let mut targets = vec![format!("sm_{major}{minor}a"), format!("sm_{major}{minor}")];
    // A cubin also runs on later minor revisions of its architecture.
    targets.extend((0..minor).rev().map(|minor| format!("sm_{major}{minor}")));
    let of = |folder: &PathBuf| {
        let folder = folder.clone();
        targets.iter().map(move |target| folder.join(format!("{module}.{target}.cubin"))).collect::<Vec<_>>()
    };
    folders.iter().flat_map(of).collect()
}

/// Headers that kernel sources include, directly or not, each with the Python package of CUDA 13 that contains it.
const HEADERS: [(&str, &str); 2] = [("cuda_bf16.h", "nvidia-cuda-runtime"), ("crt/host_defines.h", "nvidia-cuda-crt")];

/// All existing header directories. A toolkit has one; the Python packages may have several.
fn includes() -> Vec<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    let mut folders: Vec<PathBuf> = homes.map(|home| Path::new(&home).join("include")).collect();
    // Wheels and toolkits keep headers next to the directory of NVRTC, which is loaded by now.
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let library =
        maps.lines().filter_map(|line| line.split_whitespace().last()).find(|path| path.contains("libnvrtc.so"));
    folders.extend(library.and_then(|path| Some(Path::new(path).parent()?.parent()?.join("include"))));
    folders.push(PathBuf::from("/usr/local/cuda/include"));
    folders.retain(|folder| HEADERS.iter().any(|(header, _)| folder.join(header).is_file()));
    folders
}

/// An install hint for headers that are in none of the folders; `None` if all are found.
fn missing_headers(folders: &[PathBuf]) -> Option<String> {
    let found = |header: &str| folders.iter().any(|folder| folder.join(header).is_file());
    let (headers, packages): (Vec<_>, Vec<_>) = HEADERS.into_iter().filter(|(header, _)| !found(header)).unzip();
    let (names, packages) = (headers.join(", "), packages.join(" "));
    let hint = format!("{names} not found: pip install {packages}, or set CUDA_HOME to a toolkit of CUDA 13");
    (!headers.is_empty()).then_some(hint)
}

fn compile(module: &Module, (major, minor): (i32, i32)) -> Result<Vec<u8>> {
    Library::Nvrtc.require()?;
    let text = CString::new(module.text).unwrap_or_default();
    let (file, target) = (format!("{}.cu", module.name), format!("sm_{major}{minor}"));
    let name = CString::new(file.clone()).unwrap_or_default();
    let mut options = vec![format!("--gpu-architecture={target}"), "--std=c++17".to_owned()];
    // Load the library so that `includes` finds its directory.
    // SAFETY: NVRTC is installed, as `require` has checked. The call writes to temporaries.
    let _ = unsafe { nvrtc::nvrtcVersion(&mut 0, &mut 0) };
    let folders = includes();
    options.extend(folders.iter().map(|folder| format!("--include-path={}", folder.display())));
    let options: Vec<CString> = options.into_iter().filter_map(|option| CString::new(option).ok()).collect();
    let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
    let failed = |result: nvrtc::nvrtcResult, call: &'static str| {
        // SAFETY: the call returns a static string.
        let text = unsafe { static_text(nvrtc::nvrtcGetErrorString(result)) };
        let place = format!("{file} for {target}");
        Err(KernelError::Cuda { place, call, code: result as u32, name: format!("{result:?}"), text })
    };
    const SUCCESS: nvrtc::nvrtcResult = nvrtc::nvrtcResult::NVRTC_SUCCESS;
    let mut program = std::ptr::null_mut();
    let (none, no_names) = (std::ptr::null(), std::ptr::null());
    // SAFETY: the strings end with 0 and outlive the call. There are no headers. The call writes to a local.
    let result = unsafe { nvrtc::nvrtcCreateProgram(&mut program, text.as_ptr(), name.as_ptr(), 0, none, no_names) };
    if result != SUCCESS {
        return failed(result, "nvrtcCreateProgram");
    }
    // SAFETY: the program is live and destroyed once. The options end with 0. Buffers have the sizes that NVRTC
    // reports.
    unsafe {
        let compile_status = nvrtc::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        let (mut size, mut image) = (0, Vec::new());
        let result = if compile_status == SUCCESS {
            let status = nvrtc::nvrtcGetCUBINSize(program, &mut size);
            image.resize(size, 0u8);
            let status =
                if status == SUCCESS { nvrtc::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()) } else { status };
            if status == SUCCESS { Ok(image) } else { failed(status, "nvrtcGetCUBIN") }
        } else {
            let _ = nvrtc::nvrtcGetProgramLogSize(program, &mut size);
            image.resize(size, 0u8);
            if size > 0 {
                let _ = nvrtc::nvrtcGetProgramLog(program, image.as_mut_ptr().cast());
            }
            let log = String::from_utf8_lossy(&image).trim_end_matches('\0').trim().to_owned();
            let log = if log.is_empty() { format!("{compile_status:?}") } else { log };
            // The hint goes first, since the compiler's log may be long.
            let log = missing_headers(&folders).into_iter().chain([log]).collect::<Vec<_>>().join("\n");
            Err(KernelError::Compile { file: file.clone(), target: target.clone(), log })
        };
        let _ = nvrtc::nvrtcDestroyProgram(&mut program);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The headers of CUDA 13 are in two Python packages. Nothing compiles if only one of the two is installed.
    #[test]
    fn the_hint_names_missing_headers_and_their_packages() {
        let root = env::temp_dir().join(format!("shardflow-headers-{}", std::process::id()));
        let [runtime, crt] = ["runtime", "crt"].map(|name| root.join(name));
        fs::create_dir_all(runtime.join("crt")).expect("the test folder is writable");
        fs::create_dir_all(crt.join("crt")).expect("the test folder is writable");
        fs::write(runtime.join("cuda_bf16.h"), "").expect("the test folder is writable");
        fs::write(crt.join("crt/host_defines.h"), "").expect("the test folder is writable");
        let hint = missing_headers(std::slice::from_ref(&runtime));
        let expected =
            "crt/host_defines.h not found: pip install nvidia-cuda-crt, or set CUDA_HOME to a toolkit of CUDA 13";
        assert_eq!(hint.as_deref(), Some(expected));
        assert_eq!(missing_headers(&[runtime, crt]), None);
        let none = missing_headers(&[]).expect("both packages are missing");
        assert!(none.contains("pip install nvidia-cuda-runtime nvidia-cuda-crt,"), "{none}");
        fs::remove_dir_all(root).expect("the test folder is writable");
    }

    #[test]
    fn cubins_of_the_exact_architecture_come_first() {
        let names = |capability| {
            let paths = cubins("norm", capability).into_iter();
            paths.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect::<Vec<_>>()
        };
        assert_eq!(names((9, 0)), ["norm.sm_90a.cubin", "norm.sm_90.cubin"]);
        let expected = ["norm.sm_82a.cubin", "norm.sm_82.cubin", "norm.sm_81.cubin", "norm.sm_80.cubin"];
        assert_eq!(names((8, 2)), expected);
    }
}
