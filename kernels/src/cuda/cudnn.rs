//! Runs attention with cuDNN's fused kernels, if cuDNN is installed. Each stream has one handle and caches plans by
//! shape. The launch provides the workspace. The kernels of `attention_*.cu` run the shapes that cuDNN refuses. cuDNN
//! and these kernels give the same results up to rounding, and the same `lse`. So the forward pass and the backward
//! pass may use different implementations.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use cudarc::cudnn::sys::{cudnnBackendKnobType_t as Knob, cudnnHandle_t};

use super::context::{Context, Raw};
use super::gpu::Gpu;
use super::raw_stream::RawStream;
use super::step::{AttentionShape, Pass, Place};
use crate::error::{KernelError, Result};

pub(crate) mod api;
mod descriptor;
mod graph;
mod plan;

#[cfg(test)]
mod tests;

pub use super::attention::Attention;
use api::Api;
use graph::Graph;
use plan::{PinnedEngine, Plan, Target};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct PlanKey {
    pass: Pass,
    sides: [usize; 4],
    scale_bits: u32,
}

impl From<&AttentionShape> for PlanKey {
    fn from(shape: &AttentionShape) -> Self {
        let AttentionShape { pass, batch, time, heads, depth, scale } = *shape;
        Self { pass, sides: [batch, time, heads, depth], scale_bits: scale.to_bits() }
    }
}

#[derive(Debug)]
pub(crate) struct AttentionPlans {
    /// `None` if Shardflow's kernels run this shape.
    by_key: HashMap<PlanKey, Option<Plan>>,
    /// `None` if cuDNN is missing or fails to initialize.
    handle: Option<CudnnHandle>,
    gpu: Arc<Gpu>,
}

#[derive(Debug)]
struct CudnnHandle {
    raw: Raw<cudnnHandle_t>,
    api: &'static Api,
    context: Arc<Context>,
}

impl CudnnHandle {
    /// Requires the context to be bound.
    fn new(gpu: &Gpu, stream: Raw<cudarc::driver::sys::CUstream>, place: &str) -> Result<Self> {
        let (api, mut raw) = (Api::get()?, std::ptr::null_mut());
        // SAFETY: the call writes a handle to a local.
        api.check(unsafe { (api.create)(&mut raw) }, "cudnnCreate", place)?;
        let handle = Self { raw: Raw(raw), api, context: gpu.context.clone() };
        // SAFETY: both handles are live and belong to the same device.
        api.check(unsafe { (api.set_stream)(raw, stream.0.cast()) }, "cudnnSetStream", place)?;
        Ok(handle)
    }
}

impl Drop for CudnnHandle {
    fn drop(&mut self) {
        if self.context.bind_to_drop() {
            // SAFETY: the handle was created in `new` and is destroyed once.
            let _ = unsafe { (self.api.destroy)(self.raw.0) };
        }
    }
}

/// Returns the backward engine and the knobs that sum dq in a fixed order without storing the scores, if cuDNN of this
/// version has such an engine for the GPU. The knobs and the minimum version are those of NVIDIA's cudnn-frontend 1.32.
fn ordered_engine(capability: (i32, i32), version: usize) -> Option<PinnedEngine> {
    const HOPPER: &[(Knob, i64)] = &[
        (Knob::CUDNN_KNOB_TYPE_TILE_M, 2),
        (Knob::CUDNN_KNOB_TYPE_TILE_N, 1),
        (Knob::CUDNN_KNOB_TYPE_KERNEL_CFG, 2),
        (Knob::CUDNN_KNOB_TYPE_STREAM_K, 0),
        (Knob::CUDNN_KNOB_TYPE_TILE_CGA_M, 0),
        (Knob::CUDNN_KNOB_TYPE_STAGES, 4),
    ];
    (capability.0 == 9 && version >= 92_500).then_some(PinnedEngine { engine: 6, knobs: HOPPER })
}

