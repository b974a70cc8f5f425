//! Passes descriptors, such as those of shared memory, over a Unix link.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::{Connection, TransportError};

/// Descriptors in one message, at most. (The system's limit is 253.)
pub const DESCRIPTORS_MAX: usize = 64;
/// Room for the most that may come.
const SPACE: usize = rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX));

/// Sends descriptors in one message; the receiver gets its own handles. 1 to [`DESCRIPTORS_MAX`] of them.
///
/// # Errors
/// [`TransportError::NotUnix`], [`TransportError::Descriptors`] for a wrong number, [`TransportError::Io`].
pub fn send_descriptors(link: &Connection, descriptors: &[BorrowedFd<'_>]) -> Result<(), TransportError> {
    check(link, descriptors.len())?;
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)), "the space is sized for the most");
    // The count travels as a byte of data: without data, no descriptors pass a stream.
    let count = [descriptors.len() as u8];
    loop {
        match sendmsg(link, &[IoSlice::new(&count)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(TransportError::io("passing descriptors to", &link.peer(), error)),
        }
    }
}

/// Receives the descriptors of one [`send_descriptors`]: `count` of them, 1 to [`DESCRIPTORS_MAX`]. They are closed on exec.
/// Waits as long as the link's read time-out allows.
///
/// # Errors
/// [`TransportError::NotUnix`], [`TransportError::Descriptors`] when more or fewer came, [`TransportError::Io`]. Whatever
/// came is closed then.
pub fn receive_descriptors(link: &Connection, count: usize) -> Result<Vec<OwnedFd>, TransportError> {
    check(link, count)?;
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut said = [0u8];
    let failed = |error: io::Error| TransportError::io("receiving descriptors from", &link.peer(), error);
    let message = loop {
        match recvmsg(link, &mut [IoSliceMut::new(&mut said)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received.map_err(|error| failed(error.into()))?,
        }
    };
    if message.bytes == 0 {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors: Vec<OwnedFd> = rights.flatten().collect();
    let truncated = message.flags.contains(ReturnFlags::CTRUNC);
    if truncated || descriptors.len() != count || usize::from(said[0]) != count {
        let got = descriptors.len().max(usize::from(said[0]));
        return Err(TransportError::Descriptors { peer: link.peer(), expected: count.to_string(), got });
    }
    Ok(descriptors)
}

fn check(link: &Connection, count: usize) -> Result<(), TransportError> {
    if !link.is_unix() {
        return Err(TransportError::NotUnix { peer: link.peer() });
    }
    if count == 0 || count > DESCRIPTORS_MAX {
        let expected = format!("1 to {DESCRIPTORS_MAX}");
        return Err(TransportError::Descriptors { peer: link.peer(), expected, got: count });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Connection, Connection) {
        let (a, b) = UnixStream::pair().unwrap();
        (Connection::Unix(a), Connection::Unix(b))
    }

    #[test]
    fn descriptors_arrive_in_order_and_in_their_number() {
        let (a, b) = pair();
        let mut files: Vec<File> = (0..DESCRIPTORS_MAX).map(|_| tempfile::tempfile().unwrap()).collect();
        for (i, file) in files.iter_mut().enumerate() {
            write!(file, "{i}").unwrap();
        }
        let handles: Vec<BorrowedFd> = files.iter().map(File::as_fd).collect();
        send_descriptors(&a, &handles).unwrap();
        send_descriptors(&a, &handles[7..8]).unwrap();
        let mut received = receive_descriptors(&b, DESCRIPTORS_MAX).unwrap();
        received.extend(receive_descriptors(&b, 1).unwrap());
        for (i, descriptor) in received.into_iter().enumerate() {
            assert!(rustix::io::fcntl_getfd(&descriptor).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
            let (mut file, mut text) = (File::from(descriptor), String::new());
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, if i == DESCRIPTORS_MAX { "7".into() } else { i.to_string() });
        }
    }

    #[test]
    fn another_number_is_refused() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        send_descriptors(&a, &[file.as_fd()]).unwrap();
        assert!(matches!(receive_descriptors(&b, 2), Err(TransportError::Descriptors { got: 1, .. })));
        // Data without descriptors.
        (&a).write_all(&[3]).unwrap();
        assert!(matches!(receive_descriptors(&b, 3), Err(TransportError::Descriptors { got: 3, .. })));
        assert!(matches!(send_descriptors(&a, &[]), Err(TransportError::Descriptors { got: 0, .. })));
        assert!(matches!(receive_descriptors(&b, DESCRIPTORS_MAX + 1), Err(TransportError::Descriptors { .. })));
        drop(a);
        assert!(matches!(receive_descriptors(&b, 1), Err(TransportError::Io { .. })));
    }
}
