//! Free memory of the machine and within cgroup limits.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use serde::{Deserialize, Serialize};

/// The limit that determines a process's free memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum MemoryBound {
    /// The whole machine: `MemAvailable` of `/proc/meminfo`.
    Machine,
    /// The process's memory cgroup, or one of its ancestors. `used_bytes` excludes reclaimable page cache.
    Cgroup { folder: PathBuf, limit_bytes: u64, used_bytes: u64 },
}

impl fmt::Display for MemoryBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => write!(f, "MemAvailable of /proc/meminfo"),
            Self::Cgroup { folder, limit_bytes, used_bytes } => {
                write!(f, "cgroup {}: limit {limit_bytes} bytes, {used_bytes} bytes in use", folder.display())
            }
        }
    }
}

/// Device and inode of a memory cgroup's folder. All processes see the same values, even if the path differs.
pub type CgroupId = (u64, u64);

impl MemoryBound {
    /// The id of the cgroup, or `None` for the machine.
    pub fn cgroup(&self) -> Option<CgroupId> {
        let Self::Cgroup { folder, .. } = self else { return None };
        fs::metadata(folder).map(|data| (data.dev(), data.ino())).ok()
    }
}

/// A process's cgroups, and the memory that the process needs in addition to the memory of its plan.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryClaim {
    /// The limited cgroups that count the process's memory, at most [`CGROUPS_MAX`].
    pub cgroups: Vec<CgroupId>,
    /// Bytes that the process allocates in addition to the memory of its plan.
    pub extra_bytes: u64,
}

/// Maximum number of a process's cgroups that are compared. Of more, those with the least free memory are kept.
pub const CGROUPS_MAX: usize = 16;

/// Memory that this process could allocate now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeMemory {
    /// Free bytes under the tightest bound.
    pub bytes: u64,
    /// The tightest bound.
    pub bound: MemoryBound,
}

/// The smallest free memory of the machine and of this process's memory cgroups. `None` if `/proc` does not report it.
pub fn free_memory() -> Option<FreeMemory> {
    memory_bounds().into_iter().next()
}

/// Free memory of the machine and of each limited cgroup of this process, least first.
pub fn memory_bounds() -> Vec<FreeMemory> {
    memory_bounds_by(&|path| fs::read_to_string(path).ok())
}

/// Like [`memory_bounds`], but gets the content of files from `read`.
fn memory_bounds_by(read: &dyn Fn(&Path) -> Option<String>) -> Vec<FreeMemory> {
    let text = |path: &str| read(Path::new(path)).unwrap_or_default();
    let machine = meminfo(&text("/proc/meminfo"), "MemAvailable");
    let machine = machine.map(|bytes| FreeMemory { bytes, bound: MemoryBound::Machine });
    let cgroups = cgroups(&text("/proc/self/cgroup"), &text("/proc/self/mountinfo"), read);
    let mut bounds: Vec<_> = machine.into_iter().chain(cgroups).filter(|free| free.bytes < UNLIMITED_BYTES).collect();
    bounds.sort_by_key(|free| free.bytes);
    bounds
}

/// A larger limit counts as no limit: cgroup version 1 reports a limit near 2^63 for an unlimited cgroup.
const UNLIMITED_BYTES: u64 = 1 << 60;

/// Returns a value of `/proc/meminfo` in bytes.
pub fn meminfo(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?.trim();
    let (number, unit) = value.split_once(' ').unwrap_or((value, ""));
    number.parse::<u64>().ok()?.checked_mul(if unit == "kB" { 1024 } else { 1 })
}

/// Names in a memory cgroup: limit file, usage file, and the prefix of `memory.stat` lines that include descendants.
const V1: [&str; 3] = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_"];
const V2: [&str; 3] = ["memory.max", "memory.current", ""];

