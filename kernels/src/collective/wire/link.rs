//! One member's end of a channel: sends and receives transfers and their headers without blocking.
//!
//! - LINK-1: a transfer is one header followed by `length` bytes. Both ends know the length in advance, and reject a
//!   header with another length. So the peer never decides how much is read or allocated.
//! - LINK-2: between transfers, either end may send a header without data: `Waiting`, or the reason for a failure.
//! - LINK-3: a link holds bounded memory: [`INBOX_BYTES`] of read-ahead, and at most two unsent headers.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Instant;

use super::channel::Channel;
use super::frame::{HEADER_BYTES_MAX, Header, Kind, readable};
use crate::collective::Group;
use crate::error::{KernelError, Result};

/// Maximum number of bytes to read ahead while a header is expected. A small transfer arrives with its header.
const INBOX_BYTES: usize = 16 << 10;

/// A member and its current call.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) group: Arc<Group>,
    pub(super) member: usize,
    /// What all members of the call must agree on, as a hash and as text.
    pub(super) digest: u64,
    pub(super) text: String,
    /// The peer of a point-to-point call; `None` when all members take part.
    pub(super) peer: Option<usize>,
}

impl Context {
    pub(super) fn link_error(&self, peer: usize, cause: impl Into<String>) -> KernelError {
        let ranks = &self.group.ranks;
        KernelError::Link {
            group: self.group.id,
            rank: ranks.rank(self.member),
            peer: ranks.rank(peer),
            cause: cause.into(),
        }
    }

    pub(super) fn no_channel(&self, peer: usize) -> KernelError {
        self.link_error(peer, format!("no channel exists for {}", self.text))
    }

    pub(super) fn involves(&self, peer: usize) -> bool {
        self.peer.is_none_or(|other| other == peer)
    }
}

/// What this member expects from the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Incoming {
    Nothing,
    /// The header of a transfer of this many bytes.
    Header(u64),
    /// The remaining bytes of a transfer.
    Body(u64),
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) channel: Arc<Channel>,
    peer: usize,
    inbox: Box<[u8]>,
    /// The range of the inbox that holds unread bytes.
    unread: std::ops::Range<usize>,
    incoming: Incoming,
    /// Headers to send; `outbox_sent` counts the bytes already sent.
    outbox: Vec<u8>,
    outbox_sent: usize,
    /// Bytes of the outgoing transfer that are not yet sent.
    out_left: u64,
    /// The size of the outbox without the header of the outgoing transfer.
    outbox_before: usize,
    /// Number of calls that the two ends have completed together.
    pub(super) sequence: u64,
    /// Whether this member has notified the peer that it waits in the current call.
    announced: bool,
    /// Whether the peer has closed its side.
    ended: bool,
    /// When the kernel stopped accepting bytes; `None` while it accepts them.
    pub(super) stalled: Option<Instant>,
}

impl Link {
    pub(super) fn new(channel: Arc<Channel>, peer: usize) -> Self {
        Self {
            channel,
            peer,
            inbox: vec![0; INBOX_BYTES].into(),
            unread: 0..0,
            incoming: Incoming::Nothing,
            outbox: Vec::with_capacity(2 * HEADER_BYTES_MAX),
            outbox_sent: 0,
            out_left: 0,
            outbox_before: 0,
            sequence: 0,
            announced: false,
            ended: false,
            stalled: None,
        }
    }

    /// Records the end of a call in which both ends took part.
    pub(super) fn finish_call(&mut self) {
        self.sequence += 1;
        self.announced = false;
    }

    fn push_header(&mut self, context: &Context, header: Header, text: &str) {
        debug_assert!(self.outbox.len() <= HEADER_BYTES_MAX, "LINK-3");
        debug_assert!(header.group == context.group.id);
        header.encode(text, &mut self.outbox);
    }

    fn header(&self, context: &Context, kind: Kind, length: u64) -> Header {
        Header {
            kind,
            group: context.group.id,
            sender: context.member as u32,
            sequence: self.sequence,
            digest: context.digest,
            length,
        }
    }

    pub(super) fn begin_out(&mut self, context: &Context, bytes: u64) {
        debug_assert!(self.out_left == 0);
        self.outbox_before = self.outbox.len();
        self.push_header(context, self.header(context, Kind::Data, bytes), &context.text);
        self.out_left = bytes;
        self.stalled = None;
    }

    pub(super) fn begin_in(&mut self, bytes: u64) {
        debug_assert!(self.in_done());
        self.incoming = Incoming::Header(bytes);
    }

