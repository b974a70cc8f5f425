//! Broadcasts over binomial trees. Positions are counted from the root. The positions of a member and
//! its neighbour differ in one bit. A child's position differs in one of the member's trailing 0 bits, and the parent's
//! position differs in the member's lowest 1 bit.

use super::flow::PIECE_WORDS;
use super::port::Port;
use crate::error::Result;
use crate::memory::Words;

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
}

/// Sends the root's x to all. While a piece arrives, the previous one goes to the child with the largest subtree.
pub(super) fn broadcast(port: &mut Port, words: &mut Words<'_>, root: usize) -> Result<()> {
    if port.context.member == root
        && let (Some(x), y) = words.split()
    {
        y.copy_from_slice(x);
    }
    let y = &mut words.y[..];
    let tree = Tree::new(port.members(), port.context.member, root);
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
