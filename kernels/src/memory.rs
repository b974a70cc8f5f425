//! Device memory: arenas, and the typed views that kernels and collectives receive.
//!
//! This file, `heap` and `raw_io` create slices from raw pointers. These invariants make the slices sound:
//! - MEM-1: a view lies inside its arena and is aligned for its element type; [`View::new`] checks both.
//! - MEM-2: within a launch, no write overlaps another buffer. If the op may work in place, a write may be the same
//!   memory as a read, and the kernel gets one slice for both. `bound` and `cpu::args` check this before a kernel runs.
//! - MEM-3: no stream writes a range while another stream reads or writes it. The register protocol guarantees this:
//!   only one actor writes a slot, and only while the slot is free; others read it only while it is filled. This module
//!   cannot check MEM-3.
//! - MEM-4: read-only mappings are never written: [`Arena::write_host`], launches and collectives check this.
//! - MEM-5: slices are made only of host memory: `Arena::check_host` rejects GPU memory first.
#![allow(unsafe_code)]

use std::any::Any;
use std::borrow::Cow;
use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use half::bf16;

use crate::clock::host_access;
use crate::error::{KernelError, Result};
use crate::op::Buffer;
use crate::region::{Runs, check_inside};
use crate::tensor::{DType, HostData, HostElement, HostTensor, Region, element_count};

mod heap;
mod raw_io;
mod shared;

pub use heap::ALIGNMENT;
use heap::HostMemory;
pub(crate) use heap::Tally;
pub use shared::Access;
use shared::Mapping;

/// Memory that only its device can address. The backend allocates it. Dropping this value frees the memory.
pub(crate) trait DeviceStorage: Any + Debug + Send + Sync {
    fn bytes(&self) -> usize;

    /// The device and the GPU, as error messages name them.
    fn place(&self) -> String;

    /// Writes `bytes` bytes at `offset`. The caller has checked this range. `fill` supplies the bytes piece by piece;
    /// if it returns false, the write ends early. Returns after all copies to the memory have ended.
    fn write(&self, offset: usize, bytes: usize, fill: &mut dyn FnMut(&mut [u8]) -> bool) -> Result<()>;

    /// Reads `bytes` bytes at `offset`. The caller has checked this range. Passes the bytes to `take` piece by piece;
    /// if `take` returns false, the read ends early.
    fn read(&self, offset: usize, bytes: usize, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()>;

    /// Records that a submission no longer uses the memory: adds the calling thread's clock to the release clocks.
    fn mark_released(&self);
}

/// A block of memory of fixed size, on a device or on the host. It is zeroed when created, and freed when the last
/// clone is dropped. The block may be shared with other processes of the node, or may belong to one of those processes.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Storage>);

/// The memory of an arena. `Shared` is a memfd that this process or a peer process created and that peers can map. If a
/// device of this process owns the memory, `tally` counts the memory.
#[derive(Debug)]
enum Storage {
    Host(HostMemory),
    Shared { mapping: Mapping, tally: Option<Arc<Tally>> },
    Device(Box<dyn DeviceStorage>),
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Storage::Shared { mapping, tally: Some(tally) } = self {
            tally.bytes.fetch_sub(mapping.bytes, Ordering::Relaxed);
        }
    }
}

impl Arena {
    pub(crate) fn host(device: usize, bytes: usize, tally: &Arc<Tally>) -> Result<Self> {
        let memory = HostMemory::allocate(bytes, tally).ok_or(KernelError::OutOfMemory { device, bytes })?;
        Ok(Self(Arc::new(Storage::Host(memory))))
    }

    pub(crate) fn shared(device: usize, bytes: usize, tally: &Arc<Tally>) -> Result<Self> {
        let mapping = Mapping::create(bytes).map_err(|_| KernelError::OutOfMemory { device, bytes })?;
        tally.add(bytes);
        Ok(Self(Arc::new(Storage::Shared { mapping, tally: Some(tally.clone()) })))
    }

    /// Wraps pinned host memory that a backend allocated. Dropping `owner` frees the memory.
    ///
    /// # Safety
    /// The memory is initialized, aligned to [`ALIGNMENT`], and lives as long as `owner`.
    pub(crate) unsafe fn of_backend(start: NonNull<u8>, bytes: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self(Arc::new(Storage::Host(HostMemory::of_backend(start, bytes, owner))))
    }

    pub(crate) fn on_device(memory: impl DeviceStorage) -> Self {
        Self(Arc::new(Storage::Device(Box::new(memory))))
    }

    fn storage_on_device(&self) -> Option<&dyn DeviceStorage> {
        match &*self.0 {
            Storage::Device(memory) => Some(&**memory),
            Storage::Host(_) | Storage::Shared { .. } => None,
        }
    }

