//! Requests to save a checkpoint or to end, from signals, Slurm's end time or the program: `docs/guide/signals.md`.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, fs, io, thread};

use parking_lot::Mutex;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};

use crate::departure::report;
use crate::exit::{Exit, own_rank};
use crate::output;

/// Slurm's variable with the job's end time, in Unix seconds.
const JOB_END_TIME: &str = "SLURM_JOB_END_TIME";
/// The training ends earlier than the job's end time, by this margin plus the time of a step and a save.
const MARGIN: Duration = Duration::from_secs(60);
/// How long a process that ends immediately waits until its output is read.
const OUTPUT_TIMEOUT: Duration = Duration::from_millis(200);

/// A request takes effect after a step. All processes apply the same request: the strongest one that any has received.
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
    /// The number for this request in messages between processes. A stronger request has a larger number.
    pub fn code(self) -> u64 {
        match self {
            Request::Nothing => 0,
            Request::Checkpoint => 1,
            Request::End(exit) => 0x100 | u64::from(exit.code()),
        }
    }

    /// The inverse of [`Request::code`].
    pub fn from_code(code: u64) -> Self {
        match code {
            0 => Request::Nothing,
            1 => Request::Checkpoint,
            end => Request::End(Exit::from_code(end as u8)),
        }
    }

    fn or_stronger(self, other: Request) -> Request {
        if other.code() > self.code() { other } else { self }
    }
}

/// When a signal that ends the process takes effect: immediately, or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    AtOnce,
    /// The program ends after the step.
    Deferred,
    /// The program ends after the step, but at most this long after the signal.
    Within(Duration),
}

#[derive(Debug)]
struct State {
    pending: Request,
    on_usr1: Request,
    effect: Effect,
    /// The job's end as Unix time. The training ends earlier, by `margin` plus the time of a step and a save.
    job_end: Option<Duration>,
    margin: Duration,
    save: Duration,
}

/// Requests to this process. In a session with the option `requests`, all processes agree on each request.
#[derive(Debug)]
pub struct Requests {
    state: Mutex<State>,
}

impl Default for Requests {
    /// Creates the requests without signal handlers. Then only [`Requests::submit`] makes requests.
    fn default() -> Self {
        let (pending, on_usr1, effect) = (Request::Nothing, Request::Checkpoint, Effect::AtOnce);
        Self {
            state: Mutex::new(State { pending, on_usr1, effect, job_end: None, margin: MARGIN, save: Duration::ZERO }),
        }
    }
}

/// A guard. While it exists, a signal to end takes effect after the step. Without a guard, it takes effect immediately.
#[derive(Debug)]
pub struct Deferred<'a> {
    requests: &'a Requests,
}

impl Deferred<'_> {
    /// Call this before work that follows the last step. From then on, a signal ends the process after at most `limit`.
    pub fn within(&self, limit: Duration) {
        let mut state = self.requests.state.lock();
        state.effect = Effect::Within(limit);
        if let Request::End(exit) = state.pending {
            end_after(limit, exit);
        }
    }
}

impl Drop for Deferred<'_> {
    fn drop(&mut self) {
        self.requests.state.lock().effect = Effect::AtOnce;
    }
}

impl Requests {
    /// Installs signal handlers, and watches the Slurm job's end time if there is one:
    ///
    /// - SIGTERM, SIGINT and SIGHUP end the process with exit code 128 + n. By default the end is immediate. Under
    ///   [`Requests::defer`] it follows the step, as a [`Request::End`]. A SIGINT after any of these signals ends the
    ///   process immediately. SIGINT and SIGHUP stay ignored if they were ignored at the start (`nohup`).
    /// - SIGUSR1 requests [`Request::Checkpoint`], or the request set by [`Requests::set_on_usr1`]. Outside of
    ///   [`Requests::defer`] it is ignored, because there is no training to save.
    /// - SIGXFSZ does not end the process. So a write beyond the file size limit fails with an error instead.
    /// - `SLURM_JOB_END_TIME` requests [`Request::End`] with [`Exit::Retry`], early enough for a step, a save and a
    ///   margin. A time in the past is ignored, because it belongs to another job.
    ///
    /// `program::run` calls this first. Later calls return the same requests.
    pub fn on_signals() -> io::Result<Arc<Self>> {
        static INSTALLED: Mutex<Option<Arc<Requests>>> = Mutex::new(None);
        let mut installed = INSTALLED.lock();
        if let Some(requests) = &*installed {
            return Ok(requests.clone());
        }
        let requests = Arc::new(Self::default());
        let end = env::var(JOB_END_TIME).ok().and_then(|text| text.parse().ok()).map(Duration::from_secs);
        requests.state.lock().job_end = end.filter(|end| *end > since_1970());
        let own = requests.clone();
        on_each_signal(&[SIGTERM, SIGUSR1, SIGXFSZ], &[SIGINT, SIGHUP], move |signal| own.signal(signal))?;
        Ok(installed.insert(requests).clone())
    }

