//! One attempt: starts all processes of the node and waits until every process has ended.
//!
//! ```text
//!  Running ──a process fails──► Settling ──failure wait──► Ending ──grace period──► Killed ──► abandoned
//!     └───────a signal is forwarded───────────────────────►┘          ▲
//!                  Settling ──only blamed processes are left──────────┘
//! ```

use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use rustix::process::Signal;
use signal_hook::consts::{SIGINT, SIGUSR1};

use super::cause::Ended;
use super::children::{AttemptConfig, Child};
use super::job::{Event, Job, print_notice};
use super::options::LaunchError;
use crate::exit::{Exit, Report};
use crate::output;

/// How long to wait before SIGKILL if the ended processes blame all remaining processes. Usually these are frozen.
const BLAMED_WAIT: Duration = Duration::from_secs(2);
/// Maximum of `failure_wait` in a job with one node, if the other processes would wait in vain for the failed one. In
/// this time, processes with the same failure can still end by themselves.
const UNJOINED_WAIT: Duration = Duration::from_millis(500);
/// Interval at which the launcher checks whether processes wait in vain for a process that has ended.
const ABSENCE_POLL: Duration = Duration::from_millis(500);
/// Time after SIGKILL until the launcher abandons a process that has not ended. Only the kernel can delay its end.
const KILL_WAIT: Duration = Duration::from_secs(10);

pub(super) struct Outcome {
    pub(super) ended: Vec<Ended>,
    pub(super) signal: Option<u8>,
    pub(super) abandoned: bool,
    /// For each process, by local rank: its rank, its error lines, and the path of its log.
    logs: Vec<(u32, Vec<String>, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    Settling { until: Instant },
    Ending { until: Instant },
    Killed { until: Instant },
}

struct Attempt<'a, 'b> {
    job: &'a mut Job<'b>,
    children: Vec<Child>,
    phase: Phase,
    signal: Option<u8>,
    abandoned: bool,
}

/// Starts all processes after `pause`, and waits until they have ended.
pub(super) fn run(job: &mut Job, number: u64, pause: Duration) -> Result<Outcome, LaunchError> {
    // A signal during the pause ends the launcher before any process is started.
    let start_at = Instant::now() + pause;
    while let Ok(event) = job.events.1.recv_deadline(start_at) {
        match event {
            Event::Signal(signal) if i32::from(signal) != SIGUSR1 => {
                let ended = vec![Ended::by_signal(0, signal)];
                return Ok(Outcome { ended, signal: Some(signal), abandoned: false, logs: Vec::new() });
            }
            _ => {}
        }
    }
    let config = AttemptConfig::new(job, number)?;
    let mut attempt = Attempt { job, children: Vec::new(), phase: Phase::Running, signal: None, abandoned: false };
    for local in 0..attempt.job.options.local_processes {
        match Child::start(attempt.job, &config, local) {
            Ok(child) => attempt.children.push(child),
            Err(error) => {
                attempt.kill();
                attempt.wait();
                return Err(error);
            }
        }
    }
    attempt.wait();
    attempt.fail_if_missed();
    Ok(attempt.outcome())
}

impl Attempt<'_, '_> {
    fn wait(&mut self) {
        while !self.abandoned && self.living().next().is_some() {
            let until = match self.phase {
                Phase::Running => Instant::now() + ABSENCE_POLL,
                Phase::Settling { until } | Phase::Ending { until } | Phase::Killed { until } => until,
            };
            match self.job.events.1.recv_deadline(until) {
                Ok(Event::Ended(local)) => self.handle_end(local),
                Ok(Event::Signal(signal)) => self.forward_signal(signal),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => self.handle_timeout(),
            }
        }
    }

    fn living(&self) -> impl Iterator<Item = &Child> {
        self.children.iter().filter(|child| child.ended.is_none())
    }

    /// True if the ended processes' reports blame every remaining process.
    fn only_blamed_left(&self) -> bool {
        let reports = || self.children.iter().filter_map(|child| child.ended.as_ref()?.report.as_ref());
        let is_blamed = |rank| reports().any(|r| r.first_cause_rank == Some(rank) && r.rank != rank);
        self.living().all(|child| is_blamed(child.rank))
    }

    fn failure_wait(&self) -> Duration {
        let options = self.job.options;
        let mut reports = self.children.iter().filter_map(|child| child.ended.as_ref()?.report.as_ref());
        // With several nodes, rank 0 needs the whole wait to refuse the processes that try to join.
        let wait_is_vain = options.nodes == 1 && reports.any(Report::concerns_all);
        if wait_is_vain { options.failure_wait.min(UNJOINED_WAIT) } else { options.failure_wait }
    }

    fn handle_end(&mut self, local: usize) {
        let signaled = matches!(self.phase, Phase::Ending { .. } | Phase::Killed { .. });
        // If a start failed after the process was spawned, `children` lacks that process.
        let Some(child) = self.children.get_mut(local) else { return };
        child.finish(self.job, signaled);
        child.ended.iter().filter(|ended| !ended.signaled).for_each(|ended| self.job.report(ended.report()));
        let failed = child.ended.as_ref().is_some_and(|ended| ended.exit != Exit::Done);
        if failed && self.phase == Phase::Running {
            self.settle(local);
        }
        if let Phase::Settling { until } = self.phase
            && self.only_blamed_left()
        {
            self.phase = Phase::Settling { until: until.min(Instant::now() + BLAMED_WAIT) };
        }
    }

