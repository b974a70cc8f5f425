//! Saves and loads parameters and optimizer state as whole tensors in one safetensors file, which any mesh can load.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, Metadata, TensorView};
use shardflow_actors::error::Failure;
use shardflow_kernels::tensor::{HostTensor, element_count};

use super::agreement::{LoadSummary, difference_in_load, digest_of, numbers_of_load};
use super::budget::saved_parts;
use super::error::SessionError;
use super::numbers::Topic;
use super::outcome::{Worst, array};
use super::{BETWEEN_STEPS, Session};
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::manifest::TensorKind;
use crate::checkpoint::shard::{Entry, SEED, STEPS, UPDATES, declared_of, header, metadata, write_whole};
use crate::cluster::world::WAITING;
use crate::declare::Values;
use crate::graph::builder::STATE_PREFIX;
use crate::graph::optimizer::Bounds;
use crate::graph::{NodeOp, Var};
use crate::sbp::assemble;
use crate::sbp::region::{filled, slice_region};

impl Session {
    /// Every parameter by name, as a whole tensor in its saved shape. All processes of the plan must call it.
    ///
    /// # Errors
    /// The failure of an earlier step, or copies that differ between devices (only a bug in a kernel or a faulty device
    /// can cause this).
    pub fn parameters(&self) -> Result<BTreeMap<String, HostTensor>, SessionError> {
        self.whole_parameters(true)
    }

    /// Like [`Session::parameters`], but only process 0 gets the tensors.
    ///
    /// # Errors
    /// Returns the errors of [`Session::parameters`].
    pub fn parameters_on_first(&self) -> Result<Option<BTreeMap<String, HostTensor>>, SessionError> {
        let all = self.whole_parameters(false)?;
        Ok(self.is_first().then_some(all))
    }

    fn whole_parameters(&self, for_all: bool) -> Result<BTreeMap<String, HostTensor>, SessionError> {
        self.check_not_failed()?;
        let mut all = BTreeMap::new();
        for (port, var) in self.host_io.ports.parameters() {
            let mut whole = self.whole(var)?;
            if for_all {
                whole.map_or(Ok(()), |whole| self.send(port, whole))?;
                whole = self.receive_each([port])?.pop();
            }
            let name = self.plan.graph.tensor(var).name.clone();
            all.extend(whole.map(|whole| (name, HostTensor { shape: self.saved_shape(var), ..whole })));
        }
        Ok(all)
    }

    /// A parameter or state as a whole tensor, on process 0. All processes call it: they send the first copy of each
    /// part, and compare all copies. If copies differ, all processes return the error. A process returns when process 0
    /// has all parts, so process 0 holds the parts of at most two tensors.
    fn whole(&self, var: Var) -> Result<Option<HostTensor>, SessionError> {
        let (plan, ports, own) = (&self.plan, &self.host_io.ports, self.process_map.own());
        let (layout, placement) = (plan.graph.layout(var), &plan.graph.placements[plan.graph.placement_of(var)]);
        let axes = layout.broadcast_axes();
        let copies = placement.group_len(&axes);
        // For each part: the largest digest of its copies, and the complement of the smallest one. For a tensor without
        // copies, a single 0 is exchanged, so that the processes still wait for each other.
        let mut digests = vec![0; if copies > 1 { 2 * placement.device_count() / copies } else { 1 }];
        for (device, part) in plan.resident_parts(var, own.clone()) {
            let Some(index) = placement.index_of(device) else { continue };
            let tensor = self.arenas[&device].read_host(part.offset, &part.region.size, part.dtype)?;
            if copies > 1 {
                let (at, digest) = (2 * placement.group_number(index, &axes) as usize, digest_of(tensor.as_bytes()));
                digests[at] = digest.max(digests[at]);
                digests[at + 1] = digests[at + 1].max(!digest);
            }
            if layout.is_first_copy(&placement.coords(index)) && !part.region.is_empty() {
                self.send(ports.resident(device, var), tensor)?;
            }
        }
        let senders = if self.is_first() { 0..plan.device_count() } else { own };
        let sent: Vec<_> = saved_parts(plan, var, senders).collect();
        let parts = self.receive_each(sent.iter().map(|(device, _)| ports.resident(*device, var)))?;
        let digests = self.largest_of_each(&digests).map_err(|failure| self.settled(failure))?;
        if digests.as_chunks::<2>().0.iter().any(|[largest, smallest]| *largest != !smallest) {
            let name = plan.graph.tensor(var).name.clone();
            return Err(SessionError::Copies { name, layout: layout.to_string() });
        }
        let parts = sent.into_iter().map(|(_, part)| part.region).zip(parts);
        Ok(self.is_first().then(|| assemble(parts, plan.graph.shape(var), None)))
    }

