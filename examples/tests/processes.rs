//! `gpt` as several processes under `shardflow launch`: the same bits as in one process, whatever carries them; processes that
//! are killed, frozen or asked to end. Imports `support/programs`.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use programs::{Folder, GPT, Running, launcher, signal};

#[path = "support/programs.rs"]
mod programs;

/// Longer than any of these runs, by far.
const TIMEOUT: Duration = Duration::from_secs(150);
const MODEL: &str = "--layers 4 --heads 4 --width 32 --context 16 --batch 8 --sample 0 --threads-per-device 1 --data text \
                     --micro-batches 2";

/// Starts `gpt` as so many processes; 0 is without a launcher.
fn start(folder: &Folder, processes: u32, launch: &str, environment: &[(&str, &str)], flags: &str) -> Running {
    let mut command = Command::new(if processes == 0 { GPT.into() } else { launcher() });
    if processes > 0 {
        command
            .arg("launch")
            .arg(format!("--nproc-per-node={processes}"))
            .args(launch.split_whitespace())
            .arg("--")
            .arg(GPT);
    }
    command.args(MODEL.split_whitespace()).args(flags.split_whitespace()).envs(environment.iter().copied());
    folder.start(&mut command)
}

/// Losses by step, as bits, of a log; a step that was done twice must have the same.
fn losses(folder: &Folder, log: &str) -> BTreeMap<u64, u64> {
    let mut losses = BTreeMap::new();
    for record in folder.records(log) {
        if let (Some(step), Some(loss)) = (record["step"].as_u64(), record["loss"].as_f64()) {
            let before = losses.insert(step, loss.to_bits());
            assert!(before.is_none_or(|before| before == loss.to_bits()), "step {step} came out differently");
        }
    }
    losses
}

#[test]
fn the_bits_are_the_same_in_one_process_and_in_many() {
    let folder = Folder::new("processes-bits");
    let flags = "--mesh data=2,stage=2,tensor=2 --steps 5 --clip 1 --dropout 0.1";
    assert_eq!(start(&folder, 0, "", &[], &format!("{flags} --log-json one")).end(TIMEOUT), Some(0));
    let one = losses(&folder, "one");
    assert_eq!(one.len(), 5);
    for (processes, transport) in [
        (2, "auto"),
        (2, "tcp"),
        (3, "unix"),
        (4, "auto"),
        (4, "unix"),
        (4, "tcp"),
        (8, "auto"),
        (8, "unix"),
        (8, "tcp"),
    ] {
        let environment = [("SHARDFLOW_TRANSPORT", transport)];
        let mut run = start(&folder, processes, "", &environment, &format!("{flags} --log-json many"));
        assert_eq!(run.end(TIMEOUT), Some(0), "{processes} by {transport}:\n{}", run.text());
        assert!(losses(&folder, "many") == one, "{processes} processes by {transport} give other bits");
    }
}

/// One after the other, each rank is killed, or frozen, at another moment.
#[test]
fn a_worker_that_is_killed_or_frozen_is_named_and_survived() {
    let folder = Folder::new("processes-worker");
    let flags = "--mesh data=2,stage=2 --steps 400";
    assert_eq!(start(&folder, 0, "", &[], &format!("{flags} --log-json one")).end(TIMEOUT), Some(0));
    let undisturbed = losses(&folder, "one");
    for (rank, how, moment) in [(0, "KILL", 61), (1, "KILL", 81), (2, "KILL", 101), (3, "KILL", 121), (1, "STOP", 81)] {
        let flags = format!("{flags} --checkpoint ck-{rank}-{how} --checkpoint-every 20 --log-json log-{rank}-{how}");
        let mut run = start(&folder, 4, "--max-restarts 1", &[], &flags);
        run.until(&format!("step {moment:>3}/400"), TIMEOUT);
        let pid = folder.pid_of(&format!("RANK={rank}")).unwrap_or_else(|| panic!("no rank {rank}:\n{}", run.text()));
        let begin = Instant::now();
        signal(pid, how);
        run.until(&format!("rank {rank}"), TIMEOUT);
        let noticed = begin.elapsed();
        assert!(noticed < Duration::from_secs(8), "rank {rank} {how}: noticed after {noticed:?}:\n{}", run.text());
        run.until("going on from step", TIMEOUT);
        run.until("/400", TIMEOUT);
        let resumed = begin.elapsed();
        assert!(resumed < Duration::from_secs(30), "rank {rank} {how}: resumed after {resumed:?}:\n{}", run.text());
        assert_eq!(run.end(TIMEOUT), Some(0), "rank {rank} {how}:\n{}", run.text());
        let losses = losses(&folder, &format!("log-{rank}-{how}"));
        assert!(losses == undisturbed, "rank {rank} {how}: other losses than an undisturbed run");
    }
}

#[test]
fn sigterm_leaves_a_checkpoint_and_ends_with_143() {
    let folder = Folder::new("processes-term");
    let flags = "--mesh data=2,stage=2 --steps 100000 --checkpoint ck --checkpoint-every 1000000";
    let mut run = start(&folder, 2, "", &[], &format!("{flags} --log-json log"));
    // The text of a run of so many steps comes late; its log does not.
    let deadline = Instant::now() + TIMEOUT;
    while losses(&folder, "log").len() < 20 {
        assert!(Instant::now() < deadline && run.child.try_wait().expect("a child").is_none(), "{}", run.text());
        thread::yield_now();
    }
    signal(run.child.id(), "TERM");
    assert_eq!(run.end(TIMEOUT), Some(143), "{}", run.text());
    assert_eq!(std::fs::read_dir(folder.path().join("ck")).expect("a checkpoint").count(), 1);
}

/// Between the meeting and the first step too, a failure ends all at once, with its cause. Without a launcher, which would end
/// the others itself.
#[test]
fn who_cannot_start_ends_the_others_with_its_cause() {
    let folder = Folder::new("processes-start");
    // Some gigabytes of parameters and what belongs to them, of which rank 1 may map a part.
    let flags =
        "--mesh data=2 --steps 1 --width 2048 --layers 4 --heads 4 --context 16 --batch 8 --sample 0 --data text";
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port().to_string();
    let limits = ["true", "ulimit -v 1500000"];
    let begin = Instant::now();
    let mut runs = limits
        .iter()
        .enumerate()
        .map(|(rank, limit)| {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("{limit}; exec \"$@\""), "sh", GPT]);
            command.args(flags.split_whitespace());
            let rank = rank.to_string();
            let variables =
                [("RANK", rank.as_str()), ("LOCAL_RANK", &rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")];
            command.envs(variables).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
            folder.start(command.env("SHARDFLOW_SECRET", "of this test only"))
        })
        .collect::<Vec<_>>();
    let codes: Vec<_> = runs.iter_mut().map(|run| run.end(TIMEOUT)).collect();
    let said: Vec<_> = runs.iter().map(Running::text).collect();
    assert_eq!(codes, [Some(78), Some(78)], "{said:#?}");
    assert!(said[0].contains("rank 1: it cannot start: device 1: cannot allocate"), "{said:#?}");
    assert!(begin.elapsed() < Duration::from_secs(30), "after {:?}: {said:#?}", begin.elapsed());
}
