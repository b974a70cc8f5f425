//! Tests listeners and diallers over real sockets: TCP on loopback and Unix.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::*;
use crate::secret::sample as secret;
use crate::transport::handshake::{Dialler, GREETING_BYTES, HANDSHAKE_BYTES_MAX, HandshakeError, Refusal, head};
use crate::transport::{Hello, SessionId, connect};

const WORLD: SettledWorld = SettledWorld { session: SessionId([9; 16]), epoch: 2, processes: 4 };

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn loopback() -> ListenAddress {
    ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())
}

fn running_listener(options: ListenerOptions) -> Listener {
    let listener = Listener::listen(0, secret(), &[loopback(), ListenAddress::PrivateUnix], options).unwrap();
    listener.begin(WORLD);
    listener
}

fn hello(from: u32, purpose: Purpose) -> Hello {
    Hello { session: WORLD.session, epoch: WORLD.epoch, from, to: 0, sealed: from.is_multiple_of(2), purpose }
}

fn tcp(listener: &Listener) -> TcpStream {
    let Address::Tcp(address) = &listener.addresses()[0] else { panic!("the first address is not TCP") };
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// A short deadline, for a temporary refusal that lasts as long as the test.
fn short_deadline() -> Instant {
    Instant::now() + Duration::from_millis(500)
}

fn wait_for_counters(listener: &Listener, expected: impl Fn(&Refusals) -> bool) -> Refusals {
    let deadline = soon();
    loop {
        let refusals = listener.refused();
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
    let listener = running_listener(ListenerOptions::default());
    let purposes =
        [Purpose::Control, Purpose::Registers { index: 0 }, Purpose::Registers { index: 1 }, Purpose::Memory];
    for address in listener.addresses() {
        let mut dialled = Vec::new();
        for (from, purpose) in (1..4).flat_map(|from| purposes.map(|purpose| (from, purpose))) {
            let mut connection = connect(address, &secret(), &hello(from, purpose), soon()).unwrap();
            write!(connection, "{from} {purpose}").unwrap();
            dialled.push((from, purpose, connection));
        }
        for (from, purpose, dialler_end) in dialled.into_iter().rev() {
            let mut connection = listener.wait(from, purpose, soon()).unwrap();
            assert_eq!(connection.is_unix(), matches!(address, Address::Unix(_)));
            assert_eq!([connection.is_sealed(), dialler_end.is_sealed()], [from.is_multiple_of(2); 2]);
            dialler_end.shutdown(std::net::Shutdown::Both).unwrap();
            let mut text = String::new();
            connection.read_to_string(&mut text).unwrap();
            assert_eq!(text, format!("{from} {purpose}"));
            assert!(connection.is_closed());
        }
    }
    assert_eq!(listener.refused(), Refusals::default());
    let missing = listener.wait(3, Purpose::Control, Instant::now());
    assert!(matches!(missing, Err(TransportError::Missing { from: Some(3), .. })), "{missing:?}");
}

#[test]
fn a_waiting_claim_returns_on_arrival_and_on_close() {
    let listener = running_listener(ListenerOptions::default());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| listener.wait(1, Purpose::Control, soon()));
        connect(&listener.addresses()[0], &secret(), &hello(1, Purpose::Control), soon()).unwrap();
        waiting.join().unwrap().unwrap();
        let waiting = scope.spawn(|| listener.wait(1, Purpose::Control, soon()));
        listener.close();
        assert!(matches!(waiting.join().unwrap(), Err(TransportError::Closed)));
    });
}

#[test]
fn a_second_connection_of_a_dialler_replaces_the_first() {
    let listener = running_listener(ListenerOptions::default());
    let address = &listener.addresses()[1];
    let _first = connect(address, &secret(), &hello(1, Purpose::Control), soon()).unwrap();
    let mut second = connect(address, &secret(), &hello(1, Purpose::Control), soon()).unwrap();
    let other = connect(address, &secret(), &hello(2, Purpose::Control), soon()).unwrap();
    // The listener accepts this connection after the second one, so now the second one is unclaimed.
    listener.wait(2, Purpose::Control, soon()).unwrap();
    drop(other);
    second.write_all(b"2").unwrap();
    let mut byte = [0];
    listener.wait(1, Purpose::Control, soon()).unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"2");
    assert!(listener.wait(1, Purpose::Control, Instant::now()).is_err());
}

