//! Memberships in real processes that are stopped and killed. Each process is this test again, told by its environment to
//! be a member.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use rustix::process::{Pid, Signal, kill_process};
use shardflow_actors::membership::{Membership, MembershipConfig, MembershipError, MembershipEvent, bind};

const MEMBER: &str = "SHARDFLOW_TEST_MEMBER";
const SOON: Duration = Duration::from_secs(30);
/// What a member says stands in lines that begin so.
const MARK: &str = "@";

/// The child: `process processes` in the environment, orders on standard input, answers on standard output.
#[test]
fn member() {
    let Ok(role) = std::env::var(MEMBER) else { return };
    let (process, processes) = role.split_once(' ').expect("two numbers");
    let (process, processes): (u32, u32) = (process.parse().expect("ours"), processes.parse().expect("all"));
    let mut orders = BufReader::new(std::io::stdin()).lines().map(|l| l.expect("text"));
    let membership = join(process, processes, &mut orders);
    say(format!("joined with {} open ports", listening()));
    let (sender, given) = unbounded();
    thread::spawn(move || {
        orders.for_each(|order| sender.send(order).expect("the member lives"));
        // The parent is gone.
        std::process::exit(1);
    });
    loop {
        crossbeam_channel::select! {
            recv(given) -> order => match order.expect("orders").as_str() {
                "leave" => {
                    say(format!("left {}", membership.leave()));
                    drop(membership);
                    std::process::exit(0);
                }
                order => flood(&membership, order.parse().expect("a process")),
            },
            recv(membership.notices()) -> notice => match notice.expect("notices") {
                MembershipEvent::Ended(first) => {
                    say(format!("ended by {}, code {}: {}", first.process, first.exit, first.cause));
                    let start = Instant::now();
                    drop(membership);
                    say(format!("dropped in {}", start.elapsed().as_millis()));
                    std::process::exit(i32::from(first.exit));
                }
                MembershipEvent::Left { process } => say(format!("{process} left")),
                MembershipEvent::Told { .. } => {}
            },
        }
    }
}

fn say(what: String) {
    println!("{MARK}{what}");
}

fn join(process: u32, processes: u32, orders: &mut impl Iterator<Item = String>) -> Membership {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
    let heartbeat = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    let port = |address: SocketAddr| address.port();
    say(format!("{} {}", port(listener.local_addr().expect("bound")), port(heartbeat.local_addr().expect("bound"))));
    let mut config = MembershipConfig::new(process, processes, [1; 16], 1, [2; 32], heartbeat);
    for peer in (0..processes).filter(|p| *p != process) {
        let order = orders.next().expect("the peer's ports");
        let ports: Vec<u16> = order.split(' ').map(|p| p.parse().expect("a port")).collect();
        config.addresses.insert(peer, (Ipv4Addr::LOCALHOST, ports[1]).into());
        if peer < process {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, ports[0])).expect("it listens");
            stream.write_all(&process.to_le_bytes()).expect("open");
            config.links.insert(peer, stream.into());
        }
    }
    while config.links.len() + 1 < processes as usize {
        let (mut stream, _) = listener.accept().expect("a peer");
        let mut number = [0; 4];
        stream.read_exact(&mut number).expect("its number");
        config.links.insert(u32::from_le_bytes(number), stream.into());
    }
    drop(listener);
    Membership::start(config).expect("all join")
}

