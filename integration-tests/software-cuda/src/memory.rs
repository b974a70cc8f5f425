//! Device memory and pinned host memory: one window of addresses, the allocations in it, and the regions that programs
//! name inside allocations.
//!
//! Addresses are never reused, so a late access finds the freed allocation, not a newer one. Each allocation starts on
//! its own page, and a gap follows it.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap, HashSet};

/// Number of bytes of addresses that are reserved for each place.
const PLACE_BYTES: usize = 64 << 30;
const PAGE_BYTES: usize = 4096;
/// The gap after an allocation is as long as the allocation, up to this limit.
const GAP_BYTES_MAX: usize = 1 << 20;
/// The bits of a new allocation are set to 1, up to this number of bytes. The pages after these bytes stay untouched
/// until their first use.
const FILLED_BYTES_MAX: usize = 1 << 20;
/// Number of bytes that one word of the shadow memory describes.
pub const WORD_BYTES: usize = 4;

/// The location of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// On a device.
    Device(usize),
    /// Pinned on the host. Every device can access it.
    Host,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Device(device) => write!(f, "device {device}"),
            Place::Host => f.write_str("the host"),
        }
    }
}

/// A range of reserved addresses. The OS commits a page on its first access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// First address.
    pub base: usize,
    /// Length in bytes.
    pub bytes: usize,
    /// Base of the shadow memory, which has a cell of `cell_bytes` for each word.
    pub shadow: usize,
    cell_bytes: usize,
}

fn reserve(bytes: usize) -> usize {
    // SAFETY: a new anonymous mapping at an address that the OS selects overlaps nothing.
    let at = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(at, libc::MAP_FAILED, "cannot reserve {bytes} bytes of addresses: raise the limit of virtual memory");
    at as usize
}

impl Window {
    /// Reserves addresses for this number of places.
    pub fn new(places: usize, cell_bytes: usize) -> Window {
        let bytes = places * PLACE_BYTES;
        Window { base: reserve(bytes), bytes, shadow: reserve(bytes / WORD_BYTES * cell_bytes), cell_bytes }
    }

    /// Whether the window contains the address.
    pub fn contains(&self, address: usize) -> bool {
        address.wrapping_sub(self.base) < self.bytes
    }

    /// Releases the pages of an allocation and of its shadow memory. Both then read as zeros.
    pub fn drop_pages(&self, base: usize, bytes: usize) {
        let shadow = self.shadow + (base - self.base) / WORD_BYTES * self.cell_bytes;
        let shadow_bytes = bytes / WORD_BYTES * self.cell_bytes;
        for (at, bytes) in [(base, bytes), (shadow, shadow_bytes)] {
            // SAFETY: both ranges are whole pages of this window's mappings, which stay mapped.
            unsafe { libc::madvise(at as *mut libc::c_void, bytes.next_multiple_of(PAGE_BYTES), libc::MADV_DONTNEED) };
        }
    }
}

/// A named part of an allocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    /// Length in bytes.
    pub bytes: usize,
    /// A number that no other region or allocation has.
    pub id: u32,
}

/// One allocation, freed or not.
#[derive(Debug)]
pub(crate) struct Allocation {
    /// First address.
    pub base: usize,
    /// Requested bytes.
    pub bytes: usize,
    /// The location of the memory.
    pub place: Place,
    /// A number that no other region or allocation has; not 0.
    pub id: u32,
    /// The operation that freed the allocation.
    pub freed: Option<String>,
    /// The stream operation that allocated the memory. `None` until it executes, or if the allocation was immediate.
    pub born: Option<u32>,
    /// Whether the memory was allocated by a stream operation that has not executed yet.
    pub unborn: bool,
    /// Named regions by offset.
    pub regions: BTreeMap<usize, Region>,
    /// For each agent, its last operation that accessed the allocation.
    pub users: HashMap<usize, u32>,
    /// Number of queued copies that use the allocation, and number of these copies that write the allocation.
    pub pending: (u32, u32),
    /// Number of finished copies that have written the allocation.
    pub copies_in: u64,
}