    /// Waits between steps for a piece of each port, and returns their tensors.
    fn receive_each(&self, ports: impl IntoIterator<Item = u32>) -> Result<Vec<HostTensor>, Failure> {
        let wanted: Vec<(u32, usize)> = ports.into_iter().map(|port| (port, 1)).collect();
        self.set_activity(WAITING);
        self.receive(&wanted, Some(self.wait_max)).map_err(|failure| self.settled(failure))?;
        self.set_activity(BETWEEN_STEPS);
        let mut inbox = self.host_io.inbox.lock();
        Ok(wanted.into_iter().flat_map(|(port, count)| inbox.take(port, count)).flatten().collect())
    }

    pub(super) fn saved_shape(&self, var: Var) -> Vec<usize> {
        let info = self.plan.graph.tensor(var);
        info.saved_shape.clone().unwrap_or_else(|| info.shape.clone())
    }

    /// Writes parameters, optimizer state, steps, updates, seed and declared values to one safetensors file. The file
    /// appears only when complete. One tensor at a time is in memory. All processes call it; process 0 writes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], or the errors of [`Session::parameters`]: a failed session must not replace a good file.
    pub fn save(&self, path: &Path) -> Result<(), SessionError> {
        self.check_not_failed()?;
        let graph = &self.plan.graph;
        let mut vars: Vec<Var> = self.residents().map(|(var, _)| var).collect();
        vars.sort_by_key(|var| &graph.tensor(*var).name);
        // If gathering a tensor fails, no process continues with the next tensor.
        let mut has_failed = false;
        let whole = |var: &Var| (!has_failed).then(|| self.whole(*var).inspect_err(|_| has_failed = true));
        let mut wholes = vars.iter().map_while(whole);
        let written = if self.is_first() { self.write(path, &vars, &mut wholes) } else { Ok(()) };
        // If the write fails, the other processes do not know it, so this process helps to gather the other tensors.
        written.and(wholes.try_for_each(|whole| whole.map(drop)))
    }

    /// Writes the tensors of `vars`; `wholes` returns them in this order.
    fn write(
        &self,
        path: &Path,
        vars: &[Var],
        wholes: impl Iterator<Item = Result<Option<HostTensor>, SessionError>>,
    ) -> Result<(), SessionError> {
        let entry = |var: &Var| {
            let info = self.plan.graph.tensor(*var);
            Entry { name: info.name.clone(), dtype: info.dtype, shape: self.saved_shape(*var) }
        };
        let entries: Vec<Entry> = vars.iter().map(entry).collect();
        let metadata =
            metadata(self.progress.steps, self.progress.updates, self.progress.seed, &self.declared.values());
        let header = header(&entries, &metadata)?;
        write_whole(path, |out| {
            out.write_all(&header).map_err(|e| io(path, e))?;
            wholes
                .flat_map(Result::transpose)
                .try_for_each(|whole| Ok(out.write_all(whole?.as_bytes()).map_err(|e| io(path, e))?))
        })
    }

    /// Loads a file of [`Session::save`] under any mesh, with its steps, updates and seed. Returns notes for the user,
    /// one line each. All processes must call it. It reads each tensor twice, to keep only one in memory at a time.
    ///
    /// # Errors
    /// [`CheckpointError`], or [`SessionError::Disagreement`] if the files of two ranks differ. In both cases nothing
    /// has changed. If the file changes during the call, the session fails.
    pub fn restore(&mut self, path: &Path) -> Result<Vec<String>, SessionError> {
        self.set_activity("loading weights");
        let read = self.read(path, false);
        let Load { source, digests, metadata, mut notes } = self.load_together(path, read)?;
        let count = |key| number(&metadata, key);
        let steps = count(STEPS).unwrap_or(0);
        // Older files have no separate count of updates, and no seed.
        let updates = count(UPDATES).unwrap_or(steps);
        notes.extend(self.take_seed(count(SEED), &path.display().to_string()));
        self.write_all(path, &source, &digests)?;
        (self.progress.steps, self.progress.updates) = (steps, updates);
        self.observer.iter().for_each(|observer| observer.set_steps(self.progress.steps));
        Ok(notes)
    }

