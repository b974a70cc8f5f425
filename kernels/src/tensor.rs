//! What a tensor is, apart from where it lies: element type, shape, region of a larger tensor, host copy.
//! Imports nothing of this crate but `error`.

use std::ops::Range;

use half::bf16;

/// Element type. Every kernel computes in f32, whatever its operands are stored as; `I32` holds indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 32-bit signed integer, for token ids and other indices.
    I32,
    /// The upper half of an `F32`: its range, 8 bits of precision. Rounded to nearest, ties to even.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::BF16 => 2,
        }
    }

    /// True for floats, of any precision.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::BF16)
    }
}

/// Elements in a tensor of this shape (1 for a scalar's empty shape).
pub fn element_count(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// The part of `0..len` that part `index` of `parts` holds: the first `len mod parts` parts get one element more,
/// so a part may be empty. Every split in Shardflow, of tensors and of collectives' chunks, is this one.
pub fn split_range(len: usize, parts: usize, index: usize) -> Range<usize> {
    let (base, extra) = (len / parts, len % parts);
    let start = index * base + index.min(extra);
    start..start + base + usize::from(index < extra)
}

/// An axis-aligned box of a larger tensor: `start[d] .. start[d] + size[d]` in each dim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// First index in each dim.
    pub start: Vec<usize>,
    /// Extent in each dim; a zero makes the region empty.
    pub size: Vec<usize>,
}

impl Region {
    /// The whole of a tensor of this shape.
    pub fn whole(shape: &[usize]) -> Self {
        Self { start: vec![0; shape.len()], size: shape.to_vec() }
    }

    /// Elements inside.
    pub fn element_count(&self) -> usize {
        element_count(&self.size)
    }

    /// True when no element is inside.
    pub fn is_empty(&self) -> bool {
        self.size.contains(&0)
    }

    /// The common part of two regions of one tensor; `None` when they share no element.
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

    /// This region, with its start counted from the start of `outer`, which must hold it.
    pub fn relative_to(&self, outer: &Region) -> Region {
        let start = self.start.iter().zip(&outer.start).map(|(a, b)| a - b).collect();
        Region { start, size: self.size.clone() }
    }
}

/// Elements of a [`HostTensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum HostData {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 32-bit integers.
    I32(Vec<i32>),
    /// Floats of half the bytes.
    BF16(Vec<bf16>),
}

impl HostData {
    /// No elements, of this type.
    pub fn empty(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32(Vec::new()),
            DType::I32 => Self::I32(Vec::new()),
            DType::BF16 => Self::BF16(Vec::new()),
        }
    }

    /// The elements' bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            HostData::F32(values) => bytemuck::cast_slice(values),
            HostData::I32(values) => bytemuck::cast_slice(values),
            HostData::BF16(values) => bytemuck::cast_slice(values),
        }
    }

    /// The bytes of as many elements, to be overwritten; the memory is used again.
    pub(crate) fn resized(&mut self, elements: usize) -> &mut [u8] {
        match self {
            HostData::F32(values) => {
                values.resize(elements, 0.0);
                bytemuck::cast_slice_mut(values)
            }
            HostData::I32(values) => {
                values.resize(elements, 0);
                bytemuck::cast_slice_mut(values)
            }
            HostData::BF16(values) => {
                values.resize(elements, bf16::ZERO);
                bytemuck::cast_slice_mut(values)
            }
        }
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
    /// A float tensor.
    ///
    /// # Panics
    /// When `data` does not hold `element_count(shape)` elements.
    pub fn f32(shape: &[usize], data: Vec<f32>) -> Self {
        assert_eq!(element_count(shape), data.len(), "shape {shape:?} and number of elements differ");
        Self { shape: shape.to_vec(), data: HostData::F32(data) }
    }

    /// An integer tensor.
    ///
    /// # Panics
    /// When `data` does not hold `element_count(shape)` elements.
    pub fn i32(shape: &[usize], data: Vec<i32>) -> Self {
        assert_eq!(element_count(shape), data.len(), "shape {shape:?} and number of elements differ");
        Self { shape: shape.to_vec(), data: HostData::I32(data) }
    }

    /// Floats of half the bytes, rounded to nearest.
    ///
    /// # Panics
    /// When `data` does not hold `element_count(shape)` elements.
    pub fn bf16(shape: &[usize], data: &[f32]) -> Self {
        assert_eq!(element_count(shape), data.len(), "shape {shape:?} and number of elements differ");
        Self { shape: shape.to_vec(), data: HostData::BF16(data.iter().copied().map(bf16::from_f32).collect()) }
    }

    /// A tensor of its elements' bytes, little-endian, one after the other; they need not be aligned.
    ///
    /// # Panics
    /// When they are not those of `element_count(shape)` elements.
    pub fn from_le_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Self {
        assert_eq!(element_count(shape) * dtype.bytes(), bytes.len(), "shape {shape:?} and number of bytes differ");
        let words = bytes.chunks_exact(4).map(|c| [c[0], c[1], c[2], c[3]]);
        let data = match dtype {
            DType::F32 => HostData::F32(words.map(f32::from_le_bytes).collect()),
            DType::I32 => HostData::I32(words.map(i32::from_le_bytes).collect()),
            DType::BF16 => HostData::BF16(bytes.chunks_exact(2).map(|c| bf16::from_le_bytes([c[0], c[1]])).collect()),
        };
        Self { shape: shape.to_vec(), data }
    }

    /// The bytes of its elements, as this machine has them.
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

    /// Elements in `data`; another number than the shape's makes a tensor that nothing accepts.
    pub fn elements_held(&self) -> usize {
        match &self.data {
            HostData::F32(v) => v.len(),
            HostData::I32(v) => v.len(),
            HostData::BF16(v) => v.len(),
        }
    }

    /// The elements, when they are of type `F32`.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            HostData::F32(v) => Some(v),
            HostData::I32(_) | HostData::BF16(_) => None,
        }
    }

    /// A copy of the elements, when they are floats of any precision.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        match &self.data {
            HostData::F32(v) => Some(v.clone()),
            HostData::BF16(v) => Some(v.iter().map(|x| x.to_f32()).collect()),
            HostData::I32(_) => None,
        }
    }

    /// The elements, when they are integers.
    pub fn as_i32(&self) -> Option<&[i32]> {
        match &self.data {
            HostData::I32(v) => Some(v),
            HostData::F32(_) | HostData::BF16(_) => None,
        }
    }
}
