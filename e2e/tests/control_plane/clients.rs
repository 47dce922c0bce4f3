//! Clients: what they do, and the record of it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::StatusCode;
use isthmus_model::global::GlobalSnapshot;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::sleep;

use super::{
    agent::Shown,
    history::{Operation, Seen},
    rig::Admin,
};

/// The control plane keeps so many outstanding tokens, and events.
const MOST_APPENDS: u64 = 8_000;
/// Of the names that clients append; others join, too.
const PREFIX: &str = "w";
/// Of a client after a failure: as long as nobody leads, refusals come fast, and names are few.
const PAUSE: Duration = Duration::from_millis(100);
/// Of the observer.
const LOOK: Duration = Duration::from_millis(50);

/// What all clients did.
#[derive(Clone)]
pub(crate) struct Recorder {
    pub(crate) operations: Arc<Mutex<Vec<Operation>>>,
    pub(crate) stop: Arc<AtomicBool>,
    appends: Arc<AtomicU64>,
    /// So that appends last as long as the run.
    began: Instant,
    lasting: Duration,
}

impl Recorder {
    pub(crate) fn new(lasting: Duration) -> Self {
        let (operations, stop, appends) = (Arc::default(), Arc::default(), Arc::default());
        Self { operations, stop, appends, began: Instant::now(), lasting }
    }

    /// The number of one more append, unless there were enough by now.
    fn append(&self) -> Option<u64> {
        let part = (self.began.elapsed().as_secs_f64() / self.lasting.as_secs_f64()).min(1.0);
        let most = (MOST_APPENDS as f64 * part) as u64;
        let more = |count: u64| (count < most).then_some(count + 1);
        self.appends.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()
    }

    fn record(&self, began: Instant, seen: Seen) {
        self.operations.lock().unwrap().push(Operation { began, ended: Instant::now(), seen });
    }
}

/// Appends and reads at nodes by chance, until told to stop.
pub(crate) async fn client(number: u64, admins: Vec<Admin>, recorder: Recorder, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed.wrapping_add(number));
    while !recorder.stop.load(Ordering::Relaxed) {
        let admin = &admins[rng.random_range(0..admins.len())];
        if let Some(nth) = rng.random_bool(0.5).then(|| recorder.append()).flatten() {
            let name = format!("{PREFIX}{number}-{nth}");
            let began = Instant::now();
            let path = format!("/v1/clusters/{name}/join-token");
            let seen = match admin.call("POST", &path, "{\"ttlSeconds\": 86400}").await {
                Ok((StatusCode::OK, _)) => Seen::Appended(name),
                _ => Seen::Unknown(name),
            };
            let failed = matches!(seen, Seen::Unknown(_));
            recorder.record(began, seen);
            if failed {
                sleep(PAUSE).await;
            }
        } else {
            let began = Instant::now();
            match last(admin).await {
                Ok(last) => recorder.record(began, Seen::Read(last)),
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
}

/// The last append that a node knows of.
async fn last(admin: &Admin) -> anyhow::Result<Option<(u64, String)>> {
    Ok(appends(&admin.get("/v1/events?limit=200&consistency=linearizable").await?).pop())
}

/// The appends among events, which come latest first; oldest first.
pub(crate) fn appends(events: &serde_json::Value) -> Vec<(u64, String)> {
    let events = events.as_array().unwrap().iter().rev();
    let appended = |e: &&serde_json::Value| e["subject"].as_str().is_some_and(|subject| subject.starts_with(PREFIX));
    let minted = events.filter(|e| e["action"] == "mint-join-token" && e["outcome"] == "unchanged").filter(appended);
    minted.map(|e| (e["number"].as_u64().unwrap() + 1, e["subject"].as_str().unwrap().to_owned())).collect()
}

/// Looks at what each node holds, however old, until told to stop.
pub(crate) async fn observer(admins: Vec<Admin>, recorder: Recorder, shown: Shown) {
    while !recorder.stop.load(Ordering::Relaxed) {
        for (nth, admin) in admins.iter().enumerate() {
            if let Ok(state) = admin.get("/v1/snapshot?consistency=stale").await {
                let state: GlobalSnapshot = serde_json::from_value(state).unwrap();
                shown.see(&format!("node {}", nth + 1), &state);
            }
        }
        sleep(LOOK).await;
    }
}
