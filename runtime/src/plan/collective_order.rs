//! Every member of a group must call the same collectives in the same order.

use std::collections::BTreeMap;

use shardflow_kernels::collective::{CollectiveCall, CollectiveKind};
use shardflow_kernels::op::Op;

use crate::plan::{ActionKey, Plan};

/// Two members of a group that disagree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disagreement {
    /// Group id.
    pub group: u32,
    /// A member's rank and its calls.
    pub first: (usize, String),
    /// Another's.
    pub second: (usize, String),
}

/// What members must agree on. A member's own region is not part of it, the list of all regions is.
fn signature(call: &CollectiveCall) -> String {
    match &call.kind {
        CollectiveKind::Send { to } => format!("send to {to}"),
        CollectiveKind::Receive { from } => format!("receive from {from}"),
        kind => format!("{kind:?}"),
    }
}

/// Checks the whole plan: for each group and action, the calls of every member in launch order. That the actions come in
/// one order on all members is the ordered firing's part, and is checked with it.
pub fn check(plan: &Plan) -> Result<(), Disagreement> {
    let mut seen: BTreeMap<(u32, ActionKey), (usize, Vec<String>)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        for action in actions {
            let mut calls: BTreeMap<u32, Vec<String>> = BTreeMap::new();
            for launch in &action.launches {
                if let Op::Collective(call) = &launch.op {
                    calls.entry(call.group.id).or_default().push(signature(call));
                }
            }
            for (group, calls) in calls {
                let first = seen.entry((group, action.key)).or_insert_with(|| (actor.device, calls.clone()));
                let longest = first.1.len().max(calls.len());
                if let Some(at) = (0..longest).find(|i| first.1.get(*i) != calls.get(*i)) {
                    let call = |calls: &[String]| {
                        let call = calls.get(at).map_or("nothing", String::as_str);
                        format!("{call} as call {at} of {}", action.name)
                    };
                    let (first, second) = ((first.0, call(&first.1)), (actor.device, call(&calls)));
                    return Err(Disagreement { group, first, second });
                }
            }
        }
    }
    orders(plan)
}

/// The order of the actions that call a group's collectives, on every member.
fn orders(plan: &Plan) -> Result<(), Disagreement> {
    use shardflow_actors::spec::Firing;
    let mut seen: BTreeMap<u32, (usize, String)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        let groups_of = |index: usize| -> Vec<u32> {
            let launches = actions[index].launches.iter();
            launches.filter_map(|l| if let Op::Collective(call) = &l.op { Some(call.group.id) } else { None }).collect()
        };
        let list: Vec<usize> = match &actor.firing {
            Firing::Ordered(list) => list.iter().map(|i| *i as usize).collect(),
            // Without a list only an actor with one calling action has an order.
            Firing::Credit => (0..actions.len()).filter(|i| !groups_of(*i).is_empty()).collect(),
        };
        let mut orders: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        for index in list {
            let mut groups = groups_of(index);
            groups.sort_unstable();
            groups.dedup();
            groups.into_iter().for_each(|g| orders.entry(g).or_default().push(&actions[index].name));
        }
        for (group, order) in orders {
            let mine = (actor.device, order.join(" "));
            let first = seen.entry(group).or_insert_with(|| mine.clone());
            if first.1 != mine.1 {
                return Err(Disagreement { group, first: first.clone(), second: mine });
            }
        }
    }
    Ok(())
}
