//! The state of the software machine: devices, streams, events, host threads, and the queues of operations.
//!
//! Three locks, taken in this order: `state`, `shadow` (held while an operation runs), then `registry` or `findings`.

use std::cell::Cell as ThreadCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock};
use std::time::Instant;

use cudarc::driver::sys::{CUhostFn, CUresult};

use crate::clock::Clock;
use crate::config::{Config, Fault, FaultKind, Policy};
use crate::cublaslt::product::Product;
use crate::cudnn::evaluate::Job;
use crate::findings::Findings;
use crate::memory::Registry;
use crate::nccl::engine::{Comms, Group};
use crate::shadow::{Cell, Shadow};

/// What a driver call answers when it cannot do what was asked.
pub type Refused = CUresult;

/// A kernel's launch.
pub struct Launch {
    /// The kernel in its loaded library.
    pub kernel: &'static crate::kernel::Kernel,
    /// Copies of the arguments.
    pub arguments: Vec<Vec<u8>>,
    /// Grid, then block.
    pub dims: [u32; 6],
    /// Dynamic shared memory.
    pub shared_bytes: usize,
}

/// Rows of bytes from one place to another.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Bytes of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// From one row to the next at the source and at the destination.
    pub pitch: (usize, usize),
}

/// A pinned source of a copy, as it was when the copy was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Of its bytes.
    pub digest: u64,
    /// Copies that had written its allocation.
    pub copies_in: u64,
}

/// What an operation does.
pub enum Kind {
    /// A kernel.
    Launch(Box<Launch>),
    /// A copy; a side that is not in the window is pageable memory of the host.
    Copy {
        from: usize,
        to: usize,
        rows: Rows,
        /// Pageable bytes, taken when the copy was submitted.
        staged: Option<Vec<u8>>,
        /// A pinned source as it was when the copy was submitted.
        seen: Option<Seen>,
    },
    /// A pattern of 1, 2 or 4 bytes, repeated.
    Fill { to: usize, pattern: u32, width: usize, count: usize },
    /// An allocation begins.
    Alloc { base: usize },
    /// An allocation ends.
    Free { base: usize },
    /// An event.
    Record(Arc<Signal>),
    /// A wait for one.
    Wait(Arc<Signal>),
    /// A host function.
    Host { function: CUhostFn, data: usize },
    /// Collectives and point-to-point calls of one group on one communicator.
    Nccl(Box<Group>),
    /// A product.
    Product(Box<Product>),
    /// A graph of cuDNN's.
    Graph(Box<Job>),
}

/// One recording of an event.
pub struct Signal {
    /// The stream that records it.
    pub stream: u64,
    /// What the stream knew then; empty until the recording was executed.
    pub done: OnceLock<(Clock, Instant)>,
}

/// An operation in a stream's queue.
pub struct Op {
    /// What it does.
    pub kind: Kind,
    /// What the host thread that submitted it knew.
    pub host: Clock,
    /// For messages.
    pub name: Arc<str>,
    /// Its place among all submissions.
    pub sequence: u64,
}

/// A stream.
pub struct Stream {
    /// Its device.
    pub device: usize,
    /// Whether it takes no notice of the NULL stream.
    pub is_free: bool,
    /// As asked for.
    pub priority: i32,
    /// Its agent among the clocks.
    pub agent: usize,
    /// For messages.
    pub name: Arc<str>,
    /// What is not executed yet.
    pub queue: VecDeque<Op>,
    /// What its last operation knew.
    pub clock: Clock,
    /// An operation of it is being executed.
    pub is_busy: bool,
    /// An operation of it will never end.
    pub is_hung: bool,
    /// Destroyed; what is queued still runs.
    pub is_destroyed: bool,
}

impl Stream {
    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.is_busy && !self.is_hung
    }
}

/// An event.
pub struct Event {
    /// Its device.
    pub device: usize,
    /// Its last recording.
    pub last: Option<Arc<Signal>>,
    /// Whether times may be asked for.
    pub has_time: bool,
}

/// One device.
#[derive(Default)]
pub struct Device {
    /// An error that stays.
    pub error: Option<Refused>,
    /// Whether it hangs.
    pub is_hung: bool,
    /// Launches executed.
    pub launches: u64,
    /// Primary context's holders.
    pub retained: u64,
    /// Its NULL stream.
    pub null_stream: u64,
    /// What its destroyed streams knew when they ended.
    pub ended: Clock,
}

/// A host thread among the clocks.
pub struct Host {
    /// Its agent.
    pub agent: usize,
    /// What it knows.
    pub clock: Clock,
}

