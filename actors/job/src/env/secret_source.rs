//! Where a process finds the secret of its job.

use std::path::PathBuf;

use super::error::{EnvError, contradiction, invalid};
use super::names::{Variables, get};
use crate::secret::Secret;

const SECRET_BYTES_MAX: u64 = 4096;

/// Where the secret is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// In `SHARDFLOW_SECRET`.
    Text(Secret),
    /// In the file that `SHARDFLOW_SECRET_FILE` names.
    File(PathBuf),
}

impl SecretSource {
    /// Determines from the variables where the secret is. Returns `None` if no variable defines a secret.
    pub fn find(variables: &Variables) -> Result<Option<SecretSource>, EnvError> {
        match (get(variables, "SHARDFLOW_SECRET"), get(variables, "SHARDFLOW_SECRET_FILE")) {
            (None, None) => Ok(None),
            (Some(text), None) => Ok(Some(SecretSource::Text(parse(text, "SHARDFLOW_SECRET")?))),
            (None, Some(path)) => Ok(Some(SecretSource::File(path.into()))),
            (Some(_), Some(path)) => {
                let file = ("SHARDFLOW_SECRET_FILE", path);
                Err(contradiction(("SHARDFLOW_SECRET", "(hidden)"), file, "set only one of the two"))
            }
        }
    }

    /// Returns the secret. Reads the file if the secret is in a file.
    pub fn read(&self) -> Result<Secret, EnvError> {
        let path = match self {
            SecretSource::Text(secret) => return Ok(secret.clone()),
            SecretSource::File(path) => path,
        };
        let error = |reason: String| invalid("SHARDFLOW_SECRET_FILE", &path.display().to_string(), &reason);
        let bytes = std::fs::metadata(path).map_err(|e| error(e.to_string()))?.len();
        if bytes > SECRET_BYTES_MAX {
            return Err(error(format!("the file has {bytes} bytes, but the maximum is {SECRET_BYTES_MAX}")));
        }
        parse(&std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?, &path.display().to_string())
    }
}

/// Makes a secret from `text`. `place` names the variable or file that holds it.
fn parse(text: &str, place: &str) -> Result<Secret, EnvError> {
    Secret::new(text).map_err(|source| EnvError::ShortSecret { place: place.into(), source })
}
