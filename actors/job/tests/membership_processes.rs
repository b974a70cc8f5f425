//! Tests memberships in real processes that are paused and killed. Each process runs this test binary; an environment
//! variable makes the process a member.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use rustix::process::{Pid, Signal, kill_process};
use shardflow_job::membership::{Membership, MembershipConfig, MembershipError, MembershipEvent, bind};

const MEMBER: &str = "SHARDFLOW_TEST_MEMBER";
const SOON: Duration = Duration::from_secs(30);
/// Prefix of a member's output lines.
const MARK: &str = "@";

/// The child process: reads `process processes` from the environment and commands from stdin. Prints to stdout.
#[test]
fn member() {
    let Ok(role) = std::env::var(MEMBER) else { return };
    let (process, processes) = role.split_once(' ').expect("two numbers");
    let (process, processes): (u32, u32) = (process.parse().expect("a number"), processes.parse().expect("a number"));
    let mut commands = BufReader::new(std::io::stdin()).lines().map(|l| l.expect("text"));
    let membership = join(process, processes, &mut commands);
    print(format!("joined with {} open ports", listening_sockets()));
    let (sender, received) = unbounded();
    thread::spawn(move || {
        commands.for_each(|command| sender.send(command).expect("the member runs"));
        // The parent process has ended.
        std::process::exit(1);
    });
    loop {
        crossbeam_channel::select! {
            recv(received) -> command => match command.expect("a command").as_str() {
                "leave" => {
                    print(format!("left {}", membership.leave()));
                    drop(membership);
                    std::process::exit(0);
                }
                process => flood(&membership, process.parse().expect("a process")),
            },
            recv(membership.notices()) -> event => match event.expect("an event") {
                MembershipEvent::Ended(first) => {
                    print(format!("ended by {}, code {}: {}", first.process, first.exit, first.cause));
                    let start = Instant::now();
                    drop(membership);
                    print(format!("dropped in {}", start.elapsed().as_millis()));
                    std::process::exit(i32::from(first.exit));
                }
                MembershipEvent::Left { process } => print(format!("{process} left")),
                MembershipEvent::Message { .. } => {}
            },
        }
    }
}

fn print(text: String) {
    println!("{MARK}{text}");
}

fn join(process: u32, processes: u32, commands: &mut impl Iterator<Item = String>) -> Membership {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let heartbeat = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    let port = |address: SocketAddr| address.port();
    print(format!("{} {}", port(listener.local_addr().expect("bound")), port(heartbeat.local_addr().expect("bound"))));
    let mut config = MembershipConfig::new(process, processes, [1; 16], 1, [2; 32], heartbeat);
    let neighbours = config.tree.neighbours(process);
    for peer in (0..processes).filter(|p| *p != process) {
        let line = commands.next().expect("the peer's ports");
        let ports: Vec<u16> = line.split(' ').map(|p| p.parse().expect("a port")).collect();
        if !neighbours.contains(&peer) {
            continue;
        }
        config.addresses.insert(peer, (Ipv4Addr::LOCALHOST, ports[1]).into());
        if peer < process {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, ports[0])).expect("the peer listens");
            stream.write_all(&process.to_le_bytes()).expect("open");
            config.connections.insert(peer, stream.into());
        }
    }
    while config.connections.len() < neighbours.len() {
        let (mut stream, _) = listener.accept().expect("a peer");
        let mut number = [0; 4];
        stream.read_exact(&mut number).expect("its number");
        config.connections.insert(u32::from_le_bytes(number), stream.into());
    }
    drop(listener);
    Membership::start(config).expect("all join")
}

/// Number of TCP sockets on which this process listens.
fn listening_sockets() -> usize {
    let own: Vec<String> = std::fs::read_dir("/proc/self/fd")
        .expect("Linux")
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    let tables = ["tcp", "tcp6"].map(|t| std::fs::read_to_string(format!("/proc/self/net/{t}")).unwrap_or_default());
    let listens = |line: &&str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(3) == Some(&"0A") && fields.get(9).is_some_and(|inode| own.contains(&format!("socket:[{inode}]")))
    };
    tables.iter().map(|t| t.lines().filter(listens).count()).sum()
}

