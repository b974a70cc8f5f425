//! Endpoints and diallers over real sockets: TCP on loopback and Unix.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use super::*;
use crate::transport::handshake::{self, HANDSHAKE_BYTES_MAX, HandshakeError, Refusal};
use crate::transport::{Hello, SessionId, connect};

const WORLD: SettledWorld = SettledWorld { session: SessionId([9; 16]), epoch: 2, processes: 4 };

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn secret() -> SharedKey {
    SharedKey::from_text("a secret of these tests").unwrap()
}

fn loopback() -> ListenAddress {
    ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())
}

/// Process 0 of a world that has begun.
fn endpoint(options: ListenerOptions) -> Listener {
    let endpoint = Listener::listen(0, secret(), &[loopback(), ListenAddress::PrivateUnix], options).unwrap();
    endpoint.begin(WORLD);
    endpoint
}

fn hello(from: u32, purpose: Purpose) -> Hello {
    Hello { session: WORLD.session, epoch: WORLD.epoch, from, to: 0, purpose }
}

fn tcp(endpoint: &Listener) -> TcpStream {
    let Address::Tcp(address) = &endpoint.addresses()[0] else { panic!("the first listener is TCP") };
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// For what passes by itself, but not in this test.
fn briefly() -> Instant {
    Instant::now() + Duration::from_millis(500)
}

/// Waits until the endpoint has counted; fails after a while.
fn until_refused(endpoint: &Listener, expected: impl Fn(&Refusals) -> bool) -> Refusals {
    let deadline = soon();
    loop {
        let refusals = endpoint.refused();
        if expected(&refusals) {
            return refusals;
        }
        assert!(Instant::now() < deadline, "{refusals:?}");
        std::thread::yield_now();
    }
}

fn refusal(result: Result<Connection, TransportError>) -> Refusal {
    let error = result.unwrap_err();
    error.refusal().unwrap_or_else(|| panic!("{error}")).clone()
}

#[test]
fn connections_are_claimed_by_process_and_purpose() {
    let endpoint = endpoint(ListenerOptions::default());
    let purposes = [Purpose::Control, Purpose::Registers { lane: 0 }, Purpose::Registers { lane: 1 }, Purpose::Memory];
    for address in endpoint.addresses() {
        let mut dialled = Vec::new();
        for (from, purpose) in (1..4).flat_map(|from| purposes.map(|purpose| (from, purpose))) {
            let mut link = connect(address, &secret(), &hello(from, purpose), soon()).unwrap();
            write!(link, "{from} {purpose}").unwrap();
            dialled.push((from, purpose, link));
        }
        for (from, purpose, mine) in dialled.into_iter().rev() {
            let mut link = endpoint.wait(from, purpose, soon()).unwrap();
            assert_eq!(link.is_unix(), matches!(address, Address::Unix(_)));
            mine.shutdown().unwrap();
            let mut text = String::new();
            link.read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("{from} {purpose}"));
            assert!(link.is_closed());
        }
    }
    assert_eq!(endpoint.refused(), Refusals::default());
    let missing = endpoint.wait(3, Purpose::Control, Instant::now());
    assert!(matches!(missing, Err(TransportError::Missing { from: Some(3), .. })), "{missing:?}");
}

#[test]
fn a_waiting_claim_wakes_up() {
    let endpoint = endpoint(ListenerOptions::default());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| endpoint.wait(1, Purpose::Control, soon()));
        connect(&endpoint.addresses()[0], &secret(), &hello(1, Purpose::Control), soon()).unwrap();
        waiting.join().unwrap().unwrap();
        let waiting = scope.spawn(|| endpoint.wait(1, Purpose::Control, soon()));
        endpoint.close();
        assert!(matches!(waiting.join().unwrap(), Err(TransportError::Closed)));
    });
}

#[test]
fn a_dialler_that_comes_again_replaces_itself() {
    let endpoint = endpoint(ListenerOptions::default());
    let address = &endpoint.addresses()[1];
    let _first = connect(address, &secret(), &hello(1, Purpose::Control), soon()).unwrap();
    let mut second = connect(address, &secret(), &hello(1, Purpose::Control), soon()).unwrap();
    let other = connect(address, &secret(), &hello(2, Purpose::Control), soon()).unwrap();
    // Whoever is in after the second, it is on the shelf by then.
    endpoint.wait(2, Purpose::Control, soon()).unwrap();
    drop(other);
    second.write_all(b"2").unwrap();
    let mut byte = [0];
    endpoint.wait(1, Purpose::Control, soon()).unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"2");
    assert!(endpoint.wait(1, Purpose::Control, Instant::now()).is_err());
}

#[test]
fn who_does_not_belong_hears_why_and_is_counted() {
    let endpoint = endpoint(ListenerOptions::default());
    let address = &endpoint.addresses()[0];
    let dial = |hello: Hello| refusal(connect(address, &secret(), &hello, soon()));
    let control = hello(1, Purpose::Control);
    assert_eq!(dial(Hello { epoch: 1, ..control }), Refusal::OldEpoch { ours: 2, theirs: 1 });
    let ahead = refusal(connect(address, &secret(), &Hello { epoch: 3, ..control }, briefly()));
    assert_eq!(ahead, Refusal::NewEpoch { ours: 2, theirs: 3 });
    assert_eq!(dial(Hello { from: 4, ..control }), Refusal::Process { process: 4, processes: 4 });
    assert_eq!(dial(Hello { to: 3, ..control }), Refusal::NotMe { wanted: 3, me: 0 });
    let other = SessionId([1; 16]);
    assert_eq!(dial(Hello { session: other, ..control }), Refusal::Session { ours: WORLD.session, theirs: other });
    assert_eq!(dial(hello(1, Purpose::Rendezvous)), Refusal::Late { epoch: 2 });

    let other = SharedKey::from_text("another secret of these tests").unwrap();
    let denied = connect(address, &other, &control, soon()).unwrap_err();
    assert!(matches!(denied, TransportError::Handshake { cause: HandshakeError::Denied, .. }), "{denied}");
    assert!(denied.is_authentication());
    // The dialler of the newer epoch came again and again; its last attempt ended with its deadline.
    let Refusals { new_epoch, hung_up, .. } = until_refused(&endpoint, |r| r.proof == 1);
    assert!(new_epoch >= 1 && hung_up <= 1);
    let counted = Refusals { old_epoch: 2, process: 2, session: 1, proof: 1, ..Refusals::default() };
    let expected = Refusals { new_epoch, hung_up, ..counted };
    assert_eq!(endpoint.refused(), expected);
}

