//! What must hold for the decoders of what processes say to each other at rendezvous and about checkpoints, whatever a peer
//! sends; for fuzzing and for tests.

use std::fmt::Debug;
use std::net::{Ipv4Addr, SocketAddr};

use serde::Serialize;
use serde::de::DeserializeOwned;
use shardflow_actors::transport::{Address, SessionId, wire};

use super::messages::{Answer, Call, Fact, INTRODUCTION_BYTES_MAX, JoinInfo, Member, Ready, RendezvousRefusal, Roster};
use crate::cluster::save_agreement::Payload;
use crate::exit::Report;

/// Messages as peers send them: without their length.
pub fn samples() -> Vec<Vec<u8>> {
    let heartbeat = SocketAddr::from((Ipv4Addr::LOCALHOST, 20001));
    let addresses = vec![Address::Tcp("127.0.0.1:20000".into()), Address::Unix("/tmp/socket".into())];
    let (node, host, sockets, cores) = ("n".to_string(), "h".to_string(), [4; 32], vec![3]);
    let member = Member { process: 0, node, sockets, cores, host, pid: 9, restart: 0, addresses, heartbeat };
    let session = SessionId([5; 16]);
    let other = Member { process: 1, ..member.clone() };
    let facts = |plan: &str| vec![Fact::new("version", "0.1.0"), Fact::new("mesh", "data=2"), Fact::new("plan", plan)];
    let introduction = JoinInfo { member: member.clone(), facts: facts("1") };
    let another = JoinInfo { facts: facts("2"), member: other.clone() };
    let conflicts = introduction.conflict(&another).into_iter().collect();
    let answers = [
        Answer::Roster(Roster { session, epoch: 1, members: vec![member.clone(), other] }),
        Answer::Start,
        Answer::Refused(RendezvousRefusal::Conflicts(conflicts)),
        Answer::Refused(RendezvousRefusal::Missing { missing: vec![1, 3], processes: 4, waited_ms: 300, refused: 2 }),
        Answer::Refused(RendezvousRefusal::Lost(member.who())),
    ];
    let answers = answers.iter().map(wire::encode);
    let report = Report { rank: 3, exit: 2, cause: "no such flag".into(), ..Report::default() };
    let failed = wire::encode(&Call::Failed { ranks: 2..4, report });
    let all = answers.chain([wire::encode(&introduction), wire::encode(&Ready { session }), failed]);
    let said = br#"{"epoch":1,"step":2,"attempt":0,"phase":"Written","result":{"Err":[1,"a full disk"]}}"#;
    all.map(Result::unwrap_or_default).chain([said.to_vec()]).collect()
}

/// What is decoded comes back from its encoding, and can be shown.
///
/// # Panics
/// When one of these does not hold.
pub fn check(bytes: &[u8]) {
    if let Some(introduction) = comes_back::<JoinInfo>(bytes)
        && introduction.check().is_ok()
    {
        // What was let in is small, however it is written.
        assert!(wire::encode(&introduction).is_ok_and(|bytes| bytes.len() <= INTRODUCTION_BYTES_MAX));
        assert_eq!(introduction.conflict(&introduction), None);
    }
    match comes_back::<Answer>(bytes) {
        Some(Answer::Roster(roster)) => assert_eq!(roster.world().processes as usize, roster.members.len()),
        Some(Answer::Refused(verdict)) => assert!(!verdict.to_string().is_empty()),
        Some(Answer::Start) | None => {}
    }
    comes_back::<Ready>(bytes);
    comes_back::<Call>(bytes);
    if let Ok(said) = serde_json::from_slice::<Payload>(bytes) {
        let again = serde_json::to_vec(&said).ok().and_then(|text| serde_json::from_slice::<Payload>(&text).ok());
        assert!(again == Some(said));
    }
}

fn comes_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
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
    fn samples_are_messages() {
        assert!(samples()[..5].iter().all(|bytes| wire::decode::<Answer>(bytes).is_ok()));
        assert!(wire::decode::<JoinInfo>(&samples()[5]).is_ok() && wire::decode::<Ready>(&samples()[6]).is_ok());
        assert!(
            wire::decode::<Call>(&samples()[7]).is_ok() && serde_json::from_slice::<Payload>(&samples()[8]).is_ok()
        );
    }

    proptest! {
        #[test]
        fn holds_for_samples_with_changes(
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
