//! Opens committed checkpoints and reads their tensors. Reads only the requested pieces, and checks each before use.

use std::collections::BTreeMap;

use shardflow_kernels::tensor::{HostTensor, Region};

use super::error::CheckpointError;
use super::io::StoreFile;
use super::manifest::{Checksum, Manifest, Piece, Shard, StoredTensor, newer_version, open_sealed};
use super::store::{CURSOR, CURSOR_BYTES_MAX, NewCursor, Store};
use crate::sbp::region::{contains, copy_box, filled};

/// A committed checkpoint, open for reading. See [`Store::read`].
#[derive(Debug)]
pub struct CheckpointReader {
    store: Store,
    manifest: Manifest,
    by_name: BTreeMap<String, usize>,
}

impl Store {
    /// Opens a committed checkpoint. Checks its manifest and the sizes of all shards; later reads check their contents.
    ///
    /// # Errors
    /// [`CheckpointError`]: `Absent`; `Damaged`, which names the file; `Deleted` if another process has deleted the
    /// checkpoint; `Newer`; or the store's error.
    pub fn read(&self, step: u64) -> Result<CheckpointReader, CheckpointError> {
        let (file, text) = (self.manifest(step), self.manifest_text(step)?);
        let mut manifest = Manifest::decode(&text).map_err(|why| match newer_version(&text) {
            Some(version) => CheckpointError::Newer { file: file.name.clone(), version },
            None => file.damaged(why),
        })?;
        if manifest.step != step {
            return Err(file.damaged(format!("it belongs to step {}, expected {step}", manifest.step)));
        }
        let is_complete = |files: &BTreeMap<_, _>| manifest.shards.iter().all(|shard| files.contains_key(&shard.file));
        let listed = self.operations.wait_visible(|| Ok(Some(self.list(Some(step), true)?).filter(is_complete)))?;
        let files = listed.map_or_else(|| self.list(Some(step), true), Ok)?;
        for shard in &manifest.shards {
            let why = match files.get(&shard.file).copied().flatten() {
                Some(bytes) if bytes == shard.bytes => continue,
                Some(bytes) => format!("it is {bytes} bytes long, expected {}", shard.bytes),
                None => "the file is missing".into(),
            };
            return Err(self.damaged_or_deleted(step, self.file(step, &shard.file).damaged(why)));
        }
        if files.contains_key(CURSOR) {
            self.read_cursor(step, &text, &mut manifest)?;
        }
        let names = manifest.tensors.iter().enumerate();
        let by_name = names.map(|(index, tensor)| (tensor.info.name.clone(), index)).collect();
        Ok(CheckpointReader { store: self.clone(), manifest, by_name })
    }

    /// Returns `damaged`, or `Deleted` if the step has no manifest: a deletion removes the manifest first (ST-3).
    fn damaged_or_deleted(&self, step: u64, damaged: CheckpointError) -> CheckpointError {
        match self.is_committed(step) {
            Ok(false) => CheckpointError::Deleted { place: self.place().into(), step },
            _ => damaged,
        }
    }

    fn read_cursor(&self, step: u64, text: &[u8], manifest: &mut Manifest) -> Result<(), CheckpointError> {
        let file = self.file(step, CURSOR);
        let Some(sealed) = self.operations.get(&file, CURSOR_BYTES_MAX)? else { return Ok(()) };
        let new: NewCursor = open_sealed("shardflow-cursor", &sealed).map_err(|why| file.damaged(why))?;
        if new.manifest == Checksum::of(text) {
            manifest.cursor = new.cursor;
        }
        Ok(())
    }

    /// Like [`Store::read`], but waits until the digest of the checkpoint's cursor equals rank 0's digest `cursor`.
    pub(crate) fn read_as(&self, step: u64, cursor: u64) -> Result<CheckpointReader, CheckpointError> {
        let attempt = || match self.read(step) {
            Ok(reader) if reader.manifest().cursor_digest() != cursor => Ok(None),
            Err(CheckpointError::Absent { .. }) => Ok(None),
            result => result.map(Some),
        };
        let mismatch = || {
            let why = format!("{}: its cursor differs from the one that rank 0 reads", self.manifest(step).name);
            self.read(step).and(Err(CheckpointError::Refused(why)))
        };
        self.operations.wait_visible(attempt)?.map_or_else(mismatch, Ok)
    }
}

impl CheckpointReader {
    /// The checkpoint's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Name of the checkpoint in errors.
    pub fn name(&self) -> String {
        self.store.manifest(self.manifest.step).name
    }