#[test]
fn a_dialler_waits_for_a_process_that_starts_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new").join("later.sock");
    let address = Address::Unix(path.clone());
    std::thread::scope(|scope| {
        let dialled = scope.spawn(|| connect(&address, &secret(), &hello(1, Purpose::Control), soon()));
        let endpoint = Listener::listen(0, secret(), &[ListenAddress::Unix(path)], ListenerOptions::default()).unwrap();
        until_refused(&endpoint, |r| r.again >= 1);
        endpoint.begin(WORLD);
        endpoint.wait(1, Purpose::Control, soon()).unwrap();
        dialled.join().unwrap().unwrap();
    });
}

#[test]
fn nobody_there_is_said_with_numbers() {
    let port = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    for address in [Address::Tcp(format!("localhost:{port}")), Address::Unix("/no/such/folder/socket".into())] {
        let error = connect(&address, &secret(), &hello(1, Purpose::Control), Instant::now()).unwrap_err();
        assert!(matches!(error, TransportError::Unreachable { to: 0, attempts: 1, .. }), "{error}");
        assert!(!error.is_authentication());
    }
}

#[test]
fn a_socket_that_a_killed_process_left_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("left.sock");
    drop(UnixListener::bind(&path).unwrap());
    let listen = || Listener::listen(0, secret(), &[ListenAddress::Unix(path.clone())], ListenerOptions::default());
    let endpoint = listen().unwrap();
    assert!(matches!(listen(), Err(TransportError::Listen { .. })));
    drop(endpoint);
    assert!(!path.exists());
}

#[test]
fn a_wrong_word_ends_a_stranger_at_once() {
    let endpoint = endpoint(ListenerOptions::default());
    let greeting = crate::transport::dial::with_length(&handshake::greeting(&[5; 32]));
    let mut newer = greeting.clone();
    newer[6] += 1;
    // An answer's length, or nothing where the endpoint just hangs up.
    type Case<'a> = (&'a [u8], usize, fn(&Refusals) -> u64);
    let cases: [Case; 6] = [
        (b"GET / HTTP/1.1\r\n\r\n", 0, |r| r.malformed),
        (&((HANDSHAKE_BYTES_MAX + 1) as u16).to_le_bytes(), 0, |r| r.malformed),
        (&[0, 0], 0, |r| r.malformed),
        (&newer, greeting.len(), |r| r.version),
        (&[&greeting[..], &[3, 0, 1, 2, 3]].concat(), greeting.len() + 2, |r| r.malformed),
        (&[&greeting[..], &[40, 0], &[1; 40]].concat(), greeting.len() + 2, |r| r.proof),
    ];
    for (bytes, answer_bytes, counter) in cases {
        let before = counter(&endpoint.refused());
        let mut stranger = tcp(&endpoint);
        stranger.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // Unread bytes at the other side end the connection by a reset.
        let _ = stranger.read_to_end(&mut answer);
        assert!(answer.len() == answer_bytes || answer.is_empty(), "{bytes:?}: {answer:?}");
        until_refused(&endpoint, |r| counter(r) == before + 1);
    }
    let mut stranger = tcp(&endpoint);
    stranger.write_all(&greeting[..9]).unwrap();
    drop(stranger);
    until_refused(&endpoint, |r| r.hung_up == 1);
}

#[test]
fn strangers_are_few_and_live_short() {
    let options = ListenerOptions { strangers_max: 3, handshake_timeout: Duration::from_millis(100), unclaimed_max: 2 };
    let endpoint = endpoint(options);
    let _strangers: Vec<TcpStream> = (0..5).map(|_| tcp(&endpoint)).collect();
    until_refused(&endpoint, |r| r.crowded_out + r.too_slow == 5);
    // EP-3
    let address = &endpoint.addresses()[1];
    let links = [1, 2].map(|from| connect(address, &secret(), &hello(from, Purpose::Control), soon()).unwrap());
    let crowded = refusal(connect(address, &secret(), &hello(3, Purpose::Control), briefly()));
    assert_eq!(crowded, Refusal::Crowded { unclaimed: 2 });
    endpoint.wait(1, Purpose::Control, soon()).unwrap();
    connect(address, &secret(), &hello(3, Purpose::Control), soon()).unwrap();
    drop(links);
}

#[test]
fn addresses_are_read_as_they_are_written() {
    for text in ["localhost:80", "[::1]:0", "10.0.0.1:65535", "unix:/run/a b.sock"] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
    }
    for text in ["", "localhost", ":80", "host:port", "host:65536", "unix:", "/run/socket"] {
        assert!(matches!(text.parse::<Address>(), Err(TransportError::Address { .. })), "{text}");
    }
}
