//! One connection between two members: an ordered byte stream in each direction.

use std::io::{self, IoSlice, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

/// Socket send buffer within a node, in bytes (the kernel reserves twice as much). Measured: with the default sizes the
/// kernel wakes the receiver too often (Unix), or buffers more data than the caches hold (TCP); either costs up to half
/// of the throughput. Between nodes the kernel sizes buffers itself, to match the network.
const NODE_BUFFER_BYTES: usize = 512 << 10;

/// A connection to another member of a group. The caller establishes and authenticates it, and leaves no bytes in
/// flight. Members of one process are also connected, by a socket pair.
#[derive(Debug)]
pub enum Channel {
    /// Within a node.
    Unix(UnixStream),
    /// Between nodes.
    Tcp(TcpStream),
}

impl From<UnixStream> for Channel {
    fn from(stream: UnixStream) -> Self {
        Channel::Unix(stream)
    }
}

impl From<TcpStream> for Channel {
    fn from(stream: TcpStream) -> Self {
        Channel::Tcp(stream)
    }
}

impl Channel {
    /// Sets the socket options: non-blocking, no delayed sends.
    pub(super) fn prepare(&self) -> io::Result<()> {
        match self {
            Channel::Unix(stream) => {
                stream.set_nonblocking(true)?;
                // Affects only speed, and the system may allow less.
                let _ = rustix::net::sockopt::set_socket_send_buffer_size(stream, NODE_BUFFER_BYTES);
                Ok(())
            }
            Channel::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                if stream.peer_addr()?.ip().is_loopback() {
                    // Affects only speed.
                    let _ = rustix::net::sockopt::set_socket_send_buffer_size(stream, NODE_BUFFER_BYTES);
                }
                stream.set_nodelay(true)
            }
        }
    }

    /// Sends as much of `first`, then of `second`, as the kernel accepts without blocking; 0 when it accepts nothing.
    pub(super) fn send(&self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        let slices = [IoSlice::new(first), IoSlice::new(second)];
        let slices = if first.is_empty() { &slices[1..] } else { &slices[..] };
        without_blocking(|| {
            Ok(sendmsg(self.as_fd(), slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?)
        })
        .map(|sent| sent.unwrap_or(0))
    }

    /// Reads the available bytes without blocking; `None` when there are none, 0 when the peer has closed its side.
    pub(super) fn receive(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        without_blocking(|| match self {
            Channel::Unix(stream) => (&mut &*stream).read(into),
            Channel::Tcp(stream) => (&mut &*stream).read(into),
        })
    }

    /// Shuts down one or both directions and wakes threads that wait for them. Does nothing on a closed connection.
    pub(super) fn shutdown(&self, direction: Shutdown) {
        let _ = match self {
            Channel::Unix(stream) => stream.shutdown(direction),
            Channel::Tcp(stream) => stream.shutdown(direction),
        };
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Channel::Unix(stream) => stream.as_fd(),
            Channel::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// Calls `attempt`, again after an interrupt by a signal; `None` when it would block.
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
