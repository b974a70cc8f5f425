//! Turns a graph into a cuDNN execution plan: descriptors and an engine configuration. Each execution passes addresses.

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t,
    cudnnBackendKnobType_t as Knob, cudnnBackendTensorReordering_t, cudnnDataType_t, cudnnHandle_t,
    cudnnPointwiseMode_t as PointwiseMode,
};

use super::api::Api;
use super::descriptor::{Descriptor, Values};
use super::graph::{Graph, Node, Storage, Tensor};
use crate::cuda::context::Raw;
use crate::cuda::raw_stream::RawStream;
use crate::cuda::step::Place;
use crate::error::{KernelError, Result};

/// Alignment, in bytes, that the fused kernels require of addresses.
pub(super) const ALIGNMENT: u64 = 16;

/// Maximum number of engine configurations to try. cuDNN's heuristic returns fewer than this.
const CONFIGURATIONS_MAX: usize = 8;

#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    Handle(Raw<cudnnHandle_t>),
    /// A device that is given by its description. The machine may lack such a device.
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests describe a device"))]
    Described([&'a Descriptor; 1]),
}

/// An engine with all its knobs, used instead of the heuristic's choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct PinnedEngine {
    pub(super) engine: i64,
    pub(super) knobs: &'static [(Knob, i64)],
}

#[derive(Debug)]
pub(super) struct Plan {
    plan: Descriptor,
    /// The descriptors that the plan refers to.
    _parts: Vec<Descriptor>,
    graph: Graph,
}

impl Plan {
    /// Creates a plan with the first engine that can run the graph with at most `bytes_max` bytes of workspace.
    pub(super) fn new(
        api: &'static Api,
        target: Target<'_>,
        graph: Graph,
        pin: Option<PinnedEngine>,
        bytes_max: usize,
        place: &str,
    ) -> Result<Self> {
        let mut builder = Builder { api, place, parts: Vec::new() };
        let is_sum =
            |tensor: &Tensor| graph.accumulated.is_some_and(|(start, _)| tensor.storage == Storage::Workspace(start));
        let tensors = graph.tensors.iter().enumerate().map(|(i, tensor)| builder.tensor(i, tensor, is_sum(tensor)));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let nodes = graph.nodes.iter().map(|node| builder.node(node, &tensors)).collect::<Result<Vec<_>, _>>()?;
        let operations: Vec<&Descriptor> = nodes.iter().collect();
        let mut attributes = vec![(Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS, Values::Descriptors(&operations))];
        attributes.extend(target.attribute(Some(Attribute::CUDNN_ATTR_OPERATIONGRAPH_HANDLE), None));
        let operation_graph = builder.finalized(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, &attributes)?;
        let configurations = match pin {
            Some(pin) => vec![builder.pinned(&operation_graph, pin, target)?],
            None => builder.configurations(&operation_graph, target)?,
        };
        let mut failure = None;
        for configuration in &configurations {
            match builder.plan(configuration, target) {
                Ok((plan, bytes)) if graph.workspace_bytes + bytes <= bytes_max => {
                    let parts = [builder.parts, tensors, nodes, vec![operation_graph], configurations];
                    let _parts = parts.into_iter().flatten().collect();
                    return Ok(Self { plan, _parts, graph });
                }
                Ok((_, bytes)) => {
                    let expected = format!("at most {bytes_max} bytes");
                    let got = format!("{} bytes", graph.workspace_bytes + bytes);
                    failure = Some(KernelError::arguments("attention", "cuDNN's workspace", expected, got));
                }
                Err(error) => failure = Some(error),
            }
        }
        let no_engine = || KernelError::arguments("attention", place, "a cuDNN engine that can run the shape", "none");
        Err(failure.unwrap_or_else(no_engine))
    }

    /// Enqueues the plan. Returns false, without effect, if an address is not aligned to [`ALIGNMENT`]. The buffers and
    /// the `workspace` of `bytes_max` bytes ([`Plan::new`]) must live until the stream has passed the call.
    pub(super) fn execute(
        &self,
        api: &'static Api,
        handle: Raw<cudnnHandle_t>,
        address_of: &dyn Fn(Place) -> Result<u64>,
        workspace: u64,
        stream: &RawStream,
        place: &str,
    ) -> Result<bool> {
        let (mut ids, mut pointers) = (Vec::new(), Vec::new());
        for (i, tensor) in self.graph.tensors.iter().enumerate() {
            let pointer = match &tensor.storage {
                Storage::Virtual => continue,
                Storage::Buffer(place) => address_of(*place)?,
                Storage::Workspace(start) => workspace + *start as u64,
                // The graph owns the scalar, and cuDNN reads it before `execute` returns.
                Storage::HostScalar(value) => std::ptr::from_ref(value).expose_provenance() as u64,
            };
            if !matches!(tensor.storage, Storage::HostScalar(_)) && pointer % ALIGNMENT != 0 {
                return Ok(false);
            }
            ids.push(id(i));
            pointers.push(pointer);
        }
        let library_workspace = [workspace + self.graph.workspace_bytes as u64];
        let attributes = [
            (Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Values::Longs(&ids)),
            (Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Values::Pointers(&pointers)),
            (Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, Values::Pointers(&library_workspace)),
        ];
        let pack = Descriptor::finalized(api, Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &attributes, place)?;
        if let Some((start, floats)) = self.graph.accumulated {
            stream.fill(workspace + start as u64, 0, floats)?;
        }
        self.plan.execute(handle, &pack, place)?;
        Ok(true)
    }
}

