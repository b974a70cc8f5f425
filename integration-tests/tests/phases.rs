//! Four processes under `shardflow launch`, one of which is killed or frozen in the middle of forward, backward, a collective
//! or the update; or their launcher is. They go on from the last commit, with the losses of an undisturbed run. The program
//! is `dies`, of this crate.

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
/// Longer than any of these runs, by far.
const TIMEOUT: Duration = Duration::from_secs(90);
/// What is asked for.
const NEXT_STEP_WITHIN: f64 = 10.0;
const FREEZE_NOTICED_WITHIN: f64 = 5.0;
const NO_CHILD_AFTER: Duration = Duration::from_secs(5);

/// A launcher that runs, and the lines that it writes, each with the time.
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
        assert!(launcher.is_file(), "{} is not there: build the workspace, not this package alone", launcher.display());
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

    /// Reads to the end; gives the exit code, and what was said when.
    fn end(mut self) -> (Option<i32>, Vec<(u64, String)>) {
        let (deadline, mut said) = (Instant::now() + TIMEOUT, Vec::new());
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            said.push(line);
        }
        assert!(Instant::now() < deadline, "did not end: {said:?}");
        (self.child.wait().expect("a child that ends").code(), said)
    }
}

/// What the log of a run says, over all its restarts.
#[derive(Debug, Default)]
struct Log {
    /// Bits of the losses; a step that was done twice came out the same.
    losses: BTreeMap<u64, u32>,
    /// When each step was done, in the order of the log.
    done: Vec<(u64, u64)>,
    /// Where each start went on, with how many steps stood before it.
    from: Vec<(u64, usize)>,
    /// Last step that was known to be committed before the last start.
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
                assert!(before.is_none_or(|before| before == loss), "step {} came out differently", words[1]);
                log.done.push((number(1), number(3)));
            }
            _ => committed = number(1),
        }
    }
    log
}

/// The losses of a run that nothing disturbs.
fn undisturbed() -> &'static BTreeMap<u64, u32> {
    static LOSSES: OnceLock<BTreeMap<u64, u32>> = OnceLock::new();
    LOSSES.get_or_init(|| {
        let folder = Scratch::new("phases-undisturbed");
        let (code, said) = Running::start(folder.path(), None).end();
        assert_eq!(code, Some(0), "{said:?}");
        read_log(folder.path()).losses
    })
}

fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    to_ns.saturating_sub(from_ns) as f64 * 1e-9
}

/// When who died, as the one that did has written.
fn died(folder: &Path) -> Option<(u64, String)> {
    let text = std::fs::read_to_string(folder.join("died")).ok()?;
    Some((text.split(' ').next()?.parse().ok()?, text))
}

/// Any process whose working folder is this one.
fn anybody_in(folder: &Path) -> bool {
    let here = folder.canonicalize().expect("it is there");
    let all = std::fs::read_dir("/proc").expect("Linux").flatten();
    all.into_iter().any(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == here))
}

/// Waits for the launcher's death in the phase; its processes must be gone soon.
fn launcher_dies(folder: &Path, launcher: Running) -> f64 {
    let (code, said) = launcher.end();
    assert_eq!(code, None, "the launcher was killed: {said:?}");
    let (died, _) = died(folder).expect("who killed it has said so");
    let deadline = Instant::now() + NO_CHILD_AFTER;
    while anybody_in(folder) {
        assert!(Instant::now() < deadline, "a child is there {NO_CHILD_AFTER:?} after the launcher's death");
        thread::yield_now();
    }
    seconds(died, unix_ns())
}

/// What one case took, in seconds.
#[derive(Debug, Default)]
struct Took {
    next_step: f64,
    /// Until a frozen process was named, or until no child was left of a launcher that was killed.
    noticed: Option<f64>,
}

fn check(who: &str, rank: u32, step: u64, phase: &str) -> Took {
    let case = format!("{who} {rank} {step} {phase}");
    let folder = Scratch::new(&format!("phases-{}", case.replace(' ', "-")));
    let folder = folder.path();
    let running = Running::start(folder, Some(&case));
    let mut took = Took::default();
    let again = if who == "LAUNCHER" {
        took.noticed = Some(launcher_dies(folder, running));
        Running::start(folder, Some(&case))
    } else {
        running
    };
    let (code, said) = again.end();
    assert_eq!(code, Some(0), "{case}: {said:#?}");
    let (died, where_) = died(folder).unwrap_or_else(|| panic!("{case}: nobody died"));
    let in_phase = match phase {
        "collective" => where_.contains(" all_reduce"),
        phase => where_.contains(&format!(" {phase} ")),
    };
    assert!(in_phase, "{case}: died in {where_}");
    let log = read_log(folder);
    assert!(log.losses == *undisturbed(), "{case}: other losses than an undisturbed run");
    let [(0, 0), (from, before)] = log.from[..] else { panic!("{case}: started at {:?}", log.from) };
    let committed = log.committed;
    assert!(from >= committed && from > 0 && from <= step, "{case}: went on from {from}, committed were {committed}");
    assert_eq!(log.done[before].0, from, "{case}: the first step after the start");
    // Another process may have ended its part of the step while this one is at its update.
    let done_max = if phase == "update" { step } else { step - 1 };
    assert!(log.done[..before].iter().all(|(done, _)| *done <= done_max), "{case}: step {step} was done before");
    took.next_step = seconds(died, log.done[before].1);
    assert!(took.next_step < NEXT_STEP_WITHIN, "{case}: next step after {:.1} s: {said:#?}", took.next_step);
    if who == "STOP" {
        let named = said.iter().find(|(_, line)| line.contains(&format!("rank {rank}")));
        let (named, _) = named.unwrap_or_else(|| panic!("{case}: not named in {said:#?}"));
        let noticed = seconds(died, *named);
        assert!(noticed < FREEZE_NOTICED_WITHIN, "{case}: noticed after {noticed:.1} s: {said:#?}");
        took.noticed = Some(noticed);
    }
    println!("{case:<26} next step after {:.2} s, noticed {:.2?}", took.next_step, took.noticed);
    took
}

/// The longest times of all.
fn worst(all: &[Took]) -> String {
    let max = |times: &mut dyn Iterator<Item = f64>| times.fold(0.0, f64::max);
    let next = max(&mut all.iter().map(|took| took.next_step));
    let noticed = max(&mut all.iter().filter_map(|took| took.noticed));
    format!("{} of {}: next step after {next:.2} s at most, noticed after {noticed:.2} s at most", all.len(), all.len())
}

#[test]
fn who_dies_in_any_phase_is_survived() {
    for (rank, phase) in [1, 2, 3, 0].into_iter().zip(PHASES) {
        check("KILL", rank, 13, phase);
    }
    check("STOP", 2, 14, "collective");
    check("LAUNCHER", 1, 14, "backward");
}

/// Each phase five times, every rank among them; takes some minutes.
fn soak(who: &str, rank: impl Fn(u32) -> u32) {
    let mut all = Vec::new();
    for phase in PHASES {
        for step in 12..17 {
            all.push(check(who, rank(all.len() as u32), step, phase));
        }
    }
    println!("{who}, {}", worst(&all));
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
