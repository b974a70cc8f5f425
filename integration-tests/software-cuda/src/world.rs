//! The state of the software machine: devices, streams, events, host threads, and the queues of operations.
//!
//! The locks are taken in this order: `state`, `shadow` (held while an operation runs), `registry` or `findings`.

use std::cell::Cell as ThreadCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock};
use std::time::Instant;

use cudarc::driver::sys::{CUhostFn, CUresult};

use crate::clock::Clock;
use crate::config::{DeviceFault, DeviceFaultKind, SchedulePolicy, SoftwareConfig};
use crate::cublaslt::product::Product;
use crate::cudnn::evaluate::GraphExecution;
use crate::findings::Findings;
use crate::memory::Registry;
use crate::nccl::engine::{Comms, Group};
use crate::shadow::{Cell, Shadow};

/// The error of a driver call.
pub(crate) type DriverError = CUresult;

/// A launch of a kernel.
pub(crate) struct Launch {
    /// The kernel in its loaded library.
    pub kernel: &'static crate::kernel::Kernel,
    /// Copies of the arguments.
    pub arguments: Vec<Vec<u8>>,
    /// Dimensions of the grid, then of the block.
    pub dims: [u32; 6],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
}

/// The extent of a copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    /// Bytes of a row.
    pub width: usize,
    /// Number of rows.
    pub height: usize,
    /// Bytes from one row to the next at the source and at the destination.
    pub pitch: (usize, usize),
}

/// The state of a copy's source in pinned memory when the copy was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SourceState {
    /// Digest of the source's bytes.
    pub digest: u64,
    /// Number of copies that had written the source's allocation.
    pub copies_in: u64,
}

/// The kind of an operation.
pub(crate) enum OpKind {
    /// Launches a kernel.
    Launch(Box<Launch>),
    /// Copies rows. An address outside of the window is pageable host memory.
    Copy {
        from: usize,
        to: usize,
        rows: Rows,
        /// The bytes of a pageable source, read at submission.
        staged: Option<Vec<u8>>,
        /// The state of a pinned source at submission.
        source_state: Option<SourceState>,
    },
    /// Fills memory with a pattern of 1, 2 or 4 bytes.
    Fill { to: usize, pattern: u32, width: usize, count: usize },
    /// Makes an allocation usable.
    Alloc { base: usize },
    /// Frees an allocation.
    Free { base: usize },
    /// Records an event.
    Record(Arc<Signal>),
    /// Waits for an event.
    Wait(Arc<Signal>),
    /// Calls a host function.
    Host { function: CUhostFn, data: usize },
    /// Executes the collectives and messages of one group on one communicator.
    Nccl(Box<Group>),
    /// Computes a matrix product.
    Product(Box<Product>),
    /// Executes a cuDNN graph.
    Graph(Box<GraphExecution>),
}

/// One record of an event on a stream.
pub(crate) struct Signal {
    /// The stream that records the event.
    pub stream: u64,
    /// The clock of the stream and the time when the record was executed. Empty until then.
    pub done: OnceLock<(Clock, Instant)>,
}

/// An operation in a stream's queue.
pub(crate) struct QueuedOp {
    /// Kind of the operation.
    pub kind: OpKind,
    /// The clock of the submitting host thread.
    pub host: Clock,
    /// Name of the operation in messages.
    pub name: Arc<str>,
    /// Position of the operation among all submissions.
    pub sequence: u64,
}

/// A stream.
pub(crate) struct Stream {
    /// Device of the stream.
    pub device: usize,
    /// Whether the stream does not synchronise with the NULL stream.
    pub is_non_blocking: bool,
    /// Requested priority of the stream.
    pub priority: i32,
    /// The stream's index in clocks; see `clock` for agents.
    pub agent: usize,
    /// Name of the stream in messages.
    pub name: Arc<str>,
    /// Operations that have not started. A started collective stays at the front until it has ended.
    pub queue: VecDeque<QueuedOp>,
    /// Clock of the stream's last operation.
    pub clock: Clock,
    /// Whether one of the stream's operations is executing.
    pub is_busy: bool,
    /// Whether one of the stream's operations never ends.
    pub is_hung: bool,
    /// Whether the stream was destroyed. Its queued operations still run.
    pub is_destroyed: bool,
}

impl Stream {
    /// Whether the stream has no work.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && !self.is_busy && !self.is_hung
    }
}

/// An event.
pub(crate) struct Event {
    /// Device of the event.
    pub device: usize,
    /// The last record of the event.
    pub last: Option<Arc<Signal>>,
    /// Whether the event records times.
    pub has_time: bool,
}

/// One device.
#[derive(Default)]
pub(crate) struct Device {
    /// The error that each later call on this device returns.
    pub error: Option<DriverError>,
    /// Whether the device hangs.
    pub is_hung: bool,
    /// Number of executed launches: kernels, products and cuDNN graphs.
    pub launches: u64,
    /// Reference count of the primary context.
    pub retained: u64,
    /// Handle of the device's NULL stream.
    pub null_stream: u64,
    /// The joined clocks of all destroyed streams of the device.
    pub ended: Clock,
}

