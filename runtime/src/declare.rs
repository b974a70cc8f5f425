//! Values that a program declares: equal on all ranks, recorded in checkpoints and saved files, compared on resume.
//!
//! ```
//! use shardflow::declare::{Declarations, OnResume, data_identity};
//! use shardflow::prelude::*;
//!
//! # fn declared(path: &std::path::Path) -> std::io::Result<SessionOptions> {
//! let declared = Declarations::default()
//!     .declare("data", data_identity(path)?, OnResume::Same)
//!     .declare("learning_rate", 1e-3, OnResume::Free)
//!     .declare_model("heads", 8);
//! # Ok(
//! SessionOptions { declared, ..SessionOptions::default() }
//! # )
//! # }
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Largest length of a value, in bytes. For a longer value, declare a digest.
pub use shardflow_job::rendezvous::facts::VALUE_BYTES_MAX;
use shardflow_job::rendezvous::facts::{
    COLLECTIVES, ENCRYPTION, EXECUTABLE, KERNELS, MESH, PLAN, PROCESSES, TRANSPORT, VERSION,
};

/// Largest number of declared values.
pub const DECLARED_MAX: usize = 64;
/// Largest length of a name, in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Largest length of all names and values together, in bytes.
pub const DECLARED_BYTES_MAX: usize = 6 << 10;

/// Names of the values that the session itself compares.
pub(crate) const SEED: &str = "seed";
pub(crate) const ON_NON_FINITE: &str = "on_non_finite";
/// Names of the optimizer's settings. Ranks compare the plan's hash, which covers these settings, so only a resume
/// compares the settings themselves.
pub(crate) const OPTIMIZER: &str = "optimizer";
pub(crate) const MAX_NORM: &str = "maximum gradient norm";
/// Action of a resume if the checkpoint records another value. Declared values must always be equal on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnResume {
    /// Refuses the checkpoint.
    Same,
    /// Loads the checkpoint and reports both values.
    Warn,
    /// Loads the checkpoint without a report.
    Free,
}

/// Recorded values, by name.
pub type Values = BTreeMap<String, String>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Declared {
    name: String,
    value: String,
    on_resume: OnResume,
    /// True if the value is also compared when only weights are loaded.
    is_of_model: bool,
}

/// The values that a program declares, in the order of the declarations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declarations(Vec<Declared>);

/// The error of a value that cannot be declared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot declare {name:?}: {why}")]
pub struct DeclareError {
    /// Name of the value.
    pub name: String,
    /// The violated rule, with the numbers.
    pub why: String,
}

impl Declarations {
    /// Adds a value. Limits are checked when the session starts.
    #[must_use]
    pub fn declare(self, name: impl Into<String>, value: impl ToString, on_resume: OnResume) -> Self {
        self.with(name.into(), value.to_string(), on_resume, false)
    }

    /// Adds a value that defines the meaning of the weights, such as the number of heads. It must be equal on resume
    /// ([`OnResume::Same`]), and also when only weights are loaded.
    #[must_use]
    pub fn declare_model(self, name: impl Into<String>, value: impl ToString) -> Self {
        self.with(name.into(), value.to_string(), OnResume::Same, true)
    }

    fn with(mut self, name: String, value: String, on_resume: OnResume, is_of_model: bool) -> Self {
        self.0.push(Declared { name, value, on_resume, is_of_model });
        self
    }