/// Free memory of each limited memory cgroup, from the process's own cgroup up to the root. `cgroups` and `mounts` are
/// the contents of `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn cgroups(cgroups: &str, mounts: &str, read: &dyn Fn(&Path) -> Option<String>) -> Vec<FreeMemory> {
    let mut out = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (kind, files) = match controllers {
            "" => ("cgroup2", V2),
            names if names.split(',').any(|name| name == "memory") => ("cgroup", V1),
            _ => continue,
        };
        let Some((root, mount)) = mounts.lines().find_map(|line| mount_of(line, kind)) else { continue };
        // In a container, `path` may be the host's path, which is not below `root`. Then the mount point itself is the
        // process's own cgroup.
        let folder =
            Path::new(path).strip_prefix(&root).map_or(mount.clone(), |below| mount.join(below).components().collect());
        for (index, folder) in folder.ancestors().take_while(|folder| folder.starts_with(&mount)).enumerate() {
            // In version 1, a cgroup's usage does not include that of its children if this file contains 0.
            let is_flat = read(&folder.join("memory.use_hierarchy")).is_some_and(|text| text.trim() == "0");
            if index > 0 && is_flat {
                break;
            }
            out.extend(cgroup(folder, files, read));
        }
    }
    out
}

/// Returns the mounted root and the mount point, if this line of `mountinfo` mounts a hierarchy with memory limits.
fn mount_of(line: &str, kind: &str) -> Option<(PathBuf, PathBuf)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    let options = (filesystem.next() == Some(kind)).then(|| filesystem.nth(1))?.unwrap_or_default();
    if kind == "cgroup" && !options.split(',').any(|option| option == "memory") {
        return None;
    }
    let mut paths = mount.split(' ').skip(3).map(|path| PathBuf::from(path.replace("\\040", " ")));
    Some((paths.next()?, paths.next()?))
}

