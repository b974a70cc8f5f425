//! An HTTP server that shows a running session: a live page under `/`, `/metrics` for Prometheus, `/healthz`, and
//! `/status` and `/hang` as JSON. The page uses `/plan`, `/predicted` and `/events`, whose format is internal and may
//! change. The server changes nothing. It has no access control: in an untrusted network, use a loopback address.
//!
//! ```no_run
//! # use shardflow::prelude::*;
//! # fn run(plan: Plan) -> Result<(), Box<dyn std::error::Error>> {
//! let watch = shardflow::watch::Watch::listen("127.0.0.1:9400".parse()?)?;
//! let session = Session::start(plan, &SessionOptions::default())?;
//! watch.show(&session);
//! # Ok(())
//! # }
//! ```

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::sync::{Semaphore, oneshot};

use crate::metrics;
use crate::session::Session;
use crate::session::observer::{Observer, SessionHealth};
use shardflow_job::text::counted;

mod bubble;
pub mod client;
mod events;
mod number;
mod page;
mod shape;
pub mod status;
mod stream;
mod under_way;

use bubble::Prediction;
use client::HangReport;
use shape::shape;
use status::Status;
use stream::{ServerState, ShownSession};

/// Interval at which histograms sort their samples into buckets. Without scrapes, samples would accumulate otherwise.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain the fields")]
pub enum WatchError {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("{first}: the port for process {process} is above 65535")]
    Port { first: SocketAddr, process: u32 },
    #[error("the program already has a metrics recorder, so the server cannot install its own")]
    Recorder,
}

/// A running server. Dropping it stops the server.
#[derive(Debug)]
#[must_use = "dropping it stops the server"]
pub struct Watch {
    address: SocketAddr,
    session: ShownSession,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Like [`Watch::listen`], but process n of a job listens on the port of `first` plus n. Port 0 stays 0.
    ///
    /// # Errors
    /// If the process's port is above 65535. Also returns the errors of [`Watch::listen`].
    pub fn listen_as(process: u32, first: SocketAddr) -> Result<Self, WatchError> {
        let port = u32::from(first.port()) + if first.port() == 0 { 0 } else { process };
        let port = u16::try_from(port).map_err(|_| WatchError::Port { first, process })?;
        Self::listen(SocketAddr::new(first.ip(), port))
    }

    /// Installs the metrics recorder and listens; port 0 selects a free port. Call this function before all others of
    /// this crate, because metrics that were recorded earlier are lost.
    ///
    /// # Errors
    /// If the server cannot listen on the address, or the program has installed another metrics recorder.
    pub fn listen(address: SocketAddr) -> Result<Self, WatchError> {
        let failed = |source| WatchError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let prometheus = install()?;
        start_upkeep(prometheus.clone()).map_err(failed)?;
        let session = ShownSession::default();
        let (stop, stopped) = oneshot::channel();
        let state =
            ServerState { session: session.clone(), prometheus, clients: Semaphore::new(stream::CLIENTS_MAX).into() };
        let serve = move || {
            runtime.block_on(serve(listener, state, stopped));
            // Do not wait for unfinished responses.
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name("watch".into()).spawn(serve).map_err(failed)?;
        Ok(Self { address: bound, session, stop: Some(stop), thread: Some(thread) })
    }

    /// The address on which the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Shows this session from now on, while it runs.
    pub fn show(&self, session: &Session) {
        let observer = session.observer().map_or_else(Weak::new, Arc::downgrade);
        *self.session.lock() = observer;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The thread stops immediately, even during requests, and returns no value.
            let _ = thread.join();
        }
    }
}

fn install() -> Result<PrometheusHandle, WatchError> {
    let mut builder = PrometheusBuilder::new();
    for (name, bounds) in metrics::BUCKETS {
        // The only error is an empty list of bounds.
        let matcher = Matcher::Full((*name).to_owned());
        builder = builder.set_buckets_for_metric(matcher, bounds).map_err(|_| WatchError::Recorder)?;
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    ::metrics::set_global_recorder(recorder).map_err(|_| WatchError::Recorder)?;
    metrics::describe();
    Ok(handle)
}

/// Starts the upkeep thread, which runs until the program ends. Histograms keep all values until upkeep or a scrape.
fn start_upkeep(prometheus: PrometheusHandle) -> io::Result<()> {
    let upkeep = move || loop {
        thread::park_timeout(UPKEEP_EVERY);
        prometheus.run_upkeep();
    };
    thread::Builder::new().name("metrics".into()).spawn(upkeep).map(drop)
}

async fn serve(listener: TcpListener, state: ServerState, stopped: oneshot::Receiver<()>) {
    // The listener is bound and non-blocking, so this cannot fail.
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let router = Router::new()
        .route("/", get(page::index))
        .route("/page/{file}", get(page::file))
        .route("/plan", get(|state| respond(state, |observer| Some(shape(observer)))))
        .route("/predicted", get(|state| respond(state, Prediction::of)))
        .route("/events", get(stream::events))
        .route("/metrics", get(prometheus))
        .route("/healthz", get(health))
        .route("/status", get(|state| respond(state, Status::of)))
        .route("/hang", get(|state| respond(state, HangReport::of)))
        .with_state(state);
    let server = async { axum::serve(listener, router).await };
    tokio::select! {
        _ = server => {}
        _ = stopped => {}
    }
}

/// `/healthz` mentions a step that makes no progress for this time.
const IDLE_SECONDS_REPORTED: u64 = 10;

async fn prometheus(State(state): State<ServerState>) -> impl IntoResponse {
    if let Some(observer) = state.observer() {
        // Sample on another thread, because sampling waits for the states of all actors.
        let _ = tokio::task::spawn_blocking(move || observer.sample()).await;
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], state.prometheus.render())
}

async fn health(State(state): State<ServerState>) -> impl IntoResponse {
    let observer = state.observer();
    // Return status 200 even without progress: the watchdog ends a stalled session, so a supervisor does not have to.
    let control = observer.as_ref().map(|observer| observer.control()).filter(|control| control.is_under_way());
    let idle_ns = control.and_then(|control| control.idle_ns());
    match observer.map(|observer| observer.health()) {
        Some(SessionHealth::Healthy(steps)) => {
            let idle = idle_ns.map(|ns| ns / 1_000_000_000).filter(|seconds| *seconds >= IDLE_SECONDS_REPORTED);
            let idle = idle.map(|seconds| format!(", no progress for {seconds} s")).unwrap_or_default();
            (StatusCode::OK, format!("ok, {}{idle}\n", counted(steps, "step")))
        }
        Some(SessionHealth::Failed(cause)) => (StatusCode::SERVICE_UNAVAILABLE, format!("failed: {cause}\n")),
        Some(SessionHealth::Ended) | None => (StatusCode::SERVICE_UNAVAILABLE, "no session is running\n".to_owned()),
    }
}

/// Runs a query that waits for the states of all actors, and returns the result as JSON.
async fn respond<T: serde::Serialize + Send + 'static>(
    State(state): State<ServerState>,
    query: impl FnOnce(&Observer) -> Option<T> + Send + 'static,
) -> Result<Json<T>, StatusCode> {
    let observer = state.observer().ok_or(StatusCode::SERVICE_UNAVAILABLE)?;
    let response = tokio::task::spawn_blocking(move || query(&observer)).await;
    response.ok().flatten().map(Json).ok_or(StatusCode::SERVICE_UNAVAILABLE)
}
