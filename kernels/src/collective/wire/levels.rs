//! Reductions among two or more members, in the levels of [`crate::collective::order`].
//!
//! In a reduce-scatter, the data that a member still combines shrinks at each level. At a level of radix r, a member
//! divides this data into r ranges, one per digit. It sends each range to the member with this digit, and combines the
//! values that it receives for its own range. After the last level it has its own result. In total, each of n members
//! sends and receives `(n-1)/n` of the data. An all-reduce then passes the results back, from the last level to the
//! first.
//!
//! For small tensors, the number of messages takes more time than the data. So members exchange all their values at each
//! level, and all of them compute the whole result.

use std::ops::Range;

use super::flow::{Combination, Flow, In, Part, SLOTS_WORDS, Source, Target};
use super::port::Port;
use crate::collective::ReduceOp;
use crate::collective::exchange::{combine_into, combine_two};
use crate::collective::order::{Level, levels};
use crate::error::Result;
use crate::memory::Words;
use crate::region::Runs;
use crate::tensor::{Region, split_range};

/// Maximum number of words that a reduce-scatter keeps between two levels. Tests need several slices of small tensors.
const BETWEEN_WORDS_MAX: usize = if cfg!(test) { 1000 } else { 1 << 20 };

/// Maximum number of words that an all-reduce passes through all levels at once. Tests need several blocks.
const BLOCK_WORDS: usize = if cfg!(test) { 50_000 } else { 1 << 20 };

/// The members with which `member` exchanges values.
pub(super) fn peers(members: usize, member: usize) -> impl Iterator<Item = usize> {
    let others = move |level: Level| (0..level.radix).map(move |digit| level.with_digit(member, digit));
    levels(members).into_iter().flat_map(others).filter(move |peer| *peer != member)
}

/// One member's part in a level that divides the data. The data consists of one part per member, in the order of
/// positions.
struct Division {
    member: usize,
    level: Level,
    /// The positions that this member had before this level.
    before: Range<usize>,
}

impl Division {
    /// The levels of a reduction. After the last one, the member keeps one position.
    fn all(members: usize, member: usize) -> Vec<Self> {
        let mut before = 0..members;
        let divide = |level: Level| {
            let division = Self { member, level, before: before.clone() };
            before = division.positions(level.digit(member));
            division
        };
        levels(members).into_iter().map(divide).collect()
    }

    fn own_digit(&self) -> usize {
        self.level.digit(self.member)
    }

    /// The positions that members with this digit keep.
    fn positions(&self, digit: usize) -> Range<usize> {
        let count = self.before.len() / self.level.radix;
        self.before.start + digit * count..self.before.start + (digit + 1) * count
    }

    fn own(&self) -> Range<usize> {
        self.positions(self.own_digit())
    }

    /// The digits of the other members.
    fn others(&self) -> impl Iterator<Item = usize> {
        let own = self.own_digit();
        (0..self.level.radix).filter(move |digit| *digit != own)
    }

    fn peers(&self) -> impl Iterator<Item = usize> {
        self.others().map(|digit| self.level.with_digit(self.member, digit))
    }

