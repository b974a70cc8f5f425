//! Runs `gpt` on two nodes. Each node is a network namespace with its own host name. The tests cover partitions, a
//! short interruption, dropped TCP packets, a slow link and a slow process. They need root, `ip`, `nft` and `tc`, so
//! they are ignored by default. `.ci/run network` runs them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use shardflow_integration_tests::training::Scratch;

/// Much longer than any of these runs.
const TIMEOUT: Duration = Duration::from_secs(240);
/// Time within which both nodes must report a partition.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);
/// A blocked write fails within 10 s. Then the writing process reports the failure, and all processes end within 2 more
/// seconds. The rest of this limit is a margin.
const WRITE_FAILS_WITHIN: Duration = Duration::from_secs(14);
/// Permitted growth of resident memory while a peer is slow. This is enough for mapped pages and caches of libraries,
/// but not for queued data.
const GROWTH_KIB_MAX: u64 = 8 << 10;
/// Beginning of the message about a slow process or link.
const SLOW: &str = "waiting for rank";
const NODES: [&str; 2] = ["a", "b"];
/// Part of the message that each node prints after it has lost the other node.
const EACH_OTHER: [&str; 2] = ["rank 1", "rank 0"];
const SECRET: &str = "a secret of these tests only";

fn run(command: &str) -> Result<(), String> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let done = Command::new(words[0]).args(&words[1..]).output().map_err(|e| format!("{command}: {e}"))?;
    if done.status.success() {
        Ok(())
    } else {
        Err(format!("{command}: {}", String::from_utf8_lossy(&done.stderr).trim()))
    }
}

/// Two namespaces with a link between them. Dropping this value removes the namespaces and kills their processes.
struct Net {
    name: String,
}

impl Drop for Net {
    fn drop(&mut self) {
        for node in NODES {
            let pids = Command::new("ip").args(["netns", "pids", &self.node(node)]).output();
            for pid in String::from_utf8_lossy(&pids.map(|p| p.stdout).unwrap_or_default()).split_whitespace() {
                let _ = run(&format!("kill -9 {pid}"));
            }
            let _ = run(&format!("ip netns del {}", self.node(node)));
        }
    }
}

impl Net {
    /// Returns `None` and prints SKIPPED if network namespaces are not permitted.
    fn new(test: &str) -> Option<Self> {
        let net = Self { name: format!("sf{}{test}", std::process::id()) };
        match net.make() {
            Ok(()) => Some(net),
            Err(why) => {
                println!("SKIPPED {test}: {why}");
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let [a, b] = NODES.map(|node| self.node(node));
        run("nft --version")?;
        run(&format!("ip netns add {a}"))?;
        run(&format!("ip netns add {b}"))?;
        run(&format!("ip link add wire netns {a} type veth peer name wire netns {b}"))?;
        for (node, address) in [(&a, "10.77.0.1"), (&b, "10.77.0.2")] {
            run(&format!("ip -n {node} addr add {address}/24 dev wire"))?;
            run(&format!("ip -n {node} link set wire up"))?;
            run(&format!("ip -n {node} link set lo up"))?;
            run(&format!("ip netns exec {node} nft add table inet cut"))?;
        }
        Ok(())
    }

    fn node(&self, node: &str) -> String {
        format!("{}{node}", self.name)
    }

    /// Makes node `a` drop packets to the other node (`output`) or from it (`input`). `filter` selects the packets.
    fn cut(&self, direction: &str, filter: &str) {
        let nft = format!("ip netns exec {} nft add", self.node("a"));
        let hook = format!("{{ type filter hook {direction} priority 0 ; }}");
        run(&format!("{nft} chain inet cut {direction} {hook}")).expect("nft");
        let interface = if direction == "input" { "iifname" } else { "oifname" };
        run(&format!("{nft} rule inet cut {direction} {interface} wire {filter} drop")).expect("nft");
    }

    fn cut_all(&self) {
        self.cut("output", "");
        self.cut("input", "");
    }

    fn heal(&self) {
        run(&format!("ip netns exec {} nft flush table inet cut", self.node("a"))).expect("nft");
    }

    /// Limits the rate of both directions.
    fn slow_down(&self, rate: &str) {
        for node in NODES {
            let tbf = format!("tbf rate {rate} burst 16kb latency 500ms");
            run(&format!("ip netns exec {} tc qdisc add dev wire root {tbf}", self.node(node))).expect("tc");
        }
    }
}

/// A launcher on one node, and its lines of output with their times.
struct Running {
    child: Child,
    lines: Receiver<(Instant, String)>,
    seen: Vec<(Instant, String)>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the path of a program. Cargo puts the programs of all packages into one folder.
fn program(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_dies")).with_file_name(name);
    assert!(program.is_file(), "{} does not exist: build the workspace, not only this package", program.display());
    program
}

impl Running {
    fn start(net: Option<&Net>, rank: usize, folder: &Path, flags: &str) -> Self {
        let mut command = Command::new(if net.is_some() { Path::new("ip").into() } else { program("gpt") });
        if let Some(net) = net {
            let node = net.node(NODES[rank]);
            let script = "hostname $0 && exec \"$@\"";
            command.args(["netns", "exec", &node, "unshare", "--uts", "sh", "-c", script, &node]);
            command.arg(program("shardflow")).args(["launch", "--nnodes=2", "--max-restarts=5", "--rdzv-id=net"]);
            command.args([&format!("--node-rank={rank}"), "--rdzv-endpoint=10.77.0.1:29400", "--"]).arg(program("gpt"));
            command.env("SHARDFLOW_SECRET", SECRET);
        }
        let model =
            "--layers 2 --heads 2 --width 32 --context 16 --batch 8 --sample 0 --threads-per-device 1 --data text";
        command.args(model.split(' ')).args(flags.split_whitespace()).current_dir(folder);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a program");
        let (sender, lines) = channel();
        let read = |pipe: Box<dyn Read + Send>| {
            let (sender, mut lines) = (sender.clone(), BufReader::new(pipe).lines().map_while(Result::ok));
            thread::spawn(move || lines.try_for_each(|line| sender.send((Instant::now(), line))));
        };
        read(Box::new(child.stdout.take().expect("piped")));
        read(Box::new(child.stderr.take().expect("piped")));
        Self { child, lines, seen: Vec::new() }
    }

    fn text(&self) -> String {
        self.seen.iter().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join("\n")
    }

    /// Reads lines until one contains this text, and returns the time of that line.
    fn until(&mut self, text: &str, within: Duration) -> Instant {
        let deadline = Instant::now() + within;
        loop {
            let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                panic!("no line with {text:?} within {within:?} in:\n{}", self.text())
            };
            self.seen.push(line);
            let (at, line) = self.seen.last().expect("pushed");
            // A line about a slow rank may also contain the text for a lost rank, so match only lines of the same kind.
            if line.contains(text) && line.contains(SLOW) == text.contains(SLOW) {
                return *at;
            }
        }
    }

    /// Reads lines for this long.
    fn listen(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
    }

    fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().expect("an exit status").code(),
                Err(RecvTimeoutError::Timeout) => panic!("the program did not end:\n{}", self.text()),
            }
        }
    }
}

