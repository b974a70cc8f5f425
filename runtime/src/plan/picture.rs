//! A plan as pictures, for people: Graphviz' DOT, and one HTML page with the graph of actors, memory, layouts and boxing. The page
//! needs nothing else, runs no script and takes its colours from the reader's. Imports `plan` and `graph`.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use crate::graph::NodeOp;
use crate::plan::{DeviceMemory, Plan};

/// Sizes of the picture, pixels.
const BOX: (usize, usize) = (190, 46);
const GAP: (usize, usize) = (70, 26);

/// An arrow between two actors: registers that go from one to the other, and bytes of all their pieces in a step.
#[derive(Default)]
struct Edge {
    registers: Vec<String>,
    step_bytes: u64,
}

impl Plan {
    /// For `dot -Tsvg`: an actor is a box, in its device's frame; arrows are registers, with their bytes in a step.
    pub fn to_dot(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_dot(&mut out);
        out
    }

    /// One page.
    pub fn to_html(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_html(&mut out);
        out
    }

    /// By producer and reader, both indices of actors.
    fn edges(&self) -> BTreeMap<(u32, u32), Edge> {
        let mut edges: BTreeMap<(u32, u32), Edge> = BTreeMap::new();
        for (index, register) in self.spec.registers.iter().enumerate() {
            let mut readers: Vec<u32> = register.readers.iter().map(|r| r.actor.0).collect();
            readers.sort_unstable();
            readers.dedup();
            for reader in readers.into_iter().filter(|reader| *reader != register.producer.0) {
                let pieces = register.readers.iter().filter(|r| r.actor.0 == reader).filter_map(|r| {
                    let action = &self.spec.actors[reader as usize].actions[r.action as usize];
                    let input = action.inputs.iter().find(|input| input.register.0 as usize == index)?;
                    Some(u64::from(action.per_step / input.firings_per_piece))
                });
                let step_bytes = pieces.max().unwrap_or(0) * register.slot_bytes as u64;
                let edge = edges.entry((register.producer.0, reader)).or_default();
                edge.registers.push(format!("{}, {} x {} bytes", register.name, register.slots, register.slot_bytes));
                edge.step_bytes += step_bytes;
            }
        }
        edges
    }

