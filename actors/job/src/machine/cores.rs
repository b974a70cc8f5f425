//! The cores that a process may use, and the process's share of a node's cores.

use rustix::thread::CpuSet;

/// Affinity mask of this process: 64 cores per word, lowest core first. Empty if the system does not report it.
pub fn affinity() -> Vec<u64> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    let mut words = vec![0u64; CpuSet::MAX_CPU / 64];
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).for_each(|core| words[core / 64] |= 1 << (core % 64));
    words.truncate(words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1));
    words
}

/// Formats a core mask, such as `0-3,8`.
pub fn cores_text(mask: &[u64]) -> String {
    let cores: Vec<usize> = cores_of(mask).collect();
    let ranges = cores.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [only] => only.to_string(),
        run => format!("{}-{}", run[0], run[run.len() - 1]),
    });
    ranges.collect::<Vec<_>>().join(",")
}

fn cores_of(mask: &[u64]) -> impl Iterator<Item = usize> {
    (0..mask.len() * 64).filter(|core| mask[core / 64] >> (core % 64) & 1 == 1)
}

/// Returns how many threads each device of process `own` gets, at least 1. `node` lists the affinity mask and the
/// device count of each process of the node. A core in the masks of several processes is divided among the devices of
/// these processes. An empty mask means that the cores are unknown, and counts as overlapping all other masks. `quota`
/// is how many cores a cgroup grants to the processes that share cores with `own`.
pub fn threads_per_device(node: &[(&[u64], usize)], own: usize, quota: usize) -> usize {
    let own: Vec<usize> = cores_of(node[own].0).collect();
    let has = |mask: &[u64], core: usize| {
        mask.is_empty() || mask.get(core / 64).is_some_and(|word| word >> (core % 64) & 1 == 1)
    };
    let devices = |overlaps: &dyn Fn(&[u64]) -> bool| {
        node.iter().filter(|(mask, _)| overlaps(mask)).map(|(_, devices)| devices).sum::<usize>().max(1) as f64
    };
    // Each of `n` devices that share a core gets 1 / n of it.
    let by_cores: f64 = own.iter().map(|core| 1.0 / devices(&|mask| has(mask, *core))).sum();
    let by_quota = quota as f64 / devices(&|mask| own.is_empty() || own.iter().any(|core| has(mask, *core)));
    let threads = match own.len() {
        0 => by_quota,
        cores if quota < cores => by_quota.min(by_cores),
        _ => by_cores,
    };
    // Corrects rounding: the sum of six thirds is slightly below two.
    ((threads + 1e-9) as usize).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_cores_are_divided_among_devices() {
        let threads = |node: &[(&[u64], usize)], quota: usize| -> Vec<usize> {
            (0..node.len()).map(|own| threads_per_device(node, own, quota)).collect()
        };
        assert_eq!(threads(&[(&[0xff], 1)], 8), [8], "one process");
        assert_eq!(threads(&[(&[0xff], 2)], 8), [4], "two devices");
        assert_eq!(threads(&[(&[0xff], 1), (&[0xff], 1)], 8), [4, 4], "equal masks");
        assert_eq!(threads(&[(&[0x0f], 1), (&[0xf0], 1)], 4), [4, 4], "disjoint masks");
        assert_eq!(threads(&[(&[0x0f], 1), (&[0x0f], 1), (&[0xf0], 1), (&[0xf0], 1)], 4), [2; 4], "two sockets");
        assert_eq!(threads(&[(&[0xff], 1), (&[0xf0], 1)], 8), [6, 2], "four of its own, and half of four");
        assert_eq!(threads(&[(&[0x3f][..], 1); 3], 6), [2, 2, 2], "six thirds");
        assert_eq!(threads(&[(&[0x1], 2), (&[0x1], 1)], 1), [1, 1], "at least one");
        assert_eq!(threads(&[(&[0, 0xff], 1), (&[0xff], 2)], 8), [8, 4], "masks of different lengths");
        assert_eq!(threads(&[(&[0xff], 1), (&[0xff], 1)], 2), [1, 1], "a quota is divided too");
        assert_eq!(threads(&[(&[0x0f], 1), (&[0xf0], 1)], 2), [2, 2], "a quota covers only processes that share cores");
        assert_eq!(threads(&[(&[], 1), (&[0xff], 1)], 8), [4, 4], "unknown masks");
    }

    #[test]
    fn a_mask_is_formatted_as_ranges() {
        assert_eq!(cores_text(&[0b10_1111, 1]), "0-3,5,64");
        assert_eq!(cores_text(&[]), "");
        let own = affinity();
        assert!(cores_of(&own).count() >= std::thread::available_parallelism().unwrap().get());
    }
}