/// Returns the bits of the losses by step. A repeated step must have the same loss.
fn losses(log: &Path) -> BTreeMap<u64, u64> {
    let mut losses = BTreeMap::new();
    for line in fs::read_to_string(log).unwrap_or_default().lines() {
        let record: Value = serde_json::from_str(line).unwrap_or(Value::Null);
        if let (Some(step), Some(loss)) = (record["step"].as_u64(), record["loss"].as_f64()) {
            let before = losses.insert(step, loss.to_bits());
            assert!(before.is_none_or(|before| before == loss.to_bits()), "step {step} has two losses");
        }
    }
    losses
}

/// Returns the manifest of each committed step.
fn commits(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let steps = fs::read_dir(folder.join("ck")).into_iter().flatten().flatten();
    let manifest = |step: fs::DirEntry| {
        Some((step.file_name().to_string_lossy().into_owned(), fs::read(step.path().join("manifest.json")).ok()?))
    };
    steps.filter_map(manifest).collect()
}

/// A training of two nodes with one process each.
struct Job {
    net: Net,
    folder: Scratch,
    nodes: [Running; 2],
    steps: u64,
    flags: String,
    /// Manifests of the committed steps that were seen so far.
    committed: BTreeMap<String, Vec<u8>>,
}

impl Job {
    fn start(test: &str, steps: u64, mesh: &str) -> Option<Self> {
        let net = Net::new(test)?;
        let folder = Scratch::new(&format!("network-{test}"));
        fs::write(folder.path().join("text"), "the quick brown fox jumps over the lazy dog.\n".repeat(40))
            .expect("room");
        let flags = format!("--mesh {mesh} --micro-batches 2 --steps {steps}");
        let many = format!("{flags} --checkpoint ck --checkpoint-every 20 --checkpoint-keep 1000 --log-json log");
        let nodes = [0, 1].map(|rank| Running::start(Some(&net), rank, folder.path(), &many));
        let mut job = Self { net, folder, nodes, steps, flags, committed: BTreeMap::new() };
        job.until_step(60);
        Some(job)
    }

    fn steps_done(&self) -> u64 {
        losses(&self.folder.path().join("log")).len() as u64
    }

