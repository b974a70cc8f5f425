//! A proxy that stands before all that the processes of a job listen on. It cuts what goes through into random pieces, holds
//! each direction of each connection up by itself, and loses no byte; of heartbeats it loses some.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use shardflow::cluster::Advertise;
use shardflow_actors::transport::{Address, Connection};

use crate::training::Scratch;

/// Largest piece: 64 KiB.
const PIECE_BITS: u64 = 16;
/// A thread that waits for a datagram looks this often whether the relay has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Of so many heartbeats one is lost.
const DATAGRAMS_TO_ONE_LOST: u64 = 8;

/// What the relay does to what goes through it.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// All is a function of it but the timing of threads.
    pub seed: u64,
    /// Once a direction has brought this many pieces, it stands still for this long; and so do the first heartbeats.
    pub long_stall: Option<(u64, Duration)>,
}

/// Random numbers: SplitMix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Bytes of the next piece, from 1 to 64 KiB: each power of two as often as any other.
    fn piece(&mut self) -> usize {
        let top = 1 << (self.next() % (PIECE_BITS + 1));
        (top - self.next() % (top / 2 + 1)).max(1) as usize
    }

    /// How long to hold a piece up: mostly not at all, sometimes for a moment, seldom for longer.
    fn delay(&mut self) -> Duration {
        match self.next() % 64 {
            0 => Duration::from_micros(self.next() % 4000),
            1..8 => Duration::from_micros(self.next() % 200),
            _ => Duration::ZERO,
        }
    }
}

/// What went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Connections.
    pub connections: u64,
    /// Pieces that streams were cut into.
    pub pieces: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Long stalls.
    pub stalls: u64,
    /// Those of them that held heartbeats up.
    pub silences: u64,
}

/// The relay. Dropping it cuts all that goes through it.
pub struct Relay {
    shared: Arc<Shared>,
    folder: Scratch,
}

struct Shared {
    weather: Weather,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// By the address behind it.
    fronts: BTreeMap<Address, Address>,
    links: Vec<Connection>,
    threads: Vec<JoinHandle<()>>,
    passed: Passed,
    directions: u64,
    over: bool,
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Relay({:?})", self.shared.weather)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, but not beyond the end of the relay.
    fn pause(&self, time: Duration) {
        if !time.is_zero() {
            drop(self.ended.wait_timeout_while(self.state(), time, |state| !state.over));
        }
    }

    /// Waits for long.
    fn stall(&self, time: Duration) {
        self.state().passed.stalls += 1;
        self.pause(time);
    }

    /// Dice of the next direction.
    fn dice(&self) -> Dice {
        let mut state = self.state();
        state.directions += 1;
        Dice(self.weather.seed.wrapping_mul(1 << 20).wrapping_add(state.directions))
    }

    /// Starts a thread that ends with the relay.
    fn run(self: &Arc<Self>, work: impl FnOnce(&Arc<Shared>) + Send + 'static) {
        let shared = self.clone();
        let thread = thread::spawn(move || work(&shared));
        self.state().threads.push(thread);
    }

    /// Passes on what arrives at a front.
    fn serve(self: &Arc<Self>, accept: impl Fn() -> io::Result<Connection>, bound: &Address) {
        while let Ok(outside) = accept() {
            if self.state().over {
                return;
            }
            // Where nobody listens, the caller is hung up on, as it would be there.
            let _ = connect(bound).and_then(|inside| self.join(inside, outside));
        }
    }

    fn join(self: &Arc<Self>, inside: Connection, outside: Connection) -> io::Result<()> {
        let ends = [(inside.try_clone()?, outside.try_clone()?), (outside.try_clone()?, inside.try_clone()?)];
        let mut state = self.state();
        state.links.extend([inside, outside]);
        state.passed.connections += 1;
        drop(state);
        for (from, to) in ends {
            self.run(move |shared| shared.carry(from, to));
        }
        Ok(())
    }

    /// Carries one direction of a connection until it ends.
    fn carry(&self, mut from: Connection, mut to: Connection) {
        let (mut dice, mut buffer, mut pieces) = (self.dice(), vec![0; 1 << PIECE_BITS], 0);
        while let Ok(bytes @ 1..) = from.read(&mut buffer) {
            let mut rest = &buffer[..bytes];
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(dice.piece().min(rest.len()));
                rest = more;
                pieces += 1;
                self.pause(dice.delay());
                if let Some((_, time)) = self.weather.long_stall.filter(|(at, _)| *at == pieces) {
                    self.stall(time);
                }
                if to.write_all(piece).is_err() {
                    // Nobody takes it any more; what was sent the other way before is still to be delivered.
                    return;
                }
                let passed = &mut self.state().passed;
                passed.pieces += 1;
                passed.bytes += piece.len() as u64;
            }
        }
        // The other direction may go on.
        drop(match &to {
            Connection::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Connection::Unix(stream) => stream.shutdown(Shutdown::Write),
        });
    }

    /// Carries heartbeats until the relay ends.
    fn carry_datagrams(&self, front: &UdpSocket, bound: SocketAddr) {
        let (mut dice, mut buffer, mut long) = (self.dice(), [0; 2048], self.weather.long_stall);
        while !self.state().over {
            let Ok(bytes) = front.recv(&mut buffer) else { continue };
            self.pause(dice.delay());
            if let Some((_, time)) = long.take() {
                self.state().passed.silences += 1;
                self.stall(time);
            }
            if dice.next() % DATAGRAMS_TO_ONE_LOST != 0 {
                // A process that has ended hears nothing.
                let _ = front.send_to(&buffer[..bytes], bound);
            }
        }
    }
}

fn connect(address: &Address) -> io::Result<Connection> {
    let link: Connection = match address {
        Address::Tcp(name) => TcpStream::connect(name)?.into(),
        Address::Unix(path) => UnixStream::connect(path)?.into(),
    };
    without_delay(link)
}

/// So that pieces travel as they were cut.
fn without_delay(link: Connection) -> io::Result<Connection> {
    if let Connection::Tcp(stream) = &link {
        stream.set_nodelay(true)?;
    }
    Ok(link)
}

impl Relay {
    /// A relay that stands before nothing yet.
    pub fn new(weather: Weather) -> Self {
        let folder = Scratch::new(&format!("relay-{}", weather.seed));
        let shared = Shared { weather, state: Mutex::default(), ended: Condvar::new() };
        Self { shared: Arc::new(shared), folder }
    }

    /// What went through so far.
    pub fn passed(&self) -> Passed {
        self.shared.state().passed
    }
}

impl Advertise for Relay {
    fn connections(&self, bound: &Address) -> io::Result<Address> {
        let mut state = self.shared.state();
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
        self.shared.run(move |shared| shared.serve(accept, &behind));
        Ok(front)
    }

    fn heartbeats(&self, bound: SocketAddr) -> io::Result<SocketAddr> {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        front.set_read_timeout(Some(LOOK))?;
        let address = front.local_addr()?;
        self.shared.run(move |shared| shared.carry_datagrams(&front, bound));
        Ok(address)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.over = true;
        self.shared.ended.notify_all();
        state.links.drain(..).for_each(|link| drop(link.shutdown()));
        let fronts = std::mem::take(&mut state.fronts);
        drop(state);
        // A call wakes who waits for one.
        fronts.values().for_each(|front| drop(connect(front)));
        let threads = std::mem::take(&mut self.shared.state().threads);
        for thread in threads {
            // A panic there was reported by the hook.
            let _ = thread.join();
        }
    }
}
