//! What a trace says, on one screen: how busy each actor was, what it waited for, the way through firings that a step could not have
//! been shorter than, and a step beside the simulator's.
//!
//! Time that an actor stands idle within a step is put down to
//!
//! - **host**: the program had not given the step's inputs, or its learning rate;
//! - **credit**: the readers of one of its outputs held all slots;
//! - **link**: a piece was written and had not come: messages, scheduling;
//! - **bubble**: a piece was not written yet, and would not have been in the simulator's run either;
//! - **imbalance**: a piece was not written yet, because firings took longer than their mean;
//! - **other**: what is left, such as the actor's own messages.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use super::PREDICTION;
use super::join::{Event, JoinedTrace};
use crate::text::counted;

/// Actions of the critical path that are shown.
const PATH_SHOWN: usize = 6;
/// Registers that are shown.
const EDGES_SHOWN: usize = 8;

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum SummaryError {
    /// It has no whole step.
    #[error("it holds no step but the first; trace at least two")]
    NoStep,
}

/// One firing. Times are microseconds.
#[derive(Clone, Debug)]
struct Slice {
    actor: u32,
    action: String,
    /// Over the plan.
    pass: u64,
    step: u64,
    start: f64,
    end: f64,
    waited: f64,
    cause: String,
    register: String,
}

/// Where an actor's time went, as parts of the time of whole steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActorShare {
    /// Its name.
    pub name: String,
    /// With a firing in flight.
    pub busy: f64,
    /// Idle for the host.
    pub host: f64,
    /// Idle for slots.
    pub credit: f64,
    /// Idle for pieces that were written.
    pub link: f64,
    /// Idle for pieces that were not, as the plan has it.
    pub bubble: f64,
    /// Idle for pieces that were late.
    pub imbalance: f64,
    /// All else.
    pub other: f64,
}

/// What a trace says.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSummary {
    /// Steps in it, the first one left out.
    pub steps: u64,
    /// Passes over the plan for them: those that are done again have several.
    pub passes: u64,
    /// Mean time from a pass's first launch to its last end, seconds.
    pub step_seconds: f64,
    /// The simulator's.
    pub predicted_seconds: Option<f64>,
    /// By actor.
    pub actors: Vec<ActorShare>,
    /// What was waited for: `input` or `credit`, the register, and for how long in a step over all actors, seconds.
    pub edges: Vec<(String, String, f64)>,
    /// The last step's critical path: each action's part of it, seconds, the largest first.
    pub path: Vec<(String, f64)>,
}

struct Reading {
    names: BTreeMap<u32, String>,
    /// In order of their starts.
    slices: Vec<Slice>,
    /// By actor, in order of time.
    of_actor: BTreeMap<u32, Vec<usize>>,
    /// By pass: from its first launch to its last end.
    spans: BTreeMap<u64, (f64, f64)>,
    /// By the arrow's id: the slice that it starts in, and when.
    starts: HashMap<String, (usize, f64)>,
    /// By slice: the arrows that end in it, by register.
    ends: HashMap<usize, Vec<(String, String)>>,
    /// By register: slices that read it, in order of their starts.
    readers: HashMap<String, Vec<usize>>,
    predicted: Option<(f64, BTreeMap<String, f64>)>,
}

impl TraceSummary {
    /// Of the files of all processes of a run, or of some.
    ///
    /// # Errors
    /// [`SummaryError`].
    pub fn of(trace: JoinedTrace) -> Result<Self, SummaryError> {
        let reading = Reading::new(trace.events);
        // The first pass warms up.
        let spans: Vec<&(f64, f64)> = reading.spans.range(1..).map(|(_, span)| span).collect();
        let Some((&last, _)) = reading.spans.range(1..).next_back() else { return Err(SummaryError::NoStep) };
        let all_us: f64 = spans.iter().map(|(start, end)| end - start).sum();
        let passes = spans.len() as f64;
        let counted = reading.slices.iter().filter(|slice| slice.pass > 0);
        let steps_of: BTreeSet<u64> = counted.map(|slice| slice.step).collect();
        let mut edges: BTreeMap<(&str, &str), f64> = BTreeMap::new();
        for slice in reading.slices.iter().filter(|slice| slice.pass > 0 && !slice.register.is_empty()) {
            *edges.entry((&slice.cause, &slice.register)).or_default() += slice.waited / passes * 1e-6;
        }
        let edge = |((cause, register), s): ((&str, &str), f64)| (cause.to_owned(), register.to_owned(), s);
        let mut edges: Vec<_> = edges.into_iter().map(edge).collect();
        edges.sort_by(|a, b| b.2.total_cmp(&a.2));
        Ok(Self {
            steps: steps_of.len() as u64,
            passes: spans.len() as u64,
            step_seconds: all_us / passes * 1e-6,
            predicted_seconds: reading.predicted.as_ref().map(|(us, _)| us * 1e-6),
            actors: reading.names.keys().map(|actor| reading.share(*actor, all_us, passes)).collect(),
            edges,
            path: reading.critical_path(last),
        })
    }
}