    /// Waits until the job has done this number of steps and has a checkpoint.
    fn until_step(&mut self, step: u64) {
        let deadline = Instant::now() + TIMEOUT;
        while self.steps_done() < step || commits(self.folder.path()).is_empty() {
            assert!(Instant::now() < deadline, "only {} steps:\n{}", self.steps_done(), self.nodes[0].text());
            self.nodes[0].listen(Duration::from_millis(50));
        }
        self.check_commits();
    }

    /// Checks that committed manifests have not changed.
    fn check_commits(&mut self) {
        for (step, manifest) in commits(self.folder.path()) {
            let before = self.committed.insert(step.clone(), manifest.clone());
            assert!(before.is_none_or(|before| before == manifest), "{step} was committed twice");
        }
    }

    /// Waits until each node has printed its message. Returns the seconds until the later message.
    fn wait_for_messages(&mut self, since: Instant, within: Duration, messages: [&str; 2]) -> f64 {
        let at = [0, 1].map(|node| {
            let left = (since + within).saturating_duration_since(Instant::now());
            self.nodes[node].until(messages[node], left).duration_since(since)
        });
        self.check_commits();
        at[0].max(at[1]).as_secs_f64()
    }

    /// Waits for the end of the job. Checks that all losses equal those of a training in one process, and that each
    /// checkpoint was committed once and is complete.
    fn finish(mut self) -> String {
        for node in &mut self.nodes {
            assert_eq!(node.wait(), Some(0), "{}", node.text());
        }
        self.check_commits();
        let here = self.folder.path();
        let mut alone = Running::start(None, 0, here, &format!("{} --log-json one", self.flags));
        assert_eq!(alone.wait(), Some(0), "{}", alone.text());
        assert!(losses(&here.join("log")) == losses(&here.join("one")), "the losses differ from those of one process");
        assert_eq!(self.steps_done(), self.steps);
        assert_eq!(self.committed.len() as u64, self.steps.div_ceil(20), "{:?}", self.committed.keys());
        let verified =
            Command::new(program("shardflow")).args(["checkpoint", "verify", "ck"]).current_dir(here).output();
        assert!(verified.expect("a program").status.success());
        self.nodes[0].text() + &self.nodes[1].text()
    }
}

/// Waits for this long, and reads the output of both nodes meanwhile.
fn wait_and_read(job: &mut Job, time: Duration) {
    job.nodes[0].listen(time / 2);
    job.check_commits();
    job.nodes[1].listen(time / 2);
    job.check_commits();
}

