//! The kernels by which the host gives tensors to a device and gets them back. They run on the device's copy stream and
//! never wait: the session sends the data before the token that lets them fire.

use crossbeam_channel::{Receiver, Sender};

use shardflow_kernels::clock::RaceClock;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::op::{CpuArgs, CpuSlice, CpuSliceMut, CustomKernel};
use shardflow_kernels::tensor::{HostData, HostTensor};

use crate::graph::Rate;

/// Writes the next tensors that the session sent.
#[derive(Debug)]
pub struct HostIn {
    /// One message a firing, one tensor a buffer.
    pub receiver: Receiver<Vec<HostTensor>>,
}

/// What one firing of a fetch brought.
#[derive(Debug)]
pub struct Fetched {
    /// Rank of the device.
    pub device: usize,
    /// Which fetch of the device.
    pub rate: Rate,
    /// One tensor a buffer.
    pub tensors: Vec<HostTensor>,
    /// What had happened then.
    pub clock: RaceClock,
}

/// Sends what it reads to the session.
#[derive(Debug)]
pub struct HostOut {
    /// Rank of the device.
    pub device: usize,
    /// Which fetch of the device.
    pub rate: Rate,
    /// To the session.
    pub sender: Sender<Fetched>,
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
                _ => return Err(failed(self.name(), "the data sent is not what the plan says")),
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
        let message = Fetched { device: self.device, rate: self.rate, tensors, clock: RaceClock::capture() };
        // A session that is gone needs no results.
        let _ = self.sender.send(message);
        Ok(())
    }
}
