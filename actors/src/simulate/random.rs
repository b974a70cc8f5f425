//! Generates random plans with tables. Slot tables come from a graph colouring: pieces that live at the same time in a
//! run with unlimited slots get different slots.

use std::sync::Arc;

use shardflow_kernels::hash::SplitMix64;

use super::{Jitter, SimulationError, SimulationOptions, Timing, simulate};
use crate::builder::Builder;
use crate::check::{SpecError, check};
use crate::spec::{ActionRef, Firing, Pieces, RegisterId, Spec};

/// Number of steps of the run that determines the lifetimes for the colouring.
const STEPS: u32 = 12;
/// Maximum length of a slot table in steps.
const TABLE_STEPS_MAX: u32 = 6;

struct Generator {
    rng: SplitMix64,
    actions: Vec<ActionRef>,
    /// A possible order of all firings of one step.
    order: Vec<ActionRef>,
}

impl Generator {
    fn draw(&mut self, end: u32) -> u32 {
        self.rng.below(end.into()) as u32
    }

    fn one_of(&mut self, choices: &[u32]) -> u32 {
        choices[self.draw(choices.len() as u32) as usize]
    }

    /// The positions in `order` at which these actions fire.
    fn positions(&self, actions: &[ActionRef]) -> Vec<usize> {
        (0..self.order.len()).filter(|at| actions.contains(&self.order[*at])).collect()
    }

    /// Creates actors with actions and ordered lists, without registers.
    fn actions(&mut self) -> Spec {
        let mut b = Builder::new();
        let actors: Vec<_> =
            (0..2 + self.draw(3)).map(|a| b.actor(format!("actor{a}"), a as usize, Firing::Credit)).collect();
        for n in 0..3 + self.draw(5) {
            let actor = actors[self.draw(actors.len() as u32) as usize];
            let per_step = self.one_of(&[1, 2, 2, 3, 4, 4, 6]);
            self.actions.push(b.action(actor, format!("action{n}"), per_step));
        }
        let mut order = Vec::new();
        for (n, at) in (0..).zip(self.actions.clone()) {
            for firing in 0..b.action_mut(at).per_step {
                order.push((4 * n + 4 * firing + self.draw(6), at));
            }
        }
        order.sort_unstable();
        self.order = order.into_iter().map(|(_, at)| at).collect();
        for actor in actors {
            if self.draw(2) == 0 {
                let own = self.order.iter().filter(|at| at.actor == actor).map(|at| at.action);
                b.actor_mut(actor).firing = Firing::Ordered(own.collect());
            }
        }
        b.build()
    }

    /// The piece that each of `writes` firings writes. Every piece occurs at least once, in any order.
    fn written(&mut self, writes: usize, pieces: u32) -> Vec<u32> {
        if self.draw(3) == 0 {
            return (0..writes).map(|at| (at * pieces as usize / writes) as u32).collect();
        }
        let mut written: Vec<u32> =
            (0..writes as u32).map(|at| if at < pieces { at } else { self.draw(pieces) }).collect();
        for at in (1..writes).rev() {
            written.swap(at, self.draw(at as u32 + 1) as usize);
        }
        written
    }

    /// Adds a register with random writers and readers. Returns `None` if they contradict each other.
    fn with_register(&mut self, spec: &Spec, n: u32) -> Option<Spec> {
        let index = self.draw(self.actions.len() as u32);
        let first = self.actions[index as usize];
        let mut writers = vec![first];
        if let Firing::Ordered(_) = &spec.actor(first.actor).firing {
            let others = self.actions.clone().into_iter().filter(|at| at.actor == first.actor && *at != first);
            writers.extend(others.filter(|_| self.draw(2) == 0));
        }
        let positions = self.positions(&writers);
        let pieces = 1 + self.draw(positions.len().min(6) as u32);
        let written = self.written(positions.len(), pieces);
        let initial = self.one_of(&[0, 0, 0, 1, 2, 3]);

        let mut b = Builder::extend(spec.clone());
        let register = b.channel(format!("register{n}"), first.actor, STEPS * pieces + initial, pieces);
        b.register_mut(register).initial = initial;
        let of = |writer: &ActionRef| -> Vec<u32> {
            let own = positions.iter().zip(&written).filter(|(at, _)| self.order[**at] == *writer);
            own.map(|(_, piece)| *piece).collect()
        };
        let own: Vec<Vec<u32>> = writers.iter().map(of).collect();
        let list: Vec<u32> = positions.iter().map(|at| self.order[*at].action).collect();
        let orders: Vec<(u32, &[u32])> = writers.iter().zip(&own).map(|(at, own)| (at.action, &own[..])).collect();
        for (writer, table) in writers.iter().zip(Pieces::of_writers(&list, &orders)) {
            b.write(register, *writer, self.plain(table, pieces));
        }
        if self.draw(3) == 0 {
            b.early(register);
        }
        for reader in self.actions.clone() {
            if let Some(read) = self.read(reader, &positions, &written, initial, pieces) {
                b.read_pieces(register, reader, read);
            }
        }
        let spec = b.build();
        match check(&spec) {
            Ok(()) | Err(SpecError::Unbounded { .. }) => Some(spec),
            Err(SpecError::Accumulation { .. }) => None,
            Err(other) => panic!("{other}"),
        }
    }

