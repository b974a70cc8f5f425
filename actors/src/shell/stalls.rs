//! Fifty stalls that are brought about in running sessions: the report names what was done, within ten seconds.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Sender, bounded};
use shardflow_kernels::collective::{CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::op::{Buffer, Op};
use shardflow_kernels::tensor::DType;

use super::tests::{Bench, act, bench, give_steps, launch, programs};
use super::*;
use crate::builder::Builder;
use crate::hang::{Root, tests::pieces};
use crate::simulate::data::Rng;
use crate::simulate::tests::Fault;
use crate::simulate::{SimulationError, SimulationOptions, Timing, plans, simulate};
use crate::spec::{Firing, RegisterReader, StreamKind};

const CASES: u64 = 50;
/// After so long without progress a report is made, by the watchdog's clock; and the longest that a case may take to come to rest.
const WITHIN: Duration = Duration::from_secs(10);
/// Nothing has moved for so long: all is at rest.
const REST: Duration = Duration::from_millis(100);

/// A number below `end`.
fn draw(rng: &mut Rng, end: usize) -> usize {
    rng.below(end as u64) as usize
}

/// A session that will stall, what its report must name, and what holds a kernel up until it is dropped.
struct Case {
    loaded: LoadedPlan,
    fault: Option<Fault>,
    steps: u32,
    root: Root,
    gate: Option<Sender<()>>,
}

/// A piece that is published and not heard of, or released and not heard of.
fn lost_message(rng: &mut Rng) -> Case {
    let all = plans::all();
    loop {
        let (_, spec, steps) = &all[draw(rng, all.len())];
        let pieces = pieces(spec, *steps);
        let (register, index, reader, piece) = pieces[draw(rng, pieces.len())];
        let (fault, root) = match draw(rng, 2) {
            0 => (Fault::Unheard(register, index, piece), Root::Unheard { register, piece, reader }),
            _ => (Fault::Unreturned(register, index, piece), Root::Unreturned { register, piece, reader }),
        };
        // Not every message is waited for: the last credits are given back for nobody.
        let options = SimulationOptions { fault: Some(fault), ..SimulationOptions::steps(*steps) };
        if let Err(SimulationError::Stuck(_)) = simulate(spec, &Timing::uniform(spec, 2, 1), &options) {
            return Case {
                loaded: bench((**spec).clone()).loaded,
                fault: Some(fault),
                steps: *steps,
                root,
                gate: None,
            };
        }
    }
}

/// Members of one group reduce what their devices compute; one of them never comes to one of the collectives.
fn collective_that_one_never_joins(rng: &mut Rng) -> Case {
    let (members, steps, per_step) = (2 + draw(rng, 3), 3, 2);
    let mut b = Builder::new();
    let mut at = Vec::new();
    for device in 0..members {
        let compute = b.actor(format!("device {device} compute"), device, Firing::Credit);
        let communication = b.actor(format!("device {device} communication"), device, Firing::Credit);
        b.actor_mut(communication).stream = StreamKind::Communication;
        let work = b.external(compute, "work", per_step);
        let reduce = b.action(communication, "all-reduce", per_step);
        (b.action_mut(reduce).gangs, b.action_mut(reduce).groups) = (vec![0], vec![0]);
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
        let base = program.bases.len() - 1;
        let buffer = Buffer { base, offset: 0, shape: vec![1], dtype: DType::F32 };
        let kind = CollectiveKind::AllReduce { op: ReduceOp::Sum };
        let op = Op::Collective(CollectiveCall { group: group.clone(), member, kind });
        Arc::make_mut(&mut program.program).launches.insert(0, launch(op, vec![buffer.clone()], vec![buffer], false));
    }
    let late = draw(rng, members);
    let (work, reduce, register) = at[late];
    let nth = draw(rng, (per_step * steps) as usize) as u64;
    let stuck = match draw(rng, 3) {
        // Its gradient is lost on the way.
        0 => {
            let root = Root::Unheard { register, piece: nth, reader: reduce };
            return Case { loaded, fault: Some(Fault::Unheard(register, 0, nth)), steps, root, gate: None };
        }
        // It is computed for ever.
        1 => work,
        // The communication stream hangs.
        _ => reduce,
    };
    let gate = hold_up(&mut loaded, stuck, nth);
    Case { loaded, fault: None, steps, root: Root::Firing(stuck), gate: Some(gate) }
}

/// The `nth` firing of an action does not end before what this gives is dropped.
fn hold_up(loaded: &mut LoadedPlan, at: RegisterReader, nth: u64) -> Sender<()> {
    let (gate, opened) = bounded::<()>(0);
    let fired = AtomicU64::new(0);
    let kernel = act(move || {
        if fired.fetch_add(1, Ordering::Relaxed) == nth {
            // Ends when the sender is gone.
            let _ = opened.recv_timeout(WITHIN * 6);
        }
        Ok(())
    });
    let program = &mut programs(loaded, at.actor.0)[at.action as usize].program;
    Arc::make_mut(program).launches.insert(0, launch(kernel, vec![], vec![], false));
    gate
}

/// Waits until nothing has moved for [`REST`].
fn come_to_rest(running: &RunningSession) {
    let start = Instant::now();
    let mut last = (running.session.progress(), start);
    while last.1.elapsed() < REST {
        assert!(start.elapsed() < WITHIN, "{:?}", running.snapshot());
        if running.session.progress() != last.0 {
            last = (running.session.progress(), Instant::now());
        }
        thread::yield_now();
    }
}

#[test]
fn fifty_stalls_are_told_by_their_cause_within_ten_seconds() {
    for seed in 0..CASES {
        let mut rng = Rng::new(seed);
        let case = if seed % 3 == 2 { collective_that_one_never_joins(&mut rng) } else { lost_message(&mut rng) };
        let Case { loaded, fault, steps, root, gate } = case;
        let spec = loaded.spec.clone();
        let options = WatchdogOptions { stall_after: WITHIN, check_every: None, ..WatchdogOptions::default() };
        let running = start(loaded, options).unwrap();
        fault.into_iter().for_each(|fault| running.session.bus.break_with(fault));
        give_steps(&running, &spec, steps);
        come_to_rest(&running);
        assert_eq!(running.tick(Duration::ZERO), None, "seed {seed}: it has just stopped");
        let report = running.tick(WITHIN).unwrap_or_else(|| panic!("seed {seed}: no report"));
        let hang = running.control().hang().unwrap_or_else(|| panic!("seed {seed}: no hang"));
        assert_eq!(hang.root, root, "seed {seed}: {report}");
        assert!(report.contains(&hang.cause(&spec)), "seed {seed}: {report}");
        drop(gate);
        running.shutdown().unwrap();
    }
}
