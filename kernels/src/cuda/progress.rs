//! How far streams have come, as the GPU itself tells: a stream writes a number to a word of pinned memory, in its order, and the
//! host reads the word whenever it wants to know.
//!
//! - PROGRESS-1: a stream writes a call's number when it comes to the call, and again when it goes on behind it. One call at a
//!   time is put on a stream, so both words only grow (and wrap round).
//!
//! PINNED-1 does not hold here: words are written by the GPU and read by the host at once, each as a whole.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::context::Context;
use super::memory::Pinned;
use crate::error::KernelError;
use crate::metrics::CollectiveTimer;

/// Words of a GPU: two of each stream.
const WORDS: usize = 4096;

/// The words of one GPU, which must outlive all streams that write them.
#[derive(Debug)]
pub(crate) struct Words {
    pinned: Pinned,
    next: AtomicUsize,
}

/// One word.
#[derive(Debug)]
struct Word {
    words: Arc<Words>,
    index: usize,
}

impl Words {
    /// The context is bound.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, KernelError> {
        let pinned = Pinned::new(context, WORDS * size_of::<u32>())?;
        Ok(Arc::new(Self { pinned, next: AtomicUsize::new(0) }))
    }

    /// Of a new stream; `None` when all words have been given away.
    pub(crate) fn calls(self: &Arc<Self>) -> Option<Arc<Calls>> {
        let index = self.next.fetch_add(2, Ordering::Relaxed);
        let word = |index| Word { words: self.clone(), index };
        let calls = || Calls {
            reached: word(index),
            passed: word(index + 1),
            seen: AtomicU64::new(0),
            state: Mutex::default(),
        };
        (index + 1 < WORDS).then(|| Arc::new(calls()))
    }
}

/// A stream's calls of collectives and pipes, counted from 1.
#[derive(Debug)]
pub(crate) struct Calls {
    /// The call that the stream came to last.
    reached: Word,
    /// The call that it left last.
    passed: Word,
    /// Both words as they were when they were looked at last.
    seen: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    begun: u32,
    /// The call that the stream will be seen to leave: all of it is on the stream.
    ended: u32,
    /// Those that were not seen over.
    open: VecDeque<Open>,
}

#[derive(Debug)]
struct Open {
    number: u32,
    /// The stream was seen to have come to it.
    came: bool,
    told: Option<CollectiveTimer>,
}

/// Whether a word that holds this has come to the number. Numbers wrap round.
fn has_come(word: u32, number: u32) -> bool {
    word.wrapping_sub(number) < u32::MAX / 2
}

impl Calls {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, which is put on the stream next: where the stream is to write its number.
    pub(super) fn begin(&self, told: Option<CollectiveTimer>) -> (u64, u32) {
        let mut state = self.state();
        let number = state.begun.wrapping_add(1);
        state.begun = number;
        state.open.push_back(Open { number, came: false, told });
        (self.reached.address() as u64, number)
    }

    /// Where the stream is to write the last call's number behind it.
    pub(super) fn end(&self) -> (u64, u32) {
        let mut state = self.state();
        state.ended = state.begun;
        (self.passed.address() as u64, state.ended)
    }

    /// The number of the last call.
    pub(super) fn last(&self) -> u32 {
        self.state().begun
    }

    /// Whether there is something to be seen that needs nothing more of the host: that the stream comes to a call, or leaves it.
    pub(super) fn is_moving(&self) -> bool {
        let state = self.state();
        state.open.back().is_some_and(|open| !open.came || open.number == state.ended)
    }

    /// Whether the stream has come to the call.
    pub(super) fn has_reached(&self, number: u32) -> bool {
        has_come(self.reached.read(), number)
    }

    /// Whether the stream has left the call.
    pub(super) fn has_passed(&self, number: u32) -> bool {
        has_come(self.passed.read(), number)
    }

    /// Tells of calls that are over. For one thread, which asks often: how long a call takes is known as well as that.
    pub(super) fn look(&self) {
        // In this order: the stream has come to whatever it has left.
        let passed = self.passed.read();
        let reached = self.reached.read();
        let words = u64::from(reached) << 32 | u64::from(passed);
        if self.seen.swap(words, Ordering::Relaxed) == words {
            return;
        }
        let now = Instant::now();
        let mut state = self.state();
        while let Some(open) = state.open.front_mut().filter(|open| has_come(reached, open.number)) {
            if !std::mem::replace(&mut open.came, true) {
                open.told.iter().for_each(|told| told.came(now));
            }
            if !has_come(passed, open.number) {
                return;
            }
            open.told.iter().for_each(|told| told.went(now));
            state.open.pop_front();
        }
    }
}

impl Word {
    fn address(&self) -> *mut u32 {
        // Inside: see `Words::word`.
        self.words.pinned.start().cast::<u32>().wrapping_add(self.index)
    }

    /// What was written last.
    fn read(&self) -> u32 {
        // SAFETY: an aligned word of memory that is ours, starts at a page and stays; the GPU writes it as a whole.
        unsafe { AtomicU32::from_ptr(self.address()) }.load(Ordering::Acquire)
    }
}
