//! Tests the choice of the first cause in virtual time: every order of arrival, and random failures and delays.

use super::*;
use crate::membership::tests::ms;

const GRACE: Duration = Duration::from_millis(500);

fn failed(by: u32, follows: bool) -> Report {
    Report { by, about: by, kind: Kind::Failed, follows, cause: format!("failure of {by}"), exit: 70 + by as u8 }
}

fn lost(by: u32, about: u32, follows: bool) -> Report {
    Report { by, about, kind: Kind::Lost, follows, cause: "connection lost".into(), exit: 69 }
}

/// Returns when and how process `own` of 6 decides. Each report has an arrival time. The arbiter checks every 50 ms.
fn decide(own: u32, reports: &[(u64, Report)]) -> Option<(u64, FirstCause)> {
    let mut arbiter = Arbiter::new(own, 6, GRACE);
    let mut found = None;
    for now in (0..5000).step_by(50) {
        for (_, report) in reports.iter().filter(|r| r.0 == now) {
            arbiter.report(ms(now), report.clone());
        }
        if let Some(first) = arbiter.tick(ms(now)) {
            assert!(found.is_none(), "decided twice");
            found = Some((now, first));
        }
    }
    found
}

fn decided_process(own: u32, reports: &[(u64, Report)]) -> (u64, u32) {
    let (at, first) = decide(own, reports).expect("a cause");
    (at, first.process)
}

#[test]
fn the_kind_of_a_report_decides() {
    // A process decides on its own failure immediately. This failure beats an earlier symptom.
    assert_eq!(decided_process(0, &[(0, lost(0, 2, false)), (100, failed(0, false))]), (100, 0));
    // A process's report of its own failure beats symptoms if it arrives within the first symptom's window.
    let reports = [(0, lost(0, 2, false)), (50, lost(1, 2, false)), (450, failed(3, false))];
    assert_eq!(decided_process(0, &reports), (500, 3));
    let late = [(0, lost(0, 2, false)), (550, failed(3, false))];
    assert_eq!(decided_process(0, &late), (500, 2));
    // A secondary failure loses, even if it is this process's own or comes from a process with a lower number.
    assert_eq!(decided_process(0, &[(0, failed(5, false)), (100, failed(0, true))]), (500, 5));
    assert_eq!(decided_process(1, &[(0, failed(0, true)), (100, failed(5, false))]), (500, 5));
    // If two processes report their own failures, the lower number wins, so that the other processes agree.
    assert_eq!(decided_process(1, &[(0, failed(5, false)), (100, failed(4, false))]), (500, 4));
    // The process with the most first-hand accusers wins.
    let reports = [(0, lost(0, 1, false)), (0, lost(2, 3, false)), (100, lost(4, 3, false))];
    assert_eq!(decided_process(0, &reports), (500, 3));
    let reports = [(0, lost(1, 2, true)), (0, lost(2, 1, true)), (100, lost(2, 5, false))];
    assert_eq!(decided_process(0, &reports), (500, 5));
}

#[test]
fn a_process_that_was_frozen_decides_on_itself() {
    // After process 1 resumes, it reads its peer's report. Then it detects that the peer has closed the connections.
    let mut arbiter = Arbiter::new(1, 2, GRACE);
    assert!(arbiter.report(ms(0), Report { about: 1, ..lost(0, 1, false) }));
    let symptom = arbiter.own_symptom(0, "connection lost".into(), 69);
    assert!(symptom.follows && arbiter.report(ms(50), symptom));
    assert_eq!(arbiter.tick(ms(500)).expect("the window has ended").process, 1);
}

#[test]
fn the_cause_contains_the_observer() {
    let text = |own, by| decide(own, &[(0, lost(by, 2, false))]).expect("a cause").1.to_string();
    assert_eq!(text(0, 0), "process 2: connection lost (seen by process 0, this one)");
    assert_eq!(text(0, 1), "process 2: connection lost (seen by process 1)");
    assert_eq!(decide(0, &[(0, failed(2, false))]).expect("a cause").1.to_string(), "process 2: failure of 2");
}

#[test]
fn invalid_and_repeated_reports_have_no_effect() {
    let mut arbiter = Arbiter::new(0, 6, GRACE);
    let invalid = [lost(1, 6, false), lost(6, 1, false), lost(1, 1, false), Report { about: 2, ..failed(1, false) }];
    for report in invalid {
        assert!(!arbiter.report(ms(0), report));
    }
    assert_eq!(arbiter.tick(ms(9000)), None);
    assert!(arbiter.report(ms(0), lost(1, 2, false)));
    // A repeated report is not counted again and does not restart the window.
    assert!(!arbiter.report(ms(400), lost(1, 2, false)));
    assert!(arbiter.tick(ms(500)).is_some());
    assert!(!arbiter.report(ms(600), failed(0, false)) && arbiter.tick(ms(9000)).is_none());
}

#[test]
fn a_control_message_supplies_the_cause_for_a_heartbeats_report() {
    let from_heartbeat = || Report { cause: String::new(), ..lost(1, 2, false) };
    let decided_cause = |reports: [Report; 2]| {
        let mut arbiter = Arbiter::new(0, 6, GRACE);
        let new = reports.map(|report| arbiter.report(ms(0), report));
        assert_eq!((new, arbiter.reports.len()), ([true, false], 1));
        arbiter.tick(ms(500)).expect("the window has ended").cause
    };
    assert_eq!(decided_cause([from_heartbeat(), lost(1, 2, false)]), "connection lost (seen by process 1)");
    assert_eq!(decided_cause([lost(1, 2, false), from_heartbeat()]), "connection lost (seen by process 1)");
    let unknown = format!("{UNKNOWN_CAUSE} (seen by process 1)");
    assert_eq!(decided_cause([from_heartbeat(), from_heartbeat()]), unknown);
}

