//! One member's call of a collective, with the addresses, the shapes and the stream that every GPU engine needs.

use std::sync::Arc;

use super::device_memory::device_address;
use super::raw_stream::RawStream;
use crate::bound::Bound;
use crate::collective::CollectiveCall;
use crate::error::{KernelError, Result};
use crate::event::BackendObject;
use crate::memory::View;
use crate::tensor::DType;

#[derive(Clone, Debug)]
pub(crate) struct GpuCall<'a> {
    pub(crate) call: &'a CollectiveCall,
    /// Device addresses of the input x and the output y; 0 if absent.
    pub(crate) x: u64,
    pub(crate) y: u64,
    /// Address of the launch's workspace (STAGE-1); 0 if absent.
    pub(crate) workspace: u64,
    /// Shapes of x and y; empty if absent.
    pub(crate) x_shape: &'a [usize],
    pub(crate) y_shape: &'a [usize],
    pub(crate) dtype: DType,
    pub(crate) stream: Arc<RawStream>,
}

impl<'a> GpuCall<'a> {
    pub(crate) fn new(call: &'a CollectiveCall, bound: &'a Bound<'_>, stream: BackendObject) -> Result<Self> {
        let other_backend = |_| KernelError::arguments(call.name(), "stream", "a CUDA stream", "another kind");
        let (x, y) = (bound.reads.first(), bound.writes.first());
        let address = |view: Option<&View<'_>>| view.map_or(Ok(0), device_address);
        let shape = |view: Option<&View<'a>>| view.map_or(&[][..], View::shape);
        Ok(Self {
            call,
            x: address(x)?,
            y: address(y)?,
            workspace: address(bound.workspace.as_ref())?,
            x_shape: shape(x),
            y_shape: shape(y),
            dtype: x.or(y).map_or(DType::F32, View::dtype),
            stream: stream.downcast().map_err(other_backend)?,
        })
    }
}
