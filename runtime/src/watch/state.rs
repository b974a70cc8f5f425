//! What the handlers of the server share.

use std::sync::{Arc, Weak};

use metrics_exporter_prometheus::PrometheusHandle;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::session::observer::Observer;

/// The observer of the session that the server shows.
pub(super) type ShownSession = Arc<Mutex<Weak<Observer>>>;

#[derive(Clone)]
pub(super) struct ServerState {
    pub(super) session: ShownSession,
    pub(super) prometheus: PrometheusHandle,
    /// Permits for clients that receive events.
    pub(super) clients: Arc<Semaphore>,
}

impl ServerState {
    pub(super) fn observer(&self) -> Option<Arc<Observer>> {
        self.session.lock().upgrade()
    }
}
