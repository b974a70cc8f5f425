//! Queues for standard output and standard error. Threads write the texts, so a full pipe does not block the training.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::text::counted;

/// Maximum size of all queued progress texts, in bytes. Above it, the oldest of these texts are dropped.
const PROGRESS_BYTES_MAX: usize = 256 << 10;
/// Maximum size of all queued records, in bytes. Above it, a caller that adds a record waits.
const RECORD_BYTES_MAX: usize = 64 << 20;

/// Whether a text may be dropped while the reader stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// When the queue is full, the oldest texts of this kind are dropped. A line reports how many were dropped.
    Progress,
    /// Never dropped: errors, warnings, results and JSON records.
    Record,
}

/// A queue of text, and a thread that writes it to a stream.
#[derive(Debug)]
pub struct OutputQueue {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// The stream, if the system could not start the thread. Callers then write to the stream themselves.
    direct: Mutex<Option<Stream>>,
}

type Stream = Box<dyn Write + Send>;

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("state", &self.state).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(OutputKind, Vec<u8>)>,
    progress_bytes: usize,
    record_bytes: usize,
    /// Number of progress texts dropped since the last report of dropped texts.
    dropped: u64,
    /// True while the thread writes a text, which is no longer in `waiting`.
    is_writing: bool,
    /// True if the last queued text ends its line.
    ends_line: bool,
    /// True if the stream is closed, for example because a pipe has no reader. Further text is discarded.
    is_closed: bool,
    /// Why the stream is closed. `None` if the reader has closed the pipe.
    error: Option<io::Error>,
}

impl OutputQueue {
    /// Starts the thread that writes to `to`. The thread runs until the process ends.
    pub fn new(to: impl Write + Send + 'static) -> Self {
        Self::with_thread(to, |run| thread::Builder::new().name("output".into()).spawn(run).map(drop))
    }

    fn with_thread(
        to: impl Write + Send + 'static,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<()>,
    ) -> Self {
        let state = State { ends_line: true, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), direct: Mutex::default() });
        let stream: Arc<Mutex<Option<Stream>>> = Arc::new(Mutex::new(Some(Box::new(to))));
        let (own, taken) = (shared.clone(), stream.clone());
        let run = move || {
            let to = taken.lock().take();
            to.into_iter().for_each(|to| own.write(to));
        };
        if spawn(Box::new(run)).is_err() {
            *shared.direct.lock() = stream.lock().take();
        }
        Self { shared }
    }

    /// Queues a text. Blocks only for a record, while more than 64 MiB of records are queued.
    pub fn put(&self, kind: OutputKind, text: &[u8]) {
        if let Some(to) = &mut *self.shared.direct.lock() {
            return self.shared.state.lock().write_direct(to, text);
        }
        let mut state = self.shared.state.lock();
        while kind == OutputKind::Record && state.record_bytes > RECORD_BYTES_MAX && !state.is_closed {
            self.shared.changed.wait(&mut state);
        }
        let Some(last) = text.last().filter(|_| !state.is_closed) else { return };
        state.ends_line = *last == b'\n';
        *state.bytes_of(kind) += text.len();
        state.waiting.push_back((kind, text.to_vec()));
        while state.progress_bytes > PROGRESS_BYTES_MAX {
            state.drop_oldest_progress();
        }
        self.shared.changed.notify_all();
    }

    /// Queues a record, followed by a line end.
    pub fn line(&self, text: &str) {
        self.put(OutputKind::Record, format!("{text}\n").as_bytes());
    }

    /// Ends the current line if its line end is missing.
    pub fn end_line(&self) {
        if !self.shared.state.lock().ends_line {
            // Queues the line end as progress, because queuing progress never blocks.
            self.put(OutputKind::Progress, b"\n");
        }
    }

    /// Returns the error that closed the stream, but only once. It is not an error if the reader has closed the pipe.
    pub fn take_error(&self) -> Option<io::Error> {
        self.shared.state.lock().error.take()
    }

    /// Waits until the queue is written, but for at most `limit`. `None` means no limit.
    pub fn flush(&self, limit: Option<Duration>) {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut state = self.shared.state.lock();
        while !state.is_closed && (state.is_writing || !state.waiting.is_empty()) {
            match deadline {
                None => self.shared.changed.wait(&mut state),
                Some(deadline) if self.shared.changed.wait_until(&mut state, deadline).timed_out() => return,
                Some(_) => {}
            }
        }
    }
}

