//! The accepting side: one thread polls the sockets and all unauthenticated connections, and keeps the authenticated
//! ones until their owners claim them.
//!
//! - **EP-1**: at most `unauthenticated_max` connections are unauthenticated; a further one drops the oldest. Each
//!   keeps at most one handshake message in memory, for at most `handshake_timeout`.
//! - **EP-2**: an unauthenticated connection never blocks the thread, whatever it sends or does not send.
//! - **EP-3**: at most `unclaimed_max` connections are unclaimed; a further dialler must retry.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::dial::connect_unless;
use super::handshake::{AcceptPolicy, SettledWorld};
use super::{Address, Connection, Hello, PrivateFolder, Purpose, TransportError};
use crate::secret::Secret;

mod serve;

/// Length of the system's accept queue; with a shorter one, a burst of connections delays a valid peer by a second.
const BACKLOG: i32 = 1024;

/// Maximum length of a Unix socket path in bytes: `sun_path` has 108 including the terminating 0.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// Limits of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerOptions {
    /// Maximum number of unauthenticated connections.
    pub unauthenticated_max: usize,
    /// Timeout of a handshake.
    pub handshake_timeout: Duration,
    /// Maximum number of authenticated connections that nobody has claimed.
    pub unclaimed_max: usize,
}

impl Default for ListenerOptions {
    fn default() -> Self {
        Self { unauthenticated_max: 64, handshake_timeout: Duration::from_secs(5), unclaimed_max: 1024 }
    }
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// On an address of this node; port 0 selects a free port.
    Tcp(SocketAddr),
    /// On a path. A missing folder is created for this user only; a stale socket of a killed process is replaced.
    Unix(PathBuf),
    /// On a socket in a new [`PrivateFolder`]. If that fails, [`Listener::private_error`] returns the cause, and only
    /// the other addresses can be used.
    PrivateUnix,
}

/// Number of rejected connections of a listener, by reason. The counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Dropped in favour of a newer unauthenticated connection.
    pub evicted: u64,
    /// Handshake timed out.
    pub timed_out: u64,
    /// The peer closed the connection during the handshake.
    pub disconnected: u64,
    /// Not this protocol: wrong magic or message length.
    pub malformed: u64,
    /// Another version of the protocol.
    pub version: u64,
    /// Cannot be decrypted: another secret, a replay or tampering.
    pub proof: u64,
    /// Another session.
    pub session: u64,
    /// An older epoch, or a process that is too late for the running one.
    pub old_epoch: u64,
    /// A newer epoch than this process's own.
    pub new_epoch: u64,
    /// A process number that does not exist, or a connection meant for another process.
    pub process: u64,
    /// The hello cannot be decoded.
    pub unreadable: u64,
    /// Temporary: not started yet, or too many unclaimed connections.
    pub retry: u64,
}

impl Refusals {
    /// Sum of all counters.
    pub fn total(&self) -> u64 {
        let handshakes = self.evicted + self.timed_out + self.disconnected + self.malformed + self.version + self.proof;
        handshakes + self.session + self.old_epoch + self.new_epoch + self.process + self.unreadable + self.retry
    }
}

/// An authenticated connection that nobody has claimed yet.
#[derive(Debug)]
struct Unclaimed {
    from: u32,
    purpose: Purpose,
    connection: Connection,
}

/// The state that the thread and the owner share.
#[derive(Debug)]
struct State {
    policy: AcceptPolicy,
    unclaimed: VecDeque<Unclaimed>,
    refusals: Refusals,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    arrived: Condvar,
}

impl Shared {
    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.unclaimed.clear();
        self.arrived.notify_all();
    }
}

/// Accepts connections from the other processes of the job. Dropping it closes it.
#[derive(Debug)]
pub struct Listener {
    addresses: Vec<Address>,
    private_error: Option<String>,
    shared: Arc<Shared>,
    /// Closing it ends the thread.
    wake: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    /// Sockets to unlink, with their inodes: a successor may have replaced the path by then.
    paths: Vec<(PathBuf, u64)>,
    _folders: Vec<PrivateFolder>,
}

