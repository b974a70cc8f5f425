//! The sockets that a listener listens on.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::transport::address::{Address, UNIX_PATH_BYTES_MAX};
use crate::transport::connection::Connection;
use crate::transport::error::TransportError;
use crate::transport::folder::PrivateFolder;

/// Length of the system's accept queue. With a shorter queue, a burst of connections delays a valid peer by a second.
const BACKLOG: i32 = 1024;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// An address of this node. Port 0 selects a free port.
    Tcp(SocketAddr),
    /// A path. A missing folder is created for this user only. The stale socket of a killed process is replaced.
    Unix(PathBuf),
    /// A socket in a new [`PrivateFolder`]. If this fails, see [`crate::transport::Listener::private_error`].
    PrivateUnix,
}

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Socket {
    pub(super) fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(stream.into())
            }
            Self::Unix(listener) => listener.accept().map(|(stream, _)| stream.into()),
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

pub(super) fn listen_tcp(address: SocketAddr) -> Result<(Address, Socket), TransportError> {
    let listen = || {
        let listener = TcpListener::bind(address)?;
        set_backlog(&listener)?;
        listener.set_nonblocking(true)?;
        Ok((Address::Tcp(listener.local_addr()?.to_string()), Socket::Tcp(listener)))
    };
    listen().map_err(|cause| TransportError::Listen { address: Address::Tcp(address.to_string()), cause })
}

pub(super) fn listen_private(process: u32) -> Result<(PrivateFolder, (Address, Socket)), String> {
    // Reports only the error kind, because the library's text contains a random path below the folder.
    let folder = PrivateFolder::new("shardflow-");
    let folder = folder.map_err(|error| format!("cannot make a folder there: {}", error.kind()))?;
    let path = folder.path().join(format!("{process}.sock"));
    if path.to_str().is_none() {
        return Err("not UTF-8, and processes exchange the socket's path as text".into());
    }
    if path.as_os_str().len() > UNIX_PATH_BYTES_MAX {
        return Err(format!("too long: a Unix socket path below it exceeds {UNIX_PATH_BYTES_MAX} bytes"));
    }
    listen_unix(&path).map(|bound| (folder, bound)).map_err(|error| error.to_string())
}

pub(super) fn listen_unix(path: &Path) -> Result<(Address, Socket), TransportError> {
    let listen = || {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let listener = match UnixListener::bind(path) {
            // Nobody accepts connections on this socket, because its owner was killed.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
                fs::remove_file(path).and_then(|()| UnixListener::bind(path))
            }
            bound => bound,
        }?;
        set_backlog(&listener)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok((Address::Unix(path.into()), Socket::Unix(listener)))
    };
    listen().map_err(|cause| TransportError::Listen { address: Address::Unix(path.into()), cause })
}

pub(super) fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

/// Sets the backlog with a second `listen` call, since the standard library uses 128.
fn set_backlog(listener: &impl AsFd) -> io::Result<()> {
    Ok(rustix::net::listen(listener, BACKLOG)?)
}
