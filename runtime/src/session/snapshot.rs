//! A session's part of a checkpoint: a snapshot taken between two steps, and its restoration under any mesh.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use shardflow_kernels::tensor::{DType, HostData, HostTensor, Region};

use super::agreement::{LoadSummary, digest_of};
use super::budget::{SNAPSHOTS_MAX, saved_parts};
use super::{Session, SessionError, resident_parts};
use crate::checkpoint::agreement::{ProcessRank, SaveAgreement, SingleProcess};
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::manifest::{Cursor, TensorKind, TensorMeta};
use crate::checkpoint::read::CheckpointReader;
use crate::checkpoint::snapshot::{Snapshot, SnapshotPiece};
use crate::checkpoint::store::{NewestCheckpoint, Store};
use crate::graph::optimizer::Bounds;
use crate::graph::{NodeOp, Var};
use crate::plan::ResidentTensor;
use shardflow_job::exit::Exit;

/// Result of [`Session::restore_newest`].
#[derive(Debug)]
pub struct Restored {
    /// Step and cursor of the loaded checkpoint; `None` if there is none, and the session is unchanged.
    pub found: Option<(u64, Cursor)>,
    /// Errors of newer checkpoints, which are damaged and were skipped.
    pub damaged: Vec<CheckpointError>,
    /// Notes on the loaded checkpoint, one line each: different declared values, another seed, skipped optimizer
    /// states.
    pub notes: Vec<String>,
}

/// Result of the first process's lookup in a store.
struct Lookup {
    reader: Result<Option<CheckpointReader>, CheckpointError>,
    damaged: Vec<CheckpointError>,
    /// The step, or one of the codes below.
    step: u64,
    /// The newest step with a checkpoint, if some are damaged; else 0.
    newest: u64,
    /// Digest of the checkpoint's cursor.
    cursor: u64,
}

/// Outcome codes that processes exchange while they search for a checkpoint. All of them are larger than any step.
const GOOD: u64 = u64::MAX - 3;
const DAMAGED: u64 = u64::MAX - 2;
const NONE: u64 = u64::MAX - 1;
const FAILED: u64 = u64::MAX;

/// A part of a checkpoint with its destination.
struct Part {
    device: usize,
    resident: ResidentTensor,
    tensor: HostTensor,
}

/// The parts of a checkpoint that this process loads.
struct Parts {
    parts: Vec<Part>,
    /// Notes for the user, one line each.
    notes: Vec<String>,
}

impl Session {
    /// The tensors of a checkpoint, with their kinds.
    pub(super) fn residents(&self) -> impl Iterator<Item = (Var, TensorKind)> {
        self.plan.graph.nodes().iter().filter_map(|node| match node.op {
            NodeOp::Parameter { .. } => Some((node.outputs[0], TensorKind::Parameter)),
            NodeOp::State => Some((node.outputs[0], TensorKind::State)),
            _ => None,
        })
    }

    /// Arguments for a [`crate::checkpoint::Saver`] of this session: the agreement of its processes, and this process's
    /// rank. Checks the node's memory for the snapshots that a saver holds, so that a job without room for them fails
    /// before it trains.
    ///
    /// # Errors
    /// [`crate::plan::validate::PlanError::NodeMemory`]; the other processes end with it, too.
    pub fn agreement(&self) -> Result<(Arc<dyn SaveAgreement>, ProcessRank), SessionError> {
        let checked = self.budget.check(&self.plan, &self.process_map, &self.node_processes, SNAPSHOTS_MAX);
        checked.map_err(|error| match &self.world {
            Some(world) => world.cannot_start(error.into()),
            None => error.into(),
        })?;
        let alone = || {
            (Arc::new(SingleProcess) as Arc<dyn SaveAgreement>, ProcessRank { epoch: self.job.1, ..ProcessRank::ALONE })
        };
        Ok(self.world.as_ref().map_or_else(alone, |world| world.agree()))
    }

    /// True if the restore found the checkpoint of this step damaged, where there is one. A save replaces it.
    pub(crate) fn is_known_damaged(&self, step: u64) -> bool {
        step <= self.damaged_up_to
    }

    /// Ranks of the devices that this process hosts.
    fn hosted(&self) -> Range<usize> {
        self.process_map.own()
    }

    /// Copies the hosted devices' parameters and optimizer state to host memory, reusing the buffers of `spare` if
    /// given. The cursor is empty. Call it between steps.
    ///
    /// # Errors
    /// The failure of an earlier step.
    pub fn snapshot(&self, spare: Option<Snapshot>) -> Result<Snapshot, SessionError> {
        self.snapshot_of(self.hosted(), spare)
    }

