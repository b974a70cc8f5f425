//! Summary of a trace: how busy actors were, what they waited for, the critical path, the step time and its prediction.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use super::PREDICTION;
use super::join::{Event, JoinedTrace};
use shardflow_job::text::counted;

const PATH_SHOWN: usize = 6;
const EDGES_SHOWN: usize = 8;

/// The error of a trace that has no step after the first one, and therefore no summary.
#[derive(Debug, thiserror::Error)]
#[error("the trace has no step after the first; trace at least two steps")]
pub struct SummaryError;

/// Use of an actor's time, as shares of the total time of all steps. Idle time between steps does not count.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ActorShare {
    /// Name of the actor.
    pub name: String,
    /// Share of the time in which a firing was in flight.
    pub busy: f64,
    /// Share of the time in which the actor was idle because the program had not sent the inputs or the learning rate.
    pub host: f64,
    /// Share of the time in which the actor was idle because the readers of one of its outputs held all slots.
    pub credit: f64,
    /// Share of the time in which the actor was idle because a written piece had not arrived yet. The piece was delayed
    /// by messages or by thread scheduling.
    pub link: f64,
    /// Share of the time in which the actor was idle because a piece was not yet written. If the trace has a
    /// prediction, this time is limited to the actor's idle time in the simulator's run; the rest is `imbalance`.
    pub bubble: f64,
    /// Share of the time in which the actor was idle because a piece was not yet written, minus `bubble`. The reason is
    /// that firings took longer than their mean time.
    pub imbalance: f64,
    /// The remaining share of the time, such as the handling of the actor's messages.
    pub other: f64,
}

impl ActorShare {
    fn parts(&self) -> [f64; 7] {
        [self.busy, self.host, self.credit, self.link, self.bubble, self.imbalance, self.other]
    }
}

/// Summary of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSummary {
    /// Number of steps without the first one.
    pub steps: u64,
    /// Number of passes over the plan for these steps; a repeated step has several passes.
    pub passes: u64,
    /// Mean time from a pass's first launch to its last end, in seconds.
    pub step_seconds: f64,
    /// The simulator's prediction of `step_seconds`.
    pub predicted_seconds: Option<f64>,
    /// Use of time by actor.
    pub actors: Vec<ActorShare>,
    /// For each wait: `input` or `credit`, the register, and the seconds per step, summed over all actors.
    pub edges: Vec<(String, String, f64)>,
    /// The last step's critical path: seconds of each action on the path. The largest value comes first.
    pub path: Vec<(String, f64)>,
}

struct TraceIndex {
    names: BTreeMap<u32, String>,
    /// Firings in the order of their starts.
    slices: Vec<Event>,
    /// Indices of each actor's slices, in the order of time.
    of_actor: BTreeMap<u32, Vec<usize>>,
    /// Time of each pass's first launch and of its last end.
    spans: BTreeMap<u64, (f64, f64)>,
    /// For each arrow id: the slice in which the arrow starts, and its start time.
    starts: HashMap<String, (usize, f64)>,
    /// For each slice: register and id of each arrow that ends in the slice.
    ends: HashMap<usize, Vec<(String, String)>>,
    /// For each register: slices that read the register, in the order of their starts.
    readers: HashMap<String, Vec<usize>>,
    predicted: Option<(f64, BTreeMap<String, f64>)>,
}

