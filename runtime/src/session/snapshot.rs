//! Takes a session's snapshot for a checkpoint between two steps, and restores a checkpoint under any mesh.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use shardflow_kernels::tensor::{DType, HostData, HostTensor, Region};

use super::Session;
use super::agreement::{LoadSummary, digest_of};
use super::budget::{SNAPSHOTS_MAX, saved_parts};
use super::error::SessionError;
use super::outcome::Outcome;
use super::start::cannot_start;
use crate::checkpoint::agreement::{ProcessRank, SaveAgreement, SingleProcess};
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::manifest::{Cursor, Manifest, StoredTensor, TensorKind, TensorMeta};
use crate::checkpoint::newest::NewestCheckpoint;
use crate::checkpoint::read::CheckpointReader;
use crate::checkpoint::snapshot::{Snapshot, SnapshotPiece};
use crate::checkpoint::store::Store;
use crate::graph::optimizer::Bounds;
use crate::graph::{NodeOp, Var};
use crate::plan::ResidentTensor;
use shardflow_job::exit::Exit;

/// Result of [`Session::restore_newest`].
#[derive(Debug)]
pub struct Restored {
    /// Step and cursor of the loaded checkpoint. `None` if there is no checkpoint; the session is then unchanged.
    pub found: Option<(u64, Cursor)>,
    /// Errors of newer checkpoints that were skipped because they are damaged.
    pub damaged: Vec<CheckpointError>,
    /// Notes on the loaded checkpoint, one line each: different declared values or seed, skipped optimizer states.
    pub notes: Vec<String>,
}

/// The parts of a checkpoint that this process loads, each with its destination; and notes for the user, one line each.
type Parts = (Vec<(usize, ResidentTensor, HostTensor)>, Vec<String>);

impl Session {
    /// The tensors of a checkpoint, with their kinds.
    pub(super) fn residents(&self) -> impl Iterator<Item = (Var, TensorKind)> {
        self.plan.graph.residents().map(|var| match self.plan.graph.producer(var).op {
            NodeOp::State => (var, TensorKind::State),
            _ => (var, TensorKind::Parameter),
        })
    }

    /// Returns the agreement and this process's rank for a [`crate::checkpoint::Saver`]. Checks that the node has
    /// memory for the saver's snapshots. Without that memory, a job fails here, before it trains.
    ///
    /// # Errors
    /// [`crate::plan::error::PlanError::NodeMemory`], on all processes.
    pub fn agreement(&self) -> Result<(Arc<dyn SaveAgreement>, ProcessRank), SessionError> {
        let checked = self.budget.check(&self.plan, &self.process_map, &self.node_processes, SNAPSHOTS_MAX);
        checked.map_err(|error| match &self.world {
            Some(world) => cannot_start(world, error.into()),
            None => error.into(),
        })?;
        let rank = ProcessRank { epoch: self.job.1, ..ProcessRank::ALONE };
        Ok(self.world.as_ref().map_or((Arc::new(SingleProcess), rank), |world| world.agree()))
    }

    /// Copies the parameters and optimizer state of this process's devices to host memory, into the buffers of `spare`
    /// if given. The cursor of the snapshot is empty. Call it between steps.
    ///
    /// # Errors
    /// The failure of an earlier step.
    pub fn snapshot(&self, spare: Option<Snapshot>) -> Result<Snapshot, SessionError> {
        self.snapshot_of(self.process_map.own(), spare)
    }

    /// Like [`Session::snapshot`], for these devices. If several devices of a placement hold a part, the part of
    /// the first one is copied.
    pub fn snapshot_of(&self, devices: Range<usize>, spare: Option<Snapshot>) -> Result<Snapshot, SessionError> {
        self.check_not_failed()?;
        let mut spare = spare.map(|s| s.pieces).unwrap_or_default().into_iter();
        let (mut tensors, mut pieces) = (Vec::new(), Vec::new());
        for (var, kind) in self.residents() {
            for (device, ResidentTensor { region, dtype, offset, .. }) in saved_parts(&self.plan, var, devices.clone())
            {
                let reused = spare.next().map(|piece| piece.data).filter(|tensor| tensor.dtype() == dtype);
                let buffer = reused.map_or_else(|| HostData::empty(dtype), |tensor| tensor.data);
                let mut data = HostTensor { shape: region.size.clone(), data: buffer };
                self.arenas[&device].read_host_into(offset, &mut data)?;
                pieces.push(SnapshotPiece { tensor: tensors.len(), region, data });
            }
            tensors.push(StoredTensor { info: self.tensor_info(var, kind), pieces: Vec::new() });
        }
        let (step, updates, seed) = (self.progress.steps, Some(self.progress.updates), self.progress.seed);
        let (mesh, declared) = (self.plan.graph.mesh().to_string(), self.declared.values());
        let job = self.step_metrics.job_time();
        let manifest = Manifest { step, updates, mesh, seed, declared, job, tensors, ..Manifest::default() };
        Ok(Snapshot { manifest, pieces })
    }

