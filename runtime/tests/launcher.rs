//! The launcher with real processes: the ranks are `sh` scripts that branch on their variables. Scripts report
//! readiness through a named pipe, and the tests wait for the end of processes instead of sleeping.

#[path = "launcher/harness.rs"]
mod harness;

use std::collections::BTreeMap;
use std::fs;

use harness::{Job, timeout};
use rustix::process::Signal;
use shardflow_job::env::{LaunchContext, LaunchedBy, detect};

/// The variables that a script printed with `env`.
fn variables(log: &str) -> BTreeMap<String, String> {
    log.lines().filter_map(|line| line.split_once('=')).map(|(name, value)| (name.into(), value.into())).collect()
}

#[test]
fn each_process_gets_the_variables_of_its_rank() {
    let job = Job::new();
    let ended = job.sh(&["--nproc_per_node", "3", "--max-restarts=2", "--rdzv-id", "x"], "env").end();
    assert_eq!((ended.code, ended.err.as_str()), (0, ""));
    for rank in 0..3 {
        let vars = variables(&job.log("x", 0, rank));
        let Ok(LaunchContext::World(world)) = detect(&vars) else { panic!("{vars:?}") };
        assert_eq!((world.process, world.processes, world.local_process, world.local_processes), (rank, 3, rank, 3));
        assert_eq!(
            (world.node, world.restart, world.source, world.run_id.as_str()),
            (Some(0), 0, LaunchedBy::Shardflow, "x")
        );
        let number = rank.to_string();
        for (name, value) in [
            ("RANK", number.as_str()),
            ("LOCAL_RANK", &number),
            ("WORLD_SIZE", "3"),
            ("LOCAL_WORLD_SIZE", "3"),
            ("GROUP_RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "2"),
            ("TORCHELASTIC_RUN_ID", "x"),
            ("CUDA_MODULE_LOADING", "EAGER"),
            ("CUDA_MODULE_DATA_LOADING", "EAGER"),
            ("CUDA_DEVICE_MAX_CONNECTIONS", "32"),
        ] {
            assert_eq!(vars[name], value, "{name} of rank {rank}");
        }
        assert!(vars["MASTER_PORT"].parse::<u16>().unwrap() > 0);
        assert_eq!(vars["SHARDFLOW_SECRET"].len(), 64);
        assert!(vars.contains_key("SHARDFLOW_ERROR_FILE"));
        assert_eq!(vars.contains_key("SHARDFLOW_PROGRESS_FILE"), rank == 0);
        let folder = vars["SHARDFLOW_ENDPOINT"].strip_prefix("unix:").unwrap().rsplit_once('/').unwrap().0;
        assert!(!fs::exists(folder).unwrap(), "{folder} is not removed");
    }
}

#[test]
fn ranks_and_world_size_include_other_nodes() {
    let job = Job::new();
    let flags = ["--nproc-per-node=2", "--nnodes=3", "--node-rank=1", "--rdzv-endpoint=host:5", "--rdzv-id=x"];
    let given = [("SHARDFLOW_SECRET", "0123456789abcdef"), ("CUDA_DEVICE_MAX_CONNECTIONS", "9")];
    let ended = job.sh_with(&given, &flags, "env").end();
    assert_eq!(ended.code, 0, "{}", ended.err);
    let vars = variables(&job.log("x", 0, 3));
    let Ok(LaunchContext::World(world)) = detect(&vars) else { panic!("{vars:?}") };
    assert_eq!((world.process, world.processes, world.local_process, world.node), (3, 6, 1, Some(1)));
    assert_eq!((world.endpoint.to_string().as_str(), vars["MASTER_PORT"].as_str()), ("tcp://host:5", "5"));
    assert_eq!(world.secret.read().unwrap().text(), "0123456789abcdef");
    assert_eq!(vars["CUDA_DEVICE_MAX_CONNECTIONS"], "9", "the user's value is kept");

    let ended = job.sh(&flags, "true").end();
    assert_eq!(ended.code, 78, "{}", ended.err);
    assert!(ended.err.contains("export SHARDFLOW_SECRET=$(shardflow secret)"), "{}", ended.err);
}

#[test]
fn output_of_the_first_process_is_printed_at_once() {
    let job = Job::new();
    // Only one process reads, because two readers of a pipe would split the line.
    let script = "printf 'a \\377\\n'; echo b >&2; line=go; [ $RANK = 0 ] && read line < $WAIT; echo $line; printf end";
    let running = job.sh(&["--nproc-per-node=2", "--rdzv-id=x"], script);
    // Both lines arrive while the process still waits.
    assert_eq!(running.out.recv_timeout(timeout(10)).unwrap(), b"a \xff\n");
    assert_eq!(running.err.recv_timeout(timeout(10)).unwrap(), b"b\n");
    job.write("go\n");
    assert_eq!(running.out.recv_timeout(timeout(10)).unwrap(), b"go\n");
    let ended = running.end();
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (0, "end", ""));
    for rank in 0..2 {
        let log = job.log("x", 0, rank);
        assert!(log.contains("a \u{fffd}\n") && log.contains("b\n") && log.ends_with("go\nend"), "{rank}: {log}");
    }
}

