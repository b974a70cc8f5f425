//! Checks that all members of a group call the same collectives in the same order.

use std::collections::{BTreeMap, BTreeSet};

use shardflow_kernels::collective::{CollectiveCall, CollectiveKind};

use crate::plan::{ActionKey, Plan};

/// Two members of a group that call different collectives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectiveMismatch {
    pub group: u32,
    /// A member's rank and its calls.
    pub first: (usize, String),
    /// Another member's rank and its calls.
    pub second: (usize, String),
}

/// The part of a call that must be equal on all members: it includes all regions, but not the member's own index.
fn signature(call: &CollectiveCall) -> String {
    match &call.kind {
        CollectiveKind::Send { to } => format!("send to {to}"),
        CollectiveKind::Receive { from } => format!("receive from {from}"),
        kind => format!("{kind:?}"),
    }
}

/// Checks, for each group and action, that all members make the same calls in launch order, and that they fire the
/// actions that call a group's collectives in the same order.
pub fn check(plan: &Plan) -> Result<(), CollectiveMismatch> {
    let mut seen: BTreeMap<(u32, ActionKey), (usize, Vec<String>)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        for action in actions {
            let mut calls: BTreeMap<u32, Vec<String>> = BTreeMap::new();
            action.collectives().for_each(|call| calls.entry(call.group.id).or_default().push(signature(call)));
            for (group, calls) in calls {
                let first = seen.entry((group, action.key)).or_insert_with(|| (actor.device, calls.clone()));
                let longest = first.1.len().max(calls.len());
                if let Some(at) = (0..longest).find(|i| first.1.get(*i) != calls.get(*i)) {
                    let call = |calls: &[String]| {
                        let call = calls.get(at).map_or("nothing", String::as_str);
                        format!("{call} as call {at} of {}", action.name)
                    };
                    let (first, second) = ((first.0, call(&first.1)), (actor.device, call(&calls)));
                    return Err(CollectiveMismatch { group, first, second });
                }
            }
        }
    }
    check_action_order(plan)
}

fn check_action_order(plan: &Plan) -> Result<(), CollectiveMismatch> {
    use shardflow_actors::spec::Firing;
    let mut seen: BTreeMap<u32, (usize, String)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        let groups_of = |index: usize| actions[index].collectives().map(|c| c.group.id).collect::<BTreeSet<u32>>();
        let list: Vec<usize> = match &actor.firing {
            Firing::Ordered(list) => list.iter().map(|i| *i as usize).collect(),
            // Without a list, the order is defined only if a single action calls collectives.
            Firing::Credit => (0..actions.len()).filter(|i| !groups_of(*i).is_empty()).collect(),
        };
        let mut orders: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        for index in list {
            groups_of(index).into_iter().for_each(|g| orders.entry(g).or_default().push(&actions[index].name));
        }
        for (group, order) in orders {
            let own = (actor.device, order.join(" "));
            let first = seen.entry(group).or_insert_with(|| own.clone());
            if first.1 != own.1 {
                return Err(CollectiveMismatch { group, first: first.clone(), second: own });
            }
        }
    }
    Ok(())
}