    fn write_dot(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "digraph plan {{\n  rankdir=LR; node [shape=box, fontname=\"sans-serif\"];")?;
        for device in 0..self.memory.len() {
            let bytes = size(self.memory[device].total_bytes() as u64);
            writeln!(out, "  subgraph cluster_{device} {{ label=\"device {device}, {bytes}\";")?;
            for (index, actor) in self.spec.actors.iter().enumerate().filter(|(_, actor)| actor.device == device) {
                let actions: Vec<String> =
                    actor.actions.iter().map(|a| format!("{} x {}", a.per_step, quoted(&a.name))).collect();
                writeln!(out, "    a{index} [label=\"{}\\n{}\"];", quoted(&actor.name), actions.join("\\n"))?;
            }
            writeln!(out, "  }}")?;
        }
        for ((from, to), edge) in self.edges() {
            let (label, tooltip) = (bytes_or_signal(edge.step_bytes), quoted(&edge.registers.join("; ")));
            writeln!(out, "  a{from} -> a{to} [label=\"{label}\", tooltip=\"{tooltip}\"];")?;
        }
        writeln!(out, "}}")
    }

    fn write_html(&self, out: &mut String) -> fmt::Result {
        let (mesh, devices) = (escaped(&self.graph.mesh().to_string()), self.graph.mesh().device_count());
        writeln!(
            out,
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
             <title>Plan on {mesh}</title><style>{STYLE}</style><h1>Plan on {mesh}</h1>"
        )?;
        let micro_batches = self.micro_batches;
        writeln!(out, "<p>{devices} devices, {micro_batches} micro-batches a step, {:?}.</p>", self.schedule)?;
        writeln!(out, "<h2>Actors and registers</h2>")?;
        self.write_svg(out)?;
        self.write_memory_bars(out)?;
        self.write_changes(out)?;
        self.write_layouts(out)?;
        writeln!(
            out,
            "<h2>All of it</h2><details><summary>as text</summary><pre>{}</pre></details>",
            escaped(&self.explain())
        )
    }

    /// A column for each device, a row for each of its actors.
    fn write_svg(&self, out: &mut String) -> fmt::Result {
        let mut rows = vec![0; self.memory.len()];
        let places: Vec<(usize, usize)> = (self.spec.actors.iter())
            .map(|actor| {
                let row = rows[actor.device];
                rows[actor.device] += 1;
                (actor.device * (BOX.0 + GAP.0) + 20, row * (BOX.1 + GAP.1) + 40)
            })
            .collect();
        let height = rows.iter().max().unwrap_or(&0) * (BOX.1 + GAP.1) + 40;
        let width = rows.len() * (BOX.0 + GAP.0) + 20;
        writeln!(out, "<div class=scroll><svg width={width} height={height} role=img aria-label=\"graph of actors\">")?;
        writeln!(
            out,
            "<defs><marker id=tip viewBox=\"0 0 8 8\" refX=8 refY=4 markerWidth=6 markerHeight=6 orient=auto>"
        )?;
        writeln!(out, "<path d=\"M0 0L8 4L0 8z\"/></marker></defs>")?;
        for device in 0..rows.len() {
            writeln!(out, "<text x={} y=24 class=device>device {device}</text>", device * (BOX.0 + GAP.0) + 20)?;
        }
        let edges = self.edges();
        let most = edges.values().map(|edge| edge.step_bytes).max().unwrap_or(1).max(1);
        for ((from, to), edge) in &edges {
            let [(x0, y0), (x1, y1)] = [from, to].map(|index| places[*index as usize]);
            // From side to side, or around on the right where both are on one device.
            let (start, end) = (x0 + BOX.0, if x1 > x0 { x1 } else { x1 + BOX.0 });
            let (y0, y1) = (y0 + BOX.1 / 2, y1 + BOX.1 / 2 + 6);
            let bend = if x1 > x0 { (start + end) / 2 } else { start.max(end) + GAP.0 / 2 };
            let thick = 1.0 + 4.0 * edge.step_bytes as f64 / most as f64;
            writeln!(
                out,
                "<path class=edge stroke-width={thick:.1} d=\"M{start} {y0}C{bend} {y0} {bend} {y1} {end} {y1}\" \
                 marker-end=url(#tip)><title>{} a step: {}</title></path>",
                bytes_or_signal(edge.step_bytes),
                escaped(&edge.registers.join("; "))
            )?;
        }
        for (actor, (x, y)) in self.spec.actors.iter().zip(places) {
            let kind = actor.name.rsplit(' ').next().unwrap_or_default();
            let actions: Vec<String> = actor.actions.iter().map(|a| format!("{} x {}", a.per_step, a.name)).collect();
            let (w, h) = BOX;
            writeln!(
                out,
                "<g><rect x={x} y={y} width={w} height={h} rx=6 /><title>{}</title>",
                escaped(&actions.join("; "))
            )?;
            writeln!(out, "<text x={} y={}>{}</text>", x + 10, y + 19, escaped(kind))?;
            let line: String = actions.join(", ").chars().take(30).collect();
            writeln!(out, "<text x={} y={} class=small>{}</text></g>", x + 10, y + 36, escaped(&line))?;
        }
        writeln!(out, "</svg></div>")
    }

    fn write_memory_bars(&self, out: &mut String) -> fmt::Result {
        let names = self.memory.first().map(DeviceMemory::parts).unwrap_or_default();
        write!(out, "<h2>Memory</h2><table><tr><th>device<th>all")?;
        names.iter().try_for_each(|(name, _)| write!(out, "<th>{name}"))?;
        writeln!(out, "<th>")?;
        let most = self.memory.iter().map(DeviceMemory::total_bytes).max().unwrap_or(1).max(1);
        for (device, memory) in self.memory.iter().enumerate() {
            let parts = memory.parts();
            write!(out, "<tr><td>{device}<td>{}", memory.total_bytes())?;
            parts.iter().try_for_each(|(_, bytes)| write!(out, "<td>{bytes}"))?;
            write!(out, "<td class=bar>")?;
            for (name, bytes) in parts {
                let (percent, class) =
                    (bytes as f64 * 100.0 / most as f64, name.split(' ').next_back().unwrap_or(name));
                write!(
                    out,
                    "<i class={class} style=\"width:{percent:.2}%\" title=\"{name}: {}\"></i>",
                    size(bytes as u64)
                )?;
            }
        }
        writeln!(out, "</table>")
    }

    fn write_changes(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "<h2>Changes of layout</h2><table><tr><th>phase<th>tensor<th>change<th>line")?;
        for node in self.graph.nodes() {
            let NodeOp::Boxing(step) = &node.op else { continue };
            let (phase, name, change) = (format!("{:?}", node.phase), escaped(&node.name), escaped(&step.to_string()));
            let (file, line) = (escaped(node.location.file()), node.location.line());
            writeln!(out, "<tr><td>{}<td>{name}<td>{change}<td>{file}:{line}", phase.to_lowercase())?;
        }
        writeln!(out, "</table>")
    }

    fn write_layouts(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "<h2>Parameters</h2><table><tr><th>name<th>shape<th>layout<th>devices")?;
        for var in self.graph.parameters() {
            let info = self.graph.tensor(var);
            let layout = info.layout.as_ref().map(ToString::to_string).unwrap_or_default();
            let placement = &self.graph.placements()[self.graph.placement_of(var)];
            let (name, devices) = (escaped(&info.name), placement.devices());
            writeln!(out, "<tr><td>{name}<td>{:?}<td>{}<td>{devices:?}", info.shape, escaped(&layout))?;
        }
        writeln!(out, "</table>")
    }
}