#[test]
fn the_first_cause_is_printed_last() {
    let job = Job::new();
    // Ranks 0, 1 and 3 blame rank 2, most likely before it ends.
    let script = "[ $RANK = 2 ] && { read line < $WAIT; kill -9 $$; }
        echo error: rank 2 is gone >&2; [ $RANK = 3 ] && echo ready > $READY; exit 69";
    let running = job.sh(&["--nproc-per-node=4", "--rdzv-id=x"], script);
    job.ready();
    job.write("go\n");
    let ended = running.end();
    assert_eq!(ended.code, 137);
    let lines: Vec<&str> = ended.err.lines().collect();
    assert!(lines.contains(&"rank 1: error: rank 2 is gone") && lines.contains(&"rank 3: error: rank 2 is gone"));
    let last = "error: rank 2: killed by a signal (code 137: SIGKILL); its log: shardflow-logs/x/attempt-0/rank-2.log";
    assert_eq!(*lines.last().unwrap(), last);
}

#[test]
fn a_report_determines_the_first_cause() {
    let job = Job::new();
    let script = r#"
        report() { echo "{\"rank\":$RANK,\"time_unix_ns\":$1,\"exit\":$2,\"cause\":\"$3\",\"first_cause_rank\":$4}" \
            > $SHARDFLOW_ERROR_FILE.new; mv $SHARDFLOW_ERROR_FILE.new $SHARDFLOW_ERROR_FILE; exit $2; }
        [ $RANK = 1 ] && report 5 80 'loss is not finite' 1
        report 4 80 'rank 1 ended' 1"#;
    let ended = job.sh(&["--nproc-per-node=3"], script).end();
    assert_eq!(ended.code, 80);
    let last = ended.err.lines().last().unwrap();
    assert!(last.starts_with("error: rank 1: loss is not finite (code 80: numerics); its log: "), "{last}");
}

#[test]
fn restarts_continue_while_steps_are_committed() {
    let job = Job::new();
    let script = "n=$SHARDFLOW_RESTART_COUNT; [ $TORCHELASTIC_RESTART_COUNT = $n ] || exit 65
        [ $RANK = 0 ] && echo 1$n > $SHARDFLOW_PROGRESS_FILE; [ $n = 3 ] || exit 75";
    let ended = job.sh(&["--nproc-per-node=2", "--max-restarts=3", "--restart-wait=0", "--rdzv-id=x"], script).end();
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(ended.err.contains("shardflow: restart 3 of at most 3, from step 12\n"), "{}", ended.err);
    assert_eq!(job.attempts("x"), 4);

    let ended = job.sh(&["--nproc-per-node=2", "--max-restarts=2", "--rdzv-id=y"], script).end();
    assert_eq!((ended.code, job.attempts("y")), (75, 3));
    assert!(ended.err.contains("shardflow: gave up after 2 restarts\nerror: rank "), "{}", ended.err);
}

#[test]
fn restarts_without_progress_end_early() {
    let job = Job::new();
    let script = "[ $RANK = 0 ] && echo 7 > $SHARDFLOW_PROGRESS_FILE; kill -9 $$";
    let ended = job.sh(&["--nproc-per-node=2", "--max-restarts=9", "--rdzv-id=x"], script).end();
    assert_eq!((ended.code, job.attempts("x")), (137, 3));
    let gave_up = "shardflow: gave up: 2 restarts in a row committed no step above 7\n";
    assert!(ended.err.contains(gave_up), "{}", ended.err);
    assert!(ended.err.lines().last().unwrap().starts_with("error: rank "), "{}", ended.err);
}