/// Binds the context and destroys the plans. Leaks the plans if the context is lost.
impl Drop for AttentionPlans {
    fn drop(&mut self) {
        let plans = std::mem::take(&mut self.by_key);
        if !self.gpu.context.bind_to_drop() {
            std::mem::forget(plans);
        }
    }
}

impl AttentionPlans {
    /// Creates the cache of one stream. Logs the reason if cuDNN is not used. Requires the context to be bound.
    pub(crate) fn new(gpu: &Arc<Gpu>, stream: Raw<cudarc::driver::sys::CUstream>, place: &str) -> Self {
        let handle = CudnnHandle::new(gpu, stream, place);
        if let Err(error) = &handle {
            tracing::debug!(%error, place, "cuDNN is not used; Shardflow's kernels run attention");
        }
        Self { by_key: HashMap::new(), handle: handle.ok(), gpu: gpu.clone() }
    }

    /// Creates and caches the plan. Caches `None` if cuDNN has no plan for the shape.
    pub(crate) fn prepare(&mut self, shape: &AttentionShape, place: &str) {
        if self.by_key.contains_key(&shape.into()) {
            return;
        }
        let plan = self.plan(shape, &describe(shape, place));
        if let Err(error) = &plan {
            tracing::debug!(%error, "cuDNN cannot run this shape; Shardflow's kernels run it");
        }
        self.by_key.insert(shape.into(), plan.ok().flatten());
    }

    fn plan(&mut self, shape: &AttentionShape, place: &str) -> Result<Option<Plan>> {
        let Some(handle) = &self.handle else { return Ok(None) };
        let pin = match (shape.pass, self.gpu.attention) {
            (_, Attention::Own) => return Ok(None),
            (Pass::Forward, _) | (_, Attention::AnyOrder) => None,
            (_, Attention::Ordered) => match ordered_engine(self.gpu.capability(), handle.api.number()) {
                Some(pin) => Some(pin),
                None => {
                    let ((major, minor), version) = (self.gpu.capability(), handle.api.version());
                    let got = format!("none for compute capability {major}.{minor} in cuDNN {version}");
                    let expected = "a cuDNN engine that sums dq in a fixed order";
                    return Err(KernelError::arguments("attention_grad", "engine", expected, got));
                }
            },
        };
        let (target, graph) = (Target::Handle(handle.raw), Graph::of(shape));
        // Engines that need a larger workspace than the launch provides are not used.
        Plan::new(handle.api, target, graph, pin, shape.workspace_bytes(), place).map(Some)
    }

    /// Enqueues attention. Returns false if Shardflow's kernels must run. Requires a bound context. `address_of`
    /// returns addresses that `Bound` has checked. `workspace` has [`AttentionShape::workspace_bytes`] bytes.
    pub(crate) fn issue(
        &mut self,
        shape: &AttentionShape,
        address_of: &dyn Fn(Place) -> Result<u64>,
        workspace: u64,
        stream: &RawStream,
    ) -> Result<bool> {
        let place = &stream.place;
        self.prepare(shape, place);
        let Entry::Occupied(mut entry) = self.by_key.entry(shape.into()) else { return Ok(false) };
        let (Some(plan), Some(handle)) = (entry.get(), &self.handle) else { return Ok(false) };
        match plan.execute(handle.api, handle.raw, address_of, workspace, stream, &describe(shape, place)) {
            Ok(issued) => {
                self.gpu.attention_counters.count_cudnn(shape.pass, issued);
                Ok(issued)
            }
            Err(error) => {
                // Shardflow's kernels overwrite the outputs completely. If the device is lost, these kernels fail too.
                tracing::warn!(%error, "cuDNN's attention failed; Shardflow's kernels run this shape from now on");
                entry.insert(None);
                Ok(false)
            }
        }
    }
}

fn describe(shape: &AttentionShape, place: &str) -> String {
    let AttentionShape { pass, batch, time, heads, depth, .. } = shape;
    format!("{place}, attention {pass:?} of {batch} x {time} x {heads} x {depth}")
}
