//! A folder of manifests, read so that only a deletion deletes.
//!
//! In: the folder, as it is at each [`Folder::scan`]. Out: the objects of every file, and problems with file and line.
//! What holds: a file that does not parse, or cannot be read, keeps what it last held; a folder that cannot be listed, or
//! was replaced by an empty one (an unmounted volume), keeps everything; a file that is gone from a listable folder is
//! gone. It never watches: `super` decides when to scan. Blocking file access; use it off the async threads.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use isthmus_api::{
    convert::Problem,
    manifest::{self, MAX_FILE_BYTES, Object, ObjectRef},
};
use serde::{Deserialize, Serialize};

use crate::status::problem;

/// Files in the folder.
const MAX_FILES: usize = 10_000;
/// A file changed more recently than this is read again at the next scan even if it looks unchanged: timestamps are
/// coarser than writes.
const SETTLED: Duration = Duration::from_secs(2);

/// All objects of the cluster, file by file.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    /// By file name.
    pub files: BTreeMap<String, Arc<[Object]>>,
    /// What to mend.
    pub problems: Vec<Problem>,
    /// The folder has been listed and read at least once since the start, so what is missing here is missing there.
    pub synced: bool,
}

impl Manifests {
    /// There is something to serve from: the folder as it is, or as it was saved. Not always enough to publish from.
    pub fn are_known(&self) -> bool {
        self.synced || !self.files.is_empty()
    }
}

/// The last good text of every file, to start from when the folder is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Saved {
    /// By file name.
    pub files: BTreeMap<String, String>,
    /// Device and inode of the folder that they came from.
    pub folder: Option<(u64, u64)>,
}

/// The folder and what is known of it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Device and inode at the last scan that was believed.
    id: Option<(u64, u64)>,
    files: BTreeMap<String, File>,
    /// Why the last scan was not believed.
    trouble: Option<Problem>,
    synced: bool,
}

#[derive(Debug, Default)]
struct File {
    seen: Option<Seen>,
    /// The latest text, good or not.
    text: Option<String>,
    /// The latest text without any error.
    good_text: Option<String>,
    objects: Arc<[Object]>,
    problems: Vec<Problem>,
}

/// What a file looked like when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    inode: u64,
    size: u64,
    modified: Option<SystemTime>,
    settled: bool,
}

impl Folder {
    /// The folder at `path`, starting from what was saved before.
    pub fn new(path: PathBuf, saved: Saved) -> Self {
        let restore = |(name, text): (String, String)| {
            let mut file = File::default();
            file.take(&name, text);
            file.problems.clear();
            (name, file)
        };
        let files = saved.files.into_iter().map(restore).collect();
        Self { path, id: saved.folder, files, trouble: None, synced: false }
    }

    /// Looks at the folder once. Returns whether objects, problems or the sync state changed.
    pub fn scan(&mut self, now: SystemTime) -> bool {
        let (trouble, changed) = match self.list() {
            Ok((id, names)) => {
                let changed = self.read_all(names, now);
                self.id = Some(id);
                (None, !std::mem::replace(&mut self.synced, true) || changed)
            }
            Err(message) => (Some(problem(self.path.display().to_string(), message)), false),
        };
        let changed = changed || self.trouble != trouble;
        self.trouble = trouble;
        changed
    }

    /// Everything known now.
    pub fn manifests(&self) -> Manifests {
        let of_files = self.files.values().flat_map(|f| f.problems.iter().cloned());
        Manifests {
            files: self.files.iter().map(|(name, f)| (name.clone(), f.objects.clone())).collect(),
            problems: self.trouble.iter().cloned().chain(of_files).collect(),
            synced: self.synced,
        }
    }

    /// What to start from next time.
    pub fn saved(&self) -> Saved {
        let text = |(name, file): (&String, &File)| Some((name.clone(), file.good_text.clone()?));
        Saved { files: self.files.iter().filter_map(text).collect(), folder: self.id }
    }

    /// Device and inode of the folder as last believed; a watcher of another one is stale.
    pub fn id(&self) -> Option<(u64, u64)> {
        self.id
    }

