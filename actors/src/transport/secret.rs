//! The job's secret, and the MACs that are made with it.

use std::fmt;

use super::TransportError;

/// Length of a secret's text, at least: 16 random hexadecimal digits are 64 bits, which nobody tries out online.
pub const SECRET_BYTES_MIN: usize = 16;
/// Never change it: both sides derive the same key.
const CONTEXT: &str = "shardflow 2026-01-01 secret of a job";

/// A key that all processes of a job share. It prints as nothing and is compared in constant time.
///
/// A recorded handshake lets one try texts offline, so the text has to be random, not a word: see [`SharedKey::random_text`].
#[derive(Clone)]
pub struct SharedKey([u8; 32]);

impl SharedKey {
    /// The key that belongs to a text; white space around it does not count.
    ///
    /// # Errors
    /// [`TransportError::WeakSecret`] when it is shorter than [`SECRET_BYTES_MIN`].
    pub fn from_text(text: &str) -> Result<Self, TransportError> {
        let text = text.trim();
        if text.len() < SECRET_BYTES_MIN {
            return Err(TransportError::WeakSecret { bytes: text.len() });
        }
        Ok(Self(blake3::derive_key(CONTEXT, text.as_bytes())))
    }

    /// A text for a new job: 64 hexadecimal digits, 256 random bits.
    ///
    /// # Errors
    /// [`TransportError::Random`].
    pub fn random_text() -> Result<String, TransportError> {
        Ok(random::<32>()?.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Keyed BLAKE3 over `domain` and `parts`, each behind its length, so that no two lists of parts read the same. MACs of
    /// different domains have nothing to do with each other. Equality of two [`blake3::Hash`] takes constant time.
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
        f.write_str("Secret(..)")
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
    fn a_secret_is_not_printed_and_not_short() {
        let secret = SharedKey::from_text("correct horse battery staple").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert_eq!(secret, SharedKey::from_text(" correct horse battery staple\n").unwrap());
        assert_ne!(secret, SharedKey::from_text("correct horse battery stapler").unwrap());
        assert!(matches!(SharedKey::from_text("  swordfish  "), Err(TransportError::WeakSecret { bytes: 9 })));
        let (one, two) = (SharedKey::random_text().unwrap(), SharedKey::random_text().unwrap());
        assert!(one.len() == 64 && one != two);
    }

    #[test]
    fn a_mac_depends_on_key_domain_and_the_cut_of_the_parts() {
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
