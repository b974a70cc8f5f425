//! Where ranks of several processes meet: in the process that made the communicator's id.
//!
//! Every process that has ranks of a communicator tells the hub what they call and send. Once all who take part have come,
//! it compares the calls, as [`crate::nccl::engine`] does within a process (NC-1), and gives all of them the result. It
//! knows nothing of streams, and no lock of the device's is taken here, so it always goes on.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use crate::nccl::data;
use crate::nccl::engine::Call;
use crate::nccl::wire::{Joining, Meeting, Said, address, hear, say};
use crate::world::lock;

/// The communicators whose ids this process made, by name.
static HALLS: Mutex<BTreeMap<String, Hall>> = Mutex::new(BTreeMap::new());
/// A process has given up its ranks, or is gone.
static LEFT: Condvar = Condvar::new();

/// The processes of one communicator.
#[derive(Default)]
struct Hall {
    ranks: Vec<Option<Joining>>,
    connections: HashMap<u64, Connection>,
    /// What has come of meetings that not all have come to.
    posts: BTreeMap<Meeting, Vec<Post>>,
}

/// One rank's call.
struct Post {
    connection: u64,
    rank: usize,
    call: Call,
    sent: Vec<u8>,
}

struct Connection {
    out: UnixStream,
    /// Ranks that are not given up.
    open: Vec<usize>,
    is_own: bool,
}

/// The name of a new communicator. The first call starts to listen.
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
            // Without a thread the connection closes, and the other side learns that.
            drop(serving.spawn(move || serve(number as u64, stream)));
        }
    };
    thread::Builder::new().name("software-nccl-hub".into()).spawn(listen).map(drop)
}

/// Waits until all have been told that this process has given up its ranks of these communicators in order: one that ends
/// before would seem to have died.
pub fn wait_until_left(cliques: &[String], limit: Duration) {
    let is_here = |hall: &Hall| hall.connections.values().any(|connection| connection.is_own);
    let waits = |halls: &mut BTreeMap<String, Hall>| cliques.iter().any(|name| halls.get(name).is_some_and(is_here));
    drop(LEFT.wait_timeout_while(lock(&HALLS), limit, waits));
}

/// Hears one process out. It ends when the process does, or has given up its ranks.
fn serve(connection: u64, stream: UnixStream) {
    let Ok(out) = stream.try_clone() else { return };
    let (mut out, mut from) = (Some(out), BufReader::new(stream));
    let mut name = String::new();
    while let Ok((said, bytes)) = hear(&mut from) {
        let mut halls = lock(&HALLS);
        if let Said::Join(joining) = &said {
            name.clone_from(&joining.clique);
        }
        let hall = halls.entry(name.clone()).or_default();
        match said {
            Said::Join(joining) => {
                let is_own = joining.process == std::process::id();
                if let Some(out) = out.take() {
                    hall.connections.insert(connection, Connection { out, open: Vec::new(), is_own });
                }
                hall.join(connection, joining);
            }
            Said::Post { meeting, calls } => hall.post(connection, meeting, calls, &bytes),
            Said::Leave { rank, in_order } => hall.leave(connection, rank, in_order),
            Said::Busy | Said::Call(_) => hall.tell(Some(connection), &said),
            _ => {}
        }
    }
    let mut halls = lock(&HALLS);
    let Some(hall) = halls.get_mut(&name) else { return };
    if hall.connections.remove(&connection).is_some_and(|gone| !gone.open.is_empty()) {
        hall.tell(None, &Said::Lost);
    }
    if hall.connections.is_empty() {
        halls.remove(&name);
    }
    LEFT.notify_all();
}

impl Hall {
    /// Tells all processes but one. Those that are gone are found by whoever reads from them.
    fn tell(&self, but: Option<u64>, said: &Said) {
        for (_, other) in self.connections.iter().filter(|(number, _)| Some(**number) != but) {
            drop(say(&other.out, said, &[]));
        }
    }

    fn join(&mut self, connection: u64, joining: Joining) {
        if self.ranks.is_empty() {
            self.ranks.resize(joining.ranks, None);
        }
        let known = self.ranks.iter().flatten();
        let is_double = known.clone().any(|other| other.rank == joining.rank || other.device == joining.device);
        let Some(place) = self.ranks.get_mut(joining.rank).filter(|_| !is_double) else {
            return self.tell(None, &Said::Refused);
        };
        if let Some(own) = self.connections.get_mut(&connection) {
            own.open.push(joining.rank);
        }
        *place = Some(joining);
        let ranks = self.ranks.len();
        if self.ranks.iter().flatten().any(|other| other.ranks != ranks) {
            return self.tell(None, &Said::Refused);
        }
        if self.ranks.iter().all(Option::is_some) {
            self.tell(None, &Said::Full);
        }
    }

    fn leave(&mut self, connection: u64, rank: usize, in_order: bool) {
        let Some(own) = self.connections.get_mut(&connection) else { return };
        own.open.retain(|open| *open != rank);
        let hub_left = own.is_own && own.open.is_empty();
        match in_order {
            false => self.tell(Some(connection), &Said::Lost),
            true if hub_left => self.tell(Some(connection), &Said::HubLeft),
            true => {}
        }
    }

    fn post(&mut self, connection: u64, meeting: Meeting, calls: Vec<(usize, Call, usize)>, mut bytes: &[u8]) {
        let posts = self.posts.entry(meeting).or_default();
        for (rank, call, length) in calls {
            let (own, rest) = bytes.split_at(length.min(bytes.len()));
            bytes = rest;
            posts.push(Post { connection, rank, call, sent: own.to_vec() });
        }
        let wanted = if matches!(meeting, Meeting::Collective(_)) { self.ranks.len() } else { 2 };
        if posts.len() < wanted {
            return;
        }
        let mut posts = self.posts.remove(&meeting).unwrap_or_default();
        // By rank; or the sender first.
        let receiver = if let Meeting::Message(_, to, _) = meeting { to } else { usize::MAX };
        posts.sort_by_key(|post| (post.rank == receiver, post.rank));
        let calls: Vec<(usize, Call)> = posts.iter().map(|post| (post.rank, post.call)).collect();
        let inputs: Vec<&[u8]> = posts.iter().map(|post| &post.sent[..]).collect();
        let result = data::mismatch(&calls).map_or_else(|| Ok(data::combine(&calls[0].1, &inputs)), Err);
        let (mismatch, whole) = match result {
            Ok(whole) => (None, whole),
            Err(what) => (Some(what), Vec::new()),
        };
        let answer = Said::Answer { meeting, mismatch };
        let takes_part = |number: &u64| posts.iter().any(|post| post.connection == *number);
        let mut told: Vec<_> = self.connections.iter().filter(|(number, _)| takes_part(number)).collect();
        // This process last: it may end as soon as it has its own, and nobody else would be told.
        told.sort_by_key(|(_, connection)| connection.is_own);
        told.into_iter().for_each(|(_, connection)| drop(say(&connection.out, &answer, &whole)));
    }
}