impl TraceSummary {
    /// Summarizes the trace of all processes of a run, or of some of them.
    pub fn of(trace: JoinedTrace) -> Result<Self, SummaryError> {
        let trace = TraceIndex::new(trace.events);
        // The first pass is a warm-up.
        let spans: Vec<&(f64, f64)> = trace.spans.range(1..).map(|(_, span)| span).collect();
        let Some((&last, _)) = trace.spans.range(1..).next_back() else { return Err(SummaryError) };
        let all_us: f64 = spans.iter().map(|(start, end)| end - start).sum();
        let passes = spans.len() as f64;
        let counted = trace.slices.iter().filter(|slice| slice.args.pass > 0);
        let steps_of: BTreeSet<u64> = counted.map(|slice| slice.args.step).collect();
        let mut edges: BTreeMap<(&str, &str), f64> = BTreeMap::new();
        for slice in trace.slices.iter().filter(|slice| slice.args.pass > 0 && !slice.args.register.is_empty()) {
            *edges.entry((&slice.args.cause, &slice.args.register)).or_default() +=
                slice.args.waited_us / passes * 1e-6;
        }
        let edge = |((cause, register), s): ((&str, &str), f64)| (cause.to_owned(), register.to_owned(), s);
        let mut edges: Vec<_> = edges.into_iter().map(edge).collect();
        edges.sort_by(|a, b| b.2.total_cmp(&a.2));
        Ok(Self {
            steps: steps_of.len() as u64,
            passes: spans.len() as u64,
            step_seconds: all_us / passes * 1e-6,
            predicted_seconds: trace.predicted.as_ref().map(|(us, _)| us * 1e-6),
            actors: trace.names.keys().map(|actor| trace.share(*actor, all_us, passes)).collect(),
            edges,
            path: trace.critical_path(last),
        })
    }
}

impl TraceIndex {
    fn new(events: Vec<Event>) -> Self {
        let (mut names, mut slices, mut predicted) = (BTreeMap::new(), Vec::new(), None);
        let (mut arrows_out, mut arrows_in) = (Vec::new(), Vec::new());
        for event in events {
            match event.ph.as_str() {
                "M" if event.name == PREDICTION => predicted = event.args.step_us.zip(event.args.idle_us),
                "M" if event.name == "thread_name" => drop(names.insert(event.tid, event.args.name)),
                "X" => slices.push(event),
                "s" => arrows_out.push((event.id, event.tid, event.ts)),
                "f" => arrows_in.push((event.id, event.tid, event.ts, event.name)),
                _ => {}
            }
        }
        slices.sort_by(|a, b| a.ts.total_cmp(&b.ts));
        let mut of_actor: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        let mut spans: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
        for (index, slice) in slices.iter().enumerate() {
            of_actor.entry(slice.tid).or_default().push(index);
            let span = spans.entry(slice.args.pass).or_insert((slice.ts, slice.end()));
            *span = (span.0.min(slice.ts), span.1.max(slice.end()));
        }
        let (starts, ends, readers) = Default::default();
        let mut trace = Self { names, slices, of_actor, spans, starts, ends, readers, predicted };
        for (id, tid, ts) in arrows_out {
            if let Some(slice) = trace.slice_at(tid, ts) {
                trace.starts.insert(id, (slice, ts));
            }
        }
        for (id, tid, ts, register) in arrows_in {
            if let Some(slice) = trace.slice_at(tid, ts) {
                trace.readers.entry(register.clone()).or_default().push(slice);
                trace.ends.entry(slice).or_default().push((register, id));
            }
        }
        trace
    }

    /// The last slice of an actor that begins at or before `ts`.
    fn slice_at(&self, actor: u32, ts: f64) -> Option<usize> {
        let own = self.of_actor.get(&actor)?;
        // Differences below a nanosecond are rounding errors.
        let count = own.partition_point(|index| self.slices[*index].ts <= ts + 1e-4);
        count.checked_sub(1).map(|place| own[place])
    }

    /// If the slice waited for a piece, returns the slice that wrote the piece, and the time of the write.
    fn writer_of(&self, index: usize) -> Option<(usize, f64)> {
        let register = &self.slices[index].args.register;
        let (_, id) = self.ends.get(&index)?.iter().find(|(name, _)| name == register)?;
        self.starts.get(id).copied()
    }

