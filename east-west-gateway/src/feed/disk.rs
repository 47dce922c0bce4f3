//! The last known good state on disk: what the gateway serves from before any agent has answered.
//!
//! Two files of protobuf bytes, as they came and were accepted, and one of what was observed (JSON), so that a restart ends
//! no hold-down. Saving happens behind the data path; the newest state wins.
//! A damaged file is reported and passed over: the agent will send the state again.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use isthmus_api::proto::{common::v1::GlobalSnapshot as GlobalMessage, local::v1::LocalEndpoints as EndpointsMessage};
use isthmus_model::{availability::Observations, global::GlobalSnapshot, local::LocalEndpoints};
use isthmus_runtime::{
    files::LastKnownGood,
    tasks::{Tasks, chain},
};
use prost::Message;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, view::View};

const FORMAT: u32 = 1;

/// The files of one gateway.
#[derive(Debug)]
pub(super) struct Disk {
    global: watch::Sender<Option<Vec<u8>>>,
    endpoints: watch::Sender<Option<Vec<u8>>>,
}

impl Disk {
    /// Saves under `dir` from now on, until `stop`; what is pending then is still saved.
    pub(super) fn open(dir: &Path, tasks: &Tasks, metrics: &Metrics, stop: &CancellationToken) -> Self {
        let disk = Self { global: watch::Sender::new(None), endpoints: watch::Sender::new(None) };
        let [global, endpoints] = files(dir);
        for (file, bytes) in [(global, disk.global.subscribe()), (endpoints, disk.endpoints.subscribe())] {
            tasks.spawn("feed.save", save(file, bytes, metrics.clone(), stop.clone()));
        }
        disk
    }

    /// Saves what the agent sent, behind the caller's back.
    pub(super) fn save_global(&self, message: &GlobalMessage) {
        self.global.send_replace(Some(message.encode_to_vec()));
    }

    /// The same for endpoints.
    pub(super) fn save_endpoints(&self, message: &EndpointsMessage) {
        self.endpoints.send_replace(Some(message.encode_to_vec()));
    }
}

/// The view that was saved last, as far as it is readable.
pub(super) fn load(dir: &Path, metrics: &Metrics) -> View {
    let [global, endpoints] = files(dir);
    View {
        global: read::<GlobalMessage, GlobalSnapshot>(&global, metrics).map(Arc::new),
        endpoints: read::<EndpointsMessage, LocalEndpoints>(&endpoints, metrics).map(Arc::new).unwrap_or_default(),
    }
}

/// The global state that was saved last, if it is readable.
pub(super) async fn load_global(dir: PathBuf, metrics: Metrics) -> Option<GlobalMessage> {
    let load = move || {
        let [global, _] = files(&dir);
        let message = GlobalMessage::decode(global.load().ok()??.as_slice());
        message.inspect_err(|_| metrics.feed_problem("disk_read")).ok()
    };
    tokio::task::spawn_blocking(load).await.ok()?
}

/// Something that moves whenever the global state is saved.
pub(super) fn changed(dir: &Path) -> Option<(SystemTime, u64)> {
    let [global, _] = files(dir);
    let metadata = std::fs::metadata(global.path()).ok()?;
    Some((metadata.modified().ok()?, metadata.ino()))
}

/// What was observed, as it was saved last. Without it, the gateway begins as a new one would.
pub(super) fn load_past(dir: &Path, metrics: &Metrics) -> Observations {
    let file = past(dir);
    let complain = |error: &dyn std::error::Error| {
        let error = error.to_string();
        tracing::error!(file = %file.path().display(), error, "what was observed before is not usable; hold-downs end");
        metrics.feed_problem("disk_read");
    };
    let bytes = file.load().inspect_err(|e| complain(e)).ok().flatten();
    let read = |b: Vec<u8>| serde_json::from_slice(&b).inspect_err(|e| complain(e)).ok();
    bytes.and_then(read).unwrap_or_default()
}

/// Saves what was observed.
pub(super) async fn save_past(dir: &Path, observed: &Observations, metrics: &Metrics) {
    let file = past(dir);
    let at = file.path().display().to_string();
    let failed = match serde_json::to_vec(observed) {
        Ok(bytes) => match tokio::task::spawn_blocking(move || file.save(&bytes)).await {
            Ok(saved) => saved.err().map(|e| chain(&e)),
            Err(error) => Some(error.to_string()),
        },
        Err(error) => Some(error.to_string()),
    };
    if let Some(error) = failed {
        tracing::error!(file = at, error, "what is observed cannot be saved: a restart would end hold-downs");
        metrics.feed_problem("disk_write");
    }
}

fn files(dir: &Path) -> [LastKnownGood; 2] {
    ["global.lkg", "endpoints.lkg"].map(|name| LastKnownGood::new(dir.join(name), FORMAT))
}

fn past(dir: &Path) -> LastKnownGood {
    LastKnownGood::new(dir.join("observed.lkg"), FORMAT)
}

fn read<M: Message + Default, T: TryFrom<M, Error = isthmus_api::convert::ConvertError>>(
    file: &LastKnownGood,
    metrics: &Metrics,
) -> Option<T> {
    let complain = |error: &dyn std::error::Error| {
        tracing::error!(
            file = %file.path().display(),
            error = error.to_string(),
            "the last known good state is not usable; waiting for the agent"
        );
        metrics.feed_problem("disk_read");
    };
    let bytes = file.load().inspect_err(|e| complain(e)).ok()??;
    let message = M::decode(bytes.as_slice()).inspect_err(|e| complain(e)).ok()?;
    T::try_from(message).inspect_err(|e| complain(e)).ok()
}

async fn save(
    file: LastKnownGood,
    mut bytes: watch::Receiver<Option<Vec<u8>>>,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let file = Arc::new(file);
    loop {
        let more = tokio::select! {
            // What came before the stop is saved before it.
            biased;
            changed = bytes.changed() => changed.is_ok(),
            () = stop.cancelled() => false,
        };
        if !more {
            return;
        }
        let Some(content) = bytes.borrow_and_update().clone() else { continue };
        let at = file.clone();
        let saved = tokio::task::spawn_blocking(move || at.save(&content)).await;
        if let Ok(Err(error)) = saved {
            tracing::error!(
                file = %file.path().display(),
                error = chain(&error),
                "the state cannot be saved: after a restart the gateway would begin from an older one"
            );
            metrics.feed_problem("disk_write");
        }
    }
}
