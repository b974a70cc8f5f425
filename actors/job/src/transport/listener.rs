//! The accepting side: one thread polls sockets and runs handshakes. Authenticated connections wait to be claimed.
//!
//! - **EP-1**: at most `unauthenticated_max` connections are unauthenticated; a further connection replaces the oldest.
//!   Each unauthenticated connection holds at most one handshake message in memory, for at most `handshake_timeout`.
//! - **EP-2**: an unauthenticated connection never blocks the thread, no matter what it sends.
//! - **EP-3**: at most `unclaimed_max` connections are unclaimed. Further diallers must retry.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::address::Address;
use super::connection::Connection;
use super::dial::connect_unless;
use super::error::{START_THREAD, TransportError};
use super::folder::PrivateFolder;
use super::handshake::{AcceptPolicy, SettledWorld};
use super::hello::{Hello, Purpose};
use crate::secret::Secret;
use serve::Server;
use socket::{inode, listen_private, listen_tcp, listen_unix};
use state::{Shared, State, Unclaimed};

mod serve;
mod socket;
mod state;

pub use socket::ListenAddress;
pub use state::{ListenerOptions, Refusals};

/// Accepts connections from the other processes of the job. Dropping the listener closes it.
#[derive(Debug)]
pub struct Listener {
    addresses: Vec<Address>,
    private_error: Option<String>,
    shared: Arc<Shared>,
    /// Closing this socket ends the thread.
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
    /// Paths of the sockets to remove, with their inodes. A path with another inode is kept, because a successor may
    /// have created a new socket there.
    paths: Vec<(PathBuf, u64)>,
    _folders: Vec<PrivateFolder>,
}

impl Listener {
    /// Listens as `process`. Before [`Listener::begin`], the listener accepts only [`Purpose::Rendezvous`].
    pub fn listen(
        process: u32,
        secret: Secret,
        listen: &[ListenAddress],
        options: ListenerOptions,
    ) -> Result<Self, TransportError> {
        let (mut addresses, mut sockets, mut paths, mut folders) = (vec![], vec![], vec![], vec![]);
        let mut private_error = None;
        for listen_address in listen {
            let (address, socket) = match listen_address {
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
            sockets.push(socket);
        }
        let policy = AcceptPolicy { process, world: None };
        let state = State { policy, unclaimed: VecDeque::new(), refusals: Refusals::default(), closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), arrived: Condvar::new() });
        let thread_failed = |cause| TransportError::io(START_THREAD, &"this process", cause);
        let (wake, own_wake) = UnixStream::pair().map_err(thread_failed)?;
        let (own, pending) = (shared.clone(), VecDeque::new());
        let server = Server { sockets, wake: own_wake, secret, options, shared: own, pending, paused_until: None };
        let thread = std::thread::Builder::new().name("accept".into()).spawn(move || server.run());
        let thread = Some(thread.map_err(thread_failed)?);
        Ok(Self { addresses, private_error, shared, wake, thread, paths, _folders: folders })
    }

    /// The folder and the cause if listening on [`ListenAddress::PrivateUnix`] failed, or else `None`.
    pub fn private_error(&self) -> Option<&str> {
        self.private_error.as_deref()
    }

    /// The addresses at which others reach this listener, in the order of the `listen` argument.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Sets session, epoch and number of processes. From now on, only members of this world are accepted.
    pub fn begin(&self, world: SettledWorld) {
        let mut state = self.shared.state.lock();
        state.policy.world = Some(world);
        // Late diallers are disconnected. When they retry, the handshake reports the reason to them.
        state.unclaimed.retain(|u| u.purpose != Purpose::Rendezvous);
    }

    /// Waits for the connection that process `from` dialled for `purpose`. If there are two, returns the newer one.
    pub fn wait(&self, from: u32, purpose: Purpose, deadline: Instant) -> Result<Connection, TransportError> {
        self.claim(Some(from), purpose, deadline).map(|(_, connection)| connection)
    }

    /// Waits for a connection that any process dialled for `purpose`. Returns the oldest one, and its dialler.
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

    /// Does the same as [`super::connect`], but fails when this listener is closed.
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

    /// True once the listener has been closed.
    pub fn is_closed(&self) -> bool {
        self.shared.state.lock().closed
    }

    /// Counters of rejected connections.
    pub fn refused(&self) -> Refusals {
        self.shared.state.lock().refusals
    }

    /// Stops accepting, and ends all calls of [`Listener::wait`] and [`Listener::dial`]. Claimed connections stay open.
    pub fn close(&self) {
        self.shared.close();
        let _ = self.wake.shutdown(std::net::Shutdown::Both);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
        if let Some(thread) = self.thread.take() {
            // If the thread panicked, the panic hook has already reported it.
            let _ = thread.join();
        }
        for (path, _) in self.paths.iter().filter(|(path, bound)| inode(path) == Some(*bound)) {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests;
