//! Tests `gpt` as several processes under `shardflow launch`: with every transport, the losses have the same bits as in
//! one process. Some processes are killed, frozen or requested to end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use programs::{Folder, GPT, Running, launcher, signal};

#[path = "support/programs.rs"]
mod programs;

/// Time limit of a run, much longer than any run of these tests takes.
const TIMEOUT: Duration = Duration::from_secs(150);
const MODEL: &str = "--layers 4 --heads 4 --width 32 --context 16 --batch 8 --sample 0 --threads-per-device 1 --data text \
                     --micro-batches 2";

/// Starts `gpt` under the launcher with `processes` processes, or without the launcher if `processes` is 0.
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

/// Returns the loss bits of a log by step. A repeated step must have the same loss.
fn losses(folder: &Folder, log: &str) -> BTreeMap<u64, u64> {
    let mut losses = BTreeMap::new();
    for record in folder.records(log) {
        if let (Some(step), Some(loss)) = (record["step"].as_u64(), record["loss"].as_f64()) {
            let before = losses.insert(step, loss.to_bits());
            assert!(before.is_none_or(|before| before == loss.to_bits()), "step {step} was repeated with another loss");
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
        assert!(losses(&folder, "many") == one, "{processes} processes by {transport}: losses differ");
    }
}

/// Nodes may have different numbers of cores, so each process chooses its own number of threads. This number changes
/// neither the plan nor a bit of the losses.
#[test]
fn processes_with_different_numbers_of_threads_form_one_job() {
    let folder = Folder::new("processes-threads");
    let model = "--layers 2 --heads 4 --width 64 --context 32 --batch 8 --sample 0 --data text --micro-batches 2 --steps 5 \
                 --clip 1 --mesh data=2,stage=2";
    let mut one = Command::new(GPT);
    one.args(model.split_whitespace()).args(["--threads-per-device", "1", "--log-json", "one"]);
    assert_eq!(folder.start(&mut one).end(TIMEOUT), Some(0));
    let program = "exec \"$0\" \"$@\" --threads-per-device $((2 * SHARDFLOW_RANK + 1)) --log-json many";
    let mut two = Command::new(launcher());
    two.args(["launch", "--nproc-per-node=2", "--", "sh", "-c", program, GPT]).args(model.split_whitespace());
    let mut two = folder.start(&mut two);
    assert_eq!(two.end(TIMEOUT), Some(0), "{}", two.text());
    assert!(losses(&folder, "many") == losses(&folder, "one"), "threads change bits");
}

/// Each process writes a separate file, and `shardflow trace` joins them into one trace.
#[test]
fn traces_of_all_processes_can_be_joined() {
    let folder = Folder::new("processes-trace");
    let mut run = start(&folder, 2, "", &[], "--mesh stage=4 --steps 6 --clip 1 --trace trace.json");
    assert_eq!(run.end(TIMEOUT), Some(0), "{}", run.text());
    let trace = |args: &str| {
        let mut command = Command::new(launcher());
        let output = command.arg("trace").args(args.split(' ')).current_dir(folder.path()).output().expect("it runs");
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (output.status.code(), text.concat())
    };
    let (code, all) = trace("trace.json.0 trace.json.1 --join all.json");
    assert_eq!(code, Some(0), "{all}");
    assert!((0..4).all(|device| all.contains(&format!("\ndevice {device} compute "))), "{all}");
    let (code, of_one) = trace("trace.json.0");
    assert!(code == Some(0) && !of_one.contains("\ndevice 2 compute "), "{of_one}");
    let (code, twice) = trace("trace.json.0 trace.json.0");
    assert!(
        code == Some(65) && twice.contains("trace.json.0 and trace.json.0 both contain actor 'device 0 "),
        "{code:?} {twice}"
    );
    // The trace shows each device as a named process. A piece that crosses processes is written before it is read.
    let text = std::fs::read_to_string(folder.path().join("all.json")).expect("a file");
    let events: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    let of = |key: &'static str, value: &'static str| events.iter().filter(move |event| event[key] == value);
    let names: BTreeMap<u64, &str> = of("name", "process_name")
        .map(|event| (event["pid"].as_u64().expect("a pid"), event["args"]["name"].as_str().expect("a name")))
        .collect();
    let expected = ["device 0, rank 0", "device 1, rank 0", "device 2, rank 1", "device 3, rank 1"];
    assert_eq!(names.into_values().collect::<Vec<_>>(), expected);
    let pids: BTreeSet<_> = of("ph", "X").map(|event| event["pid"].as_u64()).collect();
    assert_eq!(pids, (0..4).map(Some).collect());
    let place = |event: &serde_json::Value| (event["pid"].as_u64() < Some(2), event["ts"].as_f64().expect("a time"));
    let written: BTreeMap<_, _> = of("ph", "s").map(|event| (event["id"].as_str(), place(event))).collect();
    let mut crossing = [0, 0];
    for event in of("ph", "f") {
        let (from, at) = written.get(&event["id"].as_str()).unwrap_or_else(|| panic!("no writing of: {event}"));
        let (to, read) = place(event);
        assert!(*at <= read + 1e-3, "read before it was written: {event}");
        crossing[usize::from(to)] += usize::from(*from != to);
    }
    // In each of six steps, two micro-batches cross the processes forward and backward.
    assert!(crossing[0] >= 12 && crossing[1] >= 12, "{crossing:?}");
}

/// Each run kills or freezes one rank at a given step.
#[test]
fn a_killed_or_frozen_worker_is_named_and_the_job_resumes() {
    let folder = Folder::new("processes-worker");
    let flags = "--mesh data=2,stage=2 --steps 400";
    assert_eq!(start(&folder, 0, "", &[], &format!("{flags} --log-json one")).end(TIMEOUT), Some(0));
    let undisturbed = losses(&folder, "one");
    for (rank, name, moment) in [(0, "KILL", 61), (1, "KILL", 81), (2, "KILL", 101), (3, "KILL", 121), (1, "STOP", 81)]
    {
        let flags = format!("{flags} --checkpoint ck-{rank}-{name} --checkpoint-every 20 --log-json log-{rank}-{name}");
        let mut run = start(&folder, 4, "--max-restarts 1", &[], &flags);
        run.until(&format!("step {moment:>3}/400"), TIMEOUT);
        let pid = folder.pid_of(&format!("RANK={rank}")).unwrap_or_else(|| panic!("no rank {rank}:\n{}", run.text()));
        let begin = Instant::now();
        signal(pid, name);
        run.until(&format!("rank {rank}"), TIMEOUT);
        let noticed = begin.elapsed();
        assert!(noticed < Duration::from_secs(8), "rank {rank} {name}: noticed after {noticed:?}:\n{}", run.text());
        run.until("continuing from step", TIMEOUT);
        run.until("/400", TIMEOUT);
        let resumed = begin.elapsed();
        assert!(resumed < Duration::from_secs(30), "rank {rank} {name}: resumed after {resumed:?}:\n{}", run.text());
        assert_eq!(run.end(TIMEOUT), Some(0), "rank {rank} {name}:\n{}", run.text());
        let losses = losses(&folder, &format!("log-{rank}-{name}"));
        assert!(losses == undisturbed, "rank {rank} {name}: losses differ from those of an undisturbed run");
    }
}

/// If a process fails before the rendezvous, all processes end promptly, because those that wait handle SIGTERM.
#[test]
fn a_process_that_waits_for_others_ends_on_sigterm() {
    let folder = Folder::new("processes-asked");
    let begin = Instant::now();
    // Rank 1 would listen on port 65536, which does not exist.
    let mut run = start(&folder, 2, "", &[], "--mesh data=2 --steps 1 --listen 127.0.0.1:65535");
    assert_eq!(run.end(TIMEOUT), Some(2), "{}", run.text());
    // After 30 s, the launcher would kill a process that ignores SIGTERM.
    assert!(begin.elapsed() < Duration::from_secs(20), "after {:?}: {}", begin.elapsed(), run.text());
}

#[test]
fn a_process_that_ends_with_code_0_before_it_joins_ends_all() {
    let folder = Folder::new("processes-absent");
    let begin = Instant::now();
    for absent in [0, 1] {
        let script = format!("[ $RANK = {absent} ] && exit 0; exec {GPT} {MODEL} --mesh data=2 --steps 1");
        let mut command = Command::new(launcher());
        let mut run = folder.start(command.args(["launch", "--nproc-per-node=2", "--", "sh", "-c", &script]));
        assert_eq!(run.end(TIMEOUT), Some(78), "{}", run.text());
        let expected = format!("error: rank {absent}: it ended with code 0, but other ranks wait for it to join; ");
        assert!(run.text().contains(&expected), "{}", run.text());
    }
    assert!(begin.elapsed() < REPORTED_WITHIN, "{:?}", begin.elapsed());
}

/// The message names the process that could not read the checkpoint.
#[test]
fn a_checkpoint_that_one_process_cannot_read_is_skipped_by_all() {
    let folder = Folder::new("processes-damaged");
    let flags = "--mesh stage=2 --checkpoint ck --checkpoint-every 3";
    let run = |steps: u32, log: &str| {
        let mut run = start(&folder, 2, "", &[], &format!("{flags} --steps {steps} --log-json {log}"));
        assert_eq!(run.end(TIMEOUT), Some(0), "{}", run.text());
        run.text()
    };
    run(6, "first");
    // Returns the shards of rank 1, by step.
    let shards = || {
        let mut found = Vec::new();
        let mut folders = vec![folder.path().join("ck")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                match path.file_name().is_some_and(|name| name == "shard-1-of-2.safetensors") {
                    true => found.push(path),
                    false if path.is_dir() => folders.push(path),
                    false => {}
                }
            }
        }
        found.sort();
        found
    };
    let damage = |shard: &PathBuf| {
        let mut bytes = std::fs::read(shard).expect("a shard");
        *bytes.last_mut().expect("bytes") ^= 1;
        std::fs::write(shard, bytes).expect("a shard");
    };
    assert_eq!(shards().len(), 2, "expected the shards of steps 3 and 6: {:?}", shards());
    // First damage rank 1's shard of the newest checkpoint, and later its shards of all checkpoints.
    let bad = shards().pop().expect("two");
    damage(&bad);
    let text = run(9, "second");
    assert!(text.contains("checkpoint skipped: ") && text.contains("rank 1 cannot read its part"), "{text}");
    assert!(text.contains("continuing from step 3"), "{text}");
    let (first, second) = (losses(&folder, "first"), losses(&folder, "second"));
    assert_eq!(second.keys().copied().collect::<Vec<_>>(), (3..9).collect::<Vec<_>>());
    assert!((3..6).all(|step| second[&step] == first[&step]), "first run {first:?}, second run {second:?}");
    // The damaged checkpoint was replaced when its step was repeated.
    let verify = Command::new(launcher()).args(["checkpoint", "verify", "ck"]).current_dir(folder.path()).output();
    let verified = String::from_utf8_lossy(&verify.expect("a program that exists").stdout).into_owned();
    assert!(verified.contains("step 6: ok") && !verified.contains("damaged"), "{verified}");
    shards().iter().filter(|shard| **shard != bad).for_each(damage);
    // The run must not start from step 0, because its later saves would delete the damaged checkpoints, which may be
    // repairable.
    let all = shards();
    let mut run = start(&folder, 2, "", &[], &format!("{flags} --steps 6 --log-json third"));
    assert_eq!(run.end(TIMEOUT), Some(65), "{}", run.text());
    assert!(run.text().contains("rank 1 cannot read its part") && run.text().contains("no checkpoint there is intact"));
    assert!(shards() == all && !folder.path().join("third").exists(), "the run changed files: {}", run.text());
}

