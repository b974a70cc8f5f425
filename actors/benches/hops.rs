//! Measures the cost of a register hop: the protocol alone, raw ractor casts, the protocol over ractor, and a firing on
//! a CPU stream. Two actors, `ping` and `pong`, exchange pieces. Each result is per message or per firing.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use crossbeam_channel::{Sender, bounded};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use shardflow_actors::builder::Builder;
use shardflow_actors::protocol::{Effect, Protocol, ProtocolEvent};
use shardflow_actors::remote::Peers;
use shardflow_actors::shell::{ActionProgram, ActorHost, LoadedPlan, RegisterMemory, start};
use shardflow_actors::spec::{ActorId, Firing, RegisterId, Spec};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_kernels::collective::Collective;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::Base;

const PING: ActorId = ActorId(0);

/// `ping` consumes a token and writes a piece, which `pong` reads. Each piece needs one `Filled` and one `Released`.
fn spec() -> Arc<Spec> {
    let mut b = Builder::new();
    let (ping, pong) = (b.actor("ping", 0, Firing::Credit), b.actor("pong", 0, Firing::Credit));
    let (write, read) = (b.external(ping, "write", 1), b.action(pong, "read", 1));
    b.edge("wire", 2, write, read);
    Arc::new(b.build())
}

/// Sends `pieces` pieces through both protocols; every launch ends at once.
fn protocol_only(protocols: &mut [Protocol; 2], pieces: u32) {
    let (mut effects, mut queue) = (Vec::new(), VecDeque::new());
    queue.push_back((PING, ProtocolEvent::Token { action: 0, count: pieces }));
    while let Some((actor, event)) = queue.pop_front() {
        protocols[actor.0 as usize].handle(event, &mut effects).expect("correct peers");
        queue.extend(effects.drain(..).map(|effect| match effect {
            Effect::Launch { action, .. } => (actor, ProtocolEvent::Done { action }),
            Effect::Send { to, message } => (to, ProtocolEvent::Message(message)),
        }));
    }
}

enum Cast {
    Connect(ActorRef<Cast>, Sender<()>),
    /// A plain counter that both actors send back and forth.
    Count(u64),
    Event(ProtocolEvent),
}

struct Peer;

struct PeerState {
    protocol: Protocol,
    effects: Vec<Effect>,
    other: Option<(ActorRef<Cast>, Sender<()>)>,
    /// Number of released pieces after which the actor notifies the benchmark.
    notify_at: u64,
}

impl Actor for Peer {
    type Msg = Cast;
    type State = PeerState;
    type Arguments = PeerState;

    async fn pre_start(&self, _: ActorRef<Cast>, state: PeerState) -> Result<PeerState, ActorProcessingErr> {
        Ok(state)
    }

    async fn handle(&self, _: ActorRef<Cast>, cast: Cast, state: &mut PeerState) -> Result<(), ActorProcessingErr> {
        if let Cast::Connect(other, done) = cast {
            state.other = Some((other, done));
            return Ok(());
        }
        let Some((other, done)) = &state.other else { return Ok(()) };
        match cast {
            Cast::Count(0) => done.send(())?,
            Cast::Count(left) => other.cast(Cast::Count(left - 1))?,
            Cast::Connect(..) => {}
            Cast::Event(mut event) => loop {
                if let ProtocolEvent::Token { count, .. } = event {
                    state.notify_at += u64::from(count);
                }
                state.protocol.handle(event, &mut state.effects)?;
                let mut launched = None;
                for effect in state.effects.drain(..) {
                    match effect {
                        Effect::Launch { action, .. } => launched = Some(action),
                        Effect::Send { message, .. } => other.cast(Cast::Event(ProtocolEvent::Message(message)))?,
                    }
                }
                // A launch ends at once, so that only the hop is measured.
                let Some(action) = launched else {
                    let wire = state.protocol.produced().next();
                    let released = wire.and_then(|(_, slots)| slots.released().next());
                    if state.notify_at > 0 && released == Some(state.notify_at) {
                        done.send(())?;
                    }
                    return Ok(());
                };
                event = ProtocolEvent::Done { action };
            },
        }
        Ok(())
    }
}

