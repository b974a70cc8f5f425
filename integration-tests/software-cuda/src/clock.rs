//! Vector clocks, which define the happens-before order.
//!
//! An agent is a stream or a host thread. Each agent has a clock with one entry for each agent. The agent's own entry
//! counts its actions. The entry for another agent is the number of its last action before this agent's next one.

/// A vector clock; missing entries are 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Clock(Vec<u32>);

impl Clock {
    /// Returns the entry of `agent`.
    pub fn get(&self, agent: usize) -> u32 {
        self.0.get(agent).copied().unwrap_or(0)
    }

    /// Increments the entry of `agent` for its next action, and returns the number of that action.
    pub fn tick(&mut self, agent: usize) -> u32 {
        if self.0.len() <= agent {
            self.0.resize(agent + 1, 0);
        }
        self.0[agent] += 1;
        self.0[agent]
    }

    /// Raises each entry to the maximum of both clocks.
    pub fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (own, joined) in self.0.iter_mut().zip(&other.0) {
            *own = (*own).max(*joined);
        }
    }

    /// Returns the entries, padded with zeros to `agents`.
    pub fn padded(&self, agents: usize) -> Vec<u32> {
        let mut entries = self.0.clone();
        entries.resize(entries.len().max(agents), 0);
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_keeps_the_larger_entries() {
        let (mut a, mut b) = (Clock::default(), Clock::default());
        a.tick(0);
        b.tick(2);
        assert_eq!(b.tick(2), 2);
        a.join(&b);
        assert_eq!([a.get(0), a.get(1), a.get(2), a.get(9)], [1, 0, 2, 0]);
        assert_eq!(b.get(0), 0);
        assert_eq!(a.padded(5), [1, 0, 2, 0, 0]);
    }
}