fn id(index: usize) -> i64 {
    index as i64 + 1
}

struct Builder<'a> {
    api: &'static Api,
    place: &'a str,
    /// Descriptors that operations and configurations refer to.
    parts: Vec<Descriptor>,
}

impl Builder<'_> {
    fn finalized(&self, kind: Kind, attributes: &[(Attribute, Values<'_>)]) -> Result<Descriptor> {
        Descriptor::finalized(self.api, kind, attributes, self.place)
    }

    /// An `accumulated` tensor has the layout that NVIDIA's frontend uses for sums of dq. Only cuDNN's kernels read it.
    fn tensor(&self, index: usize, tensor: &Tensor, accumulated: bool) -> Result<Descriptor> {
        let id = [id(index)];
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_TENSOR_UNIQUE_ID, Values::Longs(&id)),
            (Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE, Values::DataType(tensor.data)),
            (Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Values::Longs(&[ALIGNMENT as i64])),
            (Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS, Values::Longs(&tensor.dims)),
            (Attribute::CUDNN_ATTR_TENSOR_STRIDES, Values::Longs(&tensor.strides)),
            (Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Values::Bool(tensor.storage == Storage::Virtual)),
            (Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE, Values::Bool(matches!(tensor.storage, Storage::HostScalar(_)))),
        ];
        let order = Values::Reordering(cudnnBackendTensorReordering_t::CUDNN_TENSOR_REORDERING_F16x16);
        attributes.extend(accumulated.then_some((Attribute::CUDNN_ATTR_TENSOR_REORDERING_MODE, order)));
        self.finalized(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR, &attributes)
    }

    /// Creates an operation from its tensors and, if the operation has a function, the function's descriptor.
    fn operation(
        &mut self,
        kind: Kind,
        function: Option<(Attribute, Descriptor)>,
        tensors: &[(Attribute, &Descriptor)],
    ) -> Result<Descriptor> {
        let refs = function.iter().map(|(name, function)| (*name, function)).chain(tensors.iter().copied());
        let refs: Vec<(Attribute, [&Descriptor; 1])> = refs.map(|(name, descriptor)| (name, [descriptor])).collect();
        let attributes: Vec<_> =
            refs.iter().map(|(name, descriptor)| (*name, Values::Descriptors(descriptor))).collect();
        let operation = self.finalized(kind, &attributes)?;
        self.parts.extend(function.map(|(_, function)| function));
        Ok(operation)
    }

    fn node(&mut self, node: &Node, tensors: &[Descriptor]) -> Result<Descriptor> {
        use Attribute::*;
        match *node {
            Node::Matmul { a, b, c } => {
                let compute = [(CUDNN_ATTR_MATMUL_COMP_TYPE, Values::DataType(cudnnDataType_t::CUDNN_DATA_FLOAT))];
                let function = self.finalized(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR, &compute)?;
                let tensors = [
                    (CUDNN_ATTR_OPERATION_MATMUL_ADESC, &tensors[a]),
                    (CUDNN_ATTR_OPERATION_MATMUL_BDESC, &tensors[b]),
                    (CUDNN_ATTR_OPERATION_MATMUL_CDESC, &tensors[c]),
                ];
                let function = Some((CUDNN_ATTR_OPERATION_MATMUL_DESC, function));
                self.operation(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, function, &tensors)
            }
            Node::Pointwise { mode, axis, x, b, t, y } => {
                let function = Some((CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, self.pointwise(mode, axis)?));
                let mut operands = vec![
                    (CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &tensors[x]),
                    (CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &tensors[y]),
                ];
                operands.extend(b.map(|b| (CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &tensors[b])));
                operands.extend(t.map(|t| (CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &tensors[t])));
                self.operation(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, function, &operands)
            }
            Node::Reduce { op, x, y } => {
                let attributes = [
                    (CUDNN_ATTR_REDUCTION_OPERATOR, Values::Reduction(op)),
                    (CUDNN_ATTR_REDUCTION_COMP_TYPE, Values::DataType(cudnnDataType_t::CUDNN_DATA_FLOAT)),
                ];
                let function = self.finalized(Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR, &attributes)?;
                let function = Some((CUDNN_ATTR_OPERATION_REDUCTION_DESC, function));
                let tensors = [
                    (CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &tensors[x]),
                    (CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &tensors[y]),
                ];
                self.operation(Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, function, &tensors)
            }
            Node::Transpose { x, y } => {
                let tensors = [
                    (CUDNN_ATTR_OPERATION_RESHAPE_XDESC, &tensors[x]),
                    (CUDNN_ATTR_OPERATION_RESHAPE_YDESC, &tensors[y]),
                ];
                self.operation(Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, None, &tensors)
            }
        }
    }

    fn pointwise(&self, mode: PointwiseMode, axis: Option<i64>) -> Result<Descriptor> {
        let precision = match mode {
            PointwiseMode::CUDNN_POINTWISE_CMP_GE => cudnnDataType_t::CUDNN_DATA_BOOLEAN,
            _ => cudnnDataType_t::CUDNN_DATA_FLOAT,
        };
        let axis = axis.map(|axis| [axis]);
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_POINTWISE_MODE, Values::Pointwise(mode)),
            (Attribute::CUDNN_ATTR_POINTWISE_MATH_PREC, Values::DataType(precision)),
        ];
        attributes.extend(axis.iter().map(|axis| (Attribute::CUDNN_ATTR_POINTWISE_AXIS, Values::Longs(axis))));
        self.finalized(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR, &attributes)
    }

    /// Returns the configurations that cuDNN's heuristic recommends, best first.
    fn configurations(&mut self, graph: &Descriptor, target: Target<'_>) -> Result<Vec<Descriptor>> {
        let graph = [graph];
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, Values::Descriptors(&graph)),
            (Attribute::CUDNN_ATTR_ENGINEHEUR_MODE, Values::Heuristic(cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A)),
        ];
        attributes.extend(target.attribute(None, Some(Attribute::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP)));
        let heuristic = self.finalized(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, &attributes)?;
        let (name, kind) = (Attribute::CUDNN_ATTR_ENGINEHEUR_RESULTS, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
        let found = heuristic.filled(name, kind, CONFIGURATIONS_MAX, self.place)?;
        self.parts.push(heuristic);
        Ok(found)
    }

    fn pinned(&mut self, graph: &Descriptor, pin: PinnedEngine, target: Target<'_>) -> Result<Descriptor> {
        let (graph, index) = ([graph], [pin.engine]);
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_ENGINE_OPERATION_GRAPH, Values::Descriptors(&graph)),
            (Attribute::CUDNN_ATTR_ENGINE_GLOBAL_INDEX, Values::Longs(&index)),
        ];
        attributes.extend(target.attribute(None, Some(Attribute::CUDNN_ATTR_ENGINE_DEVICEPROP)));
        let engine = self.finalized(Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR, &attributes)?;
        let knob = |(kind, value): &(Knob, i64)| {
            let attributes = [
                (Attribute::CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, Values::Knob(*kind)),
                (Attribute::CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, Values::Longs(std::slice::from_ref(value))),
            ];
            self.finalized(Kind::CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR, &attributes)
        };
        let knobs = pin.knobs.iter().map(knob).collect::<Result<Vec<_>, _>>()?;
        let choices: Vec<&Descriptor> = knobs.iter().collect();
        let attributes = [
            (Attribute::CUDNN_ATTR_ENGINECFG_ENGINE, Values::Descriptors(&[&engine])),
            (Attribute::CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, Values::Descriptors(&choices)),
        ];
        let configuration = self.finalized(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, &attributes)?;
        self.parts.push(engine);
        self.parts.extend(knobs);
        Ok(configuration)
    }

    /// Creates a plan. Returns the plan and its workspace size in bytes.
    fn plan(&self, configuration: &Descriptor, target: Target<'_>) -> Result<(Descriptor, usize)> {
        use Attribute::{CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP as DEVICE, CUDNN_ATTR_EXECUTION_PLAN_HANDLE as HANDLE};
        let configuration = [configuration];
        let mut attributes =
            vec![(Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, Values::Descriptors(&configuration))];
        attributes.extend(target.attribute(Some(HANDLE), Some(DEVICE)));
        let plan = self.finalized(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &attributes)?;
        let bytes = plan.integer(Attribute::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, self.place)?;
        Ok((plan, usize::try_from(bytes).unwrap_or(usize::MAX / 2)))
    }
}

impl Target<'_> {
    /// Returns the target as an attribute, named `handle` for a cuDNN handle and `device` for a description. Returns
    /// `None` if that name is `None`.
    fn attribute(&self, handle: Option<Attribute>, device: Option<Attribute>) -> Option<(Attribute, Values<'_>)> {
        match self {
            Target::Handle(raw) => handle.map(|name| (name, Values::Handle(*raw))),
            Target::Described(description) => device.map(|name| (name, Values::Descriptors(description))),
        }
    }
}
