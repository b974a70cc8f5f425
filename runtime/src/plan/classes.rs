//! Groups devices into classes. The devices of a class hold parts of the same sizes and do the same work on them, so
//! programs, registers and memory are computed once for each class, for its first device.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use shardflow_kernels::collective::CollectiveKind;
use shardflow_kernels::tensor::regions::Regions;

use crate::boxing::step::{BoxingStep, LocalStep, StepKind};
use crate::graph::{Graph, Node, NodeId, NodeOp};
use crate::placement::Placement;
use crate::sbp::{NdSbp, local_region};

/// Index of a class in [`Classes::devices`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassId(pub u32);

impl ClassId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The classes of a mesh's devices, and the devices that transfers connect.
#[derive(Clone, Debug, Default)]
pub struct Classes {
    pub of: Vec<ClassId>,
    /// For each class: its devices, in order of rank. The first one represents the class.
    pub devices: Vec<Vec<usize>>,
    /// The devices that each transfer connects. Transfers of the same shape and layouts share one [`Pairs`].
    pub transfers: BTreeMap<NodeId, Arc<Pairs>>,
}

/// The devices that a transfer connects.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    /// For each reading device: the devices that it reads from, in order.
    pub sources: BTreeMap<usize, Vec<usize>>,
    /// For each device that is read: its readers, in order.
    pub readers: BTreeMap<usize, Vec<usize>>,
}

impl Classes {
    /// The device that represents a class.
    pub fn representative(&self, class: ClassId) -> usize {
        self.devices[class.index()][0]
    }

    /// The device that represents each class.
    pub fn representatives(&self) -> impl Iterator<Item = usize> {
        self.devices.iter().map(|devices| devices[0])
    }

    pub fn ids(&self) -> impl Iterator<Item = ClassId> + use<> {
        (0..self.devices.len() as u32).map(ClassId)
    }

    /// The devices from which `device` reads in a transfer. Empty if `device` does not take part.
    pub fn sources(&self, transfer: NodeId, device: usize) -> &[usize] {
        self.transfers.get(&transfer).and_then(|pairs| pairs.sources.get(&device)).map_or(&[], Vec::as_slice)
    }

    /// The devices that read from `device` in a transfer.
    pub fn readers(&self, transfer: NodeId, device: usize) -> &[usize] {
        self.transfers.get(&transfer).and_then(|pairs| pairs.readers.get(&device)).map_or(&[], Vec::as_slice)
    }
}

/// The work of a device, as numbers. Devices with equal traits are in one class.
type Traits = Vec<usize>;

/// Groups the devices of a graph after all passes.
pub fn classify(graph: &Graph) -> Classes {
    let count = graph.mesh.device_count();
    let mut traits: Vec<Traits> = vec![Traits::new(); count];
    for (index, placement) in graph.placements.iter().enumerate() {
        let work = Work::of(graph, index);
        for (position, device) in placement.devices().iter().enumerate() {
            traits[*device].push(index);
            work.append_traits(placement, position, &mut traits[*device]);
        }
    }
    let mut classes = group(traits);
    classes.transfers = transfers(graph);
    refine(&mut classes);
    classes
}

/// The distinct work of a placement's devices. Repeated layers add no distinct work.
#[derive(Default)]
struct Work<'a> {
    tensors: BTreeSet<(&'a [usize], &'a NdSbp)>,
    steps: Vec<&'a BoxingStep>,
    /// Layouts of tensors of which only the first copy is used: gradients whose squares are summed, and outputs.
    used_once: BTreeSet<&'a NdSbp>,
}

impl<'a> Work<'a> {
    fn of(graph: &'a Graph, placement: usize) -> Self {
        let mut work = Self::default();
        for node in graph.nodes.iter().filter(|node| node.placement == placement) {
            let tensors = node.outputs.iter().map(|var| (graph.shape(*var), graph.layout(*var)));
            work.tensors.extend(tensors);
            match &node.op {
                NodeOp::Boxing(step) if work.steps.iter().all(|other| !is_alike(other, step)) => work.steps.push(step),
                NodeOp::NormSums { .. } => work.used_once.extend(node.inputs.iter().map(|var| graph.layout(*var))),
                _ => {}
            }
        }
        let outputs = graph.outputs.iter().map(|output| output.tensor);
        let here = outputs.filter(|output| graph.placement_of(*output) == placement);
        work.used_once.extend(here.map(|output| graph.layout(output)));
        work
    }

