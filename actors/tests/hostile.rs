//! What strangers can do to an endpoint without the secret: nothing that costs memory or keeps a good peer waiting. A test
//! binary of its own, so that nothing else moves its memory.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use shardflow_actors::transport::handshake::greeting;
use shardflow_actors::transport::{
    Address, Hello, ListenAddress, Listener, ListenerOptions, Purpose, SessionId, SettledWorld, SharedKey, connect,
};

const STRANGERS: usize = 500;
const GROWTH_KB_MAX: usize = 16 << 10;
const WORLD: SettledWorld = SettledWorld { session: SessionId([3; 16]), epoch: 0, processes: 64 };

/// Resident memory of this process, in kB.
fn resident_kb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What a stranger says before it falls silent, by number.
fn half_a_handshake(number: usize) -> Vec<u8> {
    let greeting = greeting(&[number as u8; 32]);
    let whole = [&(greeting.len() as u16).to_le_bytes()[..], &greeting].concat();
    match number % 6 {
        0 => vec![],
        1 => whole[..1].to_vec(),
        2 => whole[..20].to_vec(),
        3 => whole,
        // Announces the most that may come, and sends all of it but a byte.
        4 => [&whole[..], &1024u16.to_le_bytes(), &[7; 1023]].concat(),
        _ => [&whole[..], &[90, 0], &[1; 40]].concat(),
    }
}

/// A good peer connects; how long it took.
fn good_peer(endpoint: &Listener, secret: &SharedKey, from: u32) -> Duration {
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(30);
    let hello = Hello { session: WORLD.session, epoch: WORLD.epoch, from, to: 0, purpose: Purpose::Control };
    let mut dialled = connect(&endpoint.addresses()[0], secret, &hello, deadline).unwrap();
    let mut accepted = endpoint.wait(from, Purpose::Control, deadline).unwrap();
    let took = begin.elapsed();
    dialled.write_all(b"here").unwrap();
    let mut heard = [0; 4];
    accepted.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"here");
    took
}

#[test]
fn five_hundred_silent_strangers_cost_little_and_hold_up_nobody() {
    let secret = SharedKey::from_text("a secret of these tests").unwrap();
    let listen = [ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())];
    let endpoint = Listener::listen(0, secret.clone(), &listen, ListenerOptions::default()).unwrap();
    endpoint.begin(WORLD);
    let Address::Tcp(address) = endpoint.addresses()[0].clone() else { panic!("it listens on TCP") };
    good_peer(&endpoint, &secret, 1);

    let before_kb = resident_kb();
    let mut strangers = Vec::new();
    for number in 0..STRANGERS {
        let mut stranger = TcpStream::connect(&address).unwrap();
        // It may have been dropped for a newer one already.
        let _ = stranger.write_all(&half_a_handshake(number));
        strangers.push(stranger);
    }
    let took = good_peer(&endpoint, &secret, 2);
    assert!(took < Duration::from_secs(5), "{took:?} with {STRANGERS} silent strangers");

    // They do not stop: as fast as they can, while others connect.
    let (stop, opened) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let number = opened.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut stranger) = TcpStream::connect(&address) {
                    let _ = stranger.write_all(&half_a_handshake(number));
                    let place = number % STRANGERS;
                    strangers[place] = stranger;
                }
            }
        });
        let slowest = (3..23).map(|from| good_peer(&endpoint, &secret, from)).max().unwrap();
        stop.store(true, Ordering::Relaxed);
        println!("slowest good peer: {slowest:?}, while {} strangers came", opened.load(Ordering::Relaxed));
        assert!(slowest < Duration::from_secs(5), "{slowest:?} while strangers come");
    });

    let grown_kb = resident_kb().saturating_sub(before_kb);
    println!("grown by {grown_kb} kB, {:?}", endpoint.refused());
    assert!(grown_kb < GROWTH_KB_MAX, "grown by {grown_kb} kB");
    let refusals = endpoint.refused();
    assert!(refusals.crowded_out + refusals.hung_up >= (STRANGERS - 64) as u64, "{refusals:?}");
}
