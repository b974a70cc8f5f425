//! The control tree determines which processes exchange control messages and heartbeats. The tree follows the grouping
//! of processes into nodes, so most edges stay within a node. Every process builds the same tree from the roster.
//!
//! - **CT-1**: the processes of a node are leaves below the node's first process, its leader.
//! - **CT-2**: leaders form a tree, in order of rank. Each leader has at most [`FAN_OUT`] leaders as children. Process
//!   0 is the root, and a parent's number is lower than those of its children.
//! - **CT-3**: the processes below any process are consecutive in preorder. So one range check decides whether a
//!   process is below another.

/// Maximum number of leaders below a leader.
pub const FAN_OUT: usize = 8;

/// The control tree of a world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlTree {
    /// All processes in preorder.
    order: Vec<u32>,
    /// For each process: its index in the preorder, and the index after the last process below it.
    spans: Vec<(u32, u32)>,
    parents: Vec<Option<u32>>,
}

impl ControlTree {
    /// Builds the tree. `nodes` contains one value per rank. The processes of one node have equal values.
    pub fn new<N: Ord>(nodes: &[N]) -> Self {
        let mut members: std::collections::BTreeMap<&N, Vec<u32>> = std::collections::BTreeMap::new();
        for (process, node) in (0..).zip(nodes) {
            members.entry(node).or_default().push(process);
        }
        let mut members: Vec<Vec<u32>> = members.into_values().collect();
        members.sort();
        let mut tree = Self {
            order: Vec::with_capacity(nodes.len()),
            spans: vec![(0, 0); nodes.len()],
            parents: vec![None; nodes.len()],
        };
        tree.place(&members, None);
        tree
    }

    /// Adds the first node below `parent`. Splits the other nodes into up to [`FAN_OUT`] parts, and adds each part
    /// below the first node's leader.
    fn place(&mut self, nodes: &[Vec<u32>], parent: Option<u32>) {
        let Some((first, rest)) = nodes.split_first() else { return };
        let leader = first[0];
        self.add(leader, parent);
        first[1..].iter().for_each(|process| self.add(*process, Some(leader)));
        let parts = rest.len().min(FAN_OUT);
        for part in 0..parts {
            let bound = |part: usize| part * rest.len() / parts;
            self.place(&rest[bound(part)..bound(part + 1)], Some(leader));
        }
        self.spans[leader as usize].1 = self.order.len() as u32;
    }

    fn add(&mut self, process: u32, parent: Option<u32>) {
        let index = self.order.len() as u32;
        self.order.push(process);
        self.spans[process as usize] = (index, index + 1);
        self.parents[process as usize] = parent;
    }

    /// Number of processes.
    pub fn processes(&self) -> u32 {
        self.order.len() as u32
    }

    /// The process above this one; `None` for process 0.
    pub fn parent(&self, process: u32) -> Option<u32> {
        self.parents[process as usize]
    }

    /// The processes directly below this one, in preorder.
    pub fn children(&self, process: u32) -> Vec<u32> {
        let (start, end) = self.spans[process as usize];
        let mut children = Vec::new();
        let mut next = start + 1;
        while next < end {
            let child = self.order[next as usize];
            children.push(child);
            next = self.spans[child as usize].1;
        }
        children
    }

    /// Parent and children, in order of rank: the only processes with a control connection to this one.
    pub fn neighbours(&self, process: u32) -> Vec<u32> {
        let mut neighbours: Vec<u32> = self.parent(process).into_iter().chain(self.children(process)).collect();
        neighbours.sort_unstable();
        neighbours
    }

    /// True if `process` is `top` or below it.
    pub fn is_below(&self, process: u32, top: u32) -> bool {
        let (start, end) = self.spans[top as usize];
        (start..end).contains(&self.spans[process as usize].0)
    }

    /// The neighbour of `from` on the way to `to`; `None` if they are the same, or `to` does not exist.
    pub fn next_hop(&self, from: u32, to: u32) -> Option<u32> {
        if from == to || to >= self.processes() {
            return None;
        }
        if !self.is_below(to, from) {
            return self.parent(from);
        }
        // Walks up from the target, because trees are flat and wide.
        let mut hop = to;
        while self.parent(hop) != Some(from) {
            hop = self.parent(hop)?;
        }
        Some(hop)
    }

    /// Number of edges between this process and process 0.
    pub fn depth(&self, process: u32) -> u32 {
        self.parent(process).map_or(0, |parent| 1 + self.depth(parent))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn even(nodes: u32, per_node: u32) -> ControlTree {
        ControlTree::new(&(0..nodes * per_node).map(|process| process / per_node).collect::<Vec<_>>())
    }

    #[test]
    fn connections_of_a_process_do_not_grow_with_the_world() {
        let measured = [(1, 8), (8, 8), (384, 8)].map(|(nodes, per_node)| {
            let tree = even(nodes, per_node);
            let degrees = (0..tree.processes()).map(|process| tree.neighbours(process).len());
            let (edges, most) = (degrees.clone().sum::<usize>() / 2, degrees.max().unwrap_or(0));
            let levels = (0..tree.processes()).map(|process| tree.depth(process)).max().unwrap_or(0);
            let all = tree.processes();
            println!("{all} processes: {edges} connections in all, at most {most} of one process, {levels} levels");
            (all, most, edges, levels)
        });
        assert_eq!(measured, [(8, 7, 7, 1), (64, 14, 63, 2), (3072, 16, 3071, 4)]);
    }

    #[test]
    fn the_tree_follows_nodes() {
        // Ranks of a node need not be consecutive.
        let tree = ControlTree::new(&["b", "a", "b", "a", "c"]);
        assert_eq!((tree.neighbours(0), tree.neighbours(1)), (vec![1, 2, 4], vec![0, 3]));
        assert_eq!((tree.next_hop(3, 2), tree.next_hop(0, 3), tree.next_hop(1, 3)), (Some(1), Some(1), Some(3)));
        assert_eq!((tree.next_hop(2, 2), tree.next_hop(2, 5)), (None, None));
    }

    proptest! {
        #[test]
        fn every_process_reaches_every_other(nodes in prop::collection::vec(0u32..40, 1..200)) {
            let tree = ControlTree::new(&nodes);
            let all = 0..tree.processes();
            for process in all.clone() {
                let is_leader = !nodes[..process as usize].contains(&nodes[process as usize]);
                let same_node = nodes.iter().filter(|node| **node == nodes[process as usize]).count();
                let most = if is_leader { 1 + FAN_OUT + same_node - 1 } else { 1 };
                prop_assert!(tree.neighbours(process).len() <= most, "process {}", process);
                prop_assert!(tree.parent(process).is_none_or(|parent| parent < process));
                for to in all.clone().filter(|to| *to != process) {
                    let (mut at, mut hops) = (process, 0);
                    while at != to {
                        let next = tree.next_hop(at, to).expect("a hop");
                        prop_assert!(tree.neighbours(at).contains(&next));
                        (at, hops) = (next, hops + 1);
                    }
                    prop_assert!(hops <= tree.depth(process) + tree.depth(to));
                }
            }
        }
    }
}
