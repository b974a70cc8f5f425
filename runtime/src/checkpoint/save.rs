//! One save, from snapshot to commit: every process writes its shard and reports it, then process 0 commits.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use object_store::PutMode;
use shardflow_kernels::tensor::Region;

use super::agreement::{ProcessRank, SaveAgreement, SaveId, SaveOutcome};
use super::error::CheckpointError;
use super::io::StoreFile;
use super::manifest::{MANIFEST_BYTES_MAX, Manifest, Piece, SHARDS_MAX, open_sealed, seal};
use super::options::SaverOptions;
use super::shard::{self, Entry, Sidecar, SidecarPiece};
use super::snapshot::{Snapshot, SnapshotPiece};
use super::store::Store;
use crate::lock::Lock;

#[derive(Debug, Default)]
pub(crate) struct Attempt {
    pub(crate) number: u32,
    /// True if an existing checkpoint of the step is damaged, and the save must replace it.
    pub(crate) replaces: bool,
    /// The store's lock; `None` except on process 0 of a saver.
    pub(crate) lock: Option<Arc<Lock>>,
}

impl Attempt {
    fn check_lock(&self) -> Result<(), CheckpointError> {
        self.lock.as_ref().map_or(Ok(()), |lock| lock.check())
    }
}

/// Report of a save.
#[derive(Debug)]
pub struct SaveReport {
    /// Number of steps completed before the snapshot.
    pub step: u64,
    /// The result. After an error, no incomplete checkpoint is listed, and training may continue.
    pub result: Result<SaveOutcome, CheckpointError>,
    /// Time from the complete snapshot to the outcome, in seconds.
    pub seconds: f64,
    /// Error from deleting older checkpoints, if any. It does not affect the save.
    pub prune: Option<CheckpointError>,
}

pub(crate) const SHARD: &str = "safetensors";
const SIDECAR: &str = "json";

pub(crate) fn part_file(save: SaveId, process: u32, processes: u32, extension: &str) -> String {
    format!("e{}-{}/shard-{process}-of-{processes}.{extension}", save.epoch, save.attempt)
}

/// Saves a snapshot. Blocks until all processes know the outcome.
pub(crate) fn save(
    store: &Store,
    snapshot: &Snapshot,
    options: &SaverOptions,
    attempt: &Attempt,
    agree: &dyn SaveAgreement,
) -> SaveReport {
    let begin = Instant::now();
    let step = snapshot.manifest.step;
    let id = SaveId { epoch: options.member.epoch, step, attempt: attempt.number };
    let save = Save { store, snapshot, options, id, attempt };
    let result = save.run(agree);
    let is_first = options.member.process == 0;
    let prune = || attempt.check_lock().and_then(|()| store.prune(step, options.keep, options.keep_every)).err();
    let prune = if is_first && result.is_ok() { prune() } else { None };
    let seconds = begin.elapsed().as_secs_f64();
    SaveReport { step, result, seconds, prune }
}

struct Save<'a> {
    store: &'a Store,
    snapshot: &'a Snapshot,
    options: &'a SaverOptions,
    id: SaveId,
    attempt: &'a Attempt,
}

