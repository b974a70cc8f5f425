//! The manifest describes a checkpoint. This file defines a manifest's text form, its checksum and its checks.
//!
//! A manifest is untrusted input. [`Manifest::decode`] checks its invariants:
//! - MF-1: it is unaltered (checksum), has a known version, and is within the limits below.
//! - MF-2: every region lies inside its tensor, and a tensor's pieces cover each element exactly once.
//! - MF-3: every piece lies inside its shard, and every shard inside the checkpoint's folder.

use std::collections::{BTreeMap, BTreeSet};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use shardflow_kernels::tensor::{DType, Region};

use crate::declare::{DECLARED_MAX, Values};

const FORMAT: &str = "shardflow-checkpoint";
/// Version of the format. Version 2 added [`JobTime`]; 3 added [`Manifest::updates`] and [`Manifest::declared`].
pub(crate) const VERSION: u32 = 3;
/// Largest size of a manifest, in bytes.
pub const MANIFEST_BYTES_MAX: u64 = 256 << 20;
const TENSORS_MAX: usize = 1 << 18;
/// Maximum number of shards of a checkpoint.
pub const SHARDS_MAX: usize = 1 << 16;
/// Maximum number of pieces of one tensor. The number is limited because a check compares each pair of pieces.
pub const TENSOR_PIECES_MAX: usize = 1 << 12;
const PIECES_MAX: usize = 1 << 20;
const DIMS_MAX: usize = 32;
/// Largest size of a name or of another text, in bytes.
pub const TEXT_BYTES_MAX: usize = 1 << 12;
const CURSOR_ENTRIES_MAX: usize = 1 << 10;

/// The state that the user's program needs to resume, besides the number of steps. The program chooses its content.
pub type Cursor = BTreeMap<String, String>;

/// Role of a tensor in the training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TensorKind {
    /// A parameter.
    Parameter,
    /// A state of the optimizer.
    State,
}

/// Names of element types in the manifest. Shards store elements in little-endian order.
#[derive(Serialize, Deserialize)]
#[serde(remote = "DType")]
enum Element {
    F32,
    I32,
    BF16,
}

/// A BLAKE3 checksum.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Checksum(pub(crate) blake3::Hash);

impl Checksum {
    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes))
    }
}

impl From<Checksum> for String {
    fn from(sum: Checksum) -> Self {
        sum.0.to_string()
    }
}

impl TryFrom<String> for Checksum {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hash = blake3::Hash::from_hex(&text).map_err(|_| format!("{text:?} is not a BLAKE3 checksum"))?;
        // Accept only one spelling, so that every altered byte of a file is detected.
        if hash.to_string() == text { Ok(Self(hash)) } else { Err(format!("{text:?} is not in lower case")) }
    }
}

impl std::fmt::Debug for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A file that holds pieces of tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Path in the checkpoint's folder: `e<epoch>-<attempt>/shard-<process>-of-<processes>.safetensors`.
    pub file: String,
    /// Size of the file, in bytes.
    pub bytes: u64,
    /// BLAKE3 of the whole file.
    pub blake3: Checksum,
}

/// A box of a tensor, and its location in a shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Index of the shard.
    pub shard: usize,
    /// Offset of the first element in the shard, in bytes.
    pub offset: u64,
    /// First index in each dim of the tensor.
    pub start: Vec<usize>,
    /// Extent in each dim.
    pub size: Vec<usize>,
    /// BLAKE3 of the elements' bytes.
    pub blake3: Checksum,
}

impl Piece {
    /// The box as a region of the tensor.
    pub fn region(&self) -> Region {
        Region { start: self.start.clone(), size: self.size.clone() }
    }
}

/// Metadata of a tensor, equal on all processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorMeta {
    /// Name of the tensor, unique in the checkpoint.
    pub name: String,
    /// Role of the tensor.
    pub kind: TensorKind,
    /// Element type.
    #[serde(with = "Element")]
    pub dtype: DType,
    /// Shape in the program. Regions refer to this shape.
    pub shape: Vec<usize>,
    /// Shape in an exported file, with the same number of elements.
    pub saved_shape: Vec<usize>,
    /// SBP along each axis of the placement, such as `(S0, B)`.
    pub layout: String,
    /// Axes of the placement, such as `data=2,tensor=2`.
    pub axes: String,
    /// Ranks of the placement's devices, row-major over its axes.
    pub devices: Vec<usize>,
}

impl TensorMeta {
    /// Number of elements; `None` if the tensor has more than `isize::MAX` bytes.
    fn elements(&self) -> Option<usize> {
        let element = self.dtype.bytes();
        let bytes = self.shape.iter().try_fold(element, |product, extent| product.checked_mul(*extent))?;
        (bytes <= isize::MAX as usize).then_some(bytes / element)
    }
}

/// A tensor and the location of its elements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredTensor {
    /// Metadata of the tensor.
    pub info: TensorMeta,
    /// The pieces that hold its elements.
    pub pieces: Vec<Piece>,
}