    fn share(&self, actor: u32, all_us: f64, passes: f64) -> ActorShare {
        let name = self.names[&actor].clone();
        let mut share = ActorShare { name, ..ActorShare::default() };
        let mut unwritten = 0.0;
        for &index in self.of_actor.get(&actor).into_iter().flatten() {
            let slice = &self.slices[index];
            let Some((begin, _)) = self.spans.get(&slice.args.pass).filter(|_| slice.args.pass > 0) else { continue };
            share.busy += slice.end() - slice.ts;
            // Waits between steps belong to no step.
            let waited = slice.args.waited_us.min((slice.ts - begin).max(0.0));
            match slice.args.cause.as_str() {
                "host" => share.host += waited,
                "credit" => share.credit += waited,
                "input" => {
                    let written = self.writer_of(index).map_or(slice.ts, |(_, at)| at);
                    let link = (slice.ts - written).clamp(0.0, waited);
                    share.link += link;
                    unwritten += waited - link;
                }
                _ => {}
            }
        }
        let predicted = self.predicted.as_ref().and_then(|(_, idle)| idle.get(&share.name));
        share.bubble = predicted.map_or(unwritten, |idle| unwritten.min(idle * passes));
        share.imbalance = unwritten - share.bubble;
        share.other = (all_us - share.parts().iter().sum::<f64>()).max(0.0);
        let [busy, host, credit, link, bubble, imbalance, other] = share.parts().map(|us| us / all_us);
        ActorShare { name: share.name, busy, host, credit, link, bubble, imbalance, other }
    }

    /// Returns the seconds of each action on the critical path. The path runs from the step's last firing back to the
    /// firing that enabled it, and so on.
    fn critical_path(&self, pass: u64) -> Vec<(String, f64)> {
        let of_step = (0..self.slices.len()).filter(|index| self.slices[*index].args.pass == pass);
        let mut at = self.last_ended(of_step, f64::INFINITY);
        let mut spent: BTreeMap<String, f64> = BTreeMap::new();
        let mut until = f64::INFINITY;
        while let Some(index) = at {
            let slice = &self.slices[index];
            let name = format!("{} {}", self.names.get(&slice.tid).map_or("", String::as_str), slice.name);
            *spent.entry(name).or_default() += (slice.end().min(until) - slice.ts).max(0.0) * 1e-6;
            until = slice.ts;
            // Each predecessor begins earlier, so the loop ends.
            let is_earlier = |predecessor: &usize| {
                let predecessor = &self.slices[*predecessor];
                predecessor.args.pass == pass && predecessor.ts < slice.ts
            };
            at = self.predecessor(index).filter(is_earlier);
        }
        let mut path: Vec<_> = spent.into_iter().collect();
        path.sort_by(|a, b| b.1.total_cmp(&a.1));
        path
    }

    fn predecessor(&self, index: usize) -> Option<usize> {
        let slice = &self.slices[index];
        match slice.args.cause.as_str() {
            "input" => self.writer_of(index).map(|(writer, _)| writer),
            // The reader whose firing ended last before this slice began has released the slot.
            "credit" => self.last_ended(self.readers.get(&slice.args.register)?.iter().copied(), slice.ts),
            // The host sends inputs after it has received the last result.
            "host" => self.last_ended(0..index, slice.ts),
            "own" => {
                let own = &self.of_actor[&slice.tid];
                let place = own.binary_search(&index).ok()?;
                place.checked_sub(1).map(|before| own[before])
            }
            _ => None,
        }
    }

    fn last_ended(&self, slices: impl Iterator<Item = usize>, until: f64) -> Option<usize> {
        let end = |slice: &usize| self.slices[*slice].end();
        slices.filter(|slice| end(slice) <= until).max_by(|a, b| end(a).total_cmp(&end(b)))
    }
}

impl fmt::Display for TraceSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |seconds: f64| seconds * 1e3;
        write!(f, "{} of {:.3} ms", counted(self.steps, "step"), ms(self.step_seconds))?;
        if self.passes > self.steps {
            write!(f, ", {} repeated", self.passes - self.steps)?;
        }
        match self.predicted_seconds {
            Some(predicted) => {
                let ms = ms(predicted);
                writeln!(f, "; {ms:.3} ms if each firing took its mean time and only the plan limited the step")?;
            }
            None => writeln!(f)?,
        }
        writeln!(f, "\n{:<28} busy  host  credit  link  bubble  imbalance  other (% of a step)", "actor")?;
        for a in &self.actors {
            let [busy, host, credit, link, bubble, imbalance, other] = a.parts().map(|part| part * 100.0);
            write!(f, "{:<28} {busy:4.1}  {host:4.1}  {credit:6.1}  {link:4.1}", a.name)?;
            writeln!(f, "  {bubble:6.1}  {imbalance:9.1}  {other:5.1}")?;
        }
        writeln!(f, "\nlongest waits per step")?;
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
