//! A place for checkpoints: where each file lies, which checkpoints there are, which is the newest good one, and which are
//! deleted. Imports `checkpoint::{error, io, manifest, read}`.
//!
//! - ST-1: a checkpoint of step S exists if and only if `step-<S>/manifest.json` does. It is created once, by one atomic
//!   operation that fails where it is there already, after all its shards are written and synced.
//! - ST-2: each attempt to save writes to a folder of its own, `step-<S>/e<epoch>-<attempt>/`, so that no late writer
//!   touches a file of another attempt.
//! - ST-3: deleting begins with the manifest, and the newest good checkpoint is never deleted.

use std::collections::BTreeMap;
use std::path::{Component, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::{Path, PathPart};
use object_store::{ObjectStore, ObjectStoreExt};
use url::Url;

use super::error::{CheckpointError, Doing};
use super::io::{DEADLINE, Io, Operations, PART_BYTES};
use super::manifest::{MANIFEST_BYTES_MAX, Manifest};
use super::read::Reader;

/// Name of the file that makes a checkpoint.
const MANIFEST: &str = "manifest.json";
/// What a manifest is called after [`Store::set_aside`].
const SET_ASIDE: &str = "manifest.json.damaged";

/// A folder, local or in the cloud, that holds checkpoints. Clones share their threads.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) operations: Operations,
    prefix: Path,
    /// As the user named it.
    place: String,
    /// The folder, where it is a local one.
    local: Option<PathBuf>,
}

/// The newest good checkpoint, and those that are newer but damaged.
#[derive(Debug)]
pub struct Newest {
    /// The checkpoint, if there is one.
    pub reader: Option<Reader>,
    /// What is wrong with newer ones; the file is named.
    pub damaged: Vec<CheckpointError>,
}

impl Store {
    /// A store at a local path, `file:///path`, `memory:///`, or, with the cargo feature `aws`, `gcp` or `azure`, at
    /// `s3://bucket/path`, `gs://bucket/path` or `az://container/path`; what those need is taken from the environment.
    /// Nothing is made there before something is written.
    ///
    /// # Errors
    /// [`CheckpointError::Place`] when it cannot be a store.
    pub fn open(place: &str) -> Result<Self, CheckpointError> {
        let fail = |why: String| CheckpointError::Place { place: place.into(), why };
        let url = if place.contains("://") { Some(Url::parse(place).map_err(|e| fail(e.to_string()))?) } else { None };
        let folder = match &url {
            None => Some(PathBuf::from(place)),
            Some(url) if url.scheme() == "file" => {
                Some(url.to_file_path().map_err(|()| fail("write it as file:///path".into()))?)
            }
            Some(_) => None,
        };
        if let Some(folder) = folder {
            let folder = absolute(&folder).map_err(|e| fail(e.to_string()))?;
            if folder.exists() && !folder.is_dir() {
                return Err(fail("not a folder".into()));
            }
            let prefix = Path::from_absolute_path(&folder).map_err(|e| fail(e.to_string()))?;
            let backend = LocalFileSystem::new().with_fsync(true);
            return Self::at(Arc::new(backend), prefix, place.into(), Some(folder));
        }
        let hint = "; s3:// needs the cargo feature `aws`, gs:// `gcp`, az:// `azure`";
        let url = url.ok_or_else(|| fail("no path".into()))?;
        let environment = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        let (backend, prefix) =
            object_store::parse_url_opts(&url, environment).map_err(|e| fail(format!("{e}{hint}")))?;
        Self::at(Arc::from(backend), prefix, place.into(), None)
    }

    /// A store of the caller's, at a folder of it.
    ///
    /// # Errors
    /// When the folder's name cannot be one, or no thread can be had.
    pub fn with(backend: Arc<dyn ObjectStore>, prefix: &str) -> Result<Self, CheckpointError> {
        let place = format!("{backend}/{prefix}");
        let fail = |e: object_store::path::Error| CheckpointError::Place { place: place.clone(), why: e.to_string() };
        let prefix = Path::parse(prefix).map_err(fail)?;
        Self::at(backend, prefix, place, None)
    }

