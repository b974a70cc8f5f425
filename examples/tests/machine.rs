//! Tests `gpt` on machines with restrictions: memory limits of a cgroup, containers that each have their own `/tmp`, an
//! unusable `TMPDIR`, names and addresses that differ between nodes, and other launchers. Tests that need root print
//! `SKIPPED` when they run as another user.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use programs::{Folder, GPT, Running, launcher};

#[path = "support/programs.rs"]
mod programs;

/// Time limit of a run, much longer than any run of these tests takes.
const TIMEOUT: Duration = Duration::from_secs(150);
const SECRET: (&str, &str) = ("SHARDFLOW_SECRET", "a secret of these tests only");
const MODEL: &str = "--layers 2 --heads 2 --width 16 --context 8 --batch 4 --sample 0 --steps 2 --threads-per-device 1 \
                     --data text";

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback");
    listener.local_addr().expect("bound").port()
}

/// Returns the command line of `gpt` with this model and these flags.
fn gpt_of(model: &str, flags: &str) -> Vec<String> {
    let words = model.split_whitespace().chain(flags.split_whitespace());
    [GPT].into_iter().chain(words).map(str::to_owned).collect()
}

/// Returns the command line of `gpt` with the model of these tests.
fn gpt(flags: &str) -> Vec<String> {
    gpt_of(MODEL, flags)
}

/// Returns the command line of the launcher with `flags`, for `gpt` with `gpt_flags`.
fn launch(flags: &str, gpt_flags: &str) -> Vec<String> {
    launch_of(flags, &gpt(gpt_flags))
}

fn launch_of(flags: &str, program: &[String]) -> Vec<String> {
    let launcher = launcher().display().to_string();
    let words = ["launch"].into_iter().chain(flags.split_whitespace()).chain(["--"]).map(str::to_owned);
    [launcher].into_iter().chain(words).chain(program.iter().cloned()).collect()
}

/// Adds a line of `sh` that runs before the command.
fn after(script: &str, command: &[String]) -> Vec<String> {
    let script = format!("{script} && exec \"$@\"");
    ["sh", "-c", &script, "sh"].into_iter().map(str::to_owned).chain(command.iter().cloned()).collect()
}

/// Runs `script` and the command in a new mount namespace.
fn unshared(script: &str, command: &[String]) -> Vec<String> {
    ["unshare", "--mount"].into_iter().map(str::to_owned).chain(after(script, command)).collect()
}

fn start(folder: &Folder, command: &[String], environment: &[(&str, &str)]) -> Running {
    folder.start(Command::new(&command[0]).args(&command[1..]).env_remove("TMPDIR").envs(environment.iter().copied()))
}

/// Returns whether mount namespaces are permitted; prints `SKIPPED` otherwise.
fn can_unshare(test: &str) -> bool {
    let output = Command::new("unshare").args(["--mount", "mount", "-t", "tmpfs", "none", "/tmp"]).output();
    let cause = match output {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    println!("SKIPPED {test}: no mount namespace: {cause}");
    false
}

/// A cgroup (v1 or v2) with a memory limit.
struct MemoryCgroup(PathBuf);

impl MemoryCgroup {
    fn new(name: &str) -> Option<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let folder = if v1.is_dir() { v1 } else { Path::new("/sys/fs/cgroup") };
        let cgroup = Self(folder.join(format!("shardflow-{name}-{}", std::process::id())));
        match fs::create_dir(&cgroup.0).and_then(|()| cgroup.limit(1 << 30)) {
            Ok(()) => Some(cgroup),
            Err(error) => {
                println!("SKIPPED {name}: no cgroup with a memory limit: {error}");
                None
            }
        }
    }

    fn limit(&self, bytes: u64) -> std::io::Result<()> {
        let file = ["memory.limit_in_bytes", "memory.max"].map(|name| self.0.join(name));
        let file = file.iter().find(|file| file.exists()).ok_or(std::io::ErrorKind::NotFound)?;
        fs::write(file, bytes.to_string())
    }

    /// Adds a shell line that joins the cgroup before the command runs.
    fn with(&self, command: &[String]) -> Vec<String> {
        after(&format!("echo $$ > {}/cgroup.procs", self.0.display()), command)
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // The kernel takes a moment to remove ended processes from the cgroup.
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && self.0.is_dir() && Instant::now() < deadline {
            thread::yield_now();
        }
    }
}