/// The error comes before the first step, and names the ranks that do not see the folder.
#[test]
fn a_checkpoint_folder_that_is_not_shared_is_reported() {
    let folder = Folder::new("processes-unshared");
    for rank in 0..3 {
        std::fs::create_dir(folder.path().join(format!("node-{rank}"))).expect("a new folder");
    }
    let mut command = Command::new(launcher());
    command.args(["launch", "--nproc-per-node=3", "--", "sh", "-c", "cd node-$RANK && exec \"$0\" \"$@\"", GPT]);
    command.args(MODEL.replace("--data text", "--data ../text").split_whitespace());
    command.args(["--mesh", "data=4", "--steps", "4", "--checkpoint", "ck", "--log-json", "log"]);
    let mut run = folder.start(&mut command);
    assert_eq!(run.end(TIMEOUT), Some(73), "{}", run.text());
    let expected = "rank 1, rank 2 cannot see a file that rank 0 has written there";
    assert!(run.text().contains(expected) && run.text().contains("all nodes share"), "{}", run.text());
    assert!(!folder.path().join("node-0/log").exists(), "no step was done");
}

/// A second run in the folder of a live run is refused, and the error names the first run. A killed run does not block
/// the folder.
#[test]
fn two_runs_cannot_share_a_checkpoint_folder() {
    let folder = Folder::new("processes-two");
    let flags = "--checkpoint ck --checkpoint-every 5";
    let mut first = start(&folder, 0, "", &[], &format!("{flags} --steps 100000 --log-json log"));
    let deadline = Instant::now() + TIMEOUT;
    while losses(&folder, "log").len() < 20 {
        assert!(Instant::now() < deadline && first.child.try_wait().expect("a child").is_none(), "{}", first.text());
        thread::yield_now();
    }
    let holder = format!("another run writes its checkpoints here: process {} on host", first.child.id());
    // With several processes, the error names the rank that failed, not the ranks that wait for it.
    for (processes, mesh) in [(0, ""), (4, "--mesh data=4")] {
        let mut second = start(&folder, processes, "", &[], &format!("{flags} --steps 5 {mesh}"));
        assert_eq!(second.end(TIMEOUT), Some(73), "{}", second.text());
        let text = second.text();
        assert!(text.contains(&holder) && !text.contains("code 2"), "{text}");
        assert!(processes == 0 || text.contains("error: rank 0: --checkpoint ck: another run"), "{text}");
    }
    signal(first.child.id(), "KILL");
    assert_eq!(first.end(TIMEOUT), None);
    let mut third = start(&folder, 0, "", &[], &format!("{flags} --steps 5"));
    assert_eq!(third.end(TIMEOUT), Some(0), "{}", third.text());
    assert!(third.text().contains("continuing from step"), "{}", third.text());
}

