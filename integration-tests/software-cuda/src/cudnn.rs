//! cuDNN's graph API. A descriptor's attributes are checked when they are set and when the descriptor is finalised.
//! Each supported graph has an engine, which executes the graph on a stream.
//!
//! This module refuses the requests that NVIDIA's library refuses. For a request that no correct program makes, it also
//! records a finding.
#![allow(unsafe_code, non_snake_case)]

pub mod evaluate;
mod graph;
mod schema;

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_char, c_void};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::cudnn::sys::{
    cudaStream_t, cudnnBackendAttributeName_t as Attribute, cudnnBackendAttributeType_t as Type,
    cudnnBackendDescriptor_t, cudnnBackendDescriptorType_t as DescriptorKind, cudnnHandle_t,
    cudnnStatus_t as CudnnStatus,
};

use crate::cudnn::evaluate::GraphExecution;
use crate::cudnn::graph::Graph;
use crate::export::{exports, plain_exports};
use crate::nvrtc::static_text;
use crate::world::{OpKind, current_device, lock, machine};

const VERSION: usize = 92_801;
/// Bytes of every plan's workspace. The accesses to a workspace show whether two streams share it.
const WORKSPACE_BYTES: usize = 256;
/// Numbers of the two engines: first the engine that the heuristic returns, then the engine that adds in a fixed order.
const ENGINES: [i64; 2] = [2, 6];

/// A descriptor with the values of its attributes, all widened to i64.
pub(crate) struct Descriptor {
    kind: DescriptorKind,
    values: BTreeMap<Attribute, Vec<i64>>,
    is_sealed: bool,
    /// The graph. It is set in a finalised operation graph, and in the descriptors that are derived from it.
    graph: Option<Arc<Graph>>,
}

impl Descriptor {
    fn longs(&self, name: Attribute) -> &[i64] {
        self.values.get(&name).map_or(&[], |values| values)
    }

    fn long(&self, name: Attribute) -> Option<i64> {
        self.longs(name).first().copied()
    }
}

#[derive(Default)]
struct Objects {
    /// Streams by cuDNN handle.
    handles: HashMap<u64, u64>,
    descriptors: HashMap<u64, Descriptor>,
}

fn objects() -> &'static Mutex<Objects> {
    static OBJECTS: OnceLock<Mutex<Objects>> = OnceLock::new();
    OBJECTS.get_or_init(Mutex::default)
}

/// Refuses a request that a correct program never makes, and records it as a finding.
fn misuse<T>(status: CudnnStatus, message: &str) -> Result<T, CudnnStatus> {
    machine().report_finding("misuse", message, || format!("a cuDNN call {message}"));
    Err(status)
}

/// Refuses a request that NVIDIA's library does not support or that this library does not emulate.
fn refuse<T>(request: &str) -> Result<T, CudnnStatus> {
    eprintln!("software-cuda: cuDNN: not supported: {request}");
    Err(CudnnStatus::CUDNN_STATUS_NOT_SUPPORTED)
}

