//! The driver's functions for allocations, copies and fills.
#![allow(unsafe_code, non_snake_case)]

use std::ffi::{c_uchar, c_uint, c_ushort, c_void};

use cudarc::driver::sys::{
    CUDA_MEMCPY2D, CUDA_MEMCPY3D_PEER, CUcontext, CUdeviceptr, CUmemorytype, CUresult, CUstream,
};

use crate::export::exports;
use crate::host::access_as_host;
use crate::memory::Place;
use crate::run::{digest, free};
use crate::scheduler::{synchronise, synchronise_device};
use crate::world::{OpKind, Rows, SourceState, lock, machine};

const NULL_STREAM: u64 = 0;

fn allocate(place: Place, bytes: usize, unborn: bool) -> Result<usize, CUresult> {
    if bytes == 0 {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    let limit = machine().config.memory_bytes;
    lock(&machine().registry).allocate(place, bytes, limit, unborn).ok_or(CUresult::CUDA_ERROR_OUT_OF_MEMORY)
}

/// Submits a copy. Also waits for the copy if the target is pageable memory, because such a copy is synchronous.
///
/// # Safety
///
/// All bytes that `rows` covers must be readable in a pageable source and writable in a pageable target.
unsafe fn copy(from: usize, to: usize, rows: Rows, stream: u64, name: &str) -> Result<(), CUresult> {
    let bytes = rows.width * rows.height;
    let mut state = machine().state();
    let handle = state.stream(stream)?;
    if bytes == 0 {
        return Ok(());
    }
    let mut registry = lock(&machine().registry);
    let (window, is_tight) = (registry.window, rows.height == 1);
    if !window.contains(from) && !window.contains(to) {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    let mut source_state = None;
    let source = registry.find(from).filter(|a| a.place == Place::Host && is_tight && a.pending.1 == 0);
    if let Some(copies_in) = source.filter(|a| from + bytes <= a.base + a.bytes).map(|a| a.copies_in) {
        // SAFETY: the bytes are in a live allocation of pinned memory.
        source_state = Some(SourceState { digest: unsafe { digest(from, bytes) }, copies_in });
    }
    if let Some(source) = registry.find_mut(from) {
        source.pending.0 += 1;
    }
    if let Some(target) = registry.find_mut(to) {
        let is_free = target.place == Place::Host && target.pending.0 == 0 && target.freed.is_none();
        if is_free && is_tight && to + bytes <= target.base + target.bytes {
            // Until the copy has finished, the host reads NaN in every float type. SAFETY: the bytes are in a live
            // allocation of pinned memory that no queued copy uses.
            unsafe { std::ptr::write_bytes(to as *mut u8, 0xff, bytes) };
        }
        target.pending = (target.pending.0 + 1, target.pending.1 + 1);
    }
    drop(registry);
    let staged = (!window.contains(from)).then(|| {
        let row = |r: usize| {
            // SAFETY: the caller keeps the contract above.
            unsafe { std::slice::from_raw_parts((from + r * rows.pitch.0) as *const u8, rows.width) }
        };
        (0..rows.height).flat_map(row).copied().collect::<Vec<u8>>()
    });
    let kind = OpKind::Copy { from, to, rows, staged, source_state };
    state.submit(machine(), handle, kind, format!("{name} of {bytes} bytes"));
    drop(state);
    if window.contains(to) { Ok(()) } else { synchronise(machine(), handle) }
}

fn line(bytes: usize) -> Rows {
    Rows { width: bytes, height: 1, pitch: (bytes, bytes) }
}

/// Checks that each address of a copy is on the device of its context.
fn check_devices(to: (CUdeviceptr, CUcontext), from: (CUdeviceptr, CUcontext)) -> Result<(), CUresult> {
    let is_there = |(address, context): (CUdeviceptr, CUcontext)| {
        let place = lock(&machine().registry).owner(address as usize).map(|o| o.place);
        place == Some(Place::Device((context as usize >> 8).wrapping_sub(1)))
    };
    if !is_there(to) || !is_there(from) {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    find_staged_copy(to.0 as usize, from.0 as usize);
    Ok(())
}

/// Records a finding if a copy between devices must go through host memory. NVIDIA's driver makes such a copy silently.
fn find_staged_copy(to: usize, from: usize) {
    let registry = lock(&machine().registry);
    let (Some(target), Some(source)) = (registry.find(to), registry.find(from)) else { return };
    let (Place::Device(a), Place::Device(b)) = (target.place, source.place) else { return };
    let is_open = a == b || (registry.peers.contains(&(a, b)) && registry.peers.contains(&(b, a)));
    let is_pooled = target.is_pooled() || source.is_pooled();
    drop(registry);
    if !is_open || (a != b && is_pooled) {
        let why = if is_open {
            "the source or the target is in a memory pool without peer access"
        } else {
            "peer access is not enabled in both directions"
        };
        let message = format!("a copy from device {b} to device {a} goes through host memory: {why}");
        machine().report_finding("staged", &message.clone(), || message);
    }
}

fn fill(to: CUdeviceptr, pattern: u32, width: usize, count: usize, stream: CUstream) -> Result<(), CUresult> {
    let mut state = machine().state();
    let handle = state.stream(stream as u64)?;
    if !(to as usize).is_multiple_of(width) {
        return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
    }
    let kind = OpKind::Fill { to: to as usize, pattern, width, count };
    state.submit(machine(), handle, kind, format!("fill of {} bytes", width * count));
    Ok(())
}

exports! { driver;
    fn cuMemAlloc_v2(out: *mut CUdeviceptr, bytes: usize) -> CUresult {
        let device = machine().state().device()?;
        *out = allocate(Place::Device(device), bytes, false)? as CUdeviceptr;
        Ok(())
    }

    fn cuMemAllocAsync(out: *mut CUdeviceptr, bytes: usize, stream: CUstream) -> CUresult {
        let mut state = machine().state();
        let handle = state.stream(stream as u64)?;
        let base = allocate(Place::Device(state.streams[&handle].device), bytes, true)?;
        state.submit(machine(), handle, OpKind::Alloc { base }, format!("allocation of {bytes} bytes"));
        *out = base as CUdeviceptr;
        Ok(())
    }

    fn cuMemFree_v2(address: CUdeviceptr) -> CUresult {
        if address == 0 {
            return Ok(());
        }
        // Wait for the device that owns the memory, which may not be the current device.
        let device = match lock(&machine().registry).owner(address as usize).map(|o| o.place) {
            Some(Place::Device(device)) => device,
            _ => return Err(CUresult::CUDA_ERROR_INVALID_VALUE),
        };
        synchronise_device(machine(), device)?;
        let mut state = machine().state();
        let handle = state.devices[device].null_stream;
        state.submit(machine(), handle, OpKind::Free { base: address as usize }, "free");
        drop(state);
        synchronise(machine(), handle)
    }

    fn cuMemFreeAsync(address: CUdeviceptr, stream: CUstream) -> CUresult {
        let mut state = machine().state();
        let handle = state.stream(stream as u64)?;
        state.submit(machine(), handle, OpKind::Free { base: address as usize }, "asynchronous free");
        Ok(())
    }

    fn cuMemHostAlloc(out: *mut *mut c_void, bytes: usize, _flags: c_uint) -> CUresult {
        machine().state().device()?;
        *out = allocate(Place::Host, bytes, false)? as *mut c_void;
        Ok(())
    }

    fn cuMemFreeHost(address: *mut c_void) -> CUresult {
        let base = address as usize;
        let pending = lock(&machine().registry).find(base).map(|a| a.pending.0);
        match pending {
            None => return Err(CUresult::CUDA_ERROR_INVALID_VALUE),
            Some(0) => {}
            Some(_) => machine().report_finding("use-after-free", "pinned", || {
                format!("pinned memory at {base:#x} is freed while copies that use it are queued")
            }),
        }
        let name = "free of pinned memory";
        access_as_host(machine(), name, |accessor| free(accessor, machine(), base, name));
        Ok(())
    }

    fn cuMemcpyHtoD_v2(to: CUdeviceptr, from: *const c_void, bytes: usize) -> CUresult {
        copy(from as usize, to as usize, line(bytes), NULL_STREAM, "copy to the device")?;
        synchronise(machine(), NULL_STREAM)
    }

    fn cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: *const c_void, bytes: usize, stream: CUstream) -> CUresult {
        copy(from as usize, to as usize, line(bytes), stream as u64, "copy to the device")
    }

    fn cuMemcpyDtoH_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize) -> CUresult {
        copy(from as usize, to as usize, line(bytes), NULL_STREAM, "copy to the host")?;
        synchronise(machine(), NULL_STREAM)
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream) -> CUresult {
        copy(from as usize, to as usize, line(bytes), stream as u64, "copy to the host")
    }

    fn cuMemcpyDtoD_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize) -> CUresult {
        copy(from as usize, to as usize, line(bytes), NULL_STREAM, "copy")?;
        synchronise(machine(), NULL_STREAM)
    }

    fn cuMemcpyDtoDAsync_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize, stream: CUstream) -> CUresult {
        copy(from as usize, to as usize, line(bytes), stream as u64, "copy")
    }

    fn cuMemcpyAsync(to: CUdeviceptr, from: CUdeviceptr, bytes: usize, stream: CUstream) -> CUresult {
        copy(from as usize, to as usize, line(bytes), stream as u64, "copy")
    }

    fn cuMemcpyPeerAsync(
        to: CUdeviceptr,
        to_context: CUcontext,
        from: CUdeviceptr,
        from_context: CUcontext,
        bytes: usize,
        stream: CUstream,
    ) -> CUresult {
        check_devices((to, to_context), (from, from_context))?;
        copy(from as usize, to as usize, line(bytes), stream as u64, "copy between devices")
    }

    fn cuMemcpy3DPeerAsync(description: *const CUDA_MEMCPY3D_PEER, stream: CUstream) -> CUresult {
        let d = &*description;
        let is_device = |kind: CUmemorytype| kind == CUmemorytype::CU_MEMORYTYPE_DEVICE;
        if !is_device(d.srcMemoryType) || !is_device(d.dstMemoryType) || d.Depth != 1 {
            return Err(CUresult::CUDA_ERROR_NOT_SUPPORTED);
        }
        let is_wrong = |pitch: usize| pitch < d.WidthInBytes || pitch > i32::MAX as usize;
        let is_odd = [d.srcXInBytes, d.srcY, d.srcZ, d.srcLOD, d.dstXInBytes, d.dstY, d.dstZ, d.dstLOD] != [0; 8];
        if is_wrong(d.srcPitch) || is_wrong(d.dstPitch) || is_odd || d.Height > d.srcHeight.min(d.dstHeight) {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        check_devices((d.dstDevice, d.dstContext), (d.srcDevice, d.srcContext))?;
        let rows = Rows { width: d.WidthInBytes, height: d.Height, pitch: (d.srcPitch, d.dstPitch) };
        copy(d.srcDevice as usize, d.dstDevice as usize, rows, stream as u64, "copy of rows between devices")
    }

    fn cuMemcpy2DAsync_v2(description: *const CUDA_MEMCPY2D, stream: CUstream) -> CUresult {
        let d = &*description;
        let base = |kind: CUmemorytype, host: usize, device: CUdeviceptr| match kind {
            CUmemorytype::CU_MEMORYTYPE_HOST => Ok(host),
            CUmemorytype::CU_MEMORYTYPE_DEVICE | CUmemorytype::CU_MEMORYTYPE_UNIFIED => Ok(device as usize),
            _ => Err(CUresult::CUDA_ERROR_NOT_SUPPORTED),
        };
        let from = base(d.srcMemoryType, d.srcHost as usize, d.srcDevice)? + d.srcY * d.srcPitch + d.srcXInBytes;
        let to = base(d.dstMemoryType, d.dstHost as usize, d.dstDevice)? + d.dstY * d.dstPitch + d.dstXInBytes;
        let is_wrong = |pitch: usize| d.Height > 1 && pitch < d.WidthInBytes;
        if is_wrong(d.srcPitch) || is_wrong(d.dstPitch) {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let rows = Rows { width: d.WidthInBytes, height: d.Height, pitch: (d.srcPitch, d.dstPitch) };
        copy(from, to, rows, stream as u64, "copy of rows")
    }

    fn cuMemsetD8Async(to: CUdeviceptr, value: c_uchar, count: usize, stream: CUstream) -> CUresult {
        fill(to, u32::from(value), 1, count, stream)
    }

    fn cuMemsetD16Async(to: CUdeviceptr, value: c_ushort, count: usize, stream: CUstream) -> CUresult {
        fill(to, u32::from(value), 2, count, stream)
    }

    fn cuMemsetD32Async(to: CUdeviceptr, value: c_uint, count: usize, stream: CUstream) -> CUresult {
        fill(to, value, 4, count, stream)
    }

    fn cuStreamWriteValue32_v2(stream: CUstream, to: CUdeviceptr, value: c_uint, flags: c_uint) -> CUresult {
        // The flag omits memory barriers. `cuda.h` permits this flag only on devices that do not support such barriers.
        if flags != 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        fill(to, value, 4, 1, stream)
    }
}
