//! A [`Mesh`] names the axes of all devices; a [`Placement`] is a subset of the devices, arranged over named axes.

use std::fmt;
use std::sync::Arc;

use shardflow_kernels::collective::{RankAxis, Ranks};

use crate::layout_error::LayoutError;

/// Maximum number of devices in a mesh. The limit catches a typing error before the devices are enumerated.
pub const MESH_DEVICES_MAX: usize = 1 << 20;

/// One axis of a mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Axis {
    /// Name, such as `data`, `tensor` or `stage`; unique in its mesh.
    pub name: String,
    /// Number of coordinates, 1 or more.
    pub size: usize,
}

/// All devices of a session: ranks `0..device_count`, row-major over named axes (the last axis varies fastest).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mesh {
    whole: Placement,
}

impl Mesh {
    /// Builds a mesh with these axes.
    ///
    /// # Errors
    /// Returns an error if there is no axis, an axis has size 0, a name is empty or occurs twice, or there are too many
    /// devices.
    pub fn new(axes: &[(&str, usize)]) -> Result<Self, LayoutError> {
        let count = axes.iter().try_fold(1usize, |count, axis| count.checked_mul(axis.1));
        let Some(count) = count.filter(|count| *count <= MESH_DEVICES_MAX) else {
            let mesh = axes.iter().map(|(name, size)| format!("{name}={size}")).collect::<Vec<_>>().join(",");
            return Err(LayoutError::TooManyDevices { mesh, max: MESH_DEVICES_MAX });
        };
        let devices = (0..count).collect();
        if axes.is_empty() {
            return Err(LayoutError::MeshSyntax { text: String::new(), part: String::new() });
        }
        Ok(Self { whole: Placement::of(devices, axes)? })
    }

    /// Parses `name=size,name=size`, such as `data=2,stage=2,tensor=2`.
    ///
    /// # Errors
    /// Returns an error if the syntax is wrong. Also returns the errors of [`Mesh::new`].
    pub fn parse(text: &str) -> Result<Self, LayoutError> {
        let mut axes = Vec::new();
        for part in text.split(',') {
            let syntax = || LayoutError::MeshSyntax { text: text.into(), part: part.trim().into() };
            let (name, size) = part.split_once('=').ok_or_else(syntax)?;
            let size = size.trim().parse().map_err(|_| syntax())?;
            axes.push((name.trim(), size));
        }
        Self::new(&axes)
    }

    /// Parses a mesh of these axes, in this order. An axis that the text does not name has size 1.
    ///
    /// ```
    /// # use shardflow::prelude::Mesh;
    /// let mesh = Mesh::parse_axes("tensor=2,data=4", &["data", "stage", "tensor"])?;
    /// assert_eq!(mesh.to_string(), "data=4,stage=1,tensor=2");
    /// # Ok::<(), shardflow::prelude::LayoutError>(())
    /// ```
    ///
    /// # Errors
    /// Returns an error if the text names another axis. Also returns the errors of [`Mesh::parse`].
    pub fn parse_axes(text: &str, axes: &[&str]) -> Result<Self, LayoutError> {
        let given = Self::parse(text)?;
        if let Some(axis) = given.axes().iter().find(|axis| !axes.contains(&axis.name.as_str())) {
            let known = axes.iter().map(|axis| (*axis).into()).collect();
            return Err(LayoutError::UnknownAxis { axis: axis.name.clone(), known });
        }
        Self::new(&axes.iter().map(|axis| (*axis, given.size(axis))).collect::<Vec<_>>())
    }

    /// Size of the axis with this name; 1 if there is none.
    pub fn size(&self, name: &str) -> usize {
        self.axis(name).map_or(1, |axis| self.axes()[axis].size)
    }

    /// Number of devices: the product of the axes' sizes.
    pub fn device_count(&self) -> usize {
        self.whole.devices.len()
    }

    /// The axes, outermost first.
    pub fn axes(&self) -> &[Axis] {
        &self.whole.axes
    }

    /// See [`Placement::axis`].
    pub fn axis(&self, name: &str) -> Result<usize, LayoutError> {
        self.whole.axis(name)
    }

    /// The placement of all devices, with all axes.
    pub fn whole(&self) -> Placement {
        self.whole.clone()
    }

    /// See [`Placement::at`].
    pub fn at(&self, axis: &str, coordinate: usize) -> Result<Placement, LayoutError> {
        self.whole.at(axis, coordinate)
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.whole.axes_text())
    }
}

