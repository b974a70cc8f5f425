//! A server that shows a running session: a page to look at under `/`, `/metrics` for Prometheus, `/healthz`, and as JSON `/status`
//! and `/hang`. The page lives on `/plan`, `/predicted` and `/events`, whose form is between the two and may change. The server only
//! reads, and listens where it is told to, which should be the machine's own address unless a network is to be trusted.
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
use std::sync::{Arc, Mutex, PoisonError, Weak};
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
use crate::text::counted;

mod bubble;
pub mod client;
mod events;
mod page;
mod shape;
pub mod status;
mod stream;
mod under_way;

use bubble::Prediction;
use client::HangReport;
use shape::Shape;
use status::Status;

/// How often samples of histograms that nobody asked for are put into their buckets.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// What keeps a server from starting.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The address.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The program, or a library of it, has installed a recorder of its own.
    #[error("the program has a recorder of metrics already, so this one cannot be installed")]
    Recorder,
}

/// A running server. It ends when this is dropped.
#[derive(Debug)]
#[must_use = "it is served as long as this lives"]
pub struct Watch {
    address: SocketAddr,
    shown: Shown,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The session that is shown.
type Shown = Arc<Mutex<Weak<Observer>>>;

#[derive(Clone)]
struct Served {
    shown: Shown,
    prometheus: PrometheusHandle,
    /// Who may listen to events.
    clients: Arc<Semaphore>,
}

impl Watch {
    /// Installs the recorder of all metrics and begins to listen. To be called before sessions start: what was told before is
    /// lost. Port 0 is any free one.
    ///
    /// # Errors
    /// When the address cannot be listened on, or there is a recorder.
    pub fn listen(address: SocketAddr) -> Result<Self, WatchError> {
        let failed = |source| WatchError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let prometheus = install()?;
        keep_up(prometheus.clone()).map_err(failed)?;
        let shown = Shown::default();
        let (stop, stopped) = oneshot::channel();
        let served =
            Served { shown: shown.clone(), prometheus, clients: Arc::new(Semaphore::new(stream::CLIENTS_MAX)) };
        let serve = move || {
            runtime.block_on(serve(listener, served, stopped));
            // Nobody waits for an answer that is still being made.
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name("watch".into()).spawn(serve).map_err(failed)?;
        Ok(Self { address: bound, shown, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Shows this session from now on, as long as it runs.
    pub fn show(&self, session: &Session) {
        let observer = session.observer().map_or_else(Weak::new, Arc::downgrade);
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = observer;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It ends at once, whatever it is asked meanwhile, and has nothing to say.
            let _ = thread.join();
        }
    }
}

fn install() -> Result<PrometheusHandle, WatchError> {
    let mut builder = PrometheusBuilder::new();
    for (name, bounds) in metrics::BUCKETS {
        // An error is an empty list of bounds.
        let matcher = Matcher::Full((*name).to_owned());
        builder = builder.set_buckets_for_metric(matcher, bounds).map_err(|_| WatchError::Recorder)?;
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    ::metrics::set_global_recorder(recorder).map_err(|_| WatchError::Recorder)?;
    metrics::describe();
    Ok(handle)
}

/// As long as the program runs, for nobody can take the recorder away again: its histograms keep every number until they are
/// looked at.
fn keep_up(prometheus: PrometheusHandle) -> io::Result<()> {
    let keep = move || loop {
        thread::park_timeout(UPKEEP_EVERY);
        prometheus.run_upkeep();
    };
    thread::Builder::new().name("metrics".into()).spawn(keep).map(drop)
}

async fn serve(listener: TcpListener, served: Served, stopped: oneshot::Receiver<()>) {
    // It was bound and is not blocking.
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let router = Router::new()
        .route("/", get(page::index))
        .route("/page/{file}", get(page::file))
        .route("/plan", get(shape))
        .route("/predicted", get(predicted))
        .route("/events", get(stream::events))
        .route("/metrics", get(prometheus))
        .route("/healthz", get(health))
        .route("/status", get(status))
        .route("/hang", get(hang))
        .with_state(served);
    let server = async { axum::serve(listener, router).await };
    tokio::select! {
        _ = server => {}
        _ = stopped => {}
    }
}

impl Served {
    fn observer(&self) -> Option<Arc<Observer>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }
}

/// What stands still for so long in a step is told.
const STILL_SECONDS: u64 = 10;

async fn prometheus(State(served): State<Served>) -> impl IntoResponse {
    if let Some(observer) = served.observer() {
        // It waits for what all actors answer.
        let _ = tokio::task::spawn_blocking(move || observer.sample()).await;
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], served.prometheus.render())
}

async fn health(State(served): State<Served>) -> impl IntoResponse {
    let observer = served.observer();
    // The watchdog ends what stands still for too long; a supervisor of processes need not.
    let still = observer.as_ref().filter(|observer| observer.is_under_way()).and_then(|observer| observer.idle_ns());
    match observer.map(|observer| observer.health()) {
        Some(SessionHealth::Healthy { steps }) => {
            match still.map(|ns| ns / 1_000_000_000).filter(|seconds| *seconds >= STILL_SECONDS) {
                Some(seconds) => {
                    (StatusCode::OK, format!("ok, {}, nothing has moved for {seconds} s\n", counted(steps, "step")))
                }
                None => (StatusCode::OK, format!("ok, {}\n", counted(steps, "step"))),
            }
        }
        Some(SessionHealth::Failed(cause)) => (StatusCode::SERVICE_UNAVAILABLE, format!("failed: {cause}\n")),
        Some(SessionHealth::Ended) | None => (StatusCode::SERVICE_UNAVAILABLE, "no session runs\n".to_owned()),
    }
}

/// An answer that takes what all actors say.
async fn answer<T: serde::Serialize + Send + 'static>(
    served: Served,
    ask: impl FnOnce(&Observer) -> Option<T> + Send + 'static,
) -> Result<Json<T>, StatusCode> {
    let observer = served.observer().ok_or(StatusCode::SERVICE_UNAVAILABLE)?;
    let answer = tokio::task::spawn_blocking(move || ask(&observer)).await;
    answer.ok().flatten().map(Json).ok_or(StatusCode::SERVICE_UNAVAILABLE)
}

async fn status(State(served): State<Served>) -> impl IntoResponse {
    answer(served, Status::of).await
}

async fn hang(State(served): State<Served>) -> impl IntoResponse {
    answer(served, HangReport::of).await
}

async fn shape(State(served): State<Served>) -> impl IntoResponse {
    answer(served, |observer| Some(Shape::of(observer))).await
}

async fn predicted(State(served): State<Served>) -> impl IntoResponse {
    answer(served, Prediction::of).await
}