    /// Finds a tensor by name.
    pub fn find(&self, name: &str) -> Option<&StoredTensor> {
        self.by_name.get(name).map(|index| &self.manifest.tensors[*index])
    }

    /// Like [`CheckpointReader::tensors`], but for one box. The call needs memory for the box and for one piece.
    pub fn tensor(&self, name: &str, region: &Region) -> Result<HostTensor, CheckpointError> {
        Ok(self.tensors(name, std::slice::from_ref(region))?.swap_remove(0))
    }

    /// Reads boxes of a tensor. The boxes refer to the program's shape. Each piece is read at most once.
    ///
    /// # Errors
    /// [`CheckpointError`]: `Unfit` if the tensor is unknown or a box is outside it; else as for [`Store::read`].
    pub fn tensors(&self, name: &str, regions: &[Region]) -> Result<Vec<HostTensor>, CheckpointError> {
        let tensor = self.find(name).ok_or_else(|| CheckpointError::missing(self.name(), name))?;
        let (whole, dtype) = (Region::whole(&tensor.info.shape), tensor.info.dtype);
        let mut out = Vec::with_capacity(regions.len());
        for region in regions {
            if region.start.len() != whole.size.len() || !contains(&whole, region) {
                let (expected, got) = (format!("{region:?}"), format!("shape {:?}", whole.size));
                return Err(CheckpointError::shape(self.name(), name, &expected, &got));
            }
            out.push(filled(&region.size, dtype, 0.0));
        }
        for piece in &tensor.pieces {
            let from = piece.region();
            let common = |region: &Region| if region.is_empty() { None } else { from.intersect(region) };
            let wanted: Vec<Option<Region>> = regions.iter().map(common).collect();
            if wanted.iter().all(Option::is_none) {
                continue;
            }
            let elements = self.piece(tensor, piece)?;
            for ((out, region), common) in out.iter_mut().zip(regions).zip(wanted) {
                if let Some(common) = common {
                    copy_box(&elements, &common.relative_to(&from), out, &common.relative_to(region));
                }
            }
        }
        Ok(out)
    }

    fn piece(&self, tensor: &StoredTensor, piece: &Piece) -> Result<HostTensor, CheckpointError> {
        let shard = &self.manifest.shards[piece.shard];
        let file = self.store.file(self.manifest.step, &shard.file);
        let dtype = tensor.info.dtype;
        let bytes = (piece.region().element_count() * dtype.bytes()) as u64;
        let got = self.range(shard, &file, piece.offset, bytes)?;
        if Checksum::of(&got) != piece.blake3 {
            let (name, offset) = (&tensor.info.name, piece.offset);
            return Err(file.damaged(format!("tensor {name}: wrong checksum of {bytes} bytes at offset {offset}")));
        }
        Ok(HostTensor::from_le_bytes(dtype, &piece.size, &got))
    }

    /// Reads bytes of a shard. Reports a shard of the wrong size as damage, not as a failure of the store.
    fn range(&self, shard: &Shard, file: &StoreFile, from: u64, bytes: u64) -> Result<Vec<u8>, CheckpointError> {
        let operations = &self.store.operations;
        let result = operations.get_range(file, from, bytes);
        if result.as_ref().is_ok_and(|got| got.len() as u64 == bytes) {
            return result;
        }
        let is_hidden = operations.size(file)?.is_none();
        let why = match operations.wait_visible(|| operations.size(file))? {
            Some(size) if size == shard.bytes && is_hidden => return operations.get_range(file, from, bytes),
            Some(size) if size == shard.bytes => format!("got {} of {bytes} bytes at offset {from}", result?.len()),
            Some(size) => format!("it is {size} bytes long, expected {}", shard.bytes),
            None => "the file is missing".into(),
        };
        Err(self.store.damaged_or_deleted(self.manifest.step, file.damaged(why)))
    }

    /// Reads every shard and verifies its checksum.
    ///
    /// # Errors
    /// [`CheckpointError`]: `Damaged` with the first altered shard; `Deleted`; or the store's error.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        for shard in &self.manifest.shards {
            let file = self.store.file(self.manifest.step, &shard.file);
            let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
            while at < shard.bytes {
                let bytes = (shard.bytes - at).min(self.store.operations.part_bytes as u64);
                hasher.update(&self.range(shard, &file, at, bytes)?);
                at += bytes;
            }
            let got = Checksum(hasher.finalize());
            if got != shard.blake3 {
                return Err(file.damaged(format!("checksum: expected {:?}, got {got:?}", shard.blake3)));
            }
        }
        Ok(())
    }
}
