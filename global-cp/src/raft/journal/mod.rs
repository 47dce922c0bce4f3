//! The log on disk: entries by index, in files of a bounded size that are only ever appended to.
//!
//! In: entries as bytes, in order. Out: the same, after any crash: an append returns when its entries are flushed, and what
//! was not flushed may be gone, whole entries from some index on. What holds: indexes are contiguous; a bit that flipped is
//! an error that names the file and the place, and nothing is served past it. After a write that failed nothing more is
//! accepted, since nobody knows what of it is on the disk.
//!
//! All calls block.

mod record;
mod segment;
pub(super) use self::segment::sync_folder;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use self::{
    record::TooLong,
    segment::{Place, Segment},
};

/// What to do with a node whose state folder is damaged. To put back an older copy of it would be worse: it may contradict
/// what the node has said since.
pub(super) const REPLACE: &str = "Remove this node and add it anew with an empty state folder: isthmusctl cp remove, isthmusctl cp add. If it \
     is the only one, start a new control plane and restore its latest backup: isthmusctl restore";

/// The log of one node.
#[derive(Debug)]
pub(super) struct Journal {
    folder: PathBuf,
    /// Where a segment ends, unless a single append is longer.
    segment_bytes: u64,
    /// Oldest first, never empty; only the last one is written.
    segments: VecDeque<Arc<Segment>>,
    /// Of the entry at `first`, and of each one after it.
    places: VecDeque<Place>,
    first: u64,
    /// What lies before is purged, though its segment may be there yet.
    start: u64,
    broken: bool,
}

/// What went wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The system refused.
    #[error("{what} {}; free space on the disk, or make the folder writable", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something that was flushed is not what was written.
    #[error(
        "{} is damaged at byte {at}{}: the disk did not keep what was flushed. {REPLACE}",
        .file.display(), .index.map(|i| format!(" (entry {i})")).unwrap_or_default()
    )]
    Damaged {
        /// Where.
        file: PathBuf,
        /// The offset.
        at: u64,
        /// The entry, if it is known.
        index: Option<u64>,
    },
    /// A segment that should be there is not.
    #[error("entries {} to {} are missing in {}. {REPLACE}", .missing.start, .missing.end - 1, .folder.display())]
    Missing {
        /// Where.
        folder: PathBuf,
        /// Which.
        missing: Range<u64>,
    },
    /// Of a later version.
    #[error("{} has format {format}, but this version reads 1: it was written by a later version", .file.display())]
    Format {
        /// Where.
        file: PathBuf,
        /// What it says.
        format: u32,
    },
    /// An entry that does not follow the last one.
    #[error("entry {index} does not follow entry {last}")]
    Gap {
        /// The last one.
        last: u64,
        /// The one to be written.
        index: u64,
    },
    /// A write has failed before.
    #[error("a write to {} failed before; restart the node when its disk is well", .folder.display())]
    Broken {
        /// Where.
        folder: PathBuf,
    },
    /// Too much at once.
    #[error(transparent)]
    TooLong(#[from] TooLongWrite),
}

/// See [`record::TooLong`].
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the entries of one write are longer than 4 GiB")]
pub struct TooLongWrite;

impl From<TooLong> for JournalError {
    fn from(_: TooLong) -> Self {
        Self::TooLong(TooLongWrite)
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { what, path, source }
}

impl Journal {
    /// Opens the log in `folder`, of which what lies before `start` is purged, or makes one whose first entry will be that; a
    /// torn end is cut off.
    pub(super) fn open(folder: &Path, start: u64, segment_bytes: u64) -> Result<Self, JournalError> {
        fs::create_dir_all(folder).map_err(io_error("create", folder))?;
        let mut firsts = segment::list(folder)?;
        firsts.sort_unstable();
        let mut journal = Self {
            folder: folder.to_owned(),
            segment_bytes,
            segments: VecDeque::new(),
            places: VecDeque::new(),
            first: firsts.first().copied().unwrap_or(start),
            start,
            broken: false,
        };
        for (nth, from) in firsts.iter().enumerate() {
            let next = journal.next();
            if *from != next {
                return Err(JournalError::Missing { folder: folder.to_owned(), missing: next..*from });
            }
            let last = nth + 1 == firsts.len();
            let (segment, places) = Segment::open(folder, *from, last, segment_bytes)?;
            journal.segments.push_back(segment);
            journal.places.extend(places);
        }
        if journal.segments.is_empty() {
            journal.roll(start, 0)?;
        }
        if journal.next() < start {
            // It ended while it began anew.
            journal.begin_anew(start)?;
        }
        journal.start = start.max(journal.first);
        Ok(journal)
    }

    /// The index that the next entry has.
    pub(super) fn next(&self) -> u64 {
        self.first + self.places.len() as u64
    }

