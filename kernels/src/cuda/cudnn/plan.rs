//! A graph as cuDNN's plan: descriptors, an engine's configuration, and what each execution binds.

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t,
    cudnnBackendKnobType_t as Knob, cudnnBackendTensorReordering_t, cudnnDataType_t, cudnnHandle_t,
    cudnnPointwiseMode_t, cudnnReduceTensorOp_t,
};

use super::api::Api;
use super::descriptor::{Descriptor, Values};
use super::graph::{Data, Graph, Home, Mode, Node, Of, Tensor};
use crate::cuda::context::Raw;
use crate::cuda::raw_stream::RawStream;
use crate::cuda::step::Place;
use crate::error::KernelError;

/// What the fused kernels ask of addresses.
pub(super) const ALIGNMENT: u64 = 16;

/// Configurations of engines that are tried; the heuristic gives fewer.
const CONFIGURATIONS_MAX: usize = 8;

/// What a plan is made for.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    /// The device that is current.
    Handle(Raw<cudnnHandle_t>),
    /// A device that need not be there.
    #[cfg_attr(not(test), expect(dead_code, reason = "for a check without a GPU"))]
    Described(&'a Descriptor),
}

/// One engine with all its knobs, in the place of the heuristic's choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pin {
    pub(super) engine: i64,
    pub(super) knobs: &'static [(Knob, i64)],
}

/// A finished plan.
#[derive(Debug)]
pub(super) struct Plan {
    plan: Descriptor,
    /// What the plan refers to.
    _parts: Vec<Descriptor>,
    graph: Graph,
}

impl Plan {
    /// Takes the first engine that can run the graph with at most so many bytes of workspace.
    pub(super) fn new(
        api: &'static Api,
        target: Target<'_>,
        graph: Graph,
        pin: Option<Pin>,
        bytes_max: usize,
        place: &str,
    ) -> Result<Self, KernelError> {
        let mut builder = Builder { api, place, parts: Vec::new() };
        let is_summed = |tensor: &Tensor| graph.summed.is_some_and(|(start, _)| tensor.home == Home::Scratch(start));
        let tensors = graph.tensors.iter().enumerate().map(|(i, tensor)| builder.tensor(i, tensor, is_summed(tensor)));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let nodes = graph.nodes.iter().map(|node| builder.node(node, &tensors)).collect::<Result<Vec<_>, _>>()?;
        let operations: Vec<&Descriptor> = nodes.iter().collect();
        let mut attributes = vec![(Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS, Values::Descriptors(&operations))];
        if let Target::Handle(handle) = target {
            attributes.push((Attribute::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, Values::Handle(handle)));
        }
        let whole = builder.sealed(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, &attributes)?;
        let configurations = match pin {
            Some(pin) => vec![builder.pinned(&whole, pin, target)?],
            None => builder.configurations(&whole, target)?,
        };
        let mut refused = None;
        for configuration in &configurations {
            match builder.plan(configuration, target) {
                Ok((plan, workspace_bytes)) if graph.scratch_bytes + workspace_bytes <= bytes_max => {
                    let parts = [builder.parts, tensors, nodes, vec![whole], configurations];
                    let _parts = parts.into_iter().flatten().collect();
                    return Ok(Self { plan, _parts, graph });
                }
                Ok((_, bytes)) => {
                    let (most, got) = (format!("at most {bytes_max} bytes"), graph.scratch_bytes + bytes);
                    refused = Some(KernelError::arguments("attention", "cuDNN's workspace", most, format!("{got}")));
                }
                Err(error) => refused = Some(error),
            }
        }
        let none = || KernelError::arguments("attention", place, "an engine of cuDNN's that runs it", "none");
        Err(refused.unwrap_or_else(none))
    }

    /// Puts it on the handle's stream; false, and nothing is done, where an address is not aligned as it must be.
    ///
    /// `at` gives the addresses of the launch's buffers, which are of device memory that holds them and lives until the
    /// stream has come past; so is `workspace`, of as many bytes as the plan was made with at most.
    pub(super) fn execute(
        &self,
        api: &'static Api,
        handle: Raw<cudnnHandle_t>,
        at: &dyn Fn(Place) -> Result<u64, KernelError>,
        workspace: u64,
        lane: &RawStream,
        place: &str,
    ) -> Result<bool, KernelError> {
        let (mut ids, mut pointers) = (Vec::new(), Vec::new());
        for (i, tensor) in self.graph.tensors.iter().enumerate() {
            let pointer = match &tensor.home {
                Home::Virtual => continue,
                Home::Buffer(place) => at(*place)?,
                Home::Scratch(start) => workspace + *start as u64,
                // The plan lives in its cache while cuDNN reads the number.
                Home::Number(value) => std::ptr::from_ref(value).expose_provenance() as u64,
            };
            if !matches!(tensor.home, Home::Number(_)) && pointer % ALIGNMENT != 0 {
                return Ok(false);
            }
            ids.push(id(i));
            pointers.push(pointer);
        }
        let attributes = [
            (Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Values::Longs(&ids)),
            (Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Values::Pointers(&pointers)),
            (
                Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
                Values::Pointers(&[workspace + self.graph.scratch_bytes as u64]),
            ),
        ];
        let pack = Descriptor::sealed(api, Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &attributes, place)?;
        if let Some((start, floats)) = self.graph.summed {
            lane.fill(workspace + start as u64, 0, floats)?;
        }
        self.plan.execute(handle, &pack, place)?;
        Ok(true)
    }
}

