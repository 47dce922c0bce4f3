//! The Raft log and vote on the durable [`Store`], as openraft's storage-v2 wants them. An append returns when it is on
//! disk.

use std::{
    fmt::Debug,
    ops::{Bound, Range, RangeBounds},
};

use openraft::{
    AnyError, Entry, LogId, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote,
    storage::{LogFlushed, RaftLogStorage},
};

use super::{
    TypeConfig,
    store::{PURGED, Store, StoreError, VOTE, encode},
};

/// Log and vote.
#[derive(Clone, Debug)]
pub(super) struct LogStore {
    store: Store,
}

impl LogStore {
    pub(super) fn new(store: Store) -> Self {
        Self { store }
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
        let records: Vec<(u64, Vec<u8>)> =
            entries.into_iter().map(|entry| (entry.log_id.index, encode(&entry))).collect();
        let write = move |store: &Store| Ok(store.journal().append(&records)?);
        self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, since: LogId<u64>) -> Result<(), StorageError<u64>> {
        let write = move |store: &Store| Ok(store.journal().truncate(since.index)?);
        Ok(self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?)
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<(), StorageError<u64>> {
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
