//! What was tried at this node and never reached the log: denied and unknown callers, and reads of secrets. One JSON object
//! per line in `<stateDir>/audit/`.
//!
//! In: [`Entry`]s, from any task, without waiting. Out: the files, and [`Journal::latest`]. Holds: the files are bounded in
//! number and size, the oldest go first; entries that find the queue full, and those that are alike in great number, are
//! counted, and the count is written. It is this node's alone: nothing of it is replicated, so that strangers cannot make
//! the control plane write to its log.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use isthmus_model::{ids::Stamp, time::Timestamp};
use isthmus_runtime::tasks::{Tasks, chain};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::sampler::{Sampler, WINDOW};

/// Size at which a file is closed, and how many are kept.
const FILE_BYTES: u64 = 8 << 20;
const FILES: u32 = 8;
/// Entries that wait to be written.
const QUEUE: usize = 1024;
/// Longest line that is read back; ours have under 2 KiB.
const MAX_LINE: usize = 64 << 10;
/// How long a reader waits for what is on its way to the files.
const SETTLE: Duration = Duration::from_secs(2);
/// Longest piece of a caller's own text in an entry, in characters.
const MAX_TEXT: usize = 256;

/// One attempt, or many alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    /// When it was answered, or when the count was written.
    pub(crate) at: Timestamp,
    /// Who asked; empty for a stranger.
    pub(crate) who: String,
    /// IP and port.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) from: String,
    /// A verb, as in replicated events.
    pub(crate) action: String,
    /// What it was about.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) subject: String,
    /// `allowed`, or the code of the refusal.
    pub(crate) outcome: String,
    /// In words, if it was refused.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) reason: String,
    /// How many attempts like this it stands for.
    pub(crate) count: u64,
    /// Where the state stood before.
    pub(crate) before: Stamp,
    /// And after it.
    pub(crate) after: Stamp,
}

/// This node's journal. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Journal {
    dir: Arc<Path>,
    queue: mpsc::Sender<Message>,
    sampler: Arc<Mutex<Sampler>>,
    /// Entries that found the queue full.
    lost: Arc<AtomicU64>,
}

#[derive(Debug)]
enum Message {
    Entry(Box<Entry>),
    /// To be answered when all before it is in the files.
    Settle(oneshot::Sender<()>),
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
#[error("write the audit log in {}", .path.display())]
pub struct JournalError {
    /// The folder or file.
    pub path: PathBuf,
    /// Why.
    source: io::Error,
}

impl Journal {
    /// Opens `<state_dir>/audit`, and writes there until shutdown.
    pub(crate) fn open(state_dir: &Path, tasks: &Tasks) -> Result<Self, JournalError> {
        let dir = state_dir.join("audit");
        let files =
            Files::open(dir.clone(), FILE_BYTES).map_err(|source| JournalError { path: dir.clone(), source })?;
        let (queue, messages) = mpsc::channel(QUEUE);
        let journal = Self { dir: dir.into(), queue, sampler: Arc::default(), lost: Arc::default() };
        let (writer, shutdown) = (journal.clone(), tasks.shutdown());
        tasks.spawn("audit-journal", async move { writer.write(messages, files, shutdown).await });
        Ok(journal)
    }