const STYLE: &str = "\
:root{color-scheme:light dark;--line:#8884;--box:#8881;--fixed:#4c78a8;--registers:#f58518;--scratch:#54a24b;--streams:#b279a2}\
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}\
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.2rem .8rem .2rem 0;text-align:left;\
border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}\
rect{fill:var(--box);stroke:currentColor}text{fill:currentColor;font-size:13px}.small{font-size:10px;opacity:.75}\
.device{font-weight:600}.edge{fill:none;stroke:#4c78a8;opacity:.7}.edge:hover{stroke:#e45756;opacity:1}marker path{fill:#4c78a8}\
.bar{width:24rem;white-space:nowrap}.bar i{display:inline-block;height:1em}.fixed{background:var(--fixed)}\
.registers{background:var(--registers)}.scratch{background:var(--scratch)}.streams,.mirrors{background:var(--streams)}pre{overflow-x:auto}";

/// What text is in HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// What text is between the quotes of DOT.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

fn bytes_or_signal(bytes: u64) -> String {
    if bytes == 0 { "signal".to_owned() } else { size(bytes) }
}

/// `12.5 KiB` and so on.
fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::AdamW;
    use crate::graph::Graph;
    use crate::nn::{self, GptConfig};
    use crate::passes::{CompileOptions, compile};
    use crate::placement::Mesh;

    fn plan(mesh: &str) -> Plan {
        let mut g = Graph::new(&Mesh::parse(mesh).unwrap());
        let config = GptConfig { vocabulary: 11, layers: 2, heads: 2, width: 8, context: 4, batch: 4, dropout: 0.0 };
        let logits = nn::gpt(&mut g, &config);
        let layout = nn::batch_layout(&g);
        let targets = g.input("targets", &[4, 4], shardflow_kernels::tensor::DType::I32, layout);
        let loss = g.cross_entropy(logits, targets);
        g.minimize(loss, AdamW::default());
        compile(g, &CompileOptions { micro_batches: 2, ..CompileOptions::default() }).unwrap()
    }

    #[test]
    fn pictures_show_every_actor_register_and_byte() {
        for mesh in ["data=1", "data=2,stage=2"] {
            let plan = plan(mesh);
            let (dot, html) = (plan.to_dot(), plan.to_html());
            for (index, actor) in plan.spec.actors.iter().enumerate() {
                assert!(dot.contains(&format!("a{index} [label=\"{}", actor.name)), "{mesh}: {}", actor.name);
            }
            assert_eq!(html.matches("<rect ").count(), plan.spec.actors.len(), "{mesh}");
            let edges = plan.edges();
            assert_eq!((dot.matches(" -> ").count(), html.matches("class=edge ").count()), (edges.len(), edges.len()));
            let crossing = |r: &&shardflow_actors::spec::RegisterSpec| r.readers.iter().any(|x| x.actor != r.producer);
            for register in plan.spec.registers.iter().filter(crossing) {
                assert!(dot.contains(&register.name) && html.contains(&escaped(&register.name)), "{}", register.name);
            }
            for memory in &plan.memory {
                assert!(html.contains(&format!("<td>{}<td>{}", memory.total_bytes(), memory.fixed_bytes)), "{mesh}");
            }
            assert!(html.contains(&escaped(&plan.explain())) && !html.contains("<script"));
        }
    }

    /// Activations of both micro-batches: 2 samples of 4 tokens, 8 wide, in floats.
    #[test]
    fn an_arrow_tells_the_bytes_of_a_step() {
        let plan = plan("stage=2");
        let index = |name: &str| plan.spec.actors.iter().position(|a| a.name == name).unwrap() as u32;
        let edge = &plan.edges()[&(index("device 0 compute"), index("device 1 copy"))];
        assert_eq!(edge.step_bytes, 2 * 2 * 4 * 8 * 4, "{:?}", edge.registers);
    }

    #[test]
    fn text_cannot_break_out() {
        assert_eq!(escaped("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
        assert_eq!(quoted("a\"b\\"), "a\\\"b\\\\");
    }
}