    /// Like [`Session::restore`], but loads only parameters, from any safetensors file. Moments, steps and updates
    /// become 0.
    pub fn init_from(&mut self, path: &Path) -> Result<Vec<String>, SessionError> {
        self.set_activity("loading weights");
        let read = self.read(path, true);
        let Load { source, digests, mut notes, .. } = self.load_together(path, read)?;
        self.write_all(path, &source, &digests)?;
        let plan = self.plan.clone();
        for device in self.process_map.own() {
            let residents = plan.residents(device);
            for resident in residents.filter(|r| matches!(plan.graph.producer(r.var).op, NodeOp::State)) {
                self.write_resident(device, &resident, &filled(&resident.region.size, resident.dtype, 0.0))?;
            }
        }
        self.guard.bounds = Bounds { parameter: self.guard.bounds.parameter, ..Bounds::default() };
        (self.progress.steps, self.progress.updates) = (0, 0);
        self.observer.iter().for_each(|observer| observer.set_steps(0));
        notes.push(format!("{}: parameters are loaded; optimizer state is fresh", path.display()));
        Ok(notes)
    }

    /// Sets parameters from whole tensors in the form of [`Session::parameters`]. Ignores unknown names. Optimizer
    /// state and steps stay unchanged. All processes of the plan must call it with the same tensors.
    ///
    /// # Errors
    /// [`CheckpointError::Unfit`] for another shape, or [`SessionError::Disagreement`]. In both cases nothing changes.
    pub fn set_parameters(&mut self, tensors: &BTreeMap<String, HostTensor>) -> Result<(), SessionError> {
        let path = Path::new("(memory)");
        let found = self.check_tensors(path, Source::Memory(tensors), true);
        let Load { source, digests, .. } = self.load_together(path, found)?;
        self.write_all(path, &source, &digests)
    }