fn cgroup(folder: &Path, files: [&str; 3], read: &dyn Fn(&Path) -> Option<String>) -> Option<FreeMemory> {
    let [limit, usage, prefix] = files;
    let number = |name: &str| read(&folder.join(name))?.trim().parse::<u64>().ok();
    // Without a limit, version 2 reports `max`, and version 1 a number near 2^63, which is never the tightest bound.
    let (limit_bytes, usage) = (number(limit)?, number(usage)?);
    let stat = read(&folder.join("memory.stat")).unwrap_or_default();
    // Page cache counts as available, as it does in `MemAvailable`.
    let cached = |name: &str| {
        let value = stat.lines().find_map(|line| line.strip_prefix(prefix)?.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let used_bytes = usage.saturating_sub(cached("inactive_file")).saturating_sub(cached("active_file"));
    let bound = MemoryBound::Cgroup { folder: folder.into(), limit_bytes, used_bytes };
    Some(FreeMemory { bytes: limit_bytes.saturating_sub(used_bytes), bound })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const NONE_V1: &str = "9223372036854771712";
    const MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
";

    /// Returns the least free memory, and the folder of the cgroup that has it. `files` has pairs of `(path, text)`.
    fn least(own: &str, mounts: &str, files: &[(&str, &str)]) -> Option<(u64, String)> {
        let files: BTreeMap<PathBuf, &str> = files.iter().map(|(path, text)| (path.into(), *text)).collect();
        let read = |path: &Path| files.get(path).map(|text| (*text).to_owned());
        let least = cgroups(own, mounts, &read).into_iter().min_by_key(|free| free.bytes)?;
        let MemoryBound::Cgroup { folder, .. } = least.bound else { panic!("{least:?}") };
        Some((least.bytes, folder.display().to_string()))
    }

    #[test]
    fn version_1_counts_each_ancestor_and_no_page_cache() {
        let own = "9:name=systemd:/a/b\n4:memory:/a/b\n1:cpu,cpuacct:/a/b\n0::/\n";
        let a = "/sys/fs/cgroup/memory/a";
        let mut files = vec![
            ("/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", NONE_V1),
            ("/sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "100\n"),
            ("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "5000\n"),
            ("/sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1500\n"),
            (
                "/sys/fs/cgroup/memory/a/memory.stat",
                "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 300\n",
            ),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9000"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "2000"),
        ];
        assert_eq!(least(own, MOUNTS, &files), Some((4000, a.into())));
        // With this setting the parent's usage does not include the child. The child's own limit still counts.
        files.push(("/sys/fs/cgroup/memory/a/b/memory.use_hierarchy", "0\n"));
        files.push(("/sys/fs/cgroup/memory/a/memory.use_hierarchy", "0\n"));
        assert_eq!(least(own, MOUNTS, &files).unwrap().0, NONE_V1.parse::<u64>().unwrap() - 100);
        files.truncate(7);
        files.push(("/sys/fs/cgroup/memory/a/memory.use_hierarchy", "1\n"));
        assert_eq!(least(own, MOUNTS, &files), Some((4000, a.into())));
        files[3].1 = "9999";
        assert_eq!(least(own, MOUNTS, &files), Some((0, a.into())), "usage above a lowered limit");
    }

    #[test]
    fn version_2_counts_each_ancestor() {
        let mounts = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        let files = [
            ("/sys/fs/cgroup/job/step/task/memory.max", "max\n"),
            ("/sys/fs/cgroup/job/step/task/memory.current", "10\n"),
            ("/sys/fs/cgroup/job/step/memory.max", "7000\n"),
            ("/sys/fs/cgroup/job/step/memory.current", "10\n"),
            ("/sys/fs/cgroup/job/memory.max", "8000\n"),
            ("/sys/fs/cgroup/job/memory.current", "6000\n"),
            ("/sys/fs/cgroup/job/memory.stat", "anon 5000\nfile 900\ninactive_file 400\nactive_file 500\n"),
        ];
        let task = "0::/job/step/task\n";
        assert_eq!(least(task, mounts, &files), Some((2900, "/sys/fs/cgroup/job".into())));
        assert_eq!(least("0::/\n", mounts, &files), None, "the root has no limit");
        assert_eq!(least("0::/gone\nbroken\n", mounts, &files), None);
        assert_eq!(least(task, "", &files), None, "nothing is mounted");
    }

    /// With Docker, `/proc/self/cgroup` has the host's path, and the mounted root is the container's own cgroup.
    #[test]
    fn the_group_of_a_container_is_found_at_the_mount_point() {
        let files = [("/sys/fs/cgroup/memory.max", "3000"), ("/sys/fs/cgroup/memory.current", "1000")];
        let mount = |root| format!("29 23 0:26 {root} /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
        let expected = Some((2000, "/sys/fs/cgroup".into()));
        assert_eq!(least("0::/\n", &mount("/"), &files), expected, "with a cgroup namespace");
        assert_eq!(least("0::/docker/c0ffee\n", &mount("/docker/c0ffee"), &files), expected);
        assert_eq!(least("0::/docker/c0ffee\n", &mount("/../.."), &files), expected, "unrelated root and path");
        let spaced = "35 31 0:32 / /mnt/a\\040b rw - cgroup cgroup rw,memory\n";
        let files = [("/mnt/a b/x/memory.limit_in_bytes", "50"), ("/mnt/a b/x/memory.usage_in_bytes", "20")];
        assert_eq!(least("5:memory:/x\n", spaced, &files), Some((30, "/mnt/a b/x".into())));
    }

    #[test]
    fn meminfo_returns_bytes_and_counts() {
        assert_eq!(meminfo("MemTotal: 9 kB\nMemAvailable:    2 kB\n", "MemAvailable"), Some(2048));
        assert_eq!(meminfo("MemTotal:   2 kB\nHugePages_Total:  3\n", "HugePages_Total"), Some(3));
        assert_eq!(meminfo("MemTotal: 9 kB\n", "MemAvailable"), None);
        assert_eq!(meminfo("MemTotalX: 2 kB", "MemTotal"), None);
    }

    #[test]
    fn the_tightest_of_machine_and_cgroup_comes_first() {
        let free = |available_kb: u64| {
            let read = |path: &Path| match path.to_str()? {
                "/proc/meminfo" => Some(format!("MemAvailable: {available_kb} kB\n")),
                "/proc/self/cgroup" => Some("0::/job\n".into()),
                "/proc/self/mountinfo" => Some("29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n".into()),
                "/sys/fs/cgroup/job/memory.max" => Some("8000\n".into()),
                "/sys/fs/cgroup/job/memory.current" => Some("2000\n".into()),
                _ => None,
            };
            memory_bounds_by(&read)
        };
        let folder = "/sys/fs/cgroup/job".into();
        let bound = MemoryBound::Cgroup { folder, limit_bytes: 8000, used_bytes: 2000 };
        let cgroup = FreeMemory { bytes: 6000, bound };
        let machine = |bytes| FreeMemory { bytes, bound: MemoryBound::Machine };
        assert_eq!(free(5), [machine(5120), cgroup.clone()]);
        assert_eq!(free(6), [cgroup, machine(6144)]);
        assert_eq!(memory_bounds_by(&|_| None), []);
    }

    #[test]
    fn this_machine_has_free_memory() {
        assert!(free_memory().is_some_and(|free| free.bytes > 0), "{:?}", free_memory());
    }
}
