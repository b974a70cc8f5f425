//! An observer of the network can never read a control message. With encryption, this also holds for tensors.

use std::sync::Arc;
use std::thread;

use shardflow::cluster::{Advertise, ClusterOptions, Transport};
use shardflow::job::transport::Address;
use shardflow::session::{Session, SessionOptions};
use shardflow_integration_tests::relay::{Relay, RelayOptions};
use shardflow_integration_tests::together::cluster_at;
use shardflow_integration_tests::training::{Model, Scratch, options, within};

/// The weights of a layer norm before the first step. A ciphertext does not contain this pattern.
const ONES: [[u8; 4]; 8] = [1f32.to_le_bytes(); 8];
/// An activity that every process reports to the other processes over the control plane.
const ACTIVITY: &[u8] = b"running the program";

fn contains(stream: &[u8], pattern: &[u8]) -> bool {
    stream.windows(pattern.len()).any(|window| window == pattern)
}

/// Two processes gather parameters over TCP and train a step. Returns the bytes of each direction of each connection.
fn observed(encrypt: bool) -> Vec<Vec<u8>> {
    let relay = Arc::new(Relay::new(RelayOptions { seed: 1, long_stall: None, records: true }));
    let folder = Scratch::new(&format!("encryption-{encrypt}"));
    let socket = folder.path().join("meet.sock");
    let model = Model { layers: 2, heads: 2, width: 16, context: 8, batch: 4, dropout: 0.0, max_norm: 1.0 };
    let bound = Address::Unix(socket.clone());
    let Address::Unix(front) = relay.connections(&bound).expect("a relay") else { panic!("expected a Unix socket") };
    thread::scope(|scope| {
        for process in 0..2 {
            let (relay, socket, model) = (&relay, if process == 0 { &socket } else { &front }, &model);
            scope.spawn(move || {
                let advertise = Some(relay.clone() as Arc<_>);
                let cluster_options =
                    ClusterOptions { transport: Transport::Tcp, encrypt, advertise, ..ClusterOptions::default() };
                let cluster = cluster_at(socket, process, 2, cluster_options);
                let plan = model.plan("data=2", &options(1, shardflow::plan::Schedule::GPipe));
                let session_options = SessionOptions { cluster, ..SessionOptions::default() };
                let mut session = Session::start(plan, &session_options).unwrap_or_else(|e| panic!("{process}: {e}"));
                session.parameters().unwrap_or_else(|e| panic!("{process}: {e}"));
                model.step(&mut session);
                session.shutdown().unwrap_or_else(|e| panic!("{process}: {e}"));
            });
        }
    });
    relay.recorded()
}

#[test]
fn tensors_are_readable_only_without_encryption_and_control_never() {
    within(120, || {
        for encrypt in [false, true] {
            let streams = observed(encrypt);
            assert!(streams.iter().map(Vec::len).sum::<usize>() > 10_000, "the relay saw too few bytes");
            let has_tensors = streams.iter().any(|stream| contains(stream, ONES.as_flattened()));
            assert_eq!(has_tensors, !encrypt, "readable tensors with encrypt = {encrypt}");
            assert!(!streams.iter().any(|stream| contains(stream, ACTIVITY)), "the activity is readable");
        }
    });
}
