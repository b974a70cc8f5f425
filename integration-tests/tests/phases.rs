//! Four processes run under `shardflow launch`. One process, or the launcher, is killed or frozen in the middle of
//! forward, backward, a collective or the update. The job resumes from the last commit and has the losses of an
//! undisturbed run. The program is `dies` of this crate.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use shardflow::exit::unix_ns;
use shardflow_integration_tests::training::Scratch;

const DIES: &str = env!("CARGO_BIN_EXE_dies");
const PROCESSES: u32 = 4;
const PHASES: [&str; 4] = ["forward", "backward", "collective", "update"];
/// Much longer than any of these runs.
const TIMEOUT: Duration = Duration::from_secs(90);
/// Time limits of the cases in seconds.
const NEXT_STEP_WITHIN: f64 = 10.0;
const FREEZE_NOTICED_WITHIN: f64 = 5.0;
const NO_CHILD_AFTER: Duration = Duration::from_secs(5);

/// A running launcher, and its lines of output with their times.
struct Running {
    child: Child,
    lines: Receiver<(u64, String)>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(folder: &Path, dies: Option<&str>) -> Self {
        // Cargo puts the programs of all packages into one folder.
        let launcher = Path::new(DIES).with_file_name("shardflow");
        assert!(
            launcher.is_file(),
            "{} does not exist: build the workspace, not only this package",
            launcher.display()
        );
        let mut command = Command::new(launcher);
        command.args(["launch", "--nproc-per-node=4", "--max-restarts=1", "--", DIES]).current_dir(folder);
        command.envs(dies.map(|dies| ("DIES", dies)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a program that was built");
        let (sender, lines) = channel();
        let read = |pipe: Box<dyn Read + Send>| {
            let sender = sender.clone();
            let lines = BufReader::new(pipe).lines().map_while(Result::ok);
            thread::spawn(move || lines.into_iter().try_for_each(|line| sender.send((unix_ns(), line))));
        };
        read(Box::new(child.stdout.take().expect("piped")));
        read(Box::new(child.stderr.take().expect("piped")));
        Self { child, lines }
    }

    /// Reads to the end. Returns the exit code, and the lines with their times.
    fn wait(mut self) -> (Option<i32>, Vec<(u64, String)>) {
        let (deadline, mut lines) = (Instant::now() + TIMEOUT, Vec::new());
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            lines.push(line);
        }
        assert!(Instant::now() < deadline, "the launcher did not end: {lines:?}");
        (self.child.wait().expect("a child that ends").code(), lines)
    }
}

/// The log of a run, over all its restarts.
#[derive(Debug, Default)]
struct Log {
    /// Bits of the losses by step. A step that is repeated after a restart must have the same loss.
    losses: BTreeMap<u64, u32>,
    /// Steps and their times, in the order of the log.
    done: Vec<(u64, u64)>,
    /// For each start of the job, the step from which it resumed, and the number of steps in the log at that time.
    from: Vec<(u64, usize)>,
    /// The last step that the log reports as committed before the last start.
    committed: u64,
}

fn read_log(folder: &Path) -> Log {
    let (mut log, mut committed) = (Log::default(), 0);
    for line in std::fs::read_to_string(folder.join("log")).expect("a log").lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: usize| words[word].parse::<u64>().unwrap_or_else(|e| panic!("{line}: {e}"));
        match words[0] {
            "from" => {
                log.from.push((number(1), log.done.len()));
                log.committed = committed;
            }
            "step" => {
                let loss = number(2) as u32;
                let before = log.losses.insert(number(1), loss);
                assert!(before.is_none_or(|before| before == loss), "step {} has two losses", words[1]);
                log.done.push((number(1), number(3)));
            }
            _ => committed = number(1),
        }
    }
    log
}

/// Returns the losses of an undisturbed run.
fn undisturbed() -> &'static BTreeMap<u64, u32> {
    static LOSSES: OnceLock<BTreeMap<u64, u32>> = OnceLock::new();
    LOSSES.get_or_init(|| {
        let folder = Scratch::new("phases-undisturbed");
        let (code, lines) = Running::start(folder.path(), None).wait();
        assert_eq!(code, Some(0), "{lines:?}");
        read_log(folder.path()).losses
    })
}

fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 * 1e-9
}

/// Returns the time of the death and the whole text from the file `died`.
fn read_death(folder: &Path) -> Option<(u64, String)> {
    let text = std::fs::read_to_string(folder.join("died")).ok()?;
    Some((text.split(' ').next()?.parse().ok()?, text))
}

/// Returns whether any process has this working folder.
fn has_process_in(folder: &Path) -> bool {
    let here = folder.canonicalize().expect("the folder");
    let all = std::fs::read_dir("/proc").expect("Linux").flatten();
    all.into_iter().any(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == here))
}

