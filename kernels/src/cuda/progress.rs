//! Progress of streams as the GPU reports it: a stream writes a number to a word of pinned memory, in stream order, and
//! the host reads the word at any time.
//!
//! - PROGRESS-1: a stream writes a call's number to one word when it reaches the call, and to another word after the
//!   call. Calls are put on a stream one at a time, so both words only increase (and wrap around).
//!
//! PINNED-1 does not apply here: the GPU writes words while the host reads them. Every access is to a whole word.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use super::context::Context;
use super::memory::Pinned;
use crate::error::Result;
use crate::metrics::CollectiveTimer;

/// Number of words per GPU. Each stream uses two words.
const WORDS: usize = 4096;
/// Index of the word that holds the number of the last call that the stream has reached.
const REACHED: usize = 0;
/// Index of the word that holds the number of the last call that the stream has completed.
const PASSED: usize = 1;

/// The progress words of one GPU. They must outlive all streams that write them.
#[derive(Debug)]
pub(crate) struct ProgressWords {
    pinned: Pinned,
    next: AtomicUsize,
}

impl ProgressWords {
    /// Requires the context to be bound.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>> {
        let pinned = Pinned::new(context, WORDS * size_of::<u32>())?;
        Ok(Arc::new(Self { pinned, next: AtomicUsize::new(0) }))
    }

    /// Allocates the words of a new stream; `None` if all are in use.
    pub(crate) fn allocate(self: &Arc<Self>) -> Option<Arc<CallProgress>> {
        let index = self.next.fetch_add(2, Ordering::Relaxed);
        let new = || CallProgress { words: self.clone(), index, seen: AtomicU64::new(0), state: Mutex::default() };
        (index + PASSED < WORDS).then(|| Arc::new(new()))
    }
}

/// The progress of one stream through its collectives and its transfers between processes (`Pipe`). Both kinds of calls
/// are numbered together, from 1.
#[derive(Debug)]
pub(crate) struct CallProgress {
    words: Arc<ProgressWords>,
    /// Index of the stream's first word.
    index: usize,
    /// The values of both words at the last update.
    seen: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    begun: u32,
    /// Number of the last call that is completely on the stream.
    ended: u32,
    /// The begun calls that `update` has not yet found complete, oldest first.
    open: VecDeque<Open>,
}

#[derive(Debug)]
struct Open {
    number: u32,
    reached: bool,
    timer: Option<CollectiveTimer>,
}

/// Returns whether a word with this value has reached the number. Numbers wrap around.
fn has_reached_number(word: u32, number: u32) -> bool {
    word.wrapping_sub(number) < u32::MAX / 2
}

impl CallProgress {
    /// Counts the next call. Returns the address and the value that the stream must write before the call.
    pub(super) fn begin(&self, timer: Option<CollectiveTimer>) -> (u64, u32) {
        let mut state = self.state.lock();
        let number = state.begun.wrapping_add(1);
        state.begun = number;
        state.open.push_back(Open { number, reached: false, timer });
        (self.address(REACHED) as u64, number)
    }

    /// Ends the last call. Returns the address and the value that the stream must write after the call.
    pub(super) fn end(&self) -> (u64, u32) {
        let mut state = self.state.lock();
        state.ended = state.begun;
        (self.address(PASSED) as u64, state.ended)
    }

    pub(super) fn last(&self) -> u32 {
        self.state.lock().begun
    }

    /// Whether a word will still change if the host puts no more work on the stream.
    pub(super) fn expects_progress(&self) -> bool {
        let state = self.state.lock();
        state.open.back().is_some_and(|open| !open.reached || open.number == state.ended)
    }

    pub(super) fn has_reached(&self, number: u32) -> bool {
        has_reached_number(self.read(REACHED), number)
    }

    pub(super) fn has_passed(&self, number: u32) -> bool {
        has_reached_number(self.read(PASSED), number)
    }

    /// Reads the words and reports call times, which are as accurate as the polling interval. Called by one thread.
    pub(super) fn update(&self) {
        // Read PASSED first: a stream has reached every call that it has completed.
        let passed = self.read(PASSED);
        let reached = self.read(REACHED);
        let words = u64::from(reached) << 32 | u64::from(passed);
        if self.seen.swap(words, Ordering::Relaxed) == words {
            return;
        }
        let now = Instant::now();
        let mut state = self.state.lock();
        while let Some(open) = state.open.front_mut().filter(|open| has_reached_number(reached, open.number)) {
            if !std::mem::replace(&mut open.reached, true) {
                open.timer.iter().for_each(|timer| timer.begin(now));
            }
            if !has_reached_number(passed, open.number) {
                return;
            }
            open.timer.iter().for_each(|timer| timer.end(now));
            state.open.pop_front();
        }
    }

    fn address(&self, word: usize) -> *mut u32 {
        // In bounds: see `ProgressWords::allocate`.
        self.words.pinned.start().cast::<u32>().wrapping_add(self.index + word)
    }

    fn read(&self, word: usize) -> u32 {
        // SAFETY: the word is aligned, and its memory lives as long as `self`. The GPU writes it as a whole.
        unsafe { AtomicU32::from_ptr(self.address(word)) }.load(Ordering::Acquire)
    }
}