impl Objects {
    fn sealed(&self, handle: i64, by: &str) -> Result<&Descriptor, CudnnStatus> {
        match self.descriptors.get(&(handle as u64)) {
            None => misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, &format!("passes an unknown descriptor as {by}")),
            Some(found) if !found.is_sealed => {
                let message = format!("passes a {:?} that is not finalised as {by}", found.kind);
                misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED, &message)
            }
            Some(found) => Ok(found),
        }
    }

    fn set(&mut self, handle: u64, name: Attribute, kind: Type, values: Vec<i64>) -> Result<(), CudnnStatus> {
        let Some(descriptor) = self.descriptors.get(&handle) else {
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, "sets an attribute of an unknown descriptor");
        };
        let attribute = format!("{:?} of a {:?}", name, descriptor.kind);
        if descriptor.is_sealed {
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, &format!("sets {attribute} that is already finalised"));
        }
        let Some(known) = schema::of(descriptor.kind).iter().find(|known| known.name == name) else {
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, &format!("sets {attribute}, an unknown attribute"));
        };
        if known.kind != kind || values.is_empty() || values.len() > known.count_max {
            let message = format!(
                "sets {attribute} to {} values of type {kind:?} instead of 1 to {} values of type {:?}",
                values.len(),
                known.count_max,
                known.kind
            );
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE, &message);
        }
        if kind == Type::CUDNN_TYPE_BACKEND_DESCRIPTOR {
            values.iter().try_for_each(|&value| self.sealed(value, &attribute).map(|_| ()))?;
        }
        if kind == Type::CUDNN_TYPE_HANDLE && !self.handles.contains_key(&(values[0] as u64)) {
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, &format!("sets {attribute} to an unknown handle"));
        }
        self.descriptors.get_mut(&handle).expect("looked up above").values.insert(name, values);
        Ok(())
    }

    /// Checks and finalises a descriptor.
    fn seal(&mut self, handle: u64) -> Result<(), CudnnStatus> {
        let Some(descriptor) = self.descriptors.get(&handle) else {
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, "finalises an unknown descriptor");
        };
        let missing =
            schema::of(descriptor.kind).iter().find(|k| k.is_required && !descriptor.values.contains_key(&k.name));
        if let Some(missing) = missing {
            let message = format!("finalises a {:?} without {:?}", descriptor.kind, missing.name);
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, &message);
        }
        let graph_of = |name: Attribute| {
            let found = descriptor.long(name).and_then(|handle| self.descriptors.get(&(handle as u64)));
            found.and_then(|found| found.graph.clone())
        };
        use DescriptorKind::*;
        let graph = match descriptor.kind {
            CUDNN_BACKEND_TENSOR_DESCRIPTOR => graph::check_tensor(descriptor).map(|()| None)?,
            CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR
            | CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR
            | CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR
            | CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR => {
                Graph::default().add(&self.descriptors, descriptor).map(|()| None)?
            }
            CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR => {
                let mut whole = Graph::default();
                for operation in descriptor.longs(Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS) {
                    whole.add(&self.descriptors, &self.descriptors[&(*operation as u64)])?;
                }
                whole.check()?;
                Some(Arc::new(whole))
            }
            CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR => graph_of(Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH),
            CUDNN_BACKEND_ENGINE_DESCRIPTOR => {
                let index = descriptor.long(Attribute::CUDNN_ATTR_ENGINE_GLOBAL_INDEX).unwrap_or(-1);
                let graph = graph_of(Attribute::CUDNN_ATTR_ENGINE_OPERATION_GRAPH);
                if !ENGINES.contains(&index) || graph.as_ref().is_none_or(|graph| !graph.has_engine()) {
                    return refuse(&format!("engine {index} for this graph"));
                }
                graph
            }
            CUDNN_BACKEND_ENGINECFG_DESCRIPTOR => graph_of(Attribute::CUDNN_ATTR_ENGINECFG_ENGINE),
            CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR => graph_of(Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG),
            CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR => {
                let count = |name| descriptor.longs(name).len();
                let ids = count(Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS);
                if ids != count(Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS) {
                    return misuse(
                        CudnnStatus::CUDNN_STATUS_BAD_PARAM,
                        "finalises a variant pack with different numbers of ids and pointers",
                    );
                }
                None
            }
            _ => None,
        };
        let descriptor = self.descriptors.get_mut(&handle).expect("looked up above");
        (descriptor.is_sealed, descriptor.graph) = (true, graph);
        Ok(())
    }

    /// Writes the results of a heuristic to engine configurations, and returns the number of results.
    fn results(&mut self, heuristic: u64, to: &[u64]) -> Result<usize, CudnnStatus> {
        let graph = self.sealed(heuristic as i64, "a heuristic")?.graph.clone();
        let Some(graph) = graph.filter(|graph| graph.has_engine()) else { return Ok(0) };
        let Some(first) = to.first().and_then(|first| self.descriptors.get_mut(first)) else { return Ok(0) };
        if first.kind != DescriptorKind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR || first.is_sealed {
            return misuse(
                CudnnStatus::CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE,
                "reads a heuristic's results into a descriptor that is finalised or is no engine configuration",
            );
        }
        (first.is_sealed, first.graph) = (true, Some(graph));
        Ok(1)
    }
}