    pub(crate) fn device_memory<T: DeviceStorage>(&self) -> Option<&T> {
        let memory: &dyn Any = self.storage_on_device()?;
        memory.downcast_ref()
    }

    /// True for host memory that a GPU's streams copy without waiting for the host.
    pub(crate) fn is_pinned(&self) -> bool {
        matches!(&*self.0, Storage::Host(memory) if memory.is_pinned())
    }

    pub(crate) fn mark_released(&self) {
        match &*self.0 {
            Storage::Host(memory) => memory.mark_released(),
            Storage::Shared { .. } => {}
            Storage::Device(memory) => memory.mark_released(),
        }
    }

    pub(crate) fn check_host(&self, user: &str) -> Result<()> {
        let Some(memory) = self.storage_on_device() else { return Ok(()) };
        let got = format!("memory of {}", memory.place());
        Err(KernelError::arguments(user, "memory", "host memory", got))
    }

    /// Allocates memory that belongs to no device and that other processes of the node can map.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if the system provides no memory.
    pub fn shared_by_processes(bytes: usize) -> Result<Self> {
        let refused = |cause: std::io::Error| {
            KernelError::arguments("shared memory", "size", format!("{bytes} bytes of memory"), cause.to_string())
        };
        let mapping = Mapping::create(bytes).map_err(refused)?;
        Ok(Self(Arc::new(Storage::Shared { mapping, tally: None })))
    }

    /// Maps the memory of a peer's [`Arena::descriptor`]. The size of the memory must be `bytes`.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if `file` is not a memfd of this size, its size is not sealed, or the mapping fails.
    pub fn map_peer(file: OwnedFd, bytes: usize, access: Access) -> Result<Self> {
        let mapping = Mapping::of_peer(file, bytes, access)?;
        Ok(Self(Arc::new(Storage::Shared { mapping, tally: None })))
    }

    /// The descriptor with which a peer maps the arena. Send it over a Unix socket. `None` if the arena is not shared.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &*self.0 {
            Storage::Shared { mapping, .. } => Some(mapping.file.as_fd()),
            Storage::Host(_) | Storage::Device(_) => None,
        }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match &*self.0 {
            Storage::Host(memory) => memory.bytes,
            Storage::Shared { mapping, .. } => mapping.bytes,
            Storage::Device(memory) => memory.bytes(),
        }
    }

    /// True if both values are clones of one arena. Two mappings of one memfd are two arenas.
    pub fn same(&self, other: &Arena) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// True if the memory may be written (MEM-4).
    pub fn is_writable(&self) -> bool {
        match &*self.0 {
            Storage::Host(_) | Storage::Device(_) => true,
            Storage::Shared { mapping, .. } => mapping.access == Access::ReadWrite,
        }
    }

    /// Address of the first byte. Panics for GPU memory: callers that make slices check first (MEM-5).
    pub(crate) fn host_start(&self) -> *mut u8 {
        match &*self.0 {
            Storage::Host(memory) => memory.start.as_ptr(),
            Storage::Shared { mapping, .. } => mapping.start.as_ptr(),
            Storage::Device(_) => panic!("host slice of GPU memory requested"),
        }
    }

    /// Copies a host tensor to `offset` (in bytes). The caller guarantees that nothing else uses the range during the
    /// call, either through the register protocol or because no work is in flight.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if the range is out of bounds, unaligned or read-only; [`KernelError::Cuda`].
    pub fn write_host(&self, offset: usize, tensor: &HostTensor) -> Result<()> {
        let Some(memory) = self.storage_on_device() else {
            return self.write_region(offset, tensor, &Region::whole(&tensor.shape));
        };
        let view = View::new("write_host", self, offset, &tensor.shape, tensor.dtype())?;
        let bytes = tensor.data.as_bytes();
        assert_eq!(bytes.len(), view.bytes(), "the data does not fit the shape {:?}", tensor.shape);
        let mut at = 0;
        memory.write(offset, bytes.len(), &mut |piece| {
            piece.copy_from_slice(&bytes[at..][..piece.len()]);
            at += piece.len();
            true
        })
    }

    /// Copies a region of a host tensor to `offset` (in bytes) of host memory, as one contiguous tensor. The caller
    /// guarantees the same as for [`Arena::write_host`].
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if the region is not inside the tensor, or the range is out of bounds, unaligned,
    /// read-only or GPU memory.
    pub fn write_region(&self, offset: usize, tensor: &HostTensor, region: &Region) -> Result<()> {
        const USER: &str = "write_host";
        self.check_host(USER)?;
        if !self.is_writable() {
            let got = "a peer's memory, mapped read-only";
            return Err(KernelError::arguments(USER, "memory", "writable memory", got));
        }
        check_inside(USER, "region", region, &tensor.shape)?;
        let view = View::new(USER, self, offset, &region.size, tensor.dtype())?;
        let (bytes, element) = (tensor.data.as_bytes(), tensor.dtype().bytes());
        assert_eq!(tensor.elements_held(), element_count(&tensor.shape), "the data does not fit {:?}", tensor.shape);
        host_access(view.start(), view.bytes(), true);
        Runs::new(&tensor.shape, region).for_each(0..view.element_count(), |from, to, len| {
            let run = &bytes[from * element..][..len * element];
            // SAFETY: the runs are disjoint parts of the view, which is in bounds (MEM-1); the caller guarantees MEM-3;
            // the tensor is not in the arena.
            unsafe { view.start().add(to * element).copy_from_nonoverlapping(run.as_ptr(), run.len()) };
        });
        Ok(())
    }

    /// Copies a tensor at `offset` (bytes) to the host. The caller guarantees that nothing writes the range meanwhile.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if the range is out of bounds or not aligned; [`KernelError::Cuda`] from a GPU.
    pub fn read_host(&self, offset: usize, shape: &[usize], dtype: DType) -> Result<HostTensor> {
        let mut tensor = HostTensor { shape: shape.to_vec(), data: HostData::empty(dtype) };
        self.read_host_into(offset, &mut tensor)?;
        Ok(tensor)
    }

    /// Like [`Arena::read_host`], but reuses the memory of `tensor`, which has the expected shape and dtype.
    ///
    /// # Errors
    /// As for [`Arena::read_host`].
    pub fn read_host_into(&self, offset: usize, tensor: &mut HostTensor) -> Result<()> {
        let view = View::new("read_host", self, offset, &tensor.shape, tensor.dtype())?;
        let bytes = tensor.data.resized(view.element_count());
        if let Some(memory) = self.storage_on_device() {
            let mut at = 0;
            return memory.read(offset, bytes.len(), &mut |piece| {
                bytes[at..][..piece.len()].copy_from_slice(piece);
                at += piece.len();
                true
            });
        }
        let start = self.host_start().wrapping_add(offset);
        host_access(start, bytes.len(), false);
        // SAFETY: `View::new` checked MEM-1; the caller guarantees MEM-3; the tensor is not in the arena.
        unsafe { start.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
}

/// An address in an arena. The offsets of a program's buffers are relative to this address.
#[derive(Clone, Debug)]
pub struct Base {
    /// The memory.
    pub arena: Arena,
    /// Offset in bytes from the arena's start.
    pub offset: usize,
}

/// A tensor in an arena: a [`Buffer`] with a resolved base. It lies inside its arena and is aligned (MEM-1).
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    arena: &'a Arena,
    offset: usize,
    shape: &'a [usize],
    dtype: DType,
}