#[test]
fn sigterm_saves_a_checkpoint_and_ends_with_143() {
    let folder = Folder::new("processes-term");
    let flags = "--mesh data=2,stage=2 --steps 100000 --checkpoint ck --checkpoint-every 1000000";
    let mut run = start(&folder, 2, "", &[], &format!("{flags} --log-json log"));
    // With this number of steps, progress lines come late, so wait for lines in the log.
    let deadline = Instant::now() + TIMEOUT;
    while losses(&folder, "log").len() < 20 {
        assert!(Instant::now() < deadline && run.child.try_wait().expect("a child").is_none(), "{}", run.text());
        thread::yield_now();
    }
    signal(run.child.id(), "TERM");
    assert_eq!(run.end(TIMEOUT), Some(143), "{}", run.text());
    assert_eq!(std::fs::read_dir(folder.path().join("ck")).expect("a checkpoint").count(), 1);
}

/// A failure between the rendezvous and the first step also ends all processes promptly, and every process reports the
/// cause. The test uses no launcher, because a launcher would end the other processes itself.
#[test]
fn a_process_that_cannot_start_ends_the_others_with_its_cause() {
    let folder = Folder::new("processes-start");
    // Parameters, gradients and moments need some gigabytes, which is more than rank 1 may map.
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
    let texts: Vec<_> = runs.iter().map(Running::text).collect();
    assert_eq!(codes, [Some(78), Some(78)], "{texts:#?}");
    assert!(texts[0].contains("rank 1: it cannot start: device 1: cannot allocate"), "{texts:#?}");
    assert!(begin.elapsed() < Duration::from_secs(30), "after {:?}: {texts:#?}", begin.elapsed());
}

