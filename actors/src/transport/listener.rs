//! The accepting side: one thread that polls the listeners and every stranger, and a shelf of authenticated connections that
//! wait to be claimed.
//!
//! - **EP-1**: strangers (connections that have not proved themselves) number `strangers_max` at most; one more drops the
//!   oldest. Each holds at most one message of a handshake in memory, and lives `handshake_timeout` at most.
//! - **EP-2**: nothing that a stranger sends or leaves out makes the thread wait.
//! - **EP-3**: unclaimed connections number `unclaimed_max` at most; a further dialler is told to come again.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::dial::connect_unless;
use super::handshake::{AcceptPolicy, SettledWorld};
use super::{Address, Connection, Hello, PrivateFolder, Purpose, SharedKey, TransportError};

mod serve;

/// Connections that the system keeps for the thread; without this a burst of strangers costs a good peer a second.
const BACKLOG: i32 = 1024;

/// Longest path of a Unix socket, in bytes: `sun_path` has 108, the last of which is 0.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// Limits of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerOptions {
    /// Connections that have not proved themselves, at most.
    pub strangers_max: usize,
    /// Time to prove oneself.
    pub handshake_timeout: Duration,
    /// Authenticated connections that nobody has asked for, at most.
    pub unclaimed_max: usize,
}

impl Default for ListenerOptions {
    fn default() -> Self {
        Self { strangers_max: 64, handshake_timeout: Duration::from_secs(5), unclaimed_max: 1024 }
    }
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// On an address of this node; port 0 takes a free one.
    Tcp(SocketAddr),
    /// On a path. Its folder is made, for this user only, where it is missing; a socket that a killed process left is
    /// replaced.
    Unix(PathBuf),
    /// On a socket in a [`PrivateFolder`] of its own. Where that cannot be made, [`Listener::private_error`] says why, and
    /// the endpoint is reached at its other addresses.
    PrivateUnix,
}

/// Connections that an endpoint did not let in, by reason. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Dropped to make room for a newer stranger.
    pub crowded_out: u64,
    /// Had not proved themselves in time.
    pub too_slow: u64,
    /// Hung up before the end.
    pub hung_up: u64,
    /// Not our protocol: wrong magic, a message of a wrong length.
    pub malformed: u64,
    /// Another version of the protocol.
    pub version: u64,
    /// A wrong MAC: another secret, a replay, tampering.
    pub proof: u64,
    /// Another session.
    pub session: u64,
    /// An older epoch, or a process that comes late for a running one.
    pub old_epoch: u64,
    /// A newer epoch than this process's own.
    pub new_epoch: u64,
    /// A process number that does not exist, or a call for another process.
    pub process: u64,
    /// A hello that cannot be read.
    pub unreadable: u64,
    /// Told to come again: not started yet, or too many unclaimed connections.
    pub again: u64,
}

impl Refusals {
    /// All of them.
    pub fn total(&self) -> u64 {
        let strangers = self.crowded_out + self.too_slow + self.hung_up + self.malformed + self.version + self.proof;
        strangers + self.session + self.old_epoch + self.new_epoch + self.process + self.unreadable + self.again
    }
}

/// An authenticated connection that waits to be claimed.
#[derive(Debug)]
struct Unclaimed {
    from: u32,
    purpose: Purpose,
    link: Connection,
}

/// What the thread and the owner share.
#[derive(Debug)]
struct State {
    gate: AcceptPolicy,
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
    fn state(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.unclaimed.clear();
        self.arrived.notify_all();
    }
}

/// Listens for the other processes of the job. It closes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    addresses: Vec<Address>,
    private_error: Option<String>,
    shared: Arc<Shared>,
    /// Closing it ends the thread.
    wake: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    /// Sockets to be unlinked, with their inodes: by then the path may be a successor's.
    paths: Vec<(PathBuf, u64)>,
    _folders: Vec<PrivateFolder>,
}