impl Save<'_> {
    fn run(&self, agree: &dyn SaveAgreement) -> Result<SaveOutcome, CheckpointError> {
        let id = self.id;
        let others = |source| CheckpointError::Others { step: id.step, source };
        // A step that is already committed needs no shards. Process 0 then reports `AlreadyThere` to all processes.
        let exists = self.store.is_committed(id.step);
        let written =
            exists.and_then(|exists| if exists && !self.attempt.replaces { Ok(()) } else { self.write_shard() });
        let agreed = agree.all_written(id, written.as_ref().copied().map_err(ToString::to_string));
        written?;
        agreed.map_err(others)?;
        if self.options.member.process > 0 {
            return agree.outcome(id, None).map_err(others);
        }
        let committed = self.commit();
        let agreed = agree.outcome(id, Some(committed.as_ref().copied().map_err(ToString::to_string)));
        // A committed checkpoint stays committed, even if the other processes did not receive the outcome.
        let saved = committed?;
        agreed.map_err(others)?;
        Ok(saved)
    }

    /// Writes this process's shard, then the sidecar that describes it.
    fn write_shard(&self) -> Result<(), CheckpointError> {
        let Self { store, snapshot, id, .. } = *self;
        let ProcessRank { process, processes, .. } = self.options.member;
        let info = |piece: &SnapshotPiece| &snapshot.manifest.tensors[piece.tensor].info;
        let entries: Vec<Entry> = snapshot.pieces.iter().map(|p| Entry::of_piece(info(p), &p.region)).collect();
        let file = part_file(id, process, processes, SHARD);
        let content = |index: usize| Ok(Cow::Borrowed(&snapshot.pieces[index].data));
        let (shard, written) = shard::write(store, id.step, &file, &entries, content)?;
        let piece = |(piece, (offset, blake3)): (&SnapshotPiece, _)| {
            let (tensor, Region { start, size }) = (info(piece).name.clone(), piece.region.clone());
            SidecarPiece { tensor, offset, start, size, blake3 }
        };
        let pieces = snapshot.pieces.iter().zip(written).map(piece).collect();
        let SaveId { step, epoch, attempt } = id;
        let sidecar = Sidecar { step, epoch, attempt, process, processes, shard, pieces };
        let text = seal("shardflow-shard", &sidecar).map_err(CheckpointError::Refused)?;
        let file = part_file(id, process, processes, SIDECAR);
        store.operations.put(&store.file(id.step, &file), text, PutMode::Overwrite)
    }

    /// Builds the manifest and creates its file. Does nothing if a checkpoint exists that the save must not replace.
    fn commit(&self) -> Result<SaveOutcome, CheckpointError> {
        let Self { store, snapshot, options, id, attempt } = *self;
        let exists = store.is_committed(id.step)?;
        if exists && !attempt.replaces {
            return Ok(SaveOutcome::AlreadyThere);
        }
        let (writer, plan) = (env!("CARGO_PKG_VERSION").into(), options.plan.clone());
        let mut manifest = Manifest { epoch: id.epoch, writer, plan, ..snapshot.manifest.clone() };
        let names = manifest.tensors.iter().enumerate();
        let by_name: BTreeMap<String, usize> = names.map(|(index, t)| (t.info.name.clone(), index)).collect();
        for process in 0..options.member.processes {
            let (file, sidecar) = self.read_sidecar(process)?;
            let shard = manifest.shards.len();
            manifest.shards.push(sidecar.shard);
            for piece in sidecar.pieces {
                let SidecarPiece { tensor, offset, start, size, blake3 } = piece;
                let Some(index) = by_name.get(&tensor) else {
                    return Err(file.damaged(format!("it has tensor {tensor}, which rank 0 does not have")));
                };
                manifest.tensors[*index].pieces.push(Piece { shard, offset, start, size, blake3 });
            }
        }
        attempt.check_lock()?;
        if exists {
            store.set_aside(id.step)?;
        }
        commit_manifest(store, &manifest)
    }

    /// Reads a process's sidecar, and checks that its shard exists.
    fn read_sidecar(&self, process: u32) -> Result<(StoreFile, Sidecar), CheckpointError> {
        let (store, id, processes) = (self.store, self.id, self.options.member.processes);
        let file = store.file(id.step, &part_file(id, process, processes, SIDECAR));
        let operations = &store.operations;
        let missing = || file.damaged(format!("the file is missing, but rank {process} reported it as written"));
        let text = operations.wait_visible(|| operations.get(&file, MANIFEST_BYTES_MAX))?.ok_or_else(missing)?;
        let sidecar: Sidecar = open_sealed("shardflow-shard", &text).map_err(|why| file.damaged(why))?;
        let expected = (id, process, processes, part_file(id, process, processes, SHARD));
        let found = SaveId { epoch: sidecar.epoch, step: sidecar.step, attempt: sidecar.attempt };
        if (found, sidecar.process, sidecar.processes, sidecar.shard.file.clone()) != expected {
            let (rank, ranks) = (sidecar.process, sidecar.processes);
            let expected = format!("expected {id:?} of rank {process} of {processes}");
            let why = format!("it belongs to {found:?} of rank {rank} of {ranks}, {expected}");
            return Err(file.damaged(why));
        }
        let shard = store.file(id.step, &sidecar.shard.file);
        let bytes = operations.wait_visible(|| operations.size(&shard))?;
        if bytes != Some(sidecar.shard.bytes) {
            let found = bytes.map_or("the file is missing".into(), |bytes| format!("the file has {bytes} bytes"));
            return Err(shard.damaged(format!("{found}, expected {} bytes", sidecar.shard.bytes)));
        }
        Ok((file, sidecar))
    }
}

/// The atomic operation that commits a checkpoint (ST-1).
pub(crate) fn commit_manifest(store: &Store, manifest: &Manifest) -> Result<SaveOutcome, CheckpointError> {
    let file = store.manifest(manifest.step);
    let refused = |why| CheckpointError::Refused(format!("{}: cannot be committed: {why}", file.name));
    let text = manifest.encode().map_err(refused)?;
    let Err(error) = store.operations.put(&file, text.clone(), PutMode::Create) else {
        return Ok(SaveOutcome::Committed);
    };
    // If a response was lost and the client retried, the retry fails although the commit succeeded. Compare the files.
    match store.operations.get(&file, MANIFEST_BYTES_MAX) {
        Ok(Some(existing)) if existing == text => Ok(SaveOutcome::Committed),
        Ok(Some(_)) if error.is_there() => Ok(SaveOutcome::AlreadyThere),
        _ => Err(error),
    }
}

pub(crate) fn check_member(member: ProcessRank) -> Result<(), CheckpointError> {
    let ProcessRank { process, processes, .. } = member;
    if process < processes && processes as usize <= SHARDS_MAX {
        return Ok(());
    }
    Err(CheckpointError::Refused(format!(
        "rank {process} of {processes} is not valid; at most {SHARDS_MAX} processes can save"
    )))
}