/// # Safety
///
/// `start` points to `count` values of the type.
unsafe fn values(kind: Type, count: i64, start: *const c_void) -> Result<Vec<i64>, CudnnStatus> {
    if start.is_null() || !(1..=1 << 20).contains(&count) {
        return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, "sets an attribute without values");
    }
    let count = count as usize;
    use Type::*;
    // SAFETY: the caller keeps the contract above.
    Ok(unsafe {
        match kind {
            CUDNN_TYPE_INT64 | CUDNN_TYPE_HANDLE | CUDNN_TYPE_BACKEND_DESCRIPTOR | CUDNN_TYPE_VOID_PTR => {
                std::slice::from_raw_parts(start.cast::<i64>(), count).to_vec()
            }
            CUDNN_TYPE_BOOLEAN | CUDNN_TYPE_CHAR => {
                std::slice::from_raw_parts(start.cast::<u8>(), count).iter().map(|&byte| i64::from(byte)).collect()
            }
            _ => std::slice::from_raw_parts(start.cast::<i32>(), count).iter().map(|&word| i64::from(word)).collect(),
        }
    })
}

exports! { cudnn;
    fn cudnnCreate(out: *mut cudnnHandle_t) -> CudnnStatus {
        machine().state().device().map_err(|_| CudnnStatus::CUDNN_STATUS_NOT_INITIALIZED)?;
        let handle = machine().state().handle();
        lock(objects()).handles.insert(handle, 0);
        *out = handle as cudnnHandle_t;
        Ok(())
    }

    fn cudnnDestroy(handle: cudnnHandle_t) -> CudnnStatus {
        lock(objects()).handles.remove(&(handle as u64)).map(|_| ()).ok_or(CudnnStatus::CUDNN_STATUS_BAD_PARAM)
    }

    fn cudnnSetStream(handle: cudnnHandle_t, stream: cudaStream_t) -> CudnnStatus {
        machine().state().stream(stream as u64).map_err(|_| CudnnStatus::CUDNN_STATUS_BAD_PARAM)?;
        let mut objects = lock(objects());
        *objects.handles.get_mut(&(handle as u64)).ok_or(CudnnStatus::CUDNN_STATUS_BAD_PARAM)? = stream as u64;
        Ok(())
    }

    fn cudnnBackendCreateDescriptor(kind: DescriptorKind, out: *mut cudnnBackendDescriptor_t) -> CudnnStatus {
        if schema::of(kind).is_empty() {
            return refuse(&format!("{kind:?}"));
        }
        let handle = machine().state().handle();
        let descriptor = Descriptor { kind, values: BTreeMap::new(), is_sealed: false, graph: None };
        lock(objects()).descriptors.insert(handle, descriptor);
        *out = handle as cudnnBackendDescriptor_t;
        Ok(())
    }

    fn cudnnBackendDestroyDescriptor(descriptor: cudnnBackendDescriptor_t) -> CudnnStatus {
        if current_device().is_none() {
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, "destroys a descriptor without a current context");
        }
        match lock(objects()).descriptors.remove(&(descriptor as u64)) {
            Some(_) => Ok(()),
            None => misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, "destroys an unknown descriptor"),
        }
    }

    fn cudnnBackendSetAttribute(
        descriptor: cudnnBackendDescriptor_t,
        name: Attribute,
        kind: Type,
        count: i64,
        start: *const c_void,
    ) -> CudnnStatus {
        let values = values(kind, count, start)?;
        lock(objects()).set(descriptor as u64, name, kind, values)
    }

    fn cudnnBackendFinalize(descriptor: cudnnBackendDescriptor_t) -> CudnnStatus {
        lock(objects()).seal(descriptor as u64)
    }

    fn cudnnBackendGetAttribute(
        descriptor: cudnnBackendDescriptor_t,
        name: Attribute,
        kind: Type,
        requested: i64,
        given: *mut i64,
        to: *mut c_void,
    ) -> CudnnStatus {
        let mut objects = lock(objects());
        let found = objects.sealed(descriptor as i64, &format!("{name:?}"))?.kind;
        use Attribute::{
            CUDNN_ATTR_ENGINEHEUR_RESULTS as RESULTS, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE as WORKSPACE,
        };
        use DescriptorKind::{
            CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR as HEURISTIC, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR as PLAN,
        };
        match (found, name, kind) {
            (PLAN, WORKSPACE, Type::CUDNN_TYPE_INT64) if requested > 0 => {
                (*to.cast::<i64>(), *given) = (WORKSPACE_BYTES as i64, 1);
            }
            (HEURISTIC, RESULTS, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR) => {
                let count = requested.max(0) as usize;
                let to = if count > 0 { std::slice::from_raw_parts(to.cast::<u64>(), count) } else { &[] };
                *given = objects.results(descriptor as u64, to)? as i64;
            }
            other => return refuse(&format!("reading {other:?}")),
        }
        Ok(())
    }

    fn cudnnBackendExecute(
        handle: cudnnHandle_t,
        plan: cudnnBackendDescriptor_t,
        pack: cudnnBackendDescriptor_t,
    ) -> CudnnStatus {
        let objects = lock(objects());
        let stream = *objects.handles.get(&(handle as u64)).ok_or(CudnnStatus::CUDNN_STATUS_BAD_PARAM)?;
        let (plan, pack) = (objects.sealed(plan as i64, "a plan")?, objects.sealed(pack as i64, "a variant pack")?);
        let kinds = (plan.kind, pack.kind);
        use DescriptorKind::{
            CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR as PLAN, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR as PACK,
        };
        let Some(graph) = plan.graph.clone().filter(|_| kinds == (PLAN, PACK)) else {
            let message = format!("executes descriptors of the kinds {kinds:?} instead of {:?}", (PLAN, PACK));
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, &message);
        };
        let workspace = pack.long(Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE).unwrap_or(0) as usize;
        if workspace == 0 {
            return misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "executes a plan without its workspace");
        }
        let ids = pack.longs(Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS);
        let pointers = pack.longs(Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
        let given: HashMap<i64, usize> = ids.iter().copied().zip(pointers.iter().map(|&p| p as usize)).collect();
        // SAFETY: for tensors by value, the caller passes pointers to host scalars.
        let execution = unsafe { GraphExecution::new(graph, &given, (workspace, WORKSPACE_BYTES)) };
        let execution = execution.or_else(|message| misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, &message))?;
        drop(objects);
        let mut state = machine().state();
        let stream = state.stream(stream).map_err(|_| CudnnStatus::CUDNN_STATUS_EXECUTION_FAILED)?;
        state.submit(machine(), stream, OpKind::Graph(Box::new(execution)), "cuDNN graph");
        Ok(())
    }
}

plain_exports! { cudnn;
    fn cudnnGetVersion() -> usize {
        VERSION
    }

    fn cudnnGetErrorString(status: CudnnStatus) -> *const c_char {
        static_text(&format!("{status:?}"))
    }

    fn cudnnGetLastErrorString(message: *mut c_char, bytes: usize) -> () {
        if bytes > 0 {
            // SAFETY: the caller's buffer has `bytes` bytes.
            unsafe { *message = 0 };
        }
    }
}
