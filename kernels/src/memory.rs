//! Device memory: arenas, and the typed views that kernels and collectives receive.
//!
//! This file, and `raw_io` for bytes, turn memory into slices. This is sound because:
//! - MEM-1: a view lies inside its arena and is aligned for its element type; [`View::resolve`] checks both.
//! - MEM-2: within a launch no write overlaps another buffer, unless the op may work in place and the buffers are
//!   identical. `cpu::stream` checks that before a kernel runs, and the kernel then gets one slice for both buffers.
//! - MEM-3: across streams no range is read while another stream writes it. The register protocol guarantees that (a
//!   slot is written only while it is free, and read only while it is filled); it cannot be checked here.
//! - MEM-4: memory that is mapped read-only is never written: [`Arena::write_host`], launches and collectives check it.
//! - MEM-5: slices are made only of host memory; `View::check_host` rejects GPU memory before a slice is made.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;

use crate::cuda::memory::{DeviceMemory, Pinned};
use crate::error::KernelError;
use crate::op::Buffer;
use crate::tensor::{DType, HostData, HostTensor, element_count};

mod raw_io;
mod shared;

pub use shared::Access;
use shared::Mapping;

/// Every arena starts at a multiple of this many bytes.
pub const ALIGNMENT: usize = 64;

/// Allocation counters of a device, updated by its arenas.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) bytes: AtomicUsize,
    pub(crate) bytes_peak: AtomicUsize,
    pub(crate) allocations: AtomicUsize,
}

impl Tally {
    pub(crate) fn add(&self, bytes: usize) {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        let now = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.bytes_peak.fetch_max(now, Ordering::Relaxed);
    }
}

/// A fixed block of one device's memory, zeroed when created, freed when the last clone is dropped. It may be shared
/// with other processes of the node, or belong to another process.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Storage>);

/// Kind and location of the memory.
#[derive(Debug)]
enum Storage {
    Host(HostMemory),
    /// A memfd, created by this process or by a peer, that peers can map.
    Shared {
        mapping: Mapping,
        /// Of the device that owns the memory; `None` for a peer's memory, which the peer counts.
        tally: Option<Arc<Tally>>,
    },
    /// Page-locked host memory, which GPUs can copy directly.
    Pinned(Pinned),
    /// GPU memory.
    Cuda(DeviceMemory),
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Storage::Shared { mapping, tally: Some(tally) } = self {
            tally.bytes.fetch_sub(mapping.bytes(), Ordering::Relaxed);
        }
    }
}

#[derive(Debug)]
struct HostMemory {
    start: NonNull<u8>,
    bytes: usize,
    tally: Arc<Tally>,
}

// SAFETY: `start` is an exclusively owned heap allocation, which any thread may free; MEM-3 governs access to its
// contents from several threads.
unsafe impl Send for HostMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for HostMemory {}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if let (Some(layout), true) = (host_layout(self.bytes), self.bytes > 0) {
            // SAFETY: `start` was allocated by `alloc_zeroed` with the same layout (see `Arena::host`) and is freed
            // once.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
        self.tally.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn host_layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes, ALIGNMENT).ok()
}

impl Arena {
    /// Allocates host memory, counted in `tally`.
    pub(crate) fn host(device: usize, bytes: usize, tally: &Arc<Tally>) -> Result<Self, KernelError> {
        let refused = KernelError::OutOfMemory { device, bytes };
        let layout = host_layout(bytes).ok_or_else(|| refused.clone())?;
        let start = if bytes == 0 {
            // Never dereferenced for more than zero bytes; aligned so that empty slices are well formed.
            NonNull::without_provenance(std::num::NonZeroUsize::new(ALIGNMENT).expect("64 is not zero"))
        } else {
            // SAFETY: the layout's size is not zero.
            NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(refused)?
        };
        tally.add(bytes);
        Ok(Self(Arc::new(Storage::Host(HostMemory { start, bytes, tally: tally.clone() }))))
    }