/// Listening TCP sockets of this process.
fn listening() -> usize {
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

/// Tells a peer 100 000 messages of 1 KiB; says how many went out, and what it cost in memory.
fn flood(membership: &Membership, to: u32) {
    let before = resident_kib();
    let mut sent = 0;
    for _ in 0..100_000 {
        match membership.tell(to, 1, vec![0; 1024]) {
            Ok(()) => sent += 1,
            Err(MembershipError::Backlog { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    say(format!("flooded {sent} {}", resident_kib().saturating_sub(before)));
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("a line");
    line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
}

/// The members, as the parent sees them. Dropping it kills them.
struct World {
    children: Vec<Child>,
    lines: Vec<Receiver<String>>,
}

impl Drop for World {
    fn drop(&mut self) {
        for child in &mut self.children {
            // An error: it has ended.
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
                    // The harness's own text may stand before it.
                    if let Some((_, said)) = line.split_once(MARK) {
                        let _ = sender.send(said.to_string());
                    }
                }
            });
            children.push(child);
            lines.push(receiver);
        }
        let mut world = Self { children, lines };
        let ports: BTreeMap<u32, String> = (0..processes).map(|p| (p, world.said(p, SOON))).collect();
        for process in 0..processes {
            ports.iter().filter(|(p, _)| **p != process).for_each(|(_, ports)| world.order(process, ports));
        }
        for process in 0..processes {
            assert_eq!(world.said(process, SOON), "joined with 0 open ports");
        }
        world
    }

    fn order(&mut self, process: u32, order: &str) {
        let input = self.children[process as usize].stdin.as_mut().expect("piped");
        writeln!(input, "{order}").expect("it lives");
    }

    /// The next line that a member says.
    fn said(&self, process: u32, within: Duration) -> String {
        self.lines[process as usize].recv_timeout(within).unwrap_or_else(|e| panic!("process {process}: {e}"))
    }

    fn signal(&self, process: u32, signal: Signal) {
        let pid = Pid::from_raw(self.children[process as usize].id() as i32).expect("not 0");
        kill_process(pid, signal).expect("it lives");
    }

    fn exit_code(&mut self, process: u32) -> Option<i32> {
        let child = &mut self.children[process as usize];
        // Kept open: `wait` would close it, which tells the child to give up.
        let input = child.stdin.take();
        let code = child.wait().expect("our child").code();
        drop(input);
        code
    }

    /// Both of `processes` say by `within` that the session ended, and put it down to `to`.
    fn assert_named(&mut self, processes: &[u32], to: u32, start: Instant, within: Duration) {
        for &process in processes {
            let said = self.said(process, SOON);
            let after = start.elapsed();
            assert!(said.starts_with(&format!("ended by {to}, code 69")), "process {process}: {said}");
            println!("process {process} after {after:?}: {said}");
            assert!(after < within, "process {process} after {after:?}");
        }
        for &process in processes {
            let dropped = self.said(process, SOON);
            let taken: u64 = dropped.strip_prefix("dropped in ").expect("the end").parse().expect("ms");
            assert!(taken < 2000, "process {process} took {taken} ms to end");
            assert_eq!(self.exit_code(process), Some(69));
        }
    }
}

#[test]
fn a_killed_process_is_named_within_a_second() {
    let mut world = World::start(3);
    let start = Instant::now();
    world.signal(2, Signal::KILL);
    world.assert_named(&[0, 1], 2, start, Duration::from_secs(1));
}

#[test]
fn a_stopped_process_is_named_within_five_seconds_and_costs_no_memory() {
    let mut world = World::start(3);
    let start = Instant::now();
    world.signal(1, Signal::STOP);
    world.order(0, "1");
    let flooded = world.said(0, SOON);
    println!("{flooded}");
    let numbers: Vec<u64> = flooded.split(' ').skip(1).map(|n| n.parse().expect("a number")).collect();
    assert!(numbers[0] <= 1024 && numbers[1] < 32 << 10, "messages sent, and KiB: {flooded}");
    world.assert_named(&[0, 2], 1, start, Duration::from_secs(5));
    // It wakes to find itself given up, and does not blame the others, who have ended since.
    world.signal(1, Signal::CONT);
    let woke = Instant::now();
    world.assert_named(&[1], 1, woke, Duration::from_secs(5));
}

#[test]
fn a_stop_of_three_seconds_is_no_failure() {
    let mut world = World::start(3);
    world.signal(1, Signal::STOP);
    assert!(world.lines[0].recv_timeout(Duration::from_secs(3)).is_err());
    world.signal(1, Signal::CONT);
    // All are still there to leave in order; process 1 in particular accuses nobody.
    for process in 0..3 {
        assert!(world.lines[process].recv_timeout(Duration::from_millis(500)).is_err());
    }
    for process in 0..3 {
        world.order(process, "leave");
    }
    for process in 0..3 {
        assert_eq!(world.exit_code(process), Some(0), "{:?}", world.lines[process as usize].try_iter().last());
    }
}
