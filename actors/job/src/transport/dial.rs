//! The dialling side: connects, runs the handshake, and retries until a deadline.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net;

use super::address::{Address, first_success, resolve};
use super::connection::Connection;
use super::error::TransportError;
use super::handshake::{Dialler, HANDSHAKE_BYTES_MAX, HandshakeError, with_length};
use super::hello::Hello;
use super::sealed::Seal;
use crate::secret::Secret;

/// The pause between attempts starts at this minimum, and doubles up to the maximum.
const WAIT_MIN: Duration = Duration::from_millis(5);
const WAIT_MAX: Duration = Duration::from_millis(250);
/// Timeout of one attempt. Without it, a peer that accepts but sends nothing would use up the whole deadline.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to process `hello.to`; both sides authenticate. Retries until `deadline` if the peer is absent, has not
/// started, refuses temporarily or closes the connection. Makes at least one attempt.
///
/// # Errors
/// [`TransportError::Handshake`] immediately if authentication fails; [`TransportError::Unreachable`] at the deadline.
pub fn connect(
    address: &Address,
    secret: &Secret,
    hello: &Hello,
    deadline: Instant,
) -> Result<Connection, TransportError> {
    connect_unless(address, secret, hello, deadline, &|wait| {
        std::thread::sleep(wait);
        false
    })
}

