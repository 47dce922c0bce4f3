//! One file of the log: made whole, appended to, cut, removed; each step is on disk when it returns.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::fs::{FallocateFlags, fallocate};

use super::{
    JournalError, io_error,
    record::{FILE_HEADER, FileHeader, Found, file_header, find, read_file_header},
};

const SUFFIX: &str = ".log";
/// A segment that is being made.
const UNFINISHED: &str = ".new";

/// A segment file.
#[derive(Debug)]
pub(super) struct Segment {
    /// The index of its first entry.
    pub(super) first: u64,
    path: PathBuf,
    file: File,
    /// Where the next record goes.
    end: AtomicU64,
    size: AtomicU64,
}

/// Where an entry stands.
#[derive(Clone, Debug)]
pub(in crate::raft) struct Place {
    segment: Arc<Segment>,
    offset: u64,
    length: usize,
}

/// The first indexes of all segments in `folder`. What was being made when a process ended is removed.
pub(super) fn list(folder: &Path) -> Result<Vec<u64>, JournalError> {
    let mut firsts = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error("read", folder))? {
        let name = entry.map_err(io_error("read", folder))?.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.ends_with(UNFINISHED) {
            let path = folder.join(name);
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        firsts.extend(name.strip_suffix(SUFFIX).and_then(|first| first.parse::<u64>().ok()));
    }
    Ok(firsts)
}

fn path_of(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("{first:020}{SUFFIX}"))
}

/// Makes what was created, renamed or removed in `folder` survive a crash.
pub(in crate::raft) fn sync_folder(folder: &Path) -> Result<(), JournalError> {
    let sync = || File::open(folder)?.sync_all();
    sync().map_err(io_error("flush", folder))
}

impl Segment {
    /// A new one of `size` bytes, which are taken from the disk at once: a full disk is found here, and a flush later need
    /// not write where the file ends.
    pub(super) fn create(folder: &Path, first: u64, size: u64) -> Result<Self, JournalError> {
        let path = path_of(folder, first);
        let unfinished = path.with_extension("new");
        let make = || {
            let file = File::options().read(true).write(true).create(true).truncate(true).open(&unfinished)?;
            reserve(&file, size)?;
            file.write_all_at(&file_header(first), 0)?;
            file.sync_all()?;
            fs::rename(&unfinished, &path)?;
            Ok(file)
        };
        let file = make().map_err(io_error("create", &path))?;
        sync_folder(folder)?;
        Ok(Self { first, path, file, end: AtomicU64::new(FILE_HEADER as u64), size: AtomicU64::new(size) })
    }

    /// An existing one, with the places of its entries. Only the `last` one may be torn; its torn end is cut off.
    pub(super) fn open(
        folder: &Path,
        first: u64,
        last: bool,
        size: u64,
    ) -> Result<(Arc<Self>, Vec<Place>), JournalError> {
        let path = path_of(folder, first);
        let file = File::options().read(true).write(true).open(&path).map_err(io_error("open", &path))?;
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        let damaged = |at: usize, index| JournalError::Damaged { file: path.clone(), at: at as u64, index };
        match read_file_header(&bytes) {
            FileHeader::First(said) if said == first => {}
            FileHeader::Format(format) => return Err(JournalError::Format { file: path, format }),
            FileHeader::First(_) | FileHeader::Damaged => return Err(damaged(0, None)),
        }
        let mut at = FILE_HEADER;
        let mut spans = Vec::new();
        let torn = loop {
            let next = first + spans.len() as u64;
            match find(&bytes, at) {
                Found::Record { index, payload, end } if index == next => {
                    spans.push((payload, end - payload));
                    at = end;
                }
                Found::End => break false,
                Found::Torn if last => break true,
                Found::Record { .. } | Found::Torn | Found::Damaged => return Err(damaged(at, Some(next))),
            }
        };
        let end = at as u64;
        let length = bytes.len() as u64;
        let segment = Self { first, path, file, end: AtomicU64::new(end), size: AtomicU64::new(length) };
        if torn {
            tracing::warn!(
                file = %segment.path.display(), at, entries = spans.len(),
                "the end of the log was being written when this node stopped; what was not acknowledged is cut off"
            );
        }
        if last && (torn || length < size) {
            segment.cut(end, size)?;
        }
        let segment = Arc::new(segment);
        let places = spans
            .into_iter()
            .map(|(payload, length)| Place { segment: segment.clone(), offset: payload as u64, length })
            .collect();
        Ok((segment, places))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.end.load(Ordering::Relaxed) == FILE_HEADER as u64
    }

    pub(super) fn has_room(&self, length: u64) -> bool {
        self.end.load(Ordering::Relaxed) + length <= self.size.load(Ordering::Relaxed)
    }

    /// Adds `write`, flushed, and tells where it begins.
    pub(super) fn append(&self, write: &[u8]) -> Result<u64, JournalError> {
        let at = self.end.load(Ordering::Relaxed);
        let append = || {
            self.file.write_all_at(write, at)?;
            self.file.sync_data()
        };
        append().map_err(io_error("write", &self.path))?;
        self.end.store(at + write.len() as u64, Ordering::Relaxed);
        Ok(at)
    }

    /// Nothing stands from `end` on; it has room for `size` bytes again.
    fn cut(&self, end: u64, size: u64) -> Result<(), JournalError> {
        let size = size.max(end);
        let cut = || {
            self.file.set_len(end)?;
            reserve(&self.file, size)?;
            self.file.sync_all()
        };
        cut().map_err(io_error("write", &self.path))?;
        self.end.store(end, Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Removes the file. Whoever still reads from it can.
    pub(super) fn remove(&self, folder: &Path) -> Result<(), JournalError> {
        fs::remove_file(&self.path).map_err(io_error("remove", &self.path))?;
        sync_folder(folder)
    }
}

/// Takes the room from the disk; its bytes read as zeros.
fn reserve(file: &File, size: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, size) {
        // Not every file system can.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(size),
        done => Ok(done?),
    }
}

impl Place {
    pub(super) fn new(segment: &Arc<Segment>, offset: u64, length: usize) -> Self {
        Self { segment: segment.clone(), offset, length }
    }

    /// The entry at `index`.
    pub(in crate::raft) fn read(&self, index: u64) -> Result<Vec<u8>, JournalError> {
        let segment = &self.segment;
        let header = super::record::RECORD_HEADER;
        let mut bytes = vec![0; header + self.length];
        let at = self.offset - header as u64;
        segment.file.read_exact_at(&mut bytes, at).map_err(io_error("read", &segment.path))?;
        match find(&bytes, 0) {
            Found::Record { index: said, .. } if said == index => Ok(bytes.split_off(header)),
            _ => Err(JournalError::Damaged { file: segment.path.clone(), at, index: Some(index) }),
        }
    }

    /// This entry and what follows it in its segment is gone.
    pub(super) fn cut(&self) -> Result<(), JournalError> {
        let size = self.segment.size.load(Ordering::Relaxed);
        self.segment.cut(self.offset - super::record::RECORD_HEADER as u64, size)
    }
}