impl Reading {
    fn new(events: Vec<Event>) -> Self {
        let (mut names, mut slices, mut predicted) = (BTreeMap::new(), Vec::new(), None);
        let (mut arrows_out, mut arrows_in) = (Vec::new(), Vec::new());
        for event in events {
            let Event { name, ph, tid, ts, dur, id, args } = event;
            match ph.as_str() {
                "M" if name == PREDICTION => predicted = args.step_us.zip(args.idle_us),
                "M" if name == "thread_name" => drop(names.insert(tid, args.name.unwrap_or_default())),
                "X" => slices.push(Slice {
                    actor: tid,
                    action: name,
                    pass: args.pass.unwrap_or(0),
                    step: args.step.unwrap_or(0),
                    start: ts,
                    end: ts + dur,
                    waited: args.waited_us.unwrap_or(0.0),
                    cause: args.cause.unwrap_or_default(),
                    register: args.register.unwrap_or_default(),
                }),
                "s" => arrows_out.push((id, tid, ts)),
                "f" => arrows_in.push((id, tid, ts, name)),
                _ => {}
            }
        }
        slices.sort_by(|a, b| a.start.total_cmp(&b.start));
        let mut of_actor: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        let mut spans: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
        for (index, slice) in slices.iter().enumerate() {
            of_actor.entry(slice.actor).or_default().push(index);
            let span = spans.entry(slice.pass).or_insert((slice.start, slice.end));
            *span = (span.0.min(slice.start), span.1.max(slice.end));
        }
        let (starts, ends, readers) = Default::default();
        let mut reading = Self { names, slices, of_actor, spans, starts, ends, readers, predicted };
        for (id, tid, ts) in arrows_out {
            if let Some(slice) = reading.at(tid, ts) {
                reading.starts.insert(id, (slice, ts));
            }
        }
        for (id, tid, ts, register) in arrows_in {
            if let Some(slice) = reading.at(tid, ts) {
                reading.readers.entry(register.clone()).or_default().push(slice);
                reading.ends.entry(slice).or_default().push((register, id));
            }
        }
        reading
    }

    /// The last slice of an actor that had begun by then.
    fn at(&self, actor: u32, ts: f64) -> Option<usize> {
        let own = self.of_actor.get(&actor)?;
        // Less than a nanosecond is rounding.
        let behind = own.partition_point(|index| self.slices[*index].start <= ts + 1e-4);
        behind.checked_sub(1).map(|place| own[place])
    }

    /// The slice that wrote the piece for which a slice waited last, and when.
    fn written(&self, index: usize) -> Option<(usize, f64)> {
        let register = &self.slices[index].register;
        let (_, id) = self.ends.get(&index)?.iter().find(|(name, _)| name == register)?;
        self.starts.get(id).copied()
    }

    fn share(&self, actor: u32, all_us: f64, passes: f64) -> ActorShare {
        let name = self.names[&actor].clone();
        let mut share = ActorShare { name, ..ActorShare::default() };
        let mut unwritten = 0.0;
        for &index in self.of_actor.get(&actor).into_iter().flatten() {
            let slice = &self.slices[index];
            let Some((begin, _)) = self.spans.get(&slice.pass).filter(|_| slice.pass > 0) else { continue };
            share.busy += slice.end - slice.start;
            // What an actor waits for between steps is of no step.
            let waited = slice.waited.min((slice.start - begin).max(0.0));
            match slice.cause.as_str() {
                "host" => share.host += waited,
                "credit" => share.credit += waited,
                "input" => {
                    let written = self.written(index).map_or(slice.start, |(_, at)| at);
                    let link = (slice.start - written).clamp(0.0, waited);
                    share.link += link;
                    unwritten += waited - link;
                }
                _ => {}
            }
        }
        let predicted = self.predicted.as_ref().and_then(|(_, idle)| idle.get(&share.name));
        share.bubble = predicted.map_or(unwritten, |idle| unwritten.min(idle * passes));
        share.imbalance = unwritten - share.bubble;
        let known = [share.busy, share.host, share.credit, share.link, share.bubble, share.imbalance];
        share.other = (all_us - known.iter().sum::<f64>()).max(0.0);
        let ActorShare { busy, host, credit, link, bubble, imbalance, other, .. } = &mut share;
        for part in [busy, host, credit, link, bubble, imbalance, other] {
            *part /= all_us;
        }
        share
    }