/// Like [`connect`], but calls `pause` between attempts, and fails with [`TransportError::Closed`] if `pause` returns
/// true.
pub(super) fn connect_unless(
    address: &Address,
    secret: &Secret,
    hello: &Hello,
    deadline: Instant,
    pause: &dyn Fn(Duration) -> bool,
) -> Result<Connection, TransportError> {
    let (begin, mut wait, mut attempts, mut last) = (Instant::now(), WAIT_MIN, 0, None);
    loop {
        attempts += 1;
        let error = match attempt(address, secret, hello, deadline.min(Instant::now() + ATTEMPT_TIMEOUT)) {
            Err(error) if is_temporary(&error) => error,
            result => return result,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // The deadline interrupted the last attempt, so the error of the previous attempt is more useful.
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

fn is_temporary(error: &TransportError) -> bool {
    match error {
        // The peer has not started, or its listener has too many unauthenticated connections and dropped this one.
        TransportError::Io { .. } => true,
        TransportError::Handshake { cause: HandshakeError::Echo, .. } => true,
        TransportError::Handshake { cause: HandshakeError::Refused(refusal), .. } => refusal.is_temporary(),
        _ => false,
    }
}

fn attempt(address: &Address, secret: &Secret, hello: &Hello, deadline: Instant) -> Result<Connection, TransportError> {
    let mut connection =
        open(address, deadline).map_err(|cause| TransportError::io("cannot connect to", address, cause))?;
    let failed = |cause| TransportError::Handshake { peer: address.to_string(), cause };
    let broken = |cause: io::Error| match cause.kind() {
        io::ErrorKind::InvalidData => failed(HandshakeError::Magic),
        _ => TransportError::io("handshake with", address, cause),
    };

    let (dialler, greeting) = Dialler::new(secret).map_err(failed)?;
    write_part(&connection, &greeting, deadline).map_err(broken)?;
    let peer_greeting = read_part(&connection, deadline).map_err(broken)?;
    let (greeted, message) = dialler.introduce(hello, &peer_greeting).map_err(failed)?;
    write_part(&connection, &message, deadline).map_err(broken)?;
    let verdict = read_part(&connection, deadline).map_err(broken)?;
    let keys = greeted.finish(&verdict).map_err(failed)?;
    if hello.sealed {
        connection.seal(Seal::new(keys));
    }
    connection.configure().map_err(broken)?;
    Ok(connection)
}

fn open(address: &Address, deadline: Instant) -> io::Result<Connection> {
    match address {
        Address::Unix(path) => open_unix(path, deadline).map(Connection::from),
        Address::Tcp(name) => first_success(resolve(name)?, |target| open_tcp(target, deadline)).map(Connection::from),
    }
}

fn time_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// Connects with a timeout. Without it, a frozen acceptor with a full backlog would block the dialler forever.
fn open_unix(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let socket = net::socket_with(net::AddressFamily::UNIX, net::SocketType::STREAM, net::SocketFlags::CLOEXEC, None)?;
    net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Send, Some(time_until(deadline)))?;
    net::connect(&socket, &net::SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

fn open_tcp(target: SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, time_until(deadline))?;
    // If nobody listens on a port of the ephemeral range, a socket can connect to itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn write_part(connection: &Connection, part: &[u8], deadline: Instant) -> io::Result<()> {
    connection.until(deadline).write_all(&with_length(part))
}

fn read_part(connection: &Connection, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    let mut reader = connection.until(deadline);
    reader.read_exact(&mut length)?;
    let bytes = usize::from(u16::from_le_bytes(length));
    if bytes > HANDSHAKE_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut part = vec![0; bytes];
    reader.read_exact(&mut part)?;
    Ok(part)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::secret::sample as secret;
    use crate::transport::connection::SEND_TIMEOUT;
    use crate::transport::handshake::tests::hello;
    use crate::transport::handshake::{Acceptor, head};

    fn dial(address: SocketAddr, deadline: Instant) -> Result<Connection, TransportError> {
        connect(&Address::Tcp(address.to_string()), &secret(), &hello(), deadline)
    }

    /// Returns the dialler's error if the acceptor sends `answer` and then only reads.
    fn error_for(answer: &[u8], deadline: Instant) -> TransportError {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            let acceptor = scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(answer).unwrap();
                // Reads until the dialler closes the connection.
                let _ = io::copy(&mut stream, &mut io::sink());
            });
            let error = dial(address, deadline).unwrap_err();
            acceptor.join().unwrap();
            error
        })
    }

    #[test]
    fn a_silent_acceptor_does_not_delay_past_the_deadline() {
        let begin = Instant::now();
        let newest = with_length(&[&head()[..], &[1; 48]].concat());
        for answer in [&[][..], &newest[..1], &newest[..9]] {
            let error = error_for(answer, Instant::now() + Duration::from_millis(50));
            assert!(matches!(error, TransportError::Unreachable { attempts: 1, .. }), "{error}");
        }
        assert!(begin.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn a_peer_that_is_not_an_acceptor_is_rejected_at_once() {
        let deadline = Instant::now() + Duration::from_secs(20);
        // Another dialler's greeting.
        let (_, other) = Dialler::new(&secret()).unwrap();
        let greeting = with_length(&Acceptor::new(&secret(), &other).unwrap().1);
        let magic: fn(&HandshakeError) -> bool = |e| matches!(e, HandshakeError::Magic);
        let proof: fn(&HandshakeError) -> bool = |e| matches!(e, HandshakeError::Proof);
        for (answer, expected) in
            [(&b"HTTP/1.1 400 Bad Request"[..], magic), (&[3, 0, 1, 2, 3], magic), (&greeting, proof)]
        {
            let error = error_for(answer, deadline);
            assert!(matches!(&error, TransportError::Handshake { cause, .. } if expected(cause)), "{error}");
            assert!(error.is_authentication());
        }
    }

    /// The peer is alive, but does not read.
    #[test]
    fn a_write_without_progress_times_out() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let connection = Connection::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (_not_reading, _) = listener.accept().unwrap();
        connection.configure().unwrap();
        let timeout_ms = |connection: &Connection| net::sockopt::tcp_user_timeout(connection).unwrap();
        assert_eq!(u128::from(timeout_ms(&connection)), SEND_TIMEOUT.as_millis());
        connection.set_send_timeout(Duration::from_millis(100)).unwrap();
        assert_eq!(timeout_ms(&connection), 100);
        let begin = Instant::now();
        let mut writer = &connection;
        let error = std::iter::from_fn(|| Some(writer.write(&[0; 1 << 16]))).find_map(Result::err).unwrap();
        assert!(matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