impl State {
    fn write_direct(&mut self, to: &mut Stream, text: &[u8]) {
        let Some(last) = text.last().filter(|_| !self.is_closed) else { return };
        self.ends_line = *last == b'\n';
        if let Err(error) = to.write_all(text).and_then(|()| to.flush()) {
            self.close(error);
        }
    }

    fn close(&mut self, error: io::Error) {
        self.is_closed = true;
        self.waiting.clear();
        self.error = Some(error).filter(|error| error.kind() != io::ErrorKind::BrokenPipe);
    }

    fn bytes_of(&mut self, kind: OutputKind) -> &mut usize {
        match kind {
            OutputKind::Progress => &mut self.progress_bytes,
            OutputKind::Record => &mut self.record_bytes,
        }
    }

    fn drop_oldest_progress(&mut self) {
        let oldest = self.waiting.iter().position(|(kind, _)| *kind == OutputKind::Progress);
        let Some((_, text)) = oldest.and_then(|oldest| self.waiting.remove(oldest)) else { return };
        self.progress_bytes -= text.len();
        self.dropped += 1;
    }
}

impl Shared {
    fn write(&self, mut to: impl Write) {
        let mut ends_line = true;
        let mut state = self.state.lock();
        loop {
            let Some((kind, text)) = state.waiting.pop_front() else {
                self.changed.wait(&mut state);
                continue;
            };
            *state.bytes_of(kind) -= text.len();
            let dropped = std::mem::take(&mut state.dropped);
            state.is_writing = true;
            drop(state);
            let end = if ends_line { "" } else { "\n" };
            let notice = match dropped {
                0 => String::new(),
                count => {
                    format!("{end}(dropped {}: the reader of this output stalled)\n", counted(count, "progress line"))
                }
            };
            ends_line = text.ends_with(b"\n");
            let written = to.write_all(notice.as_bytes()).and_then(|()| to.write_all(&text)).and_then(|()| to.flush());
            state = self.state.lock();
            state.is_writing = false;
            if let Err(error) = written {
                state.close(error);
            }
            self.changed.notify_all();
            if state.is_closed {
                return;
            }
        }
    }
}

/// The process's standard output. There is one queue per process, like [`io::stdout`].
pub fn stdout() -> &'static OutputQueue {
    static STDOUT: LazyLock<OutputQueue> = LazyLock::new(|| OutputQueue::new(io::stdout()));
    &STDOUT
}

/// The process's standard error. There is one queue per process.
pub fn stderr() -> &'static OutputQueue {
    static STDERR: LazyLock<OutputQueue> = LazyLock::new(|| OutputQueue::new(io::stderr()));
    &STDERR
}

/// Waits until both queues are written, but for at most `limit` each. Call this before the process ends, because text
/// that is still queued at the end is lost.
pub fn finish(limit: Option<Duration>) {
    stdout().flush(limit);
    stderr().flush(limit);
}

