//! A hash of the whole plan, by which processes check that they compiled the same plan.

use std::fmt::{self, Write};

use crate::plan::{DeviceMemory, Plan};

/// Hashes formatted text without storing it.
struct HashWriter(blake3::Hasher);

impl Write for HashWriter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

impl Plan {
    /// BLAKE3 hash of everything that determines execution: actors, registers, launches and the layout of the arenas.
    /// Within one binary, equal hashes mean equal plans; the hashed text may differ between compilers. The number of
    /// threads is not hashed, because neither results nor arenas depend on it.
    pub fn hash(&self) -> blake3::Hash {
        let Self { spec, actions, registers, micro_batches, schedule, device, in_flight, .. } = self;
        // The memory of mirrors and streams differs between processes.
        let shared = |m: &DeviceMemory| DeviceMemory { mirror_bytes: 0, stream_bytes: 0, ..m.clone() };
        let memory: Vec<_> = self.memory.iter().map(shared).collect();
        let mut writer = HashWriter(blake3::Hasher::new());
        let hashed = (spec, actions, registers, memory, (micro_batches, schedule, device, in_flight));
        // Hashing cannot fail; if the `Debug` of a custom kernel fails, the text is shorter on all processes.
        let _ = write!(writer, "{} {hashed:?}", self.graph.mesh());
        writer.0.finalize()
    }
}
