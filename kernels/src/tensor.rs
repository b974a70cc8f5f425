//! Tensors without their location: dtype, shape, and region of a larger tensor. Also tensors in host memory.

use std::ops::Range;

use half::bf16;

pub mod regions;

/// Element type. Kernels sum in f32 or f64, whatever the storage type of their operands. `I32` holds indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 32-bit signed integer, for token ids and other indices.
    I32,
    /// The upper half of an `F32`, with the same range and 8 bits of precision. Casts round to nearest, ties to even.
    BF16,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::BF16 => 2,
        }
    }

    /// True if the type is a float type.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::BF16)
    }
}

pub(crate) trait HostElement: Copy + 'static {
    const DTYPE: DType;
}

macro_rules! host_elements {
    ($($element:ty => $dtype:ident),*) => {
        $(impl HostElement for $element { const DTYPE: DType = DType::$dtype; })*
    };
}

host_elements!(f32 => F32, i32 => I32, bf16 => BF16);

/// Number of elements in a tensor of this shape: 1 for a scalar's empty shape, `usize::MAX` on overflow.
pub fn element_count(shape: &[usize]) -> usize {
    shape.iter().fold(1, |count: usize, extent| count.saturating_mul(*extent))
}

/// The subrange of `0..len` that part `index` holds if the range is split into `parts` parts. The first `len mod parts`
/// parts have one element more than the others.
/// If `len < parts`, some parts are empty. Every split of a tensor, or of a collective into chunks, uses this function.
pub fn split_range(len: usize, parts: usize, index: usize) -> Range<usize> {
    let (base, extra) = (len / parts, len % parts);
    let start = index * base + index.min(extra);
    start..start + base + usize::from(index < extra)
}

/// An axis-aligned box of a larger tensor: `start[d] .. start[d] + size[d]` in each dim d.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// First index in each dim.
    pub start: Vec<usize>,
    /// Extent in each dim. If any extent is zero, the region is empty.
    pub size: Vec<usize>,
}

impl Region {
    /// The region that covers a whole tensor of this shape.
    pub fn whole(shape: &[usize]) -> Self {
        Self { start: vec![0; shape.len()], size: shape.to_vec() }
    }

    /// Returns the same region with `range` as its range in dim `d`.
    pub(crate) fn with_range(mut self, d: usize, range: Range<usize>) -> Self {
        (self.start[d], self.size[d]) = (range.start, range.len());
        self
    }

    /// Number of elements in the region.
    pub fn element_count(&self) -> usize {
        element_count(&self.size)
    }

    /// True if the region contains no element.
    pub fn is_empty(&self) -> bool {
        self.size.contains(&0)
    }

    /// The common part of two regions of a tensor. `None` if they share no element.
    pub fn intersect(&self, other: &Region) -> Option<Region> {
        let mut out = Region { start: Vec::new(), size: Vec::new() };
        for d in 0..self.start.len() {
            let start = self.start[d].max(other.start[d]);
            let end = (self.start[d] + self.size[d]).min(other.start[d] + other.size[d]);
            if end <= start {
                return None;
            }
            out.start.push(start);
            out.size.push(end - start);
        }
        Some(out)
    }

    /// Returns this region relative to the start of `outer`, which must contain this region.
    pub fn relative_to(&self, outer: &Region) -> Region {
        let start = self.start.iter().zip(&outer.start).map(|(a, b)| a - b).collect();
        Region { start, size: self.size.clone() }
    }
}

/// The elements of a [`HostTensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum HostData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 32-bit integers.
    I32(Vec<i32>),
    /// bf16 values.
    BF16(Vec<bf16>),
}

impl HostData {
    /// Returns an empty vector of this type.
    pub fn empty(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32(Vec::new()),
            DType::I32 => Self::I32(Vec::new()),
            DType::BF16 => Self::BF16(Vec::new()),
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            HostData::F32(values) => bytemuck::cast_slice(values),
            HostData::I32(values) => bytemuck::cast_slice(values),
            HostData::BF16(values) => bytemuck::cast_slice(values),
        }
    }

    /// Resizes to `elements` elements and reuses the memory. Returns the bytes, which the caller must overwrite.
    pub(crate) fn resized(&mut self, elements: usize) -> &mut [u8] {
        fn resize<T: bytemuck::Pod>(values: &mut Vec<T>, elements: usize) -> &mut [u8] {
            values.resize(elements, T::zeroed());
            bytemuck::cast_slice_mut(values)
        }
        match self {
            HostData::F32(values) => resize(values, elements),
            HostData::I32(values) => resize(values, elements),
            HostData::BF16(values) => resize(values, elements),
        }
    }
}

/// Panics if `got / each` is not the shape's element count. The panic reports the line that calls the public function.
#[track_caller]
fn check_count(shape: &[usize], each: usize, got: usize, unit: &str) {
    match shape.iter().try_fold(each, |count, extent| count.checked_mul(*extent)) {
        Some(expected) => assert!(expected == got, "shape {shape:?} needs {expected} {unit}, got {got}"),
        None => panic!("shape {shape:?} has more {unit} than can be counted, got {got}"),
    }
}

