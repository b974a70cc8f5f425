//! Renders a plan as Graphviz DOT, and as one HTML page with the graph of actors, memory, layouts and boxing. The page
//! is self-contained, has no script and follows the reader's colour scheme.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use shardflow_actors::spec::{ActorId, Spec};

use super::{listed, text_of};
use crate::graph::NodeOp;
use crate::plan::{DeviceMemory, Plan};
use shardflow_job::text::{counted, size};

/// Size of a box in pixels: its width, and its height without the lines for actions.
const BOX: (usize, usize) = (190, 34);
/// Horizontal and vertical gaps between boxes, in pixels.
const GAP: (usize, usize) = (70, 26);
/// Height of a line of text, in pixels.
const LINE: usize = 13;
/// Characters that fit on a line.
const LINE_CHARS: usize = 32;

/// An arrow from a producer to a reader: the registers between them, and the bytes of all pieces in a step.
#[derive(Default)]
struct Edge {
    registers: Vec<String>,
    step_bytes: u64,
}

impl Plan {
    /// The plan in DOT, for `dot -Tsvg`. Boxes are actors, grouped by device. Arrows are registers with bytes per step.
    pub fn to_dot(&self) -> String {
        text_of(|out| Picture::of(self).write_dot(out))
    }

    /// The plan as an HTML page.
    pub fn to_html(&self) -> String {
        text_of(|out| Picture::of(self).write_html(out))
    }
}

/// The picture of a plan shows one device of each class.
struct Picture<'a> {
    plan: &'a Plan,
    spec: Spec,
    /// For each class: its representative's rank, and the text above its column.
    columns: Vec<(usize, String)>,
}

impl<'a> Picture<'a> {
    fn of(plan: &'a Plan) -> Self {
        let column = |devices: &Vec<usize>| match devices[..] {
            [only] => (only, format!("device {only}")),
            _ => (devices[0], format!("device {} of {}", devices[0], devices.len())),
        };
        let columns = plan.classes.devices.iter().map(column).collect();
        Self { plan, spec: plan.quotient().spec, columns }
    }

    /// The arrows, by the actor indices of producer and reader.
    fn edges(&self) -> BTreeMap<(u32, u32), Edge> {
        let mut edges: BTreeMap<(u32, u32), Edge> = BTreeMap::new();
        for (id, register) in self.spec.registers.iter() {
            let mut readers: Vec<ActorId> = register.readers.iter().map(|r| r.actor).collect();
            readers.sort_unstable();
            readers.dedup();
            for reader in readers.into_iter().filter(|reader| *reader != register.producer) {
                let pieces = register.readers.iter().filter(|r| r.actor == reader).filter_map(|r| {
                    let action = self.spec.action(reader, r.action);
                    let input = action.inputs.iter().find(|input| input.register == id)?;
                    Some(input.pieces.finished(action.per_step.into()))
                });
                let step_bytes = pieces.max().unwrap_or(0) * register.slot_bytes as u64;
                let edge = edges.entry((register.producer.0, reader.0)).or_default();
                let bytes = bytes_or_signal(register.slot_bytes as u64);
                edge.registers.push(format!("{}, {} x {bytes}", register.name, register.slots));
                edge.step_bytes += step_bytes;
            }
        }
        edges
    }

