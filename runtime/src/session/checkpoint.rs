//! Parameters and optimizer state to and from one safetensors file: whole tensors, whatever the mesh, so that any mesh
//! loads any other's. A file is written beside its place and moved there when it is complete.
//! Imports `session`, `plan` and `checkpoint`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use shardflow_actors::remote::HostPiece;
use shardflow_kernels::tensor::{HostTensor, element_count};

use super::{Session, SessionError, resident_parts};
pub use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::shard::STEPS;
use crate::graph::optimizer::Bounds;
use crate::graph::{NodeOp, Var};
use crate::sbp::gather;
use crate::sbp::region::take_box;

impl Session {
    /// Every parameter by name, whole, in the shape it is saved in. Where several processes run the plan, all have to call it.
    ///
    /// # Errors
    /// The failure of an earlier step; or when copies on different devices differ, which only a bug of a kernel can cause.
    pub fn parameters(&self) -> Result<BTreeMap<String, HostTensor>, SessionError> {
        self.tensors(|op| matches!(op, NodeOp::Parameter { .. }))
    }

    fn tensors(&self, wanted: impl Fn(&NodeOp) -> bool) -> Result<BTreeMap<String, HostTensor>, SessionError> {
        self.check_alive()?;
        let graph = &self.plan.graph;
        let vars: Vec<Var> = graph.nodes().iter().filter(|n| wanted(&n.op)).map(|n| n.outputs[0]).collect();
        let mut parts = self.parts(&vars)?.into_iter();
        let mut out = BTreeMap::new();
        for var in vars {
            let info = graph.tensor(var);
            let shards: Vec<HostTensor> = parts.by_ref().take(resident_parts(&self.plan, var).len()).collect();
            let layout = info.layout.as_ref().expect("residents have a layout");
            let placement = &graph.placements[graph.placement_of(var)];
            let mut whole = gather(&shards, &info.shape, layout, placement)?;
            whole.shape = self.saved_shape(var);
            out.insert(info.name.clone(), whole);
        }
        Ok(out)
    }

    /// All devices' parts of these tensors, in order; those of other processes come from there, so all have to ask.
    fn parts(&self, vars: &[Var]) -> Result<Vec<HostTensor>, SessionError> {
        let all = || vars.iter().flat_map(|var| resident_parts(&self.plan, *var));
        let own = self.hosting.own();
        let mut wanted = Vec::new();
        for (device, index, resident) in all() {
            let port = self.ports.residents[&(device, index)];
            if own.contains(&device) {
                let part = self.arenas[&device].read_host(resident.offset, &resident.region.size, resident.dtype)?;
                self.give(&mut self.lock_inbox(), HostPiece { port, tensors: vec![part] });
            }
            wanted.push((port, 1));
        }
        self.receive(&wanted)?;
        let mut inbox = self.lock_inbox();
        Ok(wanted.into_iter().flat_map(|(port, count)| inbox.take(port, count)).flatten().collect())
    }

    pub(super) fn saved_shape(&self, var: Var) -> Vec<usize> {
        let info = self.plan.graph.tensor(var);
        info.saved_shape.clone().unwrap_or_else(|| info.shape.clone())
    }

    /// Writes parameters, optimizer state and the number of steps to one safetensors file. The file appears when it is
    /// complete, or not at all. Where several processes run the plan, all have to call it, and the first one writes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], or the failure of an earlier step: a good file is not replaced by half a step's tensors.
    pub fn save(&self, path: &Path) -> Result<(), SessionError> {
        let tensors = self.tensors(|op| matches!(op, NodeOp::Parameter { .. } | NodeOp::State))?;
        if self.hosting.process != 0 {
            return Ok(());
        }
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .into_iter()
            .map(|(name, t)| {
                (name, t.shape.clone(), t.as_f32().map(|v| bytemuck::cast_slice(v).to_vec()).unwrap_or_default())
            })
            .collect();
        let views: Vec<(String, TensorView<'_>)> = bytes
            .iter()
            .map(|(name, shape, data)| Ok((name.clone(), TensorView::new(Dtype::F32, shape.clone(), data)?)))
            .collect::<Result<_, _>>()
            .map_err(|e| not_whole(path, &e))?;
        let metadata = HashMap::from([(STEPS.to_string(), self.steps.to_string())]);
        let file = safetensors::serialize(views, Some(metadata)).map_err(|e| not_whole(path, &e))?;
        write_whole(path, |out| out.write_all(&file)).map_err(|e| io(path, e))?;
        Ok(())
    }

    /// Loads what [`Session::save`] wrote, under any mesh: the next step is the one after the saved ones.
    ///
    /// # Errors
    /// [`CheckpointError`]; nothing was changed then.
    pub fn restore(&mut self, path: &Path) -> Result<(), SessionError> {
        let bytes = std::fs::read(path).map_err(|e| io(path, e))?;
        self.load(path, &bytes, |op| matches!(op, NodeOp::Parameter { .. } | NodeOp::State))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| not_whole(path, &e))?;
        let steps = metadata.metadata().as_ref().and_then(|m| m.get(STEPS)).and_then(|s| s.parse().ok());
        self.steps = steps.unwrap_or(0);
        self.observer.iter().for_each(|observer| observer.set_steps(self.steps));
        Ok(())
    }

