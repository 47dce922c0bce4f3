//! Open-loop load: requests start on schedule whether or not earlier ones have ended, and each is timed from the moment it
//! was due, so that a stall is seen by all whom it would have hit.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context;
use isthmus_e2e::shop::Answer;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use super::client::Client;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// By the app in this cluster.
    Served(String),
    /// Why not.
    Failed(String),
}

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// When it was due.
    pub(super) due: Instant,
    /// From then to its end.
    pub(super) took: Duration,
    pub(super) outcome: Outcome,
}

/// What to ask, and how often.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) target: SocketAddr,
    pub(super) host: String,
    pub(super) per_second: u32,
    /// After this a request has failed.
    pub(super) patience: Duration,
}

/// Running load.
pub(super) struct Load {
    log: Arc<Log>,
    stop: watch::Sender<bool>,
    running: JoinSet<()>,
    patience: Duration,
}

/// What has been seen so far.
#[derive(Default)]
struct Log {
    samples: Mutex<Vec<Sample>>,
    /// Requests under way: number → when due.
    open: Mutex<BTreeMap<u64, Instant>>,
}

impl Load {
    pub(super) fn start(plan: Plan) -> Self {
        let log = Arc::new(Log::default());
        let (stop, stopped) = watch::channel(false);
        let mut running = JoinSet::new();
        let patience = plan.patience;
        running.spawn(generate(plan, log.clone(), stopped));
        Self { log, stop, running, patience }
    }

    /// Looks at all samples so far, in the order in which they ended.
    pub(super) fn look<T>(&self, at: impl FnOnce(&[Sample]) -> T) -> T {
        at(&lock(&self.log.samples))
    }

    /// How long the oldest request under way has been due.
    pub(super) fn oldest_open(&self) -> Duration {
        lock(&self.log.open).values().min().map(Instant::elapsed).unwrap_or_default()
    }

    /// Starts no more, waits until each request under way has ended, and returns all of them.
    pub(super) async fn stop(mut self) -> anyhow::Result<Vec<Sample>> {
        self.stop.send_replace(true);
        let all = async { while self.running.join_next().await.is_some() {} };
        timeout(self.patience + Duration::from_secs(5), all).await.context("requests outlive their deadline")?;
        Ok(std::mem::take(&mut *lock(&self.log.samples)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every section leaves the value whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn generate(plan: Plan, log: Arc<Log>, mut stopped: watch::Receiver<bool>) {
    let client = Arc::new(Client::new(plan.target, &plan.host));
    let every = Duration::from_secs(1) / plan.per_second.max(1);
    let mut requests = JoinSet::new();
    let mut due = Instant::now();
    let mut number = 0;
    loop {
        tokio::select! {
            biased;
            _ = stopped.wait_for(|s| *s) => break,
            () = sleep_until(due) => {
                number += 1;
                lock(&log.open).insert(number, due);
                requests.spawn(one(client.clone(), log.clone(), Request { number, due, patience: plan.patience }));
                due += every;
            }
            Some(_) = requests.join_next() => {}
        }
    }
    while requests.join_next().await.is_some() {}
}

struct Request {
    number: u64,
    due: Instant,
    patience: Duration,
}

async fn one(client: Arc<Client>, log: Arc<Log>, request: Request) {
    let Request { number, due, patience } = request;
    let path = format!("/items/{number}");
    let outcome = match timeout(patience, client.send("GET", &path)).await {
        Err(_) => Outcome::Failed(format!("no answer within {patience:?}")),
        Ok(Err(e)) => Outcome::Failed(e.to_string()),
        Ok(Ok(reply)) if reply.status != 200 => {
            Outcome::Failed(format!("{}: {}", reply.status, String::from_utf8_lossy(&reply.body).trim()))
        }
        Ok(Ok(reply)) => match serde_json::from_slice::<Answer>(&reply.body) {
            // An answer to somebody else's request would be worse than none.
            Ok(answer) if answer.request.ends_with(&path) => Outcome::Served(answer.cluster),
            Ok(answer) => Outcome::Failed(format!("answers {}", answer.request)),
            Err(e) => Outcome::Failed(format!("not the app's answer: {e}")),
        },
    };
    lock(&log.open).remove(&number);
    lock(&log.samples).push(Sample { due, took: due.elapsed(), outcome });
}