/// Separates the nodes for 30 s. Each node must report the lost rank in time, and both nodes must continue afterwards.
/// Returns the output of both nodes.
fn partition(name: &str, cut_by: impl Fn(&Net), messages: [&str; 2]) -> Option<String> {
    let mut job = Job::start(name, 600, "data=2")?;
    let cut = Instant::now();
    cut_by(&job.net);
    let noticed = job.wait_for_messages(cut, NOTICED_WITHIN, messages);
    let left = Duration::from_secs(30).saturating_sub(cut.elapsed());
    wait_and_read(&mut job, left);
    job.net.heal();
    let output = job.finish();
    println!("partition of 30 s ({name}): reported by both sides after {noticed:.1} s");
    Some(output)
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_partition_is_noticed_and_nothing_is_committed_twice() {
    // Neither node receives the other's report.
    let Some(output) = partition("part", Net::cut_all, EACH_OTHER) else { return };
    assert!(output.contains("restart 1 of"), "{output}");
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_one_way_partition_is_noticed_by_both() {
    // Node `a` cannot send. Node `b` reports the partition to node `a` by a letter (a message of the control plane), or
    // by a heartbeat if the letter is lost.
    partition("oneway", |net| net.cut("output", ""), ["(seen by process 1)", "rank 0: no heartbeat"]);
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_flap_of_three_seconds_restarts_nothing() {
    let Some(mut job) = Job::start("flap", 600, "stage=2") else { return };
    let before = job.steps_done();
    let cut = Instant::now();
    job.net.cut_all();
    wait_and_read(&mut job, Duration::from_secs(3));
    assert!(job.steps_done() < job.steps, "the cut came too late");
    let flapped = cut.elapsed();
    job.net.heal();
    job.until_step(before + 100);
    let resumed = cut.elapsed();
    let output = job.finish();
    assert!(!output.contains("restart"), "{output}");
    println!("flap of {:.1} s: 100 steps took {:.1} s, flap included", flapped.as_secs_f64(), resumed.as_secs_f64());
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_half_open_socket_fails_its_write_in_time() {
    let Some(mut job) = Job::start("half", 600, "data=2") else { return };
    let cut = Instant::now();
    // Heartbeats still arrive, because they use UDP.
    job.net.cut("output", "meta l4proto tcp");
    job.net.cut("input", "meta l4proto tcp");
    // The process whose write fails first reports the failure to the other process, also by heartbeats. Either process
    // may be the first.
    let noticed = job.wait_for_messages(cut, WRITE_FAILS_WITHIN, ["error: rank", "error: rank"]);
    job.net.heal();
    let output = job.finish();
    assert!(output.contains("Connection timed out") || output.contains("has accepted no bytes"), "{output}");
    println!("half-open connections: reported by both sides after {noticed:.1} s");
}

/// Returns the resident memory in KiB of each `gpt` process of the job.
fn resident_kib(job: &Job) -> Vec<u64> {
    let here = job.folder.path().canonicalize().expect("the folder");
    let processes = fs::read_dir("/proc").expect("Linux").flatten().map(|entry| entry.path());
    let ours = processes.filter(|p| {
        let exe = fs::read_link(p.join("exe")).unwrap_or_default();
        exe.file_name().is_some_and(|name| name == "gpt") && fs::read_link(p.join("cwd")).is_ok_and(|cwd| cwd == here)
    });
    let resident = |path: PathBuf| -> Option<u64> {
        let status = fs::read_to_string(path.join("status")).ok()?;
        status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    ours.filter_map(resident).collect()
}

/// Checks that the job reports the slow rank and does not use more memory. Returns the seconds until the report, and
/// the growth of memory in KiB.
fn check_slow_rank(job: &mut Job, node: usize, rank: u32) -> (f64, u64) {
    let (before, begin) = (resident_kib(job), Instant::now());
    assert_eq!(before.len(), 2);
    let named = job.nodes[node].until(&format!("{SLOW} {rank}"), Duration::from_secs(60));
    let mut growth_max = 0;
    while begin.elapsed() < Duration::from_secs(30) {
        job.nodes[1 - node].listen(Duration::from_millis(100));
        let now = resident_kib(job);
        growth_max = growth_max.max(now.iter().sum::<u64>().saturating_sub(before.iter().sum()));
    }
    assert!(growth_max < GROWTH_KIB_MAX, "two processes have grown by {growth_max} KiB");
    (named.duration_since(begin).as_secs_f64(), growth_max)
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_slow_link_is_named_and_costs_no_memory() {
    let Some(mut job) = Job::start("link", 100_000, "data=2") else { return };
    let before = job.steps_done();
    job.net.slow_down("1mbit");
    let (named, growth) = check_slow_rank(&mut job, 0, 1);
    let (steps, output) = (job.steps_done() - before, job.nodes[0].text() + &job.nodes[1].text());
    assert!(!output.contains("restart") && steps > 0, "{steps} steps; {output}");
    println!("link of 1 Mbit/s: reported after {named:.1} s, memory grew by {growth} KiB, {steps} steps in 30 s");
}

/// A cgroup (v1 or v2) limited to a tenth of a core.
struct SlowCgroup(PathBuf);

impl SlowCgroup {
    fn new() -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("cannot create a cgroup with a CPU quota: {e}");
        let v1 = Path::new("/sys/fs/cgroup/cpu");
        let folder = if v1.is_dir() { v1 } else { Path::new("/sys/fs/cgroup") };
        let slow = Self(folder.join(format!("shardflow-test-{}", std::process::id())));
        fs::create_dir(&slow.0).map_err(failed)?;
        let (file, text) = if v1.is_dir() { ("cpu.cfs_quota_us", "10000") } else { ("cpu.max", "10000 100000") };
        fs::write(slow.0.join(file), text).map_err(failed)?;
        Ok(slow)
    }
}

impl Drop for SlowCgroup {
    fn drop(&mut self) {
        // The folder can be removed only after its processes have ended. The caller ends them first.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && self.0.is_dir() && Instant::now() < deadline {
            thread::yield_now();
        }
    }
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_slow_process_is_named_and_costs_no_memory() {
    let slow = match SlowCgroup::new() {
        Ok(slow) => slow,
        Err(why) => return println!("SKIPPED slow process: {why}"),
    };
    let Some(mut job) = Job::start("process", 100_000, "data=2") else { return };
    let before = job.steps_done();
    let pids = Command::new("ip").args(["netns", "pids", &job.net.node("b")]).output().expect("ip").stdout;
    for pid in String::from_utf8_lossy(&pids).split_whitespace() {
        fs::write(slow.0.join("cgroup.procs"), pid).expect("permission to move the process");
    }
    let (named, growth) = check_slow_rank(&mut job, 0, 1);
    let (steps, output) = (job.steps_done() - before, job.nodes[0].text() + &job.nodes[1].text());
    assert!(!output.contains("restart") && steps > 0, "{steps} steps; {output}");
    println!("slow process: reported after {named:.1} s, memory grew by {growth} KiB, {steps} steps in 30 s");
    drop(job);
    drop(slow);
}