    /// Whether the kernel has accepted the outgoing transfer and its header.
    pub(super) fn out_done(&self) -> bool {
        self.out_left == 0 && self.flushed()
    }

    /// Whether all headers, and all bytes that the channel has accepted, have been sent.
    pub(super) fn flushed(&self) -> bool {
        self.outbox.is_empty() && !self.channel.has_unsent()
    }

    pub(super) fn in_done(&self) -> bool {
        self.incoming == Incoming::Nothing
    }

    /// Whether the peer can still send a header between transfers.
    pub(super) fn can_receive_header(&self) -> bool {
        !self.ended && !matches!(self.incoming, Incoming::Body(_))
    }

    /// Whether the next byte from the peer would be the first byte of a header.
    pub(super) fn awaits_header(&self) -> bool {
        self.can_receive_header() && self.unread.is_empty()
    }

    /// Sends the pending header, then as much of `data` as the kernel accepts. Returns the number of `data` bytes.
    pub(super) fn send(&mut self, context: &Context, data: &[u8]) -> Result<usize> {
        let header = &self.outbox[self.outbox_sent..];
        let sent = if header.is_empty() && data.is_empty() {
            self.channel.flush().map(|done| (0, done))
        } else {
            self.channel.send(header, data).map(|sent| (sent, sent > 0))
        };
        let (sent, has_moved) = match sent {
            Ok(sent) => sent,
            Err(error) => return Err(self.write_error(context, &error)),
        };
        self.stalled = if has_moved { None } else { self.stalled.or_else(|| Some(Instant::now())) };
        let header_sent = sent.min(header.len());
        self.outbox_sent += header_sent;
        if self.outbox_sent == self.outbox.len() {
            self.outbox.clear();
            self.outbox_sent = 0;
        }
        let data_sent = sent - header_sent;
        self.out_left = self.out_left.saturating_sub(data_sent as u64);
        Ok(data_sent)
    }

    /// The error of a failed write: the reason that the peer sent before it closed the channel, or else the I/O error.
    fn write_error(&mut self, context: &Context, error: &io::Error) -> KernelError {
        let peer_error = self.read_headers(context).err();
        peer_error.unwrap_or_else(|| context.link_error(self.peer, format!("cannot write: {error}")))
    }

    /// Reads and checks the header, then reads available bytes of the transfer into `into`. Returns their number.
    pub(super) fn receive(&mut self, context: &Context, into: &mut [u8]) -> Result<usize> {
        if let Incoming::Header(expected) = self.incoming {
            self.read_headers(context)?;
            let Some((header, text)) = self.peek(context)? else { return Ok(0) };
            if header.sequence != self.sequence || header.digest != context.digest {
                return Err(self.mismatch(context, text));
            }
            if header.length != expected {
                let cause = format!("the peer announced {} bytes, but the call has {expected}", header.length);
                return Err(context.link_error(self.peer, cause));
            }
            self.unread.start += Header::bytes(text);
            self.incoming = if expected == 0 { Incoming::Nothing } else { Incoming::Body(expected) };
        }
        let Incoming::Body(left) = self.incoming else { return Ok(0) };
        let requested = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let into = &mut into[..requested];
        let mut got = self.unread.len().min(requested);
        into[..got].copy_from_slice(&self.inbox[self.unread.start..][..got]);
        self.unread.start += got;
        if got < requested {
            match self.channel.receive(&mut into[got..]) {
                Ok(Some(0)) => return Err(self.closed(context)),
                Ok(more) => got += more.unwrap_or(0),
                Err(error) => return Err(context.link_error(self.peer, format!("cannot read: {error}"))),
            }
        }
        self.incoming = if left == got as u64 { Incoming::Nothing } else { Incoming::Body(left - got as u64) };
        Ok(got)
    }

    fn closed(&mut self, context: &Context) -> KernelError {
        self.ended = true;
        context.link_error(self.peer, format!("the peer closed the connection during {}", context.text))
    }

    /// Reads the headers that precede a transfer's header. If one of them reports an error, returns that error.
    pub(super) fn read_headers(&mut self, context: &Context) -> Result<()> {
        while self.can_receive_header() {
            if let Some((header, text)) = self.peek(context)? {
                let bytes = Header::bytes(text);
                match header.kind {
                    Kind::Data | Kind::Waiting => {
                        let common = context.involves(self.peer) && header.sequence == self.sequence;
                        if common && header.digest != context.digest {
                            return Err(self.mismatch(context, text));
                        }
                        if header.kind == Kind::Data {
                            return Ok(());
                        }
                    }
                    _ => return Err(self.peer_failure(context, &header, text)),
                }
                self.unread.start += bytes;
                continue;
            }
            self.inbox.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
            match self.channel.receive(&mut self.inbox[self.unread.end..]) {
                Ok(None) => return Ok(()),
                Ok(Some(0)) if matches!(self.incoming, Incoming::Header(_)) => return Err(self.closed(context)),
                Ok(Some(0)) => self.ended = true,
                Ok(Some(bytes)) => self.unread.end += bytes,
                Err(error) => {
                    self.ended = true;
                    return Err(context.link_error(self.peer, format!("cannot read: {error}")));
                }
            }
        }
        Ok(())
    }