/// An ordered set of devices, arranged over named axes. A placement without axes is one device.
/// A device's **index** is its position in the placement; its **rank** is its number in the session's [`Mesh`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Placement {
    axes: Arc<[Axis]>,
    devices: Arc<[usize]>,
    /// The same ranks as `devices`, in a compact form if they are a grid.
    ranks: Ranks,
}

impl Placement {
    /// Builds a placement of these devices (ranks, row-major) over these axes.
    ///
    /// # Errors
    /// Returns an error if an axis has size 0, a name is empty or occurs twice, or devices occur twice or do not match
    /// the axes.
    pub fn of(devices: Vec<usize>, axes: &[(&str, usize)]) -> Result<Self, LayoutError> {
        let axes = axes.iter().map(|&(name, size)| Axis { name: name.into(), size }).collect();
        let placement = Self::from_parts(axes, devices.into());
        for (i, axis) in placement.axes.iter().enumerate() {
            if axis.name.is_empty() {
                return Err(LayoutError::MeshSyntax { text: placement.axes_text(), part: format!("={}", axis.size) });
            }
            if axis.size == 0 {
                return Err(LayoutError::EmptyAxis { axis: axis.name.clone() });
            }
            if placement.axes[..i].iter().any(|a| a.name == axis.name) {
                return Err(LayoutError::DuplicateAxis { axis: axis.name.clone() });
            }
        }
        let expected = placement.axes.iter().map(|a| a.size).product();
        let mut sorted = placement.devices.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if placement.devices.len() != expected || sorted.len() != expected {
            let axes = placement.axes_text();
            return Err(LayoutError::Devices { axes, expected, devices: placement.devices.to_vec() });
        }
        Ok(placement)
    }

    /// A placement of these devices, which must be distinct, along a single axis.
    pub(crate) fn of_all(devices: Vec<usize>) -> Self {
        Self::from_parts([Axis { name: "all".into(), size: devices.len() }].into(), devices.into())
    }

    fn from_parts(axes: Arc<[Axis]>, devices: Arc<[usize]>) -> Self {
        let ranks = Ranks::of(&devices);
        Self { axes, devices, ranks }
    }

    /// The axes, outermost first.
    pub fn axes(&self) -> &[Axis] {
        &self.axes
    }

    /// Ranks of the devices, row-major over the axes.
    pub fn devices(&self) -> &[usize] {
        &self.devices
    }

    /// Number of devices.
    pub fn device_count(&self) -> usize {
        self.devices.len()
    }

    /// Index of the axis with this name.
    ///
    /// # Errors
    /// Returns an error if there is no such axis. The error lists the axes.
    pub fn axis(&self, name: &str) -> Result<usize, LayoutError> {
        self.axes.iter().position(|a| a.name == name).ok_or_else(|| LayoutError::UnknownAxis {
            axis: name.into(),
            known: self.axes.iter().map(|a| a.name.clone()).collect(),
        })
    }

    /// The devices at this coordinate of this axis, as a placement with the remaining axes.
    ///
    /// # Errors
    /// Returns an error if the axis or the coordinate does not exist.
    pub fn at(&self, axis: &str, coordinate: usize) -> Result<Self, LayoutError> {
        let position = self.axis(axis)?;
        let size = self.axes[position].size;
        if coordinate >= size {
            return Err(LayoutError::Coordinate { axis: axis.into(), size, coordinate });
        }
        let matches = |index: &usize| self.coords(*index)[position] == coordinate;
        let devices = (0..self.devices.len()).filter(matches).map(|i| self.devices[i]).collect();
        let mut axes = self.axes.to_vec();
        axes.remove(position);
        Ok(Self::from_parts(axes.into(), devices))
    }

    /// Coordinates of the device at this index, one for each axis.
    pub fn coords(&self, index: usize) -> Vec<usize> {
        let mut rest = index;
        let mut coords: Vec<usize> = self.axes.iter().rev().map(|a| (rest % a.size, rest /= a.size).0).collect();
        coords.reverse();
        coords
    }

    /// Index of the device with these coordinates.
    pub(crate) fn index_at(&self, coords: &[usize]) -> usize {
        self.axes.iter().zip(coords).fold(0, |index, (axis, coordinate)| index * axis.size + coordinate)
    }

    /// Index of the device with this rank, if the placement contains it.
    pub fn index_of(&self, device: usize) -> Option<usize> {
        self.ranks.member_of(device)
    }

    /// The number of the device's group in [`Placement::group_indices`].
    pub(crate) fn group_number(&self, index: usize, axes: &[usize]) -> u32 {
        let (mut rest, mut number, mut stride) = (index, 0, 1);
        for (a, axis) in self.axes.iter().enumerate().rev() {
            if !axes.contains(&a) {
                number += rest % axis.size * stride;
                stride *= axis.size;
            }
            rest /= axis.size;
        }
        number as u32
    }

