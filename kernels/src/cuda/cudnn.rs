//! cuDNN's fused attention, where it is there: one stream's handle, and plans by shape; the workspace is the launch's. Whatever
//! cuDNN refuses is left to the kernels of `attention_*.cu`, which do the same to rounding: forward and backward need
//! not be of one kind, for both leave and take the same `lse`.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::cudnn::sys::{cudnnBackendKnobType_t as Knob, cudnnHandle_t};

use super::context::{Context, Raw};
use super::gpu::Gpu;
use super::raw_stream::RawStream;
use super::step::{Flash, Pass, Place};
use crate::error::KernelError;
use crate::op::Op;

pub(crate) mod api;
mod descriptor;
mod graph;
mod plan;

#[cfg(test)]
mod tests;

use api::Api;
use graph::Graph;
use plan::{Pin, Plan, Target};

/// The variable that says which attention is used.
pub const ATTENTION_ENV: &str = "SHARDFLOW_ATTENTION";

/// Which attention a GPU's streams use. All processes of a job must be told the same, or their results differ by
/// rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attention {
    /// Our own kernels.
    Own,
    /// cuDNN's where there is one that gives the same bits each time, else our own.
    #[default]
    Ordered,
    /// cuDNN's, the gradient too where parts of dq are added up as they come: its bits differ from run to run.
    AnyOrder,
}

impl Attention {
    /// What [`ATTENTION_ENV`] asks for: `own`, `cudnn` (also where it is not set) or `cudnn-any-order`.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] for another value.
    pub fn from_env() -> Result<Self, KernelError> {
        Self::parse(std::env::var_os(ATTENTION_ENV).map(|value| value.to_string_lossy().into_owned()).as_deref())
    }

    fn parse(value: Option<&str>) -> Result<Self, KernelError> {
        match value {
            None | Some("" | "cudnn") => Ok(Self::Ordered),
            Some("own") => Ok(Self::Own),
            Some("cudnn-any-order") => Ok(Self::AnyOrder),
            Some(other) => Err(KernelError::Unavailable {
                what: format!("there is no attention {other:?}"),
                hint: format!("set {ATTENTION_ENV} to own, cudnn or cudnn-any-order"),
            }),
        }
    }
}

/// Attention that a GPU was given so far, by who does it.
#[derive(Debug, Default)]
pub(crate) struct Attentions {
    forward: Shares,
    backward: Shares,
}

/// One pass's launches: all, and those of cuDNN among them.
#[derive(Debug, Default)]
struct Shares {
    all: AtomicU64,
    cudnn: AtomicU64,
}

impl Attentions {
    fn of(&self, pass: Pass) -> &Shares {
        match pass {
            Pass::Forward => &self.forward,
            Pass::Backward => &self.backward,
        }
    }

    /// An op was launched, whoever does it.
    pub(crate) fn launched(&self, op: &Op) {
        let pass = match op {
            Op::Attention { .. } => Pass::Forward,
            Op::AttentionGrad { .. } => Pass::Backward,
            _ => return,
        };
        self.of(pass).all.fetch_add(1, Ordering::Relaxed);
    }

    /// Launches by name.
    pub(crate) fn told(&self) -> [(&'static str, u64); 4] {
        let [forward, backward] = [&self.forward, &self.backward].map(|shares| {
            let cudnn = shares.cudnn.load(Ordering::Relaxed);
            (cudnn, shares.all.load(Ordering::Relaxed).saturating_sub(cudnn))
        });
        [
            ("attention_forward_cudnn", forward.0),
            ("attention_forward_own", forward.1),
            ("attention_backward_cudnn", backward.0),
            ("attention_backward_own", backward.1),
        ]
    }
}

/// A shape of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    pass: Pass,
    sides: [usize; 4],
    scale_bits: u32,
}

impl From<&Flash> for Key {
    fn from(flash: &Flash) -> Self {
        let Flash { pass, batch, time, heads, depth, scale } = *flash;
        Self { pass, sides: [batch, time, heads, depth], scale_bits: scale.to_bits() }
    }
}

/// One stream's plans.
#[derive(Debug)]
pub(crate) struct Flashes {
    /// None where our own kernels are to be used.
    by_key: HashMap<Key, Option<Plan>>,
    /// None where there is no cuDNN, or it does not start.
    handle: Option<Handle>,
    gpu: Arc<Gpu>,
}

/// The library's handle; its work goes on one stream.
struct Handle {
    raw: Raw<cudnnHandle_t>,
    api: &'static Api,
    context: Arc<Context>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cuDNN")
    }
}

impl Handle {
    /// The context is bound.
    fn new(gpu: &Gpu, stream: Raw<cudarc::driver::sys::CUstream>, place: &str) -> Result<Self, KernelError> {
        let (api, mut raw) = (Api::get()?, std::ptr::null_mut());
        // SAFETY: writes a handle to a local.
        api.check(unsafe { (api.create)(&mut raw) }, "cudnnCreate", place)?;
        let handle = Self { raw: Raw(raw), api, context: gpu.context().clone() };
        // SAFETY: live handles of one device.
        api.check(unsafe { (api.set_stream)(raw, stream.0.cast()) }, "cudnnSetStream", place)?;
        Ok(handle)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.context.bind_to_drop() {
            // SAFETY: made in `new`, destroyed once.
            let _ = unsafe { (self.api.destroy)(self.raw.0) };
        }
    }
}