impl Allocation {
    /// Whether the memory is from a device's pool, which other devices cannot access.
    pub fn is_pooled(&self) -> bool {
        self.unborn || self.born.is_some()
    }

    /// Returns the id and the end of the named region at an offset. Outside of named regions, returns the id of the
    /// allocation and the end of the unnamed part.
    pub fn region(&self, offset: usize) -> (u32, usize) {
        match self.regions.range(..=offset).next_back() {
            Some((start, region)) if offset < start + region.bytes => (region.id, start + region.bytes),
            _ => (self.id, self.regions.range(offset..).next().map_or(self.bytes, |r| *r.0)),
        }
    }
}

/// The allocation and region that contain an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The allocation's base.
    pub base: usize,
    /// The allocation's length.
    pub bytes: usize,
    /// Id of the named region, or of the allocation if the address is in no named region.
    pub region: u32,
    /// The end of the named region. Outside of named regions, the start of the next one or the end of the allocation.
    pub region_end: usize,
    /// The location of the memory.
    pub place: Place,
    /// Whether the allocation was freed.
    pub is_freed: bool,
}

/// All allocations.
pub(crate) struct Registry {
    /// The window of addresses.
    pub window: Window,
    allocations: BTreeMap<usize, Allocation>,
    next: Vec<usize>,
    next_id: u32,
    live_bytes: Vec<usize>,
    peak_bytes: Vec<usize>,
    /// Pairs of devices. In each pair, the first device may access memory of the second device.
    pub peers: HashSet<(usize, usize)>,
}

impl Registry {
    /// Creates a registry for this number of devices and the host.
    pub fn new(devices: usize, cell_bytes: usize) -> Registry {
        let places = devices + 1;
        let window = Window::new(places, cell_bytes);
        let next = (0..places).map(|p| window.base + p * PLACE_BYTES + PAGE_BYTES).collect();
        Registry {
            window,
            allocations: BTreeMap::new(),
            next,
            next_id: 1,
            live_bytes: vec![0; places],
            peak_bytes: vec![0; places],
            peers: HashSet::new(),
        }
    }

    fn index(&self, place: Place) -> usize {
        match place {
            Place::Device(device) => device,
            Place::Host => self.next.len() - 1,
        }
    }

    /// Allocates memory, and sets all bits of its first bytes to 1 (NaN in every float type). Returns `None` if no
    /// addresses are left or `limit` is exceeded.
    pub fn allocate(&mut self, place: Place, bytes: usize, limit: usize, unborn: bool) -> Option<usize> {
        let index = self.index(place);
        let pages = bytes.max(1).checked_next_multiple_of(PAGE_BYTES)?;
        let gap = pages.min(GAP_BYTES_MAX);
        let base = self.next[index];
        let end = base.checked_add(pages)?.checked_add(gap)?;
        if end > self.window.base + (index + 1) * PLACE_BYTES || self.live_bytes[index].checked_add(bytes)? > limit {
            return None;
        }
        self.next[index] = end;
        self.live_bytes[index] += bytes;
        self.peak_bytes[index] = self.peak_bytes[index].max(self.live_bytes[index]);
        // SAFETY: the range is in the window, and no other code knows its address yet.
        unsafe { std::ptr::write_bytes(base as *mut u8, 0xff, bytes.min(FILLED_BYTES_MAX)) };
        let id = self.new_id();
        let allocation = Allocation {
            base,
            bytes,
            place,
            id,
            freed: None,
            born: None,
            unborn,
            regions: BTreeMap::new(),
            users: HashMap::new(),
            pending: (0, 0),
            copies_in: 0,
        };
        self.allocations.insert(base, allocation);
        Some(base)
    }

    fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Returns the last allocation, freed or not, that starts at or below the address. The address may be in the gap
    /// after this allocation.
    pub fn nearest(&self, address: usize) -> Option<&Allocation> {
        self.allocations.range(..=address).next_back().map(|a| a.1).filter(|_| self.window.contains(address))
    }

    /// Returns the allocation, freed or not, that contains the address.
    pub fn find(&self, address: usize) -> Option<&Allocation> {
        self.nearest(address).filter(|a| address < a.base + a.bytes.max(1))
    }