/// A host thread.
pub(crate) struct Host {
    /// The thread's index in clocks; see `clock` for agents.
    pub agent: usize,
    /// The thread's clock.
    pub clock: Clock,
}

/// The state that the lock `state` guards.
pub(crate) struct State {
    /// The scheduling policy, which tests may change.
    pub policy: SchedulePolicy,
    /// State of the generator of random numbers for the schedule.
    pub random: u64,
    /// Seed of the order of streams under [`SchedulePolicy::Starve`].
    pub seed: u64,
    /// The fault to inject.
    pub fault: Option<DeviceFault>,
    /// Whether a fault was injected.
    pub was_injected: bool,
    /// Streams by handle.
    pub streams: BTreeMap<u64, Stream>,
    /// Events by handle.
    pub events: HashMap<u64, Event>,
    /// Devices by number.
    pub devices: Vec<Device>,
    /// Communicators.
    pub comms: Comms,
    hosts: HashMap<u64, Host>,
    /// Number of streams and host threads that have existed so far.
    pub agents: usize,
    next_handle: u64,
    next_sequence: u64,
    /// Number of executed operations.
    pub executed: u64,
    /// Time of the last submission or execution.
    pub last_progress: Instant,
    /// Time at which another process with ranks of the same communicator last reported progress.
    pub peers_progressed: Instant,
    /// Number of waiting host threads.
    pub waiting_hosts: usize,
    /// Time of the last submission.
    pub last_submission: Instant,
    /// Number of queries that returned "not ready" since the last submission.
    pub polls: u64,
    /// For late policies (`is_late`): whether the host has waited, polled or been idle since its last submission.
    pub is_released: bool,
    /// Whether a deadlock was reported since the last submission or abort.
    pub is_stuck: bool,
    /// Captured clocks by token.
    pub tokens: HashMap<u64, Clock>,
}

/// The software machine.
pub(crate) struct SoftwareMachine {
    /// Settings.
    pub config: SoftwareConfig,
    /// Streams, queues and devices.
    pub state: Mutex<State>,
    /// Notified when an operation is submitted.
    pub submitted: Condvar,
    /// Notified when the executor makes progress.
    pub progressed: Condvar,
    /// Shadow memory.
    pub shadow: Mutex<Shadow>,
    /// Allocations.
    pub registry: Mutex<Registry>,
    /// Findings.
    pub findings: Mutex<Findings>,
    /// Number of running compilations. A lack of progress during a compilation is not a deadlock.
    pub compiling: AtomicU64,
}

thread_local!(static CONTEXT: ThreadCell<Option<usize>> = const { ThreadCell::new(None) });
thread_local!(static IN_CALLBACK: ThreadCell<bool> = const { ThreadCell::new(false) });

/// Returns the calling thread's number.
pub fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|n| *n)
}

/// Returns the current device of the calling thread.
pub fn current_device() -> Option<usize> {
    CONTEXT.get()
}

/// Sets the current device of the calling thread.
pub fn set_current_device(device: Option<usize>) {
    CONTEXT.set(device);
}

/// Whether the calling thread runs a host function of a stream.
pub fn in_callback() -> bool {
    IN_CALLBACK.get()
}

/// Sets whether the calling thread runs a host function of a stream.
pub fn set_in_callback(value: bool) {
    IN_CALLBACK.set(value);
}

/// Takes a lock even if it is poisoned, because the panic was already reported.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Returns the machine of this process. The first call starts the executor.
pub fn machine() -> &'static SoftwareMachine {
    static WORLD: OnceLock<SoftwareMachine> = OnceLock::new();
    static START: Once = Once::new();
    let machine = WORLD.get_or_init(|| SoftwareMachine::new(SoftwareConfig::from_environment()));
    START.call_once(|| {
        let executor = std::thread::Builder::new().name("software-cuda".into()).stack_size(16 << 20);
        executor.spawn(|| crate::scheduler::execute(machine)).expect("the executor's thread starts");
        crate::exit::report_at_exit();
    });
    machine
}

