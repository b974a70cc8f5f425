//! One connection between two members: an ordered stream of bytes both ways.

use std::io::{self, IoSlice, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

/// Bytes to send that the kernel may hold for a socket within a node (it takes twice of that memory). Measured: with
/// its defaults it wakes the other side too often (Unix), or lets more come than stays in caches (TCP), either of which
/// costs up to half of the speed. Between nodes it sizes buffers itself, by what the network holds.
const NODE_BUFFER_BYTES: usize = 512 << 10;

/// A connection to another member of a group, made and authenticated by the caller, who has no bytes of it in flight.
/// Members of one process have one too (a socket pair).
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
    /// Sets what the engine needs: nothing blocks, nothing is held back.
    pub(super) fn prepare(&self) -> io::Result<()> {
        match self {
            Channel::Unix(stream) => {
                stream.set_nonblocking(true)?;
                // Only speed depends on it, and the system may allow less.
                let _ = rustix::net::sockopt::set_socket_send_buffer_size(stream, NODE_BUFFER_BYTES);
                Ok(())
            }
            Channel::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                if stream.peer_addr()?.ip().is_loopback() {
                    // Only speed depends on it.
                    let _ = rustix::net::sockopt::set_socket_send_buffer_size(stream, NODE_BUFFER_BYTES);
                }
                stream.set_nodelay(true)
            }
        }
    }

    /// Hands over what the kernel takes at once of the two, one after the other; 0 when it takes nothing now.
    pub(super) fn send(&self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        let slices = [IoSlice::new(first), IoSlice::new(second)];
        let slices = if first.is_empty() { &slices[1..] } else { &slices[..] };
        now(|| Ok(sendmsg(self.as_fd(), slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?))
            .map(|sent| sent.unwrap_or(0))
    }

    /// Takes what is there at once; `None` when there is nothing now, 0 when the other side has ended.
    pub(super) fn receive(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        now(|| match self {
            Channel::Unix(stream) => (&mut &*stream).read(into),
            Channel::Tcp(stream) => (&mut &*stream).read(into),
        })
    }

    /// Ends one or both directions; whoever waits for them wakes up. A connection that has ended already stays so.
    pub(super) fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Channel::Unix(stream) => stream.shutdown(how),
            Channel::Tcp(stream) => stream.shutdown(how),
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

/// One attempt, repeated when a signal cut it short; `None` when it would have to wait.
fn now(mut attempt: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match attempt() {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