#[test]
fn a_code_that_is_not_worth_a_retry_is_not_restarted() {
    let job = Job::new();
    for (code, attempts) in [(78, 1), (65, 1), (80, 1), (2, 1), (70, 3), (1, 3)] {
        let name = format!("x{code}");
        let script = format!("exit {code}");
        let ended = job.sh(&["--max-restarts=9", "--rdzv-id", &name], &script).end();
        assert_eq!((ended.code, job.attempts(&name)), (code, attempts), "{}", ended.err);
    }
}

#[test]
fn sigterm_interrupts_the_pause_before_a_restart() {
    let job = Job::new();
    let script = "[ $RANK = 0 ] && echo 1$SHARDFLOW_RESTART_COUNT > $SHARDFLOW_PROGRESS_FILE; exit 75";
    // The pause is far longer than the test.
    let running = job.sh(&["--max-restarts=9", "--restart-wait=600"], script);
    let mut printed = String::new();
    while !printed.contains("restart 2 of at most 9, from step 11, in 600s") {
        printed += &String::from_utf8_lossy(&running.err.recv_timeout(timeout(20)).unwrap());
    }
    assert!(printed.contains("restart 1 of at most 9, from step 10\n"), "the first restart has no pause: {printed}");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, 143);
}

/// Flags of one of two nodes with the rendezvous at this port.
fn two_node_flags(node: u32, port: u16) -> [String; 4] {
    let endpoint = format!("--rdzv-endpoint=127.0.0.1:{port}");
    ["--nnodes=2".into(), format!("--node-rank={node}"), endpoint, "--max-restarts=9".into()]
}

/// A port that is currently free.
fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

const SECRET: (&str, &str) = ("SHARDFLOW_SECRET", "0123456789abcdef");

/// Time limit for the reports of both nodes. A node waits far longer if the other node does not report.
const REPORT_LIMIT: std::time::Duration = std::time::Duration::from_secs(20);

#[test]
fn nodes_that_fail_before_the_rendezvous_do_not_wait_for_each_other() {
    let (job, port) = (Job::new(), free_port());
    let nodes = [0, 1].map(|node| {
        let flags = two_node_flags(node, port);
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--report-wait=600"]).collect();
        job.sh_with(&[SECRET], &flags, "echo error: no such flag >&2; exit 2")
    });
    let begin = std::time::Instant::now();
    for (node, running) in nodes.into_iter().enumerate() {
        let ended = running.end();
        assert_eq!(ended.code, 2, "{}", ended.err);
        let last = ended.err.lines().last().unwrap();
        assert!(last.starts_with(&format!("error: rank {node}: no such flag (code 2: usage)")), "{last}");
    }
    assert!(begin.elapsed() < REPORT_LIMIT, "the nodes waited {:?}", begin.elapsed());
}

/// A program that does not use Shardflow, or that only prints a help text, ends with code 0 and does not join.
#[test]
fn nodes_that_end_with_code_0_and_do_not_join_have_not_failed() {
    let (job, port) = (Job::new(), free_port());
    let begin = std::time::Instant::now();
    let nodes = [0, 1].map(|node| {
        let flags = two_node_flags(node, port);
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--report-wait=600"]).collect();
        job.sh_with(&[SECRET], &flags, "exit 0")
    });
    for running in nodes {
        let ended = running.end();
        assert_eq!(ended.code, 0, "{}", ended.err);
    }
    assert!(begin.elapsed() < REPORT_LIMIT, "the nodes waited {:?}", begin.elapsed());
}

#[test]
fn a_report_without_a_receiver_ends_by_its_timeout_or_by_a_signal() {
    let (job, port) = (Job::new(), free_port());
    let run = |node: u32, wait: &'static str, script: &str| {
        let flags = two_node_flags(node, port);
        job.sh_with(&[SECRET], &flags.iter().map(String::as_str).chain([wait]).collect::<Vec<_>>(), script)
    };
    for node in [0, 1] {
        assert_eq!(run(node, "--report-wait=0.2", "exit 65").end().code, 65);
        let waiting = run(node, "--report-wait=600", "exit 65");
        let line = waiting.err.recv_timeout(timeout(20)).unwrap();
        assert!(line.starts_with(b"shardflow: a restart would not help"), "{line:?}");
        waiting.signal(Signal::TERM);
        assert_eq!(waiting.end().code, 65);
    }
    // The launcher does not report a failure that the session or another process has already reported.
    let script =
        r#"echo "{\"rank\":1,\"time_unix_ns\":1,\"exit\":80,\"cause\":\"x\",$MORE}" > $SHARDFLOW_ERROR_FILE; exit 80"#;
    for more in ["\"joined\":true", "\"first_cause_rank\":0"] {
        let script = format!("MORE='{more}'; {script}");
        assert_eq!(run(1, "--report-wait=600", &script).end().code, 80);
    }
}