#[test]
fn refused_diallers_learn_the_reason_and_are_counted() {
    let listener = running_listener(ListenerOptions::default());
    let address = &listener.addresses()[0];
    let dial = |hello: Hello| refusal(connect(address, &secret(), &hello, soon()));
    let control = hello(1, Purpose::Control);
    assert_eq!(dial(Hello { epoch: 1, ..control }), Refusal::OldEpoch { acceptor: 2, dialler: 1 });
    let newer = refusal(connect(address, &secret(), &Hello { epoch: 3, ..control }, short_deadline()));
    assert_eq!(newer, Refusal::NewEpoch { acceptor: 2, dialler: 3 });
    assert_eq!(dial(Hello { from: 4, ..control }), Refusal::Process { process: 4, processes: 4 });
    assert_eq!(dial(Hello { to: 3, ..control }), Refusal::WrongProcess { expected: 3, actual: 0 });
    let other = SessionId([1; 16]);
    assert_eq!(dial(Hello { session: other, ..control }), Refusal::Session { acceptor: WORLD.session, dialler: other });
    assert_eq!(dial(hello(1, Purpose::Rendezvous)), Refusal::Late { epoch: 2 });

    let other = Secret::new("another secret of these tests").unwrap();
    let denied = connect(address, &other, &control, soon()).unwrap_err();
    assert!(matches!(denied, TransportError::Handshake { cause: HandshakeError::Denied, .. }), "{denied}");
    assert!(denied.is_authentication());
    // The dialler of the newer epoch has retried until its deadline, which interrupted its last attempt.
    let Refusals { new_epoch, disconnected, .. } = wait_for_counters(&listener, |r| r.proof == 1);
    assert!(new_epoch >= 1 && disconnected <= 1);
    let counted = Refusals { old_epoch: 2, process: 2, session: 1, proof: 1, ..Refusals::default() };
    let expected = Refusals { new_epoch, disconnected, ..counted };
    assert_eq!(listener.refused(), expected);
}

#[test]
fn a_dialler_waits_for_a_process_that_starts_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new").join("later.sock");
    let address = Address::Unix(path.clone());
    std::thread::scope(|scope| {
        let dialled = scope.spawn(|| connect(&address, &secret(), &hello(1, Purpose::Control), soon()));
        let listener = Listener::listen(0, secret(), &[ListenAddress::Unix(path)], ListenerOptions::default()).unwrap();
        wait_for_counters(&listener, |r| r.retry >= 1);
        listener.begin(WORLD);
        listener.wait(1, Purpose::Control, soon()).unwrap();
        dialled.join().unwrap().unwrap();
    });
}

#[test]
fn an_unreachable_address_is_reported_with_the_number_of_attempts() {
    let port = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    for address in [Address::Tcp(format!("localhost:{port}")), Address::Unix("/no/such/folder/socket".into())] {
        let error = connect(&address, &secret(), &hello(1, Purpose::Control), Instant::now()).unwrap_err();
        assert!(matches!(error, TransportError::Unreachable { to: 0, attempts: 1, .. }), "{error}");
        assert!(!error.is_authentication());
    }
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stale.sock");
    drop(UnixListener::bind(&path).unwrap());
    let listen = || Listener::listen(0, secret(), &[ListenAddress::Unix(path.clone())], ListenerOptions::default());
    let listener = listen().unwrap();
    assert!(matches!(listen(), Err(TransportError::Listen { .. })));
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn an_invalid_message_closes_the_connection_at_once() {
    let listener = running_listener(ListenerOptions::default());
    let greeting = crate::transport::handshake::with_length(&Dialler::new(&secret()).unwrap().1);
    let (mut newer, mut forged) = (greeting.clone(), greeting.clone());
    newer[6] += 1;
    forged[20] ^= 1;
    let (answer_bytes, head_bytes) = (2 + GREETING_BYTES, 2 + head().len());
    // Each case: the sent bytes, the length of the answer (0 if the connection is only closed), and the counter.
    type Case<'a> = (&'a [u8], usize, fn(&Refusals) -> u64);
    let cases: [Case; 7] = [
        (b"GET / HTTP/1.1\r\n\r\n", 0, |r| r.malformed),
        (&((HANDSHAKE_BYTES_MAX + 1) as u16).to_le_bytes(), 0, |r| r.malformed),
        (&[0, 0], 0, |r| r.malformed),
        (&newer, head_bytes, |r| r.version),
        (&forged, head_bytes, |r| r.proof),
        (&[&greeting[..], &[3, 0, 1, 2, 3]].concat(), answer_bytes, |r| r.malformed),
        (&[&greeting[..], &[40, 0], &[1; 40]].concat(), answer_bytes, |r| r.proof),
    ];
    for (bytes, answer_bytes, counter) in cases {
        let before = counter(&listener.refused());
        let mut stream = tcp(&listener);
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // An error is possible: bytes that the other side has not read cause a connection reset.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() == answer_bytes || answer.is_empty(), "{bytes:?}: {answer:?}");
        wait_for_counters(&listener, |r| counter(r) == before + 1);
    }
    let mut stream = tcp(&listener);
    stream.write_all(&greeting[..9]).unwrap();
    drop(stream);
    wait_for_counters(&listener, |r| r.disconnected == 1);
}

#[test]
fn the_limits_of_a_listener_hold() {
    let options =
        ListenerOptions { unauthenticated_max: 3, handshake_timeout: Duration::from_millis(100), unclaimed_max: 2 };
    let listener = running_listener(options);
    let _silent: Vec<TcpStream> = (0..5).map(|_| tcp(&listener)).collect();
    wait_for_counters(&listener, |r| r.evicted + r.timed_out == 5);
    // EP-3
    let address = &listener.addresses()[1];
    let connections = [1, 2].map(|from| connect(address, &secret(), &hello(from, Purpose::Control), soon()).unwrap());
    let crowded = refusal(connect(address, &secret(), &hello(3, Purpose::Control), short_deadline()));
    assert_eq!(crowded, Refusal::Crowded { unclaimed: 2 });
    listener.wait(1, Purpose::Control, soon()).unwrap();
    connect(address, &secret(), &hello(3, Purpose::Control), soon()).unwrap();
    drop(connections);
}