/// Everything that one lock guards.
pub struct State {
    /// Settings that tests may change.
    pub policy: Policy,
    /// Of the schedule's random numbers.
    pub random: u64,
    /// Orders streams under [`Policy::Starve`].
    pub seed: u64,
    /// To be injected.
    pub fault: Option<Fault>,
    /// Whether one was.
    pub was_injected: bool,
    /// By handle.
    pub streams: BTreeMap<u64, Stream>,
    /// By handle.
    pub events: HashMap<u64, Event>,
    /// By number.
    pub devices: Vec<Device>,
    /// Communicators.
    pub comms: Comms,
    hosts: HashMap<u64, Host>,
    /// Streams and host threads so far.
    pub agents: usize,
    next_handle: u64,
    next_sequence: u64,
    /// Operations executed.
    pub executed: u64,
    /// When something was last submitted or executed.
    pub last_move: Instant,
    /// When another process that shares communicators last said that it moves.
    pub peers_moved: Instant,
    /// Host threads that wait.
    pub waiting_hosts: usize,
    /// When something was last submitted.
    pub last_submission: Instant,
    /// Queries answered with "not ready" since then.
    pub polls: u64,
    /// Under the late policies: the host has waited or asked, or was quiet, since it last submitted something.
    pub is_released: bool,
    /// Nothing can go on, and it was reported.
    pub is_stuck: bool,
    /// Clocks captured and not joined yet.
    pub tokens: HashMap<u64, Clock>,
}

/// The machine.
pub struct World {
    /// Settings.
    pub config: Config,
    /// Queues.
    pub state: Mutex<State>,
    /// Something was submitted.
    pub submitted: Condvar,
    /// Something was executed.
    pub progressed: Condvar,
    /// History of memory.
    pub shadow: Mutex<Shadow>,
    /// Allocations.
    pub registry: Mutex<Registry>,
    /// Findings.
    pub findings: Mutex<Findings>,
    /// Programs that are being compiled: nothing moves meanwhile, and nothing is wrong.
    pub compiling: AtomicU64,
}

thread_local!(static CONTEXT: ThreadCell<Option<usize>> = const { ThreadCell::new(None) });
thread_local!(static IN_CALLBACK: ThreadCell<bool> = const { ThreadCell::new(false) });

/// The calling thread's number.
pub fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|n| *n)
}

/// The device that is current on the calling thread.
pub fn current_device() -> Option<usize> {
    CONTEXT.get()
}

/// Makes a device current.
pub fn set_current_device(device: Option<usize>) {
    CONTEXT.set(device);
}

/// Whether the calling thread runs a host function of a stream.
pub fn in_callback() -> bool {
    IN_CALLBACK.get()
}

/// Says so.
pub fn set_in_callback(is: bool) {
    IN_CALLBACK.set(is);
}

/// Takes a lock, poisoned or not: what panicked is reported already.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// The one machine of this process; its executor runs from the first call on.
pub fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    static START: Once = Once::new();
    let world = WORLD.get_or_init(|| World::new(Config::from_environment()));
    START.call_once(|| {
        let executor = std::thread::Builder::new().name("software-cuda".into()).stack_size(16 << 20);
        executor.spawn(|| crate::scheduler::execute(world)).expect("a thread for the executor");
        crate::exit::report_at_exit();
    });
    world
}

impl World {
    fn new(config: Config) -> World {
        let registry = Registry::new(config.devices, size_of::<Cell>());
        let mut state = State {
            policy: config.policy,
            random: mix(config.seed),
            seed: config.seed,
            fault: config.fault,
            was_injected: false,
            streams: BTreeMap::new(),
            events: HashMap::new(),
            devices: Vec::new(),
            comms: Comms::default(),
            hosts: HashMap::new(),
            agents: 0,
            next_handle: 0x1000,
            next_sequence: 0,
            executed: 0,
            last_move: Instant::now(),
            peers_moved: Instant::now(),
            waiting_hosts: 0,
            last_submission: Instant::now(),
            polls: 0,
            is_released: false,
            is_stuck: false,
            tokens: HashMap::new(),
        };
        for device in 0..config.devices {
            let null_stream = state.add_stream(device, false, 0);
            state.devices.push(Device { null_stream, ..Device::default() });
        }
        World {
            config,
            state: Mutex::new(state),
            submitted: Condvar::new(),
            progressed: Condvar::new(),
            shadow: Mutex::default(),
            registry: Mutex::new(registry),
            findings: Mutex::default(),
            compiling: AtomicU64::new(0),
        }
    }

    /// The state, for a call that submits nothing.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Adds a finding.
    pub fn find(&self, kind: &str, key: &str, message: impl FnOnce() -> String) {
        lock(&self.findings).add(kind, key, message);
    }
}