    /// Draws the piece that each firing of an action reads: an initial piece, a piece of the previous step, or a piece
    /// that was published earlier in the order. Returns `None` if the action does not read the register.
    fn read(
        &mut self,
        reader: ActionRef,
        positions: &[usize],
        written: &[u32],
        initial: u32,
        pieces: u32,
    ) -> Option<Pieces> {
        if self.draw(3) > 0 {
            return None;
        }
        let mut read = Vec::new();
        for at in self.positions(&[reader]) {
            let is_published = |piece: u32| {
                let last = written.iter().rposition(|own| *own == piece).expect("each piece is written");
                positions[last] < at
            };
            let is_there = |piece: &u32| *piece < initial || is_published(*piece - initial);
            let there: Vec<u32> = (0..pieces).filter(is_there).collect();
            if there.is_empty() {
                return None;
            }
            // Often takes the next piece, so that a rate can describe the reads.
            let next = there[read.len() * there.len() / self.order.len().max(read.len() + 1)];
            read.push(if self.draw(2) == 0 { next } else { self.one_of(&there) });
        }
        let table = Pieces::in_order(&read);
        Some(self.plain(table, pieces))
    }

    /// Returns the rate that equals the table or, if there is no such rate, the table.
    fn plain(&self, table: Pieces, pieces: u32) -> Pieces {
        let Pieces::Table(accesses) = &table else { return table };
        let count = accesses.len() as u32;
        let rate = Pieces::Rate(count / pieces);
        let is_rate = count.is_multiple_of(pieces) && rate.accesses(count).eq(accesses.iter().copied());
        if is_rate { rate } else { table }
    }
}

/// A random plan with slots for all pieces of [`STEPS`] steps.
pub(crate) fn unlimited(seed: u64) -> Spec {
    let mut generator = Generator { rng: SplitMix64(seed), actions: Vec::new(), order: Vec::new() };
    let mut spec = generator.actions();
    for n in 0..2 + generator.draw(6) {
        spec = generator.with_register(&spec, n).unwrap_or(spec);
    }
    // An action whose inputs all lag would run ahead of the host, so it needs tokens.
    let Spec { actors, registers, .. } = &mut spec;
    for action in actors.values_mut().flat_map(|actor| &mut actor.actions) {
        action.external = action.inputs.iter().all(|input| registers[input.register].initial > 0);
    }
    spec
}

/// A piece in a run: when its slot was acquired and freed, and the steps in which it was written and read.
#[derive(Clone, Copy)]
struct Lifetime {
    acquired: u64,
    freed: u64,
    written: u64,
    read: u64,
}

impl Lifetime {
    /// True if one slot can first hold this piece and then `other`.
    fn precedes(&self, other: &Self) -> bool {
        self.freed <= other.acquired && self.read <= other.written
    }
}

/// The lifetimes of a register's pieces in an exact run of [`STEPS`] steps.
fn lifetimes(spec: &Arc<Spec>, times: &Timing, id: RegisterId) -> Vec<Lifetime> {
    let run =
        simulate(spec, times, &SimulationOptions::steps(STEPS)).unwrap_or_else(|e| panic!("with unlimited slots: {e}"));
    let register = spec.register(id);
    let (per_step, initial) = (u64::from(register.pieces_per_step), u64::from(register.initial));
    let count = per_step * u64::from(STEPS) + initial;
    let mut all: Vec<_> = (0..count)
        .map(|n| {
            let within = (n % per_step) as u32;
            let readers =
                register.readers.iter().filter(|r| spec.input(id, **r).unwrap().pieces.contains(within)).count();
            let (written, read) = (n.saturating_sub(initial) / per_step, if readers == 0 { 0 } else { n / per_step });
            // Initial pieces need slots of their own, even if nobody reads them.
            (Lifetime { acquired: 0, freed: u64::from(n < initial), written, read }, readers)
        })
        .collect();
    for fired in &run.timeline {
        let action = spec.action(fired.actor, fired.action);
        for output in action.outputs.iter().filter(|output| output.register == id) {
            let (piece, first, last) = output.pieces.of_firing(fired.firing, register.pieces_per_step);
            let (lifetime, readers) = &mut all[(piece + initial) as usize];
            if first {
                lifetime.acquired = fired.start;
            }
            if last && *readers == 0 {
                lifetime.freed = fired.end;
            }
        }
        for input in action.inputs.iter().filter(|input| input.register == id) {
            let (piece, _, last) = input.pieces.of_firing(fired.firing, register.pieces_per_step);
            let (lifetime, readers) = &mut all[piece as usize];
            if last {
                *readers -= 1;
                lifetime.freed = lifetime.freed.max(fired.end + times.hop_ticks);
            }
        }
    }
    let ends = |(lifetime, readers)| if readers == 0 { lifetime } else { Lifetime { freed: u64::MAX, ..lifetime } };
    all.into_iter().map(ends).collect()
}

