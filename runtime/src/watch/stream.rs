//! Server-sent events to the clients of the live page: each is told at most once a second what is new to it, and nothing is kept
//! for one that does not read.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event as Sent, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::sync::mpsc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::MissedTickBehavior;

use super::Served;
use super::events::Cursor;

/// Clients at one time.
pub(super) const CLIENTS_MAX: usize = 16;
const EVENT_EVERY: Duration = Duration::from_secs(1);
/// Seconds in which a client may read nothing before it is dropped.
const MISSED_MAX: u32 = 10;

/// `/events`.
pub(super) async fn events(State(served): State<Served>) -> Response {
    let Ok(permit) = Arc::<Semaphore>::clone(&served.clients).try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{CLIENTS_MAX} pages are told already: close one\n"))
            .into_response();
    };
    let (tell, told) = mpsc::channel(1);
    tokio::spawn(tell_client(served, tell, permit));
    let events =
        stream::unfold(told, |mut told| async { told.recv().await.map(|event| (Ok::<_, Infallible>(event), told)) });
    Sse::new(events).into_response()
}

/// Until the client is gone, or does not read, or the server ends.
async fn tell_client(served: Served, tell: mpsc::Sender<Sent>, _permit: OwnedSemaphorePermit) {
    let mut every = tokio::time::interval(EVENT_EVERY);
    // Never two within a second.
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut cursor, mut missed) = (Cursor::default(), 0);
    while missed < MISSED_MAX {
        tokio::select! {
            _ = every.tick() => {}
            () = tell.closed() => return,
        }
        // Only what can be sent is made, so that the next event has what this one would have had.
        let Ok(room) = tell.try_reserve() else {
            missed += 1;
            continue;
        };
        missed = 0;
        let observer = served.observer();
        // It waits for what all actors answer.
        let made = tokio::task::spawn_blocking(move || {
            let event = observer.map_or_else(Cursor::none, |observer| cursor.next(&observer));
            (Sent::default().json_data(&event), cursor)
        });
        let Ok((Ok(event), back)) = made.await else { return };
        cursor = back;
        room.send(event);
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
    use crate::watch::{Shown, serve};

    const DEADLINE: Duration = Duration::from_secs(30);

    /// Asks for events; gives what comes of the answer until this stands in it, or its end.
    fn ask(address: SocketAddr, until: &str) -> (TcpStream, String) {
        let mut stream = TcpStream::connect(address).expect("a server");
        stream.set_read_timeout(Some(DEADLINE)).expect("a time-out");
        write!(stream, "GET /events HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("it listens");
        let (mut told, mut part) = (String::new(), [0; 4096]);
        while !told.contains(until) {
            let read = stream.read(&mut part).expect("an answer in time");
            told.push_str(&String::from_utf8_lossy(&part[..read]));
            if read == 0 {
                break;
            }
        }
        (stream, told)
    }

    #[test]
    fn so_many_are_told_and_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("a socket");
        let prometheus = PrometheusBuilder::new().build_recorder().handle();
        let served = Served { shown: Shown::default(), prometheus, clients: Arc::new(Semaphore::new(CLIENTS_MAX)) };
        let (stop, stopped) = oneshot::channel();
        let server = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serve(listener, served, stopped));
        });
        let event = r#""health":"none""#;
        let mut clients: Vec<TcpStream> = Vec::new();
        for nth in 0..CLIENTS_MAX {
            let (client, told) = ask(address, event);
            assert!(told.starts_with("HTTP/1.1 200 ") && told.contains(event), "{nth}: {told}");
            clients.push(client);
        }
        let (_, refused) = ask(address, "close one");
        assert!(refused.starts_with("HTTP/1.1 503 ") && refused.contains("16 pages are told already"), "{refused}");
        // One that leaves makes room.
        drop(clients.pop());
        let deadline = Instant::now() + DEADLINE;
        while !ask(address, "\r\n").1.starts_with("HTTP/1.1 200 ") {
            assert!(Instant::now() < deadline, "no room was made");
        }
        drop(stop);
        server.join().expect("it ends");
    }
}