    /// The flow of this level. `parts` returns the elements of x at some positions, as ranges of boxes. The results of the
    /// own positions are written to y, one after another from `start` on. If `passes_back`, x and y have the same shape,
    /// and the results are passed back at once.
    fn reduce(
        &self,
        op: ReduceOp,
        parts: impl Fn(Range<usize>) -> Vec<(Runs, Range<usize>)>,
        mut start: usize,
        passes_back: bool,
    ) -> Flow {
        let mut flow = Flow::new(self.peers(), self.peers());
        let mut pieces_of = |digit: usize| -> Vec<Part> {
            let parts = parts(self.positions(digit)).into_iter();
            let boxes: Vec<_> = parts.map(|(runs, range)| (flow.add_box(runs), range)).collect();
            boxes.into_iter().flat_map(|(runs, range)| flow.parts(runs, range)).collect()
        };
        let pieces: Vec<Vec<Part>> = (0..self.level.radix).map(&mut pieces_of).collect();
        let own_digit = self.own_digit();
        for round in 0..pieces.iter().map(Vec::len).max().unwrap_or(0) {
            let theirs = || self.others().zip(self.peers()).enumerate();
            for (receiver, (digit, _)) in theirs() {
                if let Some(part) = pieces[digit].get(round) {
                    flow.push_out(receiver, part.range.len(), flow.source(part.clone()), None);
                }
            }
            if let Some(own) = pieces[own_digit].get(round) {
                let words = own.range.len();
                for (_, (digit, from)) in theirs() {
                    let values = Combination { op, own: own.clone(), start, digit, own_digit };
                    flow.ins.push(In { from, to: Target::Combine(values), words });
                }
                let last = flow.ins.len() - 1;
                for (receiver, _) in theirs().filter(|_| passes_back) {
                    flow.push_out(receiver, words, Source::Y(start..start + words), Some(last));
                }
                start += words;
            }
            for (_, (digit, from)) in theirs().filter(|_| passes_back) {
                if let Some(place) = pieces[digit].get(round).and_then(|part| flow.contiguous(part)) {
                    flow.ins.push(In { from, words: place.len(), to: Target::Y(place) });
                }
            }
        }
        flow
    }

    /// The flow that passes the results of this level back. `range` returns the elements of some positions.
    fn pass_back(&self, range: impl Fn(Range<usize>) -> Range<usize>) -> Flow {
        let mut flow = Flow::new(self.peers(), self.peers());
        let own = range(self.own());
        let others: Vec<_> = self.others().map(|digit| range(self.positions(digit))).collect();
        let longest = others.iter().chain([&own]).map(Range::len).max().unwrap_or(0);
        // The peers take turns, so that none of them waits for the whole data of another one.
        for start in (0..longest).step_by(flow.piece_words) {
            let words = flow.piece_words;
            let piece = |all: &Range<usize>| all.end.min(all.start + start)..all.end.min(all.start + start + words);
            let out = piece(&own);
            for receiver in 0..flow.outs.len() {
                flow.push_out(receiver, out.len(), Source::Y(out.clone()), None);
            }
            for (theirs, from) in others.iter().map(piece).zip(self.peers()) {
                flow.ins.push(In { from, words: theirs.len(), to: Target::Y(theirs) });
            }
        }
        flow
    }
}

/// All-reduce. Each level divides the tensor. If there are several levels, they run for one block after another, so that a
/// block stays in the cache.
pub(super) fn all_reduce(port: &mut Port, words: &mut Words<'_>, slots: &mut [f32], op: ReduceOp) -> Result<()> {
    let divisions = Division::all(port.members(), port.context.member);
    let (x, y) = words.split();
    let block_words = if divisions.len() > 1 { BLOCK_WORDS } else { y.len().max(1) };
    for start in (0..y.len().max(1)).step_by(block_words) {
        let block = start..y.len().min(start + block_words);
        all_reduce_block(port, &divisions, x.map(|x| &x[block.clone()]), &mut y[block], slots, op)?;
    }
    Ok(())
}

fn all_reduce_block(
    port: &mut Port,
    divisions: &[Division],
    mut x: Option<&[f32]>,
    y: &mut [f32],
    slots: &mut [f32],
    op: ReduceOp,
) -> Result<()> {
    let (all, n) = (y.len(), port.members());
    let range = |positions: Range<usize>| {
        split_range(all, n, positions.start).start..split_range(all, n, positions.end - 1).end
    };
    let parts = |positions: Range<usize>| {
        let range = range(positions);
        vec![(Runs::flat(range.clone()), 0..range.len())]
    };
    for (index, division) in divisions.iter().enumerate() {
        let last = index + 1 == divisions.len();
        let flow = division.reduce(op, parts, range(division.own()).start, last);
        flow.run(port, &mut Words::new(x.take(), y), slots)?;
    }
    let earlier = divisions.iter().rev().skip(1);
    earlier
        .map(|division| division.pass_back(range))
        .try_for_each(|flow| flow.run(port, &mut Words::new(None, y), slots))
}

