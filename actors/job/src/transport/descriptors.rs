//! Transfers file descriptors, such as those of shared memory, over a Unix socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::connection::Connection;
use super::error::TransportError;

/// Maximum number of descriptors in one message. The system's limit is 253.
pub const DESCRIPTORS_MAX: usize = 64;
const SPACE: usize = rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX));

/// Sends 1 to [`DESCRIPTORS_MAX`] descriptors in one message. The receiver gets its own handles.
pub fn send_descriptors(connection: &Connection, descriptors: &[BorrowedFd<'_>]) -> Result<(), TransportError> {
    check(connection, descriptors.len())?;
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)), "the buffer holds the maximum number");
    // The count is sent as one byte of data, because a stream socket transfers descriptors only together with data.
    let count = [descriptors.len() as u8];
    let send = || sendmsg(connection, &[IoSlice::new(&count)], &mut ancillary, SendFlags::NOSIGNAL);
    let sent = retry_on_intr(send).map(drop);
    sent.map_err(|error| TransportError::io("cannot send descriptors to", &connection.peer(), error))
}

/// Receives the `count` descriptors (1 to [`DESCRIPTORS_MAX`]) of one [`send_descriptors`] call. They are closed on
/// exec. The connection's read timeout applies. On error, already received descriptors are closed.
pub fn receive_descriptors(connection: &Connection, count: usize) -> Result<Vec<OwnedFd>, TransportError> {
    check(connection, count)?;
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut sent_count = [0u8];
    let failed = |error: io::Error| TransportError::io("cannot receive descriptors from", &connection.peer(), error);
    let message = retry_on_intr(|| {
        recvmsg(connection, &mut [IoSliceMut::new(&mut sent_count)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    });
    let message = message.map_err(|error| failed(error.into()))?;
    if message.bytes == 0 {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors: Vec<OwnedFd> = rights.flatten().collect();
    let truncated = message.flags.contains(ReturnFlags::CTRUNC);
    if truncated || descriptors.len() != count || usize::from(sent_count[0]) != count {
        let got = descriptors.len().max(usize::from(sent_count[0]));
        return Err(TransportError::Descriptors { peer: connection.peer(), expected: count.to_string(), got });
    }
    Ok(descriptors)
}

fn check(connection: &Connection, count: usize) -> Result<(), TransportError> {
    if !connection.is_unix() {
        return Err(TransportError::NotUnix { peer: connection.peer() });
    }
    if count == 0 || count > DESCRIPTORS_MAX {
        let expected = format!("1 to {DESCRIPTORS_MAX}");
        return Err(TransportError::Descriptors { peer: connection.peer(), expected, got: count });
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
        (a.into(), b.into())
    }

    #[test]
    fn all_descriptors_arrive_in_order() {
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
    fn another_number_of_descriptors_is_rejected() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        send_descriptors(&a, &[file.as_fd()]).unwrap();
        assert!(matches!(receive_descriptors(&b, 2), Err(TransportError::Descriptors { got: 1, .. })));
        // Sends data without descriptors.
        (&a).write_all(&[3]).unwrap();
        assert!(matches!(receive_descriptors(&b, 3), Err(TransportError::Descriptors { got: 3, .. })));
        assert!(matches!(send_descriptors(&a, &[]), Err(TransportError::Descriptors { got: 0, .. })));
        assert!(matches!(receive_descriptors(&b, DESCRIPTORS_MAX + 1), Err(TransportError::Descriptors { .. })));
        drop(a);
        assert!(matches!(receive_descriptors(&b, 1), Err(TransportError::Io { .. })));
    }
}