    fn tensor_info(&self, var: Var, kind: TensorKind) -> TensorMeta {
        let graph = &self.plan.graph;
        let info = graph.tensor(var);
        let placement = &graph.placements[graph.placement_of(var)];
        TensorMeta {
            name: info.name.clone(),
            kind,
            dtype: info.dtype,
            shape: info.shape.clone(),
            saved_shape: self.saved_shape(var),
            layout: graph.layout(var).to_string(),
            axes: placement.axes_text(),
            devices: placement.devices().to_vec(),
        }
    }

    /// Loads a checkpoint of any mesh; each device reads only its part. All processes call it. Step and seed are then
    /// those of the checkpoint, so dropout masks continue unchanged. Returns notes for the user, one line each.
    ///
    /// # Errors
    /// [`CheckpointError`], or [`SessionError::Disagreement`] if two ranks differ. In both cases nothing has changed.
    pub fn restore_checkpoint(&mut self, reader: &CheckpointReader) -> Result<Vec<String>, SessionError> {
        let parts = self.read_parts(reader);
        let productive_ms = self.step_metrics.productive_ms(reader.manifest().job);
        self.load_parts(parts, reader, productive_ms)
    }

    /// Reads the parts that this process's devices hold; changes nothing in the session.
    fn read_parts(&self, reader: &CheckpointReader) -> Result<Parts, SessionError> {
        self.check_not_failed()?;
        let (path, manifest) = (PathBuf::from(reader.name()), reader.manifest());
        let infos = manifest.tensors.iter().map(|tensor| (tensor.info.name.as_str(), tensor.info.kind));
        let notes = self.check_saved(&path, &manifest.declared, infos, false)?;
        let mut found = Vec::new();
        for (var, _) in self.residents() {
            self.check_fits(reader, var)?;
            let parts: Vec<_> = self.plan.resident_parts(var, self.process_map.own()).collect();
            // Each region is read once, for all devices that hold it.
            let mut regions: Vec<Region> = Vec::new();
            for (_, resident) in &parts {
                if !regions.contains(&resident.region) {
                    regions.push(resident.region.clone());
                }
            }
            let tensors = reader.tensors(&self.plan.graph.tensor(var).name, &regions)?;
            for (region, tensor) in regions.iter().zip(tensors) {
                let holders = parts.iter().filter(|(_, resident)| resident.region == *region);
                found.extend(holders.map(|(device, resident)| (*device, resident.clone(), tensor.clone())));
            }
        }
        Ok((found, notes))
    }

    /// Loads the parts that were read, if all processes have read the same checkpoint. Returns notes for the user.
    fn load_parts(
        &mut self,
        read: Result<Parts, SessionError>,
        reader: &CheckpointReader,
        productive_ms: u64,
    ) -> Result<Vec<String>, SessionError> {
        let (source, manifest) = (reader.name(), reader.manifest());
        let summary = |_: &Parts| LoadSummary {
            steps: manifest.step,
            updates: manifest.updates(),
            seed: manifest.seed,
            manifest: digest_of(&manifest.encode().unwrap_or_default()),
            tensors: BTreeMap::new(),
        };
        let (parts, mut notes) = self.agree_on_load(&source, summary, read)?;
        self.guard.bounds = Bounds::OF_CHECKPOINT;
        for (device, resident, tensor) in parts {
            self.write_resident(device, &resident, &tensor)?;
        }
        (self.progress.steps, self.progress.updates) = (manifest.step, manifest.updates());
        notes.extend(self.take_seed(Some(manifest.seed), &source));
        self.step_metrics.set_productive(productive_ms);
        self.refresh()?;
        Ok(notes)
    }