#[test]
fn a_launcher_that_cannot_start_its_processes_reports_it() {
    let (job, port) = (Job::new(), free_port());
    let flags = |node| two_node_flags(node, port).into_iter().chain(["--report-wait=600".into()]).collect::<Vec<_>>();
    let launch = |node, words: &[&str]| {
        let args: Vec<String> = std::iter::once("launch".into()).chain(flags(node)).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).chain(words.iter().copied()).collect();
        job.run_with(&[SECRET], &args)
    };
    for (words, cause) in [
        (&["--", "./no-such-program"][..], "program ./no-such-program"),
        (&["--log-dir=/proc/none", "true"], "--log-dir: cannot write a log in /proc/none/"),
        (&["--meet-wait=0", "true"], "invalid value '0' for '--meet-wait <SECONDS>': expected 0.001 to 86400 seconds"),
        (&["--grace", "soon", "true"], "invalid value 'soon' for '--grace <SECONDS>'"),
        (&["--grace=1", "--grace=1", "true"], "the argument '--grace <SECONDS>' cannot be used multiple times"),
    ] {
        for running in [0, 1].map(|node| launch(node, words)) {
            let ended = running.end();
            assert_eq!(ended.code, 2, "{}", ended.err);
            let report = format!("reporting to the other nodes: {cause}");
            assert!(ended.err.contains(&report), "{report}: {}", ended.err);
        }
    }
}

#[test]
fn cluster_flags_become_variables_of_the_processes() {
    let job = Job::new();
    let flags = ["--rdzv-id=x", "--interface=127.0.0.1", "--advertise=node-7.site", "--heartbeat-ms=100"];
    let more = ["--heartbeat-deadline-ms=900", "--meet-wait=0.5", "--report-wait=2.5"];
    assert_eq!(job.sh(&[flags.as_slice(), &more].concat(), "env").end().code, 0);
    let vars = variables(&job.log("x", 0, 0));
    for (name, value) in [
        ("SHARDFLOW_INTERFACE", "127.0.0.1"),
        ("SHARDFLOW_ADVERTISE", "node-7.site"),
        ("SHARDFLOW_HEARTBEAT_MS", "100"),
        ("SHARDFLOW_HEARTBEAT_DEADLINE_MS", "900"),
        ("SHARDFLOW_MEET_MS", "500"),
        ("SHARDFLOW_REPORT_WAIT_MS", "2500"),
    ] {
        assert_eq!(vars[name], value, "{name}");
    }
    assert_eq!(job.sh(&["--rdzv-id=zone", "--interface=fe80::1%lo"], "env").end().code, 0);
    assert_eq!(variables(&job.log("zone", 0, 0))["SHARDFLOW_INTERFACE"], "fe80::1%lo");
    for (flag, expected) in [
        (
            "--advertise=a:5",
            "error: --advertise: SHARDFLOW_ADVERTISE is \"a:5\", expected a host name or an IP address",
        ),
        ("--heartbeat-ms=0", "error: --heartbeat-ms: SHARDFLOW_HEARTBEAT_MS is \"0\""),
        ("--heartbeat-deadline-ms=999", "error: --heartbeat-deadline-ms: SHARDFLOW_HEARTBEAT_DEADLINE_MS is \"999\""),
    ] {
        let ended = job.sh(&[flag], "true").end();
        assert_eq!(ended.code, 78, "{flag}: {}", ended.err);
        assert!(ended.err.contains(expected), "{flag}: {}", ended.err);
    }
}

#[test]
fn the_next_launcher_removes_the_folder_of_a_killed_one() {
    let job = Job::new();
    let temporary = job.folder().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let given = [("TMPDIR", temporary.to_str().unwrap())];
    let count = || fs::read_dir(&temporary).unwrap().count();
    let running = job.sh_with(&given, &[], "echo ready > $READY; read line < $WAIT.none");
    job.ready();
    let guard = harness::Process::open(harness::guard_of(running.pid()));
    guard.kill();
    assert!(guard.ends_before(std::time::Instant::now() + timeout(10)));
    running.signal(Signal::KILL);
    running.end();
    assert_eq!(count(), 1, "the folder remains, because no process is left to remove it");
    assert_eq!(job.sh_with(&given, &[], "true").end().code, 0);
    assert_eq!(count(), 0);
}