/// The engine that adds up dq in one order without a matrix of scores in memory, with the knobs that make it so: those
/// of NVIDIA's cudnn-frontend 1.32, which tells from which version they are there.
fn ordered(capability: (i32, i32), version: usize) -> Option<Pin> {
    const HOPPER: &[(Knob, i64)] = &[
        (Knob::CUDNN_KNOB_TYPE_TILE_M, 2),
        (Knob::CUDNN_KNOB_TYPE_TILE_N, 1),
        (Knob::CUDNN_KNOB_TYPE_KERNEL_CFG, 2),
        (Knob::CUDNN_KNOB_TYPE_STREAM_K, 0),
        (Knob::CUDNN_KNOB_TYPE_TILE_CGA_M, 0),
        (Knob::CUDNN_KNOB_TYPE_STAGES, 4),
    ];
    (capability.0 == 9 && version >= 92_500).then_some(Pin { engine: 6, knobs: HOPPER })
}

/// Plans are destroyed with the context current; where it is lost, not at all.
impl Drop for Flashes {
    fn drop(&mut self) {
        let plans = std::mem::take(&mut self.by_key);
        if !self.gpu.context().bind_to_drop() {
            std::mem::forget(plans);
        }
    }
}

impl Flashes {
    /// For a stream; the context is bound. Says why where cuDNN is not used.
    pub(crate) fn new(gpu: &Arc<Gpu>, stream: Raw<cudarc::driver::sys::CUstream>, place: &str) -> Self {
        let handle = Handle::new(gpu, stream, place);
        if let Err(error) = &handle {
            tracing::debug!(%error, place, "attention by our own kernels");
        }
        Self { by_key: HashMap::new(), handle: handle.ok(), gpu: gpu.clone() }
    }

    /// Makes the plan, or finds that there is none.
    pub(crate) fn prepare(&mut self, flash: &Flash, place: &str) {
        if self.by_key.contains_key(&flash.into()) {
            return;
        }
        let made = self.plan(flash, &told(flash, place));
        if let Err(error) = &made {
            tracing::debug!(%error, "attention of this shape by our own kernels");
        }
        self.by_key.insert(flash.into(), made.ok().flatten());
    }

    fn plan(&mut self, flash: &Flash, place: &str) -> Result<Option<Plan>, KernelError> {
        let Some(handle) = &self.handle else { return Ok(None) };
        let pin = match (flash.pass, self.gpu.attention()) {
            (_, Attention::Own) => return Ok(None),
            (Pass::Forward, _) | (_, Attention::AnyOrder) => None,
            (_, Attention::Ordered) => match ordered(self.gpu.capability(), handle.api.number()) {
                Some(pin) => Some(pin),
                None => {
                    let (expected, version) = ("an engine that adds up in one order", handle.api.version());
                    let got = format!("none for {:?} in cuDNN {version}", self.gpu.capability());
                    return Err(KernelError::arguments("attention_grad", "dq", expected, got));
                }
            },
        };
        let (target, graph) = (Target::Handle(handle.raw), Graph::of(flash));
        // What needs more is left to our own kernels.
        Plan::new(handle.api, target, graph, pin, flash.workspace_bytes(), place).map(Some)
    }

    /// Puts attention on the stream; false where our own kernels are to do it. The context is bound.
    ///
    /// `at` gives the addresses of the launch's buffers, which whoever binds the launch has checked, and `workspace` has
    /// [`Flash::workspace_bytes`].
    pub(crate) fn issue(
        &mut self,
        flash: &Flash,
        at: &dyn Fn(Place) -> Result<u64, KernelError>,
        workspace: u64,
        lane: &RawStream,
    ) -> Result<bool, KernelError> {
        let place = lane.place();
        self.prepare(flash, place);
        let Entry::Occupied(mut known) = self.by_key.entry(flash.into()) else { return Ok(false) };
        let (Some(plan), Some(handle)) = (known.get(), &self.handle) else { return Ok(false) };
        match plan.execute(handle.api, handle.raw, at, workspace, lane, &told(flash, place)) {
            Ok(done) => {
                self.gpu.attentions().of(flash.pass).cudnn.fetch_add(u64::from(done), Ordering::Relaxed);
                Ok(done)
            }
            Err(error) => {
                // What our kernels write, they write whole. Where the device is lost they fail, too.
                tracing::warn!(%error, "cuDNN's attention failed; from now on by our own kernels");
                known.insert(None);
                Ok(false)
            }
        }
    }
}

/// Where, and of what shape.
fn told(flash: &Flash, place: &str) -> String {
    let Flash { pass, batch, time, heads, depth, .. } = flash;
    format!("{place}, attention {pass:?} of {batch} x {time} x {heads} x {depth}")
}
