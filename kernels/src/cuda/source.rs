//! The source text of the CUDA modules.

/// A module: the kernels that are compiled to one cubin.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Name of its `.cu` file, without the extension.
    pub name: &'static str,
    /// The complete source: CUDA C++17 that includes `cuda_bf16.h`, and `mma.h` if it uses tensor cores.
    pub text: &'static str,
}

/// Prepends `common.cuh` to each module, as kernels/cuda/build_cubins.py does.
macro_rules! module {
    ($name:literal) => {
        Module { name: $name, text: concat!(include_str!("common.cuh"), include_str!(concat!($name, ".cu"))) }
    };
}

/// All modules.
pub const MODULES: [Module; 12] = [
    module!("attention_bf16"),
    module!("attention_f32"),
    module!("attention_plain"),
    module!("collective"),
    module!("elementwise"),
    module!("embedding"),
    module!("loss"),
    module!("norm"),
    module!("optimizer"),
    module!("reduce"),
    module!("region"),
    module!("spin"),
];

impl Module {
    /// Names of the module's kernels, for cuModuleGetFunction.
    pub fn functions(&self) -> impl Iterator<Item = &'static str> {
        const KERNEL: &str = "extern \"C\" __global__ void ";
        self.text.split(KERNEL).skip(1).filter_map(|after| {
            let after = match after.strip_prefix("__launch_bounds__(") {
                Some(bounded) => bounded.split_once(')')?.1.trim_start(),
                None => after,
            };
            after.split_once('(').map(|(name, _)| name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_names_are_unique() {
        let mut names: Vec<_> = MODULES.iter().flat_map(Module::functions).collect();
        let plain = |name: &&str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        assert!(names.len() > 80 && names.iter().all(plain), "{names:?}");
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_module_file_is_listed() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cuda");
        let names = std::fs::read_dir(folder).expect("it exists").map(|entry| entry.expect("it is read").file_name());
        let mut names: Vec<_> = names.filter_map(|name| Some(name.to_str()?.strip_suffix(".cu")?.to_owned())).collect();
        names.sort();
        assert_eq!(names, MODULES.map(|module| module.name));
    }
}