/// Waits for the death of the launcher, then for the end of its processes. Returns the seconds between the two.
fn launcher_dies(folder: &Path, launcher: Running) -> f64 {
    let (code, lines) = launcher.wait();
    assert_eq!(code, None, "the launcher was not killed: {lines:?}");
    let (died, _) = read_death(folder).expect("the process that killed it has written the file");
    let deadline = Instant::now() + NO_CHILD_AFTER;
    while has_process_in(folder) {
        assert!(Instant::now() < deadline, "a child is still running {NO_CHILD_AFTER:?} after the launcher's death");
        thread::yield_now();
    }
    seconds(died, unix_ns())
}

/// Times of one case, in seconds.
#[derive(Debug, Default)]
struct CaseTimes {
    next_step: f64,
    /// Seconds until a frozen process was reported, or until the last child of a killed launcher ended.
    noticed: Option<f64>,
}

fn check(target: &str, rank: u32, step: u64, phase: &str) -> CaseTimes {
    let case = format!("{target} {rank} {step} {phase}");
    let folder = Scratch::new(&format!("phases-{}", case.replace(' ', "-")));
    let folder = folder.path();
    let running = Running::start(folder, Some(&case));
    let mut times = CaseTimes::default();
    let again = if target == "LAUNCHER" {
        times.noticed = Some(launcher_dies(folder, running));
        Running::start(folder, Some(&case))
    } else {
        running
    };
    let (code, lines) = again.wait();
    assert_eq!(code, Some(0), "{case}: {lines:#?}");
    let (died, location) = read_death(folder).unwrap_or_else(|| panic!("{case}: no process died"));
    let in_phase = match phase {
        "collective" => location.contains(" all_reduce"),
        phase => location.contains(&format!(" {phase} ")),
    };
    assert!(in_phase, "{case}: died in {location}");
    let log = read_log(folder);
    assert!(log.losses == *undisturbed(), "{case}: the losses differ from an undisturbed run");
    let [(0, 0), (from, before)] = log.from[..] else { panic!("{case}: expected two starts, got {:?}", log.from) };
    let committed = log.committed;
    assert!(from >= committed && from > 0 && from <= step, "{case}: resumed from step {from} after commit {committed}");
    assert_eq!(log.done[before].0, from, "{case}: the first step after the restart differs");
    // Another process may finish the step while the victim is in its update.
    let done_max = if phase == "update" { step } else { step - 1 };
    assert!(
        log.done[..before].iter().all(|(done, _)| *done <= done_max),
        "{case}: step {step} was done before the death"
    );
    times.next_step = seconds(died, log.done[before].1);
    assert!(times.next_step < NEXT_STEP_WITHIN, "{case}: next step after {:.1} s: {lines:#?}", times.next_step);
    if target == "STOP" {
        let reported = lines.iter().find(|(_, line)| line.contains(&format!("rank {rank}")));
        let (reported, _) = reported.unwrap_or_else(|| panic!("{case}: no report in {lines:#?}"));
        let noticed = seconds(died, *reported);
        assert!(noticed < FREEZE_NOTICED_WITHIN, "{case}: reported after {noticed:.1} s: {lines:#?}");
        times.noticed = Some(noticed);
    }
    println!("{case:<26} next step after {:.2} s, noticed {:.2?}", times.next_step, times.noticed);
    times
}

/// Formats the longest time of each kind.
fn worst(all: &[CaseTimes]) -> String {
    let max = |times: &mut dyn Iterator<Item = f64>| times.fold(0.0, f64::max);
    let next = max(&mut all.iter().map(|times| times.next_step));
    let noticed = max(&mut all.iter().filter_map(|times| times.noticed));
    format!("{} cases: next step after {next:.2} s at most, noticed after {noticed:.2} s at most", all.len())
}

#[test]
fn a_death_in_any_phase_is_survived() {
    for (rank, phase) in [1, 2, 3, 0].into_iter().zip(PHASES) {
        check("KILL", rank, 13, phase);
    }
    check("STOP", 2, 14, "collective");
    check("LAUNCHER", 1, 14, "backward");
}

/// Runs each phase five times, with a different rank each time. This takes some minutes.
fn soak(target: &str, rank: impl Fn(u32) -> u32) {
    let mut all = Vec::new();
    for phase in PHASES {
        for step in 12..17 {
            all.push(check(target, rank(all.len() as u32), step, phase));
        }
    }
    println!("{target}, {}", worst(&all));
}

#[test]
#[ignore = "takes minutes: run by hand"]
fn soak_of_workers_killed() {
    soak("KILL", |case| case % PROCESSES);
}

#[test]
#[ignore = "takes minutes: run by hand"]
fn soak_of_workers_frozen() {
    soak("STOP", |case| case % PROCESSES);
}

#[test]
#[ignore = "takes minutes: run by hand"]
fn soak_of_the_coordinator_killed() {
    soak("KILL", |_| 0);
}

#[test]
#[ignore = "takes minutes: run by hand"]
fn soak_of_the_coordinator_frozen() {
    soak("STOP", |_| 0);
}

#[test]
#[ignore = "takes minutes: run by hand"]
fn soak_of_the_launcher_killed() {
    soak("LAUNCHER", |case| case % PROCESSES);
}
