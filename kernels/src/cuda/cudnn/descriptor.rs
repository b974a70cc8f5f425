//! cuDNN's descriptors. A descriptor first receives its attributes and is then finalized.
#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptor_t,
    cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t, cudnnBackendKnobType_t,
    cudnnBackendTensorReordering_t, cudnnDataType_t, cudnnHandle_t, cudnnPointwiseMode_t, cudnnReduceTensorOp_t,
};

use super::api::Api;
use crate::cuda::context::Raw;
use crate::error::Result;

#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    Longs(&'a [i64]),
    Bool(bool),
    DataType(cudnnDataType_t),
    Pointwise(cudnnPointwiseMode_t),
    Reduction(cudnnReduceTensorOp_t),
    Heuristic(cudnnBackendHeurMode_t),
    Knob(cudnnBackendKnobType_t),
    Reordering(cudnnBackendTensorReordering_t),
    Handle(Raw<cudnnHandle_t>),
    Descriptors(&'a [&'a Descriptor]),
    /// Addresses of device memory or of host scalars. The scalars must live until the descriptor is last used.
    Pointers(&'a [u64]),
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests describe a device"))]
    Text(&'a [u8]),
}

/// An owned descriptor. If it refers to other descriptors, its owner keeps them alive too.
#[derive(Debug)]
pub(super) struct Descriptor {
    raw: Raw<cudnnBackendDescriptor_t>,
    kind: Kind,
    api: &'static Api,
}

impl Descriptor {
    pub(super) fn new(api: &'static Api, kind: Kind, place: &str) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the call writes a handle to a local.
        let code = unsafe { (api.descriptor_create)(kind, &mut raw) };
        api.check(code, "cudnnBackendCreateDescriptor", &describe(place, kind))?;
        Ok(Self { raw: Raw(raw), kind, api })
    }

    pub(super) fn finalized(
        api: &'static Api,
        kind: Kind,
        attributes: &[(Attribute, Values<'_>)],
        place: &str,
    ) -> Result<Self> {
        let descriptor = Self::new(api, kind, place)?;
        attributes.iter().try_for_each(|(name, values)| descriptor.set(*name, *values, place))?;
        // SAFETY: the descriptor is live.
        let code = unsafe { (api.finalize)(descriptor.raw.0) };
        api.check(code, "cudnnBackendFinalize", &describe(place, kind))?;
        Ok(descriptor)
    }

    fn set(&self, name: Attribute, values: Values<'_>, place: &str) -> Result<()> {
        fn one<T>(value: &T) -> *const c_void {
            std::ptr::from_ref(value).cast()
        }
        let raws: Vec<cudnnBackendDescriptor_t>;
        let (kind, count, start) = match &values {
            Values::Longs(values) => (Type::CUDNN_TYPE_INT64, values.len(), values.as_ptr().cast()),
            Values::Bool(value) => (Type::CUDNN_TYPE_BOOLEAN, 1, one(value)),
            Values::DataType(value) => (Type::CUDNN_TYPE_DATA_TYPE, 1, one(value)),
            Values::Pointwise(value) => (Type::CUDNN_TYPE_POINTWISE_MODE, 1, one(value)),
            Values::Reduction(value) => (Type::CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, one(value)),
            Values::Heuristic(value) => (Type::CUDNN_TYPE_HEUR_MODE, 1, one(value)),
            Values::Knob(value) => (Type::CUDNN_TYPE_KNOB_TYPE, 1, one(value)),
            Values::Reordering(value) => (Type::CUDNN_TYPE_TENSOR_REORDERING_MODE, 1, one(value)),
            Values::Handle(value) => (Type::CUDNN_TYPE_HANDLE, 1, one(&value.0)),
            Values::Descriptors(values) => {
                raws = values.iter().map(|descriptor| descriptor.raw.0).collect();
                (Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, raws.len(), raws.as_ptr().cast())
            }
            Values::Pointers(values) => (Type::CUDNN_TYPE_VOID_PTR, values.len(), values.as_ptr().cast()),
            Values::Text(values) => (Type::CUDNN_TYPE_CHAR, values.len(), values.as_ptr().cast()),
        };
        // SAFETY: the descriptor is live. `start` points to `count` values of the given type, which cuDNN copies.
        let code = unsafe { (self.api.set_attribute)(self.raw.0, name, kind, count as i64, start) };
        self.api.check(code, "cudnnBackendSetAttribute", &format!("{}, {name:?}", describe(place, self.kind)))
    }

    pub(super) fn integer(&self, name: Attribute, place: &str) -> Result<i64> {
        let (mut value, mut count) = (0i64, 0);
        // SAFETY: the call writes at most one integer, to a local.
        let code = unsafe {
            let to = (&raw mut value).cast();
            (self.api.get_attribute)(self.raw.0, name, Type::CUDNN_TYPE_INT64, 1, &mut count, to)
        };
        self.api.check(code, "cudnnBackendGetAttribute", &format!("{}, {name:?}", describe(place, self.kind)))?;
        Ok(value)
    }

    /// Returns up to `count_max` descriptors that cuDNN fills in.
    pub(super) fn filled(&self, name: Attribute, kind: Kind, count_max: usize, place: &str) -> Result<Vec<Self>> {
        let descriptors = (0..count_max).map(|_| Self::new(self.api, kind, place));
        let mut descriptors = descriptors.collect::<Result<Vec<_>, _>>()?;
        let mut raws: Vec<cudnnBackendDescriptor_t> = descriptors.iter().map(|descriptor| descriptor.raw.0).collect();
        let (mut count, to) = (0, raws.as_mut_ptr().cast());
        // SAFETY: cuDNN fills in at most `count_max` of the descriptors in `raws`.
        let code = unsafe {
            let kind = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
            (self.api.get_attribute)(self.raw.0, name, kind, count_max as i64, &mut count, to)
        };
        self.api.check(code, "cudnnBackendGetAttribute", &format!("{}, {name:?}", describe(place, self.kind)))?;
        descriptors.truncate(usize::try_from(count).unwrap_or(0));
        Ok(descriptors)
    }

    /// Runs a plan on the handle's stream. The caller guarantees that the memory at the addresses in `pack` holds the
    /// tensors and lives until the stream has passed the call. Host scalars must live until this function returns.
    pub(super) fn execute(&self, handle: Raw<cudnnHandle_t>, pack: &Self, place: &str) -> Result<()> {
        // SAFETY: the handle and the descriptors are live. The caller guarantees that the addresses are valid.
        let code = unsafe { (self.api.execute)(handle.0, self.raw.0, pack.raw.0) };
        self.api.check(code, "cudnnBackendExecute", place)
    }
}

fn describe(place: &str, kind: Kind) -> String {
    format!("{place}, {kind:?}")
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the descriptor was created in `new` and is destroyed once. The owner has bound the context.
        let _ = unsafe { (self.api.descriptor_destroy)(self.raw.0) };
    }
}