/// All-reduce of few words. `slots` has room for the words of every member.
pub(super) fn all_reduce_whole(port: &mut Port, words: &mut Words<'_>, slots: &mut [f32], op: ReduceOp) -> Result<()> {
    let member = port.context.member;
    let (mut x, y) = words.split();
    let len = y.len();
    for level in levels(port.members()) {
        let (digit, radix) = (level.digit(member), level.radix);
        let own = x.take().unwrap_or(&*y);
        for distance in 1..radix {
            let (to, from) = ((digit + distance) % radix, (digit + radix - distance) % radix);
            let [receiver, sender] = [to, from].map(|digit| level.with_digit(member, digit));
            let out = bytemuck::cast_slice(own);
            let into = bytemuck::cast_slice_mut(&mut slots[from * len..][..len]);
            port.begin_out(receiver, out.len())?;
            port.begin_in(sender, into.len())?;
            port.exchange(Some((receiver, out)), Some((sender, into)))?;
        }
        slots[digit * len..][..len].copy_from_slice(own);
        let slot = |digit: usize| &slots[digit * len..][..len];
        combine_two(op, slot(0), slot(1), y);
        (2..radix).for_each(|digit| combine_into(op, y, slot(digit)));
    }
    Ok(())
}

/// Reduce-scatter; x has the shape `whole`. If the values between two levels exceed [`BETWEEN_WORDS_MAX`], the parts are
/// combined in slices. `scratch` begins with the slots of a flow; the values between two levels follow.
pub(super) fn reduce_scatter(
    port: &mut Port,
    words: &mut Words<'_>,
    scratch: &mut Vec<f32>,
    op: ReduceOp,
    (whole, parts): (&[usize], &[Region]),
) -> Result<()> {
    let (n, member) = (port.members(), port.context.member);
    let mut by_position: Vec<(usize, usize)> = (0..n).map(|member| (position(n, member), member)).collect();
    by_position.sort_unstable();
    let parts: Vec<Runs> = by_position.iter().map(|(_, member)| Runs::new(whole, &parts[*member])).collect();
    let longest = parts.iter().map(Runs::element_count).max().unwrap_or(0);
    let divisions = Division::all(n, member);
    let kept = match &divisions[..] {
        [first, _, ..] => first.own(),
        _ => 0..0,
    };
    let slice_len = longest.min(BETWEEN_WORDS_MAX / kept.len().max(1)).max(1);
    let scratch_words = SLOTS_WORDS + kept.len() * slice_len;
    if scratch.len() < scratch_words {
        scratch.reserve_exact(scratch_words - scratch.len());
        scratch.resize(scratch_words, 0.0);
    }
    let (slots, between) = scratch.split_at_mut(SLOTS_WORDS);
    let y_len = words.y.len();
    for from in (0..longest.max(1)).step_by(slice_len) {
        let slice = |position: usize| {
            let len = parts[position].element_count();
            from.min(len)..(from + slice_len).min(len)
        };
        // Where each kept position, and the one after the last, begins between two levels.
        let mut starts = vec![0];
        kept.clone().for_each(|position| starts.push(starts[position - kept.start] + slice(position).len()));
        let start = |position: usize| starts[position - kept.start];
        let of_x =
            |positions: Range<usize>| positions.map(|position| (parts[position].clone(), slice(position))).collect();
        let of_between = |positions: Range<usize>| {
            let range = start(positions.start)..start(positions.end);
            vec![(Runs::flat(range.clone()), 0..range.len())]
        };
        for (index, division) in divisions.iter().enumerate() {
            let last = index + 1 == divisions.len();
            let flow = match index {
                0 => division.reduce(op, of_x, 0, false),
                _ => division.reduce(op, of_between, if last { 0 } else { start(division.own().start) }, false),
            };
            let (x, y) = words.split();
            let y = &mut y[from.min(y_len)..];
            let mut words = match (index, last) {
                (0, true) => Words::new(x, y),
                (0, false) => Words::new(x, between),
                (_, true) => Words::new(Some(between), y),
                (_, false) => Words::new(None, between),
            };
            flow.run(port, &mut words, slots)?;
        }
    }
    Ok(())
}

/// The position that a member keeps after all levels.
fn position(members: usize, member: usize) -> usize {
    levels(members).iter().map(|level| level.digit(member) * (members / level.stride / level.radix)).sum()
}