/// Returns a loopback port that is free now.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr()).expect("a port").port()
}

const SECRET: (&str, &str) = ("SHARDFLOW_SECRET", "a secret of these tests");
/// Time limit for all processes to report a failure before the start. Without a report, they would wait for 300 s.
const REPORTED_WITHIN: Duration = Duration::from_secs(60);

/// Runs two nodes. Node `wrong` gets the wrong flag, and both nodes must end with `code`.
fn check_wrong_flag(wrong: usize, flag: &str, code: i32) {
    let folder = Folder::new(&format!("processes-report-{wrong}-{code}"));
    let port = free_port();
    let begin = Instant::now();
    let nodes = [0, 1].map(|node| {
        let launch = format!("--nnodes=2 --node-rank={node} --rdzv-endpoint=127.0.0.1:{port} --max-restarts=3");
        start(&folder, 1, &launch, &[SECRET], if node == wrong { flag } else { "--mesh data=2 --steps 2" })
    });
    for (node, mut running) in nodes.into_iter().enumerate() {
        assert_eq!(running.end(TIMEOUT), Some(code), "node {node}: {}", running.text());
        assert!(!running.text().contains("restart 1"), "node {node}: {}", running.text());
        let expected = format!("rank {wrong} ended before it joined");
        assert!(node == wrong || running.text().contains(&expected), "node {node}: {}", running.text());
    }
    assert!(begin.elapsed() < REPORTED_WITHIN, "{:?}", begin.elapsed());
}

