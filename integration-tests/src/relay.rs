//! A proxy in front of every listener of a job's processes. It splits streams into pieces of random sizes, and delays
//! each direction of each connection independently. It loses no bytes of a stream, but drops some heartbeats.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use shardflow::cluster::Advertise;
use shardflow::job::transport::{Address, Connection};
use shardflow_kernels::hash::SplitMix64;

use crate::training::Scratch;

/// The largest piece has 2^16 bytes, that is, 64 KiB.
const PIECE_BITS: u64 = 16;
/// Interval at which a thread that waits for a datagram checks whether the relay has been dropped.
const POLL_EVERY: Duration = Duration::from_millis(20);

/// On average, the relay drops one heartbeat out of this number.
const DROPPED_ONE_IN: u64 = 8;

/// Options of a relay.
#[derive(Clone, Copy, Debug)]
pub struct RelayOptions {
    /// Seed of all random choices. The timing of threads still differs between runs.
    pub seed: u64,
    /// The number of a piece, and a time. Each direction of each connection stalls for this time before this piece. The
    /// first heartbeat to each process stalls for the same time.
    pub long_stall: Option<(u64, Duration)>,
    /// Whether the relay keeps all bytes for [`Relay::recorded`].
    pub records: bool,
}

/// A generator of random numbers.
struct Rng(SplitMix64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0.draw()
    }

    /// Returns the number of bytes of the next piece, 1 to 65536. The logarithm of this number is roughly uniform.
    fn piece_bytes(&mut self) -> usize {
        let top = 1 << (self.next() % (PIECE_BITS + 1));
        (top - self.next() % (top / 2 + 1)).max(1) as usize
    }

    /// Returns the delay of a piece. Most pieces have none; 7 in 64 have up to 200 us, and 1 in 64 has up to 4 ms.
    fn delay(&mut self) -> Duration {
        match self.next() % 64 {
            0 => Duration::from_micros(self.next() % 4000),
            1..8 => Duration::from_micros(self.next() % 200),
            _ => Duration::ZERO,
        }
    }
}

/// Counts of the relayed traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayCounts {
    /// Number of connections.
    pub connections: u64,
    /// Number of pieces into which streams were split.
    pub pieces: u64,
    /// Number of bytes in all pieces.
    pub bytes: u64,
    /// Number of long stalls.
    pub stalls: u64,
    /// Number of long stalls of heartbeats. `stalls` includes them.
    pub heartbeat_stalls: u64,
}

/// The relay. Dropping it closes all its connections.
pub struct Relay {
    shared: Arc<Shared>,
    folder: Scratch,
}

struct Shared {
    options: RelayOptions,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// The front addresses: for each listener's own address, the address at which the relay accepts connections for it.
    fronts: BTreeMap<Address, Address>,
    open_connections: Vec<Connection>,
    threads: Vec<JoinHandle<()>>,
    counts: RelayCounts,
    /// The relayed bytes, one vector for each direction of each connection.
    recorded: Vec<Vec<u8>>,
    directions: u64,
    ended: bool,
}

impl State {
    fn begin_record(&mut self) -> usize {
        self.recorded.push(Vec::new());
        self.recorded.len() - 1
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Relay({:?})", self.shared.options)
    }
}

impl Shared {
    /// Waits for this long, or until the relay ends.
    fn wait(&self, time: Duration) {
        if !time.is_zero() {
            self.ended.wait_while_for(&mut self.state.lock(), |state| !state.ended, time);
        }
    }

    /// Counts a long stall and waits for its end.
    fn stall(&self, time: Duration) {
        self.state.lock().counts.stalls += 1;
        self.wait(time);
    }

    /// Returns a generator of random numbers for the next direction.
    fn next_rng(&self) -> Rng {
        let mut state = self.state.lock();
        state.directions += 1;
        Rng(SplitMix64(self.options.seed.wrapping_mul(1 << 20).wrapping_add(state.directions)))
    }

    /// Spawns a thread that ends with the relay.
    fn spawn(self: &Arc<Self>, work: impl FnOnce(&Arc<Shared>) + Send + 'static) {
        let shared = self.clone();
        let thread = thread::spawn(move || work(&shared));
        self.state.lock().threads.push(thread);
    }

    /// Forwards the connections that one front address accepts.
    fn serve(self: &Arc<Self>, accept: impl Fn() -> io::Result<Connection>, bound: &Address) {
        while let Ok(outside) = accept() {
            if self.state.lock().ended {
                return;
            }
            // If no listener is behind the front address, the caller's connection closes.
            let _ = connect(bound).and_then(|inside| self.join(inside, outside));
        }
    }

    fn join(self: &Arc<Self>, inside: Connection, outside: Connection) -> io::Result<()> {
        let ends = [(inside.try_clone()?, outside.try_clone()?), (outside.try_clone()?, inside.try_clone()?)];
        let mut state = self.state.lock();
        state.open_connections.extend([inside, outside]);
        state.counts.connections += 1;
        drop(state);
        for (from, to) in ends {
            self.spawn(move |shared| shared.forward(from, to));
        }
        Ok(())
    }

