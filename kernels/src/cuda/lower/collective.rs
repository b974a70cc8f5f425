//! Building blocks of collectives on GPUs: contiguous regions, the messages between members, the choice of messages to
//! pack, and the workspace that the engines need. Pure functions.
//!
//! - STAGE-1: an engine uses at most [`workspace_bytes`] of a launch's workspace. The plan does not know which engine
//!   will run, so that function returns the maximum over all engines.

use std::borrow::Cow;

use crate::collective::exchange::taken;
use crate::collective::{CollectiveCall, CollectiveKind};
use crate::memory::ALIGNMENT;
use crate::op::Launch;
use crate::region::Runs;
use crate::tensor::regions::Regions;
use crate::tensor::{DType, Region, element_count, split_range};

/// Maximum number of members whose values one kernel combines.
pub(crate) const MEMBERS_MAX: usize = 16;

/// Number of bytes that one step combines if the members' values must be copied from other GPUs.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// Element offset of a region in a tensor of this shape, if the region is contiguous.
pub(crate) fn contiguous_start(shape: &[usize], region: &Region) -> Option<usize> {
    let whole = 0..region.element_count();
    Runs::new(shape, region).contiguous(&whole).map(|range| range.start)
}

/// Whether all parts have the same size and lie one after another in the whole tensor, as NCCL requires.
pub(crate) fn are_rows(parts: &Regions, whole: &[usize]) -> bool {
    if parts.is_split_in_rows(whole) {
        return true;
    }
    let parts = parts.list();
    let elements = parts.first().map_or(0, Region::element_count);
    let in_place = |(i, part): (usize, &Region)| {
        part.element_count() == elements && contiguous_start(whole, part) == Some(i * elements)
    };
    elements * parts.len() == element_count(whole) && parts.iter().enumerate().all(in_place)
}

/// Each member's source and target regions, for all-gathers (whose y has shape `y_shape`) and all-to-alls.
pub(crate) fn regions<'a>(kind: &'a CollectiveKind, y_shape: &[usize]) -> Option<[Cow<'a, [Region]>; 2]> {
    match kind {
        CollectiveKind::AllGather { parts } => Some([parts.list(), vec![Region::whole(y_shape); parts.len()].into()]),
        CollectiveKind::AllToAll { sources, targets } => Some([sources.list(), targets.list()]),
        _ => None,
    }
}

/// The data that one member sends to another or receives from it.
pub(crate) struct Message {
    pub(crate) peer: usize,
    pub(crate) sends: bool,
    /// The regions to transfer: in this member's x if it sends, and in its y if it receives.
    pub(crate) boxes: Vec<Region>,
    /// Element offset in x or y if the data is contiguous. Data that is not contiguous is packed.
    pub(crate) direct: Option<usize>,
}

impl Message {
    fn new(peer: usize, sends: bool, boxes: &[Region], own: &Region) -> Self {
        let boxes: Vec<Region> = boxes.iter().map(|common| common.relative_to(own)).collect();
        let direct = match &boxes[..] {
            [common] => contiguous_start(&own.size, common),
            _ => None,
        };
        Self { peer, sends, boxes, direct }
    }

    pub(crate) fn elements(&self) -> usize {
        self.boxes.iter().map(Region::element_count).sum()
    }

    pub(crate) fn packed_bytes(&self, dtype: DType) -> usize {
        if self.direct.is_some() { 0 } else { (self.elements() * dtype.bytes()).next_multiple_of(ALIGNMENT) }
    }
}

pub(crate) fn messages(member: usize, sources: &[Region], targets: &[Region]) -> Vec<Message> {
    let mut messages = Vec::new();
    for (to, target) in targets.iter().enumerate().filter(|(to, _)| *to != member) {
        let sent = taken(to, sources, target).into_iter().filter(|(from, _)| *from == member);
        messages.extend(sent.map(|(_, boxes)| Message::new(to, true, &boxes, &sources[member])));
    }
    let received = taken(member, sources, &targets[member]).into_iter().filter(|(from, _)| *from != member);
    messages.extend(received.map(|(from, boxes)| Message::new(from, false, &boxes, &targets[member])));
    messages
}

/// The collective case of [`super::workspace_bytes`].
pub(super) fn workspace_bytes(call: &CollectiveCall, launch: &Launch) -> usize {
    let (members, [x], [y]) = (call.group.ranks.len(), &launch.reads[..], &launch.writes[..]) else { return 0 };
    if members < 2 {
        return 0;
    }
    let bytes = |elements: usize| elements * x.dtype.bytes();
    let pieces = |elements: usize| members.min(MEMBERS_MAX) * bytes(elements).min(PIECE_BYTES);
    match &call.kind {
        CollectiveKind::AllReduce { .. } => pieces(split_range(element_count(&y.shape), members, 0).len()),
        CollectiveKind::ReduceScatter { parts, .. } => {
            let longest = parts.elements_max();
            let slots = (parts.len() + 1) * bytes(longest);
            if are_rows(parts, &x.shape) { pieces(longest) } else { slots }
        }
        CollectiveKind::AllGather { parts } if are_rows(parts, &y.shape) => 0,
        kind => match regions(kind, &y.shape) {
            // The engine reports inconsistent arguments when it runs the call.
            Some([sources, targets]) if [sources.len(), targets.len()] == [members; 2] && call.member < members => {
                messages(call.member, &sources, &targets).iter().map(|message| message.packed_bytes(x.dtype)).sum()
            }
            _ => 0,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contiguous_region_is_found() {
        let at = |start: [usize; 2], size: [usize; 2]| {
            contiguous_start(&[4, 6], &Region { start: start.to_vec(), size: size.to_vec() })
        };
        assert_eq!(at([1, 0], [2, 6]), Some(6));
        assert_eq!(at([2, 1], [1, 3]), Some(13));
        assert_eq!(at([0, 1], [2, 3]), None);
        assert_eq!(at([0, 1], [0, 3]), Some(0));
    }
}