    /// Sets the request that SIGUSR1 makes.
    pub fn set_on_usr1(&self, request: Request) {
        self.state.lock().on_usr1 = request;
    }

    /// Sets the margin. The training ends before a Slurm job does, by the margin plus the time of a step and a save.
    pub fn set_job_end_margin(&self, margin: Duration) {
        self.state.lock().margin = margin;
    }

    /// Sets the expected duration of a save, for example that of the last save.
    pub fn set_save_time(&self, time: Duration) {
        self.state.lock().save = time;
    }

    /// Defers requests until the guard is dropped. The program handles them between steps.
    pub fn defer(&self) -> Deferred<'_> {
        self.state.lock().effect = Effect::Deferred;
        Deferred { requests: self }
    }

    /// Makes a request. It takes effect after the current step, or after the next one.
    pub fn submit(&self, request: Request) {
        let mut state = self.state.lock();
        state.pending = state.pending.or_stronger(request);
    }

    /// The pending request of this process.
    pub fn pending(&self) -> Request {
        self.state.lock().pending
    }

    /// The pending request, or the one that the job's end time requires. `now` is the Unix time; a step takes `step`.
    pub fn before_step(&self, step: Duration, now: Duration) -> Request {
        let mut state = self.state.lock();
        let left = state.save.saturating_add(step).saturating_add(state.margin);
        if state.job_end.is_some_and(|end| now.saturating_add(left) >= end) {
            state.pending = state.pending.or_stronger(Request::End(Exit::Retry));
        }
        state.pending
    }

    /// Applies the request that all processes agreed on. `Checkpoint` clears a pending checkpoint request, even one
    /// that arrived during the step: the save that follows contains the newest state. A pending end stays pending.
    pub fn agreed(&self, request: Request) {
        let mut state = self.state.lock();
        match request {
            Request::Checkpoint if state.pending == Request::Checkpoint => state.pending = Request::Nothing,
            Request::Nothing | Request::Checkpoint => {}
            Request::End(_) => state.pending = state.pending.or_stronger(request),
        }
    }

    fn signal(&self, signal: i32) {
        let mut state = self.state.lock();
        let request = match signal {
            SIGXFSZ => return,
            SIGUSR1 => state.on_usr1,
            _ => Request::End(Exit::Signal(signal as u8)),
        };
        let is_second = signal == SIGINT && matches!(state.pending, Request::End(_));
        match (state.effect, request) {
            (Effect::AtOnce, Request::End(exit)) => end_now(exit),
            (Effect::AtOnce, _) => return,
            (_, Request::End(exit)) if is_second => end_now(exit),
            (Effect::Within(limit), Request::End(exit)) => end_after(limit, exit),
            _ => {}
        }
        state.pending = state.pending.or_stronger(request);
    }
}

fn end_after(limit: Duration, exit: Exit) {
    let late = move || {
        thread::sleep(limit);
        end_now(exit)
    };
    // If the thread cannot start, the program still ends when its work is done.
    drop(thread::Builder::new().name("deadline".into()).spawn(late));
}

/// Ends the process without its exit handlers, which may wait for threads that do not end.
fn end_now(exit: Exit) -> ! {
    if exit == Exit::Retry {
        // Because of this report, the launcher does not restart this process.
        let _ = report(exit, "ended on request, outside of the training", Some(own_rank()));
    }
    // A live progress line has no line end. Without one, the shell's prompt would follow on the same line.
    output::stdout().end_line();
    output::finish(Some(OUTPUT_TIMEOUT));
    signal_hook::low_level::exit(i32::from(exit.code()))
}

