//! Untrusted manifests: an altered or inconsistent manifest is refused with the reason.

use serde_json::Value;

use super::*;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::fuzz::sample_manifest as good;
use crate::checkpoint::store::Store;

fn piece(shard: usize, offset: u64, start: [usize; 2], size: [usize; 2]) -> Piece {
    Piece { shard, offset, start: start.to_vec(), size: size.to_vec(), blake3: Checksum::of(b"") }
}

#[test]
fn an_encoded_manifest_decodes_to_the_same_manifest() {
    let text = good().encode().unwrap();
    assert_eq!(Manifest::decode(&text).unwrap(), good());
    assert_eq!(serde_json::from_slice::<Value>(&text).unwrap()["body"]["step"], 7, "it is JSON");
}

#[test]
fn every_altered_manifest_is_refused() {
    let text = good().encode().unwrap();
    for at in 0..text.len() {
        assert!(Manifest::decode(&text[..at]).is_err(), "cut at {at}");
        for bit in 0..8 {
            let mut other = text.clone();
            other[at] ^= 1 << bit;
            assert!(Manifest::decode(&other).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn inconsistent_manifests_are_refused() {
    type Edit = fn(&mut Manifest);
    let cases: &[(&str, Edit)] = &[
        ("tensor wide: its pieces cover 18 of 24 elements", |m| drop(m.tensors[0].pieces.pop())),
        ("tensor wide: pieces at [0, 0] and [2, 0] overlap", |m| m.tensors[0].pieces[1].start[0] = 2),
        ("a piece of size [1, 6] at [4, 0] is not inside shape [4, 6]", |m| m.tensors[0].pieces[1].start[0] = 4),
        ("is not inside shape", |m| m.tensors[0].pieces[1].start[0] = usize::MAX),
        ("is not inside shape", |m| m.tensors[0].pieces[0].size[0] = 0),
        ("is not inside shape", |m| m.tensors[0].pieces[0].size.push(1)),
        ("is not inside shape", |m| m.tensors[0].pieces[0].start.clear()),
        ("a piece is in shard 2, but the number of shards is 2", |m| m.tensors[0].pieces[0].shard = 2),
        ("72 bytes at offset 129 of e0-0/shard-0-of-2.safetensors, but the file has 200 bytes", |m| {
            m.tensors[0].pieces[0].offset = 129
        }),
        ("but the file has 200 bytes", |m| m.tensors[0].pieces[0].offset = u64::MAX),
        ("tensor scalar: its pieces cover 0 of 1 elements", |m| m.tensors[1].pieces.clear()),
        ("overlap", |m| {
            let scalar = m.tensors[1].pieces[0].clone();
            m.tensors[1].pieces.push(scalar);
        }),
        ("too many elements", |m| m.tensors[2].info.shape = vec![usize::MAX, 2]),
        ("too many elements", |m| m.tensors[2].info.shape = vec![1 << 32, 1 << 30]),
        ("differ in their number of elements", |m| m.tensors[0].info.saved_shape = vec![25]),
        ("differ in their number of elements", |m| m.tensors[0].info.saved_shape = vec![usize::MAX; 3]),
        ("it has 33 dims; the maximum is 32", |m| m.tensors[1].info.saved_shape = vec![1; 33]),
        ("two tensors are named wide", |m| m.tensors[1].info.name = "wide".into()),
        ("its name has 5000 bytes; the maximum is 4096", |m| m.tensors[1].info.name = "n".repeat(5000)),
        ("one of its texts has 5000 bytes", |m| m.mesh = "m".repeat(5000)),
        ("one of its texts has 5000 bytes", |m| drop(m.cursor.insert("key".into(), "c".repeat(5000)))),
        ("one of its texts has 5000 bytes", |m| drop(m.declared.insert("key".into(), "c".repeat(5000)))),
        ("it has 65 declared values; the maximum is 64", |m| {
            m.declared = (0..65).map(|i| (i.to_string(), String::new())).collect()
        }),
        ("is not a shard name", |m| m.shards[0].file = "../../etc/passwd".into()),
        ("is not a shard name", |m| m.shards[0].file = "/shard".into()),
        ("is not a shard name", |m| m.shards[0].file = "e0/..".into()),
        ("is not a shard name", |m| m.shards[0].file = "shard".into()),
        ("is not a shard name", |m| m.shards[0].file = "e0/a/b".into()),
        ("it has 4097 pieces; the maximum is 4096", |m| {
            m.tensors[0].pieces = vec![piece(0, 8, [0, 0], [1, 1]); TENSOR_PIECES_MAX + 1];
        }),
    ];
    for (expected, edit) in cases {
        let mut manifest = good();
        edit(&mut manifest);
        assert_eq!(manifest.encode().unwrap_err(), manifest.check().unwrap_err());
        let why = Manifest::decode(&seal("shardflow-checkpoint", &manifest).unwrap()).unwrap_err();
        assert!(why.contains(expected), "expected {expected}, got {why}");
    }
}

/// Reads a manifest of this older version, from which these keys are removed.
fn old(version: u32, keys: &[&str]) -> Manifest {
    let mut old = serde_json::to_value(good()).unwrap();
    keys.iter().for_each(|key| drop(old.as_object_mut().unwrap().remove(*key).unwrap()));
    Manifest::decode(&seal_as(version, "shardflow-checkpoint", &old).unwrap()).unwrap()
}

#[test]
fn older_versions_have_no_job_time_no_declared_values_and_an_update_in_each_step() {
    assert_eq!(old(1, &["job"]), Manifest { job: JobTime::default(), ..good() });
    let read = old(2, &["updates", "declared"]);
    assert_eq!((read.updates, read.updates(), good().updates()), (None, 7, 5));
    assert_eq!((read.declared.len(), good().declared.len()), (0, 1));
}

#[test]
fn texts_of_other_formats_or_versions_are_refused() {
    let decode = |text: &str| Manifest::decode(text.as_bytes()).unwrap_err();
    assert!(decode("").contains("not a shardflow-checkpoint file"));
    assert!(decode("{}").contains("missing field"));
    assert!(decode(&"[".repeat(100_000)).contains("not a shardflow-checkpoint file"));
    let text = String::from_utf8(good().encode().unwrap()).unwrap();
    for version in [0, 4] {
        let why = decode(&text.replace("\"version\":3", &format!("\"version\":{version}")));
        assert!(why.starts_with(&format!("it has format version {version}, but")), "{why}");
    }
    let other = seal("shardflow-shard", &good()).unwrap();
    assert!(Manifest::decode(&other).unwrap_err().contains("expected shardflow-checkpoint"));
    let unknown = seal("shardflow-checkpoint", &serde_json::json!({"step": 1, "more": 2})).unwrap();
    assert!(Manifest::decode(&unknown).unwrap_err().contains("unknown field"));
}

#[test]
fn a_checkpoint_of_a_newer_version_is_refused_and_kept() {
    let newer = seal_as(VERSION + 1, FORMAT, &good()).unwrap();
    assert_eq!(newer_version(&newer), Some(VERSION + 1));
    let altered = String::from_utf8(newer.clone()).unwrap().replace("\"version\":4", "\"version\":5");
    assert_eq!(newer_version(altered.as_bytes()), None, "it is damaged");
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let step = good().step;
    let manifest = folder.path().join(format!("step-{step:012}/manifest.json"));
    std::fs::create_dir(manifest.parent().unwrap()).unwrap();
    std::fs::write(&manifest, &newer).unwrap();
    let error = store.read(step).map(drop).unwrap_err();
    assert!(matches!(error, CheckpointError::Newer { version, .. } if version == VERSION + 1), "{error}");
    assert!(store.newest().is_err(), "an older checkpoint must not be loaded in its place");
    store.prune(step + 10, 1, None).unwrap();
    assert!(manifest.exists());
}
