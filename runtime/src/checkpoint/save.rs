//! One save, from snapshot to commit: every process writes its shard, says so, and process 0 commits.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use object_store::PutMode;

use super::agreement::{ProcessRank, SaveAgreement, SaveId, SaveOutcome};
use super::error::CheckpointError;
use super::manifest::{Manifest, Piece, SHARDS_MAX, StoredTensor, open_sealed, seal};
use super::saver::SaverOptions;
use super::shard::{self, Entry, SIDECAR_BYTES_MAX, Sidecar, SidecarPiece, entry_name};
use super::snapshot::Snapshot;
use super::store::Store;
use crate::lock::Lock;

/// Options of one save.
#[derive(Debug, Default)]
pub(crate) struct Attempt {
    pub(crate) number: u32,
    /// The step's checkpoint, if there is one, was found damaged.
    pub(crate) replaces: bool,
    /// Of process 0 of a saver.
    pub(crate) lock: Option<Arc<Lock>>,
}

impl Attempt {
    fn check_lock(&self) -> Result<(), CheckpointError> {
        self.lock.as_ref().map_or(Ok(()), |lock| lock.check())
    }
}

/// How a save went.
#[derive(Debug)]
pub struct SaveReport {
    /// Steps done at the snapshot.
    pub step: u64,
    /// What became of it. After an error nothing half-written is ever listed, and training may go on.
    pub result: Result<SaveOutcome, CheckpointError>,
    /// Bytes of this process's elements.
    pub bytes: u64,
    /// From the snapshot's end to the outcome.
    pub seconds: f64,
    /// Why older checkpoints could not be deleted, if so; the save stands.
    pub prune: Option<CheckpointError>,
}

/// How the names of a process's shard and of its sidecar end.
pub(crate) const SHARD: &str = "safetensors";
const SIDECAR: &str = "json";

/// Name of a process's shard or sidecar in the checkpoint's folder.
pub(crate) fn part_file(save: SaveId, process: u32, processes: u32, ending: &str) -> String {
    format!("e{}-{}/shard-{process}-of-{processes}.{ending}", save.epoch, save.attempt)
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
    let id = SaveId { epoch: options.member.epoch, step: snapshot.step, attempt: attempt.number };
    let result = agreed(store, snapshot, options, id, attempt, agree);
    let is_first = options.member.process == 0;
    let prune =
        || attempt.check_lock().and_then(|()| store.prune(snapshot.step, options.keep, options.keep_every)).err();
    let prune = if is_first && result.is_ok() { prune() } else { None };
    let seconds = begin.elapsed().as_secs_f64();
    SaveReport { step: snapshot.step, result, bytes: snapshot.bytes(), seconds, prune }
}

fn agreed(
    store: &Store,
    snapshot: &Snapshot,
    options: &SaverOptions,
    id: SaveId,
    attempt: &Attempt,
    agree: &dyn SaveAgreement,
) -> Result<SaveOutcome, CheckpointError> {
    let member = options.member;
    let others = |source| CheckpointError::Others { step: id.step, source };
    // A step that is committed already needs no shards; process 0 tells all.
    let written = store
        .is_committed(id.step)
        .and_then(|there| if there && !attempt.replaces { Ok(()) } else { write_shard(store, snapshot, member, id) });
    let said = agree.all_written(id, written.as_ref().copied().map_err(ToString::to_string));
    written?;
    said.map_err(others)?;
    if member.process > 0 {
        return agree.outcome(id, None).map_err(others);
    }
    let committed = commit(store, snapshot, options, id, attempt);
    let said = agree.outcome(id, Some(committed.as_ref().copied().map_err(ToString::to_string)));
    // A checkpoint that is committed stays so, whether or not the others heard of it.
    let saved = committed?;
    said.map_err(others)?;
    Ok(saved)
}

/// Writes this process's shard, then the sidecar that says what is in it.
fn write_shard(store: &Store, snapshot: &Snapshot, member: ProcessRank, id: SaveId) -> Result<(), CheckpointError> {
    let entry = |piece: &super::snapshot::SnapshotPiece| {
        let info = &snapshot.tensors[piece.tensor];
        let name = entry_name(&info.name, &info.shape, &piece.region);
        Entry { name, dtype: piece.data.dtype(), shape: piece.region.size.clone() }
    };
    let entries: Vec<Entry> = snapshot.pieces.iter().map(entry).collect();
    let file = part_file(id, member.process, member.processes, SHARD);
    let content = |index: usize| Ok(Cow::Borrowed(&snapshot.pieces[index].data));
    let written = shard::write(store, id.step, &file, &entries, content)?;
    let pieces = snapshot.pieces.iter().zip(&written.entries).map(|(piece, (offset, blake3))| SidecarPiece {
        tensor: snapshot.tensors[piece.tensor].name.clone(),
        offset: *offset,
        start: piece.region.start.clone(),
        size: piece.region.size.clone(),
        blake3: *blake3,
    });
    let sidecar = Sidecar {
        step: id.step,
        epoch: id.epoch,
        attempt: id.attempt,
        process: member.process,
        processes: member.processes,
        shard: written.shard,
        pieces: pieces.collect(),
    };
    let text = seal("shardflow-shard", &sidecar).map_err(CheckpointError::Refused)?;
    let file = part_file(id, member.process, member.processes, SIDECAR);
    store.operations.put(&store.name(id.step, &file), &store.path(id.step, &file), text, PutMode::Overwrite)
}

