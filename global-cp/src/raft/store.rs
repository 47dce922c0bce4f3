//! The durable store of one node: its log (the [`Journal`]), and vote, purged position and snapshot as files of their own.
//!
//! Every write is flushed to disk before it returns. A file that is not the log is replaced whole, so that a crash leaves
//! the old one or the new one; each begins with a format byte and a checksum. A store of a later format, or one that
//! another process has open, is refused. Calls block; [`Store::run`] moves them off the async threads.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write as _},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use openraft::LogId;
use serde::{Serialize, de::DeserializeOwned};

use super::journal::{Journal, JournalError, REPLACE, sync_folder};

/// The single records.
pub(super) const VOTE: &str = "vote";
pub(super) const PURGED: &str = "purged";
/// What the snapshot is of, and the state.
pub(super) const SNAPSHOT: &str = "snapshot";
/// Which node this is.
const OWN: &str = "own";
/// Written at each start, to prove that the store can be written.
const OPENED: &str = "opened";

/// First byte of every file but the log's, and of every entry: JSON in the shapes of this version follows.
const FORMAT: u8 = 1;
/// The format byte, and the CRC-32C of what follows.
const HEADER: usize = 5;

/// A handle to the open store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    journal: Mutex<Journal>,
    /// Locked while this lives.
    _lock: File,
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
    /// Another process has it open.
    #[error("the store {} is in use: another process uses it: stop that one first", .folder.display())]
    InUse {
        /// Which.
        folder: PathBuf,
    },
    /// It was written before the format was settled.
    #[error("{} was written by a version before 0.1: remove the state folder and let the clusters join anew", .file.display())]
    Earlier {
        /// Which.
        file: PathBuf,
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
        source: Box<StoreError>,
    },
    /// A later operation failed.
    #[error("{what} {}; free space on the disk, or make the folder writable", .file.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A record is of a format that this version does not know.
    #[error("{record} in the store {} has format {format}, but this version reads {FORMAT}", .folder.display())]
    Format {
        /// Where.
        folder: PathBuf,
        /// Which record.
        record: String,
        /// What it says of itself; 0 if it is empty.
        format: u8,
    },
    /// A record is not what was written.
    #[error("{record} in the store {} is damaged ({why}). {REPLACE}", .folder.display())]
    Damaged {
        /// Where.
        folder: PathBuf,
        /// Which record.
        record: String,
        /// How that shows.
        why: String,
    },
    /// The other nodes have gone on.
    #[error(
        "the control plane has reached feature level {level}, but this program supports {} at most: install the version of \
         the other nodes",
        crate::state::SUPPORTED
    )]
    Level {
        /// Of the state.
        level: u32,
    },
    /// The blocking thread ended early.
    #[error("the store's thread ended before it answered")]
    Thread,
}

impl Store {
    /// Opens (or creates) the store in the folder `state`, and proves that it can be written. The log's files are of
    /// `segment_bytes`.
    pub fn open(state: &Path, segment_bytes: u64) -> Result<Self, StoreError> {
        let folder = state.join("raft");
        let cannot = |source| StoreError::Folder { folder: state.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(cannot)?;
        let earlier = folder.join("log.redb");
        if earlier.exists() {
            return Err(StoreError::Earlier { file: earlier });
        }
        let unwritable = |source| StoreError::Unwritable { folder: state.to_owned(), source: Box::new(source) };
        let lock = lock(&folder)?;
        prove(&folder).map_err(unwritable)?;
        let purged: Option<LogId<u64>> = get(&folder, PURGED)?;
        let first = purged.map_or(0, |purged| purged.index + 1);
        let journal = Journal::open(&folder.join("log"), first, segment_bytes)?;
        Ok(Self(Arc::new(Inner { folder, journal: Mutex::new(journal), _lock: lock })))
    }

    /// Runs `work` where it may block.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(|_| StoreError::Thread)?
    }

    /// The log.
    pub(super) fn journal(&self) -> MutexGuard<'_, Journal> {
        // A panic within leaves it refusing everything: see `Journal::change`.
        self.0.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A single record, decoded; `None` if it was never written.
    pub(super) fn get<T: DeserializeOwned>(&self, record: &'static str) -> Result<Option<T>, StoreError> {
        get(&self.0.folder, record)
    }

    /// Writes a single record.
    pub(super) fn set<T: Serialize>(&self, record: &'static str, value: &T) -> Result<(), StoreError> {
        replace(&self.0.folder, record, &json(value))
    }

    /// Which node this is: its number in the group, and whether it founds it. `None` while it is none.
    pub fn own(&self) -> Result<Option<(u64, bool)>, StoreError> {
        let own: Option<(u64, bool)> = self.get(OWN)?;
        // A founder that ended between its first vote and this record.
        let founder = || Ok(self.get::<openraft::Vote<u64>>(VOTE)?.map(|_| (1, true)));
        own.map_or_else(founder, |own| Ok(Some(own)))
    }

