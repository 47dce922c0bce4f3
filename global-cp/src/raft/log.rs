//! The Raft log and vote on the durable [`Store`], as openraft's storage-v2 wants them. An append returns when it is on
//! disk.
//!
//! What was appended last is also kept in memory ([`Tail`]): it is about to be read for each follower and to be applied, and
//! need not come from the disk and be understood anew each time.

use std::{
    collections::VecDeque,
    fmt::Debug,
    ops::{Bound, Range, RangeBounds},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use openraft::{
    AnyError, Entry, LogId, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote,
    storage::{LogFlushed, RaftLogStorage},
};

use super::{
    TypeConfig,
    store::{PURGED, Store, StoreError, VOTE, encode},
};

/// Entries of the tail.
const TAIL_ENTRIES: usize = 64;
/// And their length on disk.
const TAIL_BYTES: usize = 4 << 20;

/// Log and vote.
#[derive(Clone, Debug)]
pub(super) struct LogStore {
    store: Store,
    tail: Arc<Mutex<Tail>>,
}

/// The latest entries. What holds: they are on disk, follow each other, and none that is on disk follows the last one, but for an
/// append that is ending.
#[derive(Debug, Default)]
struct Tail {
    /// With their lengths.
    entries: VecDeque<(Entry<TypeConfig>, usize)>,
    bytes: usize,
}

impl LogStore {
    pub(super) fn new(store: Store) -> Self {
        Self { store, tail: Arc::default() }
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        // Each change is whole before the next step that could panic.
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tail {
    fn first(&self) -> Option<u64> {
        self.entries.front().map(|(entry, _)| entry.log_id.index)
    }

    /// All entries of `range`, if all of them are here.
    fn get(&self, range: &Range<u64>) -> Option<Vec<Entry<TypeConfig>>> {
        let skip = usize::try_from(range.start.checked_sub(self.first()?)?).ok()?;
        let count = usize::try_from(range.end - range.start).ok()?;
        let entries: Vec<_> = self.entries.iter().skip(skip).take(count).map(|(entry, _)| entry.clone()).collect();
        (entries.len() == count).then_some(entries)
    }

    /// Adds what is on disk now.
    fn push(&mut self, entry: Entry<TypeConfig>, length: usize) {
        if self.entries.back().is_some_and(|(last, _)| last.log_id.index + 1 != entry.log_id.index) {
            *self = Self::default();
        }
        self.entries.push_back((entry, length));
        self.bytes += length;
        while self.entries.len() > TAIL_ENTRIES || self.bytes > TAIL_BYTES {
            let Some((_, length)) = self.entries.pop_front() else { return };
            self.bytes -= length;
        }
    }

    /// Keeps only entries within `range`.
    fn keep(&mut self, range: Range<u64>) {
        self.entries.retain(|(entry, _)| range.contains(&entry.log_id.index));
        self.bytes = self.entries.iter().map(|(_, length)| length).sum();
    }
}

/// openraft keeps the text of the error and its sources.
pub(super) fn any(error: &StoreError) -> AnyError {
    AnyError::new(error)
}

fn decode(store: &Store, index: u64, bytes: &[u8]) -> Result<Entry<TypeConfig>, StoreError> {
    store.decode(&format!("entry {index}"), bytes)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError<u64>> {
        let range = bounds(&range);
        let held = self.tail().get(&range);
        if let Some(entries) = held {
            return Ok(entries);
        }
        let read = move |store: &Store| {
            // The files are read without the lock: an append must not wait for a follower that is far behind.
            let places = store.journal().places(range);
            places.iter().map(|(index, place)| decode(store, *index, &place.read(*index)?)).collect()
        };
        Ok(self.store.run(read).await.map_err(|error| StorageIOError::read_logs(any(&error)))?)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<u64>> {
        let read = |store: &Store| {
            let purged: Option<LogId<u64>> = store.get(PURGED)?;
            let last = store.journal().next().checked_sub(1);
            let last = last.filter(|last| purged.is_none_or(|purged| purged.index < *last));
            let last = match last {
                Some(last) => {
                    let bytes = store.journal().read(last..last + 1)?;
                    bytes.first().map(|bytes| decode(store, last, bytes)).transpose()?
                }
                None => None,
            };
            Ok(LogState { last_purged_log_id: purged, last_log_id: last.map(|entry| entry.log_id).or(purged) })
        };
        Ok(self.store.run(read).await.map_err(|error| StorageIOError::read_logs(any(&error)))?)
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        let vote = *vote;
        let write = move |store: &Store| store.set(VOTE, &vote);
        Ok(self.store.run(write).await.map_err(|error| StorageIOError::write_vote(any(&error)))?)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        let read = |store: &Store| store.get(VOTE);
        Ok(self.store.run(read).await.map_err(|error| StorageIOError::read_vote(any(&error)))?)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry<TypeConfig>> = entries.into_iter().collect();
        let write = move |store: &Store| {
            let records: Vec<(u64, Vec<u8>)> =
                entries.iter().map(|entry| (entry.log_id.index, encode(entry))).collect();
            store.journal().append(&records)?;
            let lengths = records.into_iter().map(|(_, bytes)| bytes.len());
            Ok(entries.into_iter().zip(lengths).collect::<Vec<_>>())
        };
        let written = self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?;
        {
            let mut tail = self.tail();
            written.into_iter().for_each(|(entry, length)| tail.push(entry, length));
        }
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, since: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.tail().keep(0..since.index);
        let write = move |store: &Store| Ok(store.journal().truncate(since.index)?);
        Ok(self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?)
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.tail().keep(upto.index.saturating_add(1)..u64::MAX);
        let write = move |store: &Store| {
            // First, so that what is gone is known to be.
            store.set(PURGED, &upto)?;
            Ok(store.journal().purge(upto.index)?)
        };
        Ok(self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?)
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(first) => *first,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(after) => *after,
        Bound::Unbounded => u64::MAX,
    };
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use openraft::{CommittedLeaderId, EntryPayload};

    use super::*;

    fn entry(index: u64) -> Entry<TypeConfig> {
        Entry { log_id: LogId::new(CommittedLeaderId::new(1, 1), index), payload: EntryPayload::Blank }
    }

    fn indexes(tail: &Tail, range: Range<u64>) -> Option<Vec<u64>> {
        Some(tail.get(&range)?.into_iter().map(|entry| entry.log_id.index).collect())
    }

    #[test]
    fn the_tail_answers_only_for_what_it_holds_whole() {
        let mut tail = Tail::default();
        (10..20).for_each(|index| tail.push(entry(index), 100));
        assert_eq!(indexes(&tail, 12..14), Some(vec![12, 13]));
        assert_eq!(indexes(&tail, 19..20), Some(vec![19]));
        for beyond in [9..12, 18..21, 20..21, 0..u64::MAX] {
            assert_eq!(indexes(&tail, beyond.clone()), None, "{beyond:?}");
        }
        tail.keep(0..15);
        assert_eq!((indexes(&tail, 14..15), indexes(&tail, 14..16)), (Some(vec![14]), None));
        tail.keep(12..u64::MAX);
        assert_eq!((indexes(&tail, 11..12), tail.first(), tail.bytes), (None, Some(12), 300));
    }

    #[test]
    fn the_tail_is_bounded_and_begins_anew_after_a_gap() {
        let mut tail = Tail::default();
        (0..200).for_each(|index| tail.push(entry(index), 1));
        assert_eq!((tail.first(), tail.entries.len()), (Some(200 - TAIL_ENTRIES as u64), TAIL_ENTRIES));
        tail.push(entry(500), 1);
        assert_eq!((tail.first(), tail.bytes), (Some(500), 1));
        tail.push(entry(501), TAIL_BYTES);
        assert_eq!((tail.first(), tail.bytes), (Some(501), TAIL_BYTES));
        tail.push(entry(502), TAIL_BYTES + 1);
        assert_eq!((tail.first(), tail.bytes), (None, 0));
    }
}
