//! GPUs, their driver and its libraries, as the CUDA backend finds them: what it cannot use it says here in the same words.

use shardflow_kernels::cuda::library::DeviceFacts;
use shardflow_kernels::cuda::probe;
use shardflow_kernels::error::KernelError;

use super::{Finding, FindingStatus, size};

pub(super) fn examine() -> Vec<Finding> {
    let probe = probe();
    let mut found = Vec::new();
    let devices = match &probe.driver {
        Err(error) => {
            found.push(refused("driver", error));
            Vec::new()
        }
        Ok(version) => {
            found.push(Finding::new("gpu", "driver", FindingStatus::Ok, format!("CUDA {version}")));
            probe.devices
        }
    };
    if devices.is_empty() {
        let hint = "needs a GPU and NVIDIA's driver; CUDA_VISIBLE_DEVICES may hide some";
        found.push(Finding::new("gpu", "devices", FindingStatus::Absent, "none").hint(hint));
    }
    found.extend(devices.iter().enumerate().map(|(ordinal, facts)| device(ordinal, facts)));
    found.extend(probe.libraries.iter().map(|(library, version)| match version {
        Ok(version) => Finding::new("gpu", library.name(), FindingStatus::Ok, version),
        Err(error) => refused(library.name(), error).hint(library.hint()),
    }));
    found
}

fn device(ordinal: usize, facts: &Result<DeviceFacts, KernelError>) -> Finding {
    match facts {
        Ok(facts) => {
            let DeviceFacts { name, capability: (major, minor), bytes_total } = facts;
            // What is free of it only an open context tells, which takes memory itself, and longer than all the rest.
            let memory = size(*bytes_total as u64);
            Finding::new("gpu", "device", FindingStatus::Ok, format!("{ordinal}: {name}, sm_{major}{minor}, {memory}"))
        }
        Err(error) => refused("device", error),
    }
}

/// What the backend would say, apart from the advice.
fn refused(name: &'static str, error: &KernelError) -> Finding {
    match error {
        KernelError::Unavailable { what, hint } => Finding::new("gpu", name, FindingStatus::Absent, what).hint(hint),
        other => {
            let hint = "run nvidia-smi: where that fails, too, it is the driver's or the device's fault";
            Finding::new("gpu", name, FindingStatus::Poor, other.to_string()).hint(hint)
        }
    }
}

#[cfg(test)]
mod tests {
    use shardflow_kernels::cuda::library::Library;

    use super::*;

    #[test]
    fn what_is_missing_comes_with_what_to_do() {
        let found = examine();
        let named = |name: &str| found.iter().find(|finding| finding.name == name);
        assert!(named("driver").is_some());
        for library in Library::ALL {
            let finding = named(library.name()).expect("every library is looked for");
            let told = finding.hint.as_deref().is_some_and(|hint| hint.contains("pip install"));
            assert!(finding.status == FindingStatus::Ok || told, "{finding:?}");
        }
        let old = KernelError::Unavailable { what: "too old".into(), hint: "get a new one".into() };
        let finding = refused("driver", &old);
        assert_eq!((finding.value.as_str(), finding.hint.as_deref()), ("too old", Some("get a new one")));
    }
}
