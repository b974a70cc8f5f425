//! The cores of a process, and its share of a node's cores.

use rustix::thread::CpuSet;

/// The cores that this process may run on, 64 in a word, lowest first; empty where the system does not report them.
pub(crate) fn affinity() -> Vec<u64> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    let mut words = vec![0u64; CpuSet::MAX_CPU / 64];
    (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core)).for_each(|core| words[core / 64] |= 1 << (core % 64));
    words.truncate(words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1));
    words
}

/// A mask of cores as text, such as `0-3,8`.
pub(crate) fn cores_text(mask: &[u64]) -> String {
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

/// Threads for each device of process `me`, at least 1, of processes on one node with these masks and numbers of devices: a core
/// that several may run on is divided among their devices, and one that only `me` may run on is its own. An empty mask is
/// unknown and counts as overlapping all others. `quota`: cores' worth of time that a cgroup leaves to the processes that share cores with `me`.
pub fn threads_per_device(node: &[(&[u64], usize)], me: usize, quota: usize) -> usize {
    let own: Vec<usize> = cores_of(node[me].0).collect();
    let has = |mask: &[u64], core: usize| {
        mask.is_empty() || mask.get(core / 64).is_some_and(|word| word >> (core % 64) & 1 == 1)
    };
    let devices = |meets: &dyn Fn(&[u64]) -> bool| {
        node.iter().filter(|(mask, _)| meets(mask)).map(|(_, devices)| devices).sum::<usize>().max(1) as f64
    };
    // Of a core that `n` devices share, each has 1 / n.
    let by_cores: f64 = own.iter().map(|core| 1.0 / devices(&|mask| has(mask, *core))).sum();
    let by_quota = quota as f64 / devices(&|mask| own.is_empty() || own.iter().any(|core| has(mask, *core)));
    let threads = match own.len() {
        0 => by_quota,
        cores if quota < cores => by_quota.min(by_cores),
        _ => by_cores,
    };
    // Rounding: three thirds add up to a little less than one.
    ((threads + 1e-9) as usize).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_owned_or_divided() {
        let threads = |node: &[(&[u64], usize)], quota: usize| -> Vec<usize> {
            (0..node.len()).map(|me| threads_per_device(node, me, quota)).collect()
        };
        assert_eq!(threads(&[(&[0xff], 1)], 8), [8], "alone");
        assert_eq!(threads(&[(&[0xff], 2)], 8), [4], "two devices");
        assert_eq!(threads(&[(&[0xff], 1), (&[0xff], 1)], 8), [4, 4], "equal masks");
        assert_eq!(threads(&[(&[0x0f], 1), (&[0xf0], 1)], 4), [4, 4], "disjoint masks");
        assert_eq!(threads(&[(&[0x0f], 1), (&[0x0f], 1), (&[0xf0], 1), (&[0xf0], 1)], 4), [2; 4], "a socket each two");
        assert_eq!(threads(&[(&[0xff], 1), (&[0xf0], 1)], 8), [6, 2], "four of its own, and half of four");
        assert_eq!(threads(&[(&[0x7][..], 1); 3], 3), [1, 1, 1], "thirds");
        assert_eq!(threads(&[(&[0x1], 2), (&[0x1], 1)], 1), [1, 1], "never none");
        assert_eq!(threads(&[(&[0, 0xff], 1), (&[0xff], 1)], 8), [8, 8], "words beyond the other's");
        assert_eq!(threads(&[(&[0xff], 1), (&[0xff], 1)], 2), [1, 1], "a quota is divided as well");
        assert_eq!(threads(&[(&[], 1), (&[0xff], 1)], 8), [4, 4], "masks that are not known");
    }

    #[test]
    fn masks_as_text() {
        assert_eq!(cores_text(&[0b1_0000_1111, 1]), "0-3,8,64");
        assert_eq!(cores_text(&[]), "");
        let own = affinity();
        assert!(cores_of(&own).count() >= std::thread::available_parallelism().unwrap().get());
    }
}