    /// Like [`Session::snapshot`], for these devices only. A part that several devices of the mesh hold belongs to the
    /// snapshot of the first of them, in the order of the placement.
    ///
    /// # Errors
    /// The failure of an earlier step.
    pub fn snapshot_of(&self, devices: Range<usize>, spare: Option<Snapshot>) -> Result<Snapshot, SessionError> {
        self.check_not_failed()?;
        let mut spare = spare.map(|s| s.pieces).unwrap_or_default().into_iter();
        let (mut tensors, mut pieces) = (Vec::new(), Vec::new());
        for (var, kind) in self.residents() {
            let parts = saved_parts(&self.plan, var).into_iter().filter(|(device, _)| devices.contains(device));
            for (device, ResidentTensor { region, dtype, offset, .. }) in parts {
                let mut data = reuse_buffer(spare.next(), *dtype, region);
                self.arenas[&device].read_host_into(*offset, &mut data)?;
                pieces.push(SnapshotPiece { tensor: tensors.len(), region: region.clone(), data });
            }
            tensors.push(self.tensor_info(var, kind));
        }
        let (mesh, cursor) = (self.plan.graph.mesh().to_string(), Cursor::new());
        let job = self.step_metrics.job_time();
        let (step, updates, seed) = (self.steps, self.updates, self.seed);
        let declared = self.declared.values();
        Ok(Snapshot { step, updates, seed, mesh, cursor, declared, job, tensors, pieces })
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
            layout: info.layout.as_ref().map(ToString::to_string).unwrap_or_default(),
            axes: placement.axes_text(),
            devices: placement.devices().to_vec(),
        }
    }

    /// Loads a checkpoint of any mesh; each hosted device reads only its part. All processes call it. The next step is
    /// the one after the checkpoint's, and the checkpoint's seed replaces the session's, so that dropout masks continue
    /// unchanged. Returns notes for the user, one line each.
    ///
    /// # Errors
    /// [`CheckpointError`], with the file, or [`SessionError::Disagreement`] if two ranks have different checkpoints;
    /// in both cases nothing was changed.
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
        let mut found: Vec<Part> = Vec::new();
        for (var, _) in self.residents() {
            self.check_fits(reader, var)?;
            let hosted = self.hosted();
            let parts = resident_parts(&self.plan, var).into_iter().filter(|part| hosted.contains(&part.0));
            // Each region is read once, for all devices that hold it.
            let mut regions: Vec<Region> = Vec::new();
            let mut destinations = Vec::new();
            for (device, _, resident) in parts {
                let index = regions.iter().position(|r| *r == resident.region).unwrap_or(regions.len());
                if index == regions.len() {
                    regions.push(resident.region.clone());
                }
                destinations.push((device, resident, index));
            }
            let tensors = reader.tensors(&self.plan.graph.tensor(var).name, &regions)?;
            let part = |(device, resident, index): (_, &ResidentTensor, usize)| Part {
                device,
                resident: resident.clone(),
                tensor: tensors[index].clone(),
            };
            found.extend(destinations.into_iter().map(part));
        }
        Ok(Parts { parts: found, notes })
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
        let Parts { parts, mut notes } = self.agree_on_load(&source, summary, read)?;
        self.bounds = Bounds::OF_CHECKPOINT;
        for Part { device, resident, tensor } in parts {
            self.write_resident(device, &resident, &tensor)?;
        }
        (self.steps, self.updates) = (manifest.step, manifest.updates());
        notes.extend(self.take_seed(Some(manifest.seed), &source));
        self.step_metrics.set_productive(productive_ms);
        self.refresh()?;
        Ok(notes)
    }

    /// Loads the newest undamaged checkpoint of the store. Damaged ones are skipped and reported, and replaced when
    /// training reaches their steps again; if there are only damaged ones, that is an error. If several processes run the plan, all call it, and all load the same
    /// checkpoint: none loads one that another process cannot read.
    ///
    /// # Errors
    /// When the store cannot be read, or its newest good checkpoint does not fit the program, on any process.
    pub fn restore_newest(&mut self, store: &Store) -> Result<Restored, SessionError> {
        let (mut before, mut all) = (None, Vec::new());
        loop {
            let Lookup { reader, damaged, step, newest, cursor } = self.look_up(store, before);
            all.extend(damaged);
            // The first process decides which step is loaded and which are damaged.
            let [chosen, newest] = self.exchange([step, newest])?[0];
            let [cursor, damaged_count] = self.exchange([cursor, all.len() as u64])?[0];
            let step = match chosen {
                NONE if damaged_count == 0 => {
                    return Ok(Restored { found: None, damaged: Vec::new(), notes: Vec::new() });
                }
                // To start anew would in time delete what may still be of use.
                NONE => {
                    let (place, problem) = (store.place().into(), "finds only damaged checkpoints".into());
                    let error = CheckpointError::OnRank { place, rank: 0, exit: Exit::BadData.code(), problem };
                    return Err(if self.process_map.process == 0 { all.swap_remove(0) } else { error }.into());
                }
                FAILED => {
                    let (place, problem) = (store.place().into(), "cannot read it".into());
                    let elsewhere = CheckpointError::OnRank { place, rank: 0, exit: newest as u8, problem };
                    return Err(reader.err().unwrap_or(elsewhere).into());
                }
                step => step,
            };
            self.damaged_up_to = self.damaged_up_to.max(newest);
            let reader = match reader {
                Ok(None) => store.read_as(step, cursor),
                Ok(Some(reader)) => Ok(reader),
                Err(error) => Err(error),
            };
            self.set_activity("loading weights");
            let read = reader.map_err(SessionError::from);
            let read = read.and_then(|reader| self.read_parts(&reader).map(|parts| (parts, reader)));
            let own = match &read {
                Ok(_) => GOOD,
                Err(SessionError::Checkpoint(error)) if error.is_damage() => DAMAGED,
                Err(_) => FAILED,
            };
            // With the outcome: the productive time, or the exit code of the error.
            let detail = match &read {
                Ok((_, reader)) => self.step_metrics.productive_ms(reader.manifest().job),
                Err(error) => u64::from(error.exit().code()),
            };
            let outcomes = self.exchange([own, detail])?;
            let (worst, process) =
                outcomes.iter().enumerate().map(|(p, outcome)| (outcome[0], p)).max().unwrap_or((FAILED, 0));
            match (read, worst) {
                (Ok((parts, reader)), GOOD) => {
                    // The first process's productive time counts: launchers of other nodes began the job a little
                    // later.
                    let notes = self.load_parts(Ok(parts), &reader, outcomes[0][1])?;
                    return Ok(Restored { found: Some((step, reader.manifest().cursor.clone())), damaged: all, notes });
                }
                (Err(SessionError::Checkpoint(error)), DAMAGED) => all.push(error),
                (Ok(_), DAMAGED) => {
                    let why = format!("rank {process} cannot read its part");
                    all.push(CheckpointError::Damaged { file: store.manifest_name(step), why });
                }
                (Err(error), _) => return Err(error),
                (Ok(_), _) => {
                    let (place, problem) = (store.place().into(), format!("cannot load step {step}"));
                    let (rank, exit) = (process as u32, outcomes[process][1] as u8);
                    return Err(CheckpointError::OnRank { place, rank, exit, problem }.into());
                }
            }
            (before, self.damaged_up_to) = (Some(step), self.damaged_up_to.max(step));
        }
    }

    /// Looks for a checkpoint on the first process; the others return an empty result without reading the store.
    fn look_up(&self, store: &Store, before: Option<u64>) -> Lookup {
        let nothing = |reader, step| Lookup { reader, damaged: Vec::new(), step, newest: 0, cursor: 0 };
        if self.process_map.process != 0 {
            return nothing(Ok(None), NONE);
        }
        let found = store.newest_before(before).and_then(|NewestCheckpoint { reader, damaged }| {
            let steps = if damaged.is_empty() { Vec::new() } else { store.steps()? };
            let manifest = reader.as_ref().map(CheckpointReader::manifest);
            let (step, cursor) = manifest.map_or((NONE, 0), |manifest| (manifest.step, manifest.cursor_digest()));
            Ok(Lookup { reader: Ok(reader), damaged, step, newest: steps.last().copied().unwrap_or(0), cursor })
        });
        found.unwrap_or_else(|error| {
            let newest = u64::from(error.exit_code());
            Lookup { newest, ..nothing(Err(error), FAILED) }
        })
    }

    fn check_fits(&self, reader: &CheckpointReader, var: Var) -> Result<(), CheckpointError> {
        let info = self.plan.graph.tensor(var);
        let (path, name) = (reader.name(), info.name.clone());
        let saved = reader.find(&name);
        let saved = saved.ok_or_else(|| CheckpointError::missing(&path, &name))?;
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

/// A tensor to read into. Reuses the buffer of `spare` if it has the right type.
fn reuse_buffer(spare: Option<SnapshotPiece>, dtype: DType, region: &Region) -> HostTensor {
    let data = spare.map(|piece| piece.data).filter(|data| data.dtype() == dtype).map(|data| data.data);
    let data = data.unwrap_or(HostData::empty(dtype));
    HostTensor { shape: region.size.clone(), data }
}
