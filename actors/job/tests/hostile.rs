//! Connections without the secret cannot exhaust a listener's memory or delay a valid peer. This test is a separate
//! binary, so that other tests do not change its memory use.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use shardflow_job::secret::Secret;
use shardflow_job::transport::handshake::Dialler;
use shardflow_job::transport::{
    Address, Hello, ListenAddress, Listener, ListenerOptions, Purpose, SessionId, SettledWorld, connect,
};

const CONNECTIONS: usize = 500;
const GROWTH_KB_MAX: usize = 16 << 10;
const WORLD: SettledWorld = SettledWorld { session: SessionId([3; 16]), epoch: 0, processes: 64 };

/// Resident memory of this process, in kB.
fn resident_kb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The bytes that connection `number` sends before it falls silent. `greeting` was recorded from a valid peer.
fn partial_handshake(greeting: &[u8], number: usize) -> Vec<u8> {
    let whole = [&(greeting.len() as u16).to_le_bytes()[..], greeting].concat();
    match number % 6 {
        0 => vec![],
        1 => whole[..1].to_vec(),
        2 => whole[..20].to_vec(),
        3 => whole,
        // Announces a message of the maximum size and sends all of it except one byte.
        4 => [&whole[..], &1024u16.to_le_bytes(), &[7; 1023]].concat(),
        _ => [&whole[..], &[90, 0], &[1; 40]].concat(),
    }
}

/// Connects a valid peer and returns how long that took.
fn connect_valid_peer(listener: &Listener, secret: &Secret, from: u32) -> Duration {
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(30);
    let hello =
        Hello { session: WORLD.session, epoch: WORLD.epoch, from, to: 0, sealed: true, purpose: Purpose::Control };
    let mut dialled = connect(&listener.addresses()[0], secret, &hello, deadline).unwrap();
    let mut accepted = listener.wait(from, Purpose::Control, deadline).unwrap();
    let took = begin.elapsed();
    dialled.write_all(b"here").unwrap();
    let mut received = [0; 4];
    accepted.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"here");
    took
}

#[test]
fn unauthenticated_connections_cost_little_memory_and_do_not_delay_valid_peers() {
    let secret = Secret::new("a secret of these tests").unwrap();
    let (_, greeting) = Dialler::new(&secret).unwrap();
    let listen = [ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())];
    let listener = Listener::listen(0, secret.clone(), &listen, ListenerOptions::default()).unwrap();
    listener.begin(WORLD);
    let Address::Tcp(address) = listener.addresses()[0].clone() else { panic!("the listener has no TCP address") };
    connect_valid_peer(&listener, &secret, 1);

    let before_kb = resident_kb();
    let mut connections = Vec::new();
    for number in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(&address).unwrap();
        // The listener may have already dropped this connection in favour of a newer one.
        let _ = stream.write_all(&partial_handshake(&greeting, number));
        connections.push(stream);
    }
    let took = connect_valid_peer(&listener, &secret, 2);
    assert!(took < Duration::from_secs(5), "a valid peer needed {took:?} with {CONNECTIONS} silent connections");

    // Opens more connections as fast as possible while valid peers connect.
    let (stop, opened) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let number = opened.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut stream) = TcpStream::connect(&address) {
                    let _ = stream.write_all(&partial_handshake(&greeting, number));
                    let index = number % CONNECTIONS;
                    connections[index] = stream;
                }
            }
        });
        let slowest = (3..23).map(|from| connect_valid_peer(&listener, &secret, from)).max().unwrap();
        stop.store(true, Ordering::Relaxed);
        println!(
            "the slowest valid peer needed {slowest:?} during {} unauthenticated connections",
            opened.load(Ordering::Relaxed)
        );
        assert!(slowest < Duration::from_secs(5), "the slowest valid peer needed {slowest:?}");
    });

    let grown_kb = resident_kb().saturating_sub(before_kb);
    println!("memory grew by {grown_kb} kB, {:?}", listener.refused());
    assert!(grown_kb < GROWTH_KB_MAX, "memory grew by {grown_kb} kB");
    let refusals = listener.refused();
    assert!(refusals.evicted + refusals.disconnected >= (CONNECTIONS - 64) as u64, "{refusals:?}");
}
