//! `gpt` on two nodes, each a network namespace with a host name of its own: partitions, a flap, dropped TCP, a slow link, a
//! slow process. They need root, `ip`, `nft` and `tc`, so they are ignored by default; `.ci/run network` runs them.

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

/// Longer than any of these runs, by far.
const TIMEOUT: Duration = Duration::from_secs(240);
/// A partition is noticed within this.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);
/// A write that gets rid of nothing fails within 10 s; then its process says so to all, and they end within two more.
const WRITE_FAILS_WITHIN: Duration = Duration::from_secs(14);
/// Resident memory that a slow peer may cost a process: what the system maps and libraries cache, not what is queued.
const GROWTH_KIB_MAX: u64 = 8 << 10;
/// How a slow process, or a slow way to it, is told of.
const SLOW: &str = "waiting for rank";
const NODES: [&str; 2] = ["a", "b"];
/// What each says when it has lost the other.
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

/// Two namespaces with a wire between them; removed at the end, with all that runs in them.
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
    /// Where it is not permitted, says so and gives nothing.
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

    /// Node `a` drops what it sends to the other (`output`) or gets from it (`input`); `what` narrows it.
    fn cut(&self, direction: &str, what: &str) {
        let nft = format!("ip netns exec {} nft add", self.node("a"));
        let hook = format!("{{ type filter hook {direction} priority 0 ; }}");
        run(&format!("{nft} chain inet cut {direction} {hook}")).expect("nft");
        let way = if direction == "input" { "iifname" } else { "oifname" };
        run(&format!("{nft} rule inet cut {direction} {way} wire {what} drop")).expect("nft");
    }

    fn cut_all(&self) {
        self.cut("output", "");
        self.cut("input", "");
    }

    fn heal(&self) {
        run(&format!("ip netns exec {} nft flush table inet cut", self.node("a"))).expect("nft");
    }

    /// Both directions carry so much.
    fn slow_down(&self, rate: &str) {
        for node in NODES {
            let tbf = format!("tbf rate {rate} burst 16kb latency 500ms");
            run(&format!("ip netns exec {} tc qdisc add dev wire root {tbf}", self.node(node))).expect("tc");
        }
    }
}

/// A launcher on one node, and what it says.
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

/// Cargo puts the programs of all packages into one folder.
fn program(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_dies")).with_file_name(name);
    assert!(program.is_file(), "{} is not there: build the workspace, not this package alone", program.display());
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

    /// Reads on until a line holds this; gives when that was.
    fn until(&mut self, text: &str, within: Duration) -> Instant {
        let deadline = Instant::now() + within;
        loop {
            let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                panic!("no line with {text:?} within {within:?} in:\n{}", self.text())
            };
            self.seen.push(line);
            let (at, line) = self.seen.last().expect("pushed");
            // That a rank is slow comes before that it is lost.
            if line.contains(text) && line.contains(SLOW) == text.contains(SLOW) {
                return *at;
            }
        }
    }

    /// Reads what comes in this time.
    fn listen(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
    }

    fn end(&mut self) -> Option<i32> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().expect("it ends").code(),
                Err(RecvTimeoutError::Timeout) => panic!("did not end:\n{}", self.text()),
            }
        }
    }
}

/// Losses by step, as bits; a step that was done twice came out the same.
fn losses(log: &Path) -> BTreeMap<u64, u64> {
    let mut losses = BTreeMap::new();
    for line in fs::read_to_string(log).unwrap_or_default().lines() {
        let record: Value = serde_json::from_str(line).unwrap_or(Value::Null);
        if let (Some(step), Some(loss)) = (record["step"].as_u64(), record["loss"].as_f64()) {
            let before = losses.insert(step, loss.to_bits());
            assert!(before.is_none_or(|before| before == loss.to_bits()), "step {step} came out differently");
        }
    }
    losses
}

