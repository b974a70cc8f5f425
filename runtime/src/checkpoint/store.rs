//! A store of checkpoints: the location of each file, the list of checkpoints, and the deletion of files.
//!
//! - ST-1: a checkpoint of step S exists if and only if `step-<S>/manifest.json` exists. This file is created by one
//!   atomic operation, after all shards are written and synced. The operation fails if the file exists.
//! - ST-2: each save attempt has its own folder, `step-<S>/e<epoch>-<attempt>/`. A late writer alters no other attempt.
//! - ST-3: deletion begins with the manifest, and the newest good checkpoint is never deleted.
//! - ST-4: the manifest has a cursor. A cursor in `cursor.json` replaces the manifest's cursor if `cursor.json` records
//!   the manifest's checksum.

use std::collections::BTreeMap;
use std::path::{Component, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, PutMode};
use serde::{Deserialize, Serialize};
use url::Url;

use super::error::{CheckpointError, StoreOperation};
use super::io::{DEADLINE, HIDDEN, Io, Operations, PART_BYTES, StoreFile};
use super::manifest::{Checksum, Cursor, MANIFEST_BYTES_MAX, seal};
use crate::clock::{SystemClock, WaitClock};
use crate::files;

/// Name of the file whose creation commits a checkpoint.
pub(super) const MANIFEST: &str = "manifest.json";
/// Name of a manifest after [`Store::set_aside`].
const SET_ASIDE: &str = "manifest.json.damaged";
/// Name of the file with a cursor that replaces the manifest's cursor (ST-4).
pub(super) const CURSOR: &str = "cursor.json";
pub(super) const CURSOR_BYTES_MAX: u64 = 16 << 20;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NewCursor {
    pub(super) manifest: Checksum,
    pub(super) cursor: Cursor,
}

/// A folder that holds checkpoints, local or in a cloud store. Clones share their threads.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) operations: Operations,
    prefix: Path,
    place: String,
    pub(crate) local: Option<PathBuf>,
}

impl Store {
    /// Opens a store at a local path, `file:///path` or `memory:///`; with the cargo feature `aws`, `gcp` or `azure`,
    /// also at `s3://bucket/path`, `gs://bucket/path` or `az://container/path`. Settings of cloud stores come from the
    /// environment. The first write creates the folder.
    ///
    /// # Errors
    /// [`CheckpointError::Place`] if the place cannot be a store.
    pub fn open(place: &str) -> Result<Self, CheckpointError> {
        let fail = |why: String| CheckpointError::Place { place: place.into(), why };
        let open_local = |folder: &std::path::Path| {
            Self::in_folder(Arc::new(LocalFileSystem::new().with_fsync(true)), folder, place)
        };
        if !place.contains("://") {
            return open_local(place.as_ref());
        }
        let url = Url::parse(place).map_err(|e| fail(e.to_string()))?;
        if url.scheme() == "file" {
            let folder = url.to_file_path().map_err(|()| fail("the URL must have the form file:///path".into()))?;
            return open_local(&folder);
        }
        let hint = "; build with the cargo feature `aws` for s3://, `gcp` for gs://, `azure` for az://";
        let environment = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        let (backend, prefix) =
            object_store::parse_url_opts(&url, environment).map_err(|e| fail(format!("{e}{hint}")))?;
        Self::new(Arc::from(backend), prefix, place.into(), None)
    }

    /// Opens a store in the folder `prefix` of the caller's backend.
    ///
    /// # Errors
    /// If the folder's name is invalid, or no thread can be started.
    pub fn with(backend: Arc<dyn ObjectStore>, prefix: &str) -> Result<Self, CheckpointError> {
        let place = format!("{backend}/{prefix}");
        let fail = |e: object_store::path::Error| CheckpointError::Place { place: place.clone(), why: e.to_string() };
        let prefix = Path::parse(prefix).map_err(fail)?;
        Self::new(backend, prefix, place, None)
    }

    /// Like [`Store::open`] for a local folder, but uses the caller's backend, whose root is the file system's root.
    pub fn in_folder(
        backend: Arc<dyn ObjectStore>,
        folder: &std::path::Path,
        place: &str,
    ) -> Result<Self, CheckpointError> {
        let fail = |why: String| CheckpointError::Place { place: place.into(), why };
        let folder = absolute(folder).map_err(|e| fail(e.to_string()))?;
        if folder.exists() && !folder.is_dir() {
            return Err(fail("not a folder".into()));
        }
        let prefix = Path::from_absolute_path(&folder).map_err(|e| fail(e.to_string()))?;
        Self::new(backend, prefix, place.into(), Some(folder))
    }