    /// Allocates memory that other processes of the node can map, counted in `tally`.
    pub(crate) fn shared(device: usize, bytes: usize, tally: &Arc<Tally>) -> Result<Self, KernelError> {
        let mapping = Mapping::create(bytes).map_err(|_| KernelError::OutOfMemory { device, bytes })?;
        tally.add(bytes);
        Ok(Self(Arc::new(Storage::Shared { mapping, tally: Some(tally.clone()) })))
    }

    /// An arena of GPU memory.
    pub(crate) fn cuda(memory: DeviceMemory) -> Self {
        Self(Arc::new(Storage::Cuda(memory)))
    }

    /// An arena of page-locked host memory.
    pub(crate) fn pinned(memory: Pinned) -> Self {
        Self(Arc::new(Storage::Pinned(memory)))
    }

    /// The GPU memory of this arena; `None` for host memory.
    pub(crate) fn device_memory(&self) -> Option<&DeviceMemory> {
        match &*self.0 {
            Storage::Cuda(memory) => Some(memory),
            Storage::Host(_) | Storage::Shared { .. } | Storage::Pinned(_) => None,
        }
    }

    /// # Errors
    /// [`KernelError::Arguments`] for GPU memory, which the host cannot address (MEM-5).
    pub(crate) fn check_host(&self, user: &str) -> Result<(), KernelError> {
        let Some(memory) = self.device_memory() else { return Ok(()) };
        let got = format!("memory of {}", memory.place());
        Err(KernelError::arguments(user, "memory", "host memory", got))
    }

    /// Allocates memory that other processes of the node can map and that belongs to no device.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the system provides no memory.
    pub fn shared_by_processes(bytes: usize) -> Result<Self, KernelError> {
        let refused = |cause: std::io::Error| {
            KernelError::arguments("shared memory", "size", format!("{bytes} bytes of memory"), cause.to_string())
        };
        let mapping = Mapping::create(bytes).map_err(refused)?;
        Ok(Self(Arc::new(Storage::Shared { mapping, tally: None })))
    }

    /// Maps memory from a peer's [`Arena::descriptor`], which must have this size.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the descriptor is not a memfd of this size, when its size is not sealed, or when
    /// the mapping fails.
    pub fn map_peer(file: OwnedFd, bytes: usize, access: Access) -> Result<Self, KernelError> {
        let mapping = Mapping::of_peer(file, bytes, access)?;
        Ok(Self(Arc::new(Storage::Shared { mapping, tally: None })))
    }