/// The manifest of each committed step.
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
    /// Of steps that were seen to be committed.
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

    fn done(&self) -> u64 {
        losses(&self.folder.path().join("log")).len() as u64
    }

    /// Waits until so many steps were done, and one checkpoint is there.
    fn until_step(&mut self, step: u64) {
        let deadline = Instant::now() + TIMEOUT;
        while self.done() < step || commits(self.folder.path()).is_empty() {
            assert!(Instant::now() < deadline, "only {} steps:\n{}", self.done(), self.nodes[0].text());
            self.nodes[0].listen(Duration::from_millis(50));
        }
        self.look();
    }

    /// What was committed stays what it was.
    fn look(&mut self) {
        for (step, manifest) in commits(self.folder.path()) {
            let before = self.committed.insert(step.clone(), manifest.clone());
            assert!(before.is_none_or(|before| before == manifest), "{step} was committed twice");
        }
    }

    /// Each node says that this process is lost; gives how long the later one took.
    fn named(&mut self, since: Instant, within: Duration, said: [&str; 2]) -> f64 {
        let at = [0, 1].map(|node| {
            let left = (since + within).saturating_duration_since(Instant::now());
            self.nodes[node].until(said[node], left).duration_since(since)
        });
        self.look();
        at[0].max(at[1]).as_secs_f64()
    }

    /// To the end: all steps, the losses of one process, each step committed once and whole.
    fn finish(mut self) -> String {
        for node in &mut self.nodes {
            assert_eq!(node.end(), Some(0), "{}", node.text());
        }
        self.look();
        let here = self.folder.path();
        let mut alone = Running::start(None, 0, here, &format!("{} --log-json one", self.flags));
        assert_eq!(alone.end(), Some(0), "{}", alone.text());
        assert!(losses(&here.join("log")) == losses(&here.join("one")), "other losses than in one process");
        assert_eq!(self.done(), self.steps);
        assert_eq!(self.committed.len() as u64, self.steps.div_ceil(20), "{:?}", self.committed.keys());
        let verified =
            Command::new(program("shardflow")).args(["checkpoint", "verify", "ck"]).current_dir(here).output();
        assert!(verified.expect("a program").status.success());
        self.nodes[0].text() + &self.nodes[1].text()
    }
}

/// Waits while it listens.
fn pass(job: &mut Job, time: Duration) {
    job.nodes[0].listen(time / 2);
    job.look();
    job.nodes[1].listen(time / 2);
    job.look();
}

