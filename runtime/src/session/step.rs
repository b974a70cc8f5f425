//! One step of a session: the host sends the batch to the devices, receives results and decides on the update.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use shardflow_actors::error::Failure;
use shardflow_actors::shell::RunningSession;
use shardflow_kernels::tensor::{HostTensor, Region};

use super::Session;
use super::agreement::{difference_in_step, fields_of_step};
use super::batch::{Batch, Inputs, Part};
use super::error::SessionError;
use super::outcome::array;
use super::report::StepReport;
use crate::graph::Var;
use crate::graph::builder::RNG_INPUT;
use crate::init;
use crate::plan::HostTransfer;
use crate::plan::memory::local_part;
use shardflow_job::membership::Reduced;
use shardflow_job::requests::{Request, since_1970};

impl Session {
    /// Runs one step on a batch and returns the program's outputs; all devices are idle afterwards. A slice of named
    /// tensors is the whole batch; [`Batch::Local`] is a part. Nothing is updated if loss or gradient norm is Inf or
    /// NaN, or the update could overflow: see [`super::numerics`]. Without an objective, `learning_rate` has no effect.
    ///
    /// # Errors
    /// Before anything runs: a missing or unknown input, a wrong shape or type, or a token outside the vocabulary.
    /// Before the update: [`SessionError::NonFinite`], if the options require it, or [`SessionError::Disagreement`] on
    /// all ranks, if learning rates or shared elements differ. Also the failure of the session.
    pub fn step<'a>(&mut self, batch: impl Into<Batch<'a>>, learning_rate: f32) -> Result<StepReport, SessionError> {
        let inputs = self.batch_rules.check(batch.into())?;
        self.run_step(&inputs, learning_rate)
    }

    fn run_step(&mut self, inputs: &Inputs<'_>, learning_rate: f32) -> Result<StepReport, SessionError> {
        let begin = Instant::now();
        if !learning_rate.is_finite() {
            let (name, expected) = ("learning_rate".into(), "a finite number".into());
            return Err(SessionError::Input { name, expected, got: learning_rate.to_string() });
        }
        let requested =
            self.requests.as_ref().map(|r| r.before_step(self.progress.last_step, since_1970())).unwrap_or_default();
        let digests = self.batch_rules.digests(self.process_map.process, inputs);
        let fields = fields_of_step(&self.plan, requested.code(), learning_rate, digests);
        let rules = self.batch_rules.agreement.clone();
        let numbers = self.run(inputs, &rules, fields)?;
        let outputs = self.exchange_outputs()?;
        let request = Request::from_code(self.agree_on_step(&numbers)?);
        self.requests.iter().for_each(|requests| requests.agreed(request));
        let mut report = StepReport { request, ..self.report(outputs) };
        let mut accepted = Ok(());
        let bounds = self.guard.bounds_after(&self.plan.graph, &report, learning_rate);
        match (report.is_finite(), bounds.overflow()) {
            (true, None) => {
                self.decide(learning_rate)?;
                self.progress.updates += u64::from(self.plan.graph.objective.is_some());
                (self.guard.bounds, self.guard.skipped_in_a_row) = (bounds, 0);
            }
            (is_finite, overflow) => {
                self.decide(f32::NAN)?;
                let found =
                    if is_finite { report.overflow(overflow) } else { self.find_first_non_finite(inputs, &report)? };
                accepted = self.guard.accept(&found);
                report.non_finite = Some(found);
            }
        }
        self.progress.steps += u64::from(accepted.is_ok());
        // A non-finite step that is not accepted, and so ends the training, is also recorded.
        let took = begin.elapsed();
        self.progress.last_step = took;
        self.step_metrics.record(self.progress.steps, &report, learning_rate, took);
        if let Some(observer) = &self.observer {
            observer.record_step(self.progress.steps, &report, learning_rate, took);
            observer.sample_if_due();
        }
        accepted.map(|()| report)
    }

    /// Returns the largest request of all processes. If learning rates or digests of shared inputs differ, cancels the
    /// update and returns an error.
    fn agree_on_step(&mut self, all: &Reduced) -> Result<u64, SessionError> {
        if let Some(difference) = &all.difference {
            let difference =
                difference_in_step(&self.plan, &self.batch_rules.shared_inputs, self.progress.steps, difference);
            self.decide(f32::NAN)?;
            return Err(difference.into());
        }
        Ok(array::<1>(all, 0)[0])
    }

    /// Starts the update with this learning rate (NaN cancels it), and waits until all devices are idle.
    pub(super) fn decide(&mut self, learning_rate: f32) -> Result<(), SessionError> {
        let hyper = HostTensor::f32(&[2], vec![learning_rate, (self.progress.updates + 1) as f32]);
        let decide = |running: &RunningSession| {
            let part = |_, _, _| (Cow::Borrowed(&hyper), Region::whole(&hyper.shape));
            self.host_io.feed(running, HostTransfer::Decide, part)?;
            // There is no time limit here, because the watchdog reports slow devices.
            running.quiesce(Duration::MAX)
        };
        let ended = self.running().and_then(decide);
        ended.map(drop).map_err(|failure| self.fail(failure))
    }

    /// Feeds a batch, and allows all other actions that wait for the host, except the update.
    pub(super) fn start_step(&self, inputs: &Inputs<'_>) -> Result<(), Failure> {
        let part = |var, device, micro_batch| self.part(var, device, micro_batch, inputs);
        self.host_io.feed(self.running()?, HostTransfer::Feed, part)
    }

    /// A device's part of an input for one micro-batch.
    fn part<'a>(&self, var: Var, device: usize, micro_batch: usize, inputs: &Inputs<'a>) -> Part<'a> {
        let graph = &self.plan.graph;
        if graph.producer(var).name == RNG_INPUT {
            // The step number is offset by a hash of the seed, so masks depend on the seed and not on the mesh.
            let step = (init::mix(self.progress.seed) as i32).wrapping_add(self.progress.steps as i32);
            return (Cow::Owned(HostTensor::i32(&[2], vec![step, micro_batch as i32])), Region::whole(&[2]));
        }
        self.batch_rules.part(var, local_part(graph, var, device), micro_batch, inputs)
    }

    /// This rank's part of a whole batch, for [`Batch::Local`].
    ///
    /// # Errors
    /// Returns the errors of [`Session::step`] for a wrong input.
    pub fn local_batch<'a>(&self, whole: &[(&'a str, HostTensor)]) -> Result<Vec<(&'a str, HostTensor)>, SessionError> {
        self.batch_rules.local_batch(whole)
    }
}