#[test]
fn a_wrong_flag_on_one_node_ends_all_nodes() {
    for wrong in [0, 1] {
        check_wrong_flag(wrong, "--no-such-flag", 2);
        check_wrong_flag(wrong, "--mesh data=2 --clip 0", 2);
        check_wrong_flag(wrong, "--mesh data=2 --memory-mib 1", 78);
        // With this flag, `gpt` itself ends with code 0. The launchers must still end with code 78.
        check_wrong_flag(wrong, "--help", 78);
    }
}

#[test]
fn a_program_without_a_launcher_reports_its_failure_to_the_others() {
    for wrong in [0u32, 1] {
        let folder = Folder::new(&format!("processes-report-alone-{wrong}"));
        let endpoint = format!("tcp://127.0.0.1:{}", free_port());
        let begin = Instant::now();
        let ranks = [0u32, 1].map(|rank| {
            let number = rank.to_string();
            let environment = [
                SECRET,
                ("SHARDFLOW_RANK", number.as_str()),
                ("SHARDFLOW_WORLD_SIZE", "2"),
                ("SHARDFLOW_LOCAL_RANK", number.as_str()),
                ("SHARDFLOW_LOCAL_WORLD_SIZE", "2"),
                ("SHARDFLOW_ENDPOINT", endpoint.as_str()),
            ];
            start(&folder, 0, "", &environment, if rank == wrong { "--clip 0" } else { "--mesh data=2 --steps 2" })
        });
        for (rank, mut running) in ranks.into_iter().enumerate() {
            assert_eq!(running.end(TIMEOUT), Some(2), "rank {rank}: {}", running.text());
        }
        assert!(begin.elapsed() < REPORTED_WITHIN, "{:?}", begin.elapsed());
    }
}