    /// The descriptor with which a peer can map the arena, passed over a Unix socket; `None` when it is not shared.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &*self.0 {
            Storage::Host(_) | Storage::Pinned(_) | Storage::Cuda(_) => None,
            Storage::Shared { mapping, .. } => Some(mapping.descriptor()),
        }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match &*self.0 {
            Storage::Host(memory) => memory.bytes,
            Storage::Shared { mapping, .. } => mapping.bytes(),
            Storage::Pinned(memory) => memory.bytes(),
            Storage::Cuda(memory) => memory.bytes(),
        }
    }

    /// Whether both are clones of one arena. Two mappings of one memfd are two arenas.
    pub fn same(&self, other: &Arena) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether the memory may be written (MEM-4).
    pub fn is_writable(&self) -> bool {
        match &*self.0 {
            Storage::Host(_) | Storage::Pinned(_) | Storage::Cuda(_) => true,
            Storage::Shared { mapping, .. } => mapping.access() == Access::ReadWrite,
        }
    }

    /// Address of the first byte.
    ///
    /// # Panics
    /// For GPU memory: code that makes slices checks first (MEM-5).
    pub(crate) fn host_start(&self) -> *mut u8 {
        match &*self.0 {
            Storage::Host(memory) => memory.start.as_ptr(),
            Storage::Shared { mapping, .. } => mapping.start().as_ptr(),
            Storage::Pinned(memory) => memory.start(),
            Storage::Cuda(_) => panic!("host slice of GPU memory requested"),
        }
    }

    /// Copies a host tensor to `offset` (bytes). The caller guarantees, by the register protocol or by having no work
    /// in flight, that nothing else uses the range meanwhile.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the range is out of bounds or not aligned, or the memory is read-only;
    /// [`KernelError::Cuda`] when a GPU fails.
    pub fn write_host(&self, offset: usize, tensor: &HostTensor) -> Result<(), KernelError> {
        if !self.is_writable() {
            let got = "a peer's memory, mapped read-only";
            return Err(KernelError::arguments("write_host", "memory", "writable memory", got));
        }
        let view = View::new("write_host", self, offset, &tensor.shape, tensor.dtype())?;
        if let Some(memory) = self.device_memory() {
            return memory.write(offset, tensor.data.as_bytes());
        }
        // SAFETY: `View::new` checked MEM-1; the caller guarantees MEM-3.
        unsafe {
            match &tensor.data {
                HostData::F32(data) => view.f32_mut().copy_from_slice(data),
                HostData::I32(data) => view.i32_mut().copy_from_slice(data),
                HostData::BF16(data) => view.bf16_mut().copy_from_slice(data),
            }
        }
        Ok(())
    }

    /// Copies a tensor at `offset` (bytes) to the host. The caller guarantees that nothing writes the range meanwhile.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the range is out of bounds or not aligned; [`KernelError::Cuda`] when a GPU
    /// fails.
    pub fn read_host(&self, offset: usize, shape: &[usize], dtype: DType) -> Result<HostTensor, KernelError> {
        let mut tensor = HostTensor { shape: shape.to_vec(), data: HostData::empty(dtype) };
        self.read_host_into(offset, &mut tensor)?;
        Ok(tensor)
    }

    /// [`Arena::read_host`] into a tensor of the expected shape and dtype; reuses the memory of its elements.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the range is out of bounds or not aligned.
    pub fn read_host_into(&self, offset: usize, tensor: &mut HostTensor) -> Result<(), KernelError> {
        let view = View::new("read_host", self, offset, &tensor.shape, tensor.dtype())?;
        if let Some(memory) = self.device_memory() {
            let elements = view.element_count();
            return memory.read(offset, tensor.data.resized(elements));
        }
        // SAFETY: `View::new` checked MEM-1; the caller guarantees MEM-3.
        unsafe {
            match &mut tensor.data {
                HostData::F32(data) => {
                    data.clear();
                    data.extend_from_slice(view.f32());
                }
                HostData::I32(data) => {
                    data.clear();
                    data.extend_from_slice(view.i32());
                }
                HostData::BF16(data) => {
                    data.clear();
                    data.extend_from_slice(view.bf16());
                }
            }
        }
        Ok(())
    }
}

/// The address in an arena that the offsets of a program's buffers are relative to.
#[derive(Clone, Debug)]
pub struct Base {
    /// The memory.
    pub arena: Arena,
    /// Bytes from the arena's start.
    pub offset: usize,
}

/// A tensor in device memory: a [`Buffer`] with its base resolved. Inside its arena's bounds, and aligned (MEM-1).
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    arena: &'a Arena,
    offset: usize,
    shape: &'a [usize],
    dtype: DType,
}

/// The buffers of a member of a collective, as words of 4 bytes. Only the words of an `F32` tensor are valid floats.
#[derive(Debug)]
pub(crate) struct Words<'a> {
    /// `None` when the call is in place: x is y.
    x: Option<&'a [f32]>,
    /// Empty when the call writes nothing.
    pub(crate) y: &'a mut [f32],
}

impl Words<'_> {
    /// The current content of the read buffer.
    pub(crate) fn x(&self) -> &[f32] {
        self.x.unwrap_or(self.y)
    }

    /// The read buffer, unless the call is in place, and the written buffer.
    pub(crate) fn split(&mut self) -> (Option<&[f32]>, &mut [f32]) {
        (self.x, self.y)
    }
}