    fn at(
        backend: Arc<dyn ObjectStore>,
        prefix: Path,
        place: String,
        local: Option<PathBuf>,
    ) -> Result<Self, CheckpointError> {
        let io = Arc::new(Io::new(&place)?);
        let operations = Operations { backend, io, deadline: DEADLINE, part_bytes: PART_BYTES };
        Ok(Self { operations, prefix, place: place.trim_end_matches('/').into(), local })
    }

    /// How long one operation may take before the store counts as stalled; 120 s unless told otherwise.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.operations.deadline = deadline;
        self
    }

    /// Bytes that are sent at once, 16 MiB unless told otherwise: the memory that writing takes beside the snapshot.
    #[must_use]
    pub fn with_part_bytes(mut self, bytes: usize) -> Self {
        self.operations.part_bytes = bytes.max(1);
        self
    }

    /// The place, as it was given.
    pub fn place(&self) -> &str {
        &self.place
    }

    fn folder_name(step: u64) -> String {
        format!("step-{step:012}")
    }

    /// Path in the store of a file of a step's checkpoint.
    pub(crate) fn path(&self, step: u64, file: &str) -> Path {
        let parts = [Self::folder_name(step)];
        let parts = parts.iter().map(String::as_str).chain(file.split('/').filter(|part| !part.is_empty()));
        parts.fold(self.prefix.clone(), |path, part| path.join(PathPart::from(part)))
    }

    /// How a file of a step's checkpoint is called in errors.
    pub(crate) fn name(&self, step: u64, file: &str) -> String {
        format!("{}/{}/{file}", self.place, Self::folder_name(step))
    }

    pub(crate) fn manifest_path(&self, step: u64) -> Path {
        self.path(step, MANIFEST)
    }

    pub(crate) fn manifest_name(&self, step: u64) -> String {
        self.name(step, MANIFEST)
    }

    /// True when the step has a committed checkpoint.
    pub(crate) fn is_committed(&self, step: u64) -> Result<bool, CheckpointError> {
        Ok(self.operations.size(&self.manifest_name(step), &self.manifest_path(step))?.is_some())
    }

    /// Steps that something was ever written for, in order.
    fn begun(&self) -> Result<Vec<u64>, CheckpointError> {
        let (backend, prefix) = (self.operations.backend.clone(), self.prefix.clone());
        let list = async move { backend.list_with_delimiter(Some(&prefix)).await };
        let listed = self.operations.run(&self.place, Doing::List, list)?;
        let step = |path: &Path| {
            let name = path.filename()?;
            let step = name.strip_prefix("step-")?.parse().ok()?;
            (name == Self::folder_name(step)).then_some(step)
        };
        let mut steps: Vec<u64> = listed.common_prefixes.iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// Steps that have a committed checkpoint, in order. Whether it is still good is not looked at.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let mut committed = Vec::new();
        for step in self.begun()? {
            if self.is_committed(step)? {
                committed.push(step);
            }
        }
        Ok(committed)
    }

    /// Files of a step and their sizes, by the name that manifests have for them.
    fn files(&self, step: u64) -> Result<BTreeMap<String, u64>, CheckpointError> {
        let (backend, folder) = (self.operations.backend.clone(), self.path(step, ""));
        let within = folder.clone();
        let list = async move { backend.list(Some(&within)).try_collect::<Vec<_>>().await };
        let found = self.operations.run(&self.name(step, ""), Doing::List, list)?;
        let name = |path: &Path| {
            let parts: Vec<String> = path.prefix_match(&folder)?.map(|p| p.as_ref().to_string()).collect();
            Some(parts.join("/"))
        };
        Ok(found.into_iter().filter_map(|meta| Some((name(&meta.location)?, meta.size))).collect())
    }

    /// A committed checkpoint. Its manifest is read and checked, and all shards must be there in full length; their
    /// contents are checked as they are read.
    ///
    /// # Errors
    /// [`CheckpointError::Absent`], or [`CheckpointError::Damaged`] with the file.
    pub fn read(&self, step: u64) -> Result<Reader, CheckpointError> {
        let name = self.manifest_name(step);
        let text = self.operations.get(&name, &self.manifest_path(step), MANIFEST_BYTES_MAX)?;
        let absent = || CheckpointError::Absent { place: self.place.clone(), step: Some(step) };
        let text = text.ok_or_else(absent)?;
        let manifest = Manifest::decode(&text).map_err(|why| CheckpointError::Damaged { file: name.clone(), why })?;
        if manifest.step != step {
            let why = format!("it is of step {}", manifest.step);
            return Err(CheckpointError::Damaged { file: name, why });
        }
        let files = self.files(step)?;
        for shard in &manifest.shards {
            let why = match files.get(&shard.file) {
                Some(bytes) if *bytes == shard.bytes => continue,
                Some(bytes) => format!("{bytes} bytes long, expected {}", shard.bytes),
                None => "the file is missing".into(),
            };
            return Err(CheckpointError::Damaged { file: self.name(step, &shard.file), why });
        }
        Ok(Reader::new(self.clone(), manifest))
    }

    /// The newest good checkpoint of a step before `before`, if that is given: one that [`Store::read`] accepts. Those
    /// that are damaged are passed over and told.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub fn newest_before(&self, before: Option<u64>) -> Result<Newest, CheckpointError> {
        self.newest_that(before, |_| Ok(()))
    }

    /// The newest good checkpoint, as [`Store::newest_before`].
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub fn newest(&self) -> Result<Newest, CheckpointError> {
        self.newest_before(None)
    }

    /// As [`Store::newest`], with every byte read and checked: nothing it gives can fail to load but for a new damage.
    ///
    /// # Errors
    /// When the store cannot be asked.
    pub fn newest_verified(&self) -> Result<Newest, CheckpointError> {
        self.newest_that(None, Reader::verify)
    }

    fn newest_that(
        &self,
        before: Option<u64>,
        good: impl Fn(&Reader) -> Result<(), CheckpointError>,
    ) -> Result<Newest, CheckpointError> {
        let mut damaged = Vec::new();
        for step in self.begun()?.into_iter().rev().filter(|step| before.is_none_or(|before| *step < before)) {
            match self.read(step).and_then(|reader| good(&reader).map(|()| reader)) {
                Ok(reader) => return Ok(Newest { reader: Some(reader), damaged }),
                Err(CheckpointError::Absent { .. }) => {}
                Err(error) if error.is_damage() => damaged.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(Newest { reader: None, damaged })
    }

    /// Takes a checkpoint that turned out to be damaged, or that training went back behind, out of the list, so that the
    /// step can be committed again. Its files stay until they are older than the newest.
    ///
    /// # Errors
    /// When the store cannot do it.
    pub fn set_aside(&self, step: u64) -> Result<(), CheckpointError> {
        let (backend, from, to) =
            (self.operations.backend.clone(), self.manifest_path(step), self.path(step, SET_ASIDE));
        let rename = async move { backend.rename(&from, &to).await };
        self.operations.run(&self.manifest_name(step), Doing::Write, rename)
    }

    /// Deletes all but the newest `keep` good checkpoints (at least one), and what attempts before the newest of them left
    /// behind. Only one process may do this, and only between saves.
    ///
    /// # Errors
    /// When the store cannot do it; what was not deleted is found again by the next call.
    pub fn prune(&self, keep: usize) -> Result<(), CheckpointError> {
        let (keep, mut kept) = (keep.max(1), 0);
        for step in self.begun()?.into_iter().rev() {
            match self.read(step) {
                Ok(reader) if kept < keep => {
                    kept += 1;
                    self.delete_other_attempts(&reader)?;
                }
                Ok(_) => self.delete(step)?,
                // Older than what is good, it is of no use; newer, it may be an attempt that goes on, or worth a look.
                Err(CheckpointError::Absent { .. }) if kept > 0 => self.delete(step)?,
                Err(error) if error.is_damage() && kept >= keep => self.delete(step)?,
                Err(CheckpointError::Absent { .. }) => {}
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Deletes what there is of a step, its manifest first.
    fn delete(&self, step: u64) -> Result<(), CheckpointError> {
        let (backend, manifest) = (self.operations.backend.clone(), self.manifest_path(step));
        let first = async move {
            match backend.delete(&manifest).await {
                Err(object_store::Error::NotFound { .. }) => Ok(()),
                result => result,
            }
        };
        self.operations.run(&self.manifest_name(step), Doing::Delete, first)?;
        self.delete_folder(step, "")
    }

    /// Deletes what attempts that were not committed left in a committed checkpoint's folder.
    fn delete_other_attempts(&self, reader: &Reader) -> Result<(), CheckpointError> {
        let step = reader.manifest().step;
        let (backend, folder) = (self.operations.backend.clone(), self.path(step, ""));
        let list = async move { backend.list_with_delimiter(Some(&folder)).await };
        let attempts = self.operations.run(&self.name(step, ""), Doing::List, list)?.common_prefixes;
        let is_used = |attempt: &str| {
            let folder_of = |file: &str| file.split_once('/').is_some_and(|(folder, _)| folder == attempt);
            reader.manifest().shards.iter().any(|shard| folder_of(&shard.file))
        };
        for attempt in attempts.iter().filter_map(|path| path.filename()).filter(|attempt| !is_used(attempt)) {
            self.delete_folder(step, attempt)?;
        }
        self.delete_torn_manifests(step)
    }

    /// Deletes what processes that were killed in the middle of a commit left, which the object store does not list.
    fn delete_torn_manifests(&self, step: u64) -> Result<(), CheckpointError> {
        let Some(local) = &self.local else { return Ok(()) };
        let folder = local.join(Self::folder_name(step));
        let remove = move || {
            for entry in std::fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with(&format!("{MANIFEST}#")) {
                    std::fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        };
        self.delete_local(step, "", remove)
    }

    /// Deletes by way of the local file system; it may block as long as the disk does.
    fn delete_local(
        &self,
        step: u64,
        folder: &str,
        work: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<(), CheckpointError> {
        self.operations.run(&self.name(step, folder), Doing::Delete, async move {
            let failed = |e| object_store::Error::Generic { store: "checkpoint", source: Box::new(e) };
            tokio::task::spawn_blocking(work).await?.map_err(failed)
        })
    }

    /// Deletes a folder of a step's, or all of it.
    fn delete_folder(&self, step: u64, folder: &str) -> Result<(), CheckpointError> {
        let backend = self.operations.backend.clone();
        if let Some(local) = &self.local {
            // With it go the parts of files that a killed process left; the object store does not list those.
            let local = local.join(Self::folder_name(step)).join(folder);
            return self.delete_local(step, folder, move || std::fs::remove_dir_all(local));
        }
        let path = self.path(step, folder);
        self.operations.run(&self.name(step, folder), Doing::Delete, async move {
            let found = backend.list(Some(&path)).map_ok(|meta| meta.location).boxed();
            backend.delete_stream(found).try_for_each(async |_| Ok(())).await
        })
    }
}

/// The path from the root, with links followed as far as it exists.
fn absolute(path: &std::path::Path) -> std::io::Result<PathBuf> {
    let mut there = std::path::absolute(path)?;
    let mut rest = Vec::new();
    while !there.exists() {
        // `..` behind a folder that is not there leads nowhere.
        let Some(Component::Normal(name)) = there.components().next_back() else {
            return Err(std::io::Error::from(std::io::ErrorKind::NotFound));
        };
        rest.push(name.to_os_string());
        there.pop();
    }
    let mut path = there.canonicalize()?;
    path.extend(rest.into_iter().rev());
    Ok(path)
}
