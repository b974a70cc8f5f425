//! Text as training data, with one token per byte. A counter selects the samples, so they are the same for every layout
//! and every number of micro-batches.

use std::path::Path;

use shardflow::declare::identity_of;
use shardflow::exit::Exit;
use shardflow::init::mix;
use shardflow::job::text::counted;
use shardflow::program::ProgramError;

/// Sample `k` of a run starts at `mix(DATA_SEED + k) % (train length - context)`.
const DATA_SEED: u64 = 4242;

fn unreadable(path: &Path, cause: &std::io::Error) -> ProgramError {
    let hint = "check the path given with --data; without --data, this repository's own text is used";
    ProgramError::new(Exit::Usage, format!("cannot read data file {}: {cause}", path.display()), hint)
}

/// A text as token ids. Each byte is a token; its id is the byte's index in the sorted list of distinct bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Byte of each token id.
    vocabulary: Vec<u8>,
    /// First nine tenths of the text.
    train: Vec<i32>,
    /// Length and checksum of the text.
    identity: String,
}

impl Text {
    /// Reads a file, or the default text when `path` is `None`. The text must hold a sample of `context` tokens.
    ///
    /// # Errors
    /// If the file is missing, empty or too short.
    pub fn load(path: Option<&Path>, context: usize) -> Result<Self, ProgramError> {
        match path {
            Some(path) => {
                let bytes = std::fs::read(path).map_err(|cause| unreadable(path, &cause))?;
                Self::from_bytes(path, &bytes, context)
            }
            None => {
                let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
                Self::from_bytes(root, &repository_text(root)?, context)
            }
        }
    }

    /// Makes a text from `bytes`. Error messages name `path` as the source.
    ///
    /// # Errors
    /// If `bytes` is empty or too short for one sample.
    pub fn from_bytes(path: &Path, bytes: &[u8], context: usize) -> Result<Self, ProgramError> {
        if bytes.is_empty() {
            let text = format!("data file {} is empty", path.display());
            return Err(ProgramError::new(Exit::Usage, text, "give a text file with --data"));
        }
        // Targets are shifted by one, so a sample needs context + 1 tokens.
        let train = bytes.len() * 9 / 10;
        if train <= context {
            let text = format!(
                "{} is too short: {}, of which the first nine tenths ({train}) are for training, but one sample \
                 of --context {context} takes {}",
                path.display(),
                counted(bytes.len(), "byte"),
                context.saturating_add(1)
            );
            let hint = "give a longer file with --data, or a smaller --context";
            return Err(ProgramError::new(Exit::Usage, text, hint));
        }
        let mut occurs = [false; 256];
        bytes.iter().for_each(|b| occurs[usize::from(*b)] = true);
        let vocabulary: Vec<u8> = (0..=255).filter(|b| occurs[usize::from(*b)]).collect();
        let mut ids = [0; 256];
        (0..).zip(&vocabulary).for_each(|(id, byte)| ids[usize::from(*byte)] = id);
        let train = bytes[..train].iter().map(|b| ids[usize::from(*b)]).collect();
        Ok(Self { vocabulary, train, identity: identity_of(bytes) })
    }

    /// Identity of the text: length and checksum, see [`shardflow::declare::data_identity`].
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Identity of the vocabulary: length and checksum of the list of bytes by token id.
    pub fn vocabulary_identity(&self) -> String {
        identity_of(&self.vocabulary)
    }

    /// Number of different tokens.
    pub fn vocab(&self) -> usize {
        self.vocabulary.len()
    }

    /// Number of training tokens.
    pub fn train_len(&self) -> usize {
        self.train.len()
    }

    /// Returns `count` samples, beginning with sample number `first`: token ids and targets, each `[count, context]`,
    /// row-major.
    ///
    /// # Panics
    /// If `context` is not shorter than the training part; [`Text::load`] checks this.
    pub fn samples(&self, first: u64, count: usize, context: usize) -> (Vec<i32>, Vec<i32>) {
        let starts = (self.train.len() - context) as u64;
        let (mut ids, mut targets) = (Vec::with_capacity(count * context), Vec::with_capacity(count * context));
        for row in 0..count as u64 {
            let start = (mix(DATA_SEED.wrapping_add(first).wrapping_add(row)) % starts) as usize;
            ids.extend(&self.train[start..start + context]);
            targets.extend(&self.train[start + 1..start + 1 + context]);
        }
        (ids, targets)
    }

    /// Returns the prompt for generated text: a newline, or the first token of a text without newlines.
    pub fn prompt(&self) -> Vec<i32> {
        self.encode(b"\n").unwrap_or_else(|| self.train[..1].to_vec())
    }

    /// Returns the token ids of `text`, or `None` if a byte is not in the vocabulary.
    pub fn encode(&self, text: &[u8]) -> Option<Vec<i32>> {
        text.iter().map(|b| self.vocabulary.binary_search(b).ok().map(|id| id as i32)).collect()
    }

