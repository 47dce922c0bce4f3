//! The cluster's objects from a folder of manifests, watched.
//!
//! In: the folder (see [`folder`] for what is believed and what is not). Out: [`Manifests`] in a `watch`, and the last
//! good texts on disk, from which a restart begins. Changes are seen by inotify, and by a scan each second where inotify
//! is silent (network file systems, a folder that appears later).

pub mod folder;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use isthmus_runtime::{files::LastKnownGood, tasks::Shutdown};
use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};

use self::folder::{Folder, Manifests, Saved};
use crate::status::{Area, StatusBoard, problem};

/// Scans where inotify says nothing.
const RESCAN: Duration = Duration::from_secs(1);
/// A burst of events is taken together once this much time passed without one…
const QUIET: Duration = Duration::from_millis(20);
/// …or at the latest after this much.
const PATIENCE: Duration = Duration::from_millis(200);

/// Watches the folder. Construct, then [`Source::run`].
pub struct Source {
    folder: Folder,
    path: PathBuf,
    saved: Saved,
    disk: Arc<LastKnownGood>,
    out: watch::Sender<Arc<Manifests>>,
    status: StatusBoard,
    reported: Vec<isthmus_api::convert::Problem>,
}

impl Source {
    /// Starts from what `disk` holds, if anything; the first value of the receiver is that, not synced.
    pub fn open(path: PathBuf, disk: LastKnownGood, status: StatusBoard) -> (Self, watch::Receiver<Arc<Manifests>>) {
        let saved = match disk.load() {
            Ok(Some(bytes)) => serde_json::from_slice(&bytes).unwrap_or_else(|e| {
                tracing::warn!(error = %e, "the saved manifests are of another version and are not used");
                Saved::default()
            }),
            Ok(None) => Saved::default(),
            Err(e) => {
                tracing::warn!(
                    error = &e as &dyn std::error::Error,
                    "the saved manifests are damaged and are not used"
                );
                Saved::default()
            }
        };
        let folder = Folder::new(path.clone(), saved.clone());
        let (out, receiver) = watch::channel(Arc::new(folder.manifests()));
        (Self { folder, path, saved, disk: Arc::new(disk), out, status, reported: Vec::new() }, receiver)
    }

    /// Scans on events and on a timer until shutdown.
    pub async fn run(mut self, shutdown: Shutdown) {
        let woken = Arc::new(Notify::new());
        let mut watcher: Option<(RecommendedWatcher, Option<(u64, u64)>)> = None;
        loop {
            let Some(next) = self.scan().await else { return };
            self = next;
            let id = self.folder.id();
            if watcher.as_ref().is_none_or(|(_, watched)| *watched != id) {
                watcher = watch_folder(&self.path, &woken).map(|w| (w, id));
                if watcher.is_some() {
                    // What happened before the watcher was there is seen by one more scan.
                    woken.notify_one();
                }
            }
            tokio::select! {
                () = shutdown.requested() => return,
                () = woken.notified() => settle(&woken).await,
                () = sleep(RESCAN) => {}
            }
        }
    }

    /// One scan on a blocking thread. `None` if the runtime is going down.
    async fn scan(mut self) -> Option<Self> {
        let scanned = tokio::task::spawn_blocking(move || {
            let changed = self.folder.scan(SystemTime::now());
            let stored = if changed { self.store() } else { None };
            (self, changed, stored)
        });
        let (mut source, changed, stored) = scanned.await.ok()?;
        if changed {
            source.report();
        }
        if let Some(outcome) = stored {
            let problems =
                outcome.err().map(|e| problem("state folder", format!("the manifests cannot be saved: {e}")));
            source.status.set_problems(Area::ManifestStore, problems.into_iter().collect());
        }
        Some(source)
    }

    fn store(&mut self) -> Option<Result<(), String>> {
        let saved = self.folder.saved();
        if saved == self.saved {
            return None;
        }
        let outcome = serde_json::to_vec(&saved)
            .map_err(|e| e.to_string())
            .and_then(|bytes| self.disk.save(&bytes).map_err(|e| e.to_string()));
        if outcome.is_ok() {
            self.saved = saved;
        }
        Some(outcome)
    }

    fn report(&mut self) {
        let manifests = self.folder.manifests();
        for p in manifests.problems.iter().filter(|p| !self.reported.contains(p)) {
            tracing::warn!(at = %p.at, field = %p.field, "manifest: {}", p.message);
        }
        self.reported.clone_from(&manifests.problems);
        self.status.set_problems(Area::Manifests, manifests.problems.clone());
        self.out.send_replace(Arc::new(manifests));
    }
}

fn watch_folder(path: &std::path::Path, woken: &Arc<Notify>) -> Option<RecommendedWatcher> {
    let wake = woken.clone();
    let on_event = move |event: notify::Result<notify::Event>| {
        // Our own reading opens files: that is no change.
        let read = |kind| matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write));
        if !event.is_ok_and(|e| read(e.kind)) {
            wake.notify_one();
        }
    };
    let mut watcher = notify::recommended_watcher(on_event)
        .inspect_err(|e| tracing::warn!(error = %e, "no file watcher; the folder is scanned each second"))
        .ok()?;
    // A folder that is not there is reported by the scan, and watched when it appears.
    watcher.watch(path, RecursiveMode::NonRecursive).ok()?;
    Some(watcher)
}

/// Waits for the end of a burst of events.
async fn settle(woken: &Notify) {
    let quiet = async { while timeout(QUIET, woken.notified()).await.is_ok() {} };
    let _ = timeout(PATIENCE, quiet).await;
}
