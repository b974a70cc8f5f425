//! Server-sent events to the clients of the live page: each is told at most once a second what is new to it, and nothing is kept
//! for one that does not read. Imports `events`.

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
        return (StatusCode::SERVICE_UNAVAILABLE, "too many clients\n").into_response();
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