/// The buffers of one member of a collective, as words of 4 bytes. Only an `F32` tensor has meaningful floats.
#[derive(Debug)]
pub(crate) struct Words<'a> {
    /// `None` if the call is in place, that is, if x and y are the same memory.
    x: Option<&'a [f32]>,
    /// Empty if the call writes nothing.
    pub(crate) y: &'a mut [f32],
}

impl<'a> Words<'a> {
    /// The buffers of a call that is in place if `x` is `None`.
    pub(crate) fn new(x: Option<&'a [f32]>, y: &'a mut [f32]) -> Self {
        Self { x, y }
    }

    /// The current content of the read buffer.
    pub(crate) fn x(&self) -> &[f32] {
        self.x.unwrap_or(self.y)
    }

    /// The read buffer (`None` if the call is in place), and the written buffer.
    pub(crate) fn split(&mut self) -> (Option<&[f32]>, &mut [f32]) {
        (self.x, self.y)
    }
}

impl<'a> View<'a> {
    /// The tensor of shape `shape` at `offset` bytes in `arena`. `user` names the caller in errors.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if the tensor does not lie inside the arena or is not aligned to its elements.
    pub fn new(user: &str, arena: &'a Arena, offset: usize, shape: &'a [usize], dtype: DType) -> Result<Self> {
        let bytes = shape.iter().try_fold(dtype.bytes(), |product, &extent| product.checked_mul(extent));
        let end = bytes.and_then(|bytes| bytes.checked_add(offset));
        if end.is_none_or(|end| end > arena.bytes()) {
            let expected = format!("a buffer inside the {} bytes of its arena", arena.bytes());
            return Err(KernelError::arguments(user, "buffer", expected, format!("shape {shape:?} at byte {offset}")));
        }
        if !offset.is_multiple_of(dtype.bytes()) {
            let expected = format!("a multiple of {} bytes", dtype.bytes());
            return Err(KernelError::arguments(user, "offset of a buffer", expected, format!("{offset} bytes")));
        }
        Ok(Self { arena, offset, shape, dtype })
    }