    /// Loads the newest checkpoint of the store that all processes can read. All processes call it. It skips and
    /// reports damaged checkpoints; later saves at their steps replace them. If all are damaged, it returns an error.
    ///
    /// # Errors
    /// Returns an error if a process cannot read the store, if all checkpoints are damaged, or if the newest good one
    /// does not fit the program.
    pub fn restore_newest(&mut self, store: &Store) -> Result<Restored, SessionError> {
        let (mut before, mut all) = (None, Vec::new());
        loop {
            let found = self.look_up(store, before, &mut all);
            let own = match &found {
                Ok((Some(reader), _)) => Outcome::Good(reader.manifest().step),
                Ok(_) if all.is_empty() => Outcome::Absent,
                Ok(_) => Outcome::Damaged,
                Err(error) => Outcome::Failed(error.exit_code()),
            };
            // Process 0 decides which step is loaded and which checkpoints are damaged.
            let chosen = Outcome::from_pair(self.of_first(own.to_pair())?);
            let (reader, numbers) = found?;
            chosen.check(0, store.place(), "cannot read this store")?;
            let step = match chosen {
                Outcome::Good(step) => step,
                Outcome::Absent => return Ok(Restored { found: None, damaged: Vec::new(), notes: Vec::new() }),
                // A fresh start would eventually delete checkpoints that may still be useful.
                _ if self.process_map.process == 0 => return Err(all.swap_remove(0).into()),
                _ => {
                    let (place, exit) = (store.place().into(), Exit::BadData.code());
                    let problem = "finds only damaged checkpoints".into();
                    return Err(CheckpointError::OnRank { place, rank: 0, exit, problem }.into());
                }
            };
            let [newest, cursor] = self.of_first(numbers)?;
            self.progress.damaged_up_to = self.progress.damaged_up_to.max(newest);
            let reader = reader.map_or_else(|| store.read_as(step, cursor), Ok).map_err(SessionError::from);
            self.set_activity("loading weights");
            let read = reader.and_then(|reader| self.read_parts(&reader).map(|parts| (parts, reader)));
            let own = match &read {
                Ok((_, reader)) => Outcome::Good(self.step_metrics.productive_ms(reader.manifest().job)),
                Err(SessionError::Checkpoint(CheckpointError::Deleted { .. })) => Outcome::Damaged,
                Err(SessionError::Checkpoint(error)) if error.is_damage() => Outcome::Damaged,
                Err(error) => Outcome::Failed(error.exit().code()),
            };
            let outcomes = self.combine_outcomes(own)?;
            match (read, outcomes.worst.outcome) {
                (Err(SessionError::Checkpoint(error)), Outcome::Damaged) => all.push(error),
                (Err(error), _) => return Err(error),
                (Ok((parts, reader)), Outcome::Good(_)) => {
                    // The productive time of process 0 counts for all, because the launchers of other nodes started
                    // later.
                    let notes = self.load_parts(Ok(parts), &reader, outcomes.first)?;
                    return Ok(Restored { found: Some((step, reader.manifest().cursor.clone())), damaged: all, notes });
                }
                (Ok(_), _) => {
                    outcomes.worst.check(store.place(), &format!("cannot load step {step}"))?;
                    let rank = outcomes.worst.rank;
                    let why = format!("rank {rank} cannot read its part of the checkpoint");
                    all.push(store.manifest(step).damaged(why));
                }
            }
            let is_deleted =
                self.process_map.process == 0 && store.is_committed(step).is_ok_and(|committed| !committed);
            // If the checkpoint was deleted, there may be a newer one, so the search is repeated.
            before = if is_deleted { before } else { Some(step) };
            self.progress.damaged_up_to = self.progress.damaged_up_to.max(step);
        }
    }

    /// Looks for a checkpoint on process 0. The other processes do not read the store and return no checkpoint. Also
    /// returns two numbers: the newest step with a checkpoint (0 if no newer checkpoint is damaged), and a digest of
    /// the found checkpoint's cursor.
    fn look_up(
        &self,
        store: &Store,
        before: Option<u64>,
        all_damaged: &mut Vec<CheckpointError>,
    ) -> Result<(Option<CheckpointReader>, [u64; 2]), CheckpointError> {
        if self.process_map.process != 0 {
            return Ok((None, [0; 2]));
        }
        let NewestCheckpoint { reader, damaged } = store.newest_accepted(before, |_| Ok(()))?;
        let newest = if damaged.is_empty() { 0 } else { store.steps()?.last().copied().unwrap_or(0) };
        all_damaged.extend(damaged);
        let cursor = reader.as_ref().map_or(0, |reader| reader.manifest().cursor_digest());
        Ok((reader, [newest, cursor]))
    }

    fn check_fits(&self, reader: &CheckpointReader, var: Var) -> Result<(), CheckpointError> {
        let info = self.plan.graph.tensor(var);
        let (path, name) = (reader.name(), info.name.clone());
        let saved = reader.find(&name).ok_or_else(|| CheckpointError::missing(&path, &name))?;
        let dtype = saved.info.dtype;
        if saved.info.shape != info.shape {
            let text = |dtype: DType, shape: &[usize]| format!("{dtype:?} {shape:?}");
            let (expected, got) = (text(info.dtype, &info.shape), text(dtype, &saved.info.shape));
            return Err(CheckpointError::shape(path, &name, &expected, &got));
        }
        if dtype != info.dtype {
            let (expected, got) = (format!("{:?}", info.dtype), format!("{dtype:?}"));
            return Err(CheckpointError::Dtype { path: path.into(), name, expected, got });
        }
        Ok(())
    }
}