/// The current Unix time.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Starts a thread that calls `handle` for each signal in `always`, and for each signal in `others`. Signals in
/// `others` that were ignored when the process started (`nohup`) stay ignored.
pub(crate) fn on_each_signal(
    always: &[i32],
    others: &[i32],
    handle: impl FnMut(i32) + Send + 'static,
) -> io::Result<()> {
    let ignored = signal_mask("self", "SigIgn:");
    let others = others.iter().filter(|signal| ignored >> (*signal - 1) & 1 == 0);
    let mut signals = signal_hook::iterator::Signals::new(always.iter().chain(others))?;
    let run = move || signals.forever().for_each(handle);
    thread::Builder::new().name("signals".into()).spawn(run).map(drop)
}

/// Reads a signal set from `/proc/<process>/status`. Bit n - 1 is signal n. Empty if the file cannot be read.
pub fn signal_mask(process: &str, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix(name));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_do_not_overflow() {
        let requests = Requests::default();
        requests.set_job_end_margin(Duration::MAX);
        requests.set_save_time(Duration::MAX);
        requests.state.lock().job_end = Some(Duration::from_secs(800));
        assert_eq!(requests.before_step(Duration::MAX, Duration::from_secs(1)), Request::End(Exit::Retry));
    }

    #[test]
    fn requests_survive_the_exchange_and_the_stronger_wins() {
        let term = Request::End(Exit::Signal(15));
        let [done, retry, int] = [Exit::Done, Exit::Retry, Exit::Signal(2)].map(Request::End);
        let all = [Request::Nothing, Request::Checkpoint, done, retry, int, term];
        assert!(all.iter().all(|request| Request::from_code(request.code()) == *request));
        assert!(all.windows(2).all(|pair| pair[0].code() < pair[1].code()));
        let requests = Requests::default();
        requests.submit(term);
        requests.submit(Request::Checkpoint);
        assert_eq!(requests.pending(), term);
        // No process sends this number. It is decoded as an end.
        assert_eq!(Request::from_code(u64::MAX), Request::End(Exit::Other(255)));
    }

    #[test]
    fn a_checkpoint_request_is_handled_once_and_an_end_stays_pending() {
        let requests = Requests::default();
        let _deferred = requests.defer();
        let before_step = || requests.before_step(Duration::ZERO, Duration::ZERO);
        requests.signal(SIGUSR1);
        assert_eq!(before_step(), Request::Checkpoint);
        requests.agreed(Request::Nothing);
        assert_eq!(before_step(), Request::Checkpoint, "requested after the other processes had answered");
        requests.agreed(Request::Checkpoint);
        assert_eq!(before_step(), Request::Nothing);
        requests.signal(SIGTERM);
        requests.agreed(Request::End(Exit::Signal(15)));
        assert_eq!(before_step(), Request::End(Exit::Signal(15)));
        requests.agreed(Request::Checkpoint);
        assert_eq!(before_step(), Request::End(Exit::Signal(15)), "a save does not clear an end");
        let other = Requests::default();
        other.agreed(Request::Checkpoint);
        assert_eq!(other.pending(), Request::Nothing, "the save that follows answers the other process's request");
        other.agreed(Request::End(Exit::Signal(15)));
        assert_eq!(other.pending(), Request::End(Exit::Signal(15)), "another process received the signal");
    }

    #[test]
    fn usr1_makes_the_configured_request() {
        let requests = Requests::default();
        requests.signal(SIGUSR1);
        assert_eq!(requests.pending(), Request::Nothing, "no training runs yet");
        requests.set_on_usr1(Request::End(Exit::Retry));
        let _deferred = requests.defer();
        requests.signal(SIGUSR1);
        assert_eq!(requests.pending(), Request::End(Exit::Retry));
    }

    #[test]
    fn training_ends_a_step_a_save_and_a_margin_before_the_job_does() {
        let requests = Requests::default();
        let seconds = Duration::from_secs;
        requests.state.lock().job_end = Some(seconds(1000));
        requests.set_save_time(seconds(20));
        assert_eq!(requests.before_step(seconds(5), seconds(914)), Request::Nothing);
        assert_eq!(requests.before_step(seconds(6), seconds(914)), Request::End(Exit::Retry));
        let other = Requests::default();
        other.state.lock().job_end = Some(seconds(1000));
        other.set_job_end_margin(seconds(1));
        assert_eq!(other.before_step(seconds(0), seconds(998)), Request::Nothing);
        assert_eq!(other.before_step(seconds(0), seconds(999)), Request::End(Exit::Retry));
    }
}