#[test]
fn sigterm_is_forwarded_and_the_launcher_ends_with_143() {
    let job = Job::new();
    for (script, code) in [
        // Ranks may save and end as documented, die from the signal, fail to write the checkpoint, or be done already.
        ("trap 'echo saved; exit 143' TERM; echo ready > $READY; while :; do read line < $WAIT; done", 143),
        ("echo ready > $READY; exec sleep 600", 143),
        ("trap 'exit 73' TERM; echo ready > $READY; while :; do read line < $WAIT; done", 73),
        ("trap 'exit 0' TERM; echo ready > $READY; while :; do read line < $WAIT; done", 0),
    ] {
        let running = job.sh(&["--nproc-per-node=2", "--max-restarts=9"], script);
        job.ready();
        job.ready();
        running.signal(Signal::TERM);
        let ended = running.end();
        assert_eq!(ended.code, code, "{script}: {}", ended.err);
        assert_eq!(ended.out.contains("saved"), script.contains("saved"));
    }
}

#[test]
fn other_signals_are_forwarded_too() {
    let job = Job::new();
    for (signal, code) in [(Signal::INT, 130), (Signal::HUP, 129), (Signal::QUIT, 131)] {
        let running = job.sh(&[], "echo ready > $READY; exec sleep 600");
        job.ready();
        running.signal(signal);
        assert_eq!(running.end().code, code);
    }
}

#[test]
fn sighup_is_ignored_under_nohup() {
    let job = Job::new();
    let running = job.sh_ignoring_hup(&[], "trap 'exit 143' TERM; echo ready > $READY; read line < $WAIT");
    job.ready();
    running.signal(Signal::HUP);
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, 143, "SIGHUP would end it with 129");
}

#[test]
fn a_process_that_hangs_at_shutdown_is_killed() {
    let job = Job::new();
    let script = "trap '' TERM; [ $RANK = 1 ] || trap 'exit 143' TERM; echo ready > $READY
        while :; do read line < $WAIT; done";
    let running = job.sh(&["--nproc-per-node=2", "--grace=0.2"], script);
    job.ready();
    job.ready();
    running.signal(Signal::TERM);
    let ended = running.end();
    assert_eq!(ended.code, 143);
    assert_eq!(ended.err, "shardflow: killing rank 1: still running 200ms after the signal to end\n");
}

#[test]
fn a_second_interrupt_kills_at_once() {
    let job = Job::new();
    let script = "trap 'echo interrupted > $READY' INT; echo ready > $READY; while :; do read line < $WAIT; done";
    let running = job.sh(&["--grace=600"], script);
    assert_eq!(job.ready(), "ready");
    running.signal(Signal::INT);
    assert_eq!(job.ready(), "interrupted");
    running.signal(Signal::INT);
    let ended = running.end();
    assert_eq!(ended.code, 130);
    assert!(ended.err.contains("interrupted again"), "{}", ended.err);
}

#[test]
fn the_other_processes_get_sigterm_after_a_failure() {
    let job = Job::new();
    let script = "[ $RANK = 0 ] && { read line < $WAIT; exit 70; }
        trap 'echo ending > $READY; exit 143' TERM; echo ready > $READY; while :; do read line < $WAIT.none; done";
    let running = job.sh(&["--nproc-per-node=2", "--failure-wait=0.1"], script);
    assert_eq!(job.ready(), "ready");
    job.write("go\n");
    assert_eq!(job.ready(), "ending");
    let ended = running.end();
    assert_eq!(ended.code, 70);
    assert!(ended.err.contains("sending SIGTERM to rank 1"), "{}", ended.err);
    assert!(ended.err.lines().last().unwrap().starts_with("error: rank 0: "), "{}", ended.err);
}

