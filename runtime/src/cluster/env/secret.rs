//! What all processes of a job know and nobody else.

use std::fmt;
use std::path::PathBuf;

use shardflow_actors::transport::{self, TransportError};

use super::detect::{contradiction, invalid};
use super::{EnvError, Variables, get};

/// Fewest characters of a secret.
pub const SECRET_CHARS_MIN: usize = 16;
/// Largest file with a secret, in bytes.
const SECRET_BYTES_MAX: u64 = 4096;

/// Text that proves that a peer belongs to the job. Its `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// Where the secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// In `SHARDFLOW_SECRET`.
    Text(Secret),
    /// In the file that `SHARDFLOW_SECRET_FILE` names.
    File(PathBuf),
}

impl Secret {
    /// Takes a text, without the white space around it.
    ///
    /// # Errors
    /// It is too short; `place` says where it stood.
    pub fn new(text: &str, place: &str) -> Result<Secret, EnvError> {
        match text.trim().chars().count() {
            chars if chars < SECRET_CHARS_MIN => Err(EnvError::ShortSecret { place: place.into(), chars }),
            _ => Ok(Secret(text.trim().into())),
        }
    }

    /// A new one: 32 bytes of the kernel's randomness, in hexadecimal.
    ///
    /// # Errors
    /// The kernel has none to give.
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
    /// The secret that the variables name, if any.
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

    /// The secret itself; reads the file.
    ///
    /// # Errors
    /// The file cannot be read, or what it holds is no secret.
    pub fn read(&self) -> Result<Secret, EnvError> {
        let path = match self {
            SecretSource::Text(secret) => return Ok(secret.clone()),
            SecretSource::File(path) => path,
        };
        let error = |why: String| invalid("SHARDFLOW_SECRET_FILE", &path.display().to_string(), &why);
        let bytes = std::fs::metadata(path).map_err(|e| error(e.to_string()))?.len();
        if bytes > SECRET_BYTES_MAX {
            return Err(error(format!("holds {bytes} bytes, a secret has at most {SECRET_BYTES_MAX}")));
        }
        Secret::new(&std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?, &path.display().to_string())
    }
}