    fn write_dot(&self, out: &mut String) -> fmt::Result {
        writeln!(out, "digraph plan {{\n  rankdir=LR; node [shape=box, fontname=\"sans-serif\"];")?;
        for (device, title) in &self.columns {
            let bytes = size(self.plan.memory(*device).total_bytes() as u64);
            writeln!(out, "  subgraph cluster_{device} {{ label=\"{title}, {bytes}\";")?;
            for (id, actor) in self.spec.actors.iter().filter(|(_, actor)| actor.device == *device) {
                let actions: Vec<String> =
                    actor.actions.iter().map(|a| format!("{} x {}", a.per_step, quoted(&a.name))).collect();
                writeln!(out, "    a{} [label=\"{}\\n{}\"];", id.0, quoted(&actor.name), actions.join("\\n"))?;
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
        let plan = self.plan;
        let mesh = escaped(&plan.graph.mesh().to_string());
        writeln!(
            out,
            "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
             <title>Plan on {mesh}</title><style>{STYLE}</style><h1>Plan on {mesh}</h1>"
        )?;
        let devices = counted(plan.device_count(), "device");
        let batches = counted(plan.micro_batches, "micro-batch");
        writeln!(out, "<p>{devices}, {batches} a step, {}.</p>", plan.schedule)?;
        writeln!(out, "<h2>Actors and registers</h2>")?;
        self.write_svg(out)?;
        self.write_memory_bars(out)?;
        writeln!(out, "<h2>Layout changes</h2><table><tr><th>role<th>tensor<th>change<th>line")?;
        for node in plan.graph.nodes() {
            let NodeOp::Boxing(step) = &node.op else { continue };
            let (role, name, change) = (node.role, escaped(&node.name), escaped(&step.to_string()));
            let (file, line) = (escaped(node.location.file()), node.location.line());
            writeln!(out, "<tr><td>{role}<td>{name}<td>{change}<td>{file}:{line}")?;
        }
        writeln!(out, "</table>\n<h2>Parameters</h2><table><tr><th>name<th>shape<th>layout<th>devices")?;
        for var in plan.graph.parameters() {
            let info = plan.graph.tensor(var);
            let layout = escaped(&plan.graph.layout(var).to_string());
            let placement = &plan.graph.placements()[plan.graph.placement_of(var)];
            let (name, devices) = (escaped(&info.name), listed(placement.devices()));
            writeln!(out, "<tr><td>{name}<td>{:?}<td>{layout}<td>{devices}", info.shape)?;
        }
        writeln!(out, "</table>")?;
        let text = escaped(&plan.explain());
        writeln!(out, "<h2>Full plan</h2><details><summary>as text</summary><pre>{text}</pre></details>")
    }

    /// Writes a column for each device of the picture. The column has a box for each actor of the device.
    fn write_svg(&self, out: &mut String) -> fmt::Result {
        let mut ends = vec![40; self.columns.len()];
        let column_of = |device: usize| self.plan.classes.of[device].index();
        let boxes: Vec<(usize, usize, Vec<String>)> = (self.spec.actors.values())
            .map(|actor| {
                let actions = actor.actions.iter().map(|a| format!("{} x {}", a.per_step, a.name));
                let lines: Vec<String> = actions.flat_map(|action| wrapped(&action)).collect();
                let column = column_of(actor.device);
                let y = ends[column];
                ends[column] += BOX.1 + lines.len() * LINE + GAP.1;
                (column * (BOX.0 + GAP.0) + 20, y, lines)
            })
            .collect();
        let height = ends.iter().max().unwrap_or(&40);
        let width = ends.len() * (BOX.0 + GAP.0) + 20;
        writeln!(out, "<div class=scroll><svg width={width} height={height} role=img aria-label=\"graph of actors\">")?;
        writeln!(
            out,
            "<defs><marker id=tip viewBox=\"0 0 8 8\" refX=8 refY=4 markerWidth=6 markerHeight=6 orient=auto>"
        )?;
        writeln!(out, "<path d=\"M0 0L8 4L0 8z\"/></marker></defs>")?;
        for (column, (_, title)) in self.columns.iter().enumerate() {
            writeln!(out, "<text x={} y=24 class=device>{title}</text>", column * (BOX.0 + GAP.0) + 20)?;
        }
        let edges = self.edges();
        let most = edges.values().map(|edge| edge.step_bytes).max().unwrap_or(1).max(1);
        for ((from, to), edge) in &edges {
            let [(x0, y0), (x1, y1)] = [from, to].map(|index| (boxes[*index as usize].0, boxes[*index as usize].1));
            // An arrow to a column on the right ends at its left side. Any other arrow bends around the right side.
            let (start, end) = (x0 + BOX.0, if x1 > x0 { x1 } else { x1 + BOX.0 });
            let (y0, y1) = (y0 + BOX.1 / 2, y1 + BOX.1 / 2 + 6);
            let bend = if x1 > x0 { (start + end) / 2 } else { start.max(end) + GAP.0 / 2 };
            let stroke_width = 1.0 + 4.0 * edge.step_bytes as f64 / most as f64;
            writeln!(
                out,
                "<path class=edge stroke-width={stroke_width:.1} d=\"M{start} {y0}C{bend} {y0} {bend} {y1} {end} {y1}\" \
                 marker-end=url(#tip)><title>{} a step: {}</title></path>",
                bytes_or_signal(edge.step_bytes),
                escaped(&edge.registers.join("; "))
            )?;
        }
        for (actor, (x, y, lines)) in self.spec.actors.values().zip(&boxes) {
            let kind = actor.name.rsplit(' ').next().unwrap_or_default();
            let (w, h) = (BOX.0, BOX.1 + lines.len() * LINE);
            writeln!(out, "<g><rect x={x} y={y} width={w} height={h} rx=6 />")?;
            writeln!(out, "<text x={} y={}>{}</text>", x + 10, y + 19, escaped(kind))?;
            for (row, line) in lines.iter().enumerate() {
                let y = y + 36 + row * LINE;
                writeln!(out, "<text x={} y={y} class=small>{}</text>", x + 10, escaped(line))?;
            }
            writeln!(out, "</g>")?;
        }
        writeln!(out, "</svg></div>")
    }

    fn write_memory_bars(&self, out: &mut String) -> fmt::Result {
        let memories = || self.columns.iter().map(|(device, _)| self.plan.memory(*device));
        let names = memories().next().map(DeviceMemory::parts).unwrap_or_default();
        write!(out, "<h2>Memory</h2><table><tr><th>device<th>total")?;
        names.iter().try_for_each(|(name, _)| write!(out, "<th>{name}"))?;
        writeln!(out, "<th>")?;
        let most = memories().map(DeviceMemory::total_bytes).max().unwrap_or(1).max(1);
        for (memory, (_, title)) in memories().zip(&self.columns) {
            let parts = memory.parts();
            write!(out, "<tr><td>{title}<td>{}", size(memory.total_bytes() as u64))?;
            parts.iter().try_for_each(|(_, bytes)| write!(out, "<td>{}", size(*bytes as u64)))?;
            write!(out, "<td class=bar>")?;
            for (name, bytes) in parts {
                let percent = bytes as f64 * 100.0 / most as f64;
                let (class, bytes) = (name.split(' ').next_back().unwrap_or(name), size(bytes as u64));
                write!(out, "<i class={class} style=\"width:{percent:.2}%\" title=\"{name}: {bytes}\"></i>")?;
            }
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

/// Escapes text for HTML.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Escapes text for a quoted string of DOT.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

/// Breaks text into lines that fit into a box; lines after the first are indented.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_inclusive([' ', '.', '/', '_']) {
        let room = |line: &String| LINE_CHARS - line.chars().count();
        if lines.last().is_some_and(|line| word.trim_end().chars().count() > room(line)) {
            lines.push("\u{a0}\u{a0}".into());
        }
        for letter in word.chars() {
            if lines.last().is_some_and(|line| room(line) == 0) {
                lines.push("\u{a0}\u{a0}".into());
            }
            lines.last_mut().expect("at least one line").push(letter);
        }
    }
    lines
}

fn bytes_or_signal(bytes: u64) -> String {
    if bytes == 0 { "signal".to_owned() } else { size(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Schedule;
    use crate::plan::tests::gpt;

    fn plan(mesh: &str) -> Plan {
        gpt(mesh, 2, Schedule::OneFOneB)
    }

    #[test]
    fn dot_and_html_show_all_actors_registers_and_sizes() {
        for mesh in ["data=1", "data=2,stage=2"] {
            let plan = plan(mesh);
            let picture = Picture::of(&plan);
            let (dot, html) = (plan.to_dot(), plan.to_html());
            for (ActorId(index), actor) in picture.spec.actors.iter() {
                assert!(dot.contains(&format!("a{index} [label=\"{}", actor.name)), "{mesh}: {}", actor.name);
            }
            assert_eq!(html.matches("<rect ").count(), picture.spec.actors.len(), "{mesh}");
            let edges = picture.edges();
            assert_eq!((dot.matches(" -> ").count(), html.matches("class=edge ").count()), (edges.len(), edges.len()));
            let crossing = |r: &&shardflow_actors::spec::RegisterSpec| r.readers.iter().any(|x| x.actor != r.producer);
            for register in picture.spec.registers.values().filter(crossing) {
                assert!(dot.contains(&register.name) && html.contains(&escaped(&register.name)), "{}", register.name);
            }
            for memory in picture.columns.iter().map(|(device, _)| plan.memory(*device)) {
                let [all, fixed] = [memory.total_bytes(), memory.fixed_bytes].map(|bytes| size(bytes as u64));
                assert!(html.contains(&format!("<td>{all}<td>{fixed}")), "{mesh}");
            }
            assert!(html.contains(&escaped(&plan.explain())) && !html.contains("<script"));
        }
    }

    /// The arrow carries the activations of both micro-batches. Each has 4 samples of 3 tokens, width 8, in f32.
    #[test]
    fn an_arrow_shows_the_bytes_of_a_step() {
        let plan = plan("stage=2");
        let picture = Picture::of(&plan);
        let index = |name: &str| picture.spec.actors.values().position(|a| a.name == name).unwrap() as u32;
        let edge = &picture.edges()[&(index("device 0 compute"), index("device 1 copy"))];
        assert_eq!(edge.step_bytes, 2 * 4 * 3 * 8 * 4, "{:?}", edge.registers);
    }

    #[test]
    fn html_shows_full_names_and_sizes_with_units() {
        for (mesh, head) in
            [("data=1", "<p>1 device, 2 micro-batches a step, 1f1b.</p>"), ("stage=2", "<p>2 devices, ")]
        {
            let plan = plan(mesh);
            let html = plan.to_html();
            assert!(html.contains(head), "{mesh}");
            // The actions of an actor, joined from the lines of its box.
            let boxes: Vec<String> = html.split("<g><rect ").skip(1).map(box_text).collect();
            for (actor, text) in Picture::of(&plan).spec.actors.values().zip(&boxes) {
                let actions = actor.actions.iter().map(|a| format!("{} x {}", a.per_step, a.name));
                assert_eq!(*text, actions.collect::<String>(), "{}", actor.name);
            }
            let picture = &html[..html.find("Full plan").expect("the text follows")];
            assert!(!picture.contains("MicroBatch") && !picture.contains("OneFOneB"), "{mesh}");
            let bytes = plan.memory(0).total_bytes();
            assert!(bytes > 1024 && !picture.contains(&bytes.to_string()), "{mesh}: raw bytes");
        }
    }

    fn box_text(shown: &str) -> String {
        let shown = &shown[..shown.find("</g>").expect("a box ends")];
        let lines = shown.split("class=small>").skip(1).map(|line| &line[..line.find("</text>").expect("a line ends")]);
        lines.map(|line| line.trim_start_matches('\u{a0}')).collect()
    }

    #[test]
    fn long_names_are_wrapped() {
        let name = "1 x pull a_tensor_with_a_name.of/many_parts and_averyverylongwordthatdoesnotfitonanylineatall";
        let lines = wrapped(name);
        assert!(lines.len() > 3 && lines.iter().all(|line| line.chars().count() <= LINE_CHARS), "{lines:?}");
        assert_eq!(lines.iter().map(|line| line.trim_start_matches('\u{a0}')).collect::<String>(), name);
        assert_eq!(wrapped("2 x forward"), ["2 x forward"]);
    }

    #[test]
    fn special_characters_are_escaped() {
        assert_eq!(escaped("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
        assert_eq!(quoted("a\"b\\"), "a\\\"b\\\\");
    }
}
