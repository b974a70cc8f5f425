//! An object store with a fault at its k-th operation: it kills the process, reports a full disk, never answers, or
//! freezes the process. Other faults are missing hard links and missing conditional puts.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use async_trait::async_trait;
use futures_util::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};
use parking_lot::Mutex;

/// Work that runs while the process is frozen.
type Work = Box<dyn FnOnce() + Send>;

/// How the store fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFault {
    /// The process freezes while the work given to [`FaultyStore::meanwhile`] runs, and then continues.
    Freeze,
    /// The process is killed and leaves a half-written file.
    Kill,
    /// From this operation on, all writes fail.
    Full,
    /// From this operation on, all operations hang.
    Stall,
    /// Exclusive creation fails, because the file system has no hard links.
    NoLinks,
    /// Exclusive creation fails, because the object store does not support it.
    NoConditionalPut,
}

/// Counts operations and triggers the fault.
struct Trigger {
    done: AtomicUsize,
    /// The operation that fails, counted from 0.
    at: AtomicUsize,
    fault: StoreFault,
    /// Folder of the store's files. `Kill` leaves a half-written file in it.
    root: Option<PathBuf>,
    /// Runs while the process is frozen.
    meanwhile: Mutex<Option<Work>>,
}

impl fmt::Debug for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at operation {:?}", self.fault, self.at)
    }
}

impl Trigger {
    /// This function is called before each operation. `part` is the path and the content that the operation writes.
    async fn before_operation(&self, part: Option<(&Path, &PutPayload)>) -> Result<()> {
        let (index, at) = (self.done.fetch_add(1, SeqCst), self.at.load(SeqCst));
        match self.fault {
            StoreFault::Kill if index == at => {
                if let (Some(root), Some((path, payload))) = (&self.root, part) {
                    // `LocalFileSystem` gives a file this name while writing it.
                    let torn = root.join(format!("{path}#1"));
                    let bytes: Vec<u8> = payload.iter().flatten().copied().collect();
                    let _ = std::fs::create_dir_all(torn.parent().expect("a file has a folder"));
                    let _ = std::fs::write(torn, &bytes[..bytes.len() / 2]);
                }
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                std::future::pending().await
            }
            StoreFault::Full if index >= at && part.is_some() => {
                let full = std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
                Err(object_store::Error::Generic { store: "Faulty", source: Box::new(full) })
            }
            StoreFault::Stall if index >= at => std::future::pending().await,
            StoreFault::Freeze if index == at => {
                let work = self.meanwhile.lock().take();
                work.into_iter().for_each(|work| work());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// An object store with a fault.
#[derive(Clone, Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    trigger: Arc<Trigger>,
}

impl FaultyStore {
    /// Creates a store that fails at operation `at`, counted from 0. `root` is the folder of `inner`, if it has one.
    pub fn new(inner: Arc<dyn ObjectStore>, fault: StoreFault, at: usize, root: Option<PathBuf>) -> Self {
        let trigger =
            Trigger { done: AtomicUsize::new(0), at: AtomicUsize::new(at), fault, root, meanwhile: Mutex::default() };
        Self { inner, trigger: Arc::new(trigger) }
    }

    /// Creates a store that runs `work` before operation `at`, as if the process were frozen during `work`.
    pub fn meanwhile(inner: Arc<dyn ObjectStore>, at: usize, work: Work) -> Self {
        let faulty = Self::new(inner, StoreFault::Freeze, at, None);
        *faulty.trigger.meanwhile.lock() = Some(work);
        faulty
    }

    /// Returns the number of operations so far.
    pub fn operations(&self) -> usize {
        self.trigger.done.load(SeqCst)
    }

    /// Ends the fault, except [`StoreFault::NoLinks`] and [`StoreFault::NoConditionalPut`].
    pub fn heal(&self) {
        self.trigger.at.store(usize::MAX, SeqCst);
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty:/")
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.trigger.before_operation(Some((location, &payload))).await?;
        match (self.trigger.fault, &opts.mode) {
            (StoreFault::NoLinks, PutMode::Create) => {
                let none = std::io::Error::from_raw_os_error(rustix::io::Errno::PERM.raw_os_error());
                Err(object_store::Error::Generic { store: "Faulty", source: Box::new(none) })
            }
            (StoreFault::NoConditionalPut, PutMode::Create) => {
                let (operation, implementer) = ("put_opts: Create".into(), self.to_string());
                Err(object_store::Error::NotImplemented { operation, implementer })
            }
            _ => self.inner.put_opts(location, payload, opts).await,
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.trigger.before_operation(Some((location, &PutPayload::new()))).await?;
        let (inner, trigger) = (self.inner.put_multipart_opts(location, opts).await?, self.trigger.clone());
        Ok(Box::new(FaultyUpload { inner, trigger, location: location.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.trigger.before_operation(None).await?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let each = move |location: Result<Path>| {
            let this = this.clone();
            async move {
                this.trigger.before_operation(None).await?;
                let one = futures_util::stream::once(async move { location }).boxed();
                this.inner.delete_stream(one).next().await.expect("one result per location")
            }
        };
        locations.then(each).boxed()
    }

    /// Lists the files in the order of their names, so that the k-th operation is the same on every machine.
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, trigger) = (self.inner.list(prefix), self.trigger.clone());
        let sorted = async move {
            trigger.before_operation(None).await?;
            let mut found: Vec<ObjectMeta> = inner.try_collect().await?;
            found.sort_by(|a, b| a.location.cmp(&b.location));
            Ok::<_, object_store::Error>(futures_util::stream::iter(found.into_iter().map(Ok)))
        };
        futures_util::stream::once(sorted).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.trigger.before_operation(None).await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.trigger.before_operation(Some((to, &PutPayload::new()))).await?;
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.trigger.before_operation(Some((to, &PutPayload::new()))).await?;
        self.inner.rename_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    trigger: Arc<Trigger>,
    location: Path,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (part, trigger, location) =
            (self.inner.put_part(data.clone()), self.trigger.clone(), self.location.clone());
        Box::pin(async move {
            trigger.before_operation(Some((&location, &data))).await?;
            part.await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.trigger.before_operation(Some((&self.location, &PutPayload::new()))).await?;
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
