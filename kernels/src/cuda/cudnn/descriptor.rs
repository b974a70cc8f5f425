//! cuDNN's descriptors: bags of attributes that are set, then sealed.
#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendAttributeType_t as Type, cudnnBackendDescriptor_t,
    cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t, cudnnBackendKnobType_t,
    cudnnBackendTensorReordering_t, cudnnDataType_t, cudnnHandle_t, cudnnPointwiseMode_t, cudnnReduceTensorOp_t,
};

use super::api::Api;
use crate::cuda::context::Raw;
use crate::error::KernelError;

/// An attribute's values, each of its own type.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    Longs(&'a [i64]),
    Bool(bool),
    Data(cudnnDataType_t),
    Pointwise(cudnnPointwiseMode_t),
    Reduction(cudnnReduceTensorOp_t),
    Heuristic(cudnnBackendHeurMode_t),
    Knob(cudnnBackendKnobType_t),
    Reordering(cudnnBackendTensorReordering_t),
    Handle(Raw<cudnnHandle_t>),
    Descriptors(&'a [&'a Descriptor]),
    /// Addresses of the device, or of numbers of the host that live until the descriptor was used.
    Pointers(&'a [u64]),
    #[cfg_attr(not(test), expect(dead_code, reason = "describes a device that is not there"))]
    Text(&'a [u8]),
}

/// A descriptor; destroyed with it. Those that it refers to are kept by whoever keeps it.
pub(super) struct Descriptor {
    raw: Raw<cudnnBackendDescriptor_t>,
    kind: Kind,
    api: &'static Api,
}

impl std::fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kind.fmt(f)
    }
}

impl Descriptor {
    pub(super) fn new(api: &'static Api, kind: Kind, place: &str) -> Result<Self, KernelError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes a handle to a local.
        let code = unsafe { (api.descriptor_create)(kind, &mut raw) };
        api.check(code, "cudnnBackendCreateDescriptor", &told(place, kind))?;
        Ok(Self { raw: Raw(raw), kind, api })
    }

    /// Makes one of these attributes.
    pub(super) fn sealed(
        api: &'static Api,
        kind: Kind,
        attributes: &[(Attribute, Values<'_>)],
        place: &str,
    ) -> Result<Self, KernelError> {
        let descriptor = Self::new(api, kind, place)?;
        attributes.iter().try_for_each(|(name, values)| descriptor.set(*name, *values, place))?;
        // SAFETY: a live descriptor.
        let code = unsafe { (api.finalize)(descriptor.raw.0) };
        api.check(code, "cudnnBackendFinalize", &told(place, kind))?;
        Ok(descriptor)
    }

    fn set(&self, name: Attribute, values: Values<'_>, place: &str) -> Result<(), KernelError> {
        fn one<T>(value: &T) -> *const c_void {
            std::ptr::from_ref(value).cast()
        }
        let raws: Vec<cudnnBackendDescriptor_t>;
        let (kind, count, start) = match &values {
            Values::Longs(values) => (Type::CUDNN_TYPE_INT64, values.len(), values.as_ptr().cast()),
            Values::Bool(value) => (Type::CUDNN_TYPE_BOOLEAN, 1, one(value)),
            Values::Data(value) => (Type::CUDNN_TYPE_DATA_TYPE, 1, one(value)),
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
        // SAFETY: a live descriptor; so many values of the type that is named lie there, and cuDNN copies them.
        let code = unsafe { (self.api.set_attribute)(self.raw.0, name, kind, count as i64, start) };
        self.api.check(code, "cudnnBackendSetAttribute", &format!("{}, {name:?}", told(place, self.kind)))
    }

    /// A number that cuDNN has set.
    pub(super) fn number(&self, name: Attribute, place: &str) -> Result<i64, KernelError> {
        let (mut value, mut count) = (0i64, 0);
        // SAFETY: at most one number is written, to a local.
        let code = unsafe {
            let to = (&raw mut value).cast();
            (self.api.get_attribute)(self.raw.0, name, Type::CUDNN_TYPE_INT64, 1, &mut count, to)
        };
        self.api.check(code, "cudnnBackendGetAttribute", &format!("{}, {name:?}", told(place, self.kind)))?;
        Ok(value)
    }

    /// Up to so many descriptors that cuDNN fills in.
    pub(super) fn filled(
        &self,
        name: Attribute,
        kind: Kind,
        most: usize,
        place: &str,
    ) -> Result<Vec<Self>, KernelError> {
        let made = (0..most).map(|_| Self::new(self.api, kind, place));
        let mut made = made.collect::<Result<Vec<_>, _>>()?;
        let mut raws: Vec<cudnnBackendDescriptor_t> = made.iter().map(|descriptor| descriptor.raw.0).collect();
        let (mut count, to) = (0, raws.as_mut_ptr().cast());
        // SAFETY: cuDNN fills in the descriptors that lie there, at most so many.
        let code = unsafe {
            let kind = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
            (self.api.get_attribute)(self.raw.0, name, kind, most as i64, &mut count, to)
        };
        self.api.check(code, "cudnnBackendGetAttribute", &format!("{}, {name:?}", told(place, self.kind)))?;
        made.truncate(usize::try_from(count).unwrap_or(0));
        Ok(made)
    }

    /// Runs a plan on the handle's stream.
    ///
    /// The caller guarantees that the addresses in `pack` are of device memory that holds the plan's tensors and lives
    /// until the stream has come past, and of numbers of the host that live until this returns.
    pub(super) fn execute(&self, handle: Raw<cudnnHandle_t>, pack: &Self, place: &str) -> Result<(), KernelError> {
        // SAFETY: live handle and descriptors; the rest is the caller's.
        let code = unsafe { (self.api.execute)(handle.0, self.raw.0, pack.raw.0) };
        self.api.check(code, "cudnnBackendExecute", place)
    }
}

/// Which descriptor of what.
fn told(place: &str, kind: Kind) -> String {
    format!("{place}, {kind:?}")
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once; whoever keeps it has the context current.
        let _ = unsafe { (self.api.descriptor_destroy)(self.raw.0) };
    }
}