    /// Called after a process has failed: waits `failure_wait` for the others to end.
    fn settle(&mut self, local: usize) {
        // The screen already shows the output of the node's first process.
        if let Some(ended) = self.children[local].ended.as_ref().filter(|_| local > 0) {
            print_notice(&ended.describe());
        }
        self.phase = Phase::Settling { until: Instant::now() + self.failure_wait() };
    }

    /// Marks a process as failed if it ended with code 0 before it joined and other processes of this node wait for it.
    fn fail_absent(&mut self) {
        let absent = self.children.iter().position(Child::is_absent);
        let Some(local) = absent.filter(|_| self.living().any(Child::is_joining)) else { return };
        let Some(ended) = &mut self.children[local].ended else { return };
        *ended = ended.missed();
        self.job.report(ended.report());
        self.settle(local);
    }

    /// If all processes exited with 0 without joining and other nodes wait for them, marks the first one as failed. If
    /// no other node waits, this is no failure: the program may be one that uses no rendezvous.
    fn fail_if_missed(&mut self) {
        if self.phase == Phase::Running
            && self.children.iter().all(Child::is_absent)
            && let Some(first) = self.children[0].ended.as_mut()
        {
            let missed = first.missed();
            if self.job.is_missed(missed.report()) {
                *first = missed;
            }
        }
    }

    fn forward_signal(&mut self, signal: u8) {
        if i32::from(signal) == SIGUSR1 {
            // All processes agree on a request. So it is enough if one process with a handler receives the signal.
            return self.living().for_each(Child::signal_usr1);
        }
        if self.signal.is_some() && i32::from(signal) == SIGINT {
            print_notice("interrupted again: killing all processes");
            return self.kill();
        }
        self.signal.get_or_insert(signal);
        if let Some(signal) = Signal::from_named_raw(i32::from(signal)) {
            self.living().for_each(|child| child.signal(signal));
        }
        if matches!(self.phase, Phase::Running | Phase::Settling { .. }) {
            self.phase = Phase::Ending { until: Instant::now() + self.job.options.grace };
        }
    }

    fn handle_timeout(&mut self) {
        let ranks: Vec<String> = self.living().map(|child| child.rank.to_string()).collect();
        let ranks = ranks.join(", ");
        match self.phase {
            Phase::Running => self.fail_absent(),
            Phase::Settling { .. } if self.only_blamed_left() => {
                print_notice(&format!("killing rank {ranks}: blamed for the failure by the ranks that ended"));
                self.kill();
            }
            Phase::Settling { .. } => {
                let wait = self.failure_wait();
                print_notice(&format!("sending SIGTERM to rank {ranks}: still running {wait:?} after the failure"));
                self.living().for_each(|child| child.signal(Signal::TERM));
                self.phase = Phase::Ending { until: Instant::now() + self.job.options.grace };
            }
            Phase::Ending { .. } => {
                let grace = self.job.options.grace;
                print_notice(&format!("killing rank {ranks}: still running {grace:?} after the signal to end"));
                self.kill();
            }
            Phase::Killed { .. } => {
                print_notice(&format!("abandoning rank {ranks}: still in the kernel {KILL_WAIT:?} after SIGKILL"));
                self.abandoned = true;
            }
        }
    }

    fn kill(&mut self) {
        self.living().for_each(|child| child.signal(Signal::KILL));
        self.phase = Phase::Killed { until: Instant::now() + KILL_WAIT };
    }

    fn outcome(self) -> Outcome {
        let log = |child: &Child| (child.rank, child.log.errors(), child.log.path.display().to_string());
        let logs = self.children.iter().map(log).collect();
        let ended = |child: &Child| child.ended.clone().unwrap_or_else(|| Ended::by_signal(child.rank, 9));
        let ended = self.children.iter().map(ended).collect();
        Outcome { ended, signal: self.signal, abandoned: self.abandoned, logs }
    }
}

impl Outcome {
    /// Prints the errors of failed processes. Skips the first process, because the screen already shows its output.
    pub(super) fn show_errors(&self) {
        for ((rank, lines, _), ended) in self.logs.iter().zip(&self.ended).skip(1) {
            if ended.exit != Exit::Done {
                lines.iter().for_each(|line| output::stderr().line(&format!("rank {rank}: {line}")));
            }
        }
    }

    pub(super) fn reports(&self) -> impl Iterator<Item = &Report> {
        self.ended.iter().filter_map(|ended| ended.report.as_ref())
    }

    pub(super) fn describe(&self, ended: &Ended) -> String {
        let log = self.logs.iter().find(|(rank, ..)| *rank == ended.rank);
        let log = log.map_or(String::new(), |(.., path)| format!("; its log: {path}"));
        ended.describe() + &log
    }
}