/// True if the file is empty or ends with a line end. A killed process may leave an incomplete line.
pub fn ends_line(file: &File) -> io::Result<bool> {
    let mut last = [b'\n'];
    if let Some(before) = file.metadata()?.len().checked_sub(1) {
        file.read_exact_at(&mut last, before)?;
    }
    Ok(last == *b"\n")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A stream whose writes block until the test permits them.
    struct Stalled {
        taken: Sender<Vec<u8>>,
        go: Receiver<()>,
    }

    impl Write for Stalled {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.go.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            let _ = self.taken.send(text.to_vec());
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stalled() -> (OutputQueue, Sender<()>, Receiver<Vec<u8>>) {
        let ((go, wait), (taken, seen)) = (channel(), channel());
        (OutputQueue::new(Stalled { taken, go: wait }), go, seen)
    }

    #[test]
    fn without_a_thread_the_caller_writes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let no_thread = |_: Box<dyn FnOnce() + Send>| Err(io::ErrorKind::WouldBlock.into());
        let output = OutputQueue::with_thread(File::create(&path).unwrap(), no_thread);
        output.put(OutputKind::Progress, b"10 %");
        output.end_line();
        output.line("done");
        output.flush(None);
        assert_eq!(fs::read_to_string(&path).unwrap(), "10 %\ndone\n");
        let output = OutputQueue::with_thread(File::options().write(true).open("/dev/full").unwrap(), no_thread);
        output.line("lost");
        assert!(output.take_error().is_some_and(|error| error.kind() == io::ErrorKind::StorageFull));
    }

    #[test]
    fn a_stalled_reader_loses_progress_but_no_record() {
        let (output, go, seen) = stalled();
        let line = |n: usize| format!("{n:>1023}\n");
        // Queues far more progress than fits, and a record after each line. No call blocks, although nobody reads.
        let count = 4 * (PROGRESS_BYTES_MAX >> 10);
        for n in 0..count {
            output.put(OutputKind::Progress, line(n).as_bytes());
            output.line(&format!("record {n}"));
        }
        (0..4 * count).for_each(|_| go.send(()).unwrap());
        output.flush(None);
        let text: String = seen.try_iter().map(|piece| String::from_utf8(piece).unwrap()).collect();
        let records: Vec<&str> = text.lines().filter(|line| line.starts_with("record")).collect();
        assert!(records.into_iter().eq((0..count).map(|n| format!("record {n}"))), "every record, in order");
        let left: Vec<usize> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
        let notices = text.lines().filter_map(|line| line.strip_prefix("(dropped "));
        let dropped: usize = notices.map(|line| line.split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
        assert_eq!(left.len() + dropped, count, "each line is written or counted as dropped: {dropped}");
        assert!(dropped > 0);
        assert!(left.len() >= PROGRESS_BYTES_MAX >> 10 && *left.last().unwrap() == count - 1, "the newest are kept");
    }

    #[test]
    fn output_does_not_wait_for_a_closed_reader() {
        let (output, go, _seen) = stalled();
        output.line("first");
        drop(go);
        output.flush(None);
        (0..3).for_each(|_| output.put(OutputKind::Record, &vec![b'x'; RECORD_BYTES_MAX]));
        output.flush(None);
        assert!(output.take_error().is_none(), "a reader may close its pipe");
    }

    #[test]
    fn a_stream_that_cannot_be_written_has_an_error() {
        let output = OutputQueue::new(File::options().write(true).open("/dev/full").unwrap());
        output.line("lost");
        output.flush(None);
        assert_eq!(output.take_error().map(|error| error.kind()), Some(io::ErrorKind::StorageFull));
        assert!(output.take_error().is_none());
    }

    #[test]
    fn a_flush_has_a_limit() {
        let (output, go, seen) = stalled();
        output.put(OutputKind::Progress, b"step 1");
        output.end_line();
        output.end_line();
        output.flush(Some(Duration::from_millis(1)));
        assert!(seen.try_recv().is_err());
        (0..2).for_each(|_| go.send(()).unwrap());
        output.flush(None);
        assert_eq!(seen.try_iter().collect::<Vec<_>>().concat(), b"step 1\n", "the line ends once");
    }

    #[test]
    fn ends_line_detects_an_incomplete_last_line() {
        for (text, ends) in [("", true), ("a", false), ("a\n", true), ("a\nb", false), ("\n", true)] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            assert_eq!(ends_line(&file).unwrap(), ends, "{text:?}");
        }
    }
}