/// A listening socket that does not block.
#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Listens as `process`. Until [`Listener::begin`] it lets in [`Purpose::Rendezvous`] only.
    ///
    /// # Errors
    /// [`TransportError::Listen`].
    pub fn listen(
        process: u32,
        secret: SharedKey,
        listen: &[ListenAddress],
        options: ListenerOptions,
    ) -> Result<Self, TransportError> {
        let (mut addresses, mut listeners, mut paths, mut folders) = (vec![], vec![], vec![], vec![]);
        let mut private_error = None;
        for place in listen {
            let (address, listener) = match place {
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
        let gate = AcceptPolicy { process, world: None };
        let state = State { gate, unclaimed: VecDeque::new(), refusals: Refusals::default(), closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), arrived: Condvar::new() });
        let thread_failed = |cause| TransportError::io("starting the accepting thread of", &"this process", cause);
        let (wake, sleeper) = UnixStream::pair().map_err(thread_failed)?;
        let server = serve::Server::new(listeners, sleeper, secret, options, Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("accept".into()).spawn(move || server.run());
        let thread = Some(thread.map_err(thread_failed)?);
        Ok(Self { addresses, private_error, shared, wake: Some(wake), thread, paths, _folders: folders })
    }

    /// Why it does not listen on [`ListenAddress::PrivateUnix`], where it should: the folder and the cause.
    pub fn private_error(&self) -> Option<&str> {
        self.private_error.as_deref()
    }

    /// Where others reach it, in the order in which it was told to listen.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Who this process is, in which session and epoch. From now on it lets the members in, and nobody else.
    pub fn begin(&self, world: SettledWorld) {
        let mut state = self.shared.state();
        state.gate.world = Some(world);
        // Who came late gets hung up on, comes again, and is told.
        state.unclaimed.retain(|u| u.purpose != Purpose::Rendezvous);
    }

    /// The connection that process `from` dialled for `purpose`; waits for it. Of two, the newer.
    ///
    /// # Errors
    /// [`TransportError::Missing`] at the deadline, [`TransportError::Closed`].
    pub fn wait(&self, from: u32, purpose: Purpose, deadline: Instant) -> Result<Connection, TransportError> {
        self.claim(Some(from), purpose, deadline).map(|(_, link)| link)
    }

    /// The oldest connection that anybody dialled for `purpose`, and who; waits for one.
    ///
    /// # Errors
    /// As [`Listener::wait`].
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
        let mut state = self.shared.state();
        loop {
            let wanted = |u: &Unclaimed| u.purpose == purpose && from.is_none_or(|from| from == u.from);
            if let Some(found) = state.unclaimed.iter().position(wanted).and_then(|i| state.unclaimed.remove(i)) {
                return Ok((found.from, found.link));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.closed {
                return Err(TransportError::Closed);
            } else if left.is_zero() {
                let (waited_ms, refused) = (begin.elapsed().as_millis() as u64, state.refusals.total());
                return Err(TransportError::Missing { from, purpose, waited_ms, refused });
            }
            state = self.shared.arrived.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// As [`super::connect`], until this endpoint is closed.
    ///
    /// # Errors
    /// As there, and [`TransportError::Closed`].
    pub fn dial(
        &self,
        address: &Address,
        secret: &SharedKey,
        hello: &Hello,
        deadline: Instant,
    ) -> Result<Connection, TransportError> {
        connect_unless(address, secret, hello, deadline, &|wait| {
            let state = self.shared.state();
            let waited = self.shared.arrived.wait_timeout_while(state, wait, |state| !state.closed);
            waited.unwrap_or_else(PoisonError::into_inner).0.closed
        })
    }

    /// True once it was closed.
    pub fn is_closed(&self) -> bool {
        self.shared.state().closed
    }

    /// Connections that were not let in so far.
    pub fn refused(&self) -> Refusals {
        self.shared.state().refusals
    }

    /// Lets nobody in any more and ends every [`Listener::wait`] and [`Listener::dial`], from any thread. Connections that were claimed live on.
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
            // A panic there has been reported by the panic hook.
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
    deepen(&listener).map_err(&failed)?;
    listener.set_nonblocking(true).map_err(&failed)?;
    let address = listener.local_addr().map_err(&failed)?;
    Ok((Address::Tcp(address.to_string()), Socket::Tcp(listener)))
}

fn listen_private(process: u32) -> Result<(PrivateFolder, (Address, Socket)), String> {
    // The error of the library names a random path below the folder.
    let folder = PrivateFolder::new("shardflow-");
    let folder = folder.map_err(|error| format!("cannot make a folder there: {}", error.kind()))?;
    let path = folder.path().join(format!("{process}.sock"));
    if path.as_os_str().len() > UNIX_PATH_BYTES_MAX {
        return Err(format!("too long: the path of a Unix socket below it has more than {UNIX_PATH_BYTES_MAX} bytes"));
    }
    listen_unix(&path).map(|bound| (folder, bound)).map_err(|error| error.to_string())
}

fn listen_unix(path: &Path) -> Result<(Address, Socket), TransportError> {
    let failed = listen_failed(Address::Unix(path.into()));
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(&failed)?;
    }
    let listener = match UnixListener::bind(path) {
        // Nobody answers there: its owner was killed.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() => {
            fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        bound => bound,
    }
    .map_err(&failed)?;
    deepen(&listener).map_err(&failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(&failed)?;
    listener.set_nonblocking(true).map_err(&failed)?;
    Ok((Address::Unix(path.into()), Socket::Unix(listener)))
}

fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

/// The standard library asks for a backlog of 128; a second call changes it.
fn deepen(listener: &impl AsFd) -> io::Result<()> {
    Ok(rustix::net::listen(listener, BACKLOG)?)
}

#[cfg(test)]
mod tests;
