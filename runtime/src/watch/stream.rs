//! The live page's event stream: at most one event per second, with the changes since the last event. No event is
//! queued.

use std::convert::Infallible;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event as Sent, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use metrics_exporter_prometheus::PrometheusHandle;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::MissedTickBehavior;

use super::events::Cursor;
use crate::session::observer::Observer;

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

pub(super) const CLIENTS_MAX: usize = 16;
const EVENT_EVERY: Duration = Duration::from_secs(1);
/// Number of missed events after which a client that does not read is dropped.
const MISSED_MAX: u32 = 10;

pub(super) async fn events(State(state): State<ServerState>) -> Response {
    let Ok(permit) = Arc::<Semaphore>::clone(&state.clients).try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{CLIENTS_MAX} pages already receive events: close one\n"))
            .into_response();
    };
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(send_events(state, sender, permit));
    let events = stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|event| (Ok::<_, Infallible>(event), receiver))
    });
    Sse::new(events).into_response()
}

/// Sends events until the client disconnects or stops reading, or the server stops.
async fn send_events(state: ServerState, sender: mpsc::Sender<Sent>, _permit: OwnedSemaphorePermit) {
    let mut every = tokio::time::interval(EVENT_EVERY);
    // Never send two events within a second.
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut cursor, mut missed) = (Cursor::default(), 0);
    while missed < MISSED_MAX {
        tokio::select! {
            _ = every.tick() => {}
            () = sender.closed() => return,
        }
        // Create an event only if it can be sent; otherwise the next event will contain its changes.
        let Ok(slot) = sender.try_reserve() else {
            missed += 1;
            continue;
        };
        missed = 0;
        let observer = state.observer();
        // Create the event on another thread, because this waits for the states of all actors.
        let created = tokio::task::spawn_blocking(move || {
            let event = observer.map_or_else(Cursor::no_session, |observer| cursor.next_event(&observer));
            (Sent::default().json_data(&event), cursor)
        });
        let Ok((Ok(event), back)) = created.await else { return };
        cursor = back;
        slot.send(event);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::thread;
    use std::time::Instant;

    use metrics_exporter_prometheus::PrometheusBuilder;
    use tokio::sync::oneshot;

    use super::*;
    use crate::watch::serve;

    const DEADLINE: Duration = Duration::from_secs(30);

    /// Requests events, and reads the response until it contains `until` or ends.
    fn request_events(address: SocketAddr, until: &str) -> (TcpStream, String) {
        let mut stream = TcpStream::connect(address).expect("a server");
        stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
        write!(stream, "GET /events HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("it listens");
        let (mut response, mut part) = (String::new(), [0; 4096]);
        while !response.contains(until) {
            let read = stream.read(&mut part).expect("a response in time");
            response.push_str(&String::from_utf8_lossy(&part[..read]));
            if read == 0 {
                break;
            }
        }
        (stream, response)
    }

    #[test]
    fn the_number_of_clients_is_limited() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("a socket");
        let prometheus = PrometheusBuilder::new().build_recorder().handle();
        let (session, clients) = (ShownSession::default(), Semaphore::new(CLIENTS_MAX).into());
        let state = ServerState { session, prometheus, clients };
        let (stop, stopped) = oneshot::channel();
        let server = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serve(listener, state, stopped));
        });
        let event = r#""health":"none""#;
        let mut clients: Vec<TcpStream> = Vec::new();
        for index in 0..CLIENTS_MAX {
            let (client, response) = request_events(address, event);
            assert!(response.starts_with("HTTP/1.1 200 ") && response.contains(event), "{index}: {response}");
            clients.push(client);
        }
        let (_, refused) = request_events(address, "close one");
        assert!(
            refused.starts_with("HTTP/1.1 503 ") && refused.contains("16 pages already receive events"),
            "{refused}"
        );
        // A client that disconnects frees its permit.
        drop(clients.pop());
        let deadline = Instant::now() + DEADLINE;
        while !request_events(address, "\r\n").1.starts_with("HTTP/1.1 200 ") {
            assert!(Instant::now() < deadline, "the permit was not freed");
        }
        drop(stop);
        server.join().expect("the server stops");
    }
}