#[test]
fn processes_that_wait_in_vain_for_a_failed_one_get_sigterm_soon() {
    let job = Job::new();
    let script = r#"[ $RANK = 0 ] && { echo ready > $READY; read line < $WAIT.none; }; read line < $WAIT
        echo '{"rank":1,"time_unix_ns":1,"exit":2,"cause":"no such flag"}' > $SHARDFLOW_ERROR_FILE; exit 2"#;
    // The wait is far longer than the test.
    let running = job.sh(&["--nproc-per-node=2", "--failure-wait=600"], script);
    job.ready();
    job.write("go\n");
    let ended = running.end();
    assert_eq!(ended.code, 2, "{}", ended.err);
    let last = ended.err.lines().last().unwrap();
    assert!(last.starts_with("error: rank 1: no such flag (code 2: usage)"), "{last}");
}

#[test]
fn a_frozen_process_that_the_others_blame_is_killed_soon() {
    let job = Job::new();
    let script = r#"[ $RANK = 1 ] && { echo ready > $READY; kill -STOP $$; }; read line < $WAIT
        echo '{"rank":0,"time_unix_ns":1,"exit":69,"cause":"rank 1 does not answer","first_cause_rank":1}' \
            > $SHARDFLOW_ERROR_FILE; exit 69"#;
    // Both waits are far longer than the test.
    let running = job.sh(&["--nproc-per-node=2", "--failure-wait=600", "--grace=600"], script);
    job.ready();
    job.write("go\n");
    let ended = running.end();
    assert_eq!(ended.code, 69, "{}", ended.err);
    let last = ended.err.lines().last().unwrap();
    assert!(last.starts_with("error: rank 0: rank 1 does not answer (code 69: peer unavailable)"), "{last}");
}

#[test]
fn no_process_outlives_a_killed_launcher() {
    let job = Job::new();
    // Rank 0 ends on SIGTERM, and rank 1 ignores it. Both have a child that ignores SIGTERM.
    let script = "[ $RANK = 1 ] && trap '' TERM HUP INT; sh -c 'trap \"\" TERM HUP INT; echo $$ > $READY
        while :; do sleep 600; done' & echo $$ > $READY; env > env-$RANK; echo $SHARDFLOW_ENDPOINT > $READY; wait";
    let running = job.sh(&["--nproc-per-node=2"], script);
    let (mut pids, mut endpoints) = (Vec::new(), Vec::new());
    while pids.len() + endpoints.len() < 6 {
        let line = job.ready();
        match line.parse() {
            Ok(pid) => pids.push(pid),
            Err(_) => endpoints.push(line),
        }
    }
    assert_eq!((pids.len(), endpoints.len()), (4, 2));
    let processes: Vec<_> = pids.into_iter().map(harness::Process::open).collect();
    let guard = harness::guard_of(running.pid());
    let guard = harness::Process::open(guard);
    running.signal(Signal::KILL);
    let deadline = std::time::Instant::now() + timeout(5);
    for process in processes {
        assert!(process.ends_before(deadline), "process {} is alive after 5 s", process.pid);
    }
    assert!(guard.ends_before(deadline), "the guard is alive after 5 s");
    let folder = endpoints[0].strip_prefix("unix:").unwrap().rsplit_once('/').unwrap().0.to_string();
    assert!(!fs::exists(&folder).unwrap(), "{folder} is not removed");
    running.end();
}

#[test]
fn processes_die_with_the_launcher_without_the_guard() {
    let job = Job::new();
    let running = job.sh(&["--nproc-per-node=2"], "trap '' TERM HUP; echo $$ > $READY; read line < $WAIT");
    let open = |line: String| harness::Process::open(line.parse().unwrap());
    let processes = [open(job.ready()), open(job.ready())];
    let guard = harness::Process::open(harness::guard_of(running.pid()));
    guard.kill();
    running.signal(Signal::KILL);
    let deadline = std::time::Instant::now() + timeout(5);
    for process in processes {
        assert!(process.ends_before(deadline), "process {} is alive after 5 s", process.pid);
    }
    running.end();
}

#[test]
fn a_child_that_outlives_its_process_is_killed() {
    let job = Job::new();
    let running = job.sh(&[], "sleep 600 & echo $! > $READY; read line < $WAIT");
    let child = harness::Process::open(job.ready().parse().unwrap());
    job.write("go\n");
    assert_eq!(running.end().code, 0);
    assert!(child.ends_before(std::time::Instant::now() + timeout(5)));
}