    /// Names and values, in the order of the declarations.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|declared| (declared.name.as_str(), declared.value.as_str()))
    }

    pub(crate) fn values(&self) -> Values {
        self.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Checks that names are unique and that names and values are within the limits.
    pub(crate) fn check(&self) -> Result<(), DeclareError> {
        let mut total = 0;
        for (index, (name, value)) in self.iter().enumerate() {
            let wrong = |why: String| Err(DeclareError { name: name.chars().take(NAME_BYTES_MAX).collect(), why });
            total += name.len() + value.len();
            if index >= DECLARED_MAX {
                return wrong(format!("there are more than {DECLARED_MAX} values"));
            }
            if name.is_empty() || name.len() > NAME_BYTES_MAX {
                return wrong(format!("the name has {} bytes, expected 1 to {NAME_BYTES_MAX}", name.len()));
            }
            if value.len() > VALUE_BYTES_MAX {
                let bytes = value.len();
                return wrong(format!(
                    "the value has {bytes} bytes, but the maximum is {VALUE_BYTES_MAX}; declare a digest of it"
                ));
            }
            if total > DECLARED_BYTES_MAX {
                return wrong(format!(
                    "all names and values together have more than {DECLARED_BYTES_MAX} bytes; declare digests"
                ));
            }
            if is_reserved(name) {
                return wrong("the session itself compares a value of this name; choose another name".into());
            }
            if self.iter().take(index).any(|(other, _)| other == name) {
                return wrong("it is declared twice".into());
            }
        }
        Ok(())
    }

    /// Compares a checkpoint's values with the declared values. Returns one line for each difference to report, or an
    /// error if a value that must be equal differs. Ignores a value that is missing on one side, because older programs
    /// declared fewer values.
    pub(crate) fn compare(&self, saved: &Values, weights_only: bool) -> Result<Vec<String>, String> {
        let mut notes = Vec::new();
        for declared in self.0.iter().filter(|declared| declared.is_of_model || !weights_only) {
            let Declared { name, value, on_resume, .. } = declared;
            let Some(recorded) = saved.get(name).filter(|recorded| *recorded != value) else { continue };
            match on_resume {
                OnResume::Same => return Err(format!("its {name} is {recorded}, but this program has {value}")),
                OnResume::Warn => notes.push(format!("{name} was {recorded} and is {value} from here on")),
                OnResume::Free => {}
            }
        }
        Ok(notes)
    }
}

fn is_reserved(name: &str) -> bool {
    let of_session = [SEED, ON_NON_FINITE, OPTIMIZER, MAX_NORM].contains(&name);
    of_session
        || [PLAN, MESH, TRANSPORT, COLLECTIVES, ENCRYPTION, KERNELS, VERSION, EXECUTABLE, PROCESSES].contains(&name)
}

/// Number of blocks that the identity of a large file covers.
const BLOCKS: u64 = 64;
const BLOCK_BYTES: u64 = 1 << 20;

/// Identity of a data file: its length and the BLAKE3 checksum of its bytes. If the file has more than 64 MiB, the
/// checksum covers 64 blocks of 1 MiB, spread evenly from the first byte to the last.
///
/// # Errors
/// If the file cannot be read.
pub fn data_identity(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    identity(file.metadata()?.len(), |start, block| file.read_exact_at(block, start))
}

/// Like [`data_identity`], for data in memory.
pub fn identity_of(bytes: &[u8]) -> String {
    let read = |start: u64, block: &mut [u8]| {
        block.copy_from_slice(&bytes[start as usize..start as usize + block.len()]);
        Ok(())
    };
    identity(bytes.len() as u64, read).unwrap_or_default()
}

