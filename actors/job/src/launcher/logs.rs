//! Log files of the processes. The launcher writes the first process's log; every other process writes its own log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::output::{self, OutputKind, OutputQueue, ends_line};

/// Maximum number of output bytes that are copied in one piece. A longer line is copied in several pieces.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// How many bytes at a log's end are searched for errors.
const TAIL_BYTES: u64 = 64 << 10;
/// Maximum number of error lines printed for a process, and their maximum length in characters.
const ERROR_LINES_MAX: usize = 5;
const ERROR_CHARS_MAX: usize = 500;

/// The log of one process in one attempt.
pub(super) struct Log {
    pub(super) path: PathBuf,
    /// The log file, open for appending.
    pub(super) file: File,
    /// Size of the content that an earlier job of the same name wrote.
    before_bytes: u64,
}

impl Log {
    /// Opens `rank-<rank>.log` in `folder`; creates both if needed.
    pub(super) fn open(folder: &Path, rank: u32) -> io::Result<Log> {
        fs::create_dir_all(folder)?;
        let path = folder.join(format!("rank-{rank}.log"));
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path)?;
        if !ends_line(&file)? {
            file.write_all(b"\n")?;
        }
        let before_bytes = file.metadata()?.len();
        Ok(Log { path, file, before_bytes })
    }

    /// The last lines that begin with `error:`. Empty if the log cannot be read.
    pub(super) fn errors(&self) -> Vec<String> {
        self.tail().map(|tail| error_lines(&tail)).unwrap_or_default()
    }

    fn tail(&self) -> io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let start = self.before_bytes.max(file.metadata()?.len().saturating_sub(TAIL_BYTES));
        file.seek(SeekFrom::Start(start))?;
        let mut tail = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(tail)
    }
}

fn error_lines(tail: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(tail);
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("error:")).collect();
    let shown = &lines[lines.len().saturating_sub(ERROR_LINES_MAX)..];
    shown.iter().map(|line| line.chars().take(ERROR_CHARS_MAX).collect()).collect()
}

/// Copies `from` line by line to the log and to the screen. The log gets every line; the screen drops lines if its
/// reader stalls. If the log cannot be written, the process is not blocked, and `failed` gets the first error.
pub(super) fn pump(from: impl Read, mut log: File, screen: &OutputQueue, failed: impl FnOnce(io::Error)) {
    let (mut from, mut line, mut failed) = (BufReader::new(from), Vec::new(), Some(failed));
    loop {
        line.clear();
        match from.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if let Some(report) = failed.take() {
            match log.write_all(&line) {
                Ok(()) => failed = Some(report),
                Err(error) => report(error),
            }
        }
        // The queue of the screen never drops lines of standard error, JSON lines or error lines.
        let is_record = std::ptr::eq(screen, output::stderr()) || line.starts_with(b"{") || line.starts_with(b"error:");
        screen.put(if is_record { OutputKind::Record } else { OutputKind::Progress }, &line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_reported_once_and_all_lines_reach_the_screen() {
        let (file, mut seen) = (File::options().write(true).open("/dev/full").unwrap(), Vec::new());
        let screen = tempfile::NamedTempFile::new().unwrap();
        let queue = OutputQueue::new(screen.reopen().unwrap());
        pump(&b"one\ntwo\n"[..], file, &queue, |error| seen.push(error.kind()));
        queue.flush(None);
        assert_eq!(seen, [io::ErrorKind::StorageFull]);
        assert_eq!(fs::read_to_string(screen.path()).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn errors_returns_the_last_error_lines_of_this_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(folder.path(), 3).unwrap();
        log.file.write_all(b"error: of an earlier job\n").unwrap();
        let mut log = Log::open(folder.path(), 3).unwrap();
        assert_eq!(log.errors(), [""; 0]);
        log.file.write_all(b"fine\nerror: a\nnot an error: b\nerror: c \xff").unwrap();
        assert_eq!(log.errors(), ["error: a", "error: c \u{fffd}"]);
        log.file.write_all(&[b'x'; TAIL_BYTES as usize]).unwrap();
        assert_eq!(log.errors(), [""; 0], "lines beyond the tail are not searched");
        let many: String = (0..9).map(|i| format!("\nerror: {i} {}", "y".repeat(ERROR_CHARS_MAX))).collect();
        log.file.write_all(many.as_bytes()).unwrap();
        let errors = log.errors();
        assert_eq!(errors.len(), ERROR_LINES_MAX);
        assert!(errors[0].starts_with("error: 4 y") && errors[0].len() == ERROR_CHARS_MAX);
    }
}