    /// Returns the load if it is equal on all processes, else an error.
    fn load_together<'a>(
        &mut self,
        path: &Path,
        load: Result<Load<'a>, SessionError>,
    ) -> Result<Load<'a>, SessionError> {
        let summary = |load: &Load<'_>| {
            let [steps, updates, seed] =
                [STEPS, UPDATES, SEED].map(|key| number(&load.metadata, key).unwrap_or_default());
            LoadSummary { steps, updates, seed, manifest: 0, tensors: load.digests.clone() }
        };
        self.agree_on_load(&path.display().to_string(), summary, load)
    }

    /// Compares the loads of all processes before anything changes. If one process cannot load, no process loads.
    pub(super) fn agree_on_load<T>(
        &mut self,
        source: &str,
        summary: impl FnOnce(&T) -> LoadSummary,
        own: Result<T, SessionError>,
    ) -> Result<T, SessionError> {
        if self.process_map.processes == 1 {
            return own;
        }
        let own_summary = own.as_ref().map(summary).map_err(|error| error.exit().code());
        let mut found = Vec::new();
        for (rules, fields) in numbers_of_load(&self.plan, self.process_map.process, own_summary) {
            found.push(self.combine(Topic::Load, &rules, fields)?);
        }
        let own = own?;
        let worst = Worst::from_words(found.first().map(|first| array(first, 0)).unwrap_or_default());
        worst.check(source, "cannot load it")?;
        match difference_in_load(&self.plan, source, &found) {
            Some(difference) => Err(difference.into()),
            None => Ok(own),
        }
    }

    /// Replaces the session's seed by the saved one. Returns a note if the two seeds differ.
    pub(super) fn take_seed(&mut self, saved: Option<u64>, source: &str) -> Option<String> {
        let own = self.progress.seed;
        self.progress.seed = saved.unwrap_or(own);
        (own != self.progress.seed)
            .then(|| format!("the seed {} from {source} replaces the seed {own}", self.progress.seed))
    }

    /// Checks the program's tensors in a file, or only the program's parameters. Changes nothing in the session.
    fn read(&self, path: &Path, weights_only: bool) -> Result<Load<'static>, SessionError> {
        let file = TensorFile::open(path)?;
        let metadata = file.header.metadata().clone().unwrap_or_default();
        let kind = |name: &str| if name.starts_with(STATE_PREFIX) { TensorKind::State } else { TensorKind::Parameter };
        let tensors = file.header.tensors();
        let names = tensors.keys().map(|name| (name.as_str(), kind(name)));
        let notes = self.check_saved(path, &declared_of(&metadata), names, weights_only)?;
        // Files with different metadata may have equal weights, so the processes compare only the weights.
        let metadata = if weights_only { HashMap::new() } else { metadata };
        Ok(Load { metadata, notes, ..self.check_tensors(path, Source::File(file), weights_only)? })
    }

    /// Reads each tensor of the program, or only each parameter, and keeps the digest of each tensor.
    fn check_tensors<'a>(&self, path: &Path, source: Source<'a>, weights_only: bool) -> Result<Load<'a>, SessionError> {
        let wanted = self.residents().filter(|(_, kind)| !weights_only || *kind == TensorKind::Parameter);
        let digest = |(var, _)| Ok((var, digest_of(self.tensor_of(path, &source, var)?.as_bytes())));
        let digests = wanted.map(digest).collect::<Result<_, SessionError>>()?;
        Ok(Load { source, digests, metadata: HashMap::new(), notes: Vec::new() })
    }

    /// A parameter or state, in the program's shape.
    fn tensor_of(&self, path: &Path, source: &Source<'_>, var: Var) -> Result<HostTensor, SessionError> {
        let name = &self.plan.graph.tensor(var).name;
        let found = match source {
            Source::Memory(tensors) => tensors.get(name).ok_or_else(|| CheckpointError::missing(path, name))?.clone(),
            Source::File(file) => file.tensor(name)?,
        };
        self.fitting(path, var, found)
    }

    /// Checks the program against a file: declared values and names of tensors. Returns notes for the user.
    pub(super) fn check_saved<'a>(
        &self,
        path: &Path,
        declared: &Values,
        names: impl Iterator<Item = (&'a str, TensorKind)>,
        weights_only: bool,
    ) -> Result<Vec<String>, CheckpointError> {
        let unfit = |why| CheckpointError::Unfit { path: path.into(), why };
        let mut notes = self.declared.compare(declared, weights_only).map_err(unfit)?;
        let graph = &self.plan.graph;
        let wanted = self.residents().filter(|(_, kind)| !weights_only || *kind == TensorKind::Parameter);
        let wanted: BTreeSet<&str> = wanted.map(|(var, _)| graph.tensor(var).name.as_str()).collect();
        let unused = names.filter(|(name, _)| !wanted.contains(name) && !self.ignoring.iter().any(|n| n == name));
        let (states, unknown): (Vec<_>, Vec<_>) = unused.partition(|(_, kind)| *kind == TensorKind::State);
        if !unknown.is_empty() {
            let mut names: Vec<String> = unknown.into_iter().map(|(name, _)| name.to_owned()).collect();
            names.sort();
            return Err(unfit(format!(
                "the program lacks {} of the saved parameters, such as {}; another model saved them (to leave \
                 parameters out on purpose, name them in `SessionOptions::ignoring`)",
                names.len(),
                names[..names.len().min(3)].join(", ")
            )));
        }
        if !states.is_empty() {
            let count = states.len();
            notes.push(format!(
                "{}: {count} optimizer states are skipped: the program does not need them",
                path.display()
            ));
        }
        Ok(notes)
    }

    /// Returns the tensor in the program's shape, if it has that shape or the saved one.
    fn fitting(&self, path: &Path, var: Var, mut tensor: HostTensor) -> Result<HostTensor, SessionError> {
        let (info, expected) = (self.plan.graph.tensor(var), self.saved_shape(var));
        if tensor.shape != expected && tensor.shape != info.shape {
            let (expected, got) = (format!("{expected:?}"), format!("{:?}", tensor.shape));
            return Err(CheckpointError::shape(path, &info.name, &expected, &got).into());
        }
        let whole = tensor.dtype() == info.dtype && tensor.elements_held() == element_count(&info.shape);
        if !whole {
            let (name, path) = (info.name.clone(), path.into());
            let expected = format!("{} elements of {:?}", element_count(&info.shape), info.dtype);
            let got = format!("{} elements of {:?}", tensor.elements_held(), tensor.dtype());
            return Err(CheckpointError::Dtype { path, name, expected, got }.into());
        }
        tensor.shape = info.shape.clone();
        Ok(tensor)
    }

    /// Writes the checked tensors to the devices. An error leaves old and new tensors mixed, so it ends the session.
    fn write_all(
        &mut self,
        path: &Path,
        source: &Source<'_>,
        digests: &BTreeMap<Var, u64>,
    ) -> Result<(), SessionError> {
        self.check_not_failed()?;
        self.write_each(path, source, digests).inspect_err(|error| self.fail_alone(error.exit(), error))?;
        self.refresh()
    }

    fn write_each(
        &mut self,
        path: &Path,
        source: &Source<'_>,
        digests: &BTreeMap<Var, u64>,
    ) -> Result<(), SessionError> {
        let plan = self.plan.clone();
        // Moments keep their bounds if only parameters are written.
        self.guard.bounds = Bounds { parameter: 0.0, ratio: f64::INFINITY, ..self.guard.bounds };
        for (var, digest) in digests {
            let whole = self.tensor_of(path, source, *var)?;
            if digest_of(whole.as_bytes()) != *digest {
                let message = "the file was changed while it was read".into();
                return Err(CheckpointError::Format { path: path.into(), message }.into());
            }
            for (device, resident) in plan.resident_parts(*var, self.process_map.own()) {
                self.write_resident(device, &resident, &slice_region(&whole, &resident.region))?;
            }
        }
        Ok(())
    }
}

