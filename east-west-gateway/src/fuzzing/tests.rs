//! The corpus, replayed: every seed as it is, cut short anywhere, and with any one byte changed. Quick, and part of every
//! test run; the fuzzer itself goes on from there.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
};

use super::TARGETS;

/// Longer seeds are changed at so many places only.
const PLACES: usize = 700;

pub(super) fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

fn replay(name: &str) {
    let target = TARGETS.iter().find(|(n, _)| *n == name).expect("a target").1;
    let dir = corpus(name);
    let mut seeds: Vec<PathBuf> = fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("read {}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    seeds.sort();
    assert!(seeds.len() >= 5, "{} has {} seeds: write them with `make fuzz-seeds`", dir.display(), seeds.len());
    for seed in seeds {
        let bytes = fs::read(&seed).unwrap();
        let check = |what: &str, at: usize, input: &[u8]| {
            if catch_unwind(AssertUnwindSafe(|| target(input))).is_err() {
                panic!("{} fails {what} {at}: {}", seed.display(), hex(input));
            }
        };
        check("as it is, length", bytes.len(), &bytes);
        let step = bytes.len().div_ceil(PLACES).max(1);
        for at in (0..bytes.len()).step_by(step) {
            check("cut short at", at, &bytes[..at]);
            let mut changed = bytes.clone();
            changed[at] = changed[at].wrapping_add(u8::try_from(at % 254).unwrap() + 1);
            check("changed at", at, &changed);
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn frames_hold_what_is_promised_for_the_corpus() {
    replay("tunnel");
}

#[test]
fn hellos_hold_what_is_promised_for_the_corpus() {
    replay("hello");
}

#[test]
fn the_availability_feed_holds_what_is_promised_for_the_corpus() {
    replay("availability");
}