impl<'a> View<'a> {
    /// The tensor of this shape at `offset` bytes in `arena`. `user` names the caller in the error.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when it does not lie inside the arena or is not aligned to its elements.
    pub fn new(
        user: &str,
        arena: &'a Arena,
        offset: usize,
        shape: &'a [usize],
        dtype: DType,
    ) -> Result<Self, KernelError> {
        let bytes = shape.iter().try_fold(dtype.bytes(), |product, &extent| product.checked_mul(extent));
        let end = bytes.and_then(|bytes| bytes.checked_add(offset));
        if end.is_none_or(|end| end > arena.bytes()) {
            return Err(KernelError::arguments(
                user,
                "buffer is out of bounds",
                format!("at most {} bytes", arena.bytes()),
                format!("shape {shape:?} at byte {offset}"),
            ));
        }
        if !offset.is_multiple_of(dtype.bytes()) {
            return Err(KernelError::arguments(
                user,
                "buffer is not aligned",
                format!("a multiple of {} bytes", dtype.bytes()),
                format!("byte {offset}"),
            ));
        }
        Ok(Self { arena, offset, shape, dtype })
    }

    /// The view of `buffer` in a submission with these bases.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the base does not exist, or as for [`View::new`].
    pub fn resolve(user: &str, buffer: &'a Buffer, bases: &'a [Base]) -> Result<Self, KernelError> {
        let base = bases.get(buffer.base).ok_or_else(|| {
            KernelError::arguments(
                user,
                "buffer's base",
                format!("fewer than {} bases", bases.len()),
                buffer.base.to_string(),
            )
        })?;
        // If the sum overflows, it is out of bounds of any arena.
        let offset = base.offset.saturating_add(buffer.offset);
        Self::new(user, &base.arena, offset, &buffer.shape, buffer.dtype)
    }

