//! One connection between two members: an ordered byte stream in each direction.

use std::fmt;
use std::io::{self, IoSlice, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sockopt};

/// Size in bytes of a socket's send buffer within a node; the kernel reserves twice this size. With the default sizes,
/// the kernel wakes the receiver of a Unix socket too often, and buffers more data of a TCP socket than the caches
/// hold. Each effect costs up to half of the throughput (measured). Between nodes, the kernel adapts the sizes.
const NODE_BUFFER_BYTES: usize = 512 << 10;

/// An authenticated connection to another member, on which no bytes are in flight yet. Members of one process use a
/// socket pair.
#[derive(Debug)]
pub enum Channel {
    /// A connection within a node.
    Unix(UnixStream),
    /// A connection between nodes.
    Tcp(TcpStream),
    /// A stream that transforms its bytes, for example by encryption.
    Sealed(Box<dyn SealedStream>),
}

/// A non-blocking stream. It buffers bytes that it has accepted but not yet sent, and bytes that it has received but
/// not yet returned. All methods except [`SealedStream::shutdown`] fail with [`io::ErrorKind::WouldBlock`] if they
/// would have to wait.
pub trait SealedStream: fmt::Debug + Send + Sync {
    /// Returns the socket, for setting its options and for waiting on it.
    fn socket(&self) -> BorrowedFd<'_>;

    /// Accepts bytes of `first` and then of `second`. Returns the number of accepted bytes.
    ///
    /// # Errors
    /// System errors.
    fn send(&self, first: &[u8], second: &[u8]) -> io::Result<usize>;

    /// True if [`SealedStream::flush`] has bytes to send.
    fn has_unsent(&self) -> bool;

    /// Sends the accepted bytes.
    ///
    /// # Errors
    /// System errors.
    fn flush(&self) -> io::Result<()>;

    /// Copies received bytes to `into` and returns their number. Returns 0 when the peer has closed its side.
    ///
    /// # Errors
    /// System errors; [`io::ErrorKind::InvalidData`] for bytes that were modified.
    fn receive(&self, into: &mut [u8]) -> io::Result<usize>;

    /// Shuts down one or both directions. Does nothing on a closed connection.
    fn shutdown(&self, direction: Shutdown);
}

impl Channel {
    /// Sets the socket options: non-blocking, no delayed sends.
    pub(super) fn prepare(&self) -> io::Result<()> {
        let socket = self.as_fd();
        rustix::io::ioctl_fionbio(socket, true)?;
        // The peer is on this node if the socket is a Unix socket, or TCP over loopback.
        let peer = rustix::net::getpeername(socket)?.and_then(|peer| SocketAddr::try_from(peer).ok());
        if peer.is_none_or(|peer| peer.ip().is_loopback()) {
            // The size affects only speed, and the system may allow less.
            let _ = sockopt::set_socket_send_buffer_size(socket, NODE_BUFFER_BYTES);
        }
        if let Channel::Tcp(stream) = self {
            stream.set_nodelay(true)?;
        }
        Ok(())
    }

    /// Sends as much of `first`, then of `second`, as the kernel accepts without blocking. Returns the number of bytes.
    pub(super) fn send(&self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        if let Channel::Sealed(stream) = self {
            return without_blocking(|| stream.send(first, second)).map(Option::unwrap_or_default);
        }
        let slices = [IoSlice::new(first), IoSlice::new(second)];
        let slices = if first.is_empty() { &slices[1..] } else { &slices[..] };
        without_blocking(|| {
            Ok(sendmsg(self.as_fd(), slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?)
        })
        .map(Option::unwrap_or_default)
    }

    /// Sends accepted bytes without blocking. Returns true when none are left.
    pub(super) fn flush(&self) -> io::Result<bool> {
        match self {
            Channel::Sealed(stream) => Ok(without_blocking(|| stream.flush().map(|()| 0))?.is_some()),
            _ => Ok(true),
        }
    }

    pub(super) fn has_unsent(&self) -> bool {
        matches!(self, Channel::Sealed(stream) if stream.has_unsent())
    }

    /// Reads available bytes without blocking. Returns `None` if there are none, and 0 if the peer has closed its side.
    pub(super) fn receive(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        without_blocking(|| match self {
            Channel::Unix(stream) => (&mut &*stream).read(into),
            Channel::Tcp(stream) => (&mut &*stream).read(into),
            Channel::Sealed(stream) => stream.receive(into),
        })
    }

    /// Shuts down one or both directions, and wakes threads that wait on them. Does nothing on a closed connection.
    pub(super) fn shutdown(&self, direction: Shutdown) {
        match self {
            Channel::Unix(stream) => drop(stream.shutdown(direction)),
            Channel::Tcp(stream) => drop(stream.shutdown(direction)),
            Channel::Sealed(stream) => stream.shutdown(direction),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Channel::Unix(stream) => stream.as_fd(),
            Channel::Tcp(stream) => stream.as_fd(),
            Channel::Sealed(stream) => stream.socket(),
        }
    }
}

/// Calls `attempt`, and repeats it after an interrupt by a signal. Returns `None` when `attempt` would block.
fn without_blocking(mut attempt: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match attempt() {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
