//! Issues submissions on a CUDA stream: launches as their lowered steps, collectives through the engine, signals and
//! completions as events that the poller reports. The caller specifies whether issuing may block. If it must
//! not block, the issuer stops before the first step that would block and returns the rest of the submission.
//!
//! - ISSUE-1: the memory that a step uses is in bounds (checked by `bound`) and on the stream's own GPU (checked here).
//!   Only a region copy may read from another GPU, and only a plain copy may use pinned memory. A submission keeps its
//!   arenas until its work on the stream has ended.
//! - ISSUE-2: issuing a prepared program loads, compiles and allocates nothing. The driver may delay a load or an
//!   allocation until the GPU's queues are empty. If a collective in a queue waits for this thread, both wait forever.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::blas::ProductPlans;
use super::cudnn::AttentionPlans;
use super::device_memory::{DeviceMemory, device_address};
use super::event::Recorded;
use super::in_flight::InFlight;
use super::lower;
use super::lowered::{FusedPair, LoweredLaunch, LoweredProgram, PreparedStep, address};
use super::poller::{release, set_event};
use super::raw_stream::{PARAMETERS_MAX, RawStream};
use super::record::ErrorRecords;
use super::staged::HostStaging;
use super::step::{Arg, Operand, Place, Product};
use super::strided_copy::{self, StridedRegion, copy_region_from};
use crate::bound::Bound;
use crate::collective::{AbortStatus, Collective, CollectiveCall, Enqueued, IssueSlot, Wait};
use crate::error::{KernelError, Result};
use crate::event::Event;
use crate::memory::{Base, DeviceStorage, View};
use crate::metrics::StreamMetrics;
use crate::op::{Buffer, Launch, Op, Program};
use crate::submission::{Command, Notification, Submission, launch_panic, trace_launch};
use crate::tensor::Region;

/// Placeholder for an unknown base address. It has the alignment of arenas.
const ANY_BASE: u64 = 1 << 20;

pub(crate) struct Run {
    in_flight: Arc<InFlight>,
    lowered: Arc<LoweredProgram>,
    bases: Vec<Base>,
    next_launch: usize,
    next_signal: usize,
    /// Waits until the engine has put the next launch, a collective, on the stream. `None` if no collective is pending.
    pending_collective: Option<Wait>,
    /// The submission's place in the issue order (ORDER-1), held until its last collective is on the stream.
    issue_slot: Option<IssueSlot>,
    abort_statuses: Arc<[AbortStatus]>,
    uses_record: bool,
    /// Whether Inf or NaN has been reported. Only the first launch whose output contains Inf or NaN is reported.
    non_finite_reported: bool,
}

impl Run {
    pub(crate) fn new(
        submission: Submission,
        lowered: Arc<LoweredProgram>,
        abort_statuses: &Arc<[AbortStatus]>,
        issue_slot: Option<IssueSlot>,
    ) -> Self {
        let Submission { program, bases, repeat, notify } = submission;
        let abort_statuses = if lowered.last_call.is_some() { abort_statuses.clone() } else { Arc::default() };
        let in_flight = Arc::new(InFlight::new(program, repeat, notify, abort_statuses.clone()));
        Self {
            in_flight,
            lowered,
            bases,
            next_launch: 0,
            next_signal: 0,
            pending_collective: None,
            issue_slot,
            abort_statuses,
            uses_record: false,
            non_finite_reported: false,
        }
    }
}

pub(crate) struct Issuer {
    stream: Arc<RawStream>,
    engine: Arc<dyn Collective>,
    records: ErrorRecords,
    product_plans: Option<ProductPlans>,
    attention_plans: Option<AttentionPlans>,
    staging: HostStaging,
    metrics: StreamMetrics,
    check_finite: bool,
}

impl Issuer {
    pub(crate) fn new(
        stream: &Arc<RawStream>,
        engine: Arc<dyn Collective>,
        records: ErrorRecords,
        metrics: StreamMetrics,
    ) -> Self {
        Self {
            stream: stream.clone(),
            engine,
            records,
            product_plans: None,
            attention_plans: None,
            staging: HostStaging::new(stream),
            metrics,
            check_finite: false,
        }
    }