    /// The next header, once the inbox holds all of it.
    fn peek(&self, context: &Context) -> Result<Option<(Header, &[u8])>> {
        let found = Header::decode(&self.inbox[self.unread.clone()]);
        let found = found.map_err(|cause| context.link_error(self.peer, cause))?;
        if let Some((header, _)) = &found
            && (header.group, header.sender) != (context.group.id, self.peer as u32)
        {
            let cause = format!(
                "the header is from member {} of group {}, not from member {} of group {}",
                header.sender, header.group, self.peer, context.group.id
            );
            return Err(context.link_error(self.peer, cause));
        }
        Ok(found)
    }

    fn mismatch(&self, context: &Context, text: &[u8]) -> KernelError {
        let mut got = readable(text);
        if got == context.text {
            got += " with different parts, ranks or call order";
        }
        context.group.mismatch(self.peer, &*context.text, got)
    }

    fn peer_failure(&self, context: &Context, header: &Header, text: &[u8]) -> KernelError {
        let as_rank = |number: u64| {
            let ranks = &context.group.ranks;
            ranks.iter().find(|rank| *rank as u64 == number).unwrap_or(ranks.rank(self.peer))
        };
        match header.kind {
            Kind::Mismatch => {
                let mut parts = text.splitn(2, |byte| *byte == b'\n').map(readable);
                let (expected, got) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                let member = usize::try_from(header.length).unwrap_or(usize::MAX).min(context.group.ranks.len() - 1);
                context.group.mismatch(member, expected, got)
            }
            Kind::LinkLost => KernelError::Link {
                group: context.group.id,
                rank: as_rank(header.digest),
                peer: as_rank(header.length),
                cause: readable(text),
            },
            _ => context.link_error(self.peer, format!("the peer failed: {}", readable(text))),
        }
    }

    /// Sends the peer a header that says that this member waits in its collective call. Sends it once for each
    /// collective call, and only between transfers. Later calls of this function send the bytes that the channel still
    /// holds.
    pub(super) fn announce(&mut self, context: &Context) -> Result<()> {
        if self.channel.has_unsent() {
            self.send(context, &[])?;
        }
        if self.announced || !self.out_done() || !context.involves(self.peer) {
            return Ok(());
        }
        self.announced = true;
        self.push_header(context, self.header(context, Kind::Waiting, 0), &context.text);
        self.send(context, &[]).map(|_| ())
    }

    /// If the link is between transfers, sends this member's reason for failing. Then closes the outgoing direction.
    pub(super) fn fail(&mut self, context: &Context, error: &KernelError) {
        if self.out_left > 0 && self.outbox_sent <= self.outbox_before && !self.outbox.is_empty() {
            // The peer does not know of the transfer yet.
            self.outbox.truncate(self.outbox_before);
            self.out_left = 0;
        }
        if self.out_left == 0 && self.outbox.len() <= HEADER_BYTES_MAX {
            let mut header = self.header(context, Kind::Stopped, 0);
            let text = match error {
                KernelError::CollectiveMismatch { member, expected, got, .. } => {
                    (header.kind, header.length) = (Kind::Mismatch, *member as u64);
                    // Each of the two texts gets half of the space.
                    let half =
                        |text: &str| text[..text.floor_char_boundary(super::frame::TEXT_BYTES_MAX / 2 - 1)].to_owned();
                    format!("{}\n{}", half(expected), half(got))
                }
                KernelError::Link { rank, peer, cause, .. } => {
                    (header.kind, header.digest, header.length) = (Kind::LinkLost, *rank as u64, *peer as u64);
                    cause.clone()
                }
                other => other.to_string(),
            };
            self.push_header(context, header, &text);
            let (header, sent) = (&self.outbox[self.outbox_sent..], self.outbox_sent);
            // If sending the reason fails, there is nobody to report the failure to.
            self.outbox_sent = sent + self.channel.send(header, &[]).unwrap_or(0);
            let _ = self.channel.flush();
        }
        self.channel.shutdown(Shutdown::Write);
    }
}