    /// Forwards one direction of a connection until it ends.
    fn forward(&self, mut from: Connection, mut to: Connection) {
        let (mut rng, mut buffer, mut pieces) = (self.next_rng(), vec![0; 1 << PIECE_BITS], 0);
        let recorded = self.state.lock().begin_record();
        while let Ok(bytes @ 1..) = from.read(&mut buffer) {
            let mut rest = &buffer[..bytes];
            if self.options.records {
                self.state.lock().recorded[recorded].extend_from_slice(rest);
            }
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rng.piece_bytes().min(rest.len()));
                rest = more;
                pieces += 1;
                self.wait(rng.delay());
                if let Some((_, time)) = self.options.long_stall.filter(|(at, _)| *at == pieces) {
                    self.stall(time);
                }
                if to.write_all(piece).is_err() {
                    // The receiver has closed this direction. The relay still delivers bytes of the other direction.
                    return;
                }
                let counts = &mut self.state.lock().counts;
                counts.pieces += 1;
                counts.bytes += piece.len() as u64;
            }
        }
        // The other direction of the connection may continue.
        drop(to.shutdown(Shutdown::Write));
    }

    /// Forwards heartbeats until the relay ends.
    fn forward_datagrams(&self, front: &UdpSocket, bound: SocketAddr) {
        let (mut rng, mut buffer, mut long) = (self.next_rng(), [0; 2048], self.options.long_stall);
        while !self.state.lock().ended {
            let Ok(bytes) = front.recv(&mut buffer) else { continue };
            self.wait(rng.delay());
            if let Some((_, time)) = long.take() {
                self.state.lock().counts.heartbeat_stalls += 1;
                self.stall(time);
            }
            if rng.next() % DROPPED_ONE_IN != 0 {
                // Ignore errors, because the process may have ended.
                let _ = front.send_to(&buffer[..bytes], bound);
            }
        }
    }
}

fn connect(address: &Address) -> io::Result<Connection> {
    let connection: Connection = match address {
        Address::Tcp(name) => TcpStream::connect(name)?.into(),
        Address::Unix(path) => UnixStream::connect(path)?.into(),
    };
    without_delay(connection)
}

/// Sets TCP_NODELAY, so that each piece is sent immediately.
fn without_delay(connection: Connection) -> io::Result<Connection> {
    if !connection.is_unix() {
        rustix::net::sockopt::set_tcp_nodelay(&connection, true)?;
    }
    Ok(connection)
}

impl Relay {
    /// Creates a relay without front addresses.
    pub fn new(options: RelayOptions) -> Self {
        let folder = Scratch::new(&format!("relay-{}", options.seed));
        let shared = Shared { options, state: Mutex::default(), ended: Condvar::new() };
        Self { shared: Arc::new(shared), folder }
    }

    /// Returns the counts so far.
    pub fn counts(&self) -> RelayCounts {
        self.shared.state.lock().counts
    }
}

impl Advertise for Relay {
    fn connections(&self, bound: &Address) -> io::Result<Address> {
        let mut state = self.shared.state.lock();
        if let Some(front) = state.fronts.get(bound) {
            return Ok(front.clone());
        }
        let fronts = state.fronts.len();
        let (behind, front): (_, Address);
        behind = bound.clone();
        let accept: Box<dyn Fn() -> io::Result<Connection> + Send> = match bound {
            Address::Tcp(_) => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                front = Address::Tcp(listener.local_addr()?.to_string());
                Box::new(move || without_delay(listener.accept()?.0.into()))
            }
            Address::Unix(_) => {
                let path = self.folder.path().join(format!("{fronts}.sock"));
                let listener = UnixListener::bind(&path)?;
                front = Address::Unix(path);
                Box::new(move || Ok(listener.accept()?.0.into()))
            }
        };
        state.fronts.insert(bound.clone(), front.clone());
        drop(state);
        self.shared.spawn(move |shared| shared.serve(accept, &behind));
        Ok(front)
    }

    fn heartbeats(&self, bound: SocketAddr) -> io::Result<SocketAddr> {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        front.set_read_timeout(Some(POLL_EVERY))?;
        let address = front.local_addr()?;
        self.shared.spawn(move |shared| shared.forward_datagrams(&front, bound));
        Ok(address)
    }
}

impl Relay {
    /// Returns the bytes of each direction of each connection, if [`RelayOptions::records`] is set.
    pub fn recorded(&self) -> Vec<Vec<u8>> {
        self.shared.state.lock().recorded.clone()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.ended = true;
        self.shared.ended.notify_all();
        state.open_connections.drain(..).for_each(|connection| drop(connection.shutdown(Shutdown::Both)));
        let fronts = std::mem::take(&mut state.fronts);
        drop(state);
        // A connection to the front address wakes the thread that accepts there.
        fronts.values().for_each(|front| drop(connect(front)));
        let threads = std::mem::take(&mut self.shared.state.lock().threads);
        for thread in threads {
            // Ignore a panic of the thread, because the panic hook has reported it.
            let _ = thread.join();
        }
    }
}