/// Replaces the slots of all registers by tables that colour the pieces' lifetimes. A table covers one or more steps.
pub(crate) fn coloured(spec: &Spec, seed: u64) -> Spec {
    let mut rng = SplitMix64(seed);
    let mut coloured = spec.clone();
    let action_ticks = spec.actors.values().map(|a| a.actions.iter().map(|_| 1 + rng.below(5)).collect()).collect();
    let times = Timing { action_ticks, hop_ticks: seed % 3 };
    let spec = Arc::new(spec.clone());
    for n in spec.registers.ids() {
        let lives = lifetimes(&spec, &times, n);
        let per_step = spec.registers[n].pieces_per_step;
        let first = 1 + rng.below(3) as u32;
        let table = (first..=TABLE_STEPS_MAX).find_map(|steps| colour(&lives, (steps * per_step) as usize, &mut rng));
        if let Some(table) = table {
            coloured.registers[n].slots = table.iter().max().expect("not empty") + 1;
            coloured.registers[n].slot_of = table.into();
        }
    }
    coloured
}

/// Assigns a slot to each piece number modulo `length`, so that live pieces never share a slot. Returns `None`
/// if a piece is still alive when the piece whose number is larger by `length` begins.
fn colour(lives: &[Lifetime], length: usize, rng: &mut SplitMix64) -> Option<Vec<u32>> {
    let of = |residue: usize| lives.iter().skip(residue).step_by(length);
    let fit = |a: usize, b: usize| {
        of(a).all(|one| of(b).all(|other| std::ptr::eq(one, other) || one.precedes(other) || other.precedes(one)))
    };
    let mut table: Vec<u32> = Vec::new();
    for residue in 0..length {
        if !fit(residue, residue) {
            return None;
        }
        let slots = table.iter().max().map_or(0, |slot| slot + 1);
        let free = |slot: &u32| table.iter().enumerate().all(|(other, of)| of != slot || fit(other, residue));
        let candidates: Vec<u32> = (0..slots).filter(free).collect();
        table.push(match candidates.len() {
            0 => slots,
            count => candidates[rng.below(count as u64) as usize],
        });
    }
    Some(table)
}

fn jittered(seed: u64, steps: u32) -> SimulationOptions {
    let jitter = Jitter { seed, action_ticks_max: seed % 7, hop_ticks_max: seed / 7 % 9 };
    SimulationOptions { jitter: Some(jitter), ..SimulationOptions::steps(steps) }
}

/// True if a register has one slot and an initial piece. The writer of such a register reads the slot's old content, so
/// the data depends on the number of slots.
fn updates_in_place(spec: &Spec) -> bool {
    spec.registers.values().any(|register| register.slots == 1 && register.initial > 0)
}

