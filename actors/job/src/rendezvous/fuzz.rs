//! Checks of the decoders of rendezvous messages with arbitrary bytes, for fuzzing and tests.

use std::fmt::Debug;
use std::net::{Ipv4Addr, SocketAddr};

use crate::transport::{Address, PROCESSES_MAX, SessionId, wire};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::messages::{Answer, Fact, JoinInfo, REQUEST_BYTES_MAX, Ready, RendezvousRefusal, Request};
use super::roster::{Directory, Member, Roster};
use crate::exit::Report;
use crate::machine::MemoryClaim;

/// Returns encoded messages without their length prefixes.
pub fn samples() -> Vec<Vec<u8>> {
    let heartbeat = SocketAddr::from((Ipv4Addr::LOCALHOST, 20001));
    let addresses = vec![Address::Tcp("127.0.0.1:20000".into()), Address::Unix("/tmp/socket".into())];
    let (node, host, sockets, cores) = ("n".to_string(), "h".to_string(), [4; 32], vec![3]);
    let memory = MemoryClaim { cgroups: vec![(30, 7)], extra_bytes: 1 << 30 };
    let member = Member { process: 0, node, sockets, cores, memory, host, pid: 9, restart: 0, addresses, heartbeat };
    let session = SessionId([5; 16]);
    let other = Member { process: 1, ..member.clone() };
    let facts = |plan: &str| vec![Fact::new("version", "0.1.0"), Fact::new("mesh", "data=2"), Fact::new("plan", plan)];
    let info = JoinInfo { member: member.clone(), facts: facts("1"), wanted: vec![1..2, 5..90] };
    let other_info = JoinInfo { facts: facts("2"), member: other.clone(), wanted: vec![] };
    let conflicts = info.conflict(&other_info).into_iter().collect();
    let answers = [
        Answer::Roster(Directory::new(session, vec![member.clone(), other]).roster(1, &info.wanted)),
        Answer::Start,
        Answer::Refused(RendezvousRefusal::Conflicts(conflicts)),
        Answer::Refused(RendezvousRefusal::Missing { missing: vec![1, 3], processes: 4, waited_ms: 300, refused: 2 }),
        Answer::Refused(RendezvousRefusal::Lost(member.label())),
    ];
    let answers = answers.iter().map(wire::encode);
    let report = Report { rank: 3, exit: 2, cause: "no such flag".into(), ..Report::default() };
    let departed = Report { cause: String::new(), departed: true, ..report.clone() };
    let departed = wire::encode(&Answer::Refused(RendezvousRefusal::Failed(departed)));
    let failed = wire::encode(&Request::Failed { ranks: 2..4, report });
    let all = answers.chain([wire::encode(&info), wire::encode(&Ready { session }), failed, departed]);
    all.map(Result::unwrap_or_default).collect()
}

/// Checks that a decoded message does not change when it is encoded and decoded, and that it can be displayed.
///
/// # Panics
/// Panics if one of these properties does not hold.
pub fn check(bytes: &[u8]) {
    if let Some(info) = check_round_trip::<JoinInfo>(bytes)
        && info.check().is_ok()
    {
        // The encoding of an accepted message is within the size limit.
        assert!(wire::encode(&info).is_ok_and(|bytes| bytes.len() <= REQUEST_BYTES_MAX));
        assert_eq!(info.conflict(&info), None);
    }
    match check_round_trip::<Answer>(bytes) {
        Some(Answer::Roster(roster)) => check_roster(&roster),
        Some(Answer::Refused(refusal)) => assert!(!refusal.to_string().is_empty()),
        Some(Answer::Start) | None => {}
    }
    check_round_trip::<Ready>(bytes);
    check_round_trip::<Request>(bytes);
}

/// Checks that a roster which a process accepts has a node for each rank, and all members of the process's node.
fn check_roster(roster: &Roster) {
    let processes = roster.world().processes.min(PROCESSES_MAX);
    for own in &roster.members {
        if roster.is_for(own, processes, &[]) {
            let nodes = roster.nodes();
            let here = nodes.iter().filter(|node| **node == nodes[own.process as usize]).count();
            assert_eq!((nodes.len(), roster.on_node_of(own.process).count()), (processes as usize, here));
        }
    }
}

fn check_round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let decoded = wire::decode::<T>(bytes).ok()?;
    let again = wire::encode(&decoded).and_then(|bytes| wire::decode(&bytes));
    assert!(again.is_ok_and(|again: T| again == decoded), "{decoded:?}");
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn samples_are_valid_messages() {
        assert!(samples()[..5].iter().all(|bytes| wire::decode::<Answer>(bytes).is_ok()));
        assert!(wire::decode::<JoinInfo>(&samples()[5]).is_ok() && wire::decode::<Ready>(&samples()[6]).is_ok());
        assert!(wire::decode::<Request>(&samples()[7]).is_ok());
        for sample in samples() {
            check(&sample);
        }
    }

    proptest! {
        #[test]
        fn changed_samples_pass_the_check(
            index in 0usize..9, at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            let mut changed = samples().swap_remove(index);
            let at = at.index(changed.len());
            let end = (at + bytes.len()).min(changed.len());
            changed.splice(at..end, bytes);
            check(&changed);
        }
    }
}