    /// The names of the manifest files, or why the folder is not to be believed.
    fn list(&self) -> Result<((u64, u64), Vec<String>), String> {
        let kept = match self.files.len() {
            0 => String::new(),
            n => format!("; the objects of its {n} files stay as they were"),
        };
        let fail = |what: &str, e: io::Error| {
            format!("{what}: {e}{kept}; mend the folder or `manifests` in the configuration")
        };
        let meta = fs::metadata(&self.path).map_err(|e| fail("the manifests folder cannot be read", e))?;
        let id = (meta.dev(), meta.ino());
        let entries = fs::read_dir(&self.path).map_err(|e| fail("the manifests folder cannot be listed", e))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| fail("the manifests folder cannot be listed", e))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if is_manifest(&name) {
                names.push(name);
            }
            if names.len() > MAX_FILES {
                return Err(format!(
                    "the manifests folder has more than {MAX_FILES} files{kept}; put several objects into one file"
                ));
            }
        }
        if names.is_empty() && !self.files.is_empty() && self.id.is_some_and(|known| known != id) {
            return Err(format!(
                "the manifests folder is empty and is another folder than the one read before (is a volume not \
                 mounted?){kept}; if it is meant to be empty, put any one manifest into it, for example a Namespace"
            ));
        }
        Ok((id, names))
    }

    fn read_all(&mut self, mut names: Vec<String>, now: SystemTime) -> bool {
        names.sort();
        let before = self.files.len();
        self.files.retain(|name, _| names.binary_search(name).is_ok());
        let mut changed = self.files.len() != before;
        for name in names {
            changed |= self.read(&name, now);
        }
        changed
    }

    /// Reads one file if it may have changed. Returns whether its objects or problems changed.
    fn read(&mut self, name: &str, now: SystemTime) -> bool {
        let path = self.path.join(name);
        let known = self.files.get(name).and_then(|f| f.seen);
        let outcome = match look(&path, now) {
            Ok(seen) if known.is_some_and(|k| k.settled && k == seen) => return false,
            Ok(seen) => read_stable(&path, seen, now),
            // Removed since the listing: the next scan will see that it is gone.
            Err(e) if e.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(&path).is_err() => return false,
            Err(e) => Err(e.to_string()),
        };
        let file = self.files.entry(name.to_owned()).or_default();
        match outcome {
            Ok(Some((seen, text))) => {
                file.seen = Some(seen);
                file.text.as_ref() != Some(&text) && file.take(name, text)
            }
            // Being written: the next scan finds it whole.
            Ok(None) => false,
            Err(message) => {
                // Its text must be taken again, even unchanged, once it can be read: that clears the problem.
                file.seen = None;
                file.text = None;
                let message = format!("cannot be read: {message}; what it held before stays");
                file.trouble(vec![problem(name, message)])
            }
        }
    }
}

impl File {
    /// Takes a new text. Returns whether objects or problems changed.
    fn take(&mut self, name: &str, text: String) -> bool {
        if text.trim().is_empty() && !self.objects.is_empty() {
            self.text = Some(text);
            let message =
                "is empty; what it held before stays (is it being written?); delete the file to delete its objects";
            return self.trouble(vec![problem(name, message)]);
        }
        let mut objects = Vec::new();
        let mut problems = Vec::new();
        let mut broken = BTreeSet::new();
        let mut any_broken = false;
        for outcome in manifest::parse(name, &text) {
            match outcome {
                Ok(object) => objects.push(object),
                Err(e) => {
                    // Which object a document was that cannot be read at all is not known: it may be any.
                    match &e.object {
                        Some(object) => drop(broken.insert((**object).clone())),
                        None => any_broken = true,
                    }
                    problems.push(Problem { at: e.at(), field: e.field, message: e.message });
                }
            }
        }
        if problems.is_empty() {
            self.good_text = Some(text.clone());
        } else {
            // What is broken stays in its last good form.
            let there: BTreeSet<_> = objects.iter().map(Object::reference).collect();
            let keep = |reference: &ObjectRef| !there.contains(reference) && (any_broken || broken.contains(reference));
            objects.extend(self.objects.iter().filter(|old| keep(&old.reference())).cloned());
        }
        self.text = Some(text);
        self.objects = objects.into();
        self.problems = problems;
        true
    }

    fn trouble(&mut self, problems: Vec<Problem>) -> bool {
        let changed = self.problems != problems;
        self.problems = problems;
        changed
    }
}

/// Hidden files are not manifests: editors and Kubernetes volumes (`..data`) keep their own things there.
fn is_manifest(name: &str) -> bool {
    !name.starts_with('.') && [".yaml", ".yml", ".json"].iter().any(|end| name.ends_with(end))
}

fn look(path: &Path, now: SystemTime) -> io::Result<Seen> {
    let meta = fs::metadata(path)?;
    let modified = meta.modified().ok();
    let age = modified.and_then(|m| now.duration_since(m).ok());
    Ok(Seen { inode: meta.ino(), size: meta.len(), modified, settled: age.is_some_and(|a| a > SETTLED) })
}

/// Reads a file; `None` if it changed meanwhile.
fn read_stable(path: &Path, before: Seen, now: SystemTime) -> Result<Option<(Seen, String)>, String> {
    if !fs::metadata(path).map_err(|e| e.to_string())?.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|e| e.to_string())?;
    file.take(MAX_FILE_BYTES as u64 + 1).read_to_string(&mut text).map_err(|e| e.to_string())?;
    if text.len() > MAX_FILE_BYTES {
        return Err(format!("it is larger than {MAX_FILE_BYTES} bytes; split it"));
    }
    let after = look(path, now).map_err(|e| e.to_string())?;
    let unchanged = (before.inode, before.size, before.modified) == (after.inode, after.size, after.modified);
    Ok(unchanged.then_some((after, text)))
}

#[cfg(test)]
mod tests;