    /// Says which node this is, for ever.
    pub fn set_own(&self, id: u64, founds: bool) -> Result<(), StoreError> {
        self.set(OWN, &(id, founds))
    }

    /// The snapshot: what it is of, and its bytes as [`encode`] wrote them.
    pub(super) fn snapshot<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<u8>)>, StoreError> {
        let Some(mut bytes) = read(&self.0.folder, SNAPSHOT)? else { return Ok(None) };
        let damaged = || damaged(&self.0.folder, SNAPSHOT, "it is too short");
        let (length, _) = bytes.split_first_chunk::<4>().ok_or_else(damaged)?;
        let end = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX).saturating_add(4);
        let meta = parse(&self.0.folder, SNAPSHOT, bytes.get(4..end).ok_or_else(damaged)?)?;
        Ok(Some((meta, bytes.split_off(end))))
    }

    /// Replaces the snapshot.
    pub(super) fn set_snapshot<T: Serialize>(&self, meta: &T, state: &[u8]) -> Result<(), StoreError> {
        let meta = json(meta);
        let mut bytes = Vec::with_capacity(4 + meta.len() + state.len());
        bytes.extend_from_slice(&u32::try_from(meta.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&meta);
        bytes.extend_from_slice(state);
        replace(&self.0.folder, SNAPSHOT, &bytes)
    }

    /// Of a record that must be there.
    pub(super) fn missing(&self, record: &str) -> StoreError {
        damaged(&self.0.folder, record, "it is missing")
    }

    /// Reads what [`encode`] wrote.
    pub(super) fn decode<T: DeserializeOwned>(&self, record: &str, bytes: &[u8]) -> Result<T, StoreError> {
        let folder = &self.0.folder;
        match bytes.split_first() {
            Some((&FORMAT, json)) => parse(folder, record, json),
            other => Err(format(folder, record, other.map_or(0, |(format, _)| *format))),
        }
    }
}

/// An entry, or a state: the format byte, then JSON.
pub(super) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![FORMAT];
    bytes.extend(json(value));
    bytes
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "our types have string keys and no failing serializer")]
    serde_json::to_vec(value).expect("serialize to memory")
}

fn lock(folder: &Path) -> Result<File, StoreError> {
    let path = folder.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { folder: folder.to_owned() }),
        Err(TryLockError::Error(source)) => Err(io("lock", &path)(source)),
    }
}

/// An unwritable or full disk is found before anything is acknowledged.
fn prove(folder: &Path) -> Result<(), StoreError> {
    let count: u64 = get(folder, OPENED)?.unwrap_or(0);
    replace(folder, OPENED, &json(&(count + 1)))
}

fn get<T: DeserializeOwned>(folder: &Path, record: &'static str) -> Result<Option<T>, StoreError> {
    read(folder, record)?.map(|bytes| parse(folder, record, &bytes)).transpose()
}

/// What follows the header of a file, if there is one.
fn read(folder: &Path, record: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
    let path = folder.join(record);
    let mut bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("read", &path)(error)),
    };
    match bytes.split_first_chunk::<HEADER>() {
        Some((&[FORMAT, a, b, c, d], rest)) => {
            if u32::from_le_bytes([a, b, c, d]) != crc32c::crc32c(rest) {
                return Err(damaged(folder, record, "its checksum is wrong"));
            }
        }
        Some((&[other, ..], _)) => return Err(format(folder, record, other)),
        None => return Err(damaged(folder, record, "it is too short")),
    }
    Ok(Some(bytes.split_off(HEADER)))
}

/// The old file, or the new one, whenever this is cut off.
fn replace(folder: &Path, record: &'static str, content: &[u8]) -> Result<(), StoreError> {
    let (path, new) = (folder.join(record), folder.join(format!("{record}.new")));
    let write = || {
        let mut file = File::create(&new)?;
        file.write_all(&[FORMAT])?;
        file.write_all(&crc32c::crc32c(content).to_le_bytes())?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, &path)
    };
    write().map_err(io("write", &path))?;
    Ok(sync_folder(folder)?)
}

fn parse<T: DeserializeOwned>(folder: &Path, record: &str, json: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(json).map_err(|error| damaged(folder, record, &error.to_string()))
}

fn io(what: &'static str, file: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let file = file.to_owned();
    move |source| StoreError::Io { what, file, source }
}

fn damaged(folder: &Path, record: &str, why: &str) -> StoreError {
    StoreError::Damaged { folder: folder.to_owned(), record: record.to_owned(), why: why.to_owned() }
}

fn format(folder: &Path, record: &str, format: u8) -> StoreError {
    StoreError::Format { folder: folder.to_owned(), record: record.to_owned(), format }
}