impl SoftwareMachine {
    fn new(config: SoftwareConfig) -> SoftwareMachine {
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
            last_progress: Instant::now(),
            peers_progressed: Instant::now(),
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
        SoftwareMachine {
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

    /// Locks the state.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Adds a finding.
    pub fn report_finding(&self, kind: &str, key: &str, message: impl FnOnce() -> String) {
        lock(&self.findings).add(kind, key, message);
    }
}

/// Mixes a seed into a non-zero start value for a xorshift generator.
pub fn mix(seed: u64) -> u64 {
    (seed ^ seed >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

impl State {
    /// Returns a new handle. Handles look like pointers and are never reused.
    pub fn handle(&mut self) -> u64 {
        self.next_handle += 16;
        self.next_handle
    }

    fn agent(&mut self) -> usize {
        self.agents += 1;
        self.agents - 1
    }

    /// Adds a stream.
    pub fn add_stream(&mut self, device: usize, is_non_blocking: bool, priority: i32) -> u64 {
        let (handle, agent) = (self.handle(), self.agent());
        let is_null = self.devices.len() == device;
        let name = if is_null { "the NULL stream".to_string() } else { format!("stream {handle:#x}") };
        let stream = Stream {
            device,
            is_non_blocking,
            priority,
            agent,
            name: format!("{name} of device {device}").into(),
            queue: VecDeque::new(),
            clock: Clock::default(),
            is_busy: false,
            is_hung: false,
            is_destroyed: false,
        };
        self.streams.insert(handle, stream);
        handle
    }

    /// Removes a stream that is destroyed and idle.
    pub fn remove_if_finished(&mut self, handle: u64) {
        let Some(stream) = self.streams.get(&handle).filter(|s| s.is_destroyed && s.is_idle()) else { return };
        self.devices[stream.device].ended.join(&stream.clock);
        self.streams.remove(&handle);
    }

    /// Returns the state of the calling host thread.
    pub fn host(&mut self, one_host: bool) -> &mut Host {
        let thread = if one_host { 0 } else { thread_number() };
        if !self.hosts.contains_key(&thread) {
            let agent = self.agent();
            let mut clock = Clock::default();
            clock.tick(agent);
            self.hosts.insert(thread, Host { agent, clock });
        }
        self.hosts.get_mut(&thread).expect("inserted above")
    }

    /// Returns the calling thread's clock. The thread's later actions happen after this clock.
    pub fn host_clock(&mut self, one_host: bool) -> Clock {
        let host = self.host(one_host);
        let clock = host.clock.clone();
        host.clock.tick(host.agent);
        clock
    }

    /// Returns the next random number.
    pub fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Returns the current device, or the device's error.
    pub fn device(&self) -> Result<usize, DriverError> {
        let device = current_device().ok_or(DriverError::CUDA_ERROR_INVALID_CONTEXT)?;
        match self.devices[device].error {
            Some(error) => Err(error),
            None => Ok(device),
        }
    }

    /// Resolves a stream handle for the calling thread.
    pub fn stream(&self, handle: u64) -> Result<u64, DriverError> {
        let handle = match handle {
            // Handles 0 and 1 are the NULL stream. The per-thread default stream, 2, is treated as the same stream.
            0..=2 => self.devices[self.device()?].null_stream,
            other => other,
        };
        let stream = self.streams.get(&handle).filter(|s| !s.is_destroyed);
        let stream = stream.ok_or(DriverError::CUDA_ERROR_INVALID_HANDLE)?;
        match self.devices[stream.device].error {
            Some(error) => Err(error),
            None => Ok(handle),
        }
    }

    /// Appends an operation to a stream's queue. `stream` must come from [`State::stream`].
    pub fn submit(&mut self, machine: &SoftwareMachine, stream: u64, kind: OpKind, name: impl Into<Arc<str>>) {
        let host = self.host_clock(machine.config.one_host);
        self.submit_as(machine, stream, kind, name, host);
    }

    /// Like [`State::submit`], for a call that a host thread made when its clock was `host`.
    pub fn submit_as(
        &mut self,
        machine: &SoftwareMachine,
        stream: u64,
        kind: OpKind,
        name: impl Into<Arc<str>>,
        host: Clock,
    ) {
        self.next_sequence += 1;
        let op = QueuedOp { kind, host, name: name.into(), sequence: self.next_sequence };
        // If the call was deferred, its stream may have been destroyed in the meantime.
        let Some(queue) = self.streams.get_mut(&stream).map(|s| &mut s.queue) else { return };
        queue.push_back(op);
        self.last_progress = Instant::now();
        self.last_submission = self.last_progress;
        (self.is_released, self.polls) = (false, 0);
        self.is_stuck = false;
        machine.submitted.notify_all();
    }

    /// Records an event on a stream.
    pub fn record(&mut self, machine: &SoftwareMachine, stream: u64, name: &str) -> Arc<Signal> {
        let signal = Arc::new(Signal { stream, done: OnceLock::new() });
        self.submit(machine, stream, OpKind::Record(signal.clone()), format!("record {name}"));
        signal
    }

    /// Returns the name of a stream in messages.
    pub fn stream_name(&self, handle: u64) -> String {
        self.streams.get(&handle).map_or_else(|| format!("stream {handle:#x}"), |s| s.name.to_string())
    }

    /// Counts a launch on a device, and triggers the device's fault if it is due.
    pub fn trigger_fault(&mut self, device: usize) -> Option<DeviceFaultKind> {
        self.devices[device].launches += 1;
        let fault = self.fault.filter(|f| f.device == device && f.launch == self.devices[device].launches)?;
        self.was_injected = true;
        match fault.kind {
            DeviceFaultKind::Hang => self.devices[device].is_hung = true,
            DeviceFaultKind::Kill => self.kill(device, DriverError::CUDA_ERROR_LAUNCH_FAILED),
            DeviceFaultKind::Die => std::process::abort(),
        }
        Some(fault.kind)
    }

    /// Kills a device: its queued operations never run, and each later call returns `error`.
    pub fn kill(&mut self, device: usize, error: DriverError) {
        self.devices[device].error = Some(error);
        for stream in self.streams.values_mut().filter(|s| s.device == device) {
            stream.queue.clear();
        }
    }
}