    /// Partitions the device indices into groups whose members differ only along `axes` (axis indices). Groups are in
    /// the order of their first members, and members are in row-major order. Without axes, each device is a group.
    pub fn group_indices(&self, axes: &[usize]) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        // Position of each group, by the index of its first member.
        let mut position_of = vec![usize::MAX; self.devices.len()];
        for index in 0..self.devices.len() {
            let (mut rest, mut stride, mut first) = (index, 1, index);
            for (a, axis) in self.axes.iter().enumerate().rev() {
                first -= if axes.contains(&a) { rest % axis.size * stride } else { 0 };
                (rest, stride) = (rest / axis.size, stride * axis.size);
            }
            if position_of[first] == usize::MAX {
                position_of[first] = groups.len();
                groups.push(Vec::new());
            }
            groups[position_of[first]].push(index);
        }
        groups
    }

    /// The group of [`Placement::group_indices`] that contains the device at this index.
    pub(crate) fn group_of(&self, index: usize, axes: &[usize]) -> Vec<usize> {
        let mut group = vec![index];
        let mut stride = 1;
        for (a, axis) in self.axes.iter().enumerate().rev() {
            if axes.contains(&a) {
                let first = |member: usize| member - member / stride % axis.size * stride;
                let along = |coordinate: usize| group.iter().map(move |&member| first(member) + coordinate * stride);
                group = (0..axis.size).flat_map(along).collect();
            }
            stride *= axis.size;
        }
        group
    }

    /// The position of the device at this index in its group.
    pub(crate) fn group_member(&self, index: usize, axes: &[usize]) -> usize {
        let (mut rest, mut member, mut stride) = (index, 0, 1);
        for (a, axis) in self.axes.iter().enumerate().rev() {
            if axes.contains(&a) {
                member += rest % axis.size * stride;
                stride *= axis.size;
            }
            rest /= axis.size;
        }
        member
    }

    /// Number of members of each group.
    pub(crate) fn group_len(&self, axes: &[usize]) -> usize {
        self.axes.iter().enumerate().filter(|(a, _)| axes.contains(a)).map(|(_, axis)| axis.size).product()
    }

    /// Like [`Placement::group_of`], but returns ranks, as a formula if each axis has a constant stride, else as a
    /// list.
    pub(crate) fn group_ranks(&self, index: usize, axes: &[usize]) -> Ranks {
        let (mut rest, mut step, mut first) = (index, 1, index);
        let mut all = Vec::with_capacity(self.axes.len());
        let mut own = Vec::with_capacity(axes.len());
        for (a, axis) in self.axes.iter().enumerate().rev() {
            let next = self.devices[if axis.size > 1 { step } else { 0 }];
            let rank_axis = RankAxis { stride: next as isize - self.devices[0] as isize, count: axis.size };
            all.push(rank_axis);
            if axes.contains(&a) {
                own.push(rank_axis);
                first -= rest % axis.size * step;
            }
            (rest, step) = (rest / axis.size, step * axis.size);
        }
        if self.ranks.is_grid() && Ranks::grid(self.devices[0], all.into_iter().rev()) == self.ranks {
            return Ranks::grid(self.devices[first], own.into_iter().rev());
        }
        self.group_of(index, axes).into_iter().map(|member| self.devices[member]).collect()
    }

    /// Like [`Placement::group_indices`], but with ranks.
    pub fn groups(&self, axes: &[usize]) -> Vec<Vec<usize>> {
        let ranks = |group: Vec<usize>| group.into_iter().map(|i| self.devices[i]).collect();
        self.group_indices(axes).into_iter().map(ranks).collect()
    }

    /// The axes in the syntax of [`Mesh::parse`].
    pub fn axes_text(&self) -> String {
        self.axes.iter().map(|a| format!("{}={}", a.name, a.size)).collect::<Vec<_>>().join(",")
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {:?}", self.axes_text(), self.devices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_knows_its_group_by_arithmetic() {
        let placement = Mesh::new(&[("a", 2), ("b", 3), ("c", 1), ("d", 2)]).unwrap().whole();
        for set in 0..16usize {
            let axes: Vec<usize> = (0..4).filter(|axis| set >> axis & 1 == 1).collect();
            for (number, group) in placement.group_indices(&axes).into_iter().enumerate() {
                for (member, index) in group.iter().enumerate() {
                    assert_eq!(placement.group_of(*index, &axes), group);
                    assert_eq!(placement.group_number(*index, &axes), number as u32);
                    assert_eq!(placement.group_member(*index, &axes), member);
                    assert_eq!(placement.group_len(&axes), group.len());
                }
            }
        }
    }

    #[test]
    fn group_ranks_are_the_ranks_of_the_group() {
        let sizes = [("a", 2), ("b", 3), ("c", 1), ("d", 2)];
        let lists: [Vec<usize>; 4] = [
            (0..12).collect(),
            (0..12).rev().map(|rank| 5 + 2 * rank).collect(),
            // A grid, but not over these axes.
            (0..4).flat_map(|outer| (0..3).map(move |inner| 10 * outer + inner)).collect(),
            vec![3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97, 93],
        ];
        for devices in lists {
            let placement = Placement::of(devices.clone(), &sizes).unwrap();
            for (set, index) in (0..16usize).flat_map(|set| (0..12).map(move |index| (set, index))) {
                let axes: Vec<usize> = (0..4).filter(|axis| set >> axis & 1 == 1).collect();
                let group = placement.group_of(index, &axes).into_iter().map(|member| devices[member]);
                assert_eq!(placement.group_ranks(index, &axes), group.collect(), "{axes:?} of {devices:?}");
                assert_eq!(placement.index_of(devices[index]), Some(index));
            }
        }
    }

    #[test]
    fn ranks_are_row_major() {
        let mesh = Mesh::parse("data=2, stage=3,tensor=2").unwrap();
        assert_eq!(mesh.device_count(), 12);
        assert_eq!(mesh.axis("stage"), Ok(1));
        assert_eq!(mesh.whole().coords(7), [1, 0, 1]);
        assert_eq!(mesh.to_string(), "data=2,stage=3,tensor=2");
        let stage = mesh.at("stage", 1).unwrap();
        assert_eq!(stage.devices(), [2, 3, 8, 9]);
        assert_eq!(stage.axes_text(), "data=2,tensor=2");
        assert_eq!(stage.index_of(8), Some(2));
        assert_eq!(stage.index_of(0), None);
        let one = stage.at("data", 1).unwrap().at("tensor", 0).unwrap();
        assert_eq!((one.devices(), one.axes().len()), (&[8][..], 0));
    }

    #[test]
    fn groups_partition_the_devices() {
        let place = Mesh::parse("a=2,b=2,c=2").unwrap().whole();
        assert_eq!(place.groups(&[1]), [[0, 2], [1, 3], [4, 6], [5, 7]]);
        assert_eq!(place.groups(&[0, 2]), [[0, 1, 4, 5], [2, 3, 6, 7]]);
        assert_eq!(place.groups(&[2, 0]), place.groups(&[0, 2]));
        assert_eq!(place.groups(&[]).len(), 8);
        assert_eq!(place.groups(&[0, 1, 2]), [[0, 1, 2, 3, 4, 5, 6, 7]]);
        for axes in [&[][..], &[1], &[0, 2], &[2, 0], &[0, 1, 2]] {
            for group in place.group_indices(axes) {
                group.iter().for_each(|index| assert_eq!(place.group_of(*index, axes), group, "{axes:?}"));
            }
        }
    }

    #[test]
    fn invalid_meshes_are_refused_with_the_cause() {
        let text = |r: Result<Mesh, LayoutError>| r.unwrap_err().to_string();
        assert_eq!(text(Mesh::parse("data=0")), "mesh axis data has size 0, expected at least 1");
        assert_eq!(text(Mesh::parse("data=2,data=3")), "mesh axis data occurs twice");
        for wrong in ["", "data", "data=x", "=2", "data=2,,tensor=2", "data=-1"] {
            assert!(text(Mesh::parse(wrong)).contains("name=size"), "{wrong}");
        }
        let unknown = Mesh::parse_axes("expert=2", &["data", "tensor"]);
        assert_eq!(text(unknown), "no mesh axis expert; the axes are: data, tensor");
        let mesh = Mesh::new(&[("data", 2), ("tensor", 2)]).unwrap();
        assert_eq!((mesh.size("tensor"), mesh.size("stage")), (2, 1));
        assert_eq!(mesh.axis("stage").unwrap_err().to_string(), "no mesh axis stage; the axes are: data, tensor");
        let out_of_range = "mesh axis data has size 2, so coordinate 2 is out of range";
        assert_eq!(mesh.at("data", 2).unwrap_err().to_string(), out_of_range);
        assert!(Placement::of(vec![0, 0], &[("data", 2)]).is_err());
        assert!(Placement::of(vec![0], &[("data", 2)]).is_err());
    }
}
