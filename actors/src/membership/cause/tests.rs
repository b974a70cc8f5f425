//! First causes, in virtual time: every order of arrival, and random deaths and delays.

use super::*;

const GRACE: Duration = Duration::from_millis(500);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn failed(by: u32, follows: bool) -> Report {
    Report { by, about: by, kind: Kind::Failed, follows, cause: format!("failure of {by}"), exit: 70 + by as u8 }
}

fn lost(by: u32, about: u32, follows: bool) -> Report {
    Report { by, about, kind: Kind::Lost, follows, cause: "connection lost".into(), exit: 69 }
}

/// Whom process `own` of 6 names when reports arrive at these times; it looks every 50 ms.
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

fn named(own: u32, reports: &[(u64, Report)]) -> (u64, u32) {
    let (at, first) = decide(own, reports).expect("a cause");
    (at, first.process)
}

#[test]
fn kinds_in_order() {
    // Own failure: at once, over an earlier symptom.
    assert_eq!(named(0, &[(0, lost(0, 2, false)), (100, failed(0, false))]), (100, 0));
    // A late word of the process itself beats the symptoms, within the window that the first symptom opened.
    let reports = [(0, lost(0, 2, false)), (50, lost(1, 2, false)), (450, failed(3, false))];
    assert_eq!(named(0, &reports), (500, 3));
    let late = [(0, lost(0, 2, false)), (550, failed(3, false))];
    assert_eq!(named(0, &late), (500, 2));
    // A failure that follows another one does not win, though it is our own, or the lower process.
    assert_eq!(named(0, &[(0, failed(5, false)), (100, failed(0, true))]), (500, 5));
    assert_eq!(named(1, &[(0, failed(0, true)), (100, failed(5, false))]), (500, 5));
    // Two that failed by themselves: the lower, so that all others agree.
    assert_eq!(named(1, &[(0, failed(5, false)), (100, failed(4, false))]), (500, 4));
    // The one that most accuse; then one that was accused first-hand.
    let reports = [(0, lost(0, 1, false)), (0, lost(2, 3, false)), (100, lost(4, 3, false))];
    assert_eq!(named(0, &reports), (500, 3));
    let reports = [(0, lost(1, 2, true)), (0, lost(2, 1, true)), (100, lost(2, 5, false))];
    assert_eq!(named(0, &reports), (500, 5));
}

#[test]
fn a_process_that_was_frozen_names_itself() {
    // It wakes, reads that it was given up, then sees the connections that its peer has closed since.
    let mut arbiter = Arbiter::new(1, 2, GRACE);
    assert!(arbiter.report(ms(0), Report { about: 1, ..lost(0, 1, false) }));
    let symptom = arbiter.own_symptom(0, "connection lost".into(), 69);
    assert!(symptom.follows && arbiter.report(ms(50), symptom));
    assert_eq!(arbiter.tick(ms(500)).expect("over").process, 1);
}

#[test]
fn the_cause_names_who_saw_it() {
    let text = |own, by| decide(own, &[(0, lost(by, 2, false))]).expect("a cause").1.to_string();
    assert_eq!(text(0, 0), "process 2: connection lost (seen by this process, 0)");
    assert_eq!(text(0, 1), "process 2: connection lost (seen by process 1)");
    assert_eq!(decide(0, &[(0, failed(2, false))]).expect("a cause").1.to_string(), "process 2: failure of 2");
}

#[test]
fn senseless_and_repeated_reports_change_nothing() {
    let mut arbiter = Arbiter::new(0, 6, GRACE);
    let strange = [lost(1, 6, false), lost(6, 1, false), lost(1, 1, false), Report { about: 2, ..failed(1, false) }];
    for report in strange {
        assert!(!arbiter.report(ms(0), report));
    }
    assert_eq!(arbiter.tick(ms(9000)), None);
    assert!(arbiter.report(ms(0), lost(1, 2, false)));
    // It neither counts twice nor opens the window anew.
    assert!(!arbiter.report(ms(400), lost(1, 2, false)));
    assert!(arbiter.tick(ms(500)).is_some());
    assert!(!arbiter.report(ms(600), failed(0, false)) && arbiter.tick(ms(9000)).is_none());
}

