//! The dialling side: connects, proves itself, tries again until a deadline.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net;

use super::handshake::{Dialler, HANDSHAKE_BYTES_MAX, HandshakeError};
use super::{Address, Connection, Hello, SharedKey, TransportError, resolve, secret};

/// Waits between attempts: doubled from the first to the last.
const WAIT_MIN: Duration = Duration::from_millis(5);
const WAIT_MAX: Duration = Duration::from_millis(250);
/// One attempt, at most: a peer that takes us and says nothing does not use up the whole deadline.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);

/// Connects to the process `hello.to` and proves to it, and has it prove, that both belong to the same job. Peers that are
/// absent, refuse, have not started yet or hang up are tried again until `deadline`; at least one attempt is made.
///
/// # Errors
/// [`TransportError::Handshake`] at once when the peer does not believe us or we do not believe it;
/// [`TransportError::Unreachable`] at the deadline.
pub fn connect(
    address: &Address,
    secret: &SharedKey,
    hello: &Hello,
    deadline: Instant,
) -> Result<Connection, TransportError> {
    connect_unless(address, secret, hello, deadline, &|wait| {
        std::thread::sleep(wait);
        false
    })
}

/// As [`connect`]. `pause` lets the time between two attempts pass; true gives up, with [`TransportError::Closed`].
pub(super) fn connect_unless(
    address: &Address,
    secret: &SharedKey,
    hello: &Hello,
    deadline: Instant,
    pause: &dyn Fn(Duration) -> bool,
) -> Result<Connection, TransportError> {
    let (begin, mut wait, mut attempts, mut last) = (Instant::now(), WAIT_MIN, 0, None);
    loop {
        attempts += 1;
        let error = match attempt(address, secret, hello, deadline.min(Instant::now() + ATTEMPT_MAX)) {
            Err(error) if is_passing(&error) => error,
            settled => return settled,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // The last attempt was cut short by the deadline; the one before says more.
            let last = Box::new(last.unwrap_or(error));
            let (to, address, purpose) = (hello.to, address.clone(), hello.purpose);
            let waited_ms = begin.elapsed().as_millis() as u64;
            return Err(TransportError::Unreachable { to, address, purpose, attempts, waited_ms, last });
        }
        last = Some(error);
        if pause(wait.min(left)) {
            return Err(TransportError::Closed);
        }
        wait = (wait * 2).min(WAIT_MAX);
    }
}

/// True when another attempt may succeed.
fn is_passing(error: &TransportError) -> bool {
    match error {
        // Not there yet, or the line was cut: an acceptor with too many strangers drops the oldest of them.
        TransportError::Io { .. } => true,
        TransportError::Handshake { cause: HandshakeError::Echo, .. } => true,
        TransportError::Handshake { cause: HandshakeError::Refused(refusal), .. } => refusal.is_passing(),
        _ => false,
    }
}

fn attempt(
    address: &Address,
    secret: &SharedKey,
    hello: &Hello,
    deadline: Instant,
) -> Result<Connection, TransportError> {
    let link = open(address, deadline).map_err(|cause| TransportError::io("connecting to", address, cause))?;
    let failed = |cause| TransportError::Handshake { peer: address.to_string(), cause };
    let broken = |cause: io::Error| match cause.kind() {
        io::ErrorKind::InvalidData => failed(HandshakeError::Magic),
        _ => TransportError::io("shaking hands with", address, cause),
    };

    let (dialler, greeting) = Dialler::new(&secret::random()?);
    write_part(&link, &greeting, deadline).map_err(broken)?;
    let theirs = read_part(&link, deadline).map_err(broken)?;
    let (proved, proof) = dialler.prove(secret, hello, &theirs).map_err(failed)?;
    write_part(&link, &proof, deadline).map_err(broken)?;
    let verdict = read_part(&link, deadline).map_err(broken)?;
    proved.finish(secret, &verdict).map_err(failed)?;
    link.settle().map_err(broken)?;
    Ok(link)
}

