//! One number for a whole plan, by which processes see that they compiled the same.

use std::fmt::{self, Write};

use crate::plan::{DeviceMemory, Plan};

/// Feeds formatted text to a hash, so that the text is never held.
struct Text(blake3::Hasher);

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

impl Plan {
    /// BLAKE3 of all that decides what actors do: actors, registers, launches, where every byte of the arenas lies. Plans of
    /// one binary are equal if their hashes are; the text that is hashed may differ between compilers, as a binary's own hash
    /// does. Threads are each process's own: neither results nor arenas depend on them.
    pub fn hash(&self) -> blake3::Hash {
        let Self { graph, spec, actions, registers, memory, micro_batches, schedule, .. } = self;
        let Self { device, in_flight, .. } = self;
        // Mirrors and streams' memory differ between processes.
        let shared = |m: &DeviceMemory| DeviceMemory { mirror_bytes: 0, stream_bytes: 0, ..m.clone() };
        let memory: Vec<_> = memory.iter().map(shared).collect();
        let mut text = Text(blake3::Hasher::new());
        let all = (spec, actions, registers, memory, (micro_batches, schedule, device, in_flight));
        // Writing to a hash cannot fail; a `Debug` of a custom kernel that does leaves a shorter text on all processes.
        let _ = write!(text, "{} {all:?}", graph.mesh());
        text.0.finalize()
    }
}
