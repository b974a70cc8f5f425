//! Kernels that copy tensors from the host to a device and back. They run on the device's copy stream and never wait:
//! the session sends a kernel's data before the token that lets the kernel fire.

use crossbeam_channel::{Receiver, Sender};

use shardflow_kernels::clock::Stamped;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::op::{CpuArgs, CpuSlice, CpuSliceMut, CustomKernel};
use shardflow_kernels::tensor::{HostData, HostTensor};

use crate::plan::segments::SegmentId;

/// Kernel that writes the session's next tensors to the device.
#[derive(Debug)]
pub struct HostIn {
    /// One message per firing, with one tensor per buffer.
    pub receiver: Receiver<Vec<HostTensor>>,
}

#[derive(Debug)]
pub struct Fetched {
    pub device: usize,
    pub segment: SegmentId,
    /// One tensor per buffer.
    pub tensors: Vec<HostTensor>,
}

/// Kernel that reads tensors and sends them to the session.
#[derive(Debug)]
pub struct HostOut {
    pub device: usize,
    pub segment: SegmentId,
    pub sender: Sender<Stamped<Fetched>>,
}

fn failed(name: &str, message: &str) -> KernelError {
    KernelError::Custom { name: name.to_string(), message: message.to_string() }
}

impl CustomKernel for HostIn {
    fn name(&self) -> &str {
        "host_in"
    }

    fn run_cpu(&self, args: CpuArgs<'_>) -> Result<(), KernelError> {
        let tensors = self.receiver.try_recv().map_err(|_| failed(self.name(), "fired before its data was sent"))?;
        for (write, tensor) in args.writes.into_iter().zip(tensors) {
            match (write.data, &tensor.data) {
                (CpuSliceMut::F32(to), HostData::F32(from)) if to.len() == from.len() => to.copy_from_slice(from),
                (CpuSliceMut::I32(to), HostData::I32(from)) if to.len() == from.len() => to.copy_from_slice(from),
                _ => return Err(failed(self.name(), "the data sent does not have the types and sizes of the plan")),
            }
        }
        Ok(())
    }
}

impl CustomKernel for HostOut {
    fn name(&self) -> &str {
        "host_out"
    }

    fn run_cpu(&self, args: CpuArgs<'_>) -> Result<(), KernelError> {
        let copy = |data: &CpuSlice<'_>| match data {
            CpuSlice::F32(values) => HostData::F32(values.to_vec()),
            CpuSlice::I32(values) => HostData::I32(values.to_vec()),
        };
        let tensors = args.reads.iter().map(|r| HostTensor { shape: r.shape.to_vec(), data: copy(&r.data) }).collect();
        let message = Stamped::new(Fetched { device: self.device, segment: self.segment, tensors });
        // A session that has ended needs no results.
        let _ = self.sender.send(message);
        Ok(())
    }
}