    /// The indexes of all entries.
    #[cfg(test)]
    pub(super) fn range(&self) -> Range<u64> {
        self.start..self.next()
    }

    /// Adds `entries`, which follow the last one. They are on disk when this returns.
    pub(super) fn append(&mut self, entries: &[(u64, Vec<u8>)]) -> Result<(), JournalError> {
        let Some((first, _)) = entries.first() else { return Ok(()) };
        let mut write = Vec::with_capacity(entries.iter().map(|(_, bytes)| bytes.len() + record::RECORD_HEADER).sum());
        let mut ends = Vec::with_capacity(entries.len());
        for (next, (index, bytes)) in (self.next()..).zip(entries) {
            if *index != next {
                return Err(JournalError::Gap { last: next.saturating_sub(1), index: *index });
            }
            record::encode(*index, bytes, &mut write)?;
            ends.push(write.len() as u64);
        }
        self.change(|journal| {
            let length = write.len() as u64;
            let mut active = journal.active()?;
            if !active.has_room(length) && !active.is_empty() {
                journal.roll(*first, length)?;
                active = journal.active()?;
            }
            let at = active.append(&write)?;
            for ((_, bytes), end) in entries.iter().zip(ends) {
                journal.places.push_back(Place::new(&active, at + end - bytes.len() as u64, bytes.len()));
            }
            Ok(())
        })
    }

    /// The entries in `range`, as far as there are any.
    pub(super) fn read(&self, range: Range<u64>) -> Result<Vec<Vec<u8>>, JournalError> {
        self.places(range).iter().map(|(index, place)| place.read(*index)).collect()
    }

    /// Where the entries in `range` stand, so that they are read without this.
    pub(super) fn places(&self, range: Range<u64>) -> Vec<(u64, Place)> {
        let from = range.start.max(self.start);
        let to = range.end.min(self.next());
        (from..to).filter_map(|index| Some((index, self.place(index)?.clone()))).collect()
    }

    /// Takes the entries from `since` on away.
    pub(super) fn truncate(&mut self, since: u64) -> Result<(), JournalError> {
        if since >= self.next() {
            return Ok(());
        }
        let since = since.max(self.start);
        self.change(|journal| {
            // From the end, so that what a crash leaves is a log without a gap.
            while let Some(last) = journal.segments.back().filter(|segment| segment.first > since).cloned() {
                last.remove(&journal.folder)?;
                journal.segments.pop_back();
            }
            let kept = usize::try_from(since - journal.first).unwrap_or(usize::MAX);
            if let Some(place) = journal.places.get(kept) {
                place.cut()?;
            }
            journal.places.truncate(kept);
            Ok(())
        })
    }

    /// Entries up to and with `upto` are not needed any more: whole segments of such go.
    pub(super) fn purge(&mut self, upto: u64) -> Result<(), JournalError> {
        if upto >= self.next() {
            return self.change(|journal| journal.begin_anew(upto + 1));
        }
        self.change(|journal| {
            journal.start = journal.start.max(upto + 1);
            while let [first, second, ..] = journal.segments.make_contiguous() {
                if second.first > upto + 1 {
                    break;
                }
                let (gone, next) = (first.clone(), second.first);
                gone.remove(&journal.folder)?;
                journal.segments.pop_front();
                let entries = usize::try_from(next - journal.first).unwrap_or(usize::MAX);
                journal.places.drain(..entries.min(journal.places.len()));
                journal.first = next;
            }
            Ok(())
        })
    }

    /// Without any entry; the next one has the index `first`.
    fn begin_anew(&mut self, first: u64) -> Result<(), JournalError> {
        // From the end, as in `truncate`; the new segment only when no old one is left that it would not follow.
        while let Some(last) = self.segments.pop_back() {
            last.remove(&self.folder)?;
        }
        self.places.clear();
        (self.first, self.start) = (first, first);
        self.roll(first, 0)
    }

    fn active(&self) -> Result<Arc<Segment>, JournalError> {
        self.segments.back().cloned().ok_or_else(|| JournalError::Broken { folder: self.folder.clone() })
    }

    fn roll(&mut self, first: u64, at_least: u64) -> Result<(), JournalError> {
        let segment =
            Segment::create(&self.folder, first, self.segment_bytes.max(at_least + record::FILE_HEADER as u64))?;
        self.segments.push_back(Arc::new(segment));
        Ok(())
    }

    fn place(&self, index: u64) -> Option<&Place> {
        self.places.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    /// Refuses everything once something has failed.
    fn change(&mut self, work: impl FnOnce(&mut Self) -> Result<(), JournalError>) -> Result<(), JournalError> {
        if std::mem::replace(&mut self.broken, true) {
            return Err(JournalError::Broken { folder: self.folder.clone() });
        }
        work(self)?;
        self.broken = false;
        Ok(())
    }
}
