//! Tests encrypted records over socket pairs and over byte buffers.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::secret::sample;
use crate::transport::handshake::tests::run_handshake;

fn seals() -> [Seal; 2] {
    run_handshake([&sample(), &sample()], Ok(()), |_, message| message).map(|keys| Seal::new(keys.unwrap()))
}

/// A socket that accepts and returns only a few bytes at a time. In between, it returns `WouldBlock`.
#[derive(Default)]
struct Narrow {
    bytes: VecDeque<u8>,
    /// How many bytes each call accepts or returns, cyclically; 0 means `WouldBlock`.
    widths: Vec<usize>,
    calls: usize,
}

impl Narrow {
    fn width(&mut self) -> io::Result<usize> {
        self.calls += 1;
        match self.widths[self.calls % self.widths.len()] {
            0 => Err(ErrorKind::WouldBlock.into()),
            width => Ok(width),
        }
    }
}

impl Write for &mut Narrow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let width = self.width()?.min(bytes.len());
        self.bytes.extend(&bytes[..width]);
        Ok(width)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for &mut Narrow {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let width = self.width()?.min(into.len()).min(self.bytes.len());
        if width == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        let taken: Vec<u8> = self.bytes.drain(..width).collect();
        into[..width].copy_from_slice(&taken);
        Ok(width)
    }
}

proptest! {
    /// All bytes arrive in order, and each call returns how many it moved. The socket may move any number in a call.
    #[test]
    fn bytes_arrive_in_order_over_any_socket(
        first in 0usize..200_000, second in 0usize..70_000, read_max in 1usize..100_000,
        mut widths in prop::collection::vec(0usize..40_000, 1..6),
    ) {
        widths.push(40_000);
        let [writer, reader] = seals();
        let data: Vec<u8> = (0..first + second).map(|i| (i * 7 + i / 251) as u8).collect();
        let mut socket = Narrow { widths, ..Narrow::default() };
        let (mut sent, mut received) = (0, Vec::new());
        let mut buffer = vec![0; read_max];
        while received.len() < data.len() {
            let (a, b) = data.split_at(first.max(sent));
            match writer.write(&mut socket, &a[sent.min(a.len())..], b) {
                Ok(bytes) => sent += bytes,
                Err(error) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            match reader.read(&mut socket, &mut buffer) {
                Ok(bytes) => received.extend_from_slice(&buffer[..bytes]),
                Err(error) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        prop_assert!(received == data && sent == data.len());
    }
}

/// SEAL-1
#[test]
fn changed_repeated_reordered_and_missing_records_are_errors() {
    let record = |seal: &Seal, text: &[u8]| {
        let mut bytes = Vec::new();
        assert_eq!(seal.write(&mut bytes, text, &[]).unwrap(), text.len());
        bytes
    };
    let read = |change: &dyn Fn([Vec<u8>; 3]) -> Vec<u8>| {
        let [writer, reader] = seals();
        let bytes = change([b"one", b"two", b"six"].map(|text| record(&writer, text)));
        let (mut socket, mut all) = (&bytes[..], Vec::new());
        let mut into = [0; 8];
        loop {
            match reader.read(&mut socket, &mut into) {
                Ok(0) => return Ok(String::from_utf8(all).unwrap()),
                Ok(got) => all.extend_from_slice(&into[..got]),
                Err(error) => return Err(error.kind()),
            }
        }
    };
    assert_eq!(read(&|records| records.concat()), Ok("onetwosix".into()));
    let invalid = Err(ErrorKind::InvalidData);
    assert_eq!(read(&|[a, b, c]| [a.clone(), a, b, c].concat()), invalid, "repeated");
    assert_eq!(read(&|[a, b, c]| [b, a, c].concat()), invalid, "reordered");
    assert_eq!(read(&|[a, _, c]| [a, c].concat()), invalid, "missing");
    assert_eq!(read(&|_| vec![3, 0, 1, 2, 3]), invalid, "shorter than a tag");
    assert_eq!(read(&|[a, b, c]| [a, b, c[..9].to_vec()].concat()), Err(ErrorKind::UnexpectedEof), "cut off");
    for at in 2..3 + 2 + TAG_BYTES {
        let flipped = |[mut a, b, c]: [Vec<u8>; 3]| {
            a[at] ^= 1;
            [a, b, c].concat()
        };
        assert_eq!(read(&flipped), invalid, "byte {at}");
    }
}

/// The two directions are independent: both ends write more than the sockets can hold before either end reads.
#[test]
fn both_directions_move_at_the_same_time() {
    let [a, b] = seals();
    let (left, right) = UnixStream::pair().unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| i as u8).collect();
    std::thread::scope(|scope| {
        for (seal, socket) in [(&a, &left), (&b, &right)] {
            let data = &data;
            scope.spawn(move || {
                let mut left = &data[..];
                while !left.is_empty() {
                    left = &left[seal.write(socket, left, &[]).unwrap()..];
                }
            });
            scope.spawn(move || {
                let (mut received, mut buffer) = (Vec::new(), vec![0; 5000]);
                while received.len() < data.len() {
                    let got = seal.read(socket, &mut buffer).unwrap();
                    received.extend_from_slice(&buffer[..got]);
                }
                assert!(&received == data);
            });
        }
    });
}
