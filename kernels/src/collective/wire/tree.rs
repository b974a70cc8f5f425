//! Binomial trees, for small tensors and broadcasts. Positions are counted from the root. The positions of a member and
//! its neighbour differ in one bit. A child's position differs in one of the member's trailing 0 bits, and the parent's
//! position differs in the member's lowest 1 bit.

use super::flow::PIECE_WORDS;
use super::port::Port;
use crate::collective::ReduceOp;
use crate::collective::exchange::{combine_into, combine_two};
use crate::error::Result;
use crate::memory::Words;
use crate::tensor::split_range;

/// A member's position in a binomial tree.
pub(super) struct Tree {
    root: usize,
    members: usize,
    /// The member's index, counted from the root.
    position: usize,
}

impl Tree {
    pub(super) fn new(members: usize, member: usize, root: usize) -> Self {
        Self { root, members, position: (member + members - root) % members }
    }

    fn of(port: &Port, root: usize) -> Self {
        Self::new(port.members(), port.context.member, root)
    }

    /// The parent and the children.
    pub(super) fn neighbours(&self) -> impl Iterator<Item = usize> {
        self.parent().into_iter().chain(self.children().map(|(child, _)| child))
    }

    fn member(&self, position: usize) -> usize {
        (self.root + position) % self.members
    }

    fn parent(&self) -> Option<usize> {
        (self.position != 0).then(|| self.member(self.position & (self.position - 1)))
    }

    /// The children, with the nearest first: each child's member index, and its distance in positions.
    fn children(&self) -> impl DoubleEndedIterator<Item = (usize, usize)> {
        let bits = if self.position == 0 { usize::BITS } else { self.position.trailing_zeros() };
        let distances = (0..bits.min(usize::BITS - 1)).map(|bit| 1usize << bit);
        let below: Vec<_> = distances.take_while(|distance| self.position + distance < self.members).collect();
        below.into_iter().map(|distance| (self.member(self.position + distance), distance))
    }

    /// Number of members in the subtree whose root is `distance` positions after this member.
    fn subtree(&self, distance: usize) -> usize {
        distance.min(self.members - self.position - distance)
    }
}

/// All-reduce of few bytes. Two members exchange their values; larger groups gather all values at member 0, which
/// combines them and broadcasts the result. `blocks` has room for every member's values.
pub(super) fn all_reduce(port: &mut Port, words: &mut Words<'_>, blocks: &mut [f32], op: ReduceOp) -> Result<()> {
    let (len, n) = (words.y.len(), port.members());
    if n == 2 {
        let (peer, bytes) = (1 - port.context.member, size_of_val(words.x()));
        let (first, second) = blocks[..2 * len].split_at_mut(len);
        let (own, other) = if peer == 1 { (first, second) } else { (second, first) };
        port.begin_out(peer, bytes)?;
        port.begin_in(peer, bytes)?;
        own.copy_from_slice(words.x());
        let into = bytemuck::cast_slice_mut(other);
        port.exchange(Some((peer, bytemuck::cast_slice(own))), Some((peer, into)))?;
        combine_blocks(op, blocks, n, words.y);
        return Ok(());
    }
    let tree = Tree::of(port, 0);
    blocks[..len].copy_from_slice(words.x());
    for (child, distance) in tree.children() {
        let into = &mut blocks[distance * len..][..tree.subtree(distance) * len];
        port.begin_in(child, size_of_val(into))?;
        port.exchange(None, Some((child, bytemuck::cast_slice_mut(into))))?;
    }
    if let Some(parent) = tree.parent() {
        let held = 1 + tree.children().map(|(_, distance)| tree.subtree(distance)).sum::<usize>();
        let data = bytemuck::cast_slice(&blocks[..held * len]);
        port.begin_out(parent, data.len())?;
        port.exchange(Some((parent, data)), None)?;
    } else {
        combine_blocks(op, blocks, n, words.y);
    }
    broadcast_from_root(port, &tree, words.y)
}

/// Combines the values of all members in the order of [`crate::collective::Group`]. Block i holds member i's values.
fn combine_blocks(op: ReduceOp, blocks: &[f32], n: usize, y: &mut [f32]) {
    let len = y.len();
    for owner in 0..n {
        let chunk = split_range(len, n, owner);
        let of = |member: usize| &blocks[member % n * len..][chunk.clone()];
        let sum = &mut y[chunk.clone()];
        if n == 1 {
            sum.copy_from_slice(of(0));
            continue;
        }
        combine_two(op, of(owner + 1), of(owner + 2), sum);
        (3..=n).for_each(|i| combine_into(op, sum, of(owner + i)));
    }
}

pub(super) fn broadcast(port: &mut Port, words: &mut Words<'_>, root: usize) -> Result<()> {
    if port.context.member == root
        && let (Some(x), y) = words.split()
    {
        y.copy_from_slice(x);
    }
    broadcast_from_root(port, &Tree::of(port, root), words.y)
}

/// Sends the root's `y` to all. While a piece arrives, the previous one goes to the child with the largest subtree.
fn broadcast_from_root(port: &mut Port, tree: &Tree, y: &mut [f32]) -> Result<()> {
    let parent = tree.parent();
    let children: Vec<usize> = tree.children().rev().map(|(child, _)| child).collect();
    if let Some(parent) = parent {
        port.begin_in(parent, size_of_val(y))?;
    }
    for &child in &children {
        port.begin_out(child, size_of_val(y))?;
    }
    // A transfer of no bytes still has a header, so there is at least one piece.
    let pieces = y.len().div_ceil(PIECE_WORDS).max(1);
    let all = y.len();
    let end = |piece: usize| all.min(piece * PIECE_WORDS);
    for piece in 0..=pieces {
        let (done, rest) = y.split_at_mut(end(piece));
        let source = parent.filter(|_| piece < pieces);
        let into = source.map(|from| (from, bytemuck::cast_slice_mut(&mut rest[..end(piece + 1) - end(piece)])));
        let Some(before) = piece.checked_sub(1) else {
            port.exchange(None, into)?;
            continue;
        };
        let outgoing: &[u8] = bytemuck::cast_slice(&done[end(before)..]);
        port.exchange(children.first().map(|&child| (child, outgoing)), into)?;
        for &child in children.iter().skip(1) {
            port.exchange(Some((child, outgoing)), None)?;
        }
    }
    Ok(())
}
