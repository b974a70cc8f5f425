//! The secret of a job, and the keys and MACs derived from it.

use std::fmt;

/// Minimum length of a secret: 16 random hexadecimal digits have 64 random bits, too many to guess over the network.
pub const SECRET_CHARS_MIN: usize = 16;
/// Domain of the key derivation. It must never change, because all processes must derive the same key.
const CONTEXT: &str = "shardflow 2026-01-01 secret of a job";

/// The secret text of a job and the key derived from it. `Debug` prints neither. Comparison takes constant time.
///
/// A recorded handshake allows offline guesses. So the text must be random, not a word: see [`Secret::random`].
#[derive(Clone)]
pub struct Secret {
    text: String,
    key: [u8; 32],
}

/// The secret is so short that it could be guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret of {chars} characters, but the minimum is {SECRET_CHARS_MIN}; make another with `shardflow secret`")]
pub struct ShortSecret {
    /// The secret's length in characters, without surrounding white space.
    pub chars: usize,
}

/// The system provides no random numbers.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot get random numbers from the system: {0}")]
pub struct RandomError(String);

impl Secret {
    /// Makes a secret from a text. Ignores surrounding white space.
    pub fn new(text: &str) -> Result<Self, ShortSecret> {
        let text = text.trim();
        match text.chars().count() {
            chars if chars < SECRET_CHARS_MIN => Err(ShortSecret { chars }),
            _ => Ok(Self { text: text.into(), key: blake3::derive_key(CONTEXT, text.as_bytes()) }),
        }
    }

    /// Creates a secret from 32 random bytes, in hexadecimal.
    pub fn random() -> Result<Self, RandomError> {
        let text: String = random::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { key: blake3::derive_key(CONTEXT, text.as_bytes()), text })
    }

    /// The secret text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Derives a key for one purpose. Keys for different purposes are independent.
    pub fn key(&self, purpose: &str) -> [u8; 32] {
        *blake3::keyed_hash(&self.key, purpose.as_bytes()).as_bytes()
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.key) == blake3::Hash::from_bytes(other.key)
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} characters)", self.text.chars().count())
    }
}

#[cfg(test)]
pub(crate) fn sample() -> Secret {
    Secret::new("a secret of these tests").unwrap()
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], RandomError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| RandomError(error.to_string()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_printed_and_has_a_minimum_length() {
        let secret = Secret::new("correct horse battery staple").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(28 characters)");
        assert_eq!(secret, Secret::new(" correct horse battery staple\n").unwrap());
        assert_ne!(secret, Secret::new("correct horse battery stapler").unwrap());
        assert_eq!(Secret::new("  swordfish  "), Err(ShortSecret { chars: 9 }));
        let (one, two) = (Secret::random().unwrap(), Secret::random().unwrap());
        assert!(one.text().len() == 64 && one != two);
        assert_eq!(Secret::new(one.text()), Ok(one));
    }

    #[test]
    fn keys_depend_on_the_secret_and_the_purpose() {
        let [a, b] = ["a", "b"].map(|text| Secret::new(&text.repeat(16)).unwrap());
        let keys = [a.key("x"), b.key("x"), a.key("y")];
        assert!(keys[0] != keys[1] && keys[0] != keys[2]);
        assert_eq!(keys[0], a.key("x"));
    }
}