    /// Writes it down, whatever else comes.
    pub(crate) fn record(&self, entry: Entry) {
        match self.queue.try_send(Message::Entry(Box::new(entry.bounded()))) {
            Ok(()) => {}
            // The process ends, and its log is what is left to write to.
            Err(mpsc::error::TrySendError::Closed(entry)) => tracing::warn!(?entry, "attempt during the shutdown"),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes it down, or only counts it if there were many like it. `outcome` and `who` say what is alike.
    pub(crate) fn sample(&self, outcome: &'static str, entry: Entry) {
        let who = if entry.who.is_empty() { "(strangers)".to_owned() } else { entry.who.clone() };
        let takes = self.sampler().takes((outcome, who), entry.at);
        if takes {
            self.record(entry);
        }
    }

    /// The entries that `wanted` accepts, latest first, at most `limit`. What was recorded before is among them.
    pub(crate) async fn latest(
        &self,
        limit: usize,
        wanted: impl Fn(&Entry) -> bool + Send + 'static,
    ) -> io::Result<Vec<Entry>> {
        let (settled, wait) = oneshot::channel();
        // A disk that takes longer than this shows what is there.
        let settle = async { self.queue.send(Message::Settle(settled)).await.is_ok() && wait.await.is_ok() };
        if !timeout(SETTLE, settle).await.unwrap_or(false) {
            tracing::warn!("the audit log's latest entries are not written yet");
        }
        let dir = self.dir.clone();
        let read = tokio::task::spawn_blocking(move || latest(&dir, limit, wanted));
        read.await.map_err(io::Error::other)?
    }

    fn sampler(&self) -> std::sync::MutexGuard<'_, Sampler> {
        self.sampler.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn write(
        self,
        mut messages: mpsc::Receiver<Message>,
        files: Files,
        shutdown: isthmus_runtime::tasks::Shutdown,
    ) {
        let files = Arc::new(Mutex::new(files));
        let mut tick = tokio::time::interval(WINDOW / 12);
        let mut received = Vec::new();
        loop {
            let stops = tokio::select! {
                count = messages.recv_many(&mut received, QUEUE) => count == 0,
                _ = tick.tick() => false,
                () = shutdown.requested() => true,
            };
            if stops {
                while let Ok(message) = messages.try_recv() {
                    received.push(message);
                }
            }
            let (mut gathered, mut settled) = (Vec::new(), Vec::new());
            for message in received.drain(..) {
                match message {
                    Message::Entry(entry) => gathered.push(*entry),
                    Message::Settle(wait) => settled.push(wait),
                }
            }
            gathered.extend(self.counts(stops));
            if !gathered.is_empty() {
                let (batch, files) = (gathered, files.clone());
                let written = tokio::task::spawn_blocking(move || {
                    files.lock().unwrap_or_else(PoisonError::into_inner).append(&batch)
                });
                if let Ok(Err(error)) = written.await {
                    tracing::error!(error = %chain(&error), dir = %self.dir.display(), "cannot write the audit log");
                }
            }
            for wait in settled {
                // Whoever does not wait any more has given up.
                let _ = wait.send(());
            }
            if stops {
                return;
            }
        }
    }

    /// What was only counted, when its span is over.
    fn counts(&self, now_in_any_case: bool) -> Vec<Entry> {
        let now = Timestamp(isthmus_runtime::now());
        let mut sampler = self.sampler();
        let mut counts = Vec::new();
        if now_in_any_case || sampler.is_due(now) {
            counts.extend(sampler.drain().map(|((outcome, who), count)| Entry::summary(now, who, outcome, count)));
        }
        drop(sampler);
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            counts.push(Entry::summary(now, String::new(), "not_written", lost));
        }
        counts
    }
}

impl Entry {
    fn summary(at: Timestamp, who: String, outcome: &str, count: u64) -> Self {
        Self {
            at,
            who,
            from: String::new(),
            action: "attempts".to_owned(),
            subject: String::new(),
            outcome: outcome.to_owned(),
            reason: "more attempts like those that are written one by one".to_owned(),
            count,
            before: Stamp::default(),
            after: Stamp::default(),
        }
    }

    /// Nobody can fill the files with one request.
    fn bounded(mut self) -> Self {
        for text in [&mut self.who, &mut self.subject, &mut self.reason] {
            if text.len() > MAX_TEXT {
                *text = text.chars().take(MAX_TEXT).collect();
            }
        }
        self
    }
}

/// The files: number 0 is written, the others are older by their number.
#[derive(Debug)]
struct Files {
    dir: PathBuf,
    most_bytes: u64,
    current: File,
    bytes: u64,
}

impl Files {
    fn open(dir: PathBuf, most_bytes: u64) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        let current = append_to(&path(&dir, 0))?;
        let bytes = current.metadata()?.len();
        let mut files = Self { dir, most_bytes, current, bytes };
        // After a crash the last line may be cut; what follows is not to be part of it.
        if bytes > 0 {
            files.put(b"\n")?;
        }
        Ok(files)
    }

    fn append(&mut self, entries: &[Entry]) -> io::Result<()> {
        for entry in entries {
            let mut line = serde_json::to_vec(entry)?;
            line.push(b'\n');
            if self.bytes > 0 && self.bytes + line.len() as u64 > self.most_bytes {
                self.rotate()?;
            }
            self.put(&line)?;
        }
        self.current.sync_data()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.current.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.current.sync_data()?;
        for number in (1..FILES).rev() {
            match fs::rename(path(&self.dir, number - 1), path(&self.dir, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.current = append_to(&path(&self.dir, 0))?;
        self.bytes = 0;
        Ok(())
    }
}

fn latest(dir: &Path, limit: usize, wanted: impl Fn(&Entry) -> bool) -> io::Result<Vec<Entry>> {
    let mut found = Vec::new();
    for number in 0..FILES {
        let file = match File::open(path(dir, number)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        };
        let mut entries = std::collections::VecDeque::new();
        for line in BufReader::new(file).split(b'\n') {
            let line = line?;
            // A line that a crash has cut is no entry.
            let entry = (line.len() <= MAX_LINE).then(|| serde_json::from_slice::<Entry>(&line).ok()).flatten();
            if let Some(entry) = entry.filter(&wanted) {
                if entries.len() == limit - found.len().min(limit) {
                    entries.pop_front();
                }
                entries.push_back(entry);
            }
        }
        found.extend(entries.into_iter().rev());
        if found.len() >= limit {
            break;
        }
    }
    found.truncate(limit);
    Ok(found)
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(if number == 0 { "audit.jsonl".to_owned() } else { format!("audit-{number}.jsonl") })
}

#[cfg(test)]
mod tests;
