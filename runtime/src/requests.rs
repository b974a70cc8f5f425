//! Requests to a training process: save a checkpoint, or end. They come from signals, from the end time of a Slurm job, or from
//! the program.
//!
//! ```no_run
//! use shardflow::prelude::*;
//!
//! # fn program(plan: Plan) -> Result<Exit, Box<dyn std::error::Error>> {
//! let requests = Requests::on_signals()?; // first of all: process 1 of a container has no other way to end
//! let options = SessionOptions { requests: Some(requests.clone()), ..SessionOptions::default() };
//! let mut session = Session::start(plan, &options)?;
//! let deferred = requests.defer(); // before this, SIGTERM ends the process at once
//! for _ in 0..1000 {
//!     match session.step(&[], 1e-3)?.request {
//!         Request::Nothing => {}
//!         Request::Checkpoint => {} // save: all processes get this after the same step
//!         Request::End(exit) => return Ok(exit), // save, and end
//!     }
//! }
//! drop(deferred);
//! # Ok(Exit::Done)
//! # }
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, fs, io, thread};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use crate::exit::{Exit, own_rank, report};
use crate::output;

/// Slurm's variable with the time at which the job ends, Unix seconds.
const JOB_END_TIME: &str = "SLURM_JOB_END_TIME";
/// How long before that the training ends, besides the time of a step and of a save.
const MARGIN: Duration = Duration::from_secs(60);
/// How long a process that ends at once waits for the reader of its output.
const LAST_OUTPUT: Duration = Duration::from_millis(200);

/// A request, which takes effect after a step. All processes get the same one: the strongest that any process has received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Request {
    /// Continue.
    #[default]
    Nothing,
    /// Save a checkpoint and continue.
    Checkpoint,
    /// Save a checkpoint and end with this exit.
    End(Exit),
}

impl Request {
    /// As a number that processes exchange; a stronger request has a larger one.
    pub(crate) fn word(self) -> u64 {
        match self {
            Request::Nothing => 0,
            Request::Checkpoint => 1,
            Request::End(exit) => 0x100 | u64::from(exit.code()),
        }
    }

    pub(crate) fn from_word(word: u64) -> Self {
        match word {
            0 => Request::Nothing,
            1 => Request::Checkpoint,
            end => Request::End(Exit::from_code(end as u8)),
        }
    }

    fn or_stronger(self, other: Request) -> Request {
        if other.word() > self.word() { other } else { self }
    }
}

/// When a signal that ends the process takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    AtOnce,
    /// The program ends by itself, after the step.
    Deferred,
    /// The same, but at most this long after the signal.
    Within(Duration),
}

/// The end of the job's time, as durations since 1970.
#[derive(Clone, Copy, Debug)]
struct JobEnd {
    at: Duration,
    margin: Duration,
}

#[derive(Debug)]
struct State {
    pending: Request,
    on_usr1: Request,
    effect: Effect,
    job_end: Option<JobEnd>,
    /// How long a save takes.
    save: Duration,
}

/// Requests to this process. [`crate::session::SessionOptions::requests`] makes a session agree on them with all others.
#[derive(Debug)]
pub struct Requests {
    state: Mutex<State>,
}

impl Default for Requests {
    /// Only [`Requests::ask`] makes requests.
    fn default() -> Self {
        let (pending, on_usr1, effect) = (Request::Nothing, Request::Checkpoint, Effect::AtOnce);
        Self { state: Mutex::new(State { pending, on_usr1, effect, job_end: None, save: Duration::ZERO }) }
    }
}

/// While it lives, a signal ends the process after the step. Before and afterwards a signal ends it at once.
#[derive(Debug)]
pub struct Deferred<'a> {
    requests: &'a Requests,
}

impl Deferred<'_> {
    /// From now on a signal ends the process after at most `limit`: for work after the last step, which has no other limit.
    pub fn within(&self, limit: Duration) {
        let mut state = self.requests.lock();
        state.effect = Effect::Within(limit);
        if let Request::End(exit) = state.pending {
            end_after(limit, exit);
        }
    }
}

impl Drop for Deferred<'_> {
    fn drop(&mut self) {
        self.requests.lock().effect = Effect::AtOnce;
    }
}