/// A nonblocking listening socket.
#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens as `process`. Until [`Listener::begin`] it accepts only [`Purpose::Rendezvous`].
    ///
    /// # Errors
    /// [`TransportError::Listen`].
    pub fn listen(
        process: u32,
        secret: Secret,
        listen: &[ListenAddress],
        options: ListenerOptions,
    ) -> Result<Self, TransportError> {
        let (mut addresses, mut listeners, mut paths, mut folders) = (vec![], vec![], vec![], vec![]);
        let mut private_error = None;
        for listen_address in listen {
            let (address, listener) = match listen_address {
                ListenAddress::Tcp(address) => listen_tcp(*address)?,
                ListenAddress::Unix(path) => listen_unix(path)?,
                ListenAddress::PrivateUnix => match listen_private(process) {
                    Ok((folder, bound)) => {
                        folders.push(folder);
                        bound
                    }
                    Err(cause) => {
                        private_error = Some(format!("TMPDIR={}: {cause}", std::env::temp_dir().display()));
                        continue;
                    }
                },
            };
            if let Address::Unix(path) = &address {
                paths.extend(inode(path).map(|inode| (path.clone(), inode)));
            }
            addresses.push(address);
            listeners.push(listener);
        }
        let policy = AcceptPolicy { process, world: None };
        let state = State { policy, unclaimed: VecDeque::new(), refusals: Refusals::default(), closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), arrived: Condvar::new() });
        let thread_failed = |cause| TransportError::io("starting the accepting thread of", &"this process", cause);
        let (wake, wake_receiver) = UnixStream::pair().map_err(thread_failed)?;
        let server = serve::Server::new(listeners, wake_receiver, secret, options, Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("accept".into()).spawn(move || server.run());
        let thread = Some(thread.map_err(thread_failed)?);
        Ok(Self { addresses, private_error, shared, wake: Some(wake), thread, paths, _folders: folders })
    }

    /// Why it could not listen on [`ListenAddress::PrivateUnix`]: the folder and the cause.
    pub fn private_error(&self) -> Option<&str> {
        self.private_error.as_deref()
    }

    /// Its addresses for others, in the order of the `listen` argument.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Sets session, epoch and number of processes. From now on it accepts only members of this world.
    pub fn begin(&self, world: SettledWorld) {
        let mut state = self.shared.state.lock();
        state.policy.world = Some(world);
        // Late diallers are disconnected; when they retry, the handshake reports the reason.
        state.unclaimed.retain(|u| u.purpose != Purpose::Rendezvous);
    }

    /// Waits for the connection that process `from` dialled for `purpose`. If it dialled twice, returns the newer one.
    ///
    /// # Errors
    /// [`TransportError::Missing`] at the deadline, [`TransportError::Closed`].
    pub fn wait(&self, from: u32, purpose: Purpose, deadline: Instant) -> Result<Connection, TransportError> {
        self.claim(Some(from), purpose, deadline).map(|(_, connection)| connection)
    }

    /// Waits for a connection that any process dialled for `purpose`. Returns the oldest one with its process.
    ///
    /// # Errors
    /// Those of [`Listener::wait`].
    pub fn wait_any(&self, purpose: Purpose, deadline: Instant) -> Result<(u32, Connection), TransportError> {
        self.claim(None, purpose, deadline)
    }

    fn claim(
        &self,
        from: Option<u32>,
        purpose: Purpose,
        deadline: Instant,
    ) -> Result<(u32, Connection), TransportError> {
        let begin = Instant::now();
        let mut state = self.shared.state.lock();
        loop {
            let matches = |u: &Unclaimed| u.purpose == purpose && from.is_none_or(|from| from == u.from);
            if let Some(found) = state.unclaimed.iter().position(matches).and_then(|i| state.unclaimed.remove(i)) {
                return Ok((found.from, found.connection));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed {
                return Err(TransportError::Closed);
            } else if left.is_zero() {
                let (waited_ms, refused) = (begin.elapsed().as_millis() as u64, state.refusals.total());
                return Err(TransportError::Missing { from, purpose, waited_ms, refused });
            }
            self.shared.arrived.wait_for(&mut state, left);
        }
    }

    /// Same as [`super::connect`], but stops when this listener is closed.
    ///
    /// # Errors
    /// Those of [`super::connect`], and [`TransportError::Closed`].
    pub fn dial(
        &self,
        address: &Address,
        secret: &Secret,
        hello: &Hello,
        deadline: Instant,
    ) -> Result<Connection, TransportError> {
        connect_unless(address, secret, hello, deadline, &|wait| {
            let mut state = self.shared.state.lock();
            self.shared.arrived.wait_while_for(&mut state, |state| !state.closed, wait);
            state.closed
        })
    }

    /// True once it has been closed.
    pub fn is_closed(&self) -> bool {
        self.shared.state.lock().closed
    }

    /// Counters of rejected connections.
    pub fn refused(&self) -> Refusals {
        self.shared.state.lock().refusals
    }

    /// Stops accepting and ends every [`Listener::wait`] and [`Listener::dial`] in any thread. Claimed connections stay
    /// open.
    pub fn close(&self) {
        self.shared.close();
        if let Some(wake) = &self.wake {
            let _ = wake.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic of the thread.
            let _ = thread.join();
        }
        for (path, _) in self.paths.iter().filter(|(path, bound)| inode(path) == Some(*bound)) {
            let _ = fs::remove_file(path);
        }
    }
}

fn listen_failed(address: Address) -> impl Fn(io::Error) -> TransportError {
    move |cause| TransportError::Listen { address: address.clone(), cause }
}

fn listen_tcp(address: SocketAddr) -> Result<(Address, Socket), TransportError> {
    let failed = listen_failed(Address::Tcp(address.to_string()));
    let listener = TcpListener::bind(address).map_err(&failed)?;
    set_backlog(&listener).map_err(&failed)?;
    listener.set_nonblocking(true).map_err(&failed)?;
    let address = listener.local_addr().map_err(&failed)?;
    Ok((Address::Tcp(address.to_string()), Socket::Tcp(listener)))
}

fn listen_private(process: u32) -> Result<(PrivateFolder, (Address, Socket)), String> {
    // Only the error kind: the library's text names a random path below the folder.
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

fn listen_unix(path: &Path) -> Result<(Address, Socket), TransportError> {
    let failed = listen_failed(Address::Unix(path.into()));
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(&failed)?;
    }
    let listener = match UnixListener::bind(path) {
        // Nobody accepts connections there: the owner was killed.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        bound => bound,
    }
    .map_err(&failed)?;
    set_backlog(&listener).map_err(&failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(&failed)?;
    listener.set_nonblocking(true).map_err(&failed)?;
    Ok((Address::Unix(path.into()), Socket::Unix(listener)))
}

fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

/// Sets the backlog; the standard library uses 128, and a second `listen` call changes it.
fn set_backlog(listener: &impl AsFd) -> io::Result<()> {
    Ok(rustix::net::listen(listener, BACKLOG)?)
}

#[cfg(test)]
mod tests;