    /// Returns the text of these token ids. Ids outside the vocabulary and bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[i32]) -> String {
        let byte = |id: &i32| usize::try_from(*id).ok().and_then(|id| self.vocabulary.get(id).copied());
        let bytes: Vec<u8> = ids.iter().map(|id| byte(id).unwrap_or(0xFF)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Concatenates the `*.rs`, `*.md` and `*.toml` files under `root`, sorted by path.
fn repository_text(root: &Path) -> Result<Vec<u8>, ProgramError> {
    let unreadable = |path: &Path, cause: &std::io::Error| {
        no_default(format!("cannot read {}, a part of the default text: {cause}", path.display()))
    };
    let mut files = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    // The loop ends because the number of folders is finite and links are not followed.
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).map_err(|cause| unreadable(&folder, &cause))?;
        for entry in entries {
            let entry = entry.map_err(|cause| unreadable(&folder, &cause))?;
            let kind = entry.file_type().map_err(|cause| unreadable(&folder, &cause))?;
            let path = entry.path();
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            if kind.is_dir() && !hidden && entry.file_name() != "target" {
                folders.push(path);
            } else if kind.is_file() && path.extension().is_some_and(|e| e == "rs" || e == "md" || e == "toml") {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut text = Vec::new();
    for path in &files {
        text.extend(std::fs::read(path).map_err(|cause| unreadable(path, &cause))?);
    }
    if text.is_empty() {
        let what = "the default text is missing: no source or documentation files under";
        return Err(no_default(format!("{what} {}", root.display())));
    }
    Ok(text)
}

fn no_default(text: String) -> ProgramError {
    let hint = "the checkout that this program was built from is gone or incomplete: give a text file with --data";
    ProgramError::new(Exit::Usage, text, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8], context: usize) -> Result<Text, ProgramError> {
        Text::from_bytes(Path::new("some.txt"), bytes, context)
    }

    #[test]
    fn tokens_are_ranks_of_bytes() {
        let t = text(b"hello world, hello world!!!!!", 4).unwrap();
        assert_eq!(t.vocab(), b" !,dehlorw".len());
        assert_eq!(t.encode(b"he w"), Some(vec![5, 4, 0, 9]));
        assert_eq!(t.encode(b"z"), None);
        assert_eq!(t.prompt(), [5]);
        assert_eq!(text(b"ab\nab\nab\n", 4).unwrap().prompt(), [0]);
        assert_eq!(t.decode(&[5, 4, 0, 9]), "he w");
        assert_eq!(t.decode(&[-1, 5, 99]), "\u{FFFD}h\u{FFFD}");
    }

    /// The expected starts are `mix(4242 + k) % 86` for k = 6, 7, 8, computed with numpy.
    #[test]
    fn samples_follow_the_counter() {
        let bytes: Vec<u8> = (0..100).collect();
        let t = text(&bytes, 4).unwrap();
        assert_eq!((t.vocab(), t.train_len()), (100, 90));
        let (ids, targets) = t.samples(6, 3, 4);
        for (row, start) in [36, 84, 43].into_iter().enumerate() {
            assert_eq!(ids[row * 4..row * 4 + 4], [start, start + 1, start + 2, start + 3]);
            assert_eq!(targets[row * 4..row * 4 + 4], [start + 1, start + 2, start + 3, start + 4]);
        }
    }

    #[test]
    fn the_shortest_text_has_one_sample() {
        // The training part is 9/10 of 6 bytes, rounded down to 5. It holds one sample of 4 tokens and its targets.
        assert_eq!(text(b"abcdef", 4).unwrap().samples(7, 1, 4), (vec![0, 1, 2, 3], vec![1, 2, 3, 4]));
        let error = text(b"abcdef", 5).unwrap_err().to_string();
        assert_eq!(
            error,
            "some.txt is too short: 6 bytes, of which the first nine tenths (5) are for training, but one sample of --context 5 takes 6"
        );
    }

    #[test]
    fn missing_and_empty_files_are_named() {
        let error = Text::load(Some(Path::new("no/such/file.txt")), 4).unwrap_err();
        assert!(error.to_string().starts_with("cannot read data file no/such/file.txt: "), "{error}");
        assert_eq!(text(b"", 4).unwrap_err().to_string(), "data file some.txt is empty");
    }

    #[test]
    fn a_checkout_that_is_gone_is_not_a_wrong_flag() {
        let no_text = std::env::temp_dir().join(format!("shardflow-no-text-{}", std::process::id()));
        std::fs::create_dir(&no_text).unwrap();
        for (folder, expected) in [
            (Path::new("no/such/folder"), "cannot read no/such/folder, a part of the default text: No such file"),
            (&no_text, "the default text is missing: no source or documentation files under "),
        ] {
            let error = repository_text(folder).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
            let hint =
                "the checkout that this program was built from is gone or incomplete: give a text file with --data";
            assert_eq!((error.exit, error.hint.as_str()), (Exit::Usage, hint));
        }
        std::fs::remove_dir(no_text).unwrap();
    }

    #[test]
    fn the_default_text_is_this_repository() {
        let t = Text::load(None, 64).unwrap();
        let encoded = t.encode(b"//! Text as training data").expect("the sources hold these bytes");
        assert!(t.train.windows(encoded.len()).any(|w| w == encoded));
    }
}
