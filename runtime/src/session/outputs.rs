//! Collects the results of a step. Every process sends the pieces that its devices fetch to process 0. Process 0 assembles
//! whole outputs and sends them to the processes that get outputs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use shardflow_job::membership::{MergeRule, Reduced};
use shardflow_job::requests::Request;
use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::op::norm_of_squares;
use shardflow_kernels::tensor::HostTensor;

use super::Session;
use super::batch::Inputs;
use super::error::SessionError;
use super::numbers::Topic;
use super::report::StepReport;
use crate::graph::builder::{GRAD_SQUARES_OUTPUT, LOSS_OUTPUT};
use crate::graph::{Combine, Output};
use crate::plan::HostPort;
use crate::plan::memory::local_part;
use crate::sbp::assemble;
use crate::sbp::region::{combine, concat};

/// Results by port of a fetch: for each firing, one tensor for each fetched variable.
type Results = BTreeMap<u32, Vec<Vec<HostTensor>>>;

/// The whole tensor of each firing, by index of the graph output. Empty if this process does not get the output.
pub(super) type OutputTensors = Vec<Vec<HostTensor>>;

impl Session {
    /// Feeds a batch and waits until the devices of all processes have sent their results. Then combines the `numbers`
    /// of all processes by `rules`. On return, devices with results wait for the decision on the update. Other
    /// devices may still run.
    pub(super) fn run(
        &mut self,
        inputs: &Inputs<'_>,
        rules: &Arc<[MergeRule]>,
        numbers: Vec<Vec<u64>>,
    ) -> Result<Reduced, SessionError> {
        self.observer.iter().for_each(|observer| observer.passes.lock().begin(self.progress.steps));
        self.start_step(inputs).map_err(|failure| self.fail(failure))?;
        let wanted = self.fetched_pieces(self.process_map.own());
        self.receive(&wanted, None).map_err(|failure| self.fail(failure))?;
        if self.process_map.process != 0 {
            // These pieces were sent to process 0, so this process drops them.
            let mut inbox = self.host_io.inbox.lock();
            wanted.iter().for_each(|(port, count)| drop(inbox.take(*port, *count)));
        }
        // The numbers are supplied after the results. Missing numbers then mean that the devices of their process are
        // late.
        let pending = self.supply(Topic::Step, rules, numbers).map_err(|failure| self.fail(failure))?;
        self.combined(pending, None).map_err(|failure| self.fail(failure))
    }

    /// The port of each fetch of these devices, with its number of pieces in a step.
    fn fetched_pieces(&self, devices: Range<usize>) -> Vec<(u32, usize)> {
        devices
            .flat_map(|device| self.host_io.ports.fetches(device))
            .map(|(id, port, _)| (port, self.plan.segments.get(id).rate.per_step(self.plan.micro_batches)))
            .collect()
    }

    /// On process 0, waits for the results of all devices. Other processes get `None`.
    pub(super) fn take_results(&mut self) -> Result<Option<Results>, SessionError> {
        if self.process_map.process != 0 {
            return Ok(None);
        }
        let wanted = self.fetched_pieces(0..self.plan.device_count());
        self.receive(&wanted, None).map_err(|failure| self.fail(failure))?;
        let mut inbox = self.host_io.inbox.lock();
        Ok(Some(wanted.into_iter().map(|(port, count)| (port, inbox.take(port, count))).collect()))
    }

    /// Returns the outputs that this process gets from the step. All processes call it.
    pub(super) fn exchange_outputs(&mut self) -> Result<OutputTensors, SessionError> {
        if let Some(results) = self.take_results()? {
            for (output, port) in self.plan.graph.outputs.iter().zip(self.host_io.ports.outputs()) {
                self.send_output(output, port, &results)?;
            }
        }
        let mut wanted = Vec::new();
        for (output, port) in self.plan.graph.outputs.iter().zip(self.host_io.ports.outputs()) {
            let is_sent_here = self.process_map.process == 0 || self.host_io.ports.is_for_all(port);
            wanted.push((port, if is_sent_here { self.firings(output) } else { 0 }));
        }
        self.receive(&wanted, None).map_err(|failure| self.fail(failure))?;
        let mut inbox = self.host_io.inbox.lock();
        Ok(wanted.into_iter().map(|(port, count)| inbox.take(port, count).into_iter().flatten().collect()).collect())
    }

    fn firings(&self, output: &Output) -> usize {
        self.plan.graph.tensor(output.tensor).rate.per_step(self.plan.micro_batches)
    }

    /// Sends the whole tensor of each firing of an output. `results` contains the pieces of all devices.
    fn send_output(&self, output: &Output, port: u32, results: &Results) -> Result<(), SessionError> {
        let (graph, var) = (&self.plan.graph, output.tensor);
        let index = |host: &HostPort| host.vars.iter().position(|fetched| *fetched == var);
        let part = |device: usize| {
            let mut fetches = self.host_io.ports.fetches(device);
            let found = fetches.find_map(|(_, port, host)| Some((port, index(host)?)));
            let (port, index) = found.expect("the plan fetches the output from this device");
            (local_part(graph, var, device), &results[&port], index)
        };
        let devices = graph.placements[graph.placement_of(var)].devices().iter().copied();
        let parts: Vec<_> = devices.filter(|device| graph.is_fetched(var, *device)).map(part).collect();
        (0..self.firings(output)).try_for_each(|firing| {
            let pieces = parts.iter().map(|(region, pieces, index)| (region.clone(), pieces[firing][*index].clone()));
            self.send(port, assemble(pieces, graph.shape(var), graph.layout(var).partial())).map_err(Into::into)
        })
    }

    pub(super) fn report(&self, tensors: OutputTensors) -> StepReport {
        let mut outputs: BTreeMap<String, HostTensor> = BTreeMap::new();
        let mut squares: Vec<[f64; 2]> = Vec::new();
        let found = self.plan.graph.outputs.iter().zip(tensors);
        for (output, pieces) in found.filter(|(_, pieces)| !pieces.is_empty()) {
            let whole = combine_micro_batches(pieces, output.combine.unwrap_or(Combine::First));
            if output.name == GRAD_SQUARES_OUTPUT {
                let (values, _) = whole.as_f32().unwrap_or_default().as_chunks::<2>();
                squares.resize(values.len(), [0.0; 2]);
                for (sum, value) in squares.iter_mut().zip(values) {
                    *sum = [sum[0] + f64::from(value[0]), sum[1] + f64::from(value[1])];
                }
            } else {
                outputs.insert(output.name.clone(), whole);
            }
        }
        let loss = outputs.get(LOSS_OUTPUT).and_then(|t| t.as_f32()).and_then(|v| v.first().copied());
        let grad_norm = (!squares.is_empty()).then(|| norm_of_squares(squares));
        StepReport { step: self.progress.steps, loss, grad_norm, outputs, request: Request::Nothing, non_finite: None }
    }
}

/// Combines the values of a step's micro-batches, in their order; `pieces` is not empty.
fn combine_micro_batches(mut pieces: Vec<HostTensor>, method: Combine) -> HostTensor {
    let op = match method {
        Combine::First => return pieces.swap_remove(0),
        Combine::Concat(dim) => return concat(&pieces, dim),
        Combine::Stack => {
            pieces.iter_mut().for_each(|piece| piece.shape.insert(0, 1));
            return concat(&pieces, 0);
        }
        Combine::Sum => ReduceOp::Sum,
        Combine::Max => ReduceOp::Max,
    };
    let mut terms = pieces.into_iter();
    let mut whole = terms.next().expect("a step has a micro-batch");
    terms.for_each(|term| combine(&mut whole, &term, op));
    whole
}