/// A good start for a xorshift generator.
pub fn mix(seed: u64) -> u64 {
    (seed ^ seed >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

impl State {
    /// A new handle; they look like pointers, and none is used twice.
    pub fn handle(&mut self) -> u64 {
        self.next_handle += 16;
        self.next_handle
    }

    fn agent(&mut self) -> usize {
        self.agents += 1;
        self.agents - 1
    }

    /// A new stream.
    pub fn add_stream(&mut self, device: usize, is_free: bool, priority: i32) -> u64 {
        let (handle, agent) = (self.handle(), self.agent());
        let is_null = self.devices.len() == device;
        let what = if is_null { "the NULL stream".to_string() } else { format!("stream {handle:#x}") };
        let stream = Stream {
            device,
            is_free,
            priority,
            agent,
            name: format!("{what} of device {device}").into(),
            queue: VecDeque::new(),
            clock: Clock::default(),
            is_busy: false,
            is_hung: false,
            is_destroyed: false,
        };
        self.streams.insert(handle, stream);
        handle
    }

    /// Removes a stream that was destroyed, once it has nothing left to do.
    pub fn remove_if_over(&mut self, handle: u64) {
        let Some(stream) = self.streams.get(&handle).filter(|s| s.is_destroyed && s.is_idle()) else { return };
        self.devices[stream.device].ended.join(&stream.clock);
        self.streams.remove(&handle);
    }

    /// The calling thread among the clocks.
    pub fn host(&mut self, one_host: bool) -> &mut Host {
        let thread = if one_host { 0 } else { thread_number() };
        if !self.hosts.contains_key(&thread) {
            let agent = self.agent();
            let mut clock = Clock::default();
            clock.tick(agent);
            self.hosts.insert(thread, Host { agent, clock });
        }
        self.hosts.get_mut(&thread).expect("it was just put there")
    }

    /// What the calling thread knows; what it does next is after that.
    pub fn host_clock(&mut self, one_host: bool) -> Clock {
        let host = self.host(one_host);
        let clock = host.clock.clone();
        host.clock.tick(host.agent);
        clock
    }

    /// The next random number.
    pub fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The current device, when it can be used.
    pub fn device(&self) -> Result<usize, Refused> {
        let device = current_device().ok_or(Refused::CUDA_ERROR_INVALID_CONTEXT)?;
        match self.devices[device].error {
            Some(error) => Err(error),
            None => Ok(device),
        }
    }

    /// The stream that a handle means for the calling thread.
    pub fn stream(&self, handle: u64) -> Result<u64, Refused> {
        let handle = match handle {
            // The NULL stream, by its two names, and each thread's own one, which is taken for the same.
            0..=2 => self.devices[self.device()?].null_stream,
            other => other,
        };
        let stream = self.streams.get(&handle).filter(|s| !s.is_destroyed);
        let stream = stream.ok_or(Refused::CUDA_ERROR_INVALID_HANDLE)?;
        match self.devices[stream.device].error {
            Some(error) => Err(error),
            None => Ok(handle),
        }
    }

    /// Puts an operation at the end of a stream's queue; `stream` comes from [`State::stream`].
    pub fn submit(&mut self, world: &World, stream: u64, kind: Kind, name: impl Into<Arc<str>>) {
        let host = self.host_clock(world.config.one_host);
        self.submit_as(world, stream, kind, name, host);
    }

    /// As [`State::submit`], for a call that a host thread made when it knew `host`.
    pub fn submit_as(&mut self, world: &World, stream: u64, kind: Kind, name: impl Into<Arc<str>>, host: Clock) {
        self.next_sequence += 1;
        let op = Op { kind, host, name: name.into(), sequence: self.next_sequence };
        // A deferred call may find its stream gone.
        let Some(queue) = self.streams.get_mut(&stream).map(|s| &mut s.queue) else { return };
        queue.push_back(op);
        self.last_move = Instant::now();
        self.last_submission = self.last_move;
        (self.is_released, self.polls) = (false, 0);
        self.is_stuck = false;
        world.submitted.notify_all();
    }

    /// Records an event on a stream.
    pub fn record(&mut self, world: &World, stream: u64, name: &str) -> Arc<Signal> {
        let signal = Arc::new(Signal { stream, done: OnceLock::new() });
        self.submit(world, stream, Kind::Record(signal.clone()), format!("record {name}"));
        signal
    }

    /// How a stream is named in messages.
    pub fn stream_name(&self, handle: u64) -> String {
        self.streams.get(&handle).map_or_else(|| format!("stream {handle:#x}"), |s| s.name.to_string())
    }

    /// Counts a launch of a device, and says which fault it meets.
    pub fn meet_fault(&mut self, device: usize) -> Option<FaultKind> {
        self.devices[device].launches += 1;
        let fault = self.fault.filter(|f| f.device == device && f.launch == self.devices[device].launches)?;
        self.was_injected = true;
        match fault.kind {
            FaultKind::Hang => self.devices[device].is_hung = true,
            FaultKind::Kill => self.kill(device, Refused::CUDA_ERROR_LAUNCH_FAILED),
            FaultKind::Die => std::process::abort(),
        }
        Some(fault.kind)
    }

    /// The device is lost: what is queued there never runs, and each call answers with the error.
    pub fn kill(&mut self, device: usize, error: Refused) {
        self.devices[device].error = Some(error);
        for stream in self.streams.values_mut().filter(|s| s.device == device) {
            stream.queue.clear();
        }
    }
}