/// A bare connection.
fn open(address: &Address, deadline: Instant) -> io::Result<Connection> {
    match address {
        Address::Unix(path) => open_unix(path, deadline).map(Connection::Unix),
        Address::Tcp(name) => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for target in resolve(name)? {
                match open_tcp(target, deadline) {
                    Ok(stream) => return Ok(Connection::Tcp(stream)),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// Connects at once, or waits while the acceptor's backlog is full: a frozen one must not hold us for ever.
fn open_unix(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let socket = net::socket_with(net::AddressFamily::UNIX, net::SocketType::STREAM, net::SocketFlags::CLOEXEC, None)?;
    net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Send, Some(left_until(deadline)))?;
    net::connect(&socket, &net::SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

fn open_tcp(target: SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, left_until(deadline))?;
    // With nobody listening, a port of the ephemeral range can be connected to itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn write_part(link: &Connection, part: &[u8], deadline: Instant) -> io::Result<()> {
    link.until(deadline).write_all(&with_length(part))
}

fn read_part(link: &Connection, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    let mut from = link.until(deadline);
    from.read_exact(&mut length)?;
    let bytes = usize::from(u16::from_le_bytes(length));
    if bytes > HANDSHAKE_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut part = vec![0; bytes];
    from.read_exact(&mut part)?;
    Ok(part)
}

/// A part of a handshake behind its length.
pub(super) fn with_length(part: &[u8]) -> Vec<u8> {
    debug_assert!(part.len() <= HANDSHAKE_BYTES_MAX);
    let mut bytes = Vec::with_capacity(2 + part.len());
    bytes.extend_from_slice(&(part.len() as u16).to_le_bytes());
    bytes.extend_from_slice(part);
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::transport::handshake::greeting;
    use crate::transport::{Purpose, SEND_TIMEOUT, SessionId};

    fn dial(address: SocketAddr, deadline: Instant) -> Result<Connection, TransportError> {
        let hello = Hello { session: SessionId::default(), epoch: 0, from: 1, to: 0, purpose: Purpose::Control };
        let secret = SharedKey::from_text("a secret of these tests")?;
        connect(&Address::Tcp(address.to_string()), &secret, &hello, deadline)
    }

    /// What a dialler makes of an acceptor that sends `answer` to each connection and reads on.
    fn answered(answer: &[u8], deadline: Instant) -> TransportError {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            let acceptor = scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(answer).unwrap();
                // Until the dialler gives up.
                let _ = io::copy(&mut stream, &mut io::sink());
            });
            let error = dial(address, deadline).unwrap_err();
            acceptor.join().unwrap();
            error
        })
    }

    #[test]
    fn a_silent_acceptor_costs_no_more_than_the_deadline() {
        let begin = Instant::now();
        let newest = with_length(&greeting(&[1; 32]));
        for answer in [&[][..], &newest[..1], &newest[..9], &newest] {
            let error = answered(answer, Instant::now() + Duration::from_millis(50));
            assert!(matches!(error, TransportError::Unreachable { attempts: 1, .. }), "{error}");
        }
        assert!(begin.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn what_is_no_acceptor_is_recognised_at_once() {
        let deadline = Instant::now() + Duration::from_secs(20);
        let proved = [with_length(&greeting(&[1; 32])), with_length(&[7; 40])].concat();
        let magic: fn(&HandshakeError) -> bool = |e| matches!(e, HandshakeError::Magic);
        let proof: fn(&HandshakeError) -> bool = |e| matches!(e, HandshakeError::Proof);
        for (answer, expected) in
            [(&b"HTTP/1.1 400 Bad Request"[..], magic), (&[3, 0, 1, 2, 3], magic), (&proved, proof)]
        {
            let error = answered(answer, deadline);
            assert!(matches!(&error, TransportError::Handshake { cause, .. } if expected(cause)), "{error}");
            assert!(error.is_authentication());
        }
    }

    /// The peer lives and reads nothing.
    #[test]
    fn a_write_that_gets_rid_of_nothing_ends() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let link = Connection::Tcp(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (_deaf, _) = listener.accept().unwrap();
        link.settle().unwrap();
        let timeout_ms = |link: &Connection| net::sockopt::tcp_user_timeout(link).unwrap();
        assert_eq!(u128::from(timeout_ms(&link)), SEND_TIMEOUT.as_millis());
        link.set_send_timeout(Duration::from_millis(100)).unwrap();
        assert_eq!(timeout_ms(&link), 100);
        let begin = Instant::now();
        let mut writer = &link;
        let error = std::iter::from_fn(|| Some(writer.write(&[0; 1 << 16]))).find_map(Result::err).unwrap();
        assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