#[test]
fn invalid_flags_are_usage_errors() {
    let job = Job::new();
    for (args, expected) in [
        ("launch", "PROGRAM"),
        ("launch --nproc-per-node", "nproc-per-node"),
        ("launch --nproc-per-node 0 true", "at least 1"),
        ("launch --nproc-per-node x true", "invalid"),
        ("launch --nproc-per-node 4097 true", "more than 4096 processes"),
        ("launch --interface eth0 true", "expected an IP address"),
        ("launch --nnodes 1:2 true", "invalid"),
        ("launch --nnodes 2 true", "needs --node-rank"),
        ("launch --nnodes 2 --node-rank 0 true", "needs --rdzv-endpoint"),
        ("launch --nnodes 2 --node-rank 2 --rdzv-endpoint a:5 true", "numbered from 0 to 1"),
        ("launch --node-rank 1 true", "numbered from 0 to 0"),
        ("launch --rdzv-endpoint a:0 true", "port from 1"),
        ("launch --rdzv-endpoint [fe80::1%no-such]:5 true", "must be an interface of this node"),
        ("launch --rdzv-endpoint ::1 true", "expected brackets around an IPv6 address"),
        ("plan --htm p.html -- true", "unexpected argument '--htm'; see `shardflow plan --help`"),
        ("launch --rdzv-id ../x true", "--rdzv-id ../x"),
        ("launch --grace -1 true", "grace"),
        ("launch --no-such-flag true", "unexpected argument '--no-such-flag'"),
        ("launch --log-dir /proc/none true", "--log-dir: cannot write a log in /proc/none/"),
        ("launch -- no-such-program", "program no-such-program not found in PATH"),
        ("launch -- ./no-such-program a b", "program ./no-such-program not found"),
        ("launch -- /", "not a file"),
        ("no-such-command", "no-such-command"),
    ] {
        let ended = job.run(&args.split(' ').collect::<Vec<_>>()).end();
        assert_eq!(ended.code, 2, "{args}: {}", ended.err);
        assert!(ended.err.contains(expected) && ended.err.starts_with("error: "), "{args}: {}", ended.err);
    }
    assert!(!fs::exists(job.folder().join("shardflow-logs")).unwrap(), "no process was started");
}

#[test]
fn a_program_that_the_kernel_refuses_is_a_usage_error() {
    let job = Job::new();
    fs::write(job.folder().join("broken"), "#!/no/such/interpreter\n").unwrap();
    let ended = job.run(&["launch", "--", "./broken"]).end();
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert!(ended.err.starts_with("error: ./broken cannot be run: it is not executable"), "{}", ended.err);

    harness::make_executable(&job.folder().join("broken"));
    let ended = job.run(&["launch", "--nproc-per-node=2", "--max-restarts=9", "--", "./broken"]).end();
    assert_eq!(ended.code, 2, "{}", ended.err);
    let last = ended.err.lines().last().unwrap();
    assert!(last.contains(": cannot run ./broken: ") && last.contains("code 2: usage"), "{}", ended.err);
}

#[test]
fn secrets_differ() {
    let job = Job::new();
    let (one, other) = (job.run(&["secret"]).end(), job.run(&["secret"]).end());
    assert!(one.code == 0 && one.out.trim().len() == 64 && one.out != other.out);
}

#[test]
fn sigusr1_reaches_only_processes_that_handle_it() {
    let job = Job::new();
    // Rank 1 has no handler: the signal would end it.
    let script = "[ $RANK = 1 ] && { echo ready > $READY; exec sleep 600; }
        trap 'echo notice > $READY' USR1; echo ready > $READY; while :; do read line < $WAIT.none; done";
    let running = job.sh(&["--nproc-per-node=2", "--max-restarts=9", "--rdzv-id=x"], script);
    assert_eq!([job.ready(), job.ready()], ["ready", "ready"]);
    for _ in 0..2 {
        running.signal(Signal::USR1);
        assert_eq!(job.ready(), "notice");
    }
    running.signal(Signal::TERM);
    let ended = running.end();
    assert_eq!((ended.code, job.attempts("x")), (143, 1), "{}", ended.err);
    assert!(!ended.err.contains("SIGUSR1"), "{}", ended.err);
}

#[test]
fn a_process_that_ends_on_request_is_not_restarted() {
    let job = Job::new();
    let script = r#"echo "{\"rank\":$RANK,\"time_unix_ns\":1,\"exit\":75,\"cause\":\"asked\",\"first_cause_rank\":$RANK}" \
        > $SHARDFLOW_ERROR_FILE; exit 75"#;
    let ended = job.sh(&["--nproc-per-node=2", "--max-restarts=9", "--rdzv-id=x"], script).end();
    assert_eq!((ended.code, job.attempts("x")), (75, 1), "{}", ended.err);
}

