//! An object store that fails at its k-th operation: it kills the process, says that the disk is full, never answers, or freezes the process.
//! Or one that lacks hard links, or conditional puts.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures_util::stream::{BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};

/// What is done meanwhile.
type Work = Box<dyn FnOnce() + Send>;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process is frozen, and goes on after something else is done.
    Freeze,
    /// The process is killed, a file being half written.
    Kill,
    /// From then on, nothing can be written.
    Full,
    /// From then on, nothing is answered.
    Stall,
    /// No file can be created as one that must not be there yet, for the file system has no hard links.
    NoLinks,
    /// The same, for the object store does not have it.
    NoConditionalPut,
}

/// Counts operations, and when to fail.
struct Trigger {
    done: AtomicUsize,
    /// The operation that fails, from 0.
    at: AtomicUsize,
    fault: Fault,
    /// Where files lie, for a half-written one.
    root: Option<PathBuf>,
    /// What is done while it is frozen.
    meanwhile: Mutex<Option<Work>>,
}

impl fmt::Debug for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at operation {:?}", self.fault, self.at)
    }
}

impl Trigger {
    /// Called before each operation; `part` is what it writes, and where.
    async fn pass(&self, part: Option<(&Path, &PutPayload)>) -> Result<()> {
        let (index, at) = (self.done.fetch_add(1, SeqCst), self.at.load(SeqCst));
        match self.fault {
            Fault::Kill if index == at => {
                if let (Some(root), Some((path, payload))) = (&self.root, part) {
                    // As `LocalFileSystem` names a file that is being written.
                    let torn = root.join(format!("{path}#1"));
                    let bytes: Vec<u8> = payload.iter().flatten().copied().collect();
                    let _ = std::fs::create_dir_all(torn.parent().expect("a file lies in a folder"));
                    let _ = std::fs::write(torn, &bytes[..bytes.len() / 2]);
                }
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                std::future::pending().await
            }
            Fault::Full if index >= at && part.is_some() => {
                let full = std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
                Err(object_store::Error::Generic { store: "Faulty", source: Box::new(full) })
            }
            Fault::Stall if index >= at => std::future::pending().await,
            Fault::Freeze if index == at => {
                let work = self.meanwhile.lock().expect("nobody panics with it").take();
                work.into_iter().for_each(|work| work());
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The store.
#[derive(Clone, Debug)]
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    trigger: Arc<Trigger>,
}

impl Faulty {
    /// Fails at operation `at`, from 0. `root` is where the files of `inner` lie, if they are files.
    pub fn new(inner: Arc<dyn ObjectStore>, fault: Fault, at: usize, root: Option<PathBuf>) -> Self {
        let trigger =
            Trigger { done: AtomicUsize::new(0), at: AtomicUsize::new(at), fault, root, meanwhile: Mutex::default() };
        Self { inner, trigger: Arc::new(trigger) }
    }

    /// Does something before operation `at`, as if the process were frozen for that time.
    pub fn meanwhile(inner: Arc<dyn ObjectStore>, at: usize, work: Work) -> Self {
        let faulty = Self::new(inner, Fault::Freeze, at, None);
        *faulty.trigger.meanwhile.lock().expect("nobody panics with it") = Some(work);
        faulty
    }

    /// Operations so far.
    pub fn operations(&self) -> usize {
        self.trigger.done.load(SeqCst)
    }

    /// Fails no more.
    pub fn heal(&self) {
        self.trigger.at.store(usize::MAX, SeqCst);
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty:/")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.trigger.pass(Some((location, &payload))).await?;
        match (self.trigger.fault, &opts.mode) {
            (Fault::NoLinks, PutMode::Create) => {
                let none = std::io::Error::from_raw_os_error(rustix::io::Errno::PERM.raw_os_error());
                Err(object_store::Error::Generic { store: "Faulty", source: Box::new(none) })
            }
            (Fault::NoConditionalPut, PutMode::Create) => {
                let (operation, implementer) = ("put_opts: Create".into(), self.to_string());
                Err(object_store::Error::NotImplemented { operation, implementer })
            }
            _ => self.inner.put_opts(location, payload, opts).await,
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.trigger.pass(Some((location, &PutPayload::new()))).await?;
        let (inner, trigger) = (self.inner.put_multipart_opts(location, opts).await?, self.trigger.clone());
        Ok(Box::new(FaultyUpload { inner, trigger, location: location.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.trigger.pass(None).await?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let each = move |location: Result<Path>| {
            let this = this.clone();
            async move {
                this.trigger.pass(None).await?;
                let one = futures_util::stream::once(async move { location }).boxed();
                this.inner.delete_stream(one).next().await.expect("one for one")
            }
        };
        locations.then(each).boxed()
    }

    /// In the order of their names, so that the k-th operation is the same everywhere.
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, trigger) = (self.inner.list(prefix), self.trigger.clone());
        let sorted = async move {
            trigger.pass(None).await?;
            let mut found: Vec<ObjectMeta> = inner.try_collect().await?;
            found.sort_by(|a, b| a.location.cmp(&b.location));
            Ok::<_, object_store::Error>(futures_util::stream::iter(found.into_iter().map(Ok)))
        };
        futures_util::stream::once(sorted).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.trigger.pass(None).await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.trigger.pass(Some((to, &PutPayload::new()))).await?;
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.trigger.pass(Some((to, &PutPayload::new()))).await?;
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
            trigger.pass(Some((&location, &data))).await?;
            part.await
        })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.trigger.pass(Some((&self.location, &PutPayload::new()))).await?;
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