    /// Extent of each dim.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The memory that holds it.
    pub fn arena(&self) -> &'a Arena {
        self.arena
    }

    /// Bytes from the arena's start.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// # Errors
    /// [`KernelError::Arguments`] for GPU memory, which the host cannot address (MEM-5).
    pub(crate) fn check_host(&self, user: &str) -> Result<(), KernelError> {
        self.arena.check_host(user)
    }

    /// Number of elements.
    pub fn element_count(&self) -> usize {
        element_count(self.shape)
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.element_count() * self.dtype.bytes()
    }

    /// Whether the two share a byte.
    pub fn overlaps(&self, other: &View<'_>) -> bool {
        self.arena.same(other.arena)
            && self.bytes() > 0
            && other.bytes() > 0
            && self.offset < other.offset + other.bytes()
            && other.offset < self.offset + self.bytes()
    }

    /// Whether the two are the same bytes with the same dtype (shapes may differ).
    pub fn same_memory(&self, other: &View<'_>) -> bool {
        self.arena.same(other.arena)
            && self.offset == other.offset
            && self.bytes() == other.bytes()
            && self.dtype == other.dtype
    }

    /// The buffers of one member of a collective, as words of 4 bytes for any dtype of that size.
    ///
    /// Sound while the caller guarantees MEM-3 for `'a`, as for [`Arena::read_host`] and [`Arena::write_host`]; MEM-2
    /// is checked here.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] for more than one read or write, and for an overlap that is not the same memory.
    pub(crate) fn words(op: &str, reads: &[View<'a>], writes: &[View<'a>]) -> Result<Words<'a>, KernelError> {
        if reads.len() > 1 || writes.len() > 1 {
            let got = format!("{} read, {} written", reads.len(), writes.len());
            return Err(KernelError::arguments(op, "buffers", "at most one read and one written", got));
        }
        reads.iter().chain(writes).try_for_each(|view| view.check_host(op))?;
        let (x, y) = (reads.first(), writes.first());
        if y.is_some_and(|y| !y.arena.is_writable()) {
            return Err(KernelError::arguments(op, "y", "writable memory", "a peer's memory, mapped read-only"));
        }
        if let Some(half) = reads.iter().chain(writes).find(|view| view.dtype.bytes() != size_of::<f32>()) {
            let got = format!("{:?}: cast to F32 before the collective and back after it", half.dtype);
            return Err(KernelError::arguments(op, "dtype", "elements of 4 bytes", got));
        }
        let in_place = x.zip(y).is_some_and(|(x, y)| x.same_memory(y));
        if !in_place && x.zip(y).is_some_and(|(x, y)| x.overlaps(y)) {
            return Err(KernelError::arguments(op, "buffers", "no overlap of x and y", "an overlap"));
        }
        // SAFETY: in bounds and aligned by MEM-1 (the dtype has 4 bytes, checked above, and all bits are valid floats),
        // exclusive by MEM-3.
        let written =
            |y: &View<'a>| unsafe { std::slice::from_raw_parts_mut(y.start().cast::<f32>(), y.element_count()) };
        // SAFETY: as above; read and written memory do not overlap (checked above).
        let read = |x: &View<'a>| unsafe { std::slice::from_raw_parts(x.start().cast::<f32>(), x.element_count()) };
        let y = y.map(written).unwrap_or_default();
        Ok(if in_place { Words { x: None, y } } else { Words { x: Some(x.map(read).unwrap_or_default()), y } })
    }

    /// Address of the first element.
    pub(crate) fn start(&self) -> *mut u8 {
        self.arena.host_start().wrapping_add(self.offset)
    }

    /// The elements as f32.
    ///
    /// # Safety
    /// The dtype is `F32`, and nothing writes the elements during `'a` (MEM-2, MEM-3).
    pub(crate) unsafe fn f32(&self) -> &'a [f32] {
        debug_assert_eq!(self.dtype, DType::F32);
        // SAFETY: in bounds and aligned by MEM-1, initialized since arenas start zeroed, not written by the contract.
        unsafe { std::slice::from_raw_parts(self.start().cast(), self.element_count()) }
    }

    /// The elements as i32.
    ///
    /// # Safety
    /// The dtype is `I32`, and nothing writes the elements during `'a` (MEM-2, MEM-3).
    pub(crate) unsafe fn i32(&self) -> &'a [i32] {
        debug_assert_eq!(self.dtype, DType::I32);
        // SAFETY: as in `f32`.
        unsafe { std::slice::from_raw_parts(self.start().cast(), self.element_count()) }
    }

    /// The elements as mutable f32.
    ///
    /// # Safety
    /// The dtype is `F32`, and nothing else reads or writes the elements during `'a` (MEM-2, MEM-3).
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn f32_mut(&self) -> &'a mut [f32] {
        debug_assert_eq!(self.dtype, DType::F32);
        // SAFETY: in bounds and aligned by MEM-1, initialized since arenas start zeroed, exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast(), self.element_count()) }
    }

    /// The elements as mutable i32.
    ///
    /// # Safety
    /// The dtype is `I32`, and nothing else reads or writes the elements during `'a` (MEM-2, MEM-3).
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn i32_mut(&self) -> &'a mut [i32] {
        debug_assert_eq!(self.dtype, DType::I32);
        // SAFETY: as in `f32_mut`.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast(), self.element_count()) }
    }

    /// The elements as bf16.
    ///
    /// # Safety
    /// The dtype is `BF16`, and nothing writes the elements during `'a` (MEM-2, MEM-3).
    pub(crate) unsafe fn bf16(&self) -> &'a [bf16] {
        debug_assert_eq!(self.dtype, DType::BF16);
        // SAFETY: as in `f32`.
        unsafe { std::slice::from_raw_parts(self.start().cast(), self.element_count()) }
    }

    /// The elements as mutable bf16.
    ///
    /// # Safety
    /// The dtype is `BF16`, and nothing else reads or writes the elements during `'a` (MEM-2, MEM-3).
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn bf16_mut(&self) -> &'a mut [bf16] {
        debug_assert_eq!(self.dtype, DType::BF16);
        // SAFETY: as in `f32_mut`.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast(), self.element_count()) }
    }
}