/// Sends a peer 100 000 messages of 1 KiB. Prints the number of accepted messages and the memory growth in KiB.
fn flood(membership: &Membership, to: u32) {
    let before = resident_kib();
    let mut sent = 0;
    for _ in 0..100_000 {
        match membership.send(to, 1, vec![0; 1024]) {
            Ok(()) => sent += 1,
            Err(MembershipError::Backlog { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    print(format!("flooded {sent} {}", resident_kib().saturating_sub(before)));
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("a line");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

/// The member processes, seen from the parent. Dropping the value kills them.
struct World {
    children: Vec<Child>,
    lines: Vec<Receiver<String>>,
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.children {
            // An error means that the child has already ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl World {
    fn start(processes: u32) -> Self {
        let (mut children, mut lines) = (Vec::new(), Vec::new());
        for process in 0..processes {
            let mut child = Command::new(std::env::current_exe().expect("this test"))
                .args(["member", "--exact", "--nocapture"])
                .env(MEMBER, format!("{process} {processes}"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("starts");
            let output = BufReader::new(child.stdout.take().expect("piped"));
            let (sender, receiver) = unbounded();
            thread::spawn(move || {
                for line in output.lines().map_while(Result::ok) {
                    // The test harness may print text before the mark.
                    if let Some((_, text)) = line.split_once(MARK) {
                        let _ = sender.send(text.to_string());
                    }
                }
            });
            children.push(child);
            lines.push(receiver);
        }
        let mut world = Self { children, lines };
        let ports: BTreeMap<u32, String> = (0..processes).map(|p| (p, world.next_line(p, SOON))).collect();
        for process in 0..processes {
            ports.iter().filter(|(p, _)| **p != process).for_each(|(_, ports)| world.send_command(process, ports));
        }
        for process in 0..processes {
            assert_eq!(world.next_line(process, SOON), "joined with 0 open ports");
        }
        world
    }

    fn send_command(&mut self, process: u32, command: &str) {
        let input = self.children[process as usize].stdin.as_mut().expect("piped");
        writeln!(input, "{command}").expect("the member runs");
    }

    /// Returns the next output line of a member.
    fn next_line(&self, process: u32, within: Duration) -> String {
        self.lines[process as usize].recv_timeout(within).unwrap_or_else(|e| panic!("process {process}: {e}"))
    }

    fn signal(&self, process: u32, signal: Signal) {
        let pid = Pid::from_raw(self.children[process as usize].id() as i32).expect("not 0");
        kill_process(pid, signal).expect("the member runs");
    }

    fn exit_code(&mut self, process: u32) -> Option<i32> {
        let child = &mut self.children[process as usize];
        // Keeps stdin open: `wait` would close it, and the child would then exit.
        let input = child.stdin.take();
        let code = child.wait().expect("a child").code();
        drop(input);
        code
    }

    /// Checks that all `processes` report `cause` as the first cause at most `within` after `start`, and then exit.
    fn assert_first_cause(&mut self, processes: &[u32], cause: u32, start: Instant, within: Duration) {
        for &process in processes {
            let line = self.next_line(process, SOON);
            let after = start.elapsed();
            assert!(line.starts_with(&format!("ended by {cause}, code 69")), "process {process}: {line}");
            println!("process {process} after {after:?}: {line}");
            assert!(after < within, "process {process} reported the cause after {after:?}");
        }
        for &process in processes {
            let line = self.next_line(process, SOON);
            let took_ms: u64 = line.strip_prefix("dropped in ").expect("the end").parse().expect("ms");
            assert!(took_ms < 2000, "process {process} took {took_ms} ms to end");
            assert_eq!(self.exit_code(process), Some(69));
        }
    }
}

#[test]
fn a_killed_process_is_the_first_cause_within_a_second() {
    let mut world = World::start(3);
    let start = Instant::now();
    world.signal(2, Signal::KILL);
    world.assert_first_cause(&[0, 1], 2, start, Duration::from_secs(1));
}

#[test]
fn a_stopped_process_is_the_first_cause_within_five_seconds_and_costs_no_memory() {
    let mut world = World::start(3);
    let start = Instant::now();
    world.signal(1, Signal::STOP);
    world.send_command(0, "1");
    let flooded = world.next_line(0, SOON);
    println!("{flooded}");
    let numbers: Vec<u64> = flooded.split(' ').skip(1).map(|n| n.parse().expect("a number")).collect();
    // The outbox takes 1024 messages. Some more fit in socket buffers, which are not memory of this process.
    assert!(numbers[0] < 100_000 && numbers[1] < 32 << 10, "accepted messages, and memory growth in KiB: {flooded}");
    world.assert_first_cause(&[0, 2], 1, start, Duration::from_secs(5));
    // After process 1 resumes, it reports itself as the first cause, although the other processes have ended meanwhile.
    world.signal(1, Signal::CONT);
    let resumed = Instant::now();
    world.assert_first_cause(&[1], 1, resumed, Duration::from_secs(5));
}

#[test]
fn a_stop_of_three_seconds_is_not_a_failure() {
    let mut world = World::start(3);
    world.signal(1, Signal::STOP);
    assert!(world.lines[0].recv_timeout(Duration::from_secs(3)).is_err());
    world.signal(1, Signal::CONT);
    // All processes still run, and leave the session cleanly. In particular, process 1 reports no loss.
    for process in 0..3 {
        assert!(world.lines[process].recv_timeout(Duration::from_millis(500)).is_err());
    }
    for process in 0..3 {
        world.send_command(process, "leave");
    }
    for process in 0..3 {
        assert_eq!(world.exit_code(process), Some(0), "{:?}", world.lines[process as usize].try_iter().last());
    }
}
