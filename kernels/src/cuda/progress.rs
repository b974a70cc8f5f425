//! How far streams have come, as the GPU itself tells: a stream writes a number to a word of pinned memory, in its order, and the
//! host reads the word whenever it wants to know. Imports `cuda::context`, `cuda::memory`, `cuda::lane`.
//!
//! PINNED-1 does not hold here: words are written by the GPU and read by the host at once, each as a whole.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::context::Context;
use super::lane::Lane;
use super::memory::Pinned;
use crate::error::KernelError;

/// Words of a GPU. Those of a whole mesh are fewer.
const WORDS: usize = 1024;

/// The words of one GPU, which must outlive all streams that write them.
#[derive(Debug)]
pub(crate) struct Words {
    pinned: Pinned,
    next: AtomicUsize,
}

/// One word.
#[derive(Debug)]
pub(crate) struct Word {
    words: Arc<Words>,
    index: usize,
}

impl Words {
    /// The context is bound.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Arc<Self>, KernelError> {
        let pinned = Pinned::new(context, WORDS * size_of::<u32>())?;
        Ok(Arc::new(Self { pinned, next: AtomicUsize::new(0) }))
    }

    /// A word that is 0; `None` when all have been given away.
    pub(crate) fn word(self: &Arc<Self>) -> Option<Word> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < WORDS).then(|| Word { words: self.clone(), index })
    }
}

impl Word {
    fn address(&self) -> *mut u32 {
        // Inside: see `Words::word`.
        self.words.pinned.start().cast::<u32>().wrapping_add(self.index)
    }

    /// Has the stream write `value` when it comes to it.
    pub(crate) fn write(&self, lane: &Lane, value: u32) -> Result<(), KernelError> {
        lane.write_word(self.address() as u64, value)
    }

    /// What was written last.
    pub(crate) fn read(&self) -> u32 {
        // SAFETY: an aligned word of memory that is ours, starts at a page and stays; the GPU writes it as a whole.
        unsafe { AtomicU32::from_ptr(self.address()) }.load(Ordering::Acquire)
    }
}
