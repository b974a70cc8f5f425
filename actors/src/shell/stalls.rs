//! Causes fifty stalls in running sessions and checks that the report names the injected cause within ten seconds.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Sender, bounded};
use shardflow_kernels::collective::{CollectiveKind, Group, ReduceOp};
use shardflow_kernels::hash::SplitMix64;
use shardflow_kernels::memory::Base;

use super::tests::{Bench, act, add_steps, bench, checked_by_hand, collective_launch, launch_first, programs};
use super::*;
use crate::builder::Builder;
use crate::hang::{Root, tests::explains, tests::pieces};
use crate::simulate::tests::Fault;
use crate::simulate::{SimulationError, SimulationOptions, Timing, plans, simulate};
use crate::spec::{ActionRef, Firing, StreamKind};

const CASES: u64 = 50;
/// Time on the watchdog's clock after which a stall must be reported. In real time, the limit until a case is idle.
const WITHIN: Duration = Duration::from_secs(10);
const IDLE_FOR: Duration = Duration::from_millis(100);

fn draw(rng: &mut SplitMix64, end: usize) -> usize {
    rng.below(end as u64) as usize
}

/// A session that will stall, the expected root cause, and a sender. A kernel blocks until this sender is dropped.
struct Case {
    loaded: LoadedPlan,
    fault: Option<Fault>,
    steps: u32,
    root: Root,
    gate: Option<Sender<()>>,
}

fn lost_message(rng: &mut SplitMix64) -> Case {
    let all = plans::all();
    loop {
        let (_, spec, steps) = &all[draw(rng, all.len())];
        let pieces = pieces(spec, *steps);
        let (register, index, reader, piece) = pieces[draw(rng, pieces.len())];
        let (fault, root) = match draw(rng, 2) {
            0 => (Fault::LosePieces(register, index, piece), Root::LostPiece { register, piece, reader }),
            _ => (Fault::LoseReleases(register, index, piece), Root::LostRelease { register, piece, reader }),
        };
        // Some lost messages cause no stall, because nobody waits for the last releases.
        let options = SimulationOptions { fault: Some(fault), ..SimulationOptions::steps(*steps) };
        if let Err(SimulationError::Stuck(_)) = simulate(spec, &Timing::uniform(spec, 2, 1), &options) {
            let loaded = bench((**spec).clone()).loaded;
            return Case { loaded, fault: Some(fault), steps: *steps, root, gate: None };
        }
    }
}

/// The members of one group all-reduce their devices' gradients. One member never joins one of the collectives.
fn unjoined_collective(rng: &mut SplitMix64) -> Case {
    let (members, steps, per_step) = (2 + draw(rng, 3), 3, 2);
    let mut b = Builder::new();
    let mut at = Vec::new();
    for device in 0..members {
        let compute = b.actor(format!("device {device} compute"), device, Firing::Credit);
        let communication = b.actor(format!("device {device} communication"), device, Firing::Credit);
        b.actor_mut(communication).stream = StreamKind::Communication;
        let work = b.external(compute, "work", per_step);
        let reduce = b.action(communication, "all-reduce", per_step);
        (b.action_mut(reduce).groups, b.action_mut(reduce).communicators) = (vec![0], vec![0]);
        let gradient = b.edge(format!("device {device} gradient"), 2, work, reduce);
        let update = b.action(compute, "update", per_step);
        b.edge(format!("device {device} reduced"), 1, reduce, update);
        at.push((work, reduce, gradient));
    }
    let Bench { mut loaded, histories } = bench(b.build());
    let group = Arc::new(Group { id: 0, ranks: (0..members).collect() });
    for (member, (_, reduce, _)) in at.iter().enumerate() {
        let actor = reduce.actor.0;
        let program = &mut programs(&mut loaded, actor)[reduce.action as usize];
        program.bases.push(BaseRef::Fixed(Base { arena: histories[actor as usize].clone(), offset: 0 }));
        let kind = CollectiveKind::AllReduce { op: ReduceOp::Sum };
        let launch = collective_launch(&group, member, kind, program.bases.len() - 1);
        Arc::make_mut(&mut program.program).launches.insert(0, launch);
    }
    let late = draw(rng, members);
    let (work, reduce, register) = at[late];
    let nth = draw(rng, (per_step * steps) as usize) as u64;
    let stuck = match draw(rng, 3) {
        // The message about the stuck member's gradient is lost.
        0 => {
            let root = Root::LostPiece { register, piece: nth, reader: reduce };
            return Case { loaded, fault: Some(Fault::LosePieces(register, 0, nth)), steps, root, gate: None };
        }
        // The computation of the stuck member's gradient never ends.
        1 => work,
        // The stuck member's communication stream hangs.
        _ => reduce,
    };
    let gate = block_firing(&mut loaded, stuck, nth);
    Case { loaded, fault: None, steps, root: Root::Firing(stuck), gate: Some(gate) }
}

/// Blocks the `nth` firing of an action until the returned sender is dropped.
fn block_firing(loaded: &mut LoadedPlan, at: ActionRef, nth: u64) -> Sender<()> {
    let (gate, opened) = bounded::<()>(0);
    let fired = AtomicU64::new(0);
    let op = act(move || {
        if fired.fetch_add(1, Ordering::Relaxed) == nth {
            // Returns when the sender is dropped.
            let _ = opened.recv_timeout(WITHIN * 6);
        }
        Ok(())
    });
    launch_first(loaded, at, op);
    gate
}

fn wait_until_idle(running: &RunningSession) {
    let start = Instant::now();
    let mut last = (running.session.activity.events(), start);
    while last.1.elapsed() < IDLE_FOR {
        assert!(start.elapsed() < WITHIN, "{:?}", running.session.snapshot());
        if running.session.activity.events() != last.0 {
            last = (running.session.activity.events(), Instant::now());
        }
        thread::yield_now();
    }
}

#[test]
fn the_report_of_a_stall_names_its_cause_within_ten_seconds() {
    for seed in 0..CASES {
        let mut rng = SplitMix64(seed);
        let case = if seed % 3 == 2 { unjoined_collective(&mut rng) } else { lost_message(&mut rng) };
        let Case { loaded, fault, steps, root, gate } = case;
        let spec = loaded.spec.clone();
        let running = start(loaded, checked_by_hand()).unwrap();
        fault.into_iter().for_each(|fault| running.session.bus.inject(fault, spec.clone()));
        add_steps(&running, &spec, steps);
        wait_until_idle(&running);
        assert_eq!(running.check_progress(Duration::ZERO), None, "seed {seed}: the stall was reported too early");
        let report = running.check_progress(WITHIN).unwrap_or_else(|| panic!("seed {seed}: no stall report"));
        let hang = running.control().hang().unwrap_or_else(|| panic!("seed {seed}: the hang was not explained"));
        assert!(explains(&spec, &hang.root, &root), "seed {seed}, expected {root:?}: {report}");
        assert!(report.contains(&hang.cause(&spec)), "seed {seed}: {report}");
        drop(gate);
        running.shutdown().unwrap();
    }
}