impl Requests {
    /// Requests from signals, and from the end time of the Slurm job if there is one:
    ///
    /// - SIGTERM, SIGINT and SIGHUP end the process with 128 + n: at once, or under [`Requests::defer`] by [`Request::End`] after
    ///   the step. A SIGINT after one of them ends it at once. A signal that was ignored when the process started stays ignored
    ///   (`nohup`), except SIGTERM.
    /// - SIGUSR1 requests [`Request::Checkpoint`], or what [`Requests::set_on_usr1`] sets. It is ignored while there is no
    ///   training to save.
    /// - `SLURM_JOB_END_TIME` requests [`Request::End`] with [`Exit::Retry`] in time for a step, a save and a margin. A time in the
    ///   past is ignored: it belongs to another job.
    ///
    /// # Errors
    /// The handlers cannot be installed, or their thread not started.
    pub fn on_signals() -> io::Result<Arc<Self>> {
        let requests = Arc::new(Self::default());
        let end = env::var(JOB_END_TIME).ok().and_then(|text| text.parse().ok()).map(Duration::from_secs);
        requests.lock().job_end = end.filter(|end| *end > since_1970()).map(|at| JobEnd { at, margin: MARGIN });
        let mut signals = signal_hook::iterator::Signals::new(not_ignored(&[SIGTERM, SIGUSR1], &[SIGINT, SIGHUP]))?;
        let own = requests.clone();
        let run = move || signals.forever().for_each(|signal| own.signal(signal));
        thread::Builder::new().name("signals".into()).spawn(run)?;
        Ok(requests)
    }

    /// Sets what SIGUSR1 requests.
    pub fn set_on_usr1(&self, request: Request) {
        self.lock().on_usr1 = request;
    }

    /// Sets how long before the end of a Slurm job's time the training ends, besides the time of a step and of a save.
    pub fn set_job_end_margin(&self, margin: Duration) {
        self.lock().job_end.iter_mut().for_each(|end| end.margin = margin);
    }

    /// Sets the time that a save takes, such as that of the last one.
    pub fn set_save_time(&self, time: Duration) {
        self.lock().save = time;
    }

