//! One step of a session: the host sends the batch to the devices, receives results and decides on the update.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shardflow_actors::error::Failure;
use shardflow_kernels::tensor::{HostTensor, Region, element_count};

use super::agreement::{SharedInput, difference_in_step, digest, fields_of_step};
use super::batch::{Batch, Inputs};
use super::error::SessionError;
use super::load::FeedPort;
use super::outcome::array;
use super::report::StepReport;
use super::{Session, tokens};
use crate::graph::builder::{HYPER_INPUT, RNG_INPUT};
use crate::graph::{Node, NodeOp, TensorInfo, Var};
use crate::init;
use crate::plan::memory::local_part;
use crate::sbp::Sbp;
use crate::sbp::region::{concat, slice_region};
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
        let batch = batch.into();
        self.check_inputs(batch)?;
        self.run_step(&batch.into(), learning_rate)
    }

    fn run_step(&mut self, inputs: &Inputs<'_>, learning_rate: f32) -> Result<StepReport, SessionError> {
        let begin = Instant::now();
        if !learning_rate.is_finite() {
            let (name, expected) = ("learning_rate".into(), "a finite number".into());
            return Err(SessionError::Input { name, expected, got: learning_rate.to_string() });
        }
        let requested = self.requests.as_ref().map(|r| r.before_step(self.last_step, since_1970())).unwrap_or_default();
        let fields = self.step_numbers(requested.code(), learning_rate, inputs);
        let rules = self.step_rules.clone();
        let numbers = self.run(inputs, &rules, fields)?;
        let outputs = self.exchange_outputs()?;
        let request = Request::from_code(self.agree_on_step(&numbers)?);
        self.requests.iter().for_each(|requests| requests.agreed(request));
        let mut report = StepReport { request, ..self.report(outputs) };
        let mut accepted = Ok(());
        let bounds = self.bounds_after(&report, learning_rate);
        match (report.is_finite(), bounds.overflow()) {
            (true, None) => {
                self.decide(learning_rate)?;
                self.updates += u64::from(self.plan.graph.objective.is_some());
                (self.bounds, self.skipped_in_a_row) = (bounds, 0);
            }
            (is_finite, overflow) => {
                self.decide(f32::NAN)?;
                let found =
                    if is_finite { report.overflow(overflow) } else { self.find_first_non_finite(inputs, &report)? };
                accepted = self.accept_non_finite(&found);
                report.non_finite = Some(found);
            }
        }
        self.steps += u64::from(accepted.is_ok());
        // A step that ends the training is also recorded.
        let took = begin.elapsed();
        self.last_step = took;
        self.step_metrics.record(self.steps, &report, learning_rate, took);
        if let Some(observer) = &self.observer {
            observer.record_step(self.steps, &report, learning_rate, took);
            observer.sample_if_due();
        }
        accepted.map(|()| report)
    }

    /// The numbers of a step that all processes compare: this process's request, learning rate and digests.
    fn step_numbers(&self, request: u64, learning_rate: f32, inputs: &Inputs<'_>) -> Vec<Vec<u64>> {
        let own = self.process_map.process;
        let digest = |input: &SharedInput| {
            if input.processes.binary_search(&own).is_err() {
                return Vec::new();
            }
            let mut hasher = blake3::Hasher::new();
            let firings = self.plan.graph.tensor(input.var).rate.per_step(self.plan.micro_batches);
            for micro_batch in 0..firings {
                for region in &input.regions {
                    hasher.update(self.region(input.var, region.clone(), micro_batch, inputs).as_bytes());
                }
            }
            vec![digest(&hasher)]
        };
        let digests = self.shared_inputs.iter().map(digest).collect();
        fields_of_step(&self.plan, request, learning_rate, digests)
    }

    /// Returns the largest request of all processes. If other numbers differ, cancels the update and returns an error.
    fn agree_on_step(&mut self, all: &Reduced) -> Result<u64, SessionError> {
        if let Some(difference) = &all.difference {
            let difference = difference_in_step(&self.plan, &self.shared_inputs, self.steps, difference);
            self.decide(f32::NAN)?;
            return Err(difference.into());
        }
        Ok(array::<1>(all, 0)[0])
    }

    /// Starts the update with this learning rate (NaN cancels it), and waits until all devices are idle.
    pub(super) fn decide(&mut self, learning_rate: f32) -> Result<(), SessionError> {
        let hyper = HostTensor::f32(&[2], vec![learning_rate, (self.updates + 1) as f32]);
        let decided =
            self.feeds.iter().filter(|feed| feed.decides).try_for_each(|feed| self.feed(feed, |_, _| hyper.clone()));
        // There is no time limit here, because the watchdog reports slow devices.
        let ended = decided.and_then(|()| self.running()?.quiesce(Duration::MAX));
        ended.map(drop).map_err(|failure| self.fail(failure))
    }

    /// Feeds a batch and adds the tokens of all other external actions.
    pub(super) fn start_step(&self, inputs: &Inputs<'_>) -> Result<(), Failure> {
        for feed in self.feeds.iter().filter(|feed| !feed.decides) {
            self.feed(feed, |var, micro_batch| self.part(var, feed.device, micro_batch, inputs))?;
        }
        let running = self.running()?;
        self.external_actions
            .iter()
            .try_for_each(|(actor, action, firings)| running.add_tokens(*actor, *action, *firings))
    }

    fn feed(&self, feed: &FeedPort, tensor: impl Fn(Var, usize) -> HostTensor) -> Result<(), Failure> {
        let running = self.running()?;
        let firings = feed.rate.per_step(self.plan.micro_batches);
        for micro_batch in 0..firings {
            // The receiver is dropped only with the stream. `add_tokens` below reports the end of the stream.
            let _ = feed.sender.send(feed.vars.iter().map(|var| tensor(*var, micro_batch)).collect());
        }
        running.add_tokens(feed.actor, feed.action, firings as u32)
    }

    fn check_inputs(&self, batch: Batch<'_>) -> Result<(), SessionError> {
        let (graph, inputs, is_local) = (&self.plan.graph, batch.tensors(), matches!(batch, Batch::Local(_)));
        let is_fed = |n: &&Node| matches!(n.op, NodeOp::Input) && n.name != RNG_INPUT && n.name != HYPER_INPUT;
        let inputs_of_graph = graph.nodes().iter().filter(is_fed);
        let expected: BTreeMap<&str, Var> = inputs_of_graph.map(|n| (n.name.as_str(), n.outputs[0])).collect();
        let wrong =
            |name: &str, expected: String, got: String| SessionError::Input { name: name.into(), expected, got };
        for (index, (name, tensor)) in inputs.iter().enumerate() {
            if inputs[..index].iter().any(|other| other.0 == *name) {
                return Err(wrong(name, "one tensor".into(), "two".into()));
            }
            let (elements, held) = (element_count(&tensor.shape), tensor.elements_held());
            if elements != held {
                return Err(wrong(name, format!("{elements} elements for {:?}", tensor.shape), held.to_string()));
            }
            if !expected.contains_key(name) {
                let known: Vec<&str> = expected.keys().copied().collect();
                return Err(wrong(name, format!("one of {known:?}"), "an unknown name".into()));
            }
        }
        for (name, var) in expected {
            let info = graph.tensor(var);
            let part = self.local_parts.get(name).filter(|_| is_local);
            let found = inputs.iter().find(|i| i.0 == name);
            if is_local && part.is_none() {
                if found.is_none() {
                    continue;
                }
                return Err(wrong(name, "nothing, as no device of this rank reads it".into(), "a tensor".into()));
            }
            let mut shape = part.map_or_else(|| info.shape.clone(), |part| part.size.clone());
            if let Some(rows) = batch_dim(info).and_then(|dim| shape.get_mut(dim)) {
                *rows *= self.plan.micro_batches;
            }
            let place = part.map_or("", |_| " on this rank, with a local batch");
            let wanted = format!("{:?} {shape:?}{place}", info.dtype);
            match found {
                None => return Err(wrong(name, wanted, "nothing".into())),
                Some((_, t)) if t.shape != shape || t.dtype() != info.dtype => {
                    return Err(wrong(name, wanted, format!("{:?} {:?}", t.dtype(), t.shape)));
                }
                Some((_, t)) => {
                    if let Some(tokens) = self.vocabularies.get(name) {
                        tokens::check_ids(name, t, *tokens)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A device's part of an input for one micro-batch.
    fn part(&self, var: Var, device: usize, micro_batch: usize, inputs: &Inputs<'_>) -> HostTensor {
        let graph = &self.plan.graph;
        if graph.producer(var).name != RNG_INPUT {
            return self.region(var, local_part(graph, var, device), micro_batch, inputs);
        }
        // The seed offsets the counter, so masks depend on the seed and not on the mesh.
        let step = (init::mix(self.seed) as i32).wrapping_add(self.steps as i32);
        HostTensor::i32(&[2], vec![step, micro_batch as i32])
    }

    /// A region of an input; the region is relative to the start of the micro-batch.
    fn region(&self, var: Var, mut region: Region, micro_batch: usize, inputs: &Inputs<'_>) -> HostTensor {
        let (info, name) = (self.plan.graph.tensor(var), self.plan.graph.producer(var).name.as_str());
        let part = self.local_parts.get(name).filter(|_| inputs.is_local);
        let held = part.map_or(&info.shape, |part| &part.size);
        if let Some(part) = part {
            region.start.iter_mut().zip(&part.start).for_each(|(start, first)| *start -= first);
        }
        if let Some(dim) = batch_dim(info).filter(|dim| *dim < info.shape.len()) {
            region.start[dim] += micro_batch * held[dim];
        }
        slice_region(inputs.tensors[name], &region)
    }

    /// This rank's part of a whole batch, for [`Batch::Local`].
    ///
    /// # Errors
    /// Returns the errors of [`Session::step`] for a wrong input.
    pub fn local_batch<'a>(&self, whole: &[(&'a str, HostTensor)]) -> Result<Vec<(&'a str, HostTensor)>, SessionError> {
        self.check_inputs(Batch::Whole(whole))?;
        let inputs = Inputs::from(Batch::Whole(whole));
        let nodes = self.plan.graph.nodes().iter().filter(|node| matches!(node.op, NodeOp::Input));
        let vars: BTreeMap<&str, Var> = nodes.map(|node| (node.name.as_str(), node.outputs[0])).collect();
        let part = |name: &'a str| {
            let (region, var) = (self.local_parts.get(name)?, *vars.get(name)?);
            let dim = batch_dim(self.plan.graph.tensor(var));
            let micro_batches = if dim.is_some() { self.plan.micro_batches } else { 1 };
            let parts = (0..micro_batches).map(|index| self.region(var, region.clone(), index, &inputs));
            let mut parts: Vec<HostTensor> = parts.collect();
            Some((
                name,
                if let (Some(dim), 2..) = (dim, parts.len()) { concat(&parts, dim) } else { parts.swap_remove(0) },
            ))
        };
        Ok(whole.iter().filter_map(|(name, _)| part(name)).collect())
    }
}

/// The dim along which micro-batches split an input.
fn batch_dim(input: &TensorInfo) -> Option<usize> {
    if let Some(Sbp::Split(dim)) = input.loop_sbp { Some(dim) } else { None }
}