/// The source of a load, which supplies one tensor at a time.
enum Source<'a> {
    Memory(&'a BTreeMap<String, HostTensor>),
    File(TensorFile),
}

/// The checked tensors of a load. They are written once all processes agree.
struct Load<'a> {
    source: Source<'a>,
    digests: BTreeMap<Var, u64>,
    metadata: HashMap<String, String>,
    /// Notes for the user, one line each.
    notes: Vec<String>,
}

/// Maximum size of a file's header, as in the crate `safetensors`.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// An open safetensors file.
struct TensorFile {
    path: PathBuf,
    file: fs::File,
    header: Metadata,
    /// Offset of the first tensor's data.
    data: u64,
}

impl TensorFile {
    /// Reads and checks the header.
    fn open(path: &Path) -> Result<Self, CheckpointError> {
        let failed = |e| io(path, e);
        let refused = |e: SafeTensorError| CheckpointError::Format { path: path.into(), message: e.to_string() };
        let file = fs::File::open(path).map_err(failed)?;
        // Opening a folder succeeds, but reading from it fails.
        let length = file.metadata().map_err(failed)?.len();
        let mut prefix = [0; 8];
        match file.read_exact_at(&mut prefix, 0) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(refused(SafeTensorError::HeaderTooSmall));
            }
            read => read.map_err(failed)?,
        }
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > HEADER_BYTES_MAX {
            return Err(refused(SafeTensorError::HeaderTooLarge));
        }
        let data = header_bytes + prefix.len() as u64;
        if data > length {
            return Err(refused(SafeTensorError::InvalidHeaderLength));
        }
        let mut text = vec![0; header_bytes as usize];
        file.read_exact_at(&mut text, prefix.len() as u64).map_err(failed)?;
        let text = str::from_utf8(&text).map_err(|e| refused(SafeTensorError::InvalidHeader(e)))?;
        let header: Metadata =
            serde_json::from_str(text).map_err(|e| refused(SafeTensorError::InvalidHeaderDeserialization(e)))?;
        if data.checked_add(header.data_len() as u64) != Some(length) {
            return Err(refused(SafeTensorError::MetadataIncompleteBuffer));
        }
        Ok(Self { path: path.into(), file, header, data })
    }

    /// Reads a tensor as f32.
    fn tensor(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        let path = &self.path;
        let info = self.header.info(name).ok_or_else(|| CheckpointError::missing(path, name))?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file.read_exact_at(&mut bytes, self.data + start as u64).map_err(|e| io(path, e))?;
        let refused = |e: SafeTensorError| CheckpointError::Format { path: path.into(), message: e.to_string() };
        let view = TensorView::new(info.dtype, info.shape.clone(), &bytes).map_err(refused)?;
        let values = floats(&view).ok_or_else(|| {
            let (expected, got) = ("F32, F16 or BF16".to_string(), format!("{:?}", info.dtype));
            CheckpointError::Dtype { path: path.into(), name: name.into(), expected, got }
        })?;
        Ok(HostTensor::f32(&info.shape, values))
    }
}

fn number(metadata: &HashMap<String, String>, key: &str) -> Option<u64> {
    metadata.get(key)?.parse().ok()
}

/// Elements of an F32, BF16 or F16 tensor as f32; the data in a file need not be aligned.
fn floats(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let halves = |from: fn([u8; 2]) -> f32| view.data().chunks_exact(2).map(|c| from([c[0], c[1]])).collect();
    match view.dtype() {
        Dtype::F32 => Some(view.data().chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()),
        Dtype::BF16 => Some(halves(|bytes| bf16::from_le_bytes(bytes).to_f32())),
        Dtype::F16 => Some(halves(|bytes| f16::from_le_bytes(bytes).to_f32())),
        _ => None,
    }
}

fn io(path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io { path: path.into(), source }
}
