//! Transfers directly between two members: all-to-all, gathers with overlapping parts, send and receive.

use std::collections::BTreeSet;

use super::flow::{Flow, In, Part, Target};
use super::port::Port;
use crate::collective::exchange::taken;
use crate::error::Result;
use crate::memory::Words;
use crate::region::{Runs, for_each_run};
use crate::tensor::Region;

/// Largest x, in bytes, that is sent before the receiver is in its call. The kernel's buffers can hold such an x.
const EAGER_BYTES_MAX: usize = 64 << 10;

/// The members with which `member` exchanges data in [`all_to_all`]. Members that exchange no data exchange no headers.
pub(super) fn peers(member: usize, sources: &[Region], targets: &[Region]) -> BTreeSet<usize> {
    let receives = |to: &usize| !sent(member, *to, sources, targets).is_empty();
    let receivers = (0..sources.len()).filter(receives);
    taken(member, sources, &targets[member]).into_iter().map(|(from, _)| from).chain(receivers).collect()
}

/// The boxes that member `from` sends to member `to`.
fn sent(from: usize, to: usize, sources: &[Region], targets: &[Region]) -> Vec<Region> {
    // Most pairs of members exchange nothing. For them, this check avoids `taken`, which visits all sources.
    if sources[from].intersect(&targets[to]).is_none() {
        return Vec::new();
    }
    let of_sender = taken(to, sources, &targets[to]).into_iter().find(|(sender, _)| *sender == from);
    of_sender.map_or(Vec::new(), |(_, boxes)| boxes)
}

/// Member i contributes `sources[i]` and receives `targets[i]`.
pub(super) fn all_to_all(
    port: &mut Port,
    words: &mut Words<'_>,
    slots: &mut [f32],
    sources: &[Region],
    targets: &[Region],
) -> Result<()> {
    let (member, n) = (port.context.member, port.members());
    let (source, target) = (&sources[member], &targets[member]);
    let received_boxes = taken(member, sources, target);
    if let (Some((_, boxes)), (Some(x), y)) = (received_boxes.iter().find(|(from, _)| *from == member), words.split()) {
        for common in boxes {
            let from = (&source.size[..], &common.relative_to(source).start[..]);
            let to = (&target.size[..], &common.relative_to(target).start[..]);
            for_each_run(from, to, &common.size, |from, to, len| {
                y[to..][..len].copy_from_slice(&x[from..][..len]);
            });
        }
    }
    for step in 1..n {
        let (to, from) = ((member + step) % n, (member + n - step) % n);
        let sent = sent(member, to, sources, targets);
        let received = received_boxes.iter().filter(|(sender, _)| *sender == from).flat_map(|(_, boxes)| boxes);
        let received: Vec<&Region> = received.collect();
        let receivers = (!sent.is_empty()).then_some(to);
        let senders = (!received.is_empty()).then_some(from);
        let mut flow = Flow::new(receivers, senders);
        sent.iter().for_each(|common| push_out(&mut flow, source, common));
        received.iter().for_each(|common| push_in(&mut flow, from, target, common));
        flow.run(port, words, slots)?;
    }
    Ok(())
}

/// The parts of the box `common` in a tensor that holds the region `held`.
fn parts(flow: &mut Flow, held: &Region, common: &Region) -> impl Iterator<Item = Part> + use<> {
    let runs = flow.add_box(Runs::new(&held.size, &common.relative_to(held)));
    flow.parts(runs, 0..common.element_count())
}

fn push_out(flow: &mut Flow, source: &Region, common: &Region) {
    for part in parts(flow, source, common) {
        let words = part.range.len();
        let from = flow.source(part);
        flow.push_out(0, words, from, None);
    }
}

fn push_in(flow: &mut Flow, from: usize, target: &Region, common: &Region) {
    for part in parts(flow, target, common) {
        let words = part.range.len();
        let to = flow.contiguous(&part).map_or_else(|| Target::Unpack(part), Target::Y);
        flow.ins.push(In { from, to, words });
    }
}

/// Sends x. Returns when the receiver is in its call and the kernel has accepted all bytes.
pub(super) fn send(port: &mut Port, words: &Words<'_>, to: usize) -> Result<()> {
    let data: &[u8] = bytemuck::cast_slice(words.x());
    port.begin_in(to, 0)?;
    port.begin_out(to, data.len())?;
    if data.len() <= EAGER_BYTES_MAX {
        return port.exchange(Some((to, data)), Some((to, &mut [])));
    }
    // The wait for a late receiver has no timeout. After this wait, a write that stalls is an error.
    port.exchange(None, Some((to, &mut [])))?;
    port.exchange(Some((to, data)), None)
}

/// Receives y, after notifying the sender that this member is in its call.
pub(super) fn receive(port: &mut Port, words: &mut Words<'_>, from: usize) -> Result<()> {
    let into: &mut [u8] = bytemuck::cast_slice_mut(words.y);
    port.begin_out(from, 0)?;
    port.begin_in(from, into.len())?;
    port.exchange(Some((from, &[])), Some((from, into)))
}