#[test]
fn reports_after_an_orderly_end_are_ignored() {
    let mut arbiter = Arbiter::new(0, 6, GRACE);
    arbiter.close();
    assert!(!arbiter.report(ms(0), failed(1, false)));
    assert_eq!(arbiter.tick(ms(9000)), None);
}

fn permutations<T: Clone>(items: &[T]) -> Vec<Vec<T>> {
    if items.is_empty() {
        return vec![vec![]];
    }
    let with_first = |i: usize| {
        let mut rest = items.to_vec();
        let first = rest.remove(i);
        permutations(&rest).into_iter().map(move |mut p| {
            p.insert(0, first.clone());
            p
        })
    };
    (0..items.len()).flat_map(with_first).collect()
}

/// For every set of up to four of these reports, the decision does not depend on their order within the window.
#[test]
fn every_order_of_arrival_leads_to_the_same_decision() {
    let all = [
        failed(1, false),
        failed(2, true),
        failed(3, false),
        lost(0, 1, false),
        lost(0, 2, true),
        lost(3, 2, false),
        lost(2, 3, false),
        lost(4, 2, false),
        lost(4, 3, true),
    ];
    for set in 1u32..1 << all.len() {
        if set.count_ones() > 4 {
            continue;
        }
        let chosen: Vec<_> =
            all.iter().enumerate().filter(|(i, _)| set >> i & 1 == 1).map(|(_, r)| r.clone()).collect();
        // Process 5 decides. It reports no failure of its own.
        let decisions = permutations(&chosen).into_iter().map(|order| {
            let timed: Vec<_> = order.into_iter().enumerate().map(|(i, r)| (i as u64 * 100, r)).collect();
            decide(5, &timed).expect("a cause")
        });
        let decisions: Vec<_> = decisions.collect();
        assert!(decisions.iter().all(|d| *d == decisions[0]), "{chosen:?}: {decisions:?}");
    }
}

/// Processes with one arbiter each, and the reports in transit between them.
struct World {
    arbiters: Vec<Option<Arbiter>>,
    /// For each report in transit: its arrival time, its receiver, and the report.
    in_transit: Vec<(u64, u32, Report)>,
    decided: Vec<Option<u32>>,
}

impl World {
    fn broadcast(&mut self, now: u64, delay: &mut impl FnMut() -> u64, report: &Report) {
        for to in (0..self.arbiters.len() as u32).filter(|to| *to != report.by) {
            self.in_transit.push((now + delay(), to, report.clone()));
        }
    }
}

proptest::proptest! {
    /// One process fails, with or without a report. Its peers detect the failure at different times. Then they end, so
    /// other peers report them as lost too.
    #[test]
    fn survivors_agree_on_the_process_that_failed_first(
        processes in 2u32..7,
        victim in 0u32..7,
        reports_itself: bool,
        seed in proptest::collection::vec(0u64..200, 64),
    ) {
        let victim = victim % processes;
        let mut next = seed.iter().cycle().copied();
        let mut delay = || next.next().unwrap_or(0);
        let mut world = World {
            arbiters: (0..processes).map(|p| Some(Arbiter::new(p, processes, GRACE))).collect(),
            in_transit: vec![],
            decided: vec![None; processes as usize],
        };
        // For each loss: its time, the observer, and the lost process.
        let mut losses: Vec<(u64, u32, u32)> =
            (0..processes).filter(|p| *p != victim).map(|p| (1000 + delay(), p, victim)).collect();
        if reports_itself {
            let report = world.arbiters[victim as usize].as_ref().expect("running").own_failure("broke".into(), 70);
            world.broadcast(1000, &mut delay, &report);
        }
        world.arbiters[victim as usize] = None;
        for now in (0..6000).step_by(10) {
            let due: Vec<_> = world.in_transit.extract_if(.., |r| r.0 <= now).collect();
            for (_, to, report) in due {
                if let Some(arbiter) = &mut world.arbiters[to as usize] {
                    arbiter.report(ms(now), report);
                }
            }
            let due: Vec<_> = losses.extract_if(.., |l| l.0 <= now).collect();
            for (_, by, about) in due {
                let Some(arbiter) = &mut world.arbiters[by as usize] else { continue };
                let report = arbiter.own_symptom(about, "connection lost".into(), 69);
                if arbiter.report(ms(now), report.clone()) {
                    world.broadcast(now, &mut delay, &report);
                }
            }
            for p in 0..processes {
                let first = world.arbiters[p as usize].as_mut().and_then(|a| a.tick(ms(now)));
                if let Some(first) = first {
                    world.decided[p as usize] = Some(first.process);
                    world.arbiters[p as usize] = None;
                    let others = (0..processes).filter(|o| *o != p);
                    losses.extend(others.map(|o| (now + delay() / 4, o, p)).collect::<Vec<_>>());
                }
            }
        }
        for p in (0..processes).filter(|p| *p != victim) {
            proptest::prop_assert_eq!(world.decided[p as usize], Some(victim), "process {}", p);
        }
    }
}