/// Cuts the nodes apart for 30 s: each says in time who is lost, and they go on afterwards. Gives what they said.
fn partition(name: &str, cut_by: impl Fn(&Net), said: [&str; 2]) -> Option<String> {
    let mut job = Job::start(name, 600, "data=2")?;
    let cut = Instant::now();
    cut_by(&job.net);
    let noticed = job.named(cut, NOTICED_WITHIN, said);
    let left = Duration::from_secs(30).saturating_sub(cut.elapsed());
    pass(&mut job, left);
    job.net.heal();
    let said = job.finish();
    println!("partition of 30 s ({name}): named by both sides after {noticed:.1} s");
    Some(said)
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_partition_is_noticed_and_nothing_is_committed_twice() {
    // Neither can hear of the other's view.
    let Some(said) = partition("part", Net::cut_all, EACH_OTHER) else { return };
    assert!(said.contains("restart 1 of"), "{said}");
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_one_way_partition_is_noticed_by_both() {
    // The one whose packets get lost hears from the other that they do: by a letter or, where that does not get through, a beat.
    partition("oneway", |net| net.cut("output", ""), ["(seen by process 1)", "rank 0: no heartbeat"]);
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_flap_of_three_seconds_restarts_nothing() {
    let Some(mut job) = Job::start("flap", 600, "stage=2") else { return };
    let before = job.done();
    let cut = Instant::now();
    job.net.cut_all();
    pass(&mut job, Duration::from_secs(3));
    assert!(job.done() < job.steps, "the cut came too late");
    let flapped = cut.elapsed();
    job.net.heal();
    job.until_step(before + 100);
    let resumed = cut.elapsed();
    let said = job.finish();
    assert!(!said.contains("restart"), "{said}");
    println!("flap of {:.1} s: 100 steps later after {:.1} s", flapped.as_secs_f64(), resumed.as_secs_f64());
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_half_open_socket_fails_its_write_in_time() {
    let Some(mut job) = Job::start("half", 600, "data=2") else { return };
    let cut = Instant::now();
    // Heartbeats still come.
    job.net.cut("output", "meta l4proto tcp");
    job.net.cut("input", "meta l4proto tcp");
    // Whose write fails first tells, and by heartbeats: which of the two is named is chance.
    let noticed = job.named(cut, WRITE_FAILS_WITHIN, ["error: rank", "error: rank"]);
    job.net.heal();
    let said = job.finish();
    assert!(said.contains("Connection timed out") || said.contains("takes no bytes"), "{said}");
    println!("half-open connections: named by both sides after {noticed:.1} s");
}

/// Resident memory of each `gpt` of the job, KiB.
fn resident_kib(job: &Job) -> Vec<u64> {
    let here = job.folder.path().canonicalize().expect("it is there");
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

/// From now on the job is slow: the other is named, and memory stays what it was. Gives the seconds and the growth.
fn slow_and_named(job: &mut Job, node: usize, rank: u32) -> (f64, u64) {
    let (before, begin) = (resident_kib(job), Instant::now());
    assert_eq!(before.len(), 2);
    let named = job.nodes[node].until(&format!("{SLOW} {rank}"), Duration::from_secs(60));
    let mut most = 0;
    while begin.elapsed() < Duration::from_secs(30) {
        job.nodes[1 - node].listen(Duration::from_millis(100));
        let now = resident_kib(job);
        most = most.max(now.iter().sum::<u64>().saturating_sub(before.iter().sum()));
    }
    assert!(most < GROWTH_KIB_MAX, "two processes have grown by {most} KiB");
    (named.duration_since(begin).as_secs_f64(), most)
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_slow_link_is_named_and_costs_no_memory() {
    let Some(mut job) = Job::start("link", 100_000, "data=2") else { return };
    let before = job.done();
    job.net.slow_down("1mbit");
    let (named, growth) = slow_and_named(&mut job, 0, 1);
    let (steps, said) = (job.done() - before, job.nodes[0].text() + &job.nodes[1].text());
    assert!(!said.contains("restart") && steps > 0, "{steps} steps; {said}");
    println!("link of 1 Mbit/s: named after {named:.1} s, {growth} KiB more, {steps} steps in 30 s");
}

/// A cgroup (v1 or v2) that has a tenth of a core.
struct Slow(PathBuf);

impl Slow {
    fn new() -> Result<Self, String> {
        let failed = |e: std::io::Error| format!("no cgroup with a quota of CPU: {e}");
        let v1 = Path::new("/sys/fs/cgroup/cpu");
        let folder = if v1.is_dir() { v1 } else { Path::new("/sys/fs/cgroup") };
        let slow = Self(folder.join(format!("shardflow-test-{}", std::process::id())));
        fs::create_dir(&slow.0).map_err(failed)?;
        let (file, text) = if v1.is_dir() { ("cpu.cfs_quota_us", "10000") } else { ("cpu.max", "10000 100000") };
        fs::write(slow.0.join(file), text).map_err(failed)?;
        Ok(slow)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Empty once its processes have ended, which the caller sees to.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && self.0.is_dir() && Instant::now() < deadline {
            thread::yield_now();
        }
    }
}

#[test]
#[ignore = "needs root: run by .ci/run network"]
fn a_slow_process_is_named_and_costs_no_memory() {
    let slow = match Slow::new() {
        Ok(slow) => slow,
        Err(why) => return println!("SKIPPED slow process: {why}"),
    };
    let Some(mut job) = Job::start("process", 100_000, "data=2") else { return };
    let before = job.done();
    let pids = Command::new("ip").args(["netns", "pids", &job.net.node("b")]).output().expect("ip").stdout;
    for pid in String::from_utf8_lossy(&pids).split_whitespace() {
        fs::write(slow.0.join("cgroup.procs"), pid).expect("a process of ours");
    }
    let (named, growth) = slow_and_named(&mut job, 0, 1);
    let (steps, said) = (job.done() - before, job.nodes[0].text() + &job.nodes[1].text());
    assert!(!said.contains("restart") && steps > 0, "{steps} steps; {said}");
    println!("process with a tenth of a core: named after {named:.1} s, {growth} KiB more, {steps} steps in 30 s");
    drop(job);
    drop(slow);
}
