//! Puts submissions on a CUDA stream: launches as their lowered steps, collectives by the engine, signals and ends as events
//! that the poller tells of. Whoever calls says whether it may block; what would block otherwise is handed back.
//!
//! - ISSUE-1: memory that a step names lies on the stream's own GPU, in bounds: `bound` has checked the launch's buffers,
//!   and here each is checked to be the GPU's. A submission keeps its arenas until its end is told.
//! - ISSUE-2: issuing a prepared program loads, compiles and allocates nothing: the driver may do that only once the GPU's
//!   queues have run dry, and a collective in one of them may be waiting for the very thread that asks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::blas::{Addresses, Plans};
use super::cudnn::Flashes;
use super::engine::{Enqueued, Wait};
use super::in_flight::InFlight;
use super::issue_order::IssueTicket;
use super::lower;
use super::lowered::{Kind, Lowered, Pair, Parameter, Ready, address};
use super::poller::{Then, Track};
use super::raw_stream::{PARAMETERS_MAX, RawStream};
use super::record::Records;
use super::staged::{Staged, device_address};
use super::step::{Epilogue, Operand, Place, Product};
use super::strided_copy::{self, StridedRegion, fetch_region};
use crate::bound::Bound;
use crate::collective::{AbortStatus, Collective, CollectiveCall};
use crate::cpu::stream::{panic_message, trace_launch};
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::{Base, View};
use crate::metrics::StreamMetrics;
use crate::op::{Buffer, Launch, Op, Program};
use crate::region::check_inside;
use crate::stream::{Notification, Submission};
use crate::tensor::Region;

/// Where bases are taken to lie while they are not known: an address, and as aligned as arenas are.
const ANY_BASE: u64 = 1 << 20;

/// What a stream is told to do.
pub(crate) enum Command {
    Run(Run),
    Record(Event),
    Wait(Event),
    CheckFinite(bool),
}

/// A submission that is being issued.
pub(crate) struct Run {
    ticket: Arc<InFlight>,
    lowered: Arc<Lowered>,
    bases: Vec<Base>,
    /// Launches that are on the stream.
    done: usize,
    /// Signals that are on the stream.
    signals: usize,
    /// The collective that the next launch is, under way.
    wait: Option<Wait>,
    /// Until its last collective is on the stream.
    turn: Option<IssueTicket>,
    outcomes: Arc<[AbortStatus]>,
    /// Whether a kernel on the stream writes the stream's record.
    uses_record: bool,
    /// What follows from one fault is of no interest.
    found: bool,
}

impl Command {
    /// A submission.
    pub(crate) fn run(
        submission: Submission,
        lowered: Arc<Lowered>,
        outcomes: &Arc<[AbortStatus]>,
        turn: Option<IssueTicket>,
    ) -> Self {
        let Submission { program, bases, repeat, notify } = submission;
        let outcomes = if lowered.last_call.is_some() { outcomes.clone() } else { Arc::default() };
        let ticket = Arc::new(InFlight::new(program, repeat, notify, outcomes.clone()));
        Command::Run(Run {
            ticket,
            lowered,
            bases,
            done: 0,
            signals: 0,
            wait: None,
            turn,
            outcomes,
            uses_record: false,
            found: false,
        })
    }
}

/// See the module.
pub(crate) struct Issuer {
    lane: Arc<RawStream>,
    track: Arc<Track>,
    engine: Arc<dyn Collective>,
    records: Records,
    plans: Option<Plans>,
    flashes: Option<Flashes>,
    staged: Staged,
    metrics: StreamMetrics,
    check: bool,
}

impl Issuer {
    pub(crate) fn new(
        lane: &Arc<RawStream>,
        track: &Arc<Track>,
        engine: Arc<dyn Collective>,
        records: Records,
        metrics: StreamMetrics,
    ) -> Self {
        Self {
            lane: lane.clone(),
            track: track.clone(),
            engine,
            records,
            plans: None,
            flashes: None,
            staged: Staged::new(lane, track),
            metrics,
            check: false,
        }
    }

