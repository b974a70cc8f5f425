//! Operations on an object store for synchronous callers. Each operation has a deadline, so no caller waits forever.

use std::future::Future;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;
use std::{io, thread};

use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use tokio::runtime::{Builder, Runtime};

use super::error::{CheckpointError, StoreOperation};
use super::manifest::Checksum;
use crate::clock::WaitClock;
use crate::files;

/// Default deadline of an operation. The last operation on a large local file waits until the whole file is on disk.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// Default size of one upload request in bytes. A write needs this much memory. Cloud stores require at least 5 MiB.
pub const PART_BYTES: usize = 16 << 20;
/// Maximum number of parts of one upload. It is a little below the limit of cloud stores.
const PARTS_MAX: u64 = 9_000;
/// How long a file that another node wrote may stay invisible. NFS caches folders for 60 s (`acdirmax`).
pub(crate) const HIDDEN: Duration = Duration::from_secs(90);
/// Poll interval for a file that is not yet visible.
const POLL: Duration = Duration::from_secs(1);
/// Maximum number of threads that block on local file operations.
const BLOCKED_THREADS_MAX: usize = 8;

/// The threads on which operations run. Dropping an `Io` does not wait for its threads.
#[derive(Debug)]
pub(crate) struct Io(Option<Runtime>);

impl Io {
    pub(crate) fn new(place: &str) -> Result<Self, CheckpointError> {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(1).max_blocking_threads(BLOCKED_THREADS_MAX).thread_name("checkpoint-io").enable_all();
        // The builder panics if it cannot start a thread, so first check that the system can start two threads.
        let probes = ["checkpoint-io"; 2].map(|name| thread::Builder::new().name(name.into()).spawn(thread::park));
        let started = probes.into_iter().map(|probe| probe.map(|probe| (probe.thread().unpark(), probe.join())));
        started.collect::<io::Result<Vec<_>>>().map_err(CheckpointError::Thread)?;
        let runtime = builder.build();
        let runtime = runtime.map_err(|source| CheckpointError::Io { path: place.into(), source })?;
        Ok(Self(Some(runtime)))
    }

    fn runtime(&self) -> &Runtime {
        self.0.as_ref().expect("only drop takes it")
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct StoreFile {
    /// Name of the file in errors.
    pub(crate) name: String,
    pub(crate) path: Path,
}

#[derive(Clone, Debug)]
pub(crate) struct Operations {
    pub(crate) backend: Arc<dyn ObjectStore>,
    pub(crate) io: Arc<Io>,
    pub(crate) deadline: Duration,
    pub(crate) part_bytes: usize,
    pub(crate) clock: Arc<dyn WaitClock>,
    /// How long a file that another process has written may stay invisible here.
    pub(crate) hidden: Duration,
    /// True if the backend is the local file system and its prefix is the file system's root.
    pub(crate) is_local: bool,
}

impl Operations {
    /// Polls until another process's file appears, for at most [`Operations::hidden`].
    pub(crate) fn wait_visible<T>(
        &self,
        read: impl Fn() -> Result<Option<T>, CheckpointError>,
    ) -> Result<Option<T>, CheckpointError> {
        let begin = self.clock.now();
        loop {
            let found = read()?;
            if found.is_some() || self.clock.now() - begin >= self.hidden {
                return Ok(found);
            }
            self.clock.wait(POLL);
        }
    }

    /// Runs an operation on the local file system. The operation may block for as long as the disk blocks.
    pub(crate) fn run_local<T: Send + 'static>(
        &self,
        file: &str,
        doing: StoreOperation,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, CheckpointError> {
        self.run(file, doing, async move {
            let failed = |e: std::io::Error| match e.kind() {
                std::io::ErrorKind::AlreadyExists => {
                    object_store::Error::AlreadyExists { path: String::new(), source: e.into() }
                }
                _ => generic(e.into()),
            };
            tokio::task::spawn_blocking(work).await?.map_err(failed)
        })
    }

    /// Runs an operation on a thread of the store; errors name `file`.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        file: &str,
        doing: StoreOperation,
        work: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> Result<T, CheckpointError> {
        let (sender, receiver) = sync_channel(1);
        let task = self.io.runtime().spawn(async move {
            // Sending fails if the caller has stopped waiting at the deadline.
            let _ = sender.send(work.await);
        });
        let result = match receiver.recv_timeout(self.deadline) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                task.abort();
                let seconds = self.deadline.as_secs_f64();
                return Err(CheckpointError::Stalled { file: file.into(), doing, seconds });
            }
            Err(RecvTimeoutError::Disconnected) => Err(generic("operation panicked".into())),
        };
        result.map_err(|e| CheckpointError::Store { file: file.into(), doing, source: Box::new(e) })
    }

    pub(crate) fn size(&self, file: &StoreFile) -> Result<Option<u64>, CheckpointError> {
        let (backend, path) = (self.backend.clone(), file.path.clone());
        self.run(&file.name, StoreOperation::Read, async move {
            Ok(none_if_missing(backend.head(&path).await)?.map(|meta| meta.size))
        })
    }

    pub(crate) fn delete(&self, file: &StoreFile) -> Result<(), CheckpointError> {
        let (backend, path) = (self.backend.clone(), file.path.clone());
        let delete = async move { none_if_missing(backend.delete(&path).await).map(drop) };
        self.run(&file.name, StoreOperation::Delete, delete)
    }