    /// Creates everything that the program's launches need, except their buffers. Submissions then create nothing
    /// (ISSUE-2).
    pub(crate) fn prepare(&mut self, program: &Program, lowered: &LoweredProgram) -> Result<()> {
        let stream = self.stream.clone();
        if stream.gpu.test_delays.is_some() {
            stream.gpu.modules.function("spin", 0)?;
        }
        for (index, launch) in program.launches.iter().enumerate() {
            if self.needs_host(launch) {
                self.staging.prepare(launch)?;
            } else if matches!(launch.op, Op::Collective(_)) {
                strided_copy::prepare(&stream.gpu)?;
            }
            let found = catch_unwind(AssertUnwindSafe(|| {
                let second = program.launches.get(index + 1);
                let pair = second.and_then(|second| lowered.fused_pair(index, [launch, second], &stream.gpu));
                (pair, lowered.launch(index, launch, &stream.gpu))
            }));
            let Ok((pair, alone)) = found else { continue };
            if let Some(FusedPair { reads, writes, lowered }) = pair {
                self.prepare_steps(&lowered.steps, lowered.uses_record, [reads, writes])?;
            }
            match alone {
                Ok(LoweredLaunch { steps, uses_record }) => {
                    self.prepare_steps(steps, *uses_record, [&launch.reads, &launch.writes])?;
                }
                // Collectives and custom kernels are not lowered. For any other launch, `issue_next` reports the error.
                Err(KernelError::Arguments { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn prepare_steps(&mut self, steps: &[PreparedStep], uses_record: bool, buffers: [&[Buffer]; 2]) -> Result<()> {
        let stream = self.stream.clone();
        if uses_record {
            self.records.prepare(&stream.gpu)?;
        }
        // Only the alignment of an address matters here, and bases have the alignment that the libraries require.
        let address_of = |place: Place| {
            let buffer = match place.operand {
                Operand::Read(i) => buffers[0].get(i),
                Operand::Write(i) => buffers[1].get(i),
                Operand::Workspace => None,
            };
            Ok(ANY_BASE + (buffer.map_or(0, |buffer| buffer.offset) + place.offset_bytes) as u64)
        };
        for step in steps {
            match step {
                PreparedStep::Product(product) => {
                    let addresses = addresses(product, &address_of)?;
                    self.product_plans()?.prepare(product, addresses, &stream.place)?;
                }
                PreparedStep::Attention { shape, fallback } => {
                    self.attention_plans().prepare(shape, &stream.place);
                    self.prepare_steps(fallback, uses_record, buffers)?;
                }
                PreparedStep::Kernel { .. } | PreparedStep::Copy { .. } | PreparedStep::Fill { .. } => {}
            }
        }
        Ok(())
    }

    /// Keeps the staging memory and the error record alive until the stream has passed all issued work.
    pub(crate) fn release_memory(&self) {
        let context = &self.stream.gpu.context;
        let recorded = if context.bind_to_drop() { self.stream.record().ok() } else { None };
        // If no event could be recorded, the context is lost, and nothing can be freed.
        let Some(recorded) = recorded else { return };
        // The last completion holds device memory and thereby the GPU, so the poller lives until the completion runs.
        for memory in self.staging.arena.iter().chain([&self.records.memory]) {
            self.stream.report(recorded.clone(), release(memory.clone(), Event::default()));
        }
    }

    fn attention_plans(&mut self) -> &mut AttentionPlans {
        let stream = &self.stream;
        let new = || AttentionPlans::new(&stream.gpu, stream.handle, &stream.place);
        self.attention_plans.get_or_insert_with(new)
    }

    fn product_plans(&mut self) -> Result<&mut ProductPlans> {
        let stream = &self.stream;
        match &mut self.product_plans {
            Some(plans) => Ok(plans),
            none => Ok(none.insert(ProductPlans::new(stream.gpu.blas()?))),
        }
    }

    /// Runs a command. If the command would block and `may_block` is false, returns the rest of the command.
    pub(crate) fn execute(&mut self, command: Command<Run>, may_block: bool) -> Option<Command<Run>> {
        match command {
            Command::CheckFinite(on) => self.check_finite = on,
            Command::Record(event) => self.record(event),
            Command::Wait(event) => {
                if event.query() {
                    return None;
                }
                match event.recorded::<Recorded>() {
                    // A failure marks the context as lost. The next submission returns the failure.
                    Some(recorded) => drop(self.stream.wait(recorded)),
                    None if may_block => event.synchronize(),
                    None => return Some(Command::Wait(event)),
                }
            }
            Command::Run(mut run) => match self.advance(&mut run, may_block) {
                Ok(true) => self.finish(run, Ok(())),
                Ok(false) => return Some(Command::Run(run)),
                Err(error) => self.finish(run, Err(error)),
            },
        }
        None
    }

    fn record(&mut self, event: Event) {
        match self.stream.record() {
            Ok(recorded) => {
                event.record(recorded.clone());
                self.stream.report(recorded, set_event(event));
            }
            // A failed stream runs nothing more, so set the event now.
            Err(_) => event.set(),
        }
    }

    /// Issues the remaining launches of a program. Returns false if this would block and `may_block` is false.
    fn advance(&mut self, run: &mut Run, may_block: bool) -> Result<bool> {
        self.stream.gpu.context.check_alive()?;
        let in_flight = run.in_flight.clone();
        let program = &in_flight.program;
        loop {
            self.issue_signals(run)?;
            let Some(launch) = program.launches.get(run.next_launch) else { return Ok(true) };
            if let Some(wait) = run.pending_collective.take() {
                if !may_block {
                    run.pending_collective = Some(wait);
                    return Ok(false);
                }
                wait()?;
                self.stream.end_call()?;
            } else {
                if let Some(slot) = run.issue_slot.as_ref().filter(|_| matches!(launch.op, Op::Collective(_))) {
                    if !may_block && !slot.may_issue() {
                        return Ok(false);
                    }
                    slot.wait(&run.abort_statuses)?;
                }
                trace_launch(program, run.next_launch);
                if !may_block && (self.check_finite || self.needs_host(launch)) {
                    return Ok(false);
                }
                let issued = catch_unwind(AssertUnwindSafe(|| self.issue_next(run)));
                let issued = issued.unwrap_or_else(|panic| Err(launch_panic(program, run.next_launch, &*panic)));
                let (count, wait) = issued?;
                if wait.is_some() {
                    run.pending_collective = wait;
                    continue;
                }
                // The last of these launches is counted below.
                run.next_launch += count - 1;
            }
            if self.check_finite && !run.non_finite_reported {
                self.report_non_finite(launch, run)?;
            }
            if run.lowered.last_call == Some(run.next_launch) {
                run.issue_slot = None;
            }
            run.next_launch += 1;
        }
    }

    /// Passes to the poller the signals that are due before the next launch.
    fn issue_signals(&mut self, run: &mut Run) -> Result<()> {
        let mut event = None;
        while let Some((_, tag)) =
            run.in_flight.program.signals.get(run.next_signal).filter(|(at, _)| *at <= run.next_launch)
        {
            let recorded = match &event {
                Some(recorded) => Arc::clone(recorded),
                None => event.insert(self.stream.record()?).clone(),
            };
            self.stream.report(recorded, run.in_flight.clone().signal(*tag));
            run.next_signal += 1;
        }
        Ok(())
    }

    fn finish(&mut self, run: Run, result: Result<()>) {
        let Run { in_flight, bases, uses_record, .. } = run;
        let fetched = uses_record.then(|| self.records.fetch(&self.stream)).transpose();
        let recorded = fetched.and_then(|slot| {
            slot.into_iter().for_each(|slot| in_flight.set_record_slot(slot));
            self.stream.record()
        });
        match recorded {
            Ok(recorded) => self.stream.report(recorded, in_flight.end(bases, result)),
            Err(error) => {
                drop(bases);
                in_flight.finish(Err(result.err().unwrap_or(error)));
            }
        }
    }

    /// Whether a launch runs on the host: a custom kernel, or a collective of an engine that cannot enqueue on streams.
    fn needs_host(&self, launch: &Launch) -> bool {
        match &launch.op {
            Op::Collective(call) => self.engine.on_device(call).is_none(),
            Op::Custom(_) => true,
            _ => false,
        }
    }

    /// Issues the next launch, or the next two if one kernel runs both. Returns the number of issued launches.
    fn issue_next(&mut self, run: &mut Run) -> Result<(usize, Option<Wait>)> {
        let in_flight = run.in_flight.clone();
        let launches = &in_flight.program.launches;
        // Fusion would hide the first launch's outputs from the Inf/NaN check, and delay a signal between the launches.
        let second_index = run.next_launch + 1;
        let has_signal_between = || in_flight.program.signals.iter().any(|&(position, _)| position == second_index);
        if let Some(second) = launches.get(second_index)
            && !self.check_finite
            && !has_signal_between()
            && self.issue_pair([&launches[run.next_launch], second], run)?
        {
            return Ok((2, None));
        }
        Ok((1, self.issue_launch(&launches[run.next_launch], run)?))
    }

    /// Issues two launches as one. Returns false if they must run separately: no kernel fuses them, or a check fails.
    fn issue_pair(&mut self, launches: [&Launch; 2], run: &mut Run) -> Result<bool> {
        let lowered = run.lowered.clone();
        if lowered.cannot_fuse(run.next_launch, launches) {
            return Ok(false);
        }
        for launch in launches {
            // Ops that can be fused need no workspace.
            let checked = self.bind(launch, &run.bases).and_then(|bound| check_in_place(launch, &bound));
            if checked.is_err() {
                return Ok(false);
            }
        }
        let Some(pair) = lowered.fused_pair(run.next_launch, launches, &self.stream.gpu) else { return Ok(false) };
        let Some(bound) = pair.bind(launches[1].op.name(), &run.bases)? else { return Ok(false) };
        trace_launch(&run.in_flight.program, run.next_launch + 1);
        run.uses_record |= pair.lowered.uses_record;
        pair.lowered.steps.iter().try_for_each(|step| self.issue_step(step, &bound, run.next_launch + 1))?;
        Ok(true)
    }

    /// Resolves a launch's buffers and checks that they are on this GPU.
    fn bind<'a>(&self, launch: &'a Launch, bases: &'a [Base]) -> Result<Bound<'a>> {
        let bound = Bound::resolve(launch, bases, |_| 0)?;
        bound.all().try_for_each(|view| self.check_on_this_gpu(bound.name, view))?;
        Ok(bound)
    }

    fn issue_launch(&mut self, launch: &Launch, run: &mut Run) -> Result<Option<Wait>> {
        let bound = Bound::resolve(launch, &run.bases, |_| lower::workspace_bytes(launch))?;
        if let ([read], Op::CopyRegion { src, dst }) = (&bound.reads[..], &launch.op)
            && self.check_on_this_gpu(bound.name, read).is_err()
        {
            return self.copy_from_peer(launch, read, &bound.writes[0], [src, dst]).map(|()| None);
        }
        if let (Op::Copy, [read], [write]) = (&launch.op, &bound.reads[..], &bound.writes[..])
            && (read.arena().is_pinned() || write.arena().is_pinned())
        {
            return self.copy_staged(launch, read, write).map(|()| None);
        }
        bound.all().try_for_each(|view| self.check_on_this_gpu(bound.name, view))?;
        match &launch.op {
            Op::Collective(call) => self.issue_collective(call, &bound),
            Op::Custom(kernel) => {
                let accumulate = launch.accumulate && run.in_flight.repeat;
                self.staging.run_custom(&bound, &**kernel, accumulate).map(|()| None)
            }
            op => {
                let LoweredLaunch { steps, uses_record } =
                    run.lowered.launch(run.next_launch, launch, &self.stream.gpu)?;
                check_in_place(launch, &bound)?;
                run.uses_record |= uses_record;
                self.stream.gpu.attention_counters.count_launch(op);
                steps.iter().try_for_each(|step| self.issue_step(step, &bound, run.next_launch))?;
                Ok(None)
            }
        }
    }

    /// Checks that the view's memory is on this GPU (ISSUE-1).
    fn check_on_this_gpu(&self, name: &str, view: &View<'_>) -> Result<()> {
        let gpu = &self.stream.gpu;
        let got = match view.arena().device_memory::<DeviceMemory>() {
            Some(memory) if Arc::ptr_eq(&memory.gpu.context, &gpu.context) => return Ok(()),
            Some(memory) => format!("memory of {}", memory.place()),
            None => "host memory".to_owned(),
        };
        Err(KernelError::arguments(name, "memory", format!("memory of {}", gpu.place()), got))
    }

    fn copy_from_peer(
        &self,
        launch: &Launch,
        read: &View<'_>,
        write: &View<'_>,
        [src, dst]: [&Region; 2],
    ) -> Result<()> {
        let accumulate = launch.accumulate;
        let source = read.arena().device_memory().map(|memory: &DeviceMemory| memory.gpu.context.clone());
        let memory = if source.is_some() { "GPU" } else { "host" };
        let (Some(source), false) = (source, accumulate || read.dtype() != write.dtype()) else {
            let (from, to) = (read.dtype(), write.dtype());
            let got = format!("{from:?} in {memory} memory, write 0 {to:?}, accumulate {accumulate}");
            return Err(launch.refused("read 0", "a source in GPU memory, equal dtypes, and no accumulation", got));
        };
        self.check_on_this_gpu(launch.op.name(), write)?;
        launch.check_buffers(false)?;
        let from = StridedRegion::new(device_address(read)?, read.shape(), src.clone());
        let to = StridedRegion::new(device_address(write)?, write.shape(), dst.clone());
        copy_region_from(&self.stream, &source, &from, &to, read.dtype())
    }

    /// Copies from or to pinned memory of the host. The host does not access the memory during the submission
    /// (PINNED-1).
    fn copy_staged(&self, launch: &Launch, read: &View<'_>, write: &View<'_>) -> Result<()> {
        launch.check_buffers(false)?;
        if launch.accumulate {
            return Err(launch.refused("accumulate", "false for a copy between host and GPU", "true"));
        }
        self.stream.issue_test_delay()?;
        if read.arena().is_pinned() {
            self.check_on_this_gpu(launch.op.name(), write)?;
            return self.stream.copy_in(device_address(write)?, read.start(), read.bytes());
        }
        self.check_on_this_gpu(launch.op.name(), read)?;
        self.stream.copy_out(write.start(), device_address(read)?, read.bytes())
    }

    fn issue_step(&mut self, step: &PreparedStep, bound: &Bound<'_>, index: usize) -> Result<()> {
        let address_of = |place: Place| address(bound, place);
        self.stream.issue_test_delay()?;
        match step {
            PreparedStep::Kernel { function, geometry, args } => {
                let mut words = [0; PARAMETERS_MAX];
                for (word, arg) in words.iter_mut().zip(args) {
                    *word = match arg {
                        Arg::Pointer(place) => address_of(*place)?,
                        Arg::LaunchIndex => index as u64,
                        Arg::ErrorRecord => self.records.address(),
                        // All other arguments are constants.
                        other => other.bits().unwrap_or(0),
                    };
                }
                self.stream.launch(*function, geometry, &words[..args.len()])
            }
            PreparedStep::Product(product) => {
                let (addresses, workspace) = (addresses(product, &address_of)?, library_workspace(bound)?);
                let stream = self.stream.clone();
                let plans = self.product_plans()?;
                let issued = plans.issue(product, addresses, workspace, stream.handle, &stream.place);
                issued.map_err(|error| stream.root_cause(error))
            }
            PreparedStep::Attention { shape, fallback } => {
                let stream = self.stream.clone();
                if self.attention_plans().issue(shape, &address_of, library_workspace(bound)?, &stream)? {
                    return Ok(());
                }
                fallback.iter().try_for_each(|step| self.issue_step(step, bound, index))
            }
            PreparedStep::Copy { from, to, bytes } => self.stream.copy(address_of(*to)?, address_of(*from)?, *bytes),
            PreparedStep::Fill { to, word, words } => self.stream.fill(address_of(*to)?, *word, *words),
        }
    }

    fn issue_collective(&mut self, call: &CollectiveCall, bound: &Bound<'_>) -> Result<Option<Wait>> {
        let timer = self.metrics.collective(call);
        if let Some(engine) = self.engine.on_device(call) {
            self.stream.issue_test_delay()?;
            // If `begin_call` fails, abort: the other members would otherwise wait forever.
            self.stream.begin_call(Some(timer)).inspect_err(|error| self.engine.abort(&error.to_string()))?;
            return match engine.0.enqueue(call, bound, self.stream.clone())? {
                Enqueued::Issued => self.stream.end_call().map(|()| None),
                Enqueued::Pending(wait) => Ok(Some(wait)),
            };
        }
        let engine = self.engine.clone();
        self.staging.run(bound, |reads, writes| {
            timer.begin(Instant::now());
            let result = engine.run(call, reads, writes);
            timer.end(Instant::now());
            result
        })?;
        Ok(None)
    }

    fn report_non_finite(&mut self, launch: &Launch, run: &mut Run) -> Result<()> {
        let bound = Bound::resolve(launch, &run.bases, |_| 0)?;
        if let Some((write, elements)) = self.staging.find_non_finite(&launch.op, &bound)? {
            run.in_flight.send(Notification::NotFinite { launch: run.next_launch, write, elements });
            run.non_finite_reported = true;
        }
        Ok(())
    }
}

fn addresses(product: &Product, address_of: &dyn Fn(Place) -> Result<u64>) -> Result<[u64; 3]> {
    Ok([address_of(product.a.place)?, address_of(product.b.place)?, address_of(product.d.place)?])
}

/// Returns the address of the library's part of the workspace; 0 if there is none. The caller has checked its size.
fn library_workspace(bound: &Bound<'_>) -> Result<u64> {
    bound.workspace.as_ref().map_or(Ok(0), |view| device_address(view).map(lower::library_start))
}

/// Checks the part of MEM-2 that depends on the op: which reads may share memory with the first write.
fn check_in_place(launch: &Launch, bound: &Bound<'_>) -> Result<()> {
    for (w, write) in bound.writes.iter().enumerate() {
        for (r, read) in bound.reads.iter().enumerate() {
            if read.overlaps(write) && !(w == 0 && lower::in_place(launch).contains(&r)) {
                let expected = "memory that is not written";
                return Err(KernelError::arguments(bound.name, &format!("read {r}"), expected, "written memory"));
            }
        }
    }
    Ok(())
}
