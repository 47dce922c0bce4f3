use super::*;

fn entry(n: u64) -> Entry {
    Entry {
        at: Timestamp(n),
        who: "user:mallory".to_owned(),
        from: "192.0.2.1:1".to_owned(),
        action: "revoke".to_owned(),
        subject: format!("cluster-{n}"),
        outcome: "denied".to_owned(),
        reason: String::new(),
        count: 1,
        before: Stamp::default(),
        after: Stamp::default(),
    }
}

fn numbers(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.at.0).collect()
}

#[tokio::test]
async fn what_was_recorded_is_read_latest_first_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = Tasks::new();
    let journal = Journal::open(dir.path(), &tasks).unwrap();
    (1..=5).for_each(|n| journal.record(entry(n)));
    assert_eq!(numbers(&journal.latest(3, |_| true).await.unwrap()), [5, 4, 3]);
    assert_eq!(numbers(&journal.latest(9, |e| e.at.0 % 2 == 0).await.unwrap()), [4, 2]);
    tasks.run_until(async {}, Duration::from_secs(5)).await.unwrap();
    // As if power had failed in the middle of a line.
    let mut file = append_to(&dir.path().join("audit/audit.jsonl")).unwrap();
    file.write_all(b"{\"at\":99,").unwrap();
    let journal = Journal::open(dir.path(), &Tasks::new()).unwrap();
    journal.record(entry(6));
    assert_eq!(numbers(&journal.latest(9, |_| true).await.unwrap()), [6, 5, 4, 3, 2, 1]);
}

#[tokio::test]
async fn many_alike_are_counted_and_the_count_is_written_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = Tasks::new();
    let journal = Journal::open(dir.path(), &tasks).unwrap();
    let now = isthmus_runtime::now();
    (0..1000).for_each(|_| journal.sample("denied", entry(now)));
    tasks.run_until(async {}, Duration::from_secs(5)).await.unwrap();
    let journal = Journal::open(dir.path(), &Tasks::new()).unwrap();
    let entries = journal.latest(10_000, |_| true).await.unwrap();
    assert_eq!(entries.iter().map(|entry| entry.count).sum::<u64>(), 1000);
    assert!(entries.len() < 100, "{}", entries.len());
    assert_eq!((entries[0].action.as_str(), entries[0].who.as_str()), ("attempts", "user:mallory"));
}

#[tokio::test]
async fn what_finds_the_queue_full_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let tasks = Tasks::new();
    let journal = Journal::open(dir.path(), &tasks).unwrap();
    // Nothing is taken from the queue before this task waits for something.
    (0..QUEUE as u64 + 10).for_each(|n| journal.record(entry(n)));
    tasks.run_until(async {}, Duration::from_secs(5)).await.unwrap();
    let journal = Journal::open(dir.path(), &Tasks::new()).unwrap();
    let lost = journal.latest(1, |entry| entry.outcome == "not_written").await.unwrap();
    assert_eq!(lost[0].count, 10);
}

#[test]
fn files_are_bounded_in_number_and_size_and_the_oldest_go_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Files::open(dir.path().to_owned(), 2000).unwrap();
    for n in 0..500 {
        files.append(&[entry(n)]).unwrap();
    }
    let sizes: Vec<u64> = fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).collect();
    assert_eq!(sizes.len(), FILES as usize);
    assert!(sizes.iter().all(|size| *size <= 2000), "{sizes:?}");
    let entries = latest(dir.path(), 10_000, |_| true).unwrap();
    assert!(entries.len() > 50 && entries.len() < 500);
    assert!(numbers(&entries).windows(2).all(|two| two[0] == two[1] + 1), "none is missing in between");
    assert_eq!(entries[0].at.0, 499);
}

#[test]
fn a_callers_text_is_cut() {
    let long = Entry { subject: "ä".repeat(5000), ..entry(1) }.bounded();
    assert_eq!(long.subject.chars().count(), MAX_TEXT);
}
