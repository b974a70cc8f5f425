//! A process's side of what it does with ranks of other processes.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclResult_t;

use crate::nccl::data;
use crate::nccl::engine::Stage;
use crate::nccl::wire::{Heard, Meeting, Said, Wire};
use crate::world::{Kind, State, World};

/// What came of a meeting of several processes.
pub struct Answer {
    /// Why nothing did.
    pub mismatch: Option<String>,
    /// What the ranks get, whole.
    pub bytes: Vec<u8>,
}

/// Tells the hub what ranks of this process call and send. The lock is not held: the hub may take its time.
pub fn post(world: &World, wire: Option<&Wire>, meeting: Meeting, members: &[data::Member], ranks: usize) {
    let (mut calls, mut bytes) = (Vec::new(), Vec::new());
    for member in members {
        // What may not be read was found; the others get zeros, so that they find only what is theirs.
        let input = data::take(world, member, ranks).unwrap_or_else(|| vec![0; data::sent_bytes(member, ranks)]);
        calls.push((member.rank, member.call, input.len()));
        bytes.extend_from_slice(&input);
    }
    if let Some(wire) = wire {
        wire.say(&Said::Post { meeting, calls }, &bytes);
    }
}

/// The ranks of a clique in this process learn what the hub says.
pub fn deliver(world: &World, clique: u64, heard: Heard) {
    let mut state = world.state();
    let known = state.comms.cliques.get_mut(&clique).expect("cliques stay");
    match heard {
        Heard::Answer(meeting, answer) => answer_to(world, &mut state, clique, meeting, &answer),
        Heard::Other(Said::Full) => known.is_abroad = known.ranks.iter().any(Option::is_none),
        Heard::Other(Said::Refused) => known.error = Some(ncclResult_t::ncclInvalidUsage),
        Heard::Other(Said::Busy) => state.peers_moved = Instant::now(),
        Heard::Other(Said::Call(direction)) => drop(known.called.insert(direction)),
        Heard::Other(Said::HubLeft) => known.hub_left = true,
        Heard::End if known.hub_left => {}
        Heard::Other(Said::Lost) | Heard::End => {
            known.error.get_or_insert(ncclResult_t::ncclRemoteError);
        }
        Heard::Other(_) => {}
    }
    world.submitted.notify_all();
    world.progressed.notify_all();
}

/// A mismatch is told here, and not where operations are executed: whoever hears of it elsewhere may give its rank up at once,
/// and that must not come first.
fn answer_to(world: &World, state: &mut State, clique: u64, meeting: Meeting, answer: &Arc<Answer>) {
    if let Some(what) = &answer.mismatch {
        world.find("collective-mismatch", what, || what.clone());
    }
    let own: HashMap<u64, usize> =
        state.comms.comms.iter().filter(|(_, c)| c.clique == clique).map(|(handle, c)| (*handle, c.rank)).collect();
    for stream in state.streams.values_mut() {
        let Some(Kind::Nccl(group)) = stream.queue.front_mut().map(|o| &mut o.kind) else { continue };
        let Some(rank) = own.get(&group.comm) else { continue };
        for part in group.parts.iter_mut().filter(|p| Meeting::of(*rank, p.tag) == meeting) {
            if matches!(part.stage, Stage::Posted) {
                part.stage = Stage::Answered(answer.clone());
                let comm = state.comms.comms.get_mut(&group.comm).filter(|_| answer.mismatch.is_some());
                comm.into_iter().for_each(|comm| comm.error = Some(ncclResult_t::ncclInvalidUsage));
            }
        }
    }
    state.last_move = Instant::now();
}

/// How often a process that moves tells so to those that it shares communicators with.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Tells other processes that this one moves, or compiles, so that they do not take it for stuck. The lock is given up
/// meanwhile.
pub fn tell_busy<'a>(
    world: &'a World,
    state: MutexGuard<'a, State>,
    told: &mut Instant,
    is_compiling: bool,
) -> MutexGuard<'a, State> {
    if told.elapsed() < TELL_EVERY || !(is_compiling || state.last_move.elapsed() < TELL_EVERY) {
        return state;
    }
    *told = Instant::now();
    let shared = state.comms.cliques.values().filter(|clique| clique.is_abroad && !clique.is_over);
    let wires: Vec<Arc<Wire>> = shared.filter_map(|clique| clique.wire.clone()).collect();
    drop(state);
    wires.iter().for_each(|wire| wire.say(&Said::Busy, &[]));
    world.state()
}
