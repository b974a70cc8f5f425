//! Vector clocks: what happened before what.
//!
//! An agent is a stream or a host thread. Its own entry counts what it did; another's entry is the last of that agent's
//! actions that are known to have ended before.

/// A vector clock; entries that are not there are 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clock(Vec<u32>);

impl Clock {
    /// What is known of `agent`.
    pub fn get(&self, agent: usize) -> u32 {
        self.0.get(agent).copied().unwrap_or(0)
    }

    /// `agent` does its next action, whose number is returned.
    pub fn tick(&mut self, agent: usize) -> u32 {
        if self.0.len() <= agent {
            self.0.resize(agent + 1, 0);
        }
        self.0[agent] += 1;
        self.0[agent]
    }

    /// All that the other knows is known here too.
    pub fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = (*mine).max(*theirs);
        }
    }

    /// Entries, with zeros up to `agents`.
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
    fn joins_keep_what_either_knows() {
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