    /// The view of `buffer` in a submission with these `bases`. `user` names the caller in errors.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if the base does not exist, or as for [`View::new`].
    pub fn resolve(user: &str, buffer: &'a Buffer, bases: &'a [Base]) -> Result<Self> {
        let Some(base) = bases.get(buffer.base) else {
            let expected = format!("an index below {}", bases.len());
            return Err(KernelError::arguments(user, "base of a buffer", expected, buffer.base.to_string()));
        };
        // An overflowing sum is out of bounds of every arena.
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

    /// The arena that contains the tensor.
    pub fn arena(&self) -> &'a Arena {
        self.arena
    }

    /// Offset in bytes from the arena's start.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Number of elements.
    pub fn element_count(&self) -> usize {
        element_count(self.shape)
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.element_count() * self.dtype.bytes()
    }

    /// True if the two views share a byte.
    pub fn overlaps(&self, other: &View<'_>) -> bool {
        self.arena.same(other.arena)
            && self.bytes() > 0
            && other.bytes() > 0
            && self.offset < other.offset + other.bytes()
            && other.offset < self.offset + self.bytes()
    }

    /// True if the two views have the same bytes and dtype. Their shapes may differ.
    pub fn same_memory(&self, other: &View<'_>) -> bool {
        let place = |view: &View<'_>| (view.offset, view.bytes(), view.dtype);
        self.arena.same(other.arena) && place(self) == place(other)
    }

    /// The buffers of one member of a collective, as words of 4 bytes, for any dtype of that size. The caller
    /// guarantees MEM-3 for `'a`, as for [`Arena::read_host`] and [`Arena::write_host`]. This function checks MEM-2.
    pub(crate) fn words(op: &str, reads: &[View<'a>], writes: &[View<'a>]) -> Result<Words<'a>> {
        if reads.len() > 1 || writes.len() > 1 {
            let got = format!("{} read, {} written", reads.len(), writes.len());
            return Err(KernelError::arguments(op, "buffers", "at most one read and one written", got));
        }
        reads.iter().chain(writes).try_for_each(|view| view.arena.check_host(op))?;
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
            return Err(KernelError::arguments(op, "buffers", "x and y that do not overlap", "an overlap"));
        }
        // SAFETY: the memory is in bounds and aligned by MEM-1 (the dtype has 4 bytes, as checked above), all bits are
        // valid floats, and access is exclusive by MEM-3.
        let written =
            |y: &View<'a>| unsafe { std::slice::from_raw_parts_mut(y.start().cast::<f32>(), y.element_count()) };
        // SAFETY: as for `written`; in addition, read and written memory do not overlap (checked above).
        let read = |x: &View<'a>| unsafe { std::slice::from_raw_parts(x.start().cast::<f32>(), x.element_count()) };
        let y = y.map(written).unwrap_or_default();
        Ok(if in_place { Words { x: None, y } } else { Words { x: Some(x.map(read).unwrap_or_default()), y } })
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.arena.host_start().wrapping_add(self.offset)
    }

    /// The elements.
    ///
    /// # Safety
    /// The dtype matches `T`, and nothing writes the elements during `'a` (MEM-2, MEM-3).
    pub(crate) unsafe fn slice<T: HostElement>(&self) -> &'a [T] {
        debug_assert_eq!(self.dtype, T::DTYPE);
        // SAFETY: the memory is in bounds and aligned (MEM-1), and is initialized because arenas start zeroed. By the
        // contract, nothing writes it.
        unsafe { std::slice::from_raw_parts(self.start().cast(), self.element_count()) }
    }

    /// The elements, for writing.
    ///
    /// # Safety
    /// The dtype matches `T`, and nothing else reads or writes the elements during `'a` (MEM-2, MEM-3).
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice_mut<T: HostElement>(&self) -> &'a mut [T] {
        debug_assert_eq!(self.dtype, T::DTYPE);
        // SAFETY: the memory is in bounds and aligned (MEM-1), and is initialized because arenas start zeroed. By the
        // contract, access is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast(), self.element_count()) }
    }

    /// The elements of a float tensor as f32. `None` for integers.
    ///
    /// # Safety
    /// Nothing writes the elements during `'a` (MEM-2, MEM-3).
    pub(crate) unsafe fn to_f32(self) -> Option<Cow<'a, [f32]>> {
        // SAFETY: the dtype matches, and the caller guarantees the rest of the contract.
        unsafe {
            match self.dtype {
                DType::F32 => Some(self.slice().into()),
                DType::BF16 => Some(self.slice::<bf16>().iter().map(|half| half.to_f32()).collect()),
                DType::I32 => None,
            }
        }
    }
}