    /// Until the guard is dropped, the program handles requests between steps.
    pub fn defer(&self) -> Deferred<'_> {
        self.lock().effect = Effect::Deferred;
        Deferred { requests: self }
    }

    /// Makes a request, which takes effect after the running step or the next one.
    pub fn ask(&self, request: Request) {
        let mut state = self.lock();
        state.pending = state.pending.or_stronger(request);
    }

    /// The request to this process that is not handled yet.
    pub fn pending(&self) -> Request {
        self.lock().pending
    }

    /// As [`Requests::pending`], with the end of the job's time taken into account; a step takes this long.
    pub(crate) fn before_step(&self, step: Duration, now: Duration) -> Request {
        let mut state = self.lock();
        let left = state.save + step;
        if state.job_end.is_some_and(|end| now + left + end.margin >= end.at) {
            state.pending = state.pending.or_stronger(Request::End(Exit::Retry));
        }
        state.pending
    }

    /// All processes have agreed on `request`. It handles a pending request for a checkpoint, also one that arrived during the
    /// step: the save that follows holds the newest state. A request to end stays, on every process.
    pub(crate) fn agreed(&self, request: Request) {
        let mut state = self.lock();
        match request {
            Request::Nothing => {}
            Request::Checkpoint if state.pending == Request::Checkpoint => state.pending = Request::Nothing,
            _ => state.pending = state.pending.or_stronger(request),
        }
    }

    fn signal(&self, signal: i32) {
        let mut state = self.lock();
        let request = match signal {
            SIGUSR1 => state.on_usr1,
            _ => Request::End(Exit::Signal(signal as u8)),
        };
        let again = signal == SIGINT && matches!(state.pending, Request::End(_));
        match (state.effect, request) {
            (Effect::AtOnce, Request::End(exit)) => end_now(exit),
            (Effect::AtOnce, _) => return,
            (_, Request::End(exit)) if again => end_now(exit),
            (Effect::Within(limit), Request::End(exit)) => end_after(limit, exit),
            _ => {}
        }
        state.pending = state.pending.or_stronger(request);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn end_after(limit: Duration, exit: Exit) {
    let late = move || {
        thread::sleep(limit);
        end_now(exit)
    };
    // Without the thread the program still ends after its work.
    drop(thread::Builder::new().name("deadline".into()).spawn(late));
}

/// Ends the process without running exit handlers, which may wait for threads that do not end.
fn end_now(exit: Exit) -> ! {
    if exit == Exit::Retry {
        // The launcher must not restart it.
        let _ = report(exit, "ended on request, outside of the training", Some(own_rank()));
    }
    // A live line of progress has no end, and a shell's prompt would follow it.
    output::stdout().end_line();
    output::finish(Some(LAST_OUTPUT));
    signal_hook::low_level::exit(i32::from(exit.code()))
}

/// The present, since 1970.
pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// `always`, and those of the signals `others` that the process did not ignore when it started, as under `nohup`.
pub(crate) fn not_ignored<'a>(always: &'a [i32], others: &'a [i32]) -> impl Iterator<Item = i32> + 'a {
    let ignored = signal_mask("self", "SigIgn:");
    always.iter().chain(others.iter().filter(move |signal| ignored >> (*signal - 1) & 1 == 0)).copied()
}

/// A set of signals of a process, from `/proc`; bit n - 1 stands for signal n. Empty when the kernel does not state it.
pub(crate) fn signal_mask(process: &str, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix(name));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_back_and_the_stronger_wins() {
        let term = Request::End(Exit::Signal(15));
        let all = [Request::Nothing, Request::Checkpoint, Request::End(Exit::Retry), term];
        assert!(all.iter().all(|request| Request::from_word(request.word()) == *request));
        assert!(all.windows(2).all(|pair| pair[0].word() < pair[1].word()));
        let requests = Requests::default();
        requests.ask(term);
        requests.ask(Request::Checkpoint);
        assert_eq!(requests.pending(), term);
        // What no process sends is an end, too.
        assert_eq!(Request::from_word(u64::MAX), Request::End(Exit::Other(255)));
    }

    #[test]
    fn a_checkpoint_is_answered_once_and_an_end_stays() {
        let requests = Requests::default();
        let _deferred = requests.defer();
        let before_step = || requests.before_step(Duration::ZERO, Duration::ZERO);
        requests.signal(SIGUSR1);
        assert_eq!(before_step(), Request::Checkpoint);
        requests.agreed(Request::Nothing);
        assert_eq!(before_step(), Request::Checkpoint, "asked after the others had answered");
        requests.agreed(Request::Checkpoint);
        assert_eq!(before_step(), Request::Nothing);
        requests.signal(SIGTERM);
        requests.agreed(Request::End(Exit::Signal(15)));
        assert_eq!(before_step(), Request::End(Exit::Signal(15)));
    }

    #[test]
    fn usr1_means_what_is_set() {
        let requests = Requests::default();
        requests.signal(SIGUSR1);
        assert_eq!(requests.pending(), Request::Nothing, "there is nothing to save before the training");
        requests.set_on_usr1(Request::End(Exit::Retry));
        let _deferred = requests.defer();
        requests.signal(SIGUSR1);
        assert_eq!(requests.pending(), Request::End(Exit::Retry));
    }

    #[test]
    fn a_job_ends_a_step_a_save_and_a_margin_before_its_time() {
        let requests = Requests::default();
        let seconds = Duration::from_secs;
        requests.lock().job_end = Some(JobEnd { at: seconds(1000), margin: MARGIN });
        requests.set_save_time(seconds(20));
        assert_eq!(requests.before_step(seconds(5), seconds(914)), Request::Nothing);
        assert_eq!(requests.before_step(seconds(6), seconds(914)), Request::End(Exit::Retry));
        let other = Requests::default();
        other.lock().job_end = Some(JobEnd { at: seconds(1000), margin: MARGIN });
        other.set_job_end_margin(seconds(1));
        assert_eq!(other.before_step(seconds(0), seconds(998)), Request::Nothing);
        assert_eq!(other.before_step(seconds(0), seconds(999)), Request::End(Exit::Retry));
    }
}