#[test]
fn a_stalled_reader_blocks_no_process() {
    let job = Job::new();
    // The pipe and the queue cannot hold all output. The first record, the error, stderr and the last line must arrive.
    let script = "line=$(printf '%0120d' 7); echo '{\"first\":1}'; i=0; while [ $i -lt 6000 ]; do echo step $i $line; i=$((i+1)); done
        i=0; while [ $i -lt 1500 ]; do echo warning $i $line >&2; i=$((i+1)); done
        echo error: of one line; echo last; echo done > $READY";
    let mut unread = job.sh_unread(&["--rdzv-id=x"], script);
    assert_eq!(job.ready(), "done", "the script must end without a reader of its output");
    let (out, err) = unread.read();
    assert_eq!(unread.end(), 0);
    let steps = out.lines().filter(|line| line.starts_with("step ")).count();
    assert!(out.starts_with("{\"first\":1}\n") && out.contains("\nerror: of one line\nlast\n"), "{out}");
    let notices = out.lines().filter(|line| line.starts_with("(dropped ") && line.contains(" progress line"));
    let dropped: usize =
        notices.map(|line| line["(dropped ".len()..].split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
    assert!(steps + dropped == 6000 && dropped > 0, "{steps} steps in the output, {dropped} dropped");
    assert_eq!(err.lines().filter(|line| line.starts_with("warning ")).count(), 1500);
    let log = job.log("x", 0, 0);
    assert_eq!(log.lines().filter(|line| line.starts_with("step ")).count(), 6000, "the log has all lines");
}

#[test]
fn sigterm_ends_a_launcher_that_waits_for_its_reader() {
    let job = Job::new();
    let script =
        "line=$(printf '%01000d' 7); i=0; while [ $i -lt 200 ]; do echo $line; i=$((i+1)); done; echo done > $READY";
    let mut unread = job.sh_unread(&[], script);
    job.ready();
    unread.signal(Signal::TERM);
    // The signal may arrive before or after the script's end.
    let code = unread.end();
    assert!(code == 0 || code == 143, "{code}");
}

#[test]
fn new_output_begins_on_its_own_line_after_an_incomplete_one() {
    let job = Job::new();
    let folder = job.folder().join("shardflow-logs/x/attempt-0");
    fs::create_dir_all(&folder).unwrap();
    for rank in 0..2 {
        fs::write(folder.join(format!("rank-{rank}.log")), "whole\nto").unwrap();
    }
    assert_eq!(job.sh(&["--nproc-per-node=2", "--rdzv-id=x"], "echo error: new").end().code, 0);
    for rank in 0..2 {
        assert_eq!(job.log("x", 0, rank), "whole\nto\nerror: new\n");
    }
}

#[test]
fn the_program_of_a_plan_ends_with_the_command() {
    let job = Job::new();
    let temporary = job.folder().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let given = [("TMPDIR", temporary.to_str().unwrap())];
    let running = job.run_with(&given, &["plan", "--", "sh", "-c", "echo $$ > $READY; read line < $WAIT.none"]);
    let program = harness::Process::open(job.ready().parse().unwrap());
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, 143);
    assert!(program.ends_before(std::time::Instant::now() + timeout(5)), "the program is alive");
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
}

/// A process with pid 1, as in a container, ignores signals without a handler.
#[test]
fn commands_end_on_sigterm_as_process_1() {
    let job = Job::new();
    let root = std::process::Command::new("unshare").args(["-pf", "true"]).output();
    if !root.is_ok_and(|output| output.status.success()) {
        return eprintln!("SKIPPED: `unshare -pf` needs root");
    }
    // A launcher, and a command that reads a pipe that never ends.
    let launch = ["launch", "--", "sh", "-c", "echo ready > $READY; exec sleep 600"];
    let pipe = job.folder().join("wait.none");
    for args in [&launch[..], &["trace", pipe.to_str().unwrap()]] {
        let running = job.as_process_1(args);
        if args[0] == "launch" {
            job.ready();
        }
        let inner = harness::child_of(running.pid());
        harness::wait_for_a_handler(inner, 15);
        rustix::process::kill_process(rustix::process::Pid::from_raw(inner).unwrap(), Signal::TERM).unwrap();
        assert_eq!(running.end().code, 143, "{args:?}");
    }
}
