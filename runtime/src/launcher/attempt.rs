//! One start of all processes of the node, until the last of them has ended.
//!
//! ```text
//!  Running ──a process fails──► Settling ──time is up──► Ending ──grace is over──► Killed ──► abandoned
//!     └───────a signal is passed on──────────────────────►┘          ▲
//!                  Settling ──only the accused are left──────────────┘
//! ```

use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use rustix::process::Signal;
use signal_hook::consts::{SIGINT, SIGUSR1};

use super::cause::Ended;
use super::children::{Child, Meeting};
use super::{Event, Job, LaunchError, notice};
use crate::exit::Exit;
use crate::output;

/// Time that processes have which others that ended have accused, when no other is left. They may be about to say why
/// they failed; more often they do not answer, and will not.
const ACCUSED_WAIT: Duration = Duration::from_secs(2);
/// Time until a process that was killed and does not end is left behind. Only the kernel can hold it up.
const KILL_WAIT: Duration = Duration::from_secs(10);
/// Time to read a process's remaining output. It takes longer only if another process holds its pipes.
pub(super) const PUMPS_WAIT: Duration = Duration::from_secs(2);

/// How an attempt ended.
pub(super) struct Outcome {
    pub(super) ended: Vec<Ended>,
    /// The signal by which somebody asked the launcher to end.
    pub(super) asked: Option<u8>,
    /// A process could not be killed.
    pub(super) abandoned: bool,
    /// By local number: lines of errors, and where the whole log is.
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
    asked: Option<u8>,
    abandoned: bool,
}

/// Starts all processes after `pause` and stays until they have ended.
pub(super) fn run(job: &mut Job, number: u64, pause: Duration) -> Result<Outcome, LaunchError> {
    // A signal during the pause: start nothing.
    let start_at = Instant::now() + pause;
    while let Ok(event) = job.events.1.recv_deadline(start_at) {
        match event {
            Event::Signal(signal) if i32::from(signal) != SIGUSR1 => {
                let ended = vec![Ended::told(0, signal)];
                return Ok(Outcome { ended, asked: Some(signal), abandoned: false, logs: Vec::new() });
            }
            _ => {}
        }
    }
    let meeting = Meeting::new(job, number)?;
    let mut attempt = Attempt { job, children: Vec::new(), phase: Phase::Running, asked: None, abandoned: false };
    for local in 0..attempt.job.options.local_processes {
        match Child::start(attempt.job, &meeting, local) {
            Ok(child) => attempt.children.push(child),
            Err(error) => {
                attempt.kill();
                attempt.wait();
                return Err(error);
            }
        }
    }
    attempt.wait();
    Ok(attempt.outcome())
}

impl Attempt<'_, '_> {
    fn wait(&mut self) {
        while !self.abandoned && self.living().next().is_some() {
            let until = match self.phase {
                // A number that never comes: `recv_deadline` has no "never".
                Phase::Running => Instant::now() + Duration::from_secs(3600),
                Phase::Settling { until } | Phase::Ending { until } | Phase::Killed { until } => until,
            };
            match self.job.events.1.recv_deadline(until) {
                Ok(Event::Ended(local)) => self.ended(local),
                Ok(Event::Signal(signal)) => self.pass_on(signal),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => self.time_is_up(),
            }
        }
    }

    fn living(&self) -> impl Iterator<Item = &Child> {
        self.children.iter().filter(|child| child.ended.is_none())
    }

    /// Whether those that ended accuse every process that is left.
    fn only_accused_left(&self) -> bool {
        let reports = || self.children.iter().filter_map(|child| child.ended.as_ref()?.report.as_ref());
        let accused = |rank| reports().any(|r| r.first_cause_rank == Some(rank) && r.rank != rank);
        self.living().all(|child| accused(child.rank))
    }

    fn ended(&mut self, local: usize) {
        let told = matches!(self.phase, Phase::Ending { .. } | Phase::Killed { .. });
        // An event of a process that failed to start completely names none.
        let Some(child) = self.children.get_mut(local) else { return };
        child.finish(self.job, told);
        child.ended.iter().filter(|ended| !ended.told).for_each(|ended| self.job.report(ended));
        let failed = child.ended.as_ref().is_some_and(|ended| ended.exit != Exit::Done);
        let now = Instant::now();
        if failed && self.phase == Phase::Running {
            // What the first process says is on the screen.
            if local > 0 {
                child.ended.iter().for_each(|ended| notice(&format!("rank {}: {}", ended.rank, ended.story())));
            }
            self.phase = Phase::Settling { until: now + self.job.options.failure_wait };
        }
        if let Phase::Settling { until } = self.phase
            && self.only_accused_left()
        {
            self.phase = Phase::Settling { until: until.min(now + ACCUSED_WAIT) };
        }
    }

    fn pass_on(&mut self, signal: u8) {
        if i32::from(signal) == SIGUSR1 {
            // Processes agree on the request, so one that is still starting needs no signal.
            return self.living().for_each(Child::signal_usr1);
        }
        if self.asked.is_some() && i32::from(signal) == SIGINT {
            notice("interrupted again: killing all processes");
            return self.kill();
        }
        self.asked.get_or_insert(signal);
        if let Some(signal) = Signal::from_named_raw(i32::from(signal)) {
            self.living().for_each(|child| child.signal(signal));
        }
        if matches!(self.phase, Phase::Running | Phase::Settling { .. }) {
            self.phase = Phase::Ending { until: Instant::now() + self.job.options.grace };
        }
    }

    fn time_is_up(&mut self) {
        let ranks: Vec<String> = self.living().map(|child| child.rank.to_string()).collect();
        let ranks = ranks.join(", ");
        match self.phase {
            Phase::Running => {}
            Phase::Settling { .. } if self.only_accused_left() => {
                notice(&format!("killing rank {ranks}: the others say that the failure was there"));
                self.kill();
            }
            Phase::Settling { .. } => {
                notice(&format!("telling rank {ranks} to end, {:?} after the failure", self.job.options.failure_wait));
                self.living().for_each(|child| child.signal(Signal::TERM));
                self.phase = Phase::Ending { until: Instant::now() + self.job.options.grace };
            }
            Phase::Ending { .. } => {
                notice(&format!("killing rank {ranks}: not ended {:?} after it was told to", self.job.options.grace));
                self.kill();
            }
            Phase::Killed { .. } => {
                notice(&format!("leaving rank {ranks} behind: killed {KILL_WAIT:?} ago, and the kernel keeps it"));
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
        let ended = |child: &Child| child.ended.clone().unwrap_or_else(|| Ended::told(child.rank, 9));
        let ended = self.children.iter().map(ended).collect();
        Outcome { ended, asked: self.asked, abandoned: self.abandoned, logs }
    }
}

impl Outcome {
    /// Shows the errors of processes that were not on the screen.
    pub(super) fn show_errors(&self) {
        for ((rank, lines, _), ended) in self.logs.iter().zip(&self.ended).skip(1) {
            if ended.exit != Exit::Done {
                lines.iter().for_each(|line| output::stderr().line(&format!("rank {rank}: {line}")));
            }
        }
    }

    /// What happened to a process, and where its log is.
    pub(super) fn describe(&self, ended: &Ended) -> String {
        let log = self.logs.iter().find(|(rank, ..)| *rank == ended.rank);
        let log = log.map_or(String::new(), |(.., path)| format!("; its log: {path}"));
        format!("rank {}: {}{log}", ended.rank, ended.story())
    }
}
