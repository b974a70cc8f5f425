//! The hub coordinates ranks in several processes. It runs in the process that created the communicator's id.
//!
//! Every process with ranks of a communicator sends the calls and data of these ranks to the hub. An exchange is one
//! collective or message. Once all participants of an exchange have posted, the hub compares their calls (NC-1) like
//! [`crate::nccl::engine`], and sends the result to all participants. The hub uses no streams and takes no locks of the
//! device, so a blocked stream or lock never blocks the hub.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use crate::nccl::data;
use crate::nccl::engine::Call;
use crate::nccl::wire::{ExchangeId, HubMessage, JoinRequest, address, read_message, write_message};
use crate::world::lock;

/// The communicators whose ids this process created, by name.
static GROUPS: Mutex<BTreeMap<String, HubGroup>> = Mutex::new(BTreeMap::new());
/// Notified when a process has closed its ranks or ended.
static LEFT: Condvar = Condvar::new();

/// The processes of one communicator.
#[derive(Default)]
struct HubGroup {
    ranks: Vec<Option<JoinRequest>>,
    connections: HashMap<u64, Connection>,
    /// Posts of incomplete exchanges.
    posts: BTreeMap<ExchangeId, Vec<Post>>,
}

/// One rank's call and data.
struct Post {
    connection: u64,
    rank: usize,
    call: Call,
    sent: Vec<u8>,
}

struct Connection {
    out: UnixStream,
    /// Ranks of the connected process that are not closed.
    open: Vec<usize>,
    is_own: bool,
}

/// Creates the name of a new communicator. The first call starts the listener.
pub fn new_name(handle: u64) -> io::Result<String> {
    static LISTENING: OnceLock<Result<(), io::ErrorKind>> = OnceLock::new();
    let hub = format!("software-cuda-nccl-{}", std::process::id());
    LISTENING.get_or_init(|| listen(&hub).map_err(|error| error.kind())).map_err(io::Error::from)?;
    Ok(format!("{hub}/{handle:x}"))
}

fn listen(hub: &str) -> io::Result<()> {
    let listener = UnixListener::bind_addr(&address(hub)?)?;
    let listen = move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let serving = thread::Builder::new().name("software-nccl-hub".into());
            // If the thread cannot start, the connection closes, and the other process notices the end.
            drop(serving.spawn(move || serve(number as u64, stream)));
        }
    };
    thread::Builder::new().name("software-nccl-hub".into()).spawn(listen).map(drop)
}

/// Waits until the hub has notified the other processes that this process has closed its ranks of these communicators.
/// Without this notification, the other processes would take the exit of this process for a crash.
pub fn wait_until_left(cliques: &[String], limit: Duration) {
    let is_here = |group: &HubGroup| group.connections.values().any(|connection| connection.is_own);
    let waits =
        |groups: &mut BTreeMap<String, HubGroup>| cliques.iter().any(|name| groups.get(name).is_some_and(is_here));
    drop(LEFT.wait_timeout_while(lock(&GROUPS), limit, waits));
}

/// Serves one process until it ends or has closed its ranks.
fn serve(connection: u64, stream: UnixStream) {
    let Ok(out) = stream.try_clone() else { return };
    let (mut out, mut from) = (Some(out), BufReader::new(stream));
    let mut name = String::new();
    while let Ok((message, bytes)) = read_message(&mut from) {
        let mut groups = lock(&GROUPS);
        if let HubMessage::Join(request) = &message {
            name.clone_from(&request.clique);
        }
        let group = groups.entry(name.clone()).or_default();
        match message {
            HubMessage::Join(request) => {
                let is_own = request.process == std::process::id();
                if let Some(out) = out.take() {
                    group.connections.insert(connection, Connection { out, open: Vec::new(), is_own });
                }
                group.join(connection, request);
            }
            HubMessage::Post { exchange, calls } => group.post(connection, exchange, calls, &bytes),
            HubMessage::Leave { rank, in_order } => group.leave(connection, rank, in_order),
            HubMessage::Busy | HubMessage::Call(_) => group.send_to_others(Some(connection), &message),
            _ => {}
        }
    }
    let mut groups = lock(&GROUPS);
    let Some(group) = groups.get_mut(&name) else { return };
    if group.connections.remove(&connection).is_some_and(|gone| !gone.open.is_empty()) {
        group.send_to_others(None, &HubMessage::Lost);
    }
    if group.connections.is_empty() {
        groups.remove(&name);
    }
    LEFT.notify_all();
}

