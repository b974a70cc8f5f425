//! The secret that the processes of a job share.

use std::fmt;
use std::path::PathBuf;

use shardflow_actors::transport::{self, TransportError};

use super::detect::{contradiction, invalid};
use super::{EnvError, Variables, get};

/// Smallest length of a secret, in characters.
pub const SECRET_CHARS_MIN: usize = 16;
/// Largest size of a secret's file, in bytes.
const SECRET_BYTES_MAX: u64 = 4096;

/// Text that proves that a peer belongs to the job. `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// Where the secret is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// In `SHARDFLOW_SECRET`.
    Text(Secret),
    /// In the file that `SHARDFLOW_SECRET_FILE` names.
    File(PathBuf),
}

impl Secret {
    /// Makes a secret from a text, trimmed of white space.
    ///
    /// # Errors
    /// The text is too short; the error names `place`, the variable or file that held it.
    pub fn new(text: &str, place: &str) -> Result<Secret, EnvError> {
        match text.trim().chars().count() {
            chars if chars < SECRET_CHARS_MIN => Err(EnvError::ShortSecret { place: place.into(), chars }),
            _ => Ok(Secret(text.trim().into())),
        }
    }

    /// A new secret: 32 random bytes from the kernel, in hexadecimal.
    ///
    /// # Errors
    /// The kernel returns no random bytes.
    pub fn random() -> Result<Secret, TransportError> {
        transport::SharedKey::random_text().map(Secret)
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} characters)", self.0.chars().count())
    }
}

impl SecretSource {
    /// Finds the secret in the variables, if any.
    ///
    /// # Errors
    /// Both variables are set, or the text is too short.
    pub fn find(variables: &Variables) -> Result<Option<SecretSource>, EnvError> {
        match (get(variables, "SHARDFLOW_SECRET"), get(variables, "SHARDFLOW_SECRET_FILE")) {
            (None, None) => Ok(None),
            (Some(text), None) => Ok(Some(SecretSource::Text(Secret::new(text, "SHARDFLOW_SECRET")?))),
            (None, Some(path)) => Ok(Some(SecretSource::File(path.into()))),
            (Some(_), Some(path)) => {
                let file = ("SHARDFLOW_SECRET_FILE", path);
                Err(contradiction(("SHARDFLOW_SECRET", "(hidden)"), file, "set one of the two"))
            }
        }
    }

    /// Returns the secret; reads it from the file if needed.
    ///
    /// # Errors
    /// The file cannot be read, is too large, or its text is too short.
    pub fn read(&self) -> Result<Secret, EnvError> {
        let path = match self {
            SecretSource::Text(secret) => return Ok(secret.clone()),
            SecretSource::File(path) => path,
        };
        let error = |reason: String| invalid("SHARDFLOW_SECRET_FILE", &path.display().to_string(), &reason);
        let bytes = std::fs::metadata(path).map_err(|e| error(e.to_string()))?.len();
        if bytes > SECRET_BYTES_MAX {
            return Err(error(format!("the file has {bytes} bytes, at most {SECRET_BYTES_MAX} are allowed")));
        }
        Secret::new(&std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?, &path.display().to_string())
    }
}
