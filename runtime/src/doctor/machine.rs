//! Cores, memory, limits and kernel, read from `/proc` and `/sys`.

use std::fs;
use std::thread::available_parallelism;

use super::finding::{Finding, FindingStatus, not_ok, ok, size};
use shardflow_job::machine::{FreeMemory, affinity, cores_text, free_memory, meminfo};

/// Recommended free shared memory, in bytes. The registers between the processes of one node may not fit into less.
const SHM_BYTES_MIN: u64 = 1 << 30;
/// Recommended limit of open files. With a lower limit, many processes may not be able to connect.
const FILES_MIN: u64 = 4096;
/// The limit of open files that the hint suggests.
const FILES_WANTED: u64 = 65536;
/// Oldest supported kernel: `pidfd_open` needs 5.3, `memfd_create` 3.17.
const KERNEL_MIN: (u32, u32) = (5, 3);

pub(super) fn examine() -> Vec<Finding> {
    [cores, vector_units, memory, memory_budget, huge_pages, shared_memory, open_files, kernel].map(|f| f()).into()
}

fn poor(name: &'static str, value: impl Into<String>, hint: &str) -> Finding {
    not_ok(name, FindingStatus::Poor, value, hint)
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn cores() -> Finding {
    let usable = available_parallelism().map_or(1, usize::from);
    let info = text("/proc/cpuinfo");
    let all = info.lines().filter(|line| line.starts_with("processor")).count();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown model", |(_, name)| name);
    // A cgroup's limit on CPU time may leave fewer usable cores than the affinity mask has.
    let affinity = cores_text(&affinity());
    ok("cores", format!("{usable} usable of {} ({model}); affinity {affinity}", all.max(usable)))
}

fn vector_units() -> Finding {
    #[cfg(target_arch = "x86_64")]
    {
        let units = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ];
        let names: Vec<&str> = units.iter().filter(|unit| unit.1).map(|unit| unit.0).collect();
        if units[0].1 && units[1].1 {
            return ok("vector units", names.join(" "));
        }
        poor("vector units", format!("only {names:?}"), "use a CPU with avx2 and fma: kernels run several times faster")
    }
    #[cfg(not(target_arch = "x86_64"))]
    ok("vector units", format!("the vector units of {}", std::env::consts::ARCH))
}

fn memory() -> Finding {
    let info = text("/proc/meminfo");
    match (meminfo(&info, "MemTotal"), meminfo(&info, "MemAvailable")) {
        (Some(total), Some(available)) => ok("memory", format!("{} available of {}", size(available), size(total))),
        _ => poor("memory", "unknown", "mount /proc"),
    }
}

/// The memory limit against which a session checks plans for CPU devices.
fn memory_budget() -> Finding {
    match free_memory() {
        Some(FreeMemory { bytes, bound }) => {
            ok("memory budget", format!("{} for the processes of a job on this node: {bound}", size(bytes)))
        }
        None => poor("memory budget", "unknown", "mount /proc, or set a budget with CompileOptions::memory_bytes"),
    }
}

fn huge_pages() -> Finding {
    let reserved = meminfo(&text("/proc/meminfo"), "HugePages_Total").unwrap_or(0);
    let transparent = text("/sys/kernel/mm/transparent_hugepage/enabled");
    let transparent = transparent.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("absent", |t| t.0);
    ok("huge pages", format!("{reserved} reserved; transparent: {transparent}"))
}

fn shared_memory() -> Finding {
    const HINT: &str =
        "in a container, increase it: use docker run --shm-size=8g, or mount an emptyDir of medium Memory at /dev/shm";
    match rustix::fs::statvfs("/dev/shm") {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let value = format!("{} free in /dev/shm", size(free));
            if free < SHM_BYTES_MIN { poor("shared memory", value, HINT) } else { ok("shared memory", value) }
        }
        Err(error) => poor("shared memory", format!("/dev/shm: {error}"), HINT),
    }
}

fn open_files() -> Finding {
    let limits = text("/proc/self/limits");
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap_or("");
    let mut words = line.split_whitespace();
    let (soft, hard) = (words.next().unwrap_or("unknown"), words.next().unwrap_or("unknown"));
    let value = if soft == hard { soft.to_owned() } else { format!("{soft}; a user can raise it to {hard}") };
    match (soft.parse::<u64>(), hard.parse::<u64>()) {
        (Ok(number), Ok(most)) if number < FILES_MIN && most < FILES_MIN => {
            poor("open files", value, &format!("raise the hard limit to {FILES_WANTED}, for example in limits.conf"))
        }
        (Ok(number), most) if number < FILES_MIN => {
            let files = most.unwrap_or(FILES_WANTED).min(FILES_WANTED);
            poor("open files", value, &format!("run `ulimit -n {files}` before the launch"))
        }
        _ => ok("open files", value),
    }
}

fn kernel() -> Finding {
    let release = text("/proc/sys/kernel/osrelease");
    let release = release.trim();
    match version(release) {
        Some(found) if found >= KERNEL_MIN => ok("kernel", release),
        _ => poor("kernel", release, &format!("upgrade to Linux {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1)),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_parsed() {
        assert_eq!(version("6.1.0-13-amd64"), Some((6, 1)));
        assert!(version("4.19.0") < Some(KERNEL_MIN) && version("x").is_none());
    }
}