    pub(crate) fn get(&self, file: &StoreFile, bytes_max: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
        let (backend, path) = (self.backend.clone(), file.path.clone());
        let got = self.run(&file.name, StoreOperation::Read, async move {
            match none_if_missing(backend.get(&path).await)? {
                Some(found) if found.meta.size > bytes_max => Ok(Some(Err(found.meta.size))),
                Some(found) => Ok(Some(Ok(found.bytes().await?.to_vec()))),
                None => Ok(None),
            }
        })?;
        let too_large = |size| file.damaged(format!("it has {size} bytes; the maximum is {bytes_max}"));
        got.transpose().map_err(too_large)
    }

    pub(crate) fn get_range(&self, file: &StoreFile, from: u64, bytes: u64) -> Result<Vec<u8>, CheckpointError> {
        let (backend, path) = (self.backend.clone(), file.path.clone());
        let get = async move { Ok(backend.get_range(&path, from..from + bytes).await?.to_vec()) };
        self.run(&file.name, StoreOperation::Read, get)
    }

    /// Writes a small file in one operation. Replaces an existing file, but fails if `mode` is [`PutMode::Create`].
    pub(crate) fn put(&self, file: &StoreFile, bytes: Vec<u8>, mode: PutMode) -> Result<(), CheckpointError> {
        let (backend, path, create) = (self.backend.clone(), file.path.clone(), mode == PutMode::Create);
        let payload = PutPayload::from(bytes);
        let again = payload.clone();
        let put = async move { backend.put_opts(&path, payload, PutOptions::from(mode)).await.map(drop) };
        let put = self.run(&file.name, StoreOperation::Write, put);
        match put {
            Err(CheckpointError::Store { source, .. }) if create && self.is_local && files::lacks_links(&source) => {
                let path = std::path::PathBuf::from(format!("/{}", file.path));
                let content: Vec<u8> = again.iter().flatten().copied().collect();
                self.run_local(&file.name, StoreOperation::Write, move || files::create_by_claim(&path, &content))
            }
            put => put,
        }
    }

    pub(crate) fn rename(&self, from: &StoreFile, to: &StoreFile) -> Result<(), CheckpointError> {
        let (backend, source, target) = (self.backend.clone(), from.path.clone(), to.path.clone());
        self.run(&from.name, StoreOperation::Write, async move { backend.rename(&source, &target).await })
    }

    pub(crate) fn upload(&self, file: StoreFile, total: u64) -> Upload<'_> {
        let part = (self.part_bytes as u64).max(total.div_ceil(PARTS_MAX)).min(total.max(1)) as usize;
        let hasher = blake3::Hasher::new();
        Upload { operations: self, file, total, part, buffer: Vec::new(), multipart: None, hasher }
    }
}

impl StoreFile {
    pub(crate) fn damaged(&self, why: String) -> CheckpointError {
        CheckpointError::Damaged { file: self.name.clone(), why }
    }
}

fn generic(source: Box<dyn std::error::Error + Send + Sync>) -> object_store::Error {
    object_store::Error::Generic { store: "checkpoint", source }
}

fn none_if_missing<T>(result: object_store::Result<T>) -> object_store::Result<Option<T>> {
    match result {
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        result => result.map(Some),
    }
}

/// An upload of a file in parts of equal size. The file appears when the upload is finished.
pub(crate) struct Upload<'a> {
    operations: &'a Operations,
    file: StoreFile,
    total: u64,
    part: usize,
    buffer: Vec<u8>,
    multipart: Option<Box<dyn MultipartUpload>>,
    hasher: blake3::Hasher,
}

impl Upload<'_> {
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Result<(), CheckpointError> {
        self.hasher.update(bytes);
        while !bytes.is_empty() {
            if self.buffer.len() == self.part {
                self.send()?;
            }
            if self.buffer.capacity() == 0 {
                self.buffer.reserve_exact(self.part);
            }
            let (head, tail) = bytes.split_at(bytes.len().min(self.part - self.buffer.len()));
            self.buffer.extend_from_slice(head);
            bytes = tail;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), CheckpointError> {
        let mut multipart = match self.multipart.take() {
            Some(multipart) => multipart,
            None => {
                let (backend, path) = (self.operations.backend.clone(), self.file.path.clone());
                let begin = async move { backend.put_multipart(&path).await };
                self.operations.run(&self.file.name, StoreOperation::Write, begin)?
            }
        };
        let part = multipart.put_part(std::mem::take(&mut self.buffer).into());
        self.multipart = Some(multipart);
        self.operations.run(&self.file.name, StoreOperation::Write, part)
    }

    /// Sends the remaining bytes and returns the checksum of the whole file. After success, the file is durable.
    pub(crate) fn finish(mut self) -> Result<Checksum, CheckpointError> {
        let sum = Checksum(self.hasher.finalize());
        debug_assert_eq!(self.hasher.count(), self.total, "{}: bytes written and total differ", self.file.name);
        if self.multipart.is_some() && !self.buffer.is_empty() {
            self.send()?;
        }
        match self.multipart.take() {
            Some(mut multipart) => {
                let complete = async move { multipart.complete().await.map(drop) };
                self.operations.run(&self.file.name, StoreOperation::Write, complete)?;
            }
            None => self.operations.put(&self.file, std::mem::take(&mut self.buffer), PutMode::Overwrite)?,
        }
        Ok(sum)
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        if let Some(mut multipart) = self.multipart.take() {
            // Abort on the store's thread, because an abort may block as long as a write.
            self.operations.io.runtime().spawn(async move { multipart.abort().await });
        }
    }
}
