//! The parts of all processes together are the whole plan, with the same ids, and a part does not grow with the job.

use std::sync::Arc;

use shardflow_actors::check::check;
use shardflow_actors::simulate::{SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{ActorSpec, InputSpec, OutputSpec, RegisterId};

use super::*;
use crate::plan::Schedule;
use crate::plan::tests::gpt;
use crate::process_map::ProcessMap;

/// Removes the group ids, which differ between the parts because each part numbers its own groups.
fn without_groups(actor: &ActorSpec) -> ActorSpec {
    let mut actor = actor.clone();
    actor.actions.iter_mut().for_each(|action| action.groups.clear());
    actor
}

#[test]
fn the_parts_of_all_processes_are_the_whole_plan() {
    let meshes = ["data=4", "stage=4", "data=3,stage=2", "stage=2,tensor=4", "data=2,stage=2,tensor=2"];
    let (mut neighbours, mut third_parties) = (0, 0);
    for (mesh, processes) in meshes.into_iter().flat_map(|mesh| [(mesh, 1), (mesh, 2), (mesh, 4)]) {
        let whole = gpt(mesh, 4, Schedule::OneFOneB).instance();
        for process in 0..processes {
            let process_map = ProcessMap { process, processes, devices: whole.device_count() };
            let part = whole.plan.clone().instance_of(process_map.own());
            let at = format!("mesh {mesh}, process {process} of {processes}");
            check(&part.spec).unwrap_or_else(|error| panic!("{at}: {error}"));
            for (id, actor) in part.spec.actors.iter() {
                let of_plan = &whole.spec.actors[id];
                if !process_map.own().contains(&actor.device) {
                    neighbours += 1;
                    assert!(part.actions.get(id).is_none() && actor.name == of_plan.name, "{at}");
                    assert_eq!(actor.firing, of_plan.firing, "{at}, {}", actor.name);
                    // A neighbour has only the ports whose registers are in the part.
                    let is_known = |register: &RegisterId| part.spec.registers.get(*register).is_some();
                    for (action, of_plan) in actor.actions.iter().zip(&of_plan.actions) {
                        let inputs = of_plan.inputs.iter().filter(|input: &&InputSpec| is_known(&input.register));
                        assert!(inputs.eq(&action.inputs), "{at}, {}", actor.name);
                        let outputs = of_plan.outputs.iter().filter(|out: &&OutputSpec| is_known(&out.register));
                        assert!(outputs.eq(&action.outputs), "{at}, {}", actor.name);
                    }
                    continue;
                }
                assert_eq!(without_groups(actor), without_groups(of_plan), "{at}");
                assert_eq!(format!("{:?}", part.actions[id]), format!("{:?}", whole.actions[id]), "{at}");
            }
            let own = part.spec.actors.values().filter(|actor| process_map.own().contains(&actor.device));
            let all = whole.spec.actors.values().filter(|actor| process_map.own().contains(&actor.device));
            assert_eq!(own.count(), all.count(), "{at}");
            for (id, register) in part.spec.registers.iter() {
                assert_eq!((register, part.registers[id]), (&whole.spec.registers[id], whole.registers[id]), "{at}");
                let is_unknown = |reader: &&ActionRef| part.spec.actors.get(reader.actor).is_none();
                third_parties += register.readers.iter().filter(is_unknown).count();
            }
            let crossings = process_map.crossings(&whole).into_iter();
            let own: Vec<_> = crossings.filter(|crossing| [crossing.from, crossing.to].contains(&process)).collect();
            assert_eq!(process_map.crossings(&part), own, "{at}");
            let runs = |plan: &Instance| own.iter().map(|crossing| crossing.runs(plan)).collect::<Vec<_>>();
            assert_eq!(runs(&part), runs(&whole), "{at}");
            assert_eq!(processes == 1, part.spec.is_whole(), "{at}");
            let spec = Arc::new(part.spec);
            let simulated = simulate(&spec, &Timing::uniform(&spec, 1, 1), &SimulationOptions::steps(1));
            assert_eq!(simulated.is_err(), processes > 1, "{at}: a part cannot be simulated");
        }
    }
    assert!(neighbours > 0 && third_parties > 0, "{neighbours} neighbours, {third_parties} third parties");
}

#[test]
fn the_part_of_a_rank_does_not_grow_with_the_data_axis() {
    let size = |mesh: &str| {
        let plan = Arc::new(gpt(mesh, 1, Schedule::OneFOneB));
        let Instance { spec, actions, .. } = plan.instance_of(0..1);
        let launches = actions.values().flatten().map(|action| action.launches.len()).sum::<usize>();
        (spec.actors.len(), spec.registers.len(), launches)
    };
    assert_eq!(size("data=2,stage=2,tensor=2"), size("data=8,stage=2,tensor=2"));
    assert_eq!(size("data=4,tensor=2"), size("data=8,tensor=2"));
}
