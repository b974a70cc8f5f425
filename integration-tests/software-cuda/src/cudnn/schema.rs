//! The attributes of each kind of descriptor: the type, the maximum number of values, and whether it is required.
use cudarc::cudnn::sys::cudnnBackendAttributeName_t::{self as Attribute, *};
use cudarc::cudnn::sys::cudnnBackendAttributeType_t::{self as Type, *};
use cudarc::cudnn::sys::cudnnBackendDescriptorType_t::{self as Kind, *};

/// The rule of one attribute.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttributeRule {
    /// The attribute.
    pub name: Attribute,
    /// Type of the values.
    pub kind: Type,
    /// Maximum number of values.
    pub count_max: usize,
    /// Whether the descriptor requires the attribute.
    pub is_required: bool,
}

const fn rule(name: Attribute, kind: Type, count_max: usize, is_required: bool) -> AttributeRule {
    AttributeRule { name, kind, count_max, is_required }
}

const fn required(name: Attribute, kind: Type) -> AttributeRule {
    rule(name, kind, 1, true)
}

const DESCRIPTOR: Type = CUDNN_TYPE_BACKEND_DESCRIPTOR;

const TENSOR: &[AttributeRule] = &[
    required(CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64),
    required(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE),
    required(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64),
    rule(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 8, true),
    rule(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 8, true),
    rule(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, false),
    rule(CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, false),
    rule(CUDNN_ATTR_TENSOR_REORDERING_MODE, CUDNN_TYPE_TENSOR_REORDERING_MODE, 1, false),
];
const POINTWISE: &[AttributeRule] = &[
    required(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE),
    required(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE),
    rule(CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, false),
];
const OPERATION_POINTWISE: &[AttributeRule] = &[
    required(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, DESCRIPTOR),
    rule(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, DESCRIPTOR, 1, false),
    rule(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, DESCRIPTOR, 1, false),
];
const REDUCTION: &[AttributeRule] = &[
    required(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE),
    required(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE),
];
const OPERATION_REDUCTION: &[AttributeRule] = &[
    required(CUDNN_ATTR_OPERATION_REDUCTION_DESC, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, DESCRIPTOR),
];
const OPERATION_MATMUL: &[AttributeRule] = &[
    required(CUDNN_ATTR_OPERATION_MATMUL_DESC, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_MATMUL_ADESC, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_MATMUL_BDESC, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_MATMUL_CDESC, DESCRIPTOR),
];
const OPERATION_RESHAPE: &[AttributeRule] = &[
    required(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, DESCRIPTOR),
    required(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, DESCRIPTOR),
];
const OPERATION_GRAPH: &[AttributeRule] = &[
    required(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE),
    rule(CUDNN_ATTR_OPERATIONGRAPH_OPS, DESCRIPTOR, 100, true),
];
const HEURISTIC: &[AttributeRule] = &[
    required(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, DESCRIPTOR),
    required(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE),
];
const ENGINE: &[AttributeRule] = &[
    required(CUDNN_ATTR_ENGINE_OPERATION_GRAPH, DESCRIPTOR),
    required(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64),
];
const KNOB_CHOICE: &[AttributeRule] = &[
    required(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE),
    required(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, CUDNN_TYPE_INT64),
];
const ENGINE_CONFIGURATION: &[AttributeRule] = &[
    required(CUDNN_ATTR_ENGINECFG_ENGINE, DESCRIPTOR),
    rule(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, DESCRIPTOR, 64, false),
];
const PLAN: &[AttributeRule] = &[
    required(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE),
    required(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, DESCRIPTOR),
];
const VARIANT_PACK: &[AttributeRule] = &[
    rule(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, 100, true),
    rule(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, 100, true),
    rule(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, false),
];
const MATMUL: &[AttributeRule] = &[required(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE)];

/// Returns the attributes of a kind of descriptor, or none if the kind is not emulated.
pub fn of(kind: Kind) -> &'static [AttributeRule] {
    match kind {
        CUDNN_BACKEND_TENSOR_DESCRIPTOR => TENSOR,
        CUDNN_BACKEND_POINTWISE_DESCRIPTOR => POINTWISE,
        CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR => OPERATION_POINTWISE,
        CUDNN_BACKEND_REDUCTION_DESCRIPTOR => REDUCTION,
        CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR => OPERATION_REDUCTION,
        CUDNN_BACKEND_MATMUL_DESCRIPTOR => MATMUL,
        CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR => OPERATION_MATMUL,
        CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR => OPERATION_RESHAPE,
        CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR => OPERATION_GRAPH,
        CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR => HEURISTIC,
        CUDNN_BACKEND_ENGINE_DESCRIPTOR => ENGINE,
        CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR => KNOB_CHOICE,
        CUDNN_BACKEND_ENGINECFG_DESCRIPTOR => ENGINE_CONFIGURATION,
        CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR => PLAN,
        CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR => VARIANT_PACK,
        _ => &[],
    }
}
