//! The durable store: one redb file that holds the log, the vote, the committed position and the snapshot.
//!
//! Every write is one transaction, flushed to disk before it returns. Every record starts with a format byte. A store of
//! a later format, or one that another process has open, is refused. Calls block; [`Store::run`] moves them off the
//! async threads.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use redb::{Database, DatabaseError, Durability, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction};
use serde::{Serialize, de::DeserializeOwned};

/// Log entries by index.
pub(super) const LOG: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("log");
/// Single records, by the keys below.
pub(super) const META: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("meta");

pub(super) const VOTE: &str = "vote";
pub(super) const COMMITTED: &str = "committed";
pub(super) const PURGED: &str = "purged";
pub(super) const SNAPSHOT_META: &str = "snapshot-meta";
pub(super) const SNAPSHOT: &str = "snapshot";
/// Written at each start, to prove that the store can be written.
const OPENED: &str = "opened";

/// First byte of every record: JSON in the shapes of this version follows.
const FORMAT: u8 = 1;

/// What redb may keep of the file in memory.
const CACHE_BYTES: usize = 32 << 20;

/// A handle to the open store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    database: Arc<Database>,
    /// For messages.
    at: Arc<Path>,
}

/// What went wrong with the store, and where.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be made.
    #[error("create the state folder {}; check `stateDir` and its owner", .folder.display())]
    Folder {
        /// Which.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be opened.
    #[error("open the store {}; {hint}", .file.display())]
    Open {
        /// Which.
        file: PathBuf,
        /// What to do.
        hint: &'static str,
        /// Why.
        source: DatabaseError,
    },
    /// The first write failed.
    #[error(
        "write to the state folder {}; the control plane does not start, for it could not keep what it acknowledges: \
         free space on the disk, or make the folder writable", .folder.display()
    )]
    Unwritable {
        /// Which.
        folder: PathBuf,
        /// Why.
        source: redb::Error,
    },
    /// A later operation failed.
    #[error("use the store {}", .file.display())]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        source: redb::Error,
    },
    /// A record is of a format that this version does not know.
    #[error("record {record} in the store {} has format {format}, but this version reads {FORMAT}", .file.display())]
    Format {
        /// Where.
        file: PathBuf,
        /// Which record.
        record: String,
        /// What it says of itself; 0 if it is empty.
        format: u8,
    },
    /// A record does not parse.
    #[error("record {record} in the store {} is damaged; restore the state folder from backup", .file.display())]
    Damaged {
        /// Where.
        file: PathBuf,
        /// Which record.
        record: String,
        /// Why.
        source: serde_json::Error,
    },
    /// The blocking thread ended early.
    #[error("the store's thread ended before it answered")]
    Thread,
}

impl Store {
    /// Opens (or creates) the store in `folder`, and proves that it can be written.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let raft = folder.join("raft");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&raft)
            .map_err(|source| StoreError::Folder { folder: folder.to_owned(), source })?;
        let file = raft.join("log.redb");
        let database = Database::builder().set_cache_size(CACHE_BYTES).create(&file).map_err(|source| {
            let hint = match &source {
                DatabaseError::DatabaseAlreadyOpen => "another process uses it: stop that one first",
                DatabaseError::UpgradeRequired(_) => "it was written by another version",
                _ => "free space on the disk, or make the folder writable",
            };
            StoreError::Open { file: file.clone(), hint, source }
        })?;
        Self::prove(database, folder, &file)
    }

    /// Opens a store on any backend, for tests of its faults.
    #[cfg(test)]
    pub(super) fn on_backend(backend: impl redb::StorageBackend) -> Result<Self, StoreError> {
        let at = Path::new("memory");
        let database = Database::builder().create_with_backend(backend).map_err(|source| StoreError::Open {
            file: at.to_owned(),
            hint: "test",
            source,
        })?;
        Self::prove(database, at, at)
    }

    /// Creates the tables and flushes, so that an unwritable or full disk is found before anything is acknowledged.
    fn prove(database: Database, folder: &Path, file: &Path) -> Result<Self, StoreError> {
        let store = Self { database: Arc::new(database), at: file.into() };
        let count: u64 = store.get(OPENED)?.unwrap_or(0);
        store
            .write(|transaction| {
                transaction.open_table(LOG)?;
                put(transaction, OPENED, &encode(&(count + 1)))
            })
            .map_err(|error| match error {
                StoreError::Io { source, .. } => StoreError::Unwritable { folder: folder.to_owned(), source },
                other => other,
            })?;
        Ok(store)
    }

    /// Runs `work` where it may block.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(|_| StoreError::Thread)?
    }

    /// One transaction, on disk when this returns `Ok`; without effect otherwise.
    pub(super) fn write(
        &self,
        work: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        let attempt = || {
            let mut transaction = self.database.begin_write()?;
            transaction.set_durability(Durability::Immediate)?;
            work(&transaction)?;
            transaction.commit()?;
            Ok(())
        };
        attempt().map_err(|source| self.io(source))
    }

    /// A consistent look at the store.
    pub(super) fn read<T>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let attempt = || work(&self.database.begin_read()?);
        attempt().map_err(|source| self.io(source))
    }

    /// A single record, decoded.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &'static str) -> Result<Option<T>, StoreError> {
        self.get_bytes(key)?.map(|bytes| self.decode(key, &bytes)).transpose()
    }

    /// A single record as stored.
    pub(super) fn get_bytes(&self, key: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|transaction| {
            let table = match transaction.open_table(META) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                table => table?,
            };
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        })
    }

    /// Writes a single record.
    pub(super) fn set<T: Serialize>(&self, key: &'static str, value: &T) -> Result<(), StoreError> {
        let bytes = encode(value);
        self.write(|transaction| put(transaction, key, &bytes))
    }

    /// Reads a record that [`encode`] wrote.
    pub(super) fn decode<T: DeserializeOwned>(&self, record: &str, bytes: &[u8]) -> Result<T, StoreError> {
        match bytes.split_first() {
            Some((&FORMAT, json)) => serde_json::from_slice(json).map_err(|source| StoreError::Damaged {
                file: self.at.to_path_buf(),
                record: record.to_owned(),
                source,
            }),
            other => Err(StoreError::Format {
                file: self.at.to_path_buf(),
                record: record.to_owned(),
                format: other.map_or(0, |(format, _)| *format),
            }),
        }
    }

    /// Of a record that must be there.
    pub(super) fn missing(&self, record: &str) -> StoreError {
        StoreError::Damaged {
            file: self.at.to_path_buf(),
            record: record.to_owned(),
            source: serde::de::Error::custom("it is missing"),
        }
    }

    fn io(&self, source: redb::Error) -> StoreError {
        StoreError::Io { file: self.at.to_path_buf(), source }
    }
}

/// A record: the format byte, then JSON.
pub(super) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![FORMAT];
    #[expect(
        clippy::expect_used,
        reason = "our types have string keys and no failing serializer; writing to a Vec cannot fail"
    )]
    serde_json::to_writer(&mut bytes, value).expect("serialize to memory");
    bytes
}

/// Writes a single record within a transaction.
pub(super) fn put(transaction: &WriteTransaction, key: &str, bytes: &[u8]) -> Result<(), redb::Error> {
    transaction.open_table(META)?.insert(key, bytes)?;
    Ok(())
}