/// A tensor's unique id.
fn id(index: usize) -> i64 {
    index as i64 + 1
}

struct Builder<'a> {
    api: &'static Api,
    place: &'a str,
    /// Descriptors of what operations do, and engines.
    parts: Vec<Descriptor>,
}

impl Builder<'_> {
    fn sealed(&self, kind: Kind, attributes: &[(Attribute, Values<'_>)]) -> Result<Descriptor, KernelError> {
        Descriptor::sealed(self.api, kind, attributes, self.place)
    }

    /// `summed` in the layout that NVIDIA's frontend gives the sums of dq, which only cuDNN's own kernels read.
    fn tensor(&self, index: usize, tensor: &Tensor, summed: bool) -> Result<Descriptor, KernelError> {
        let id = [id(index)];
        let data = match tensor.data {
            Data::Bf16 => cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            Data::F32 => cudnnDataType_t::CUDNN_DATA_FLOAT,
            Data::I32 => cudnnDataType_t::CUDNN_DATA_INT32,
            Data::Bool => cudnnDataType_t::CUDNN_DATA_BOOLEAN,
        };
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_TENSOR_UNIQUE_ID, Values::Longs(&id)),
            (Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE, Values::Data(data)),
            (Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Values::Longs(&[ALIGNMENT as i64])),
            (Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS, Values::Longs(&tensor.dims)),
            (Attribute::CUDNN_ATTR_TENSOR_STRIDES, Values::Longs(&tensor.strides)),
            (Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Values::Bool(tensor.home == Home::Virtual)),
            (Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE, Values::Bool(matches!(tensor.home, Home::Number(_)))),
        ];
        let order = Values::Reordering(cudnnBackendTensorReordering_t::CUDNN_TENSOR_REORDERING_F16x16);
        attributes.extend(summed.then_some((Attribute::CUDNN_ATTR_TENSOR_REORDERING_MODE, order)));
        self.sealed(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR, &attributes)
    }

    /// An operation: what it does, if that has a descriptor of its own, and the tensors that it does it to.
    fn operation(
        &mut self,
        kind: Kind,
        what: Option<(Attribute, Descriptor)>,
        tensors: &[(Attribute, &Descriptor)],
    ) -> Result<Descriptor, KernelError> {
        let all = what.iter().map(|(name, what)| (*name, what)).chain(tensors.iter().copied());
        let all: Vec<(Attribute, [&Descriptor; 1])> = all.map(|(name, descriptor)| (name, [descriptor])).collect();
        let attributes: Vec<_> = all.iter().map(|(name, one)| (*name, Values::Descriptors(one))).collect();
        let operation = self.sealed(kind, &attributes)?;
        self.parts.extend(what.map(|(_, what)| what));
        Ok(operation)
    }

    fn node(&mut self, node: &Node, tensors: &[Descriptor]) -> Result<Descriptor, KernelError> {
        use Attribute::*;
        match *node {
            Node::Matmul { a, b, c } => {
                let compute = [(CUDNN_ATTR_MATMUL_COMP_TYPE, Values::Data(cudnnDataType_t::CUDNN_DATA_FLOAT))];
                let what = self.sealed(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR, &compute)?;
                let tensors = [
                    (CUDNN_ATTR_OPERATION_MATMUL_ADESC, &tensors[a]),
                    (CUDNN_ATTR_OPERATION_MATMUL_BDESC, &tensors[b]),
                    (CUDNN_ATTR_OPERATION_MATMUL_CDESC, &tensors[c]),
                ];
                let what = Some((CUDNN_ATTR_OPERATION_MATMUL_DESC, what));
                self.operation(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, what, &tensors)
            }
            Node::Pointwise { mode, x, b, t, y } => {
                let what = Some((CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, self.pointwise(mode)?));
                let mut given = vec![
                    (CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &tensors[x]),
                    (CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &tensors[y]),
                ];
                given.extend(b.map(|b| (CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &tensors[b])));
                given.extend(t.map(|t| (CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &tensors[t])));
                self.operation(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, what, &given)
            }
            Node::Reduce { of, x, y } => {
                let operator = match of {
                    Of::Max => cudnnReduceTensorOp_t::CUDNN_REDUCE_TENSOR_MAX,
                    Of::Sum => cudnnReduceTensorOp_t::CUDNN_REDUCE_TENSOR_ADD,
                };
                let attributes = [
                    (CUDNN_ATTR_REDUCTION_OPERATOR, Values::Reduction(operator)),
                    (CUDNN_ATTR_REDUCTION_COMP_TYPE, Values::Data(cudnnDataType_t::CUDNN_DATA_FLOAT)),
                ];
                let what = self.sealed(Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR, &attributes)?;
                let what = Some((CUDNN_ATTR_OPERATION_REDUCTION_DESC, what));
                let tensors = [
                    (CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &tensors[x]),
                    (CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &tensors[y]),
                ];
                self.operation(Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, what, &tensors)
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

    fn pointwise(&self, mode: Mode) -> Result<Descriptor, KernelError> {
        use cudnnPointwiseMode_t::*;
        let (number, dim) = match mode {
            Mode::Add => (CUDNN_POINTWISE_ADD, None),
            Mode::Sub => (CUDNN_POINTWISE_SUB, None),
            Mode::Mul => (CUDNN_POINTWISE_MUL, None),
            Mode::Div => (CUDNN_POINTWISE_DIV, None),
            Mode::Exp => (CUDNN_POINTWISE_EXP, None),
            Mode::Log => (CUDNN_POINTWISE_LOG, None),
            Mode::Identity => (CUDNN_POINTWISE_IDENTITY, None),
            Mode::Index(dim) => (CUDNN_POINTWISE_GEN_INDEX, Some([dim])),
            Mode::IsNotLess => (CUDNN_POINTWISE_CMP_GE, None),
            Mode::Select => (CUDNN_POINTWISE_BINARY_SELECT, None),
        };
        let precision = match mode {
            Mode::IsNotLess => cudnnDataType_t::CUDNN_DATA_BOOLEAN,
            _ => cudnnDataType_t::CUDNN_DATA_FLOAT,
        };
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_POINTWISE_MODE, Values::Pointwise(number)),
            (Attribute::CUDNN_ATTR_POINTWISE_MATH_PREC, Values::Data(precision)),
        ];
        attributes.extend(dim.iter().map(|dim| (Attribute::CUDNN_ATTR_POINTWISE_AXIS, Values::Longs(dim))));
        self.sealed(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR, &attributes)
    }

    /// What the heuristic thinks of, best first.
    fn configurations(&mut self, whole: &Descriptor, target: Target<'_>) -> Result<Vec<Descriptor>, KernelError> {
        let whole = [whole];
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, Values::Descriptors(&whole)),
            (Attribute::CUDNN_ATTR_ENGINEHEUR_MODE, Values::Heuristic(cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A)),
        ];
        let device = target.device();
        attributes.extend(device.iter().map(|d| (Attribute::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, Values::Descriptors(d))));
        let heuristic = self.sealed(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, &attributes)?;
        let (name, kind) = (Attribute::CUDNN_ATTR_ENGINEHEUR_RESULTS, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
        let found = heuristic.filled(name, kind, CONFIGURATIONS_MAX, self.place)?;
        self.parts.push(heuristic);
        Ok(found)
    }

    fn pinned(&mut self, whole: &Descriptor, pin: Pin, target: Target<'_>) -> Result<Descriptor, KernelError> {
        let (whole, index, device) = ([whole], [pin.engine], target.device());
        let mut attributes = vec![
            (Attribute::CUDNN_ATTR_ENGINE_OPERATION_GRAPH, Values::Descriptors(&whole)),
            (Attribute::CUDNN_ATTR_ENGINE_GLOBAL_INDEX, Values::Longs(&index)),
        ];
        attributes.extend(device.iter().map(|d| (Attribute::CUDNN_ATTR_ENGINE_DEVICEPROP, Values::Descriptors(d))));
        let engine = self.sealed(Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR, &attributes)?;
        let knob = |(kind, value): &(Knob, i64)| {
            let attributes = [
                (Attribute::CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, Values::Knob(*kind)),
                (Attribute::CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, Values::Longs(std::slice::from_ref(value))),
            ];
            self.sealed(Kind::CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR, &attributes)
        };
        let knobs = pin.knobs.iter().map(knob).collect::<Result<Vec<_>, _>>()?;
        let choices: Vec<&Descriptor> = knobs.iter().collect();
        let attributes = [
            (Attribute::CUDNN_ATTR_ENGINECFG_ENGINE, Values::Descriptors(&[&engine])),
            (Attribute::CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, Values::Descriptors(&choices)),
        ];
        let configuration = self.sealed(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, &attributes)?;
        self.parts.push(engine);
        self.parts.extend(knobs);
        Ok(configuration)
    }

    /// A plan, and the bytes of workspace that it needs.
    fn plan(&self, configuration: &Descriptor, target: Target<'_>) -> Result<(Descriptor, usize), KernelError> {
        let (configuration, device) = ([configuration], target.device());
        let mut attributes =
            vec![(Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, Values::Descriptors(&configuration))];
        if let Target::Handle(handle) = target {
            attributes.push((Attribute::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, Values::Handle(handle)));
        }
        attributes
            .extend(device.iter().map(|d| (Attribute::CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, Values::Descriptors(d))));
        let plan = self.sealed(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &attributes)?;
        let bytes = plan.number(Attribute::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, self.place)?;
        Ok((plan, usize::try_from(bytes).unwrap_or(usize::MAX / 2)))
    }
}

impl<'a> Target<'a> {
    fn device(self) -> Option<[&'a Descriptor; 1]> {
        match self {
            Target::Handle(_) => None,
            Target::Described(device) => Some([device]),
        }
    }
}