/// Time statistics of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobTime {
    /// Start of the job as Unix time in milliseconds. All attempts of one job have the same value.
    pub began_ms: u64,
    /// Total duration of the steps whose updates are part of the model, in milliseconds.
    pub productive_ms: u64,
}

/// A whole checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Number of completed steps.
    pub step: u64,
    /// Number of applied updates, without skipped steps. `None` in a manifest of version 1 or 2.
    #[serde(default)]
    pub updates: Option<u64>,
    /// Incarnation of the job that wrote the checkpoint.
    pub epoch: u64,
    /// Mesh of the job that wrote the checkpoint. Any other mesh can load it.
    pub mesh: String,
    /// The seed. Initial weights and dropout masks depend only on the seed and `step`; random generators keep no state.
    pub seed: u64,
    /// The program's cursor.
    pub cursor: Cursor,
    /// Values that the program declared. Empty in a manifest of version 1 or 2.
    #[serde(default)]
    pub declared: Values,
    /// Version of Shardflow that wrote the checkpoint.
    pub writer: String,
    /// Hash of the plan that wrote the checkpoint, if known.
    pub plan: Option<String>,
    /// Time statistics of the job that wrote the checkpoint.
    #[serde(default)]
    pub job: JobTime,
    /// The shard files.
    pub shards: Vec<Shard>,
    /// Parameters and states of the optimizer.
    pub tensors: Vec<StoredTensor>,
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// The error names the violated invariant, with the tensor and the numbers.
    pub fn decode(text: &[u8]) -> Result<Self, String> {
        let manifest: Self = open_sealed(FORMAT, text)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Encodes the manifest for [`Manifest::decode`].
    ///
    /// # Errors
    /// If the manifest violates an invariant.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        seal(FORMAT, self)
    }

    /// Number of applied updates. Manifests of version 1 and 2 do not count updates, so their number of steps is
    /// returned.
    pub fn updates(&self) -> u64 {
        self.updates.unwrap_or(self.step)
    }

    /// A digest of the cursor.
    pub fn cursor_digest(&self) -> u64 {
        let text = serde_json::to_vec(&self.cursor).unwrap_or_default();
        blake3::hash(&text).as_bytes().iter().take(8).fold(0, |digest, byte| digest << 8 | u64::from(*byte))
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.bytes).fold(0, u64::saturating_add)
    }

    /// Checks the limits of MF-1, and checks MF-2 and MF-3.
    fn check(&self) -> Result<(), String> {
        limit("it has", "tensors", self.tensors.len(), TENSORS_MAX)?;
        limit("it has", "shards", self.shards.len(), SHARDS_MAX)?;
        limit("it has", "pieces", self.tensors.iter().map(|t| t.pieces.len()).sum(), PIECES_MAX)?;
        limit("its cursor has", "entries", self.cursor.len(), CURSOR_ENTRIES_MAX)?;
        limit("it has", "declared values", self.declared.len(), DECLARED_MAX)?;
        let texts = self.cursor.iter().chain(&self.declared).flat_map(|(key, value)| [key, value]);
        for text in texts.chain([&self.mesh, &self.writer]).chain(self.plan.iter()) {
            limit("one of its texts has", "bytes", text.len(), TEXT_BYTES_MAX)?;
        }
        for shard in &self.shards {
            check_file(&shard.file)?;
        }
        let mut names = BTreeSet::new();
        for tensor in &self.tensors {
            if !names.insert(&tensor.info.name) {
                return Err(format!("two tensors are named {}", tensor.info.name));
            }
            check_tensor(tensor, &self.shards).map_err(|why| format!("tensor {}: {why}", tensor.info.name))?;
        }
        Ok(())
    }
}

fn limit(subject: &str, kind: &str, got: usize, max: usize) -> Result<(), String> {
    if got > max { Err(format!("{subject} {got} {kind}; the maximum is {max}")) } else { Ok(()) }
}

/// MF-3: a shard's path is a folder and a file with plain names.
fn check_file(file: &str) -> Result<(), String> {
    let is_plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        !part.is_empty() && part.len() <= 128 && !part.starts_with('.') && part.chars().all(allowed)
    };
    match file.split_once('/') {
        Some((folder, name)) if is_plain(folder) && is_plain(name) => Ok(()),
        _ => Err(format!("{file:?} is not a shard name")),
    }
}

