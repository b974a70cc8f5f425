//! The incidents of a session.

use parking_lot::Mutex;

/// Incidents of each kind that are kept. The first ones are kept because they explain later ones.
const INCIDENTS_MAX: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// Time of its first occurrence, nanoseconds since the session's start.
    pub at_ns: u64,
    /// `restart`, `not finite`, `stall`, `refused` or `failure`.
    pub kind: &'static str,
    /// Description, beginning with the cause.
    pub text: String,
}

#[derive(Debug, Default)]
pub(super) struct Incidents(Mutex<Vec<Incident>>);

impl Incidents {
    /// Adds an incident unless it is known, or the list has enough of its kind.
    pub(super) fn add(&self, incident: Incident) {
        let mut incidents = self.0.lock();
        let is_known = incidents.iter().any(|known| known.kind == incident.kind && known.text == incident.text);
        let same_kind = incidents.iter().filter(|known| known.kind == incident.kind).count();
        if !is_known && same_kind < INCIDENTS_MAX {
            incidents.push(incident);
        }
    }

    pub(super) fn sorted(&self) -> Vec<Incident> {
        let mut incidents = self.0.lock().clone();
        incidents.sort_by_key(|incident| incident.at_ns);
        incidents
    }
}
