//! Simulations of several nodes in one thread, under schedules that a seed decides; for tests only.
//!
//! [`world`] has no IO, no clock and no engine: a small model of a replicated log under crashes, partitions and elections
//! ([`replica`]), with the real state, views, wire formats and sessions' rules on top of it, agents that follow ([`agents`])
//! and commands by chance ([`plan`]). What must hold is checked at each step and at the end ([`judge`]).
//!
//! A failure prints its seed: `ISTHMUS_SEED=N cargo test -p isthmus-global-cp --lib sim::` runs that schedule alone.
//! `SCHEDULES=N` runs more or fewer.

mod agents;
mod judge;
mod plan;
mod replica;
mod world;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use self::world::{Bug, Counts, World};

/// Schedules of one run of the suite.
const SCHEDULES: u64 = 2_000;
/// Schedules among which each planted bug must show.
const FOR_A_BUG: u64 = 1_000;
const THREADS: usize = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Runs the schedules of `seeds`: what each of them found, and what happened in all.
fn run(seeds: std::ops::Range<u64>, bug: Option<Bug>, enough: usize) -> (BTreeMap<u64, String>, Counts) {
    let (next, results) = (AtomicU64::new(seeds.start), Mutex::new((BTreeMap::new(), Counts::default())));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || results.lock().unwrap().0.len() >= enough {
                        return;
                    }
                    let (found, counts) = World::new(seed, bug).run();
                    let mut results = results.lock().unwrap();
                    results.1.add(&counts);
                    if let Err(what) = found {
                        results.0.insert(seed, what);
                    }
                }
            });
        }
    });
    results.into_inner().unwrap()
}

#[test]
fn whatever_the_schedule_replicas_agree_agents_follow_and_nothing_acknowledged_is_lost() {
    let seeds = match number("ISTHMUS_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = rand::random::<u64>() >> 16;
            first..first + number("SCHEDULES").unwrap_or(SCHEDULES)
        }
    };
    println!("ISTHMUS_SEED={} and those that follow, {} schedules", seeds.start, seeds.end - seeds.start);
    let (found, counts) = run(seeds, None, 1);
    println!("{counts:#?}");
    if let Some((seed, what)) = found.first_key_value() {
        panic!("ISTHMUS_SEED={seed}: {what}");
    }
}

#[test]
fn a_schedule_is_the_same_whenever_it_is_run() {
    for seed in 0..20 {
        let [(one, first), (two, second)] = [(); 2].map(|()| World::new(seed, None).run());
        assert_eq!((one, first), (two, second), "seed {seed}");
    }
}

#[test]
fn every_planted_bug_is_caught() {
    let mut missed = BTreeSet::new();
    for bug in Bug::ALL {
        let (found, _) = run(0..FOR_A_BUG, Some(bug), 1);
        match found.first_key_value() {
            Some((seed, what)) => println!("{bug:?}: seed {seed}: {what}"),
            None => drop(missed.insert(bug)),
        }
    }
    assert!(missed.is_empty(), "not caught in {FOR_A_BUG} schedules: {missed:?}");
}
