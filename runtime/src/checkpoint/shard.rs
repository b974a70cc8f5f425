//! Shards: safetensors files of pieces, written as a stream. A sidecar lists the content of each shard for process 0.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo as View};
use serde::{Deserialize, Serialize};
use shardflow_kernels::tensor::{DType, HostTensor, Region, element_count};

use super::error::CheckpointError;
use super::manifest::{Checksum, Shard, TensorMeta};
use super::store::Store;
use crate::declare::Values;

pub(crate) const STEPS: &str = "shardflow.steps";
pub(crate) const UPDATES: &str = "shardflow.updates";
pub(crate) const SEED: &str = "shardflow.seed";
/// Prefix of the keys of declared values.
const DECLARED: &str = "shardflow.declared.";

// Elements are written in memory order.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints require a little-endian machine");

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
}

impl Entry {
    /// The entry of a piece. Its name is the tensor's name, followed by the box if the piece is not the whole tensor.
    pub(crate) fn of_piece(info: &TensorMeta, region: &Region) -> Self {
        let (mut name, dtype, shape) = (info.name.clone(), info.dtype, region.size.clone());
        if shape != info.shape {
            let range = |(start, size): (&usize, &usize)| format!("{start}:{}", start + size);
            let ranges: Vec<String> = region.start.iter().zip(&region.size).map(range).collect();
            name = format!("{name}[{}]", ranges.join(","));
        }
        Self { name, dtype, shape }
    }

    pub(crate) fn bytes(&self) -> u64 {
        (element_count(&self.shape) * self.dtype.bytes()) as u64
    }
}

pub(crate) fn metadata(steps: u64, updates: u64, seed: u64, declared: &Values) -> Values {
    let numbers = [(STEPS, steps), (UPDATES, updates), (SEED, seed)];
    let numbers = numbers.into_iter().map(|(key, number)| (key.to_owned(), number.to_string()));
    numbers.chain(declared.iter().map(|(name, value)| (format!("{DECLARED}{name}"), value.clone()))).collect()
}

pub(crate) fn declared_of(metadata: &HashMap<String, String>) -> Values {
    let named = |(key, value): (&String, &String)| Some((key.strip_prefix(DECLARED)?.to_owned(), value.clone()));
    metadata.iter().filter_map(named).collect()
}

/// JSON header of a safetensors file. The `safetensors` crate uses a hash map, whose order differs between runs.
#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    metadata: &'a Values,
    #[serde(flatten)]
    tensors: Metadata,
}

/// Encodes the header of a safetensors file; equal entries and metadata result in equal bytes.
pub(crate) fn header(entries: &[Entry], metadata: &Values) -> Result<Vec<u8>, CheckpointError> {
    let mut end = 0;
    let view = |entry: &Entry| {
        let start = end;
        end += entry.bytes() as usize;
        let dtype = match entry.dtype {
            DType::F32 => Dtype::F32,
            DType::I32 => Dtype::I32,
            DType::BF16 => Dtype::BF16,
        };
        (entry.name.clone(), View { dtype, shape: entry.shape.clone(), data_offsets: (start, end) })
    };
    let views = entries.iter().map(view).collect();
    let refused = |why: String| CheckpointError::Refused(format!("cannot make a safetensors header: {why}"));
    let tensors = Metadata::new(None, views).map_err(|e| refused(e.to_string()))?;
    let mut text = serde_json::to_vec(&Header { metadata, tensors }).map_err(|e| refused(e.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok(header)
}

/// Writes a shard. At most one entry of `content` is in memory at a time. Returns the file, and the offset and checksum
/// of each entry.
pub(crate) fn write<'a>(
    store: &Store,
    step: u64,
    file: &str,
    entries: &[Entry],
    mut content: impl FnMut(usize) -> Result<Cow<'a, HostTensor>, CheckpointError>,
) -> Result<(Shard, Vec<(u64, Checksum)>), CheckpointError> {
    let header = header(entries, &Values::from([(STEPS.to_owned(), step.to_string())]))?;
    let mut offset = header.len() as u64;
    let bytes = offset + entries.iter().map(Entry::bytes).sum::<u64>();
    let mut upload = store.operations.upload(store.file(step, file), bytes);
    upload.push(&header)?;
    let mut written = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let tensor = content(index)?;
        let elements = tensor.as_bytes();
        assert_eq!(elements.len() as u64, entry.bytes(), "{}: content and entry differ in size", entry.name);
        upload.push(elements)?;
        written.push((offset, Checksum::of(elements)));
        offset += entry.bytes();
    }
    let blake3 = upload.finish()?;
    Ok((Shard { file: file.into(), bytes, blake3 }, written))
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sidecar {
    pub(crate) step: u64,
    pub(crate) epoch: u64,
    pub(crate) attempt: u32,
    pub(crate) process: u32,
    pub(crate) processes: u32,
    pub(crate) shard: Shard,
    pub(crate) pieces: Vec<SidecarPiece>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SidecarPiece {
    pub(crate) tensor: String,
    pub(crate) offset: u64,
    pub(crate) start: Vec<usize>,
    pub(crate) size: Vec<usize>,
    pub(crate) blake3: Checksum,
}

/// Writes a temporary file beside `path`, syncs it, and renames it.
pub(crate) fn write_whole<E: From<CheckpointError>>(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<fs::File>) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |source| E::from(CheckpointError::Io { path: path.into(), source });
    if path.exists() && !path.is_file() {
        // A rename onto a folder fails anyway, but a rename onto a device or a pipe would replace the device or pipe.
        let kind = std::io::ErrorKind::InvalidInput;
        return Err(failed(std::io::Error::new(kind, "the path exists and is not a file")));
    }
    // A symbolic link stays; the rename replaces its target.
    let target = path.canonicalize().unwrap_or_else(|_| path.into());
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = target.with_file_name(name);
    let write = || {
        let mut file = BufWriter::new(fs::File::create(&part).map_err(failed)?);
        content(&mut file)?;
        let synced = file.flush().and_then(|()| file.get_ref().sync_all());
        synced.and_then(|()| fs::rename(&part, &target)).map_err(failed)
    };
    write().inspect_err(|_| drop(std::fs::remove_file(&part)))
}
