//! The heartbeat's datagram: fixed layout, little-endian, with a MAC. Pure.
//!
//! `magic [4] | version u16 | zero u16 | session [16] | epoch u64 | process u32 | lost u32 | sequence u64 | step u64 | mac [16]`

use std::collections::BTreeMap;

/// Bytes of a datagram.
pub(crate) const BYTES: usize = SIGNED + MAC;

const MAGIC: [u8; 4] = *b"SFHB";
const VERSION: u16 = 2;
/// Bytes that the MAC covers.
const SIGNED: usize = 56;
const MAC: usize = 16;
/// What `lost` is when nobody is.
const NOBODY: u32 = u32::MAX;

/// What a heartbeat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) epoch: u64,
    pub(crate) process: u32,
    /// Counts up from 1 within an epoch.
    pub(crate) sequence: u64,
    /// The step that the process is at.
    pub(crate) step: u64,
    /// The process that it has lost, and that it ends for.
    pub(crate) lost: Option<u32>,
}

/// Why a datagram was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Not ours: size, magic, version, or a process that is not in this world.
    Format,
    /// Made without the job's key.
    Mac,
    /// Of an incarnation before this one.
    OldEpoch,
    /// Of an incarnation after this one: we are the old one.
    NewerEpoch,
    /// Of another run with the same key.
    Session,
    /// Seen before, or overtaken.
    Replay,
}

/// Writes and reads the datagrams of one session.
#[derive(Debug)]
pub(crate) struct Codec {
    key: [u8; 32],
    session: [u8; 16],
    epoch: u64,
    processes: u32,
    /// Highest sequence heard, by process.
    heard: BTreeMap<u32, u64>,
}

impl Codec {
    /// `key` is the job's; a key for this use is derived from it.
    pub(crate) fn new(key: &[u8; 32], session: [u8; 16], epoch: u64, processes: u32) -> Self {
        let key = blake3::derive_key("shardflow heartbeat v1", key);
        Self { key, session, epoch, processes, heard: BTreeMap::new() }
    }

    pub(crate) fn write(&self, process: u32, sequence: u64, step: u64, lost: Option<u32>) -> [u8; BYTES] {
        let mut out = [0; BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4..6].copy_from_slice(&VERSION.to_le_bytes());
        out[8..24].copy_from_slice(&self.session);
        out[24..32].copy_from_slice(&self.epoch.to_le_bytes());
        out[32..36].copy_from_slice(&process.to_le_bytes());
        out[36..40].copy_from_slice(&lost.unwrap_or(NOBODY).to_le_bytes());
        out[40..48].copy_from_slice(&sequence.to_le_bytes());
        out[48..SIGNED].copy_from_slice(&step.to_le_bytes());
        self.sign(&mut out);
        out
    }

    /// Puts the MAC of what is before it.
    pub(crate) fn sign(&self, datagram: &mut [u8; BYTES]) {
        let mac = self.mac(&datagram[..SIGNED]);
        datagram[SIGNED..].copy_from_slice(&mac);
    }

    fn mac(&self, signed: &[u8]) -> [u8; MAC] {
        let mut mac = [0; MAC];
        mac.copy_from_slice(&blake3::keyed_hash(&self.key, signed).as_bytes()[..MAC]);
        mac
    }

    /// Checks and reads a datagram; each sequence number is taken once.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> Result<Beat, Refusal> {
        if bytes.len() != BYTES || bytes[..4] != MAGIC || bytes[4..8] != [VERSION as u8, (VERSION >> 8) as u8, 0, 0] {
            return Err(Refusal::Format);
        }
        // In constant time, so that no part of a forged MAC can be told right from how soon it is refused.
        let different = self.mac(&bytes[..SIGNED]).iter().zip(&bytes[SIGNED..]).fold(0, |all, (a, b)| all | (a ^ b));
        if different != 0 {
            return Err(Refusal::Mac);
        }
        let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let (process, lost) = (number(32) as u32, (number(32) >> 32) as u32);
        let lost = (lost != NOBODY).then_some(lost);
        let beat = Beat { epoch: number(24), process, sequence: number(40), step: number(48), lost };
        if beat.epoch < self.epoch {
            return Err(Refusal::OldEpoch);
        }
        if bytes[8..24] != self.session {
            return Err(Refusal::Session);
        }
        if beat.epoch > self.epoch {
            return Err(Refusal::NewerEpoch);
        }
        if beat.process >= self.processes || lost.is_some_and(|lost| lost >= self.processes || lost == process) {
            return Err(Refusal::Format);
        }
        let highest = self.heard.entry(beat.process).or_default();
        if beat.sequence <= *highest {
            return Err(Refusal::Replay);
        }
        *highest = beat.sequence;
        Ok(beat)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];
    const SESSION: [u8; 16] = [9; 16];

    fn codec(epoch: u64) -> Codec {
        Codec::new(&KEY, SESSION, epoch, 4)
    }

    #[test]
    fn what_is_written_is_read_once() {
        let (sender, mut receiver) = (codec(3), codec(3));
        let written = sender.write(2, 5, 77, None);
        assert_eq!(receiver.read(&written), Ok(Beat { epoch: 3, process: 2, sequence: 5, step: 77, lost: None }));
        assert_eq!(receiver.read(&written), Err(Refusal::Replay));
        assert_eq!(receiver.read(&sender.write(2, 4, 77, None)), Err(Refusal::Replay));
        assert!(receiver.read(&sender.write(1, 4, 77, None)).is_ok(), "sequences are each process's own");
        let accuses = receiver.read(&sender.write(2, 6, 77, Some(3))).expect("newer");
        assert_eq!(accuses.lost, Some(3));
    }

    #[test]
    fn epochs_and_sessions() {
        let mut receiver = codec(3);
        assert_eq!(receiver.read(&codec(2).write(2, 9, 0, None)), Err(Refusal::OldEpoch));
        assert_eq!(receiver.read(&codec(4).write(2, 9, 0, None)), Err(Refusal::NewerEpoch));
        let other = Codec::new(&KEY, [1; 16], 3, 4);
        assert_eq!(receiver.read(&other.write(2, 9, 0, None)), Err(Refusal::Session));
        assert_eq!(receiver.read(&codec(3).write(4, 9, 0, None)), Err(Refusal::Format));
        for nonsense in [2, 4, u32::MAX - 1] {
            assert_eq!(receiver.read(&codec(3).write(2, 9, 0, Some(nonsense))), Err(Refusal::Format));
        }
        // None of them took the sequence number.
        assert!(receiver.read(&codec(3).write(2, 1, 0, None)).is_ok());
    }

    #[test]
    fn every_changed_bit_and_length_is_refused() {
        let good = codec(3).write(2, 5, 77, None);
        for bit in 0..BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            let refused = codec(3).read(&bad).expect_err("changed");
            assert_eq!(refused, if bit < 64 { Refusal::Format } else { Refusal::Mac }, "bit {bit}");
        }
        for length in 0..BYTES {
            assert_eq!(codec(3).read(&good[..length]), Err(Refusal::Format));
        }
        assert_eq!(codec(3).read(&[&good[..], &[0]].concat()), Err(Refusal::Format));
        let forged = Codec::new(&[8; 32], SESSION, 3, 4).write(2, 5, 77, None);
        assert_eq!(codec(3).read(&forged), Err(Refusal::Mac));
    }
}