/// Starts two peers on one thread, like the actors of one device.
fn peers() -> (ActorRef<Cast>, crossbeam_channel::Receiver<()>) {
    let (ready, started) = bounded(1);
    let (done, finished) = bounded(1);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(async move {
            let spec = spec();
            let (mut refs, mut ends) = (Vec::new(), Vec::new());
            for actor in 0..2 {
                let mut protocol = Protocol::new(&spec, ActorId(actor));
                protocol.handle(ProtocolEvent::Start, &mut Vec::new()).expect("starts");
                let state = PeerState { protocol, effects: Vec::new(), other: None, notify_at: 0 };
                let (peer, end) = Actor::spawn(None, Peer, state).await.expect("spawns");
                refs.push(peer);
                ends.push(end);
            }
            for (a, b) in [(0, 1), (1, 0)] {
                refs[a].cast(Cast::Connect(refs[b].clone(), done.clone())).expect("lives");
            }
            ready.send(refs[0].clone()).expect("waits");
            // The actors run until the process ends.
            for end in ends {
                let _ = end.await;
            }
        });
    });
    (started.recv().expect("starts"), finished)
}

fn hops(c: &mut Criterion) {
    let mut group = c.benchmark_group("hop");
    group.measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500)).sample_size(20);
    group.bench_function("protocol alone, one message", |b| {
        let spec = spec();
        let mut protocols = [0, 1].map(|a| Protocol::new(&spec, ActorId(a)));
        for protocol in &mut protocols {
            protocol.handle(ProtocolEvent::Start, &mut Vec::new()).expect("starts");
        }
        // Each piece needs two messages.
        b.iter_custom(|n| {
            let start = Instant::now();
            protocol_only(black_box(&mut protocols), n.div_ceil(2) as u32);
            start.elapsed()
        });
    });
    let (ping, finished) = peers();
    group.bench_function("raw ractor cast", |b| {
        b.iter_custom(|n| {
            let start = Instant::now();
            ping.cast(Cast::Count(n)).expect("lives");
            finished.recv().expect("lives");
            start.elapsed()
        });
    });
    group.bench_function("protocol over ractor, one message", |b| {
        b.iter_custom(|n| {
            let count = n.div_ceil(2) as u32;
            let start = Instant::now();
            ping.cast(Cast::Event(ProtocolEvent::Token { action: 0, count })).expect("lives");
            finished.recv().expect("lives");
            start.elapsed()
        });
    });
    group.bench_function("through CPU streams, one firing", firing);
    group.finish();
}

/// Measures the complete runtime with empty programs on two streams of one device.
fn firing(b: &mut criterion::Bencher<'_>) {
    let engine: Arc<dyn Collective> = Arc::new(InProcess::new());
    let device = Device::cpu(0, 1, engine.clone());
    let empty = || vec![ActionProgram { program: Arc::default(), bases: Vec::new(), ends: None }];
    let arena = device.arena(64).expect("64 bytes");
    let hosted = |name| ActorHost { stream: device.stream(name, 1).expect("a thread"), programs: empty() };
    let loaded = LoadedPlan {
        spec: spec(),
        hosted: [(PING, hosted("ping")), (ActorId(1), hosted("pong"))].into(),
        memory: [(RegisterId(0), RegisterMemory { base: Base { arena, offset: 0 }, stride: 4 })].into(),
        engine,
        peers: Peers::default(),
    };
    let running = start(loaded, WatchdogOptions::default()).expect("fits");
    b.iter_custom(|n| {
        let start = Instant::now();
        running.add_tokens(PING, 0, n.div_ceil(2) as u32).expect("runs");
        assert!(running.quiesce(Duration::from_secs(60)).expect("runs"));
        start.elapsed()
    });
}

criterion_group!(benches, hops);
criterion_main!(benches);