    /// Loads parameters only, from any safetensors file that has them; optimizer state and steps start anew.
    ///
    /// # Errors
    /// [`CheckpointError`]; nothing was changed then.
    pub fn init_from(&mut self, path: &Path) -> Result<(), SessionError> {
        let bytes = std::fs::read(path).map_err(|e| io(path, e))?;
        self.load(path, &bytes, |op| matches!(op, NodeOp::Parameter { .. }))
    }

    /// Sets parameters from whole tensors in memory, as [`Session::parameters`] gives them; other names are left out.
    ///
    /// # Errors
    /// [`CheckpointError::Shape`] for a tensor of another shape; nothing was changed then.
    pub fn set_parameters(&mut self, tensors: &BTreeMap<String, HostTensor>) -> Result<(), SessionError> {
        let path = Path::new("(memory)");
        let mut found = Vec::new();
        for var in self.plan.graph.parameters() {
            let name = &self.plan.graph.tensor(var).name;
            let tensor =
                tensors.get(name).ok_or_else(|| CheckpointError::Missing { path: path.into(), name: name.clone() })?;
            found.push((var, self.fitting(path, var, tensor.clone())?));
        }
        self.write_all(found)
    }

    fn load(&mut self, path: &Path, bytes: &[u8], wanted: impl Fn(&NodeOp) -> bool) -> Result<(), SessionError> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| not_whole(path, &e))?;
        let graph = &self.plan.graph;
        let mut found = Vec::new();
        for node in graph.nodes().iter().filter(|n| wanted(&n.op)) {
            let var = node.outputs[0];
            let name = &graph.tensor(var).name;
            let missing = |_| CheckpointError::Missing { path: path.into(), name: name.clone() };
            let view = file.tensor(name).map_err(missing)?;
            if view.dtype() != Dtype::F32 {
                let (expected, got) = ("F32".to_string(), format!("{:?}", view.dtype()));
                return Err(CheckpointError::Shape { path: path.into(), name: name.clone(), expected, got }.into());
            }
            // Files need not be aligned for f32.
            let chunks = view.data().chunks_exact(4);
            let values: Vec<f32> = chunks.map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
            found.push((var, self.fitting(path, var, HostTensor::f32(view.shape(), values))?));
        }
        self.write_all(found)
    }

    /// The tensor in the program's own shape, if it has the saved one.
    fn fitting(&self, path: &Path, var: Var, mut tensor: HostTensor) -> Result<HostTensor, SessionError> {
        let (info, expected) = (self.plan.graph.tensor(var), self.saved_shape(var));
        if tensor.shape != expected && tensor.shape != info.shape {
            let (expected, got) = (format!("{expected:?}"), format!("{:?}", tensor.shape));
            return Err(CheckpointError::Shape { path: path.into(), name: info.name.clone(), expected, got }.into());
        }
        let whole = tensor.dtype() == info.dtype && tensor.elements_held() == element_count(&info.shape);
        if !whole {
            let (name, path) = (info.name.clone(), path.into());
            let expected = format!("{} elements, {:?}", element_count(&info.shape), info.dtype);
            let got = format!("{} elements, {:?}", tensor.elements_held(), tensor.dtype());
            return Err(CheckpointError::Shape { path, name, expected, got }.into());
        }
        tensor.shape = info.shape.clone();
        Ok(tensor)
    }

    fn write_all(&mut self, tensors: Vec<(Var, HostTensor)>) -> Result<(), SessionError> {
        self.check_alive()?;
        let plan = self.plan.clone();
        // What is not written stays as it is: moments, where only parameters are.
        self.bounds = Bounds { parameter: 0.0, ratio: f64::INFINITY, ..self.bounds };
        for (var, whole) in tensors {
            for (device, _, resident) in resident_parts(&plan, var) {
                if self.hosting.own().contains(&device) {
                    self.write_resident(device, resident, &take_box(&whole, &resident.region))?;
                }
            }
        }
        self.refresh()
    }
}

fn io(path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io { path: path.into(), source }
}

fn not_whole(path: &Path, error: &SafeTensorError) -> CheckpointError {
    CheckpointError::Format { path: path.into(), message: error.to_string() }
}

/// Writes beside `path`, syncs, and moves into place.
pub(crate) fn write_whole<E: From<std::io::Error>>(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<File>) -> Result<(), E>,
) -> Result<(), E> {
    if path.exists() && !path.is_file() {
        // Moving a file to the place of a folder fails anyhow; to that of a device or a pipe it would not.
        let kind = std::io::ErrorKind::InvalidInput;
        return Err(std::io::Error::new(kind, "neither a file nor a free place for one").into());
    }
    // A link stays, and what it points to is replaced.
    let path = &path.canonicalize().unwrap_or_else(|_| path.into());
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let write = || {
        let mut file = BufWriter::new(File::create(&part)?);
        content(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        Ok(std::fs::rename(&part, path)?)
    };
    write().inspect_err(|_| drop(std::fs::remove_file(&part)))
}
