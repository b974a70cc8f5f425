//! Images that replace PTX and cubins. An image is one line with the digest of a compiled library.

use std::path::{Path, PathBuf};

const MARK: &str = "// software CUDA image ";
const DIGEST_CHARS: usize = 32;

/// Returns the image of a library.
pub fn image(digest: &str) -> String {
    format!("{MARK}{digest}\n")
}

/// Returns the path of a library.
pub fn path(digest: &str, cache: &Path) -> PathBuf {
    cache.join(format!("{digest}.so"))
}

/// Returns the path of an image's library, or `None` if the text is not an image.
pub fn library_path(text: &str, cache: &Path) -> Option<PathBuf> {
    let digest = text.strip_prefix(MARK)?.get(..DIGEST_CHARS)?;
    digest.bytes().all(|b| b.is_ascii_hexdigit()).then(|| path(digest, cache))
}

/// Returns the digest of several texts.
pub fn digest(texts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for text in texts {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hasher.finalize().to_hex()[..DIGEST_CHARS].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_name_their_library() {
        let digest = digest(&["a", "b"]);
        assert_ne!(digest, super::digest(&["ab"]));
        let expected = Path::new("/cache").join(format!("{digest}.so"));
        assert_eq!(library_path(&image(&digest), Path::new("/cache")), Some(expected));
        assert_eq!(library_path("// software CUDA image ../../x", Path::new("/cache")), None);
        assert_eq!(library_path(".version 8.0", Path::new("/cache")), None);
    }
}
