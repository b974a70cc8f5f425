//! Reports GPUs, their driver and libraries as the CUDA backend finds them. Errors have the backend's own texts.

use shardflow_kernels::cuda::DeviceFacts;
use shardflow_kernels::cuda::probe;
use shardflow_kernels::error::KernelError;

use super::finding::{Finding, FindingStatus, not_ok, ok, size};

pub(super) fn examine() -> Vec<Finding> {
    let probe = probe();
    let (driver, devices) = match &probe.driver {
        Err(error) => (unusable("driver", error), Vec::new()),
        Ok(version) => (ok("driver", format!("CUDA {version}")), probe.devices),
    };
    let mut found = vec![driver];
    if devices.is_empty() {
        let hint = "CUDA needs a GPU and NVIDIA's driver; check that CUDA_VISIBLE_DEVICES hides no devices";
        found.push(not_ok("devices", FindingStatus::Absent, "none", hint));
    }
    found.extend(devices.iter().enumerate().map(|(ordinal, facts)| device(ordinal, facts)));
    found.extend(probe.libraries.iter().map(|(library, version)| match version {
        Ok(version) => ok(library.name(), version),
        Err(error) => Finding { hint: Some(library.hint().into()), ..unusable(library.name(), error) },
    }));
    found
}

fn device(ordinal: usize, facts: &Result<DeviceFacts, KernelError>) -> Finding {
    match facts {
        Ok(facts) => {
            let DeviceFacts { name, capability: (major, minor), bytes_total } = facts;
            // Free memory is not reported: its query needs an open context, and opening one takes memory and time.
            let memory = size(*bytes_total as u64);
            ok("device", format!("{ordinal}: {name}, sm_{major}{minor}, {memory}"))
        }
        Err(error) => unusable("device", error),
    }
}

/// Converts an error of the backend to a finding with a hint.
fn unusable(name: &'static str, error: &KernelError) -> Finding {
    match error {
        KernelError::Unavailable { what, hint } => not_ok(name, FindingStatus::Absent, what, hint),
        other => {
            let hint = "run nvidia-smi: if it fails too, the fault is in the driver or the device";
            not_ok(name, FindingStatus::Poor, other.to_string(), hint)
        }
    }
}

#[cfg(test)]
mod tests {
    use shardflow_kernels::cuda::library::Library;

    use super::*;

    #[test]
    fn a_missing_library_has_a_hint() {
        let found = examine();
        let named = |name: &str| found.iter().find(|finding| finding.name == name);
        assert!(named("driver").is_some());
        for library in Library::ALL {
            let finding = named(library.name()).expect("every library has a finding");
            let has_hint = finding.hint.as_deref().is_some_and(|hint| hint.contains("pip install"));
            assert!(finding.status == FindingStatus::Ok || has_hint, "{finding:?}");
        }
        let old = KernelError::Unavailable { what: "too old".into(), hint: "get a new one".into() };
        let finding = unusable("driver", &old);
        assert_eq!((finding.value.as_str(), finding.hint.as_deref()), ("too old", Some("get a new one")));
    }
}
