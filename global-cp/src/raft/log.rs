//! The Raft log and vote on the durable [`Store`], as openraft's storage-v2 wants them. An append returns when it is on
//! disk.

use std::{
    fmt::Debug,
    ops::{Bound, RangeBounds},
};

use openraft::{
    AnyError, Entry, LogId, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote,
    storage::{LogFlushed, RaftLogStorage},
};
use redb::ReadableTable;

use super::{
    TypeConfig,
    store::{COMMITTED, LOG, PURGED, Store, StoreError, VOTE, encode, put},
};

/// Log, vote and committed position.
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

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError<u64>> {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        if is_empty(range) {
            return Ok(Vec::new());
        }
        let read = move |store: &Store| {
            let stored = store.read(|transaction| {
                let table = transaction.open_table(LOG)?;
                table
                    .range(range)?
                    .map(|record| record.map(|(index, value)| (index.value(), value.value().to_vec())))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(redb::Error::from)
            })?;
            stored.iter().map(|(index, bytes)| store.decode(&format!("log {index}"), bytes)).collect()
        };
        Ok(self.store.run(read).await.map_err(|error| StorageIOError::read_logs(any(&error)))?)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<u64>> {
        let read = |store: &Store| {
            let purged: Option<LogId<u64>> = store.get(PURGED)?;
            let last = store.read(|transaction| {
                let table = transaction.open_table(LOG)?;
                Ok(table.last()?.map(|(_, value)| value.value().to_vec()))
            })?;
            let last = last.map(|bytes| store.decode::<Entry<TypeConfig>>("last log entry", &bytes)).transpose()?;
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

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<(), StorageError<u64>> {
        let write = move |store: &Store| store.set(COMMITTED, &committed);
        Ok(self.store.run(write).await.map_err(|error| StorageIOError::write(any(&error)))?)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, StorageError<u64>> {
        let read = |store: &Store| store.get::<Option<LogId<u64>>>(COMMITTED);
        let committed = self.store.run(read).await.map_err(|error| StorageIOError::read(any(&error)))?;
        Ok(committed.flatten())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let records: Vec<(u64, Vec<u8>)> =
            entries.into_iter().map(|entry| (entry.log_id.index, encode(&entry))).collect();
        let write = move |store: &Store| {
            store.write(|transaction| {
                let mut table = transaction.open_table(LOG)?;
                for (index, bytes) in &records {
                    table.insert(index, bytes.as_slice())?;
                }
                Ok(())
            })
        };
        self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, since: LogId<u64>) -> Result<(), StorageError<u64>> {
        let write = move |store: &Store| {
            store.write(|transaction| {
                transaction.open_table(LOG)?.retain_in(since.index.., |_, _| false)?;
                Ok(())
            })
        };
        Ok(self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?)
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<(), StorageError<u64>> {
        let write = move |store: &Store| {
            store.write(|transaction| {
                put(transaction, PURGED, &encode(&upto))?;
                transaction.open_table(LOG)?.retain_in(..=upto.index, |_, _| false)?;
                Ok(())
            })
        };
        Ok(self.store.run(write).await.map_err(|error| StorageIOError::write_logs(any(&error)))?)
    }
}

/// redb panics on a range whose start lies beyond its end.
fn is_empty((start, end): (Bound<u64>, Bound<u64>)) -> bool {
    let first = match start {
        Bound::Included(first) => first,
        Bound::Excluded(before) => match before.checked_add(1) {
            Some(first) => first,
            None => return true,
        },
        Bound::Unbounded => 0,
    };
    match end {
        Bound::Included(last) => last < first,
        Bound::Excluded(after) => after <= first,
        Bound::Unbounded => false,
    }
}