#[test]
fn a_letter_tells_what_a_heartbeat_cannot() {
    let untold = || Report { cause: String::new(), ..lost(1, 2, false) };
    let told = |reports: [Report; 2]| {
        let mut arbiter = Arbiter::new(0, 6, GRACE);
        let new = reports.map(|report| arbiter.report(ms(0), report));
        assert_eq!((new, arbiter.reports.len()), ([true, false], 1));
        arbiter.tick(ms(500)).expect("over").cause
    };
    assert_eq!(told([untold(), lost(1, 2, false)]), "connection lost (seen by process 1)");
    assert_eq!(told([lost(1, 2, false), untold()]), "connection lost (seen by process 1)");
    assert_eq!(told([untold(), untold()]), format!("{UNTOLD} (seen by process 1)"));
}

#[test]
fn nothing_is_a_failure_after_the_orderly_end() {
    let mut arbiter = Arbiter::new(0, 6, GRACE);
    arbiter.close();
    assert!(!arbiter.report(ms(0), failed(1, false)));
    assert_eq!(arbiter.tick(ms(9000)), None);
}

/// All orders of `items`.
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

/// The order of arrival within the window does not matter, for every set of up to four of these reports.
#[test]
fn every_order_of_arrival_names_the_same() {
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
        // Process 5 is nobody's peer in these reports, so it has no failure of its own.
        let names = permutations(&chosen).into_iter().map(|order| {
            let timed: Vec<_> = order.into_iter().enumerate().map(|(i, r)| (i as u64 * 100, r)).collect();
            decide(5, &timed).expect("a cause")
        });
        let names: Vec<_> = names.collect();
        assert!(names.iter().all(|n| *n == names[0]), "{chosen:?}: {names:?}");
    }
}

/// Processes with an arbiter each, and reports under way between them.
struct World {
    arbiters: Vec<Option<Arbiter>>,
    /// (arrives, to, report)
    under_way: Vec<(u64, u32, Report)>,
    named: Vec<Option<u32>>,
}

impl World {
    fn broadcast(&mut self, now: u64, delay: &mut impl FnMut() -> u64, report: &Report) {
        for to in (0..self.arbiters.len() as u32).filter(|to| *to != report.by) {
            self.under_way.push((now + delay(), to, report.clone()));
        }
    }
}

proptest::proptest! {
    /// One process dies: by itself with a last word, or without. Its peers notice at different times, and each stops a
    /// while after it has decided, which others see as a loss in turn. All name the one that died first.
    #[test]
    fn survivors_agree_on_who_died_first(
        processes in 2u32..7,
        victim in 0u32..7,
        last_word: bool,
        seed in proptest::collection::vec(0u64..200, 64),
    ) {
        let victim = victim % processes;
        let mut next = seed.iter().cycle().copied();
        let mut delay = || next.next().unwrap_or(0);
        let mut world = World {
            arbiters: (0..processes).map(|p| Some(Arbiter::new(p, processes, GRACE))).collect(),
            under_way: vec![],
            named: vec![None; processes as usize],
        };
        // (when, who notices, whose loss)
        let mut losses: Vec<(u64, u32, u32)> =
            (0..processes).filter(|p| *p != victim).map(|p| (1000 + delay(), p, victim)).collect();
        if last_word {
            let report = world.arbiters[victim as usize].as_ref().expect("lives").own_failure("broke".into(), 70);
            world.broadcast(1000, &mut delay, &report);
        }
        world.arbiters[victim as usize] = None;
        for now in (0..6000).step_by(10) {
            let due: Vec<_> = world.under_way.extract_if(.., |r| r.0 <= now).collect();
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
                    world.named[p as usize] = Some(first.process);
                    world.arbiters[p as usize] = None;
                    let others = (0..processes).filter(|o| *o != p);
                    losses.extend(others.map(|o| (now + delay() / 4, o, p)).collect::<Vec<_>>());
                }
            }
        }
        for p in (0..processes).filter(|p| *p != victim) {
            proptest::prop_assert_eq!(world.named[p as usize], Some(victim), "process {}", p);
        }
    }
}