/// Puts the manifest together and creates it, unless the step has one.
fn commit(
    store: &Store,
    snapshot: &Snapshot,
    options: &SaverOptions,
    id: SaveId,
    attempt: &Attempt,
) -> Result<SaveOutcome, CheckpointError> {
    let is_there = store.is_committed(id.step)?;
    if is_there && !attempt.replaces {
        return Ok(SaveOutcome::AlreadyThere);
    }
    let mut manifest = Manifest {
        step: id.step,
        updates: Some(snapshot.updates),
        epoch: id.epoch,
        mesh: snapshot.mesh.clone(),
        seed: snapshot.seed,
        cursor: snapshot.cursor.clone(),
        declared: snapshot.declared.clone(),
        writer: env!("CARGO_PKG_VERSION").into(),
        plan: options.plan.clone(),
        job: snapshot.job,
        shards: Vec::new(),
        tensors: snapshot.tensors.iter().map(|info| StoredTensor { info: info.clone(), pieces: Vec::new() }).collect(),
    };
    let names = manifest.tensors.iter().enumerate();
    let by_name: BTreeMap<String, usize> = names.map(|(index, t)| (t.info.name.clone(), index)).collect();
    for process in 0..options.member.processes {
        let file = store.name(id.step, &part_file(id, process, options.member.processes, SIDECAR));
        let sidecar = read_sidecar(store, id, process, options.member.processes)?;
        let shard = manifest.shards.len();
        manifest.shards.push(sidecar.shard);
        for piece in sidecar.pieces {
            let SidecarPiece { tensor, offset, start, size, blake3 } = piece;
            let Some(index) = by_name.get(&tensor) else {
                let why = format!("it has tensor {tensor}, which rank 0 does not know");
                return Err(CheckpointError::Damaged { file, why });
            };
            manifest.tensors[*index].pieces.push(Piece { shard, offset, start, size, blake3 });
        }
    }
    attempt.check_lock()?;
    if is_there {
        store.set_aside(id.step)?;
    }
    commit_manifest(store, &manifest)
}

/// The one atomic operation that makes a checkpoint (ST-1).
pub(crate) fn commit_manifest(store: &Store, manifest: &Manifest) -> Result<SaveOutcome, CheckpointError> {
    let (file, path) = (store.manifest_name(manifest.step), store.manifest_path(manifest.step));
    let refused = |why| CheckpointError::Refused(format!("{file}: cannot be committed: {why}"));
    let text = manifest.encode().map_err(refused)?;
    let Err(error) = store.operations.put(&file, &path, text.clone(), PutMode::Create) else {
        return Ok(SaveOutcome::Committed);
    };
    // A cloud store may answer so to its own second try, and a lost answer is no lost commit.
    match store.operations.get(&file, &path, super::manifest::MANIFEST_BYTES_MAX) {
        Ok(Some(there)) if there == text => Ok(SaveOutcome::Committed),
        Ok(Some(_)) if error.is_there() => Ok(SaveOutcome::AlreadyThere),
        _ => Err(error),
    }
}

/// What a process says it wrote, with a look at whether the shard is there.
fn read_sidecar(store: &Store, id: SaveId, process: u32, processes: u32) -> Result<Sidecar, CheckpointError> {
    let file = part_file(id, process, processes, SIDECAR);
    let (name, path) = (store.name(id.step, &file), store.path(id.step, &file));
    let damaged = |why: String| CheckpointError::Damaged { file: name.clone(), why };
    let operations = &store.operations;
    let text = operations.eventually(|| operations.get(&name, &path, SIDECAR_BYTES_MAX))?;
    let text = text.ok_or_else(|| damaged(format!("the file is missing; rank {process} said that it was written")))?;
    let sidecar: Sidecar = open_sealed("shardflow-shard", &text).map_err(damaged)?;
    let expected = (id, process, processes, part_file(id, process, processes, SHARD));
    let its = SaveId { epoch: sidecar.epoch, step: sidecar.step, attempt: sidecar.attempt };
    if (its, sidecar.process, sidecar.processes, sidecar.shard.file.clone()) != expected {
        return Err(damaged(format!("it is of {its:?}, rank {} of {}", sidecar.process, sidecar.processes)));
    }
    let shard = store.name(id.step, &sidecar.shard.file);
    let path = store.path(id.step, &sidecar.shard.file);
    let bytes = operations.eventually(|| operations.size(&shard, &path))?;
    if bytes != Some(sidecar.shard.bytes) {
        let why = format!("{bytes:?} bytes long, expected {}", sidecar.shard.bytes);
        return Err(CheckpointError::Damaged { file: shard, why });
    }
    Ok(sidecar)
}

/// What [`SaverOptions`] may not be.
pub(crate) fn check_member(member: ProcessRank) -> Result<(), CheckpointError> {
    let ProcessRank { process, processes, .. } = member;
    if process < processes && processes as usize <= SHARDS_MAX {
        return Ok(());
    }
    Err(CheckpointError::Refused(format!("rank {process} of {processes} processes; at most {SHARDS_MAX} may save")))
}
