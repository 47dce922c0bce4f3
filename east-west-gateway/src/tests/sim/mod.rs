//! Whole tunnels over a bad network, with every fault at every step of one carried connection, in held time: seconds of
//! story take milliseconds. Each case has a seed, which says what becomes of each datagram.
//!
//! What must hold: bytes are exact, or the connection is reset; a cut is never an end; until the first byte came back the
//! hello goes on elsewhere, whole; nothing hangs; a drain loses nothing; and the near gateway comes to know exactly what
//! the far one can serve. `ISTHMUS_SIM_SEEDS=1000` plays more seeds, `ISTHMUS_SEED=N` begins with another one.
//!
//! That is QUIC; of links over TCP, [`control`] plays the conversation.

mod control;
mod net;
mod script;
mod world;

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use self::script::{Case, Fault, STEPS};

/// Seeds for each fault at each step.
const SEEDS: u64 = 2;

#[test]
fn every_fault_at_every_step_leaves_exact_bytes_or_a_reset() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let first = number("ISTHMUS_SEED").unwrap_or(1);
    let seeds = number("ISTHMUS_SIM_SEEDS").unwrap_or(SEEDS);
    let cases: Vec<Case> = (first..first + seeds)
        .flat_map(|seed| {
            Fault::ALL.into_iter().flat_map(move |fault| (0..STEPS).map(move |at| Case { seed, fault, at }))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let failures: Mutex<Vec<String>> = Mutex::default();
    let ends: Mutex<BTreeMap<String, usize>> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match case.play() {
                        Ok(end) => *ends.lock().unwrap().entry(format!("{:?}: {end}", case.fault)).or_default() += 1,
                        Err(why) => failures.lock().unwrap().push(format!("{case:?}: {why}")),
                    }
                }
            });
        }
    });
    let ends = ends.into_inner().unwrap();
    ends.iter().for_each(|(end, count)| println!("{count:>6}  {end}"));
    let failures = failures.into_inner().unwrap();
    let some: Vec<&String> = failures.iter().take(8).collect();
    assert!(failures.is_empty(), "{} of {} cases fail: {some:#?}", failures.len(), cases.len());
    // The story must be able to go either way, or nothing was injected.
    assert!(
        ends.keys().any(|end| end.contains("reset")) && ends.keys().any(|end| end.contains("replayed")),
        "{ends:?}"
    );
}
