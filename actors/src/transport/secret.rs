//! The job's secret, and MACs with it.

use std::fmt;

use super::TransportError;

/// Minimum length of a secret's text: 16 random hexadecimal digits are 64 bits, too many for an online search.
pub const SECRET_BYTES_MIN: usize = 16;
/// Must never change: both sides derive the key with it.
const CONTEXT: &str = "shardflow 2026-01-01 secret of a job";

/// A key that all processes of a job share. `Debug` does not print it, and comparison takes constant time.
///
/// A recorded handshake allows an offline search, so the text must be random, not a word: see
/// [`SharedKey::random_text`].
#[derive(Clone)]
pub struct SharedKey([u8; 32]);

impl SharedKey {
    /// Derives the key from a text; ignores surrounding white space.
    ///
    /// # Errors
    /// [`TransportError::WeakSecret`] if it is shorter than [`SECRET_BYTES_MIN`].
    pub fn from_text(text: &str) -> Result<Self, TransportError> {
        let text = text.trim();
        if text.len() < SECRET_BYTES_MIN {
            return Err(TransportError::WeakSecret { bytes: text.len() });
        }
        Ok(Self(blake3::derive_key(CONTEXT, text.as_bytes())))
    }

    /// Generates a text for a new job: 64 hexadecimal digits, 256 random bits.
    ///
    /// # Errors
    /// [`TransportError::Random`].
    pub fn random_text() -> Result<String, TransportError> {
        Ok(random::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Keyed BLAKE3 over `domain` and `parts`, each with a length prefix, so that different lists of parts have
    /// different input. MACs of different domains are independent. Comparison of two [`blake3::Hash`] takes constant
    /// time.
    pub fn mac(&self, domain: &str, parts: &[&[u8]]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in std::iter::once(domain.as_bytes()).chain(parts.iter().copied()) {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.finalize()
    }
}

impl PartialEq for SharedKey {
    fn eq(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for SharedKey {}

impl fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedKey(..)")
    }
}

/// Random bytes from the system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], TransportError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| TransportError::Random { message: error.to_string() })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_printed_and_has_a_minimum_length() {
        let secret = SharedKey::from_text("correct horse battery staple").unwrap();
        assert_eq!(format!("{secret:?}"), "SharedKey(..)");
        assert_eq!(secret, SharedKey::from_text(" correct horse battery staple\n").unwrap());
        assert_ne!(secret, SharedKey::from_text("correct horse battery stapler").unwrap());
        assert!(matches!(SharedKey::from_text("  swordfish  "), Err(TransportError::WeakSecret { bytes: 9 })));
        let (one, two) = (SharedKey::random_text().unwrap(), SharedKey::random_text().unwrap());
        assert!(one.len() == 64 && one != two);
    }

    #[test]
    fn a_mac_depends_on_key_domain_and_boundaries_of_parts() {
        let (a, b) = (SharedKey::from_text(&"a".repeat(16)).unwrap(), SharedKey::from_text(&"b".repeat(16)).unwrap());
        let macs = [
            a.mac("x", &[b"12", b"3"]),
            b.mac("x", &[b"12", b"3"]),
            a.mac("y", &[b"12", b"3"]),
            a.mac("x", &[b"1", b"23"]),
            a.mac("x", &[b"123"]),
            a.mac("x", &[b"12", b"3", b""]),
            a.mac("x12", &[b"3"]),
        ];
        for (i, mac) in macs.iter().enumerate() {
            assert!(macs[..i].iter().all(|other| other != mac), "{i}");
        }
        assert_eq!(macs[0], a.mac("x", &[b"12", b"3"]));
    }
}