/// Returns the number that follows `words` in a text.
fn number_after(text: &str, words: &str) -> u64 {
    let rest = text.split_once(words).unwrap_or_else(|| panic!("no {words:?} in:\n{text}")).1;
    rest.split(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn a_plan_above_the_limit_of_a_cgroup_is_refused() {
    let folder = Folder::new("machine-cgroup");
    let Some(cgroup) = MemoryCgroup::new("cgroup") else { return };
    let model = MODEL.replace("--width 16 --context 8", "--width 512 --context 64");
    let gpt = |flags: &str| gpt_of(&model, flags);
    let run = |limit: u64, command: &[String]| {
        cgroup.limit(limit).expect("an empty cgroup");
        let mut run = start(&folder, &cgroup.with(command), &[]);
        (run.end(TIMEOUT), run.text())
    };
    const SMALL: u64 = 48 << 20;
    let (code, printed) = run(SMALL, &gpt(""));
    assert_eq!(code, Some(78), "{printed}");
    for part in
        ["error: the plan does not fit: this node has ", ": limit 50331648 bytes, ", "\n  device 0: ", "reduce --batch"]
    {
        assert!(printed.contains(part), "no {part:?} in:\n{printed}");
    }
    let needed = number_after(&printed, "the job needs ");
    let used = SMALL - number_after(&printed, "this node has ");
    // The number of bytes that the error message asks for is enough for the whole run, even with the parameter file.
    let enough = needed + used + (8 << 20);
    for flags in ["", "--save model"] {
        let (code, printed) = run(enough, &gpt(flags));
        assert_eq!(code, Some(0), "{flags}: {printed}");
    }
    // Snapshots need more memory, so the run is refused before the first step.
    let (code, printed) = run(enough, &gpt("--checkpoint ck"));
    assert_eq!(code, Some(78), "{printed}");
    assert!(printed.contains("bytes for 2 snapshots") && !printed.contains("loss"), "{printed}");
    // Two ranks share the limit. Each rank alone would fit.
    let (code, printed) = run(enough, &launch_of("--nproc-per-node 2", &gpt("--mesh data=2")));
    assert_eq!(code, Some(78), "{printed}");
    assert!(printed.contains("\n  device 0: ") && printed.contains("\n  device 1: "), "{printed}");
    // `--memory-mib` must not replace the node's limit, because the kernel kills a process that exceeds it.
    let (code, printed) = run(SMALL, &gpt("--memory-mib 4096"));
    assert_eq!(code, Some(78), "{printed}");
}

/// Two containers of one host each have a memory limit that is enough for one rank only.
#[test]
fn each_container_of_a_host_has_its_own_memory_limit() {
    let folder = Folder::new("machine-limits");
    let cgroups = [MemoryCgroup::new("limits-0"), MemoryCgroup::new("limits-1")];
    let [Some(first), Some(second)] = &cgroups else { return };
    let model = MODEL.replace("--width 16 --context 8", "--width 512 --context 64");
    let run = |limit: u64, separate: bool| {
        let port = free_port();
        let nodes = [0, 1].map(|node| {
            let cgroup = if separate && node == 1 { second } else { first };
            cgroup.limit(limit).expect("an empty cgroup");
            let flags = format!("--nnodes 2 --node-rank {node} --rdzv-endpoint 127.0.0.1:{port} --rdzv-id limits");
            let command = launch_of(&flags, &gpt_of(&model, "--mesh data=2 --log-json log.json"));
            start(&folder, &cgroup.with(&command), &[SECRET])
        });
        nodes.map(|mut node| (node.end(TIMEOUT), node.text()))
    };
    let refused = run(48 << 20, true);
    assert!(refused.iter().all(|(code, _)| *code == Some(78)), "{refused:?}");
    let text = refused.iter().map(|(_, text)| text.as_str()).find(|text| text.contains("the job needs "));
    let needed = number_after(text.unwrap_or_default(), "the job needs ");
    // A launcher and a process use 20 MB.
    let enough = needed + (32 << 20);
    assert!(enough < 2 * needed, "{enough} bytes may be enough for two ranks of {needed} bytes");
    let ended = run(enough, true);
    assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{ended:?}");
    let refused = run(enough, false);
    assert!(refused.iter().all(|(code, _)| *code == Some(78)), "{refused:?}");
    // The memory of the two ranks differs by the staging memory of outputs that only the first device fetches.
    let mut texts = refused.iter().map(|(_, text)| text).filter(|text| text.contains("the job needs "));
    assert!(texts.any(|text| number_after(text, "the job needs ").abs_diff(2 * needed) < 4096), "{refused:?}");
}

#[test]
fn text_and_initial_parameters_fit_the_limit_or_are_refused() {
    let folder = Folder::new("machine-extra");
    let Some(cgroup) = MemoryCgroup::new("extra") else { return };
    let model = MODEL
        .replace("--width 16 --context 8", "--width 512 --context 64")
        .replace("--sample 0 --steps 2", "--steps 1");
    let run = |limit: u64, flags: &str| {
        cgroup.limit(limit).expect("an empty cgroup");
        let mut run = start(&folder, &cgroup.with(&gpt_of(&model, flags)), &[]);
        (run.end(TIMEOUT), run.text())
    };
    let (code, printed) = run(1 << 30, "--sample 0 --save model");
    assert_eq!(code, Some(0), "{printed}");
    for flags in ["--sample 5", "--sample 0 --init-from model"] {
        const SMALL: u64 = 48 << 20;
        let (code, printed) = run(SMALL, flags);
        assert_eq!(code, Some(78), "{flags}: {printed}");
        for part in ["bytes that the program allocates besides the plan", "give --sample 0"] {
            assert!(printed.contains(part), "{flags}: {printed}");
        }
        let needed = number_after(&printed, "the job needs ") + SMALL - number_after(&printed, "this node has ");
        let (code, printed) = run(needed + (4 << 20), flags);
        assert_eq!(code, Some(0), "{flags}: {printed}");
    }
}

/// Returns whether `setpriv` can run a command as another user; prints `SKIPPED` otherwise.
fn can_change_user(test: &str) -> bool {
    let can = Command::new("setpriv").args(["--reuid=54321", "--clear-groups", "true"]).output();
    let can = can.is_ok_and(|output| output.status.success());
    if !can {
        println!("SKIPPED {test}: cannot change the user");
    }
    can
}

/// If a limit on threads is too low, the process must report this limit.
#[test]
fn a_limit_on_threads_is_reported() {
    if !can_change_user("machine-threads") {
        return;
    }
    let folder = Folder::new("machine-threads");
    let open = Command::new("chmod").arg("a+rwx").arg(folder.path()).status().expect("chmod runs");
    assert!(open.success());
    let model = MODEL.replace("--threads-per-device 1", "--threads-per-device 2");
    for limit in 1..24 {
        let limit_flag = format!("--nproc={limit}");
        // The limit counts the threads of all processes of a user, so the test uses a separate user id.
        let id = format!("--reuid={}", 100_000 + std::process::id());
        let user = ["setpriv", &id, "--clear-groups", "prlimit", &limit_flag].map(str::to_owned);
        let mut run = start(&folder, &[&user[..], &gpt_of(&model, "--checkpoint ck --resume auto")].concat(), &[]);
        let (code, printed) = (run.end(TIMEOUT), run.text());
        if code == Some(0) {
            return assert!(limit > 4, "{limit}");
        }
        assert_eq!(code, Some(78), "{limit}: {printed}");
        for part in ["Resource temporarily unavailable", "ulimit -u"] {
            assert!(printed.contains(part), "{limit}: no {part:?} in:\n{printed}");
        }
        assert!(!printed.contains("a bug in"), "{limit}: {printed}");
    }
    panic!("24 threads are not enough");
}

#[test]
fn parameters_without_space_for_the_optimizer_state_are_refused_before_training() {
    if !can_unshare("machine-room") {
        return;
    }
    let folder = Folder::new("machine-room");
    fs::create_dir(folder.path().join("small")).expect("a folder");
    // Two layers of width 128 have 1.6 MB of weights; with the moments of AdamW they need 4.8 MB.
    let model = MODEL.replace("--width 16", "--width 128");
    for (size, expected) in [("3m", Some(73)), ("8m", Some(0))] {
        let mount = format!("mount -t tmpfs -o size={size} none small");
        let mut run = start(&folder, &unshared(&mount, &gpt_of(&model, "--save small/model")), &[]);
        assert_eq!(run.end(TIMEOUT), expected, "{}", run.text());
        let refusal = "error: --save small/model: 3145728 bytes are free, ";
        assert_eq!(run.text().contains(refusal), expected == Some(73), "{}", run.text());
        assert_eq!(run.text().contains("loss"), expected == Some(0), "{}", run.text());
    }
    // The root folder, the lock and the lock's folder use three of the six inodes.
    let mount = "mount -t tmpfs -o size=8m,nr_inodes=6 none small";
    let mut run = start(&folder, &unshared(mount, &gpt("--checkpoint small/ck")), &[]);
    assert_eq!(run.end(TIMEOUT), Some(73), "{}", run.text());
    let refusal = "--checkpoint small/ck: 3 inodes are free, but 5 are needed: 1 checkpoint of 5 inodes";
    assert!(run.text().contains(refusal) && !run.text().contains("loss"), "{}", run.text());
}

/// Each rank receives the addresses of the ranks to which it connects. Most of these ranks run on other nodes.
#[test]
fn ranks_of_several_nodes_reach_the_ranks_that_they_need() {
    if !can_unshare("nodes") {
        return;
    }
    let folder = Folder::new("machine-nodes");
    let program = |log: &str| gpt(&format!("--mesh data=2,stage=2,tensor=2 --log-json {log}"));
    assert_eq!(start(&folder, &program("one"), &[]).end(TIMEOUT), Some(0));
    let losses = |log: &str| folder.records(log).iter().filter_map(|r| r["loss"].as_f64()).collect::<Vec<_>>();
    assert_eq!(losses("one").len(), 2);
    for (nodes, processes) in [(4, 2), (8, 1)] {
        let port = free_port();
        let nodes = (0..nodes).map(|node| {
            let flags = format!("--nnodes {nodes} --node-rank {node} --nproc-per-node {processes}");
            let flags = format!("{flags} --rdzv-endpoint 127.0.0.1:{port} --rdzv-id nodes{nodes}");
            let command = after(&format!("hostname node{node}"), &launch_of(&flags, &program("many")));
            let command: Vec<String> = ["unshare", "--uts"].into_iter().map(str::to_owned).chain(command).collect();
            start(&folder, &command, &[SECRET])
        });
        for mut node in nodes.collect::<Vec<_>>() {
            assert_eq!(node.end(TIMEOUT), Some(0), "{}", node.text());
        }
        assert_eq!(losses("many"), losses("one"), "{processes} processes on each node");
    }
}

/// Two containers of one host have equal host names and boot ids, but separate `/tmp` folders.
#[test]
fn containers_with_separate_tmp_folders_use_tcp() {
    if !can_unshare("containers") {
        return;
    }
    let folder = Folder::new("machine-containers");
    let run_both = |transport: &str, log: &str| {
        let port = free_port();
        let environment = [SECRET, ("SHARDFLOW_TRANSPORT", transport)];
        let nodes = [0, 1].map(|node| {
            let flags = format!("--nnodes 2 --node-rank {node} --rdzv-endpoint 127.0.0.1:{port} --rdzv-id {log}");
            let command = launch(&flags, &format!("--mesh data=2 --log-json {log}.json"));
            start(&folder, &unshared("mount -t tmpfs none /tmp", &command), &environment)
        });
        nodes.map(|mut node| (node.end(TIMEOUT), node.text()))
    };
    let begin = Instant::now();
    let ended = run_both("auto", "apart");
    let all = format!("{}\n{}", ended[0].1, ended[1].1);
    assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{all}");
    assert_eq!(all.matches("do not see the same folder at TMPDIR").count(), 1, "once:\n{all}");
    assert!(all.contains("TCP is used between such ranks"), "{all}");
    for transport in ["shared-memory", "unix"] {
        for (code, printed) in run_both(transport, transport) {
            assert_eq!(code, Some(78), "{printed}");
            assert!(
                printed.contains("they do not see the same folder") && printed.contains("set SHARDFLOW_TRANSPORT=auto"),
                "{printed}"
            );
        }
    }
    assert!(begin.elapsed() < Duration::from_secs(55), "no process waits for a connection that cannot be made");
}

#[test]
fn an_unusable_tmpdir_is_reported_or_not_needed() {
    let folder = Folder::new("machine-tmpdir");
    let long = folder.path().join("x".repeat(120));
    fs::create_dir(&long).expect("a folder");
    let (long, missing) = (long.display().to_string(), folder.path().join("missing").display().to_string());
    let run = |flags: &str, environment: &[(&str, &str)]| {
        let mut run = start(&folder, &launch(&format!("--nproc-per-node 2 {flags}"), "--mesh data=2"), environment);
        (run.end(TIMEOUT), run.text())
    };
    let endpoint = || format!("--rdzv-endpoint 127.0.0.1:{}", free_port());
    let (code, printed) = run(&endpoint(), &[("TMPDIR", &long)]);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains(&format!("TMPDIR={long}: too long")) && printed.contains("TCP is used"), "{printed}");
    let (code, printed) = run(&endpoint(), &[("TMPDIR", &long), ("SHARDFLOW_TRANSPORT", "unix")]);
    assert_eq!(code, Some(78), "{printed}");
    assert!(printed.contains("could not create a Unix socket in its TMPDIR"), "{printed}");
    let (code, printed) = run("", &[("TMPDIR", &long)]);
    assert!(code == Some(78) && printed.contains("set TMPDIR to a shorter path"), "{code:?} {printed}");
    // A `TMPDIR` that is not UTF-8.
    for (flags, transport, code, message) in [
        (endpoint(), "auto", 0, "\u{fffd}: not UTF-8, and processes exchange the socket's path as text"),
        (endpoint(), "unix", 78, "could not create a Unix socket in its TMPDIR"),
        (String::new(), "auto", 78, "set TMPDIR to a path in UTF-8"),
    ] {
        let command = launch(&format!("--nproc-per-node 2 {flags}"), "--mesh data=2");
        let set = "TMPDIR=$PWD/$(printf 'x\\377') && export TMPDIR && mkdir -p \"$TMPDIR\"";
        let mut run = start(&folder, &after(set, &command), &[("SHARDFLOW_TRANSPORT", transport)]);
        assert_eq!(run.end(TIMEOUT), Some(code), "{}", run.text());
        assert!(run.text().contains(message), "{message}: {}", run.text());
    }
    for flags in ["", &endpoint()] {
        let (code, printed) = run(flags, &[("TMPDIR", &missing)]);
        let expected_line = format!("error: TMPDIR={missing}: cannot make a folder there");
        assert!(
            code == Some(78) && printed.contains(&expected_line) && !printed.contains("missing/"),
            "{code:?} {printed}"
        );
    }
    // `doctor` also needs a usable `TMPDIR`; `plan` does not.
    let doctor = [launcher().display().to_string(), "doctor".to_owned()];
    let mut run = start(&folder, &doctor, &[("TMPDIR", &missing)]);
    assert_eq!(run.end(TIMEOUT), Some(78), "{}", run.text());
    assert!(run.text().contains(&format!("TMPDIR={missing}: ")), "{}", run.text());
    let odd = "TMPDIR=$PWD/$(printf 'x\\377') && export TMPDIR";
    for (command, tmpdir, expected) in [
        (doctor.to_vec(), &long, "expected a Unix socket path of at most 107 bytes"),
        (after(odd, &doctor), &missing, "not UTF-8, and processes exchange the socket's path as text"),
    ] {
        let mut run = start(&folder, &command, &[("TMPDIR", tmpdir)]);
        assert_eq!(run.end(TIMEOUT), Some(78), "{}", run.text());
        let line = run.text().lines().find(|line| line.contains("unix sockets")).map(str::to_owned).unwrap_or_default();
        assert!(line.contains("BROKEN") && line.contains(expected), "{}", run.text());
    }
    let plan = [launcher().display().to_string(), "plan".to_owned(), "--".to_owned()];
    let mut run = start(&folder, &[&plan[..], &gpt("")].concat(), &[("TMPDIR", &missing)]);
    assert_eq!(run.end(TIMEOUT), Some(0), "{}", run.text());
    // Processes that another launcher started do not need a usable `TMPDIR`.
    let port = free_port().to_string();
    let ended = run_by_variables(&folder, &[("TMPDIR", &missing)], |rank| {
        let rank = rank.to_string();
        let names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
        let values = [rank.clone(), "2".into(), rank, "2".into(), "127.0.0.1".into(), port.clone()];
        names.map(str::to_owned).into_iter().zip(values).collect()
    });
    assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{ended:?}");
}

/// Runs two processes of `gpt` without Shardflow's launcher. Returns their exit codes and outputs.
fn run_by_variables(
    folder: &Folder,
    environment: &[(&str, &str)],
    rank_variables: impl Fn(u32) -> Vec<(String, String)>,
) -> [(Option<i32>, String); 2] {
    let started = [0, 1].map(|rank| {
        let own = rank_variables(rank);
        let mut variables = vec![SECRET];
        variables.extend(environment);
        variables.extend(own.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        start(folder, &gpt("--mesh data=2 --log-json log.json"), &variables)
    });
    started.map(|mut run| (run.end(TIMEOUT), run.text()))
}

/// With the variables of MPICH, Intel MPI or a PyTorchJob, two processes form one job, not two.
#[test]
fn processes_of_other_launchers_form_one_job() {
    let folder = Folder::new("machine-launchers");
    let pairs = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect::<Vec<_>>();
    let port = free_port().to_string();
    let mpi = |rank: u32| {
        let rank = rank.to_string();
        let names =
            [("PMI_RANK", rank.as_str()), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", &rank), ("MPI_LOCALNRANKS", "2")];
        [pairs(&names), pairs(&[("PMI_PORT", &format!("host:{port}"))])].concat()
    };
    let port = free_port().to_string();
    let pod = |rank: u32| {
        let rank = rank.to_string();
        // `MASTER_ADDR` is `localhost` only on the master's pod.
        let host = if rank == "0" { "localhost" } else { "127.0.0.1" };
        pairs(&[("RANK", &rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", host), ("MASTER_PORT", &port)])
    };
    let launchers: [&dyn Fn(u32) -> Vec<(String, String)>; 2] = [&mpi, &pod];
    for rank_variables in launchers {
        let [first, second] = run_by_variables(&folder, &[], rank_variables);
        assert_eq!((first.0, second.0), (Some(0), Some(0)), "{first:?} {second:?}");
        assert!(first.1.contains("in 2 processes") && !second.1.contains("step"), "{first:?} {second:?}");
    }
}

/// Returns an address of this machine that is not loopback.
fn external_address() -> Option<String> {
    let socket =
        UdpSocket::bind(("0.0.0.0", 0)).and_then(|s| s.connect(("192.0.2.1", 9)).and_then(|()| s.local_addr()));
    socket.ok().map(|own| own.ip().to_string()).filter(|ip| !ip.starts_with("127."))
}

/// Debian's `/etc/hosts` maps the host's own name to 127.0.1.1. Other nodes resolve the name to the real address.
#[test]
fn a_host_name_that_is_loopback_on_its_own_node_is_reachable() {
    let Some(external) = external_address() else { return println!("SKIPPED hosts: this machine has no network") };
    if !can_unshare("hosts") {
        return;
    }
    let folder = Folder::new("machine-hosts");
    let port = free_port();
    let nodes = [(0, "127.0.1.1"), (1, external.as_str())].map(|(node, ip)| {
        let hosts = folder.path().join(format!("hosts-{node}"));
        fs::write(&hosts, format!("127.0.0.1 localhost\n{ip} shardflow-node0\n")).expect("a file");
        let flags = format!("--nnodes 2 --node-rank {node} --rdzv-endpoint shardflow-node0:{port} --rdzv-id hosts");
        let script = format!("mount --bind {} /etc/hosts", hosts.display());
        start(&folder, &unshared(&script, &launch(&flags, "--mesh data=2")), &[SECRET, ("SHARDFLOW_TRANSPORT", "tcp")])
    });
    let ended = nodes.map(|mut node| (node.end(TIMEOUT), node.text()));
    assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{ended:?}");
    let [(_, first), (_, second)] = ended;
    let printed = "shardflow-node0 resolves to 127.0.1.1 on this node";
    assert!(first.matches(printed).count() == 1 && !second.contains(printed), "{first}\n{second}");
}

#[test]
fn link_local_addresses_work_with_zones() {
    let table = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let link_local = table.lines().find_map(|line| {
        let (digits, name) = (line.split(' ').next()?, line.split_whitespace().last()?);
        let groups: Vec<&str> = (0..8).map(|i| &digits[4 * i..4 * i + 4]).collect();
        digits.starts_with("fe80").then(|| format!("{}%{name}", groups.join(":")))
    });
    let Some(address) = link_local else { return println!("SKIPPED zones: no link-local address") };
    let folder = Folder::new("machine-zones");
    for interface in ["", &address] {
        let port = free_port();
        let nodes = [0, 1].map(|node| {
            let flags = format!("--nnodes 2 --node-rank {node} --rdzv-endpoint [{address}]:{port} --rdzv-id zones");
            let environment = [SECRET, ("SHARDFLOW_TRANSPORT", "tcp"), ("SHARDFLOW_INTERFACE", interface)];
            start(&folder, &launch(&flags, "--mesh data=2"), &environment)
        });
        let ended = nodes.map(|mut node| (node.end(TIMEOUT), node.text()));
        assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{interface}: {ended:?}");
    }
}

/// A host name without an address may get one later, so the process retries. A missing interface is an error.
#[test]
fn an_endpoint_without_an_address_is_reported() {
    let folder = Folder::new("machine-no-address");
    let start_at = |host| {
        let variables = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", host), ("MASTER_PORT", "29400"), SECRET];
        start(&folder, &gpt("--mesh data=2"), &variables)
    };
    let mut run = start_at("shardflow-no-host.invalid");
    run.until("trying again for 300s", TIMEOUT);
    assert!(run.text().contains("no route to "), "{}", run.text());
    programs::signal(run.child.id(), "TERM");
    assert_eq!(run.end(TIMEOUT), Some(143), "{}", run.text());
    let mut run = start_at("fe80::1%no-such");
    assert_eq!(run.end(TIMEOUT), Some(78), "{}", run.text());
    assert!(run.text().contains("MASTER_ADDR=fe80::1%no-such: expected "), "{}", run.text());
}
