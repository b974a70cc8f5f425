//! Properties of the manifest and sidecar decoders that must hold for any input. Fuzzing and tests check them.
use serde_json::value::RawValue;

use super::manifest::{
    Checksum, Cursor, JobTime, Manifest, Piece, Shard, StoredTensor, TensorKind, TensorMeta, open_sealed, seal,
};
use super::shard::{Sidecar, SidecarPiece};

/// Tensors with more elements than this are not checked element by element.
const ELEMENTS_MAX: usize = 1 << 12;

/// A manifest with a tensor of 4 x 6 in two pieces, a scalar, and an empty tensor.
pub(crate) fn sample_manifest() -> Manifest {
    let sum = Checksum::of(b"");
    let info = |name: &str, shape: &[usize]| TensorMeta {
        name: name.into(),
        kind: TensorKind::Parameter,
        dtype: shardflow_kernels::tensor::DType::F32,
        shape: shape.to_vec(),
        saved_shape: shape.to_vec(),
        layout: "(S0)".into(),
        axes: "data=2".into(),
        devices: vec![0, 1],
    };
    let shard = |p| Shard { file: format!("e0-0/shard-{p}-of-2.safetensors"), bytes: 200, blake3: sum };
    let piece = |shard, offset, start: &[usize], size: &[usize]| {
        let (start, size) = (start.to_vec(), size.to_vec());
        Piece { shard, offset, start, size, blake3: sum }
    };
    let wide = vec![piece(0, 8, &[0, 0], &[3, 6]), piece(1, 8, &[3, 0], &[1, 6])];
    Manifest {
        step: 7,
        updates: Some(5),
        epoch: 0,
        mesh: "data=2".into(),
        seed: u64::MAX,
        cursor: Cursor::from([("file".into(), "a \"quoted\" name".into())]),
        declared: Cursor::from([("batch".into(), "4".into())]),
        writer: "0.1.0".into(),
        plan: None,
        job: JobTime { began_ms: 1_764_000_000_000, productive_ms: 7 },
        shards: vec![shard(0), shard(1)],
        tensors: vec![
            StoredTensor { info: info("wide", &[4, 6]), pieces: wide },
            StoredTensor { info: info("scalar", &[]), pieces: vec![piece(1, 196, &[], &[])] },
            StoredTensor { info: info("empty", &[0, 6]), pieces: Vec::new() },
        ],
    }
}

/// Sample bodies of a manifest and of a sidecar, as processes write them but without the seal.
pub fn samples() -> Vec<Vec<u8>> {
    let (manifest, sum) = (sample_manifest(), Checksum::of(b""));
    let piece = SidecarPiece { tensor: "w".into(), offset: 8, start: vec![0, 0], size: vec![3, 6], blake3: sum };
    let (shard, pieces) = (manifest.shards[0].clone(), vec![piece]);
    let sidecar = Sidecar { step: 7, epoch: 0, attempt: 1, process: 0, processes: 1, shard, pieces };
    [serde_json::to_vec(&manifest), serde_json::to_vec(&sidecar)].map(Result::unwrap_or_default).into()
}

/// Checks that decoding never panics, and that accepted manifests and sidecars survive encoding and decoding. Also
/// checks the invariants of an accepted manifest, with code that is independent of [`Manifest::decode`].
///
/// # Panics
/// If a property does not hold.
pub fn check(body: &[u8]) {
    let _ = Manifest::decode(body);
    let Ok(raw) = serde_json::from_slice::<&RawValue>(body) else { return };
    if let Ok(text) = seal("shardflow-checkpoint", &raw)
        && let Ok(manifest) = Manifest::decode(&text)
    {
        let again = manifest.encode().and_then(|text| Manifest::decode(&text));
        assert_eq!(again.as_ref(), Ok(&manifest));
        manifest.tensors.iter().for_each(|tensor| check_tensor(tensor, &manifest.shards));
    }
    if let Ok(text) = seal("shardflow-shard", &raw)
        && let Ok(sidecar) = open_sealed::<Sidecar>("shardflow-shard", &text)
    {
        let again = seal("shardflow-shard", &sidecar).and_then(|text| open_sealed("shardflow-shard", &text));
        assert_eq!(again.as_ref(), Ok(&sidecar));
    }
}

/// Checks MF-3, and MF-2 for small tensors.
fn check_tensor(tensor: &StoredTensor, shards: &[Shard]) {
    let shape = &tensor.info.shape;
    for piece in &tensor.pieces {
        let elements: u128 = piece.size.iter().map(|size| *size as u128).product();
        assert!(u128::from(piece.offset) + 4 * elements <= u128::from(shards[piece.shard].bytes), "{piece:?}");
    }
    let elements: u128 = shape.iter().map(|extent| *extent as u128).product();
    if elements > ELEMENTS_MAX as u128 {
        return;
    }
    for element in 0..elements as usize {
        let covers = |piece: &&Piece| {
            let mut rest = element;
            (0..shape.len()).rev().all(|dim| {
                let index = rest % shape[dim];
                rest /= shape[dim];
                index >= piece.start[dim] && index - piece.start[dim] < piece.size[dim]
            })
        };
        assert_eq!(tensor.pieces.iter().filter(covers).count(), 1, "pieces with element {element} of {tensor:?}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sealed_samples_can_be_decoded() {
        let open = |index: usize, format: &str| {
            let body: Box<RawValue> = serde_json::from_slice(&samples()[index]).unwrap();
            seal(format, &body).unwrap()
        };
        assert!(Manifest::decode(&open(0, "shardflow-checkpoint")).is_ok());
        assert!(open_sealed::<Sidecar>("shardflow-shard", &open(1, "shardflow-shard")).is_ok());
    }

    proptest! {
        #[test]
        fn properties_hold_for_altered_samples(
            index in 0usize..2, at in any::<prop::sample::Index>(), text in "[0-9\"{}\\[\\],:a-z]{0,3}",
        ) {
            let mut changed = samples().swap_remove(index);
            let at = at.index(changed.len());
            let end = (at + text.len()).min(changed.len());
            changed.splice(at..end, text.into_bytes());
            check(&changed);
        }
    }
}