    /// Has all made that the program's launches use beside its own memory, so that no submission makes anything (ISSUE-2).
    pub(crate) fn prepare(&mut self, program: &Program, lowered: &Lowered) -> Result<(), KernelError> {
        let lane = self.lane.clone();
        if lane.gpu().spins().is_some() {
            lane.gpu().modules().function("spin", 0)?;
        }
        for (index, launch) in program.launches.iter().enumerate() {
            if self.blocks(launch) {
                self.staged.prepare(launch)?;
            } else if matches!(launch.op, Op::Collective(_)) {
                strided_copy::prepare(lane.gpu())?;
            }
            let kind = catch_unwind(AssertUnwindSafe(|| {
                let second = program.launches.get(index + 1);
                let pair = second.and_then(|second| lowered.pair(index, [launch, second], lane.gpu()));
                (pair, lowered.kind(index, launch, lane.gpu()))
            }));
            let Ok((pair, kind)) = kind else { continue };
            if let Some(Pair { reads, writes, steps, uses_record }) = pair {
                self.prepare_steps(steps, *uses_record, (reads, writes))?;
            }
            match kind {
                Ok(Kind::Steps { steps, uses_record }) => {
                    self.prepare_steps(steps, *uses_record, (&launch.reads, &launch.writes))?;
                }
                Ok(Kind::Collective | Kind::Custom) => {}
                // What cannot be lowered fails when it is launched, with its buffers looked at first.
                Err(KernelError::Arguments { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn prepare_steps(
        &mut self,
        steps: &[Ready],
        uses_record: bool,
        (reads, writes): (&[Buffer], &[Buffer]),
    ) -> Result<(), KernelError> {
        let lane = self.lane.clone();
        if uses_record {
            self.records.prepare(lane.gpu())?;
        }
        // Of an address only the alignment counts here, and bases are as aligned as a library asks for.
        let at = |place: Place| {
            let buffer = match place.operand {
                Operand::Read(i) => reads.get(i),
                Operand::Write(i) => writes.get(i),
                Operand::Workspace => None,
            };
            Ok(ANY_BASE + (buffer.map_or(0, |buffer| buffer.offset) + place.offset_bytes) as u64)
        };
        for step in steps {
            match step {
                Ready::Product(product) => {
                    let addresses = addresses(product, &at, ANY_BASE)?;
                    self.plans()?.prepare(product, &addresses, lane.place())?;
                }
                Ready::Flash { flash, own } => {
                    self.flashes().prepare(flash, lane.place());
                    self.prepare_steps(own, uses_record, (reads, writes))?;
                }
                Ready::Kernel { .. } | Ready::Copy { .. } | Ready::Fill { .. } => {}
            }
        }
        Ok(())
    }

    /// Keeps the stream's own memory until the stream has come past all that is on it.
    pub(crate) fn let_go(&self) {
        let context = self.lane.gpu().context();
        let recorded = if context.bind_to_drop() { self.lane.record().ok() } else { None };
        // Without one the context is lost, and nothing is given back.
        let Some(recorded) = recorded else { return };
        // The last of them keeps the GPU, and its poller with it.
        for memory in self.staged.memory().into_iter().chain([self.records.memory()]) {
            let then = Then::LetGo(memory.clone(), Event::default());
            self.lane.gpu().poller().push(&self.track, recorded.clone(), then);
        }
    }

    fn flashes(&mut self) -> &mut Flashes {
        let lane = &self.lane;
        let new = || Flashes::new(lane.gpu(), lane.stream(), lane.place());
        self.flashes.get_or_insert_with(new)
    }

    fn plans(&mut self) -> Result<&mut Plans, KernelError> {
        let lane = &self.lane;
        match &mut self.plans {
            Some(plans) => Ok(plans),
            none => Ok(none.insert(Plans::new(lane.gpu())?)),
        }
    }

    /// Does a command, or gives back what is left of it when that would block and must not.
    pub(crate) fn go(&mut self, command: Command, may_block: bool) -> Option<Command> {
        match command {
            Command::CheckFinite(on) => self.check = on,
            Command::Record(event) => self.record(event),
            Command::Wait(event) => {
                if event.query() {
                    return None;
                }
                match event.recorded() {
                    // A failure is one of the context, which the next submission meets.
                    Some(recorded) => drop(self.lane.wait(recorded)),
                    None if may_block => event.synchronize(),
                    None => return Some(Command::Wait(event)),
                }
            }
            Command::Run(mut run) => match self.advance(&mut run, may_block) {
                Ok(true) => self.end(run, Ok(())),
                Ok(false) => return Some(Command::Run(run)),
                Err(error) => self.end(run, Err(error)),
            },
        }
        None
    }

    fn record(&mut self, event: Event) {
        match self.lane.record() {
            Ok(recorded) => {
                event.record(recorded.clone());
                self.lane.gpu().poller().push(&self.track, recorded, Then::Set(event));
            }
            // A stream that has failed has done all it ever will.
            Err(_) => event.set(),
        }
    }

    /// Issues what is left of a program; false when it would block and must not.
    fn advance(&mut self, run: &mut Run, may_block: bool) -> Result<bool, KernelError> {
        self.lane.gpu().context().check_alive()?;
        let ticket = run.ticket.clone();
        let program = &ticket.program;
        loop {
            self.signal(run)?;
            let Some(launch) = program.launches.get(run.done) else { return Ok(true) };
            if let Some(wait) = run.wait.take() {
                if !may_block {
                    run.wait = Some(wait);
                    return Ok(false);
                }
                wait()?;
                self.lane.end_call()?;
            } else {
                if let Some(turn) = run.turn.as_ref().filter(|_| matches!(launch.op, Op::Collective(_))) {
                    if !may_block && !turn.has_come() {
                        return Ok(false);
                    }
                    turn.wait(&run.outcomes)?;
                }
                trace_launch(program, run.done);
                if !may_block && (self.check || self.blocks(launch)) {
                    return Ok(false);
                }
                let launched = catch_unwind(AssertUnwindSafe(|| self.next(run)));
                let launched = launched.unwrap_or_else(|panic| {
                    let (index, program) = (run.done, program.name.clone());
                    let (launch, message) = (format!("{index} ({})", launch.op.name()), panic_message(&*panic));
                    Err(KernelError::Panic { launch, program, message })
                });
                let (count, wait) = launched?;
                if wait.is_some() {
                    run.wait = wait;
                    continue;
                }
                // The last of them is counted below.
                run.done += count - 1;
            }
            if self.check && !run.found {
                self.look(launch, run)?;
            }
            if run.lowered.last_call == Some(run.done) {
                run.turn = None;
            }
            run.done += 1;
        }
    }

    /// Has the poller tell the signals that stand before the next launch.
    fn signal(&mut self, run: &mut Run) -> Result<(), KernelError> {
        let mut event = None;
        while let Some((_, tag)) = run.ticket.program.signals.get(run.signals).filter(|(at, _)| *at <= run.done) {
            let recorded = match &event {
                Some(recorded) => Arc::clone(recorded),
                None => event.insert(self.lane.record()?).clone(),
            };
            self.lane.gpu().poller().push(&self.track, recorded, Then::Signal(run.ticket.clone(), *tag));
            run.signals += 1;
        }
        Ok(())
    }

    fn end(&mut self, run: Run, result: Result<(), KernelError>) {
        let Run { ticket, bases, uses_record, .. } = run;
        let fetched = if uses_record { self.fetch_record(&ticket) } else { Ok(()) };
        match fetched.and_then(|()| self.lane.record()) {
            Ok(recorded) => self.lane.gpu().poller().push(&self.track, recorded, Then::End(ticket, bases, result)),
            Err(error) => {
                drop(bases);
                ticket.end(Err(result.err().unwrap_or(error)));
            }
        }
    }

    fn fetch_record(&mut self, ticket: &InFlight) -> Result<(), KernelError> {
        ticket.keep_record(self.records.fetch(self.lane.gpu(), self.lane.stream(), self.lane.place())?);
        Ok(())
    }

    /// Whether a launch needs the host: a custom kernel, or a collective of an engine that does not put it on the stream.
    fn blocks(&self, launch: &Launch) -> bool {
        match &launch.op {
            Op::Collective(call) => self.engine.on_device(call).is_none(),
            Op::Custom(_) => true,
            _ => false,
        }
    }

    /// Issues the next launch, or the next two where one kernel does both; returns how many.
    fn next(&mut self, run: &mut Run) -> Result<(usize, Option<Wait>), KernelError> {
        let ticket = run.ticket.clone();
        let launches = &ticket.program.launches;
        // What each launch has written is looked at behind it, which a pair does not let; nor a signal between them.
        let between = run.done + 1;
        let signalled = || ticket.program.signals.iter().any(|&(at, _)| at == between);
        if let Some(second) = launches.get(between)
            && !self.check
            && !signalled()
            && self.pair([&launches[run.done], second], run)?
        {
            return Ok((2, None));
        }
        Ok((1, self.launch(&launches[run.done], run)?))
    }

    /// Issues two launches at once; false when they are to be issued one by one: no kernel does both, memory does not let
    /// it, or there is an error, which is that of a launch.
    fn pair(&mut self, launches: [&Launch; 2], run: &mut Run) -> Result<bool, KernelError> {
        let lowered = run.lowered.clone();
        if lowered.is_no_pair(run.done, launches) {
            return Ok(false);
        }
        for launch in launches {
            // None that has a workspace is in a pair.
            let fits = self.bind(launch, &run.bases).and_then(|bound| check_in_place(launch, &bound));
            if fits.is_err() {
                return Ok(false);
            }
        }
        let Some(pair) = lowered.pair(run.done, launches, self.lane.gpu()) else { return Ok(false) };
        let Some(bound) = pair.bind(launches[1].op.name(), &run.bases)? else { return Ok(false) };
        trace_launch(&run.ticket.program, run.done + 1);
        run.uses_record |= pair.uses_record;
        pair.steps.iter().try_for_each(|step| self.step(step, &bound, run.done + 1))?;
        Ok(true)
    }

    /// A launch's buffers, all of them on this GPU.
    fn bind<'a>(&self, launch: &'a Launch, bases: &'a [Base]) -> Result<Bound<'a>, KernelError> {
        let bound = Bound::resolve(launch, bases, |_| 0)?;
        bound.all().try_for_each(|view| self.check_on_this_gpu(bound.name, view))?;
        Ok(bound)
    }

    fn launch(&mut self, launch: &Launch, run: &mut Run) -> Result<Option<Wait>, KernelError> {
        let bound = Bound::resolve(launch, &run.bases, |_| lower::workspace_bytes(launch))?;
        if let ([read], Op::CopyRegion { src, dst }) = (&bound.reads[..], &launch.op)
            && self.check_on_this_gpu(bound.name, read).is_err()
        {
            self.pull(read, src, &bound.writes[0], dst, launch.accumulate)?;
            return Ok(None);
        }
        bound.all().try_for_each(|view| self.check_on_this_gpu(bound.name, view))?;
        let kind = run.lowered.kind(run.done, launch, self.lane.gpu())?;
        match (kind, &launch.op) {
            (Kind::Steps { steps, uses_record }, _) => {
                check_in_place(launch, &bound)?;
                run.uses_record |= uses_record;
                self.lane.gpu().attentions().launched(&launch.op);
                steps.iter().try_for_each(|step| self.step(step, &bound, run.done))?;
                Ok(None)
            }
            (_, Op::Collective(call)) => self.collective(call, &bound),
            (_, Op::Custom(kernel)) => {
                let accumulate = launch.accumulate && run.ticket.repeat;
                self.staged.custom(&bound, &**kernel, accumulate).map(|()| None)
            }
            _ => Ok(None),
        }
    }

    /// ISSUE-1.
    fn check_on_this_gpu(&self, name: &str, view: &View<'_>) -> Result<(), KernelError> {
        let gpu = self.lane.gpu();
        let got = match view.arena().device_memory() {
            Some(memory) if Arc::ptr_eq(memory.gpu().context(), gpu.context()) => return Ok(()),
            Some(memory) => format!("memory of {}", memory.place()),
            None => "memory of the host".to_owned(),
        };
        Err(KernelError::arguments(name, "memory", format!("memory of {}", gpu.place()), got))
    }

    /// Fetches a box from another GPU's memory.
    fn pull(
        &self,
        read: &View<'_>,
        src: &Region,
        write: &View<'_>,
        dst: &Region,
        accumulate: bool,
    ) -> Result<(), KernelError> {
        let name = "copy_region";
        let source = read.arena().device_memory().map(|memory| memory.gpu().context().clone());
        let (Some(source), false) = (source, accumulate || read.dtype() != write.dtype()) else {
            let got = format!("{:?} to {:?}, accumulate {accumulate}", read.dtype(), write.dtype());
            return Err(KernelError::arguments(name, "read 0", "a GPU's memory, to be copied as it is", got));
        };
        self.check_on_this_gpu(name, write)?;
        check_inside(name, "src", src, read.shape())?;
        check_inside(name, "dst", dst, write.shape())?;
        if src.size != dst.size {
            return Err(KernelError::arguments(
                name,
                "size of dst",
                format!("{:?}", src.size),
                format!("{:?}", dst.size),
            ));
        }
        let (from, to) = (device_address(read)?, device_address(write)?);
        let from = StridedRegion { address: from, shape: read.shape(), region: src };
        let to = StridedRegion { address: to, shape: write.shape(), region: dst };
        fetch_region(&self.lane, &source, from, to, read.dtype())
    }

    fn step(&mut self, step: &Ready, bound: &Bound<'_>, index: usize) -> Result<(), KernelError> {
        let at = |place: Place| address(bound, place);
        self.lane.spin()?;
        match step {
            Ready::Kernel { function, how, parameters } => {
                let mut words = [0; PARAMETERS_MAX];
                for (word, parameter) in words.iter_mut().zip(parameters) {
                    *word = match *parameter {
                        Parameter::Address(place) => at(place)?,
                        Parameter::Bits(bits) => bits,
                        Parameter::LaunchIndex => index as u64,
                        Parameter::Record => self.records.address(),
                    };
                }
                self.lane.launch(*function, how, &words[..parameters.len()])
            }
            Ready::Product(product) => {
                let addresses = addresses(product, &at, library_workspace(bound)?)?;
                let lane = self.lane.clone();
                let issued = self.plans()?.issue(product, &addresses, lane.stream(), lane.place());
                issued.map_err(|error| lane.why(error))
            }
            Ready::Flash { flash, own } => {
                let lane = self.lane.clone();
                if self.flashes().issue(flash, &at, library_workspace(bound)?, &lane)? {
                    return Ok(());
                }
                own.iter().try_for_each(|step| self.step(step, bound, index))
            }
            Ready::Copy { from, to, bytes } => self.lane.copy(at(*to)?, at(*from)?, *bytes),
            Ready::Fill { to, word, words } => self.lane.fill(at(*to)?, *word, *words),
        }
    }

    fn collective(&mut self, call: &CollectiveCall, bound: &Bound<'_>) -> Result<Option<Wait>, KernelError> {
        let told = self.metrics.collective(call);
        if let Some(engine) = self.engine.on_device(call) {
            self.lane.spin()?;
            // The others would wait in vain for whom cannot even do that.
            self.lane.begin_call(Some(told)).inspect_err(|error| self.engine.abort(&error.to_string()))?;
            return match engine.0.enqueue(call, &bound.reads, &bound.writes, bound.workspace.as_ref(), &self.lane)? {
                Enqueued::Issued => self.lane.end_call().map(|()| None),
                Enqueued::Waits(wait) => Ok(Some(wait)),
            };
        }
        let engine = self.engine.clone();
        self.staged.run(bound, |reads, writes| {
            told.came(Instant::now());
            let ran = engine.run(call, reads, writes);
            told.went(Instant::now());
            ran
        })?;
        Ok(None)
    }

    /// Tells of what a launch has written that is not finite.
    fn look(&mut self, launch: &Launch, run: &mut Run) -> Result<(), KernelError> {
        let bound = Bound::resolve(launch, &run.bases, |_| 0)?;
        if let Some((write, elements)) = self.staged.faults(&launch.op, &bound)? {
            run.ticket.tell(Notification::NotFinite { launch: run.done, write, elements });
            run.found = true;
        }
        Ok(())
    }
}

/// Where a product's operands lie.
fn addresses(
    product: &Product,
    at: &dyn Fn(Place) -> Result<u64, KernelError>,
    workspace: u64,
) -> Result<Addresses, KernelError> {
    let (bias, aux) = match product.epilogue {
        Epilogue::None | Epilogue::Gelu => (None, None),
        Epilogue::Bias(bias) | Epilogue::BiasGrad(bias) => (Some(bias), None),
        Epilogue::GeluBias { bias, aux } => (Some(bias), aux),
        Epilogue::GeluGrad { aux } => (None, Some(aux)),
    };
    let optional = |place: Option<Place>| place.map_or(Ok(0), at);
    Ok(Addresses {
        a: at(product.a.place)?,
        b: at(product.b.place)?,
        d: at(product.d.place)?,
        bias: optional(bias)?,
        aux: optional(aux)?,
        workspace,
    })
}

/// Where a library's workspace begins, of the size that the launch's own was checked to hold; 0 where there is none.
fn library_workspace(bound: &Bound<'_>) -> Result<u64, KernelError> {
    bound.workspace.as_ref().map_or(Ok(0), |view| device_address(view).map(lower::library_start))
}

/// What MEM-2 leaves to the op: which reads may be the memory of the first write.
fn check_in_place(launch: &Launch, bound: &Bound<'_>) -> Result<(), KernelError> {
    for (w, write) in bound.writes.iter().enumerate() {
        for (r, read) in bound.reads.iter().enumerate() {
            if read.overlaps(write) && !(w == 0 && lower::in_place(launch).contains(&r)) {
                let expected = "memory that is not written";
                return Err(KernelError::arguments(bound.name, &format!("read {r}"), expected, "an op in place"));
            }
        }
    }
    Ok(())
}