    /// Back from a step's last firing to its first, each time to what let the firing begin; with the time of each action.
    fn critical_path(&self, pass: u64) -> Vec<(String, f64)> {
        let of_step = (0..self.slices.len()).filter(|index| self.slices[*index].pass == pass);
        let mut at = of_step.max_by(|a, b| self.slices[*a].end.total_cmp(&self.slices[*b].end));
        let mut spent: BTreeMap<String, f64> = BTreeMap::new();
        let mut until = f64::INFINITY;
        while let Some(index) = at {
            let slice = &self.slices[index];
            let name = format!("{} {}", self.names.get(&slice.actor).map_or("", String::as_str), slice.action);
            *spent.entry(name).or_default() += (slice.end.min(until) - slice.start).max(0.0) * 1e-6;
            until = slice.start;
            // Each goes further back, so this ends.
            let earlier = |before: &usize| {
                let before = &self.slices[*before];
                before.pass == pass && before.start < slice.start
            };
            at = self.before(index).filter(earlier);
        }
        let mut path: Vec<_> = spent.into_iter().collect();
        path.sort_by(|a, b| b.1.total_cmp(&a.1));
        path
    }

    /// What let a slice begin.
    fn before(&self, index: usize) -> Option<usize> {
        let slice = &self.slices[index];
        match slice.cause.as_str() {
            "input" => self.written(index).map(|(writer, _)| writer),
            "credit" => {
                // The reader whose firing ended last before this one began gave the slot back.
                self.last_ended(self.readers.get(&slice.register)?.iter().copied(), slice.start)
            }
            // The host gives when it has seen what came last of all.
            "host" => self.last_ended(0..index, slice.start),
            "own" => {
                let own = &self.of_actor[&slice.actor];
                let place = own.binary_search(&index).ok()?;
                place.checked_sub(1).map(|before| own[before])
            }
            _ => None,
        }
    }

    /// Of these slices, the one that ended last by then.
    fn last_ended(&self, slices: impl Iterator<Item = usize>, by: f64) -> Option<usize> {
        let ended = slices.filter(|slice| self.slices[*slice].end <= by);
        ended.max_by(|a, b| self.slices[*a].end.total_cmp(&self.slices[*b].end))
    }
}

impl fmt::Display for TraceSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |seconds: f64| seconds * 1e3;
        write!(f, "{} of {:.3} ms", counted(self.steps, "step"), ms(self.step_seconds))?;
        if self.passes > self.steps {
            write!(f, ", {} done again", self.passes - self.steps)?;
        }
        match self.predicted_seconds {
            Some(predicted) => {
                let ms = ms(predicted);
                writeln!(f, "; {ms:.3} ms if each firing took its mean and nothing but the plan held it up")?;
            }
            None => writeln!(f)?,
        }
        writeln!(f, "\n{:<28} busy  host  credit  link  bubble  imbalance  other (% of a step)", "actor")?;
        for a in &self.actors {
            let parts = [a.busy, a.host, a.credit, a.link, a.bubble, a.imbalance, a.other].map(|part| part * 100.0);
            let [busy, host, credit, link, bubble, imbalance, other] = parts;
            write!(f, "{:<28} {busy:4.1}  {host:4.1}  {credit:6.1}  {link:4.1}", a.name)?;
            writeln!(f, "  {bubble:6.1}  {imbalance:9.1}  {other:5.1}")?;
        }
        writeln!(f, "\nwaited for most, in a step")?;
        for (cause, register, seconds) in self.edges.iter().take(EDGES_SHOWN) {
            writeln!(f, "  {:9.3} ms  {cause} of '{register}'", ms(*seconds))?;
        }
        writeln!(f, "\ncritical path of the last step")?;
        for (action, seconds) in self.path.iter().take(PATH_SHOWN) {
            writeln!(f, "  {:9.3} ms  {action}", ms(*seconds))?;
        }
        Ok(())
    }
}