/// Each rank reads its variables before the rendezvous, so only one rank sees the wrong value.
#[test]
fn a_wrong_variable_on_one_rank_ends_all_ranks() {
    for (wrong, name, value) in [
        (1u32, "SHARDFLOW_TRANSPORT", "x"),
        (0, "SHARDFLOW_TRANSPORT", "x"),
        (1, "SHARDFLOW_ENCRYPT", "yes"),
        (1, "SHARDFLOW_HEARTBEAT_MS", "0"),
        (1, "SHARDFLOW_COLLECTIVES", "foo"),
        (1, "SHARDFLOW_REPORT_WAIT_MS", "soon"),
        (1, "SHARDFLOW_INTERFACE", "9.9.9.9"),
        (0, "SHARDFLOW_INTERFACE", "9.9.9.9"),
        (1, "SHARDFLOW_ADVERTISE", "no-such-host.invalid"),
    ] {
        let folder = Folder::new(&format!("processes-variable-{wrong}-{name}"));
        let (begin, port) = (Instant::now(), free_port().to_string());
        let ranks = [0u32, 1].map(|rank| {
            let number = rank.to_string();
            let mut environment = vec![SECRET, ("RANK", number.as_str()), ("WORLD_SIZE", "2")];
            environment.extend([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port.as_str())]);
            environment.extend((rank == wrong).then_some((name, value)));
            start(&folder, 0, "", &environment, "--mesh data=2 --steps 2")
        });
        for mut running in ranks {
            assert_eq!(running.end(TIMEOUT), Some(78), "{name}={value}: {}", running.text());
            assert!(running.text().contains(name), "{name}={value}: {}", running.text());
        }
        assert!(begin.elapsed() < REPORTED_WITHIN, "{name}={value}: {:?}", begin.elapsed());
    }
}

/// Starts one of two nodes with one process of this program.
fn start_node(folder: &Folder, node: u32, port: u16, flags: &str, program: &[&str]) -> Running {
    let mut command = Command::new(launcher());
    command.arg("launch").args(["--nnodes=2", &format!("--node-rank={node}")]);
    command.arg(format!("--rdzv-endpoint=127.0.0.1:{port}")).args(flags.split_whitespace());
    folder.start(command.arg("--").args(program).envs([SECRET]))
}

/// Returns the command line of `gpt` with these flags.
fn gpt(flags: &str) -> Vec<&str> {
    [GPT].into_iter().chain(MODEL.split_whitespace()).chain(flags.split_whitespace()).collect()
}

#[test]
fn an_address_that_a_node_does_not_have_ends_all_nodes() {
    for (wrong, flag, variable) in [
        (1, "--interface=9.9.9.9", "SHARDFLOW_INTERFACE or --interface is 9.9.9.9"),
        (0, "--interface=9.9.9.9", "SHARDFLOW_INTERFACE or --interface is 9.9.9.9"),
        (1, "--advertise=no-such-host.invalid", "SHARDFLOW_ADVERTISE or --advertise is no-such-host.invalid"),
    ] {
        let folder = Folder::new(&format!("processes-address-{wrong}"));
        let (begin, port) = (Instant::now(), free_port());
        let nodes = [0, 1].map(|node| {
            let flags = format!("--max-restarts=3 {}", if node == wrong { flag } else { "" });
            start_node(&folder, node, port, &flags, &gpt("--mesh data=2 --steps 2"))
        });
        for mut running in nodes {
            assert_eq!(running.end(TIMEOUT), Some(78), "{flag}: {}", running.text());
            let text = running.text();
            assert!(text.contains(variable) && !text.contains("restart 1"), "{flag}: {text}");
            let last = text.lines().rfind(|line| line.starts_with("error: rank")).unwrap_or_default();
            assert_eq!(last.matches("(code 78").count(), 1, "{last}");
        }
        assert!(begin.elapsed() < REPORTED_WITHIN, "{flag}: {:?}", begin.elapsed());
    }
}