/// A row-major tensor in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Extent of each dim.
    pub shape: Vec<usize>,
    /// `element_count(shape)` elements, row-major.
    pub data: HostData,
}

impl HostTensor {
    /// Creates a float tensor.
    ///
    /// # Panics
    /// If `data` does not have `element_count(shape)` elements.
    #[track_caller]
    pub fn f32(shape: &[usize], data: Vec<f32>) -> Self {
        check_count(shape, 1, data.len(), "elements");
        Self { shape: shape.to_vec(), data: HostData::F32(data) }
    }

    /// Creates an integer tensor.
    ///
    /// # Panics
    /// If `data` does not have `element_count(shape)` elements.
    #[track_caller]
    pub fn i32(shape: &[usize], data: Vec<i32>) -> Self {
        check_count(shape, 1, data.len(), "elements");
        Self { shape: shape.to_vec(), data: HostData::I32(data) }
    }

    /// Creates a bf16 tensor. The values are rounded to nearest.
    ///
    /// # Panics
    /// If `data` does not have `element_count(shape)` elements.
    #[track_caller]
    pub fn bf16(shape: &[usize], data: &[f32]) -> Self {
        check_count(shape, 1, data.len(), "elements");
        Self { shape: shape.to_vec(), data: HostData::BF16(data.iter().copied().map(bf16::from_f32).collect()) }
    }

    /// Creates a tensor from the little-endian bytes of its elements. The bytes need not be aligned.
    ///
    /// # Panics
    /// If `bytes` does not have the length of `element_count(shape)` elements.
    #[track_caller]
    pub fn from_le_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Self {
        check_count(shape, dtype.bytes(), bytes.len(), "bytes");
        let words = bytes.chunks_exact(4).map(|c| [c[0], c[1], c[2], c[3]]);
        let data = match dtype {
            DType::F32 => HostData::F32(words.map(f32::from_le_bytes).collect()),
            DType::I32 => HostData::I32(words.map(i32::from_le_bytes).collect()),
            DType::BF16 => HostData::BF16(bytes.chunks_exact(2).map(|c| bf16::from_le_bytes([c[0], c[1]])).collect()),
        };
        Self { shape: shape.to_vec(), data }
    }

    /// The bytes of the elements in this machine's byte order.
    pub fn as_bytes(&self) -> &[u8] {
        self.data.as_bytes()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            HostData::F32(_) => DType::F32,
            HostData::I32(_) => DType::I32,
            HostData::BF16(_) => DType::BF16,
        }
    }

    /// Number of elements in `data`. Every function rejects a tensor whose shape has another number.
    pub fn elements_held(&self) -> usize {
        self.as_bytes().len() / self.dtype().bytes()
    }

    /// The elements of an `F32` tensor.
    pub fn as_f32(&self) -> Option<&[f32]> {
        if let HostData::F32(values) = &self.data { Some(values) } else { None }
    }

    /// The elements of a float tensor as f32.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        match &self.data {
            HostData::F32(v) => Some(v.clone()),
            HostData::BF16(v) => Some(v.iter().map(|x| x.to_f32()).collect()),
            HostData::I32(_) => None,
        }
    }

    /// The elements of an `I32` tensor.
    pub fn as_i32(&self) -> Option<&[i32]> {
        if let HostData::I32(values) = &self.data { Some(values) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use std::panic::{self, Location};

    use super::*;

    /// A call that panics on a line with `line!()`, and the expected text.
    type Call = (fn() -> u32, &'static str);

    #[test]
    fn a_wrong_length_panics_at_the_callers_line() {
        static AT: Mutex<Option<(u32, String)>> = Mutex::new(None);
        let here = std::thread::current().id();
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if std::thread::current().id() == here {
                let text = info.payload_as_str().unwrap_or_default().to_owned();
                let at = info.location().filter(|at| at.file().ends_with("tensor.rs")).map_or(0, Location::line);
                *AT.lock() = Some((at, text));
            }
        }));
        let calls: [Call; 5] = [
            (|| (HostTensor::f32(&[2, 3], vec![0.0; 5]), line!()).1, "shape [2, 3] needs 6 elements, got 5"),
            (|| (HostTensor::i32(&[2], vec![1; 3]), line!()).1, "shape [2] needs 2 elements, got 3"),
            (|| (HostTensor::bf16(&[], &[]), line!()).1, "shape [] needs 1 elements, got 0"),
            (|| (HostTensor::from_le_bytes(DType::BF16, &[2], &[0]), line!()).1, "shape [2] needs 4 bytes, got 1"),
            (|| (HostTensor::f32(&[1 << 40, 1 << 40], vec![]), line!()).1, "more elements than can be counted, got 0"),
        ];
        let mut panics = Vec::new();
        for (call, expected) in calls {
            assert!(panic::catch_unwind(call).is_err(), "{expected}");
            panics.push((AT.lock().take(), expected));
        }
        panic::set_hook(before);
        let source: Vec<&str> = include_str!("tensor.rs").lines().collect();
        for (at, expected) in panics {
            let (line, text) = at.expect("a panic");
            assert!(text.contains(expected), "{text}");
            assert!(source[line as usize - 1].contains("line!()"), "line {line} is not the caller's: {text}");
        }
    }
}
