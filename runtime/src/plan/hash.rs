//! Hashes a plan, so that processes can check that they compiled the same one.

use std::fmt::{self, Write};

use crate::graph::{Node, NodeOp, TensorInfo};
use crate::plan::{ClassPlan, DeviceMemory, Plan};

/// Hashes formatted text without storing it.
struct HashWriter(blake3::Hasher);

impl Write for HashWriter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

impl Plan {
    /// BLAKE3 hash of everything that determines execution: placements, the layout of each tensor, the registers,
    /// launches and arenas of each class of devices, and the lists of the schedule. The layouts determine the classes.
    /// They also determine the regions and groups of the devices that do not represent their class. Within one binary,
    /// equal hashes mean equal plans; the hashed text may differ between compilers. The number of threads is not
    /// hashed, because it affects neither results nor arenas.
    pub fn hash(&self) -> blake3::Hash {
        let Self { graph, lists, patterns, micro_batches, schedule, device, .. } = self;
        let mut writer = HashWriter(blake3::Hasher::new());
        // Hashing cannot fail. If the `Debug` of a custom kernel fails, all processes hash the same shorter text.
        let _ = write!(writer, "{} {:?}", graph.mesh(), (&graph.placements, lists, patterns));
        for Node { op, inputs, outputs, placement, .. } in &graph.nodes {
            let init = if let NodeOp::Parameter { init } = op { Some(init) } else { None };
            let _ = write!(writer, "{:?}", (init, inputs, outputs, placement));
        }
        for TensorInfo { shape, dtype, rate, layout, loop_sbp, .. } in &graph.tensors {
            let _ = write!(writer, "{:?}", (shape, dtype, rate, layout, loop_sbp));
        }
        let _ = write!(writer, "{:?}", (micro_batches, schedule, device));
        for ClassPlan { storage, slots, arena, actions, .. } in &self.class_plans {
            // The memory of streams differs between processes, so it is not hashed.
            let memory = DeviceMemory { stream_bytes: 0, ..arena.memory.clone() };
            let _ =
                write!(writer, "{:?}", (storage, slots, &arena.registers, &arena.slot_offsets, &arena.fixed, memory));
            let _ = write!(writer, "{actions:?}");
        }
        writer.0.finalize()
    }
}