    fn append_traits(&self, placement: &Placement, position: usize, traits: &mut Traits) {
        for (shape, layout) in &self.tensors {
            traits.extend(local_region(shape, layout, placement, position).size);
        }
        for step in &self.steps {
            append_step(step, position, traits);
        }
        let coords = placement.coords(position);
        traits.extend(self.used_once.iter().map(|layout| usize::from(layout.is_first_copy(&coords))));
    }
}

fn is_alike(a: &BoxingStep, b: &BoxingStep) -> bool {
    (a.kind, &a.shape, &a.from, &a.to) == (b.kind, &b.shape, &b.from, &b.to)
}

fn append_step(step: &BoxingStep, position: usize, traits: &mut Traits) {
    match step.local(position) {
        LocalStep::Keep => traits.push(0),
        LocalStep::Local { fill, copy } => {
            traits.extend([1, usize::from(fill.is_some())]);
            traits.extend(copy.iter().flat_map(|(src, _)| &src.size));
        }
        LocalStep::Call(call) => {
            traits.extend([2, call.ranks.len()]);
            traits.extend(parts(&call.kind).flat_map(Regions::bounds));
        }
        LocalStep::Pull(pulls) => {
            traits.extend([3, pulls.len()]);
            traits.extend(pulls.iter().flat_map(|pull| &pull.src.size));
        }
    }
}

/// The lists of regions of a collective. In one boxing step, the lists of all devices come from the same splits, so two
/// lists with equal bounds have parts of equal sizes.
fn parts(kind: &CollectiveKind) -> impl Iterator<Item = &Regions> {
    let (first, second) = match kind {
        CollectiveKind::AllGather { parts } | CollectiveKind::ReduceScatter { parts, .. } => (Some(parts), None),
        CollectiveKind::AllToAll { sources, targets } => (Some(sources), Some(targets)),
        _ => (None, None),
    };
    first.into_iter().chain(second)
}

/// Groups devices with equal traits into classes. Classes are ordered by their first devices.
fn group(traits: Vec<Traits>) -> Classes {
    let mut classes = Classes::default();
    let mut known: HashMap<Traits, ClassId> = HashMap::new();
    for (device, traits) in traits.into_iter().enumerate() {
        let class = *known.entry(traits).or_insert_with(|| {
            classes.devices.push(Vec::new());
            ClassId(classes.devices.len() as u32 - 1)
        });
        classes.devices[class.index()].push(device);
        classes.of.push(class);
    }
    classes
}

/// Splits classes until all devices of a class exchange data with the same classes.
fn refine(classes: &mut Classes) {
    loop {
        let traits = (0..classes.of.len()).map(|device| peer_traits(classes, device)).collect();
        let Classes { of, devices, .. } = group(traits);
        let is_stable = devices.len() == classes.devices.len();
        (classes.of, classes.devices) = (of, devices);
        if is_stable {
            return;
        }
    }
}

fn peer_traits(classes: &Classes, device: usize) -> Traits {
    let mut traits = vec![classes.of[device].index()];
    for pairs in classes.transfers.values() {
        let class = |other: &usize| if *other == device { usize::MAX } else { classes.of[*other].index() };
        if let Some(sources) = pairs.sources.get(&device) {
            traits.extend(sources.iter().map(class));
        }
        // Only the classes of the readers matter, not the number of readers.
        if let Some(readers) = pairs.readers.get(&device) {
            let readers: BTreeSet<usize> = readers.iter().map(class).collect();
            traits.extend(readers);
        }
        traits.push(usize::MAX - 1);
    }
    traits
}

fn transfers(graph: &Graph) -> BTreeMap<NodeId, Arc<Pairs>> {
    let mut known: Vec<(&BoxingStep, Arc<Pairs>)> = Vec::new();
    let mut transfers = BTreeMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        let Node { op: NodeOp::Boxing(step), .. } = node else { continue };
        if step.kind != StepKind::Transfer {
            continue;
        }
        let pairs = match known.iter().find(|(other, _)| is_alike(other, step)) {
            Some((_, pairs)) => pairs.clone(),
            None => {
                let pairs = Arc::new(pairs(step));
                known.push((step, pairs.clone()));
                pairs
            }
        };
        transfers.insert(NodeId(index as u32), pairs);
    }
    transfers
}

fn pairs(step: &BoxingStep) -> Pairs {
    let mut pairs = Pairs::default();
    for (position, &device) in step.to.placement.devices().iter().enumerate() {
        let LocalStep::Pull(pulls) = step.local(position) else { continue };
        let sources: BTreeSet<usize> = pulls.iter().map(|pull| pull.from_device).collect();
        for source in &sources {
            pairs.readers.entry(*source).or_default().push(device);
        }
        if !sources.is_empty() {
            pairs.sources.insert(device, sources.into_iter().collect());
        }
    }
    pairs
}
