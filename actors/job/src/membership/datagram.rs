//! The heartbeat datagram: the fields of [`Signed`] as fixed-size little-endian numbers, followed by their MAC.

use std::collections::BTreeMap;
use std::time::Duration;

use bincode::config::{Configuration, Fixint, LittleEndian, legacy};

pub(crate) const BYTES: usize = SIGNED + MAC;

/// The fields are magic, version, session, epoch, process, lost process, sequence number, most silent process, and the
/// silence of that process in milliseconds.
type Signed = ([u8; 4], u32, [u8; 16], u64, u32, u32, u64, u32, u32);

const CONFIG: Configuration<LittleEndian, Fixint> = legacy();
const MAGIC: [u8; 4] = *b"SFHB";
const VERSION: u32 = 4;
/// Number of bytes that the MAC covers.
const SIGNED: usize = 56;
const MAC: usize = 16;
/// Value of a process field that names no process.
const NO_PROCESS: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heartbeat {
    pub(crate) epoch: u64,
    pub(crate) process: u32,
    /// The sequence number, which counts up from 1 within an epoch.
    pub(crate) sequence: u64,
    /// The process that the sender has lost. The sender ends because of this loss.
    pub(crate) lost: Option<u32>,
    /// The most silent process on the sender's side of the tree edge to the receiver.
    pub(crate) most_silent: Option<MostSilent>,
}

/// In a group of processes, the one whose last heartbeat is the oldest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MostSilent {
    pub(crate) process: u32,
    /// Time since the last heartbeat. A datagram carries this time in whole milliseconds.
    pub(crate) silent: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// The size, magic or version is wrong, or the process is not in this world.
    Format,
    /// The MAC is wrong: the datagram was signed without the job's key.
    Mac,
    /// The datagram is from an older epoch.
    OldEpoch,
    /// The datagram is from a newer epoch, so this process belongs to an old one.
    NewerEpoch,
    /// The datagram is from another session with the same key.
    Session,
    /// The datagram is a duplicate, or is older than the newest datagram of the same sender.
    Replay,
}

#[derive(Debug)]
pub(crate) struct Codec {
    key: [u8; 32],
    session: [u8; 16],
    epoch: u64,
    processes: u32,
    /// Highest received sequence number, by process.
    received: BTreeMap<u32, u64>,
}

impl Codec {
    pub(crate) fn new(key: &[u8; 32], session: [u8; 16], epoch: u64, processes: u32) -> Self {
        let key = blake3::derive_key("shardflow heartbeat v1", key);
        Self { key, session, epoch, processes, received: BTreeMap::new() }
    }

    pub(crate) fn write(
        &self,
        process: u32,
        sequence: u64,
        lost: Option<u32>,
        most_silent: Option<MostSilent>,
    ) -> [u8; BYTES] {
        let mut out = [0; BYTES];
        let lost = lost.unwrap_or(NO_PROCESS);
        let (silent, silent_ms) = most_silent
            .map_or((NO_PROCESS, 0), |most| (most.process, most.silent.as_millis().min(u32::MAX.into()) as u32));
        let signed: Signed = (MAGIC, VERSION, self.session, self.epoch, process, lost, sequence, silent, silent_ms);
        bincode::serde::encode_into_slice(signed, &mut out[..SIGNED], CONFIG).expect("the size is fixed");
        self.sign(&mut out);
        out
    }

    pub(crate) fn sign(&self, datagram: &mut [u8; BYTES]) {
        let mac = self.mac(&datagram[..SIGNED]);
        datagram[SIGNED..].copy_from_slice(&mac);
    }

    fn mac(&self, signed: &[u8]) -> [u8; MAC] {
        let mut mac = [0; MAC];
        mac.copy_from_slice(&blake3::keyed_hash(&self.key, signed).as_bytes()[..MAC]);
        mac
    }

