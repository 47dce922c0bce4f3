//! The log across crashes, on damaged files, and against a list in memory.

use std::{collections::BTreeMap, fs, path::Path};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Small, so that a few entries fill several.
const SIZE: u64 = 400;

fn open(folder: &Path) -> Result<Journal, JournalError> {
    Journal::open(folder, 1, SIZE)
}

fn entry(index: u64) -> (u64, Vec<u8>) {
    (index, format!("entry number {index}").into_bytes())
}

fn with(entries: Range<u64>) -> (TempDir, Journal) {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path()).unwrap();
    for index in entries {
        journal.append(&[entry(index)]).unwrap();
    }
    (folder, journal)
}

fn all(journal: &Journal) -> Vec<(u64, Vec<u8>)> {
    journal.range().zip(journal.read(journal.range()).unwrap()).collect()
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn what_was_appended_is_there_after_a_restart_over_many_segments() {
    let (folder, journal) = with(1..60);
    assert!(files(folder.path()).len() > 3);
    let before = all(&journal);
    assert_eq!(before, (1..60).map(entry).collect::<Vec<_>>());
    drop(journal);
    let mut journal = open(folder.path()).unwrap();
    assert_eq!(all(&journal), before);
    journal.append(&[entry(60), entry(61)]).unwrap();
    assert_eq!(journal.read(60..100).unwrap().len(), 2);
}

#[test]
fn an_append_that_is_longer_than_a_segment_gets_one_of_its_own() {
    let (folder, mut journal) = with(1..3);
    let long = vec![b'x'; 5_000];
    journal.append(&[(3, long.clone()), entry(4)]).unwrap();
    journal.append(&[entry(5)]).unwrap();
    drop(journal);
    let journal = open(folder.path()).unwrap();
    assert_eq!(journal.read(3..4).unwrap(), [long]);
    assert_eq!(journal.next(), 6);
}

#[test]
fn an_entry_that_does_not_follow_is_refused_and_changes_nothing() {
    let (_folder, mut journal) = with(1..4);
    let error = journal.append(&[entry(4), entry(6)]).unwrap_err().to_string();
    assert_eq!(error, "entry 6 does not follow entry 4");
    assert_eq!(journal.next(), 4);
    journal.append(&[entry(4)]).unwrap();
}

#[test]
fn damage_before_the_end_stops_and_says_where() {
    let (folder, journal) = with(1..60);
    drop(journal);
    for (nth, file) in files(folder.path()).into_iter().enumerate().take(2) {
        let whole = fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        flipped[80] ^= 0x10;
        fs::write(&file, &flipped).unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(file.to_str().unwrap()) && error.contains("is damaged at byte"), "{nth}: {error}");
        // Cut in the middle of the log, too: only the last one may be torn.
        fs::write(&file, &whole[..100]).unwrap();
        assert!(matches!(open(folder.path()), Err(JournalError::Damaged { .. })));
        fs::write(&file, &whole).unwrap();
    }
    open(folder.path()).unwrap();
}

#[test]
fn a_missing_segment_is_told_by_its_entries() {
    let (folder, journal) = with(1..60);
    drop(journal);
    fs::remove_file(&files(folder.path())[1]).unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("entries 9 to 16 are missing") || error.contains("are missing in"), "{error}");
}

#[test]
fn what_a_crash_leaves_of_a_new_segment_is_removed() {
    let (folder, journal) = with(1..4);
    drop(journal);
    fs::write(folder.path().join("00000000000000000004.new"), b"half").unwrap();
    let journal = open(folder.path()).unwrap();
    assert_eq!((journal.next(), files(folder.path()).len()), (4, 1));
}

#[test]
fn nothing_is_accepted_after_a_write_that_failed() {
    let (folder, mut journal) = with(1..2);
    // The next segment cannot be made there.
    let next = (2..60).find(|index| {
        fs::create_dir(folder.path().join(format!("{index:020}.log"))).unwrap();
        let failed = journal.append(&[entry(*index)]).is_err();
        fs::remove_dir(folder.path().join(format!("{index:020}.log"))).unwrap();
        failed
    });
    let next = next.expect("a segment is full some time");
    assert!(matches!(journal.append(&[entry(next)]), Err(JournalError::Broken { .. })));
    drop(journal);
    let mut journal = open(folder.path()).unwrap();
    assert_eq!(journal.next(), next, "what was acknowledged is there");
    journal.append(&[entry(next)]).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Append(u8),
    Truncate(u8),
    Purge(u8),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..12_u8).prop_map(Step::Append),
        1 => (0..20_u8).prop_map(Step::Truncate),
        1 => (1..30_u8).prop_map(Step::Purge),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_is_a_list_whose_beginning_may_be_forgotten(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        let mut model = BTreeMap::new();
        let (mut start, mut next, mut salt) = (1_u64, 1_u64, 0_u64);
        for step in steps {
            match step {
                Step::Append(count) => {
                    // Each time other bytes, so that what was truncated is not mistaken for what came after it.
                    salt += 1;
                    let new: Vec<_> = (next..next + u64::from(count)).map(|i| (i, format!("{i} of {salt}").into_bytes())).collect();
                    journal.append(&new).unwrap();
                    next += u64::from(count);
                    model.extend(new);
                }
                Step::Truncate(back) => {
                    let since = next.saturating_sub(u64::from(back)).max(start);
                    journal.truncate(since).unwrap();
                    next = next.min(since);
                    model.split_off(&since);
                }
                Step::Purge(ahead) => {
                    start += u64::from(ahead);
                    journal.purge(start - 1).unwrap();
                    next = next.max(start);
                    model = model.split_off(&start);
                }
                Step::Restart => journal = Journal::open(folder.path(), start, SIZE).unwrap(),
            }
            prop_assert_eq!(journal.range(), start..next);
            prop_assert_eq!(all(&journal), model.clone().into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn after_a_crash_in_the_last_write_all_before_it_is_there(appends in prop::collection::vec(1..4_usize, 1..8), cut in any::<prop::sample::Index>()) {
        let folder = tempfile::tempdir().unwrap();
        // Everything in one segment.
        let mut journal = Journal::open(folder.path(), 1, 100_000).unwrap();
        let mut acknowledged = 1;
        for count in &appends[..appends.len() - 1] {
            let entries: Vec<_> = (acknowledged..).take(*count).map(entry).collect();
            journal.append(&entries).unwrap();
            acknowledged = journal.next();
        }
        let file = files(folder.path()).remove(0);
        let flushed = fs::read(&file).unwrap();
        let entries: Vec<_> = (acknowledged..).take(appends[appends.len() - 1]).map(entry).collect();
        journal.append(&entries).unwrap();
        drop(journal);
        // Some of the last write's bytes are zeros again from a sector on, or the file ends there.
        let mut bytes = fs::read(&file).unwrap();
        let first = bytes.iter().zip(&flushed).position(|(a, b)| a != b).unwrap();
        let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        let at = first + cut.index(last - first);
        bytes.truncate(at);
        fs::write(&file, &bytes).unwrap();
        let journal = Journal::open(folder.path(), 1, 100_000).unwrap();
        prop_assert!(journal.next() >= acknowledged);
        let kept = all(&journal);
        prop_assert_eq!(kept, (1..journal.next()).map(entry).collect::<Vec<_>>());
    }
}
