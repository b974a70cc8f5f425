//! Settings of the software device from the environment.

use std::path::PathBuf;
use std::time::Duration;

/// How the executor selects the next stream among those that are ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchedulePolicy {
    /// In submission order, as a simple test double would do.
    InOrder,
    /// Like `InOrder`, but work starts only after the host waits, polls or is idle.
    Lazy,
    /// At random, as determined by the seed, as soon as a stream is ready.
    Random,
    /// Like `Lazy`, but selects the latest submission that is ready. A reader may then run before its writer.
    Adversarial,
    /// Like `Lazy`, but selects the ready stream that is first in an order of all streams. The seed fixes that order.
    Starve,
}

/// All policies, each with its name in `SOFTWARE_CUDA_POLICY`.
pub const POLICIES: &[(&str, SchedulePolicy)] = &[
    ("in-order", SchedulePolicy::InOrder),
    ("lazy", SchedulePolicy::Lazy),
    ("random", SchedulePolicy::Random),
    ("adversarial", SchedulePolicy::Adversarial),
    ("starve", SchedulePolicy::Starve),
];

impl SchedulePolicy {
    /// Returns the policy with this name.
    pub fn named(name: &str) -> Option<SchedulePolicy> {
        POLICIES.iter().find(|p| p.0 == name).map(|p| p.1)
    }

    /// Whether the policy is a late policy: work starts only after the host waits, polls or is idle.
    pub fn is_late(self) -> bool {
        matches!(self, SchedulePolicy::Lazy | SchedulePolicy::Adversarial | SchedulePolicy::Starve)
    }
}

/// A fault of a device at one of its launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceFault {
    /// The kind of fault.
    pub kind: DeviceFaultKind,
    /// The device's number.
    pub device: usize,
    /// The number of the launch (kernel, product or cuDNN graph) on that device, counted from 1.
    pub launch: u64,
}

/// Kinds of [`DeviceFault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceFaultKind {
    /// From this launch on, each call on the device returns the same error.
    Kill,
    /// The launch never ends.
    Hang,
    /// The process aborts at the launch.
    Die,
}

impl DeviceFault {
    /// Parses `kill:DEVICE:LAUNCH`, `hang:DEVICE:LAUNCH` or `die:DEVICE:LAUNCH`.
    pub fn parse(text: &str) -> Option<DeviceFault> {
        let mut parts = text.split(':');
        let kind = match parts.next()? {
            "kill" => DeviceFaultKind::Kill,
            "hang" => DeviceFaultKind::Hang,
            "die" => DeviceFaultKind::Die,
            _ => return None,
        };
        let fault = DeviceFault { kind, device: parts.next()?.parse().ok()?, launch: parts.next()?.parse().ok()? };
        parts.next().is_none().then_some(fault)
    }
}

/// The environment's settings, read once.
#[derive(Clone, Debug)]
pub(crate) struct SoftwareConfig {
    /// `SOFTWARE_CUDA_DEVICES`, 1 by default.
    pub devices: usize,
    /// `SOFTWARE_CUDA_POLICY`, `random` by default.
    pub policy: SchedulePolicy,
    /// `SOFTWARE_CUDA_SEED`, 1 by default.
    pub seed: u64,
    /// `SOFTWARE_CUDA_MEMORY`: memory of each device in bytes, 8 GiB by default.
    pub memory_bytes: usize,
    /// `SOFTWARE_CUDA_SHARED`: bytes of shared memory that a block may request, 227 KiB by default.
    pub shared_bytes: usize,
    /// `SOFTWARE_CUDA_ABORT_MS`: how long ncclCommAbort takes, 0 by default.
    pub abort: Duration,
    /// `SOFTWARE_CUDA_DEADLOCK_MS`: time without progress before a deadlock is reported, 10 s by default.
    pub deadlock: Duration,
    /// `SOFTWARE_CUDA_HANG_MS`: how long a host call waits for a hung device, 60 s by default.
    pub hang: Duration,
    /// `SOFTWARE_CUDA_NCCL`: the version that the software NCCL reports, 23003 (2.30.3) by default.
    pub nccl_version: std::ffi::c_int,
    /// `SOFTWARE_CUDA_CACHE`: folder for compiled kernels.
    pub cache: PathBuf,
    /// `SOFTWARE_CUDA_REPORT`: file to which the report is written at exit.
    pub report: Option<PathBuf>,
    /// `SOFTWARE_CUDA_HOST=global`: treats all host threads as one, for programs that pass no clock tokens.
    pub one_host: bool,
    /// `SOFTWARE_CUDA_FAULT`: the fault to inject.
    pub fault: Option<DeviceFault>,
    /// `SOFTWARE_CUDA_NODE`: name of this process's node. Processes with the same node name share the node's devices.
    pub node: String,
    /// `SOFTWARE_CUDA_TRACE=1`: prints each operation when it is executed.
    pub trace: bool,
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")),
        Err(_) => default,
    }
}

impl SoftwareConfig {
    /// Reads the environment. Panics on an invalid value, because a test that ignores a setting may check nothing.
    pub fn from_environment() -> SoftwareConfig {
        let text = |name: &str| std::env::var(name).ok();
        let policy = text("SOFTWARE_CUDA_POLICY").map(|name| {
            SchedulePolicy::named(&name).unwrap_or_else(|| panic!("SOFTWARE_CUDA_POLICY: unknown policy {name}"))
        });
        let fault = text("SOFTWARE_CUDA_FAULT").map(|f| {
            DeviceFault::parse(&f)
                .unwrap_or_else(|| panic!("SOFTWARE_CUDA_FAULT: expected kill|hang|die:DEVICE:LAUNCH, got {f}"))
        });
        SoftwareConfig {
            devices: number("SOFTWARE_CUDA_DEVICES", 1) as usize,
            policy: policy.unwrap_or(SchedulePolicy::Random),
            seed: number("SOFTWARE_CUDA_SEED", 1),
            memory_bytes: number("SOFTWARE_CUDA_MEMORY", 8 << 30) as usize,
            shared_bytes: number("SOFTWARE_CUDA_SHARED", 227 << 10) as usize,
            abort: Duration::from_millis(number("SOFTWARE_CUDA_ABORT_MS", 0)),
            deadlock: Duration::from_millis(number("SOFTWARE_CUDA_DEADLOCK_MS", 10_000)),
            hang: Duration::from_millis(number("SOFTWARE_CUDA_HANG_MS", 60_000)),
            nccl_version: number("SOFTWARE_CUDA_NCCL", 23_003) as std::ffi::c_int,
            cache: text("SOFTWARE_CUDA_CACHE")
                .map_or_else(|| std::env::temp_dir().join("shardflow-software-cuda"), PathBuf::from),
            report: text("SOFTWARE_CUDA_REPORT").map(PathBuf::from),
            one_host: text("SOFTWARE_CUDA_HOST").as_deref() == Some("global"),
            fault,
            node: text("SOFTWARE_CUDA_NODE").unwrap_or_default(),
            trace: text("SOFTWARE_CUDA_TRACE").as_deref() == Some("1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_parsed() {
        let fault = DeviceFault { kind: DeviceFaultKind::Kill, device: 1, launch: 20 };
        assert_eq!(DeviceFault::parse("kill:1:20"), Some(fault));
        assert_eq!(DeviceFault::parse("hang:0:3").map(|f| f.kind), Some(DeviceFaultKind::Hang));
        assert_eq!(
            [DeviceFault::parse("kill:1"), DeviceFault::parse("burn:1:2"), DeviceFault::parse("kill:1:2:3")],
            [None; 3]
        );
    }
}