    /// Returns the allocation, freed or not, that contains the address.
    pub fn find_mut(&mut self, address: usize) -> Option<&mut Allocation> {
        let found = self.allocations.range_mut(..=address).next_back().map(|a| a.1);
        found.filter(|a| address < a.base + a.bytes.max(1))
    }

    /// Returns the allocation and region that contain an address.
    pub fn owner(&self, address: usize) -> Option<Owner> {
        let a = self.find(address)?;
        let (region, end) = a.region(address - a.base);
        let region_end = a.base + end;
        Some(Owner { base: a.base, bytes: a.bytes, region, region_end, place: a.place, is_freed: a.freed.is_some() })
    }

    /// Marks an allocation as freed and releases its pages.
    pub fn free(&mut self, base: usize, by: String) {
        let Some(allocation) = self.allocations.get_mut(&base) else { return };
        allocation.freed = Some(by);
        let (place, bytes) = (allocation.place, allocation.bytes);
        let index = self.index(place);
        self.live_bytes[index] -= bytes;
        self.window.drop_pages(base, bytes.max(1).next_multiple_of(PAGE_BYTES));
    }

    /// Names a part of an allocation. Returns false if the part overlaps another named part or exceeds the allocation.
    pub fn name_region(&mut self, address: usize, bytes: usize) -> bool {
        let id = self.new_id();
        let window = self.window;
        let Some(allocation) = self.find_mut(address) else { return false };
        let offset = address - allocation.base;
        let overlaps =
            allocation.regions.range(..offset + bytes).next_back().is_some_and(|(s, r)| s + r.bytes > offset);
        if overlaps || bytes == 0 || offset + bytes > allocation.bytes {
            return false;
        }
        allocation.regions.insert(offset, Region { bytes, id });
        if !allocation.users.is_empty() {
            // Reset the shadow cells of this part, because each cell caches the id of its region.
            let cells = (window.shadow + (address - window.base) / WORD_BYTES * window.cell_bytes) as *mut u8;
            // SAFETY: the cells are the shadow of a live allocation; the caller holds the shadow's lock.
            unsafe { std::ptr::write_bytes(cells, 0, bytes.div_ceil(WORD_BYTES) * window.cell_bytes) };
        }
        true
    }

    /// Returns the number of bytes that are allocated at a place.
    pub fn live_bytes(&self, place: Place) -> usize {
        self.live_bytes[self.index(place)]
    }

    /// Returns the peak of allocated bytes for each device. The last entry is the peak of pinned memory.
    pub fn peak_bytes(&self) -> &[usize] {
        &self.peak_bytes
    }

    /// Returns the allocations that were not freed.
    pub fn leaks(&self) -> impl Iterator<Item = &Allocation> {
        self.allocations.values().filter(|a| a.freed.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_and_never_reused() {
        let mut registry = Registry::new(1, 32);
        let a = registry.allocate(Place::Device(0), 100, 1000, false).unwrap();
        assert_eq!(registry.owner(a + 99).map(|o| o.base), Some(a));
        assert_eq!(registry.owner(a + 100), None);
        assert_eq!(registry.nearest(a + 100).map(|n| n.base), Some(a));
        assert_eq!(registry.allocate(Place::Device(0), 901, 1000, false), None);
        registry.free(a, "a test".into());
        let b = registry.allocate(Place::Device(0), 1000, 1000, false).unwrap();
        assert!(b > a && registry.owner(a).unwrap().is_freed && !registry.owner(b).unwrap().is_freed);
        assert_eq!(registry.peak_bytes(), [1000, 0]);
    }

    #[test]
    fn named_regions_divide_an_allocation() {
        let mut registry = Registry::new(1, 32);
        let a = registry.allocate(Place::Device(0), 1024, 4096, false).unwrap();
        assert!(registry.name_region(a + 256, 256) && registry.name_region(a + 512, 256));
        assert!(
            !registry.name_region(a + 300, 8) && !registry.name_region(a, 300) && !registry.name_region(a + 768, 512)
        );
        let region = |at| registry.owner(a + at).unwrap().region;
        assert!(region(0) == region(1000) && region(256) == region(511) && region(511) != region(512));
    }
}