impl HubGroup {
    /// Sends a message to all processes except `except`. Ignores errors, because [`serve`] notices them.
    fn send_to_others(&self, except: Option<u64>, message: &HubMessage) {
        for (_, other) in self.connections.iter().filter(|(number, _)| Some(**number) != except) {
            drop(write_message(&other.out, message, &[]));
        }
    }

    fn join(&mut self, connection: u64, request: JoinRequest) {
        if self.ranks.is_empty() {
            self.ranks.resize(request.ranks, None);
        }
        let known = self.ranks.iter().flatten();
        let is_double = known.clone().any(|other| other.rank == request.rank || other.device == request.device);
        let Some(place) = self.ranks.get_mut(request.rank).filter(|_| !is_double) else {
            return self.send_to_others(None, &HubMessage::Refused);
        };
        if let Some(own) = self.connections.get_mut(&connection) {
            own.open.push(request.rank);
        }
        *place = Some(request);
        let ranks = self.ranks.len();
        if self.ranks.iter().flatten().any(|other| other.ranks != ranks) {
            return self.send_to_others(None, &HubMessage::Refused);
        }
        if self.ranks.iter().all(Option::is_some) {
            self.send_to_others(None, &HubMessage::Full);
        }
    }

    fn leave(&mut self, connection: u64, rank: usize, in_order: bool) {
        let Some(own) = self.connections.get_mut(&connection) else { return };
        own.open.retain(|open| *open != rank);
        let hub_has_left = own.is_own && own.open.is_empty();
        match in_order {
            false => self.send_to_others(Some(connection), &HubMessage::Lost),
            true if hub_has_left => self.send_to_others(Some(connection), &HubMessage::HubLeft),
            true => {}
        }
    }

    fn post(&mut self, connection: u64, exchange: ExchangeId, calls: Vec<(usize, Call, usize)>, mut bytes: &[u8]) {
        let posts = self.posts.entry(exchange).or_default();
        for (rank, call, length) in calls {
            let (own, rest) = bytes.split_at(length.min(bytes.len()));
            bytes = rest;
            posts.push(Post { connection, rank, call, sent: own.to_vec() });
        }
        let wanted = if matches!(exchange, ExchangeId::Collective(_)) { self.ranks.len() } else { 2 };
        if posts.len() < wanted {
            return;
        }
        let mut posts = self.posts.remove(&exchange).unwrap_or_default();
        // Sort the posts of a collective by rank. The sender of a message comes before the receiver.
        let receiver = if let ExchangeId::Message(_, to, _) = exchange { to } else { usize::MAX };
        posts.sort_by_key(|post| (post.rank == receiver, post.rank));
        let calls: Vec<(usize, Call)> = posts.iter().map(|post| (post.rank, post.call)).collect();
        let inputs: Vec<&[u8]> = posts.iter().map(|post| &post.sent[..]).collect();
        let result = data::mismatch(&calls).map_or_else(|| Ok(data::combine(&calls[0].1, &inputs)), Err);
        let (mismatch, whole) = match result {
            Ok(whole) => (None, whole),
            Err(message) => (Some(message), Vec::new()),
        };
        let answer = HubMessage::ExchangeResult { exchange, mismatch };
        let takes_part = |number: &u64| posts.iter().any(|post| post.connection == *number);
        let mut receivers: Vec<_> = self.connections.iter().filter(|(number, _)| takes_part(number)).collect();
        // Send to the hub's own process last. The process may exit when it has its result, so the other processes must
        // get their results first.
        receivers.sort_by_key(|(_, connection)| connection.is_own);
        receivers.into_iter().for_each(|(_, connection)| drop(write_message(&connection.out, &answer, &whole)));
    }
}
