//! A plan as text: layouts, layout changes with their bytes and source lines, actors, registers, memory.

use std::fmt::{self, Write};

use shardflow_actors::spec::{ActionRef, ActorId, Firing, RegisterSpec, Spec};
use shardflow_actors::table::Table;
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::tensor::DType;

use crate::graph::NodeOp;
use crate::plan::Plan;
use crate::plan::action::ActionPlan;
use crate::plan::classes::ClassId;
use crate::plan::instance::Quotient;
use shardflow_job::text::counted;

mod picture;

impl Plan {
    /// The plan as text.
    pub fn explain(&self) -> String {
        text_of(|out| self.write_all(out))
    }

    /// The memory of a class's devices, as a line.
    pub(crate) fn memory_row(&self, class: ClassId, unit: &str) -> String {
        let (devices, memory) = (&self.classes.devices[class.index()], &self.class_plans[class.index()].arena.memory);
        let subject =
            if let [only] = devices[..] { format!("device {only}") } else { format!("devices {}", listed(devices)) };
        format!("  {subject}: {}{unit} = {}\n", memory.total_bytes(), memory.sum())
    }

    fn write_all(&self, out: &mut String) -> fmt::Result {
        let (mesh, schedule) = (self.graph.mesh(), self.schedule);
        let devices = counted(mesh.device_count(), "device");
        let batches = counted(self.micro_batches, "micro-batch");
        let kind = if self.device == DeviceKind::Cuda { " on GPUs" } else { "" };
        let bf16_tensors = self.graph.tensors.iter().filter(|tensor| tensor.dtype == DType::BF16).count();
        let precision =
            if bf16_tensors > 0 { format!("; {} in bf16", counted(bf16_tensors, "tensor")) } else { String::new() };
        writeln!(out, "mesh {mesh}: {devices}{kind}; {schedule}, {batches} a step{precision}")?;
        for (index, placement) in self.graph.placements().iter().enumerate() {
            if self.graph.nodes().iter().any(|n| n.placement == index) {
                let flight = counted(self.in_flight.get(index).copied().unwrap_or(1), "micro-batch");
                let axes = placement.axes_text();
                let shape = if axes.is_empty() { String::new() } else { format!(" as {axes}") };
                writeln!(out, "placement {index}: devices {}{shape}, {flight} in flight", listed(placement.devices()))?;
            }
        }
        writeln!(out, "\nparameters")?;
        for var in self.graph.parameters() {
            let info = self.graph.tensor(var);
            let (layout, placement) = (self.graph.layout(var), self.graph.placement_of(var));
            writeln!(out, "  {:<24} {:<16} {layout} on placement {placement}", info.name, format!("{:?}", info.shape))?;
        }
        self.write_boxing(out)?;
        let Quotient { spec, actions, .. } = self.quotient();
        self.write_actors(out, &spec, &actions)?;
        writeln!(out, "\nregisters (slots x bytes)")?;
        let reader = |r: &ActionRef| spec.action_name(r.actor, r.action);
        for RegisterSpec { name, slots, slot_bytes, readers, .. } in spec.registers.values() {
            let readers: Vec<String> = readers.iter().map(reader).collect();
            writeln!(out, "  {name}: {slots} x {slot_bytes} -> {}", readers.join(", "))?;
        }
        writeln!(out, "\nmemory (bytes)")?;
        for class in self.classes.ids() {
            out.push_str(&self.memory_row(class, ""));
        }
        Ok(())
    }

    /// Writes every change of layout or placement, in order, with the bytes that the busiest device receives.
    fn write_boxing(&self, out: &mut String) -> fmt::Result {
        let units = "bytes that the busiest device receives in a micro-batch; for norm and update, in a step";
        writeln!(out, "\nlayout changes ({units})")?;
        for node in self.graph.nodes() {
            let (role, name) = (node.role, &node.name);
            let (file, line) = (node.location.file(), node.location.line());
            match &node.op {
                NodeOp::Boxing(step) => writeln!(out, "  {role:<8} {name}: {step}  ({file}:{line})")?,
                NodeOp::Bucket { axes } => {
                    let placement = &self.graph.placements()[node.placement];
                    let names: Vec<&str> = axes.iter().map(|a| placement.axes()[*a].name.as_str()).collect();
                    let gradients = counted(node.inputs.len(), "gradient");
                    let over = names.join("+");
                    writeln!(out, "  {role:<8} {name}: all-reduce of {gradients} over {over}, while backward runs")?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes the actors of one device of each class.
    fn write_actors(&self, out: &mut String, spec: &Spec, actions: &Table<ActorId, Vec<ActionPlan>>) -> fmt::Result {
        writeln!(out, "\nactors")?;
        for devices in self.classes.devices.iter().filter(|devices| devices.len() > 1) {
            writeln!(out, "  device {} stands for {}", devices[0], listed(devices))?;
        }
        for (actor, plans) in spec.actors.values().zip(actions.values()) {
            let order = match &actor.firing {
                Firing::Credit => "by credit".to_string(),
                Firing::Ordered(list) => {
                    let names: Vec<&str> = list.iter().map(|i| actor.actions[*i as usize].name.as_str()).collect();
                    format!("in order: {}", run_lengths(&names))
                }
            };
            writeln!(out, "  {}, {order}", actor.name)?;
            for (action, plan) in actor.actions.iter().zip(plans) {
                let (inputs, outputs) = (counted(action.inputs.len(), "register"), action.outputs.len());
                let launches = counted(plan.launches.len(), "launch");
                let times = action.per_step;
                writeln!(out, "    {}: {times} a step, {launches}, reads {inputs}, writes {outputs}", action.name)?;
            }
        }
        Ok(())
    }
}

/// Devices as text. A list of more than 16 is shortened to the first 8, the last one and the number of devices.
pub(crate) fn listed(devices: &[usize]) -> String {
    const SHOWN: usize = 16;
    match devices {
        [first @ .., last] if devices.len() > SHOWN => {
            let first = first[..SHOWN / 2].iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            format!("[{first}, .., {last}] ({})", devices.len())
        }
        _ => format!("{devices:?}"),
    }
}

pub(super) fn text_of(write: impl FnOnce(&mut String) -> fmt::Result) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out);
    out
}

/// Writes `a a b` as `2 a, b`.
fn run_lengths(names: &[&str]) -> String {
    let mut out: Vec<String> = Vec::new();
    let mut rest = names;
    while let Some(first) = rest.first() {
        let count = rest.iter().take_while(|n| n == &first).count();
        out.push(if count > 1 { format!("{count} {first}") } else { (*first).to_string() });
        rest = &rest[count..];
    }
    out.join(", ")
}
