//! What a tensor is, apart from where it lies: element type, shape, region of a larger tensor, host copy.
//! Imports nothing of this crate but `error`.

use std::ops::Range;

/// Element type. Every kernel computes in f32; `I32` holds indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 32-bit signed integer, for token ids and other indices.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        4
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
}

impl HostData {
    /// The elements' bytes.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            HostData::F32(values) => bytemuck::cast_slice(values),
            HostData::I32(values) => bytemuck::cast_slice(values),
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

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            HostData::F32(_) => DType::F32,
            HostData::I32(_) => DType::I32,
        }
    }

    /// Elements in `data`; another number than the shape's makes a tensor that nothing accepts.
    pub fn elements_held(&self) -> usize {
        match &self.data {
            HostData::F32(v) => v.len(),
            HostData::I32(v) => v.len(),
        }
    }

    /// The elements, when they are floats.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            HostData::F32(v) => Some(v),
            HostData::I32(_) => None,
        }
    }

    /// The elements, when they are integers.
    pub fn as_i32(&self) -> Option<&[i32]> {
        match &self.data {
            HostData::I32(v) => Some(v),
            HostData::F32(_) => None,
        }
    }
}
