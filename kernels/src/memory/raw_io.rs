//! Transfers bytes between an arena and a socket or file without an extra copy. GPU memory is the exception: its bytes
//! pass through a pinned buffer.
#![allow(unsafe_code)]

use std::io::{self, Read, Write};

use super::Arena;

impl Arena {
    /// Writes `bytes` bytes at `offset` to `sink`. The caller guarantees that nothing writes the range meanwhile.
    ///
    /// # Errors
    /// `InvalidInput` if the range is out of bounds; any error of `sink` or of the GPU.
    pub fn write_to(&self, offset: usize, bytes: usize, sink: &mut impl Write) -> io::Result<()> {
        self.check_inside(offset, bytes)?;
        if let Some(memory) = self.storage_on_device() {
            let mut written = Ok(());
            memory.read(offset, bytes, &mut |piece| {
                written = sink.write_all(piece);
                written.is_ok()
            })?;
            return written;
        }
        let start = self.host_start().wrapping_add(offset);
        // SAFETY: the range is in bounds (just checked), and is initialized because arenas start zeroed. By the
        // contract, nothing writes it (MEM-3).
        sink.write_all(unsafe { std::slice::from_raw_parts(start, bytes) })
    }

    /// Reads `bytes` bytes from `source` to `offset`. The caller guarantees that nothing else uses the range meanwhile.
    ///
    /// # Errors
    /// `InvalidInput` if the range is out of bounds or read-only; `UnexpectedEof` if `source` ends early; any error of
    /// `source` or of the GPU.
    pub fn read_from(&self, offset: usize, bytes: usize, source: &mut impl Read) -> io::Result<()> {
        if !self.is_writable() {
            let message = "the arena is mapped read-only from another process";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        self.check_inside(offset, bytes)?;
        if let Some(memory) = self.storage_on_device() {
            let mut filled = Ok(());
            memory.write(offset, bytes, &mut |piece| {
                filled = source.read_exact(piece);
                filled.is_ok()
            })?;
            return filled;
        }
        let start = self.host_start().wrapping_add(offset);
        // SAFETY: the range is in bounds (just checked), and is initialized because arenas start zeroed. By the
        // contract, nothing else uses it.
        source.read_exact(unsafe { std::slice::from_raw_parts_mut(start, bytes) })
    }

    fn check_inside(&self, offset: usize, bytes: usize) -> io::Result<()> {
        if offset.checked_add(bytes).is_none_or(|end| end > self.bytes()) {
            let message = format!("{bytes} bytes at byte {offset} exceed the arena's {} bytes", self.bytes());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::Tally;

    #[test]
    fn transfers_copy_the_bytes_and_check_bounds() {
        let arena = Arena::host(0, 16, &Arc::new(Tally::default())).expect("16 bytes");
        arena.read_from(4, 3, &mut &[1u8, 2, 3, 4][..]).expect("inside");
        let mut out = Vec::new();
        arena.write_to(2, 6, &mut out).expect("inside");
        assert_eq!(out, [0, 0, 1, 2, 3, 0]);
        assert_eq!(arena.read_from(0, 5, &mut &[1u8][..]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        for (offset, bytes) in [(0, 17), (16, 1), (usize::MAX, 1), (1, usize::MAX)] {
            assert_eq!(arena.write_to(offset, bytes, &mut out).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        arena.write_to(16, 0, &mut out).expect("an empty range is in bounds");
    }
}