fn check_tensor(tensor: &StoredTensor, shards: &[Shard]) -> Result<(), String> {
    let info = &tensor.info;
    limit("its name has", "bytes", info.name.len(), TEXT_BYTES_MAX)?;
    limit("its layout has", "bytes", info.layout.len() + info.axes.len(), TEXT_BYTES_MAX)?;
    limit("it has", "dims", info.shape.len().max(info.saved_shape.len()), DIMS_MAX)?;
    limit("it has", "pieces", tensor.pieces.len(), TENSOR_PIECES_MAX)?;
    let elements = info.elements().ok_or_else(|| format!("shape {:?} has too many elements", info.shape))?;
    let saved = TensorMeta { shape: info.saved_shape.clone(), ..info.clone() };
    if saved.elements() != Some(elements) {
        return Err(format!("shapes {:?} and {:?} differ in their number of elements", info.shape, info.saved_shape));
    }
    let mut covered = 0usize;
    for (index, piece) in tensor.pieces.iter().enumerate() {
        check_piece(piece, info, shards)?;
        // The sum cannot overflow: each piece is part of a tensor whose bytes fit in `isize`, and the number of pieces
        // is limited.
        covered = covered.saturating_add(piece.region().element_count());
        let overlaps = |other: &&Piece| other.region().intersect(&piece.region()).is_some();
        if let Some(other) = tensor.pieces[..index].iter().find(overlaps) {
            return Err(format!("pieces at {:?} and {:?} overlap", other.start, piece.start));
        }
    }
    if covered != elements {
        return Err(format!("its pieces cover {covered} of {elements} elements"));
    }
    Ok(())
}

fn check_piece(piece: &Piece, info: &TensorMeta, shards: &[Shard]) -> Result<(), String> {
    let Piece { shard, offset, start, size, .. } = piece;
    let dims = info.shape.len();
    let inside = |d: usize| size[d] > 0 && start[d].checked_add(size[d]).is_some_and(|end| end <= info.shape[d]);
    if start.len() != dims || size.len() != dims || !(0..dims).all(inside) {
        return Err(format!("a piece of size {size:?} at {start:?} is not inside shape {:?}", info.shape));
    }
    let file = shards
        .get(*shard)
        .ok_or_else(|| format!("a piece is in shard {shard}, but the number of shards is {}", shards.len()))?;
    let bytes = piece.region().element_count() as u64 * info.dtype.bytes() as u64;
    if offset.checked_add(bytes).is_none_or(|end| end > file.bytes) {
        return Err(format!(
            "a piece has {bytes} bytes at offset {offset} of {}, but the file has {} bytes",
            file.file, file.bytes
        ));
    }
    Ok(())
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed<'a> {
    format: String,
    version: u32,
    blake3: Checksum,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// Returns the version of an unaltered manifest that is too new for this program. Later versions must compute the
/// checksum like version 3.
pub(crate) fn newer_version(text: &[u8]) -> Option<u32> {
    let Sealed { format, version, blake3, body } = serde_json::from_slice(text).ok()?;
    (format == FORMAT && version > VERSION && checksum(version, body) == blake3).then_some(version)
}

/// The checksum of a sealed text. From version 3 on, it covers the version and the body's bytes. Up to version 2, it
/// covers only the body's bytes.
fn checksum(version: u32, body: &RawValue) -> Checksum {
    let mut hasher = blake3::Hasher::new();
    if version > 2 {
        hasher.update(&version.to_le_bytes());
    }
    Checksum(hasher.update(body.get().as_bytes()).finalize())
}

/// Encodes `body` as JSON in an envelope with its [`checksum`].
pub(crate) fn seal<T: Serialize>(format: &str, body: &T) -> Result<Vec<u8>, String> {
    seal_as(VERSION, format, body)
}

fn seal_as<T: Serialize>(version: u32, format: &str, body: &T) -> Result<Vec<u8>, String> {
    let body = serde_json::value::to_raw_value(body).map_err(|e| e.to_string())?;
    let blake3 = checksum(version, &body);
    let sealed = Sealed { format: format.into(), version, blake3, body: &body };
    let text = serde_json::to_vec(&sealed).map_err(|e| e.to_string())?;
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(format!("the {format} text has {} bytes; the maximum is {MANIFEST_BYTES_MAX}", text.len()));
    }
    Ok(text)
}

/// Decodes a sealed text after checking that it is unaltered.
pub(crate) fn open_sealed<T: DeserializeOwned>(format: &str, text: &[u8]) -> Result<T, String> {
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(format!("it has {} bytes; the maximum is {MANIFEST_BYTES_MAX}", text.len()));
    }
    let sealed: Sealed<'_> = serde_json::from_slice(text).map_err(|e| format!("not a {format} file: {e}"))?;
    if sealed.format != format {
        return Err(format!("it has format {:?}, expected {format}", sealed.format));
    }
    if !(1..=VERSION).contains(&sealed.version) {
        return Err(format!("it has format version {}, but this program reads only 1 to {VERSION}", sealed.version));
    }
    let sum = checksum(sealed.version, sealed.body);
    if sum != sealed.blake3 {
        return Err(format!("checksum: expected {:?}, got {sum:?}", sealed.blake3));
    }
    serde_json::from_str(sealed.body.get()).map_err(|e| format!("not a {format} file: {e}"))
}

#[cfg(test)]
mod tests;