    fn new(
        backend: Arc<dyn ObjectStore>,
        prefix: Path,
        place: String,
        local: Option<PathBuf>,
    ) -> Result<Self, CheckpointError> {
        let io = Arc::new(Io::new(&place)?);
        let (clock, is_local) = (Arc::new(SystemClock(Instant::now())), local.is_some());
        // Cloud stores are consistent: a file is visible once its write has returned.
        let shared = local.as_ref().is_some_and(|folder| !files::is_of_one_machine(folder));
        let hidden = if shared { HIDDEN } else { Duration::ZERO };
        let operations =
            Operations { backend, io, deadline: DEADLINE, part_bytes: PART_BYTES, clock, hidden, is_local };
        Ok(Self { operations, prefix, place: place.trim_end_matches('/').into(), local })
    }

    /// Sets how long a file that another process has written may stay invisible here. The default is 90 s in a folder
    /// of a network file system, and 0 elsewhere. A missing file counts as damage only after this time.
    #[must_use]
    pub fn with_hidden(mut self, time: Duration) -> Self {
        self.operations.hidden = time;
        self
    }

    /// Replaces the system clock, for tests.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn WaitClock>) -> Self {
        self.operations.clock = clock;
        self
    }

    /// Sets how long one operation may take before the store counts as stalled; the default is 120 s.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.operations.deadline = deadline;
        self
    }

    /// Sets the size of an upload request in bytes. A write needs this memory besides the snapshot. Default: 16 MiB.
    #[must_use]
    pub fn with_part_bytes(mut self, bytes: usize) -> Self {
        self.operations.part_bytes = bytes.max(1);
        self
    }

    /// Name of the store in messages, such as the path or URL passed to [`Store::open`].
    pub fn place(&self) -> &str {
        &self.place
    }

    fn folder_name(step: u64) -> String {
        format!("step-{step:012}")
    }

    /// A file or folder, relative to the store's top folder.
    pub(crate) fn top(&self, file: &str) -> StoreFile {
        let parts = file.split('/').filter(|part| !part.is_empty());
        let path = parts.fold(self.prefix.clone(), |path, part| path.join(PathPart::from(part)));
        StoreFile { name: format!("{}/{file}", self.place), path }
    }

    /// A file or folder of a step's checkpoint. An empty name stands for the step's folder.
    pub(crate) fn file(&self, step: u64, file: &str) -> StoreFile {
        self.top(&format!("{}/{file}", Self::folder_name(step)))
    }

    pub(crate) fn manifest(&self, step: u64) -> StoreFile {
        self.file(step, MANIFEST)
    }

    pub(crate) fn is_committed(&self, step: u64) -> Result<bool, CheckpointError> {
        Ok(self.operations.size(&self.manifest(step))?.is_some())
    }

    /// Lists the folder of `step`, or the store's folder if `step` is `None`. If `deep` is set, lists the files in all
    /// subfolders instead. Only files have a size.
    pub(crate) fn list(&self, step: Option<u64>, deep: bool) -> Result<BTreeMap<String, Option<u64>>, CheckpointError> {
        let whole = || StoreFile { name: self.place.clone(), path: self.prefix.clone() };
        let StoreFile { name, path: at } = step.map_or_else(whole, |step| self.file(step, ""));
        if let Some(local) = &self.local {
            let folder = step.map_or_else(|| local.clone(), |step| local.join(Self::folder_name(step)));
            return self.operations.run_local(&name, StoreOperation::List, move || files::list(&folder, deep));
        }
        let backend = self.operations.backend.clone();
        self.operations.run(&name, StoreOperation::List, async move {
            let (folders, files) = if deep {
                (Vec::new(), backend.list(Some(&at)).try_collect().await?)
            } else {
                let listed = backend.list_with_delimiter(Some(&at)).await?;
                (listed.common_prefixes, listed.objects)
            };
            let name = |path: &Path| {
                let parts: Vec<String> = path.prefix_match(&at)?.map(|p| p.as_ref().to_string()).collect();
                Some(parts.join("/"))
            };
            let folders = folders.iter().filter_map(|path| Some((name(path)?, None)));
            let files = files.iter().filter_map(|meta| Some((name(&meta.location)?, Some(meta.size))));
            Ok(folders.chain(files).collect())
        })
    }

    pub(super) fn steps_with_folder(&self) -> Result<Vec<u64>, CheckpointError> {
        let step = |(name, bytes): (String, Option<u64>)| {
            let step = name.strip_prefix("step-")?.parse().ok()?;
            (bytes.is_none() && name == Self::folder_name(step)).then_some(step)
        };
        let mut steps: Vec<u64> = self.list(None, false)?.into_iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Steps that have a committed checkpoint, in order. The checkpoints may be damaged.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let committed = |step| self.is_committed(step).map(|committed| committed.then_some(step)).transpose();
        self.steps_with_folder()?.into_iter().filter_map(committed).collect()
    }

    pub(super) fn manifest_text(&self, step: u64) -> Result<Vec<u8>, CheckpointError> {
        let absent = || CheckpointError::Absent { place: self.place.clone(), step: Some(step) };
        self.operations.get(&self.manifest(step), MANIFEST_BYTES_MAX)?.ok_or_else(absent)
    }

    /// Atomically replaces the cursor of a committed checkpoint. After a rollback, one process calls this function, so
    /// that later runs skip the same samples.
    ///
    /// # Errors
    /// [`CheckpointError::Absent`] if the step has no checkpoint. Also returns an error if the write fails.
    pub fn set_cursor(&self, step: u64, cursor: Cursor) -> Result<(), CheckpointError> {
        let manifest = Checksum::of(&self.manifest_text(step)?);
        let sealed = seal("shardflow-cursor", &NewCursor { manifest, cursor }).map_err(CheckpointError::Refused)?;
        self.operations.put(&self.file(step, CURSOR), sealed, PutMode::Overwrite)
    }

    /// Renames the manifest of a checkpoint that is damaged, or newer than the step to which training has rolled back.
    /// The step can then be committed again. The checkpoint's files stay until a newer checkpoint is committed.
    pub fn set_aside(&self, step: u64) -> Result<(), CheckpointError> {
        self.operations.rename(&self.manifest(step), &self.file(step, SET_ASIDE))
    }

    /// Deletes a file or a folder of a step. An empty name deletes the whole step, starting with its manifest.
    pub(super) fn delete(&self, step: u64, name: &str, is_folder: bool) -> Result<(), CheckpointError> {
        if name.is_empty() {
            self.delete(step, MANIFEST, false)?;
        }
        let file = self.file(step, name);
        if let Some(local) = &self.local {
            // This call also deletes partial files of a killed process. The object store does not list such files.
            let local = local.join(Self::folder_name(step)).join(name);
            return self.operations.run_local(&file.name, StoreOperation::Delete, move || files::remove(&local));
        }
        if !is_folder {
            return self.operations.delete(&file);
        }
        let backend = self.operations.backend.clone();
        self.operations.run(&file.name, StoreOperation::Delete, async move {
            let found = backend.list(Some(&file.path)).map_ok(|meta| meta.location).boxed();
            backend.delete_stream(found).try_for_each(async |_| Ok(())).await
        })
    }
}

/// The absolute path, with symbolic links resolved as far as the path exists.
fn absolute(path: &std::path::Path) -> std::io::Result<PathBuf> {
    let mut existing = std::path::absolute(path)?;
    let mut rest = Vec::new();
    while !existing.exists() {
        if let Ok(target) = existing.read_link() {
            let (link, target) = (existing.display(), target.display());
            let why = format!(
                "{link} is a symbolic link to {target}, which does not exist; create the target, or remove the link"
            );
            return Err(std::io::Error::new(std::io::ErrorKind::NotFound, why));
        }
        // `..` after a missing folder cannot be resolved.
        let Some(Component::Normal(name)) = existing.components().next_back() else {
            return Err(std::io::Error::from(std::io::ErrorKind::NotFound));
        };
        rest.push(name.to_os_string());
        existing.pop();
    }
    let mut path = existing.canonicalize()?;
    path.extend(rest.into_iter().rev());
    Ok(path)
}