fn identity(bytes: u64, read: impl Fn(u64, &mut [u8]) -> io::Result<()>) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; bytes.min(BLOCK_BYTES) as usize];
    for index in 0..bytes.div_ceil(BLOCK_BYTES).min(BLOCKS) {
        let start = if bytes > BLOCKS * BLOCK_BYTES {
            // The product may exceed 64 bits, but never 128.
            (u128::from(bytes - BLOCK_BYTES) * u128::from(index) / u128::from(BLOCKS - 1)) as u64
        } else {
            index * BLOCK_BYTES
        };
        let block = &mut block[..(bytes - start).min(BLOCK_BYTES) as usize];
        read(start, block)?;
        hasher.update(block);
    }
    Ok(format!("{bytes} bytes, blake3 {}", hasher.finalize().to_hex()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(values: &[(&str, &str)]) -> Values {
        values.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn a_resume_refuses_reports_or_ignores_another_value() {
        let declared = Declarations::default()
            .declare("data", "a", OnResume::Same)
            .declare("batch", 2, OnResume::Warn)
            .declare("lr", 0.5, OnResume::Free)
            .declare_model("heads", 4);
        assert_eq!(declared.compare(&declared.values(), false), Ok(Vec::new()));
        let difference =
            |name: &str, saved: &str, here: &str| Err(format!("its {name} is {saved}, but this program has {here}"));
        let other = saved(&[("data", "b"), ("batch", "4")]);
        assert_eq!(declared.compare(&other, false), difference("data", "b", "a"));
        assert_eq!(declared.compare(&other, true), Ok(Vec::new()), "data is not compared when only weights are loaded");
        let other = saved(&[("batch", "4"), ("lr", "0.25"), ("unknown", "1")]);
        assert_eq!(declared.compare(&other, false), Ok(vec!["batch was 4 and is 2 from here on".into()]));
        for weights_only in [false, true] {
            assert_eq!(declared.compare(&saved(&[("heads", "8")]), weights_only), difference("heads", "8", "4"));
        }
        assert_eq!(declared.compare(&Values::new(), false), Ok(Vec::new()), "older checkpoints record nothing");
    }

    #[test]
    fn declarations_beyond_the_limits_are_refused() {
        let one = |name: &str, value: &str| Declarations::default().declare(name, value, OnResume::Same);
        let why = |declared: Declarations| declared.check().unwrap_err().to_string();
        assert_eq!(one("name", &"v".repeat(VALUE_BYTES_MAX)).check(), Ok(()));
        assert!(why(one("", "")).contains("the name has 0 bytes, expected 1 to 64"));
        assert!(why(one(&"n".repeat(65), "")).contains("the name has 65 bytes"));
        assert!(why(one("name", &"v".repeat(1025))).starts_with("cannot declare \"name\": the value has 1025 bytes"));
        assert!(why(one("plan", "")).contains("the session itself compares a value of this name"));
        assert!(why(one("a", "1").declare_model("a", 1)).contains("declared twice"));
        let many = |count: usize, value: &str| {
            (0..count).fold(Declarations::default(), |all, i| all.declare(i.to_string(), value, OnResume::Free))
        };
        assert_eq!(many(64, "").check(), Ok(()));
        assert!(why(many(65, "")).contains("more than 64 values"));
        assert!(why(many(7, &"v".repeat(1024))).contains("more than 6144 bytes"));
    }

    /// The identity covers a short file completely, and 64 blocks of a long file, including its first and last byte.
    #[test]
    fn an_identity_covers_a_short_file_and_the_blocks_of_a_long_one() {
        let short = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(short.path(), "some text").unwrap();
        let expected = format!("9 bytes, blake3 {}", blake3::hash(b"some text").to_hex());
        assert_eq!(data_identity(short.path()).unwrap(), expected);
        assert_eq!(identity_of(b"some text"), expected);
        assert_eq!(identity_of(b""), format!("0 bytes, blake3 {}", blake3::hash(b"").to_hex()));
        let two = vec![7; (2 * BLOCK_BYTES + 1) as usize];
        assert_eq!(identity_of(&two), format!("{} bytes, blake3 {}", two.len(), blake3::hash(&two).to_hex()));

        // Use a sparse file, in which only changed blocks use disk space.
        let long = tempfile::tempfile().unwrap();
        let bytes = 1 << 40;
        long.set_len(bytes).unwrap();
        let read = |start: u64, block: &mut [u8]| long.read_exact_at(block, start);
        let long_identity = || identity(bytes, read).unwrap();
        let mut seen = vec![long_identity()];
        for place in [0, bytes - 1, (bytes - BLOCK_BYTES) / 63 + 5] {
            long.write_all_at(&[1], place).unwrap();
            seen.push(long_identity());
            assert!(!seen[..seen.len() - 1].contains(seen.last().unwrap()), "byte {place} is covered");
        }
        long.write_all_at(&[1], bytes / 2).unwrap();
        assert_eq!(Some(&long_identity()), seen.last(), "bytes between the blocks are not covered");
    }
}