/// Node 1 ends before its rank joins. Node 0 must then end without a restart, for any exit code of node 1.
#[test]
fn a_node_that_ends_before_it_joins_ends_the_other() {
    let folder = Folder::new("processes-ended");
    for (script, cause) in [
        ("exit 1", "node 1 ended: rank 1: ended (code 1)"),
        ("kill -9 $$", "node 1 ended: rank 1: killed by a signal (code 137: SIGKILL)"),
        ("exec sleep 600", "node 1 ended: it was interrupted (code 130: SIGINT)"),
    ] {
        let (begin, port) = (Instant::now(), free_port());
        let mut other = start_node(&folder, 0, port, "--max-restarts=3", &gpt("--mesh data=2 --steps 2"));
        other.until("waiting for rank 1: 1 of 2 joined", TIMEOUT);
        let mut ended = start_node(&folder, 1, port, "", &["sh", "-c", &format!("echo begun; {script}")]);
        ended.until("begun", TIMEOUT);
        if script.contains("sleep") {
            signal(ended.child.id(), "INT");
        }
        assert_eq!(other.end(TIMEOUT), Some(69), "{}", other.text());
        assert!(other.text().contains(cause) && !other.text().contains("restart 1"), "{}", other.text());
        ended.end(TIMEOUT);
        assert!(begin.elapsed() < REPORTED_WITHIN, "{script}: {:?}", begin.elapsed());
    }
}

/// Node 0 restarts. It must not wait for node 1, which has no restarts left.
#[test]
fn a_node_without_restarts_ends_the_one_that_restarts() {
    let folder = Folder::new("processes-used-up");
    let (begin, port) = (Instant::now(), free_port());
    let program = gpt("--mesh data=2 --steps 1000000 --log-json log");
    let mut other = start_node(&folder, 0, port, "--max-restarts=9", &program);
    let mut ended = start_node(&folder, 1, port, "", &program);
    while losses(&folder, "log").len() < 5 {
        assert!(begin.elapsed() < TIMEOUT, "{}", other.text());
        thread::yield_now();
    }
    let pid = folder.pid_of("RANK=1").unwrap_or_else(|| panic!("no rank 1: {}", ended.text()));
    signal(pid, "KILL");
    assert_eq!(ended.end(TIMEOUT), Some(137), "{}", ended.text());
    assert_eq!(other.end(TIMEOUT), Some(69), "{}", other.text());
    let expected = "node 1 ended: rank 1: killed by a signal (code 137: SIGKILL)";
    assert!(other.text().contains(expected) && other.text().contains("restart 1"), "{}", other.text());
    assert!(begin.elapsed() < REPORTED_WITHIN, "{:?}", begin.elapsed());
}

#[test]
fn a_port_of_another_program_is_refused_soon() {
    let folder = Folder::new("processes-port");
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = other.local_addr().expect("an address");
    let begin = Instant::now();
    let flags = format!("--max-restarts=3 --rdzv-endpoint={endpoint}");
    let mut run = start(&folder, 2, &flags, &[], "--mesh data=2 --steps 2");
    assert_eq!(run.end(TIMEOUT), Some(78), "{}", run.text());
    let text = run.text();
    assert!(text.contains(&format!("{endpoint} is in use; trying again for 1.5s")), "{text}");
    assert!(text.contains("choose another port") && !text.contains("restart 1"), "{text}");
    assert!(begin.elapsed() < Duration::from_secs(12), "{:?}", begin.elapsed());
}

#[test]
fn two_nodes_with_number_0_end_soon() {
    let folder = Folder::new("processes-two-zeros");
    let (begin, port) = (Instant::now(), free_port());
    let mut nodes = [0, 0].map(|node| start_node(&folder, node, port, "", &gpt("--mesh data=2 --steps 2")));
    for running in &mut nodes {
        assert_eq!(running.end(TIMEOUT), Some(78), "{}", running.text());
        assert!(running.text().contains("two processes claim one rank"), "{}", running.text());
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}
