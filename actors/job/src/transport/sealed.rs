//! Encrypted records over a socket. A record is a length (little-endian u16) and one Noise message.
//!
//! - **SEAL-1**: record `n` of a direction has nonce `n`, so removed, repeated or reordered records are detected.
//! - **SEAL-2**: a connection holds at most one record to send, and [`INPUT_BYTES`] of received records.
//! - **SEAL-3**: the writer's bytes are accepted one record at a time. If the socket accepts only part of a record, the
//!   rest is sent before the next record is encrypted.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};

use parking_lot::Mutex;
use snow::StatelessTransportState;

use super::handshake::TAG_BYTES;

const PREFIX_BYTES: usize = 2;
/// Maximum size of a record without its prefix: the limit of a Noise message.
const RECORD_BYTES_MAX: usize = 65535;
/// Maximum number of a writer's bytes in one record.
pub(super) const PLAIN_BYTES_MAX: usize = RECORD_BYTES_MAX - TAG_BYTES;
/// Size of the buffer for received bytes: two records.
const INPUT_BYTES: usize = 2 * (PREFIX_BYTES + RECORD_BYTES_MAX);

/// The cipher of a connection. Different threads may use the two directions at the same time.
pub(super) struct Seal {
    keys: StatelessTransportState,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
}

struct Incoming {
    nonce: u64,
    /// Received bytes. Those in `start..end` are not decrypted yet.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Decrypted bytes. Those in `taken..decrypted` have not been read yet.
    plain: Vec<u8>,
    taken: usize,
    decrypted: usize,
}

struct Outgoing {
    nonce: u64,
    /// The record that is being sent, in `..end`. Its first `sent` bytes have been sent.
    record: Vec<u8>,
    sent: usize,
    end: usize,
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal(..)")
    }
}

impl Seal {
    /// Continues after a handshake, which has used nonce 0 in both directions.
    pub(super) fn new(keys: StatelessTransportState) -> Self {
        let incoming =
            Incoming { nonce: 1, input: Vec::new(), start: 0, end: 0, plain: Vec::new(), taken: 0, decrypted: 0 };
        let outgoing = Outgoing { nonce: 1, record: Vec::new(), sent: 0, end: 0 };
        Self { keys, incoming: Mutex::new(incoming), outgoing: Mutex::new(outgoing) }
    }

    /// Reads decrypted bytes. Fails if a record was modified. After a timeout or `WouldBlock`, call this again.
    pub(super) fn read(&self, mut socket: impl Read, into: &mut [u8]) -> io::Result<usize> {
        let mut incoming = self.incoming.lock();
        let incoming = &mut *incoming;
        loop {
            if incoming.taken < incoming.decrypted || into.is_empty() {
                let left = &incoming.plain[incoming.taken..incoming.decrypted];
                let bytes = left.len().min(into.len());
                into[..bytes].copy_from_slice(&left[..bytes]);
                incoming.taken += bytes;
                return Ok(bytes);
            }
            let Some(record) = incoming.next_record() else {
                if incoming.receive(&mut socket)? == 0 {
                    // The connection ended within a record: this record and the peer's later bytes are lost.
                    return if incoming.start == incoming.end { Ok(0) } else { Err(ErrorKind::UnexpectedEof.into()) };
                }
                continue;
            };
            let bytes = record.len().checked_sub(TAG_BYTES).filter(|bytes| *bytes > 0).ok_or(ErrorKind::InvalidData)?;
            let (nonce, record) = (incoming.nonce, &incoming.input[record]);
            let decrypt =
                |out: &mut [u8]| self.keys.read_message(nonce, record, out).map_err(|_| ErrorKind::InvalidData);
            incoming.nonce += 1;
            if into.len() >= bytes {
                decrypt(&mut into[..bytes])?;
                return Ok(bytes);
            }
            incoming.plain.resize(PLAIN_BYTES_MAX, 0);
            decrypt(&mut incoming.plain[..bytes])?;
            (incoming.taken, incoming.decrypted) = (0, bytes);
        }
    }

    /// Encrypts at most one record from `first` and then `second`, and sends as much of it as the socket accepts.
    /// Returns how many of the caller's bytes were accepted. Fails while the previous record cannot be sent completely.
    pub(super) fn write(&self, socket: impl Write, first: &[u8], second: &[u8]) -> io::Result<usize> {
        let mut outgoing = self.outgoing.lock();
        let mut socket = socket;
        outgoing.send(&mut socket)?;
        let first = &first[..first.len().min(PLAIN_BYTES_MAX)];
        let second = &second[..second.len().min(PLAIN_BYTES_MAX - first.len())];
        let bytes = first.len() + second.len();
        if bytes == 0 {
            return Ok(0);
        }
        let Outgoing { nonce, record, sent, end } = &mut *outgoing;
        record.resize(PREFIX_BYTES + RECORD_BYTES_MAX, 0);
        let (prefix, body) = record[..PREFIX_BYTES + bytes + TAG_BYTES].split_at_mut(PREFIX_BYTES);
        prefix.copy_from_slice(&((bytes + TAG_BYTES) as u16).to_le_bytes());
        let joined;
        let plain = match (first, second) {
            (first, []) => first,
            ([], second) => second,
            (first, second) => {
                joined = [first, second].concat();
                &joined
            }
        };
        self.keys.write_message(*nonce, plain, body).map_err(io::Error::other)?;
        (*nonce, *sent, *end) = (*nonce + 1, 0, PREFIX_BYTES + bytes + TAG_BYTES);
        match outgoing.send(&mut socket) {
            // The next call sends the rest.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(bytes),
            sent => sent.map(|()| bytes),
        }
    }

    /// Sends the rest of the current record.
    pub(super) fn flush(&self, mut socket: impl Write) -> io::Result<()> {
        self.outgoing.lock().send(&mut socket)
    }

    pub(super) fn has_unsent(&self) -> bool {
        let outgoing = self.outgoing.lock();
        outgoing.sent < outgoing.end
    }
}

impl Incoming {
    /// Returns the range of the next complete record, without its prefix, and marks the record as consumed.
    fn next_record(&mut self) -> Option<std::ops::Range<usize>> {
        let received = &self.input[self.start..self.end];
        let (prefix, rest) = received.split_first_chunk::<PREFIX_BYTES>()?;
        let bytes = usize::from(u16::from_le_bytes(*prefix));
        (rest.len() >= bytes).then(|| {
            let start = self.start + PREFIX_BYTES;
            self.start = start + bytes;
            start..start + bytes
        })
    }

    /// Reads bytes from the socket, and appends them to the received bytes.
    fn receive(&mut self, socket: &mut impl Read) -> io::Result<usize> {
        self.input.resize(INPUT_BYTES, 0);
        // Moves the bytes only if a whole record does not fit behind `start`.
        if self.start == self.end || self.start > INPUT_BYTES / 2 {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let bytes = socket.read(&mut self.input[self.end..])?;
        self.end += bytes;
        Ok(bytes)
    }
}

impl Outgoing {
    fn send(&mut self, socket: &mut impl Write) -> io::Result<()> {
        while self.sent < self.end {
            match socket.write(&self.record[self.sent..self.end]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(bytes) => self.sent += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