#[test]
fn coloured_slots_give_the_same_data_as_unlimited_slots_in_any_timing() {
    let (mut tables, mut permuted, mut shared, mut partial, mut periods) = (0, 0, 0, 0, 0);
    for seed in 0..200 {
        let unlimited = unlimited(seed);
        let limited = coloured(&unlimited, seed);
        check(&limited).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let steps = (limited.period_steps() as u32).clamp(4, STEPS);
        let times = Timing::uniform(&unlimited, 2, 1);
        let run = |spec: &Arc<Spec>, options: SimulationOptions| {
            simulate(spec, &times, &options).unwrap_or_else(|e| panic!("seed {seed}: {e}"))
        };
        let (unlimited, limited) = (Arc::new(unlimited), Arc::new(limited));
        let exact = run(&limited, SimulationOptions::steps(steps));
        if !updates_in_place(&limited) {
            assert_eq!(run(&unlimited, SimulationOptions::steps(steps)).digest, exact.digest, "seed {seed}");
        }
        for timing in 0..12 {
            assert_eq!(run(&limited, jittered(timing, steps)).digest, exact.digest, "seed {seed}, timing {timing}");
        }
        let inputs = || limited.all_actions().flat_map(|(_, action)| &action.inputs);
        tables += u32::from(limited.registers.values().any(|r| r.slots > 1 && (r.slots as usize) < r.slot_of.len()));
        let falls = |p: &Pieces| matches!(p, Pieces::Table(t) if t.windows(2).any(|w| w[1].piece < w[0].piece));
        permuted += u32::from(inputs().any(|input| falls(&input.pieces)));
        shared += u32::from((0..limited.registers.len()).any(|r| limited.writers(RegisterId(r as u32)).count() > 1));
        let misses =
            |r: RegisterId, p: &Pieces| (0..limited.register(r).pieces_per_step).any(|piece| !p.contains(piece));
        partial += u32::from(inputs().any(|input| misses(input.register, &input.pieces)));
        periods += u32::from(limited.period_steps() > 1);
    }
    let all = [tables, permuted, shared, partial, periods];
    let kinds = "plans with slot tables, permuted reads, several writers, partial reads and longer periods";
    assert!(all.iter().all(|count| *count > 20), "too few {kinds}: {all:?}");
}

/// Adds a collective whose two members are actions of different actors with ordered lists, if such actions exist.
fn add_collective(spec: &mut Spec) {
    let is_listed = |at: &ActionRef| matches!(spec.actor(at.actor).firing, Firing::Ordered(_));
    let listed: Vec<_> = spec.all_actions().filter(|(at, _)| is_listed(at)).map(|(at, x)| (at, x.per_step)).collect();
    let pairs = listed.iter().flat_map(|one| listed.iter().map(move |other| (one, other)));
    let member = |((one, count), (other, same)): &(&(ActionRef, u32), &(ActionRef, u32))| {
        (one.actor != other.actor && count == same).then_some([*one, *other])
    };
    for at in pairs.filter_map(|pair| member(&pair)).next().into_iter().flatten() {
        spec.actors[at.actor].actions[at.action as usize].groups = vec![0];
    }
}

/// The theorem of `docs/semantics.md`: if a plan completes one period, it completes any number of steps in any timing.
/// If it gets stuck in one period, it always gets stuck.
#[test]
fn one_period_decides_whether_a_plan_runs() {
    let (mut alive, mut stuck, mut collectives) = (0, 0, 0);
    for seed in 0..1500 {
        let mut spec = unlimited(seed);
        let mut rng = SplitMix64(seed);
        // Draws random numbers of slots, most of them too small.
        for register in spec.registers.values_mut() {
            register.slots = (1 + rng.below(4) as u32).max(register.initial);
            if rng.below(2) == 0 {
                let length = register.slots + rng.below(4) as u32;
                let slot = |n: u32| if n < register.slots { n } else { rng.below(register.slots.into()) as u32 };
                register.slot_of = (0..length).map(slot).collect();
            }
        }
        if let Err(error) = check(&spec) {
            let is_known =
                matches!(error, SpecError::Overlap { .. } | SpecError::Lag { .. } | SpecError::Period { .. });
            assert!(is_known, "seed {seed}: {error}");
            continue;
        }
        if rng.below(2) == 0 {
            add_collective(&mut spec);
        }
        let spec = Arc::new(spec);
        let (period, times) = (spec.period_steps() as u32, Timing::uniform(&spec, 1, 0));
        if period > STEPS {
            continue;
        }
        let runs = |options: &SimulationOptions| match simulate(&spec, &times, options) {
            Ok(_) => true,
            Err(SimulationError::Stuck(_)) => false,
            Err(other) => panic!("seed {seed}: {other}"),
        };
        let one = runs(&SimulationOptions::steps(period));
        for steps in [2 * period, 3 * period + 1] {
            for timing in 0..4 {
                assert_eq!(runs(&jittered(timing, steps)), one, "seed {seed}, {steps} steps, timing {timing}");
            }
        }
        *if one { &mut alive } else { &mut stuck } += 1;
        collectives += u32::from(one && spec.all_actions().any(|(_, action)| !action.groups.is_empty()));
    }
    assert!(alive > 150 && stuck > 150, "only {alive} plans complete and {stuck} get stuck");
    assert!(collectives > 10, "only {collectives} of the completing plans have a collective");
}