    /// Checks and decodes a datagram. Accepts each sequence number of a process only once.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> Result<Heartbeat, Rejection> {
        let Ok((signed, SIGNED)) = bincode::serde::decode_from_slice::<Signed, _>(bytes, CONFIG) else {
            return Err(Rejection::Format);
        };
        let (magic, version, session, epoch, process, lost, sequence, silent, silent_ms) = signed;
        if bytes.len() != BYTES || magic != MAGIC || version != VERSION {
            return Err(Rejection::Format);
        }
        // Compares in constant time, so that the time reveals nothing about a partially correct MAC.
        let difference = self.mac(&bytes[..SIGNED]).iter().zip(&bytes[SIGNED..]).fold(0, |all, (a, b)| all | (a ^ b));
        if difference != 0 {
            return Err(Rejection::Mac);
        }
        let lost = (lost != NO_PROCESS).then_some(lost);
        let most = MostSilent { process: silent, silent: Duration::from_millis(silent_ms.into()) };
        let most_silent = (silent != NO_PROCESS).then_some(most);
        let highest = self.received.get(&process).copied().unwrap_or(0);
        let rejection = match epoch {
            older if older < self.epoch => Rejection::OldEpoch,
            _ if session != self.session => Rejection::Session,
            newer if newer > self.epoch => Rejection::NewerEpoch,
            _ if process >= self.processes => Rejection::Format,
            _ if lost.is_some_and(|lost| lost >= self.processes || lost == process) => Rejection::Format,
            // Without a most silent process, the silence must be 0, so that every heartbeat has exactly one encoding.
            _ if most_silent.map_or(silent_ms != 0, |most| most.process >= self.processes) => Rejection::Format,
            _ if sequence <= highest => Rejection::Replay,
            _ => {
                self.received.insert(process, sequence);
                return Ok(Heartbeat { epoch, process, sequence, lost, most_silent });
            }
        };
        Err(rejection)
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
    fn each_datagram_is_accepted_once() {
        let (sender, mut receiver) = (codec(3), codec(3));
        let written = sender.write(2, 5, None, None);
        assert_eq!(
            receiver.read(&written),
            Ok(Heartbeat { epoch: 3, process: 2, sequence: 5, lost: None, most_silent: None })
        );
        assert_eq!(receiver.read(&written), Err(Rejection::Replay));
        assert_eq!(receiver.read(&sender.write(2, 4, None, None)), Err(Rejection::Replay));
        assert!(receiver.read(&sender.write(1, 4, None, None)).is_ok(), "each process has its own sequence");
        let with_loss = receiver.read(&sender.write(2, 6, Some(3), None)).expect("newer");
        assert_eq!(with_loss.lost, Some(3));
        let most_silent = Some(MostSilent { process: 3, silent: Duration::from_millis(4_000) });
        let with_silence = receiver.read(&sender.write(2, 7, None, most_silent)).expect("newer");
        assert_eq!(with_silence.most_silent, most_silent);
    }

    #[test]
    fn other_epochs_and_sessions_are_rejected() {
        let mut receiver = codec(3);
        assert_eq!(receiver.read(&codec(2).write(2, 9, None, None)), Err(Rejection::OldEpoch));
        assert_eq!(receiver.read(&codec(4).write(2, 9, None, None)), Err(Rejection::NewerEpoch));
        let other = Codec::new(&KEY, [1; 16], 3, 4);
        assert_eq!(receiver.read(&other.write(2, 9, None, None)), Err(Rejection::Session));
        assert_eq!(receiver.read(&codec(3).write(4, 9, None, None)), Err(Rejection::Format));
        for invalid in [2, 4, u32::MAX - 1] {
            assert_eq!(receiver.read(&codec(3).write(2, 9, Some(invalid), None)), Err(Rejection::Format));
        }
        let unknown = Some(MostSilent { process: 4, silent: Duration::ZERO });
        assert_eq!(receiver.read(&codec(3).write(2, 9, None, unknown)), Err(Rejection::Format));
        // The rejected datagrams did not use up the sequence number.
        assert!(receiver.read(&codec(3).write(2, 1, None, None)).is_ok());
    }

    #[test]
    fn every_changed_bit_and_length_is_rejected() {
        let good = codec(3).write(2, 5, None, None);
        for bit in 0..BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            let rejection = codec(3).read(&bad).expect_err("changed");
            assert_eq!(rejection, if bit < 64 { Rejection::Format } else { Rejection::Mac }, "bit {bit}");
        }
        for length in 0..BYTES {
            assert_eq!(codec(3).read(&good[..length]), Err(Rejection::Format));
        }
        assert_eq!(codec(3).read(&[&good[..], &[0]].concat()), Err(Rejection::Format));
        let forged = Codec::new(&[8; 32], SESSION, 3, 4).write(2, 5, None, None);
        assert_eq!(codec(3).read(&forged), Err(Rejection::Mac));
    }
}
