//! A log of JSON lines, such as one for each step of a training run.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use shardflow_job::output::{self, OutputKind, OutputQueue, ends_line};

use crate::files::OutputFileError;

/// A file of JSON objects, one per line. Each line is flushed: a run can be followed, and a killed run keeps its lines.
///
/// ```
/// use std::collections::BTreeMap;
///
/// use shardflow::prelude::*;
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("log.jsonl");
/// let mut log = JsonLog::create(&path)?;
/// log.line(&BTreeMap::from([("step", 0)]))?;
/// assert_eq!(std::fs::read_to_string(&path)?, "{\"step\":0}\n"); // readable as soon as it is written
/// log.finish()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct JsonLog {
    path: PathBuf,
    sink: Sink,
}

#[derive(Debug)]
enum Sink {
    File(File),
    /// A pipe or a terminal, whose reader may stall; or this process's standard output or error, such as `/dev/stdout`.
    /// Opening a standard stream again would give a second file position, and lines would overwrite each other.
    Queue(&'static OutputQueue),
}

/// The queue of this process's standard output or error, if `path` is the same file.
fn standard_stream(path: &Path) -> Option<&'static OutputQueue> {
    let data = path.metadata().ok()?;
    let is_same = |stream: &dyn AsFd| {
        rustix::fs::fstat(stream.as_fd()).is_ok_and(|s| (s.st_dev, s.st_ino) == (data.dev(), data.ino()))
    };
    if is_same(&io::stdout()) { Some(output::stdout()) } else { is_same(&io::stderr()).then(output::stderr) }
}

impl JsonLog {
    /// Creates the file, or replaces an existing one.
    pub fn create(path: &Path) -> Result<Self, OutputFileError> {
        Self::open(path, File::options().write(true).create(true).truncate(true))
    }

    /// Opens the log of a run that continues from a checkpoint. Steps that the run repeats appear twice. Removes an
    /// incomplete last line of the earlier run.
    pub fn append(path: &Path) -> Result<Self, OutputFileError> {
        // A pipe is opened for writing only. If this process also read it, writes would not fail when the reader ends.
        let is_stream = path.metadata().is_ok_and(|data| !data.is_file());
        Self::open(path, File::options().read(!is_stream).append(true).create(true))
    }

    fn open(path: &Path, options: &std::fs::OpenOptions) -> Result<Self, OutputFileError> {
        let open = || -> io::Result<Sink> {
            if let Some(output) = standard_stream(path) {
                return Ok(Sink::Queue(output));
            }
            let mut file = options.open(path)?;
            if !file.metadata()?.is_file() {
                // The queue is leaked, because its thread lives as long as the process.
                return Ok(Sink::Queue(Box::leak(OutputQueue::new(file).into())));
            }
            if file.metadata()?.len() > 0 {
                repair_last_line(&mut file)?;
            }
            Ok(Sink::File(file))
        };
        let failed = |cause| OutputFileError { path: path.into(), cause };
        Ok(Self { path: path.into(), sink: open().map_err(failed)? })
    }

    /// Writes an object as a line.
    pub fn line(&mut self, object: &impl Serialize) -> Result<(), OutputFileError> {
        // Write each line in one call. `File` is unbuffered, so a reader sees an incomplete line only briefly.
        let written = serde_json::to_vec(object).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            let output = match &mut self.sink {
                Sink::File(file) => return file.write_all(&line),
                Sink::Queue(output) => output,
            };
            // A progress line on a terminal may lack its line end.
            output.end_line();
            output.put(OutputKind::Record, &line);
            output.take_error().map_or(Ok(()), Err)
        });
        written.map_err(|cause| self.error(cause))
    }

    /// Waits until all lines are written.
    pub fn finish(self) -> Result<(), OutputFileError> {
        self.flush(None).map_or(Ok(()), |cause| Err(self.error(cause)))
    }

    /// Waits for the reader, and returns the error that has closed the stream.
    fn flush(&self, limit: Option<Duration>) -> Option<io::Error> {
        let Sink::Queue(output) = self.sink else { return None };
        output.flush(limit);
        output.take_error()
    }

    fn error(&self, cause: io::Error) -> OutputFileError {
        OutputFileError { path: self.path.clone(), cause }
    }
}

/// If [`JsonLog::finish`] was not called, waits up to one second for the reader.
impl Drop for JsonLog {
    fn drop(&mut self) {
        drop(self.flush(Some(Duration::from_secs(1))));
    }
}

/// Truncates a file to its last complete line. A last line that lacks only its newline gets one.
fn repair_last_line(file: &mut File) -> io::Result<()> {
    if ends_line(file)? {
        return Ok(());
    }
    let (mut start, mut torn) = (file.metadata()?.len(), Vec::new());
    while start > 0 && !torn.contains(&b'\n') {
        let mut block = vec![0; start.min(4096) as usize];
        start -= block.len() as u64;
        file.read_exact_at(&mut block, start)?;
        block.append(&mut torn);
        torn = block;
    }
    let line = torn.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if serde_json::from_slice::<serde_json::Map<_, _>>(&torn[line..]).is_ok() {
        return file.write_all(b"\n");
    }
    file.set_len(start + line as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct StepLine {
        step: u64,
    }

    #[test]
    fn the_error_names_a_log_that_cannot_be_created() {
        let error = JsonLog::create(Path::new("no/such/folder/log.jsonl")).unwrap_err().to_string();
        assert!(error.starts_with("cannot write no/such/folder/log.jsonl: "), "{error}");
    }

    /// A killed run may leave any part of its last line. In each case, the lines that a later run appends are valid.
    #[test]
    fn a_log_can_be_continued_after_any_truncation() {
        let path = std::env::temp_dir().join(format!("shardflow-torn-{}.jsonl", std::process::id()));
        let mut log = JsonLog::create(&path).unwrap();
        log.line(&StepLine { step: 0 }).unwrap();
        let first = std::fs::read(&path).unwrap().len();
        log.line(&StepLine { step: 1 }).unwrap();
        let whole = std::fs::read(&path).unwrap();
        // A power loss may leave zeros. The long line is larger than a block.
        let zeros = [&whole[..first + 5], &[0; 8]].concat();
        let long = [&whole[..first], &[b'x'; 9000]].concat();
        let torn = (0..=whole.len()).map(|cut| whole[..cut].to_vec()).chain([zeros, long]);
        for torn in torn {
            std::fs::write(&path, &torn).unwrap();
            JsonLog::append(&path).unwrap().line(&StepLine { step: 7 }).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            let steps: Vec<u64> = text
                .lines()
                .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("valid")["step"].as_u64().unwrap())
                .collect();
            // A line that lacks only its newline counts as complete.
            let kept = [first - 1, whole.len() - 1].iter().filter(|end| torn.len() >= **end).count();
            let kept = if torn.contains(&0) || torn.contains(&b'x') { 1 } else { kept };
            assert_eq!(steps, [&[0, 1][..kept], &[7]].concat(), "{:?}", String::from_utf8_lossy(&torn));
        }
        std::fs::remove_file(&path).unwrap();
    }
}
