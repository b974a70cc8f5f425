//! Converts a checkpoint to a safetensors file or to another number of shards, one tensor or piece at a time.

use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

use shardflow_kernels::tensor::{Region, split_range};

use super::agreement::{SaveId, SaveOutcome};
use super::error::CheckpointError;
use super::manifest::{Manifest, Piece, SHARDS_MAX, StoredTensor};
use super::read::CheckpointReader;
use super::save::{SHARD, commit_manifest, part_file};
use super::shard::{self, Entry, header, metadata, write_whole};
use super::store::Store;
use crate::lock::Lock;

/// Writes a checkpoint as one safetensors file, in the form that `Session::save` writes. No incomplete file appears.
///
/// # Errors
/// [`CheckpointError::Io`] if the file cannot be written, else the [`CheckpointError`] of reading the checkpoint.
pub fn export(reader: &CheckpointReader, path: &Path) -> Result<(), CheckpointError> {
    let mut tensors: Vec<&StoredTensor> = reader.manifest().tensors.iter().collect();
    tensors.sort_by(|a, b| a.info.name.cmp(&b.info.name));
    let entry =
        |t: &&StoredTensor| Entry { name: t.info.name.clone(), dtype: t.info.dtype, shape: t.info.saved_shape.clone() };
    let manifest = reader.manifest();
    let metadata = metadata(manifest.step, manifest.updates(), manifest.seed, &manifest.declared);
    let header = header(&tensors.iter().map(entry).collect::<Vec<_>>(), &metadata)?;
    let failed = |source| CheckpointError::Io { path: path.into(), source };
    write_whole(path, |out| {
        out.write_all(&header).map_err(failed)?;
        for tensor in &tensors {
            let whole = reader.tensor(&tensor.info.name, &Region::whole(&tensor.info.shape))?;
            out.write_all(whole.as_bytes()).map_err(failed)?;
        }
        Ok(())
    })
}

/// Writes a checkpoint to another store in `shards` shards. Each tensor is split over the shards along its first dim,
/// like layout `S0` on the mesh `shard=<shards>`. Everything else is unchanged, and any mesh can load the result.
///
/// # Errors
/// [`CheckpointError::Exists`] if the target already has the step, else the error of reading or writing.
pub fn reshard(reader: &CheckpointReader, target: &Store, shards: u32) -> Result<(), CheckpointError> {
    if shards == 0 || shards as usize > SHARDS_MAX {
        return Err(CheckpointError::Refused(format!("cannot write {shards} shards, expected 1 to {SHARDS_MAX}")));
    }
    let source = reader.manifest();
    let exists = || CheckpointError::Exists { file: target.manifest(source.step).name, step: source.step };
    if target.is_committed(source.step)? {
        return Err(exists());
    }
    let _lock = Lock::take(target, None, 0)?;
    let mesh = format!("shard={shards}");
    let mut manifest = Manifest { mesh: mesh.clone(), shards: Vec::new(), tensors: Vec::new(), ..source.clone() };
    for tensor in &source.tensors {
        let mut info = tensor.info.clone();
        info.layout = if info.shape.is_empty() { "(B)" } else { "(S0)" }.into();
        (info.axes, info.devices) = (mesh.clone(), (0..shards as usize).collect());
        manifest.tensors.push(StoredTensor { info, pieces: Vec::new() });
    }
    for index in 0..shards {
        write_part(reader, target, &mut manifest, index, shards)?;
    }
    match commit_manifest(target, &manifest)? {
        SaveOutcome::Committed => Ok(()),
        SaveOutcome::AlreadyThere => Err(exists()),
    }
}

/// Writes one shard of a resharded checkpoint, and adds it to the manifest.
fn write_part(
    reader: &CheckpointReader,
    target: &Store,
    manifest: &mut Manifest,
    index: u32,
    shards: u32,
) -> Result<(), CheckpointError> {
    let mut parts: Vec<(usize, Region)> = Vec::new();
    for (tensor, StoredTensor { info, .. }) in manifest.tensors.iter().enumerate() {
        let mut region = Region::whole(&info.shape);
        match region.size.first().copied() {
            Some(rows) => {
                let rows = split_range(rows, shards as usize, index as usize);
                (region.start[0], region.size[0]) = (rows.start, rows.len());
            }
            // A scalar is stored in the first shard.
            None if index > 0 => continue,
            None => {}
        }
        if !region.is_empty() {
            parts.push((tensor, region));
        }
    }
    let entry = |(tensor, region): &(usize, Region)| Entry::of_piece(&manifest.tensors[*tensor].info, region);
    let entries: Vec<Entry> = parts.iter().map(entry).collect();
    let save = SaveId { epoch: manifest.epoch, step: manifest.step, attempt: 0 };
    let file = part_file(save, index, shards, SHARD);
    let content = |part: usize| {
        let (tensor, region) = &parts[part];
        Ok(Cow::Owned(reader.tensor(&manifest.tensors[*tensor].info.name, region)?))
    };
    let (shard, written) = shard::write(target, manifest.step, &file, &entries, content)?;
    for ((tensor, Region { start, size }), (offset, blake3)) in parts.into_iter().zip(written) {
        let piece = Piece { shard: index as usize, offset, start, size, blake3 };
        manifest.tensors[tensor].pieces.push(piece);
    }
    manifest.shards.push(shard);
    Ok(())
}
