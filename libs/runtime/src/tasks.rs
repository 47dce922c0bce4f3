//! Supervised tasks: named, instrumented, joined. The only place that spawns.
//!
//! In come futures with names; out comes one answer, from [`Tasks::run`], why the process stopped. What holds: a panic
//! never goes unnoticed (logged at ERROR, counted), a critical task that ends stops the process with an error naming
//! it, and after `run` returned no task is left. The order of draining inside a service is the service's affair; here a
//! drain is: [`Shutdown`] is requested, tasks have the grace period, the rest is aborted and named in the log.

mod registry;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::BoxError;
use registry::{Kind, Registry};

/// How long aborted tasks may take to let go of what they hold, once they are aborted.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);

/// A cheap handle to the process's tasks; clones share them.
#[derive(Debug, Clone)]
pub struct Tasks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    registry: Registry,
    shutdown: Shutdown,
    // One slot: the first failure stops the process, later ones are only logged.
    failed: mpsc::Sender<TaskError>,
    failure: tokio::sync::Mutex<mpsc::Receiver<TaskError>>,
}

/// Why the process stopped other than by request.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A critical task returned although nothing asked it to.
    #[error("critical task {name} ended although it should run as long as the process")]
    Ended {
        /// The task.
        name: &'static str,
    },
    /// A critical task returned an error.
    #[error("critical task {name} failed")]
    Failed {
        /// The task.
        name: &'static str,
        /// What it returned.
        source: BoxError,
    },
    /// A critical task panicked.
    #[error("critical task {name} panicked: {message}")]
    Panicked {
        /// The task.
        name: &'static str,
        /// The panic's message.
        message: String,
    },
    /// A second signal cut the drain short.
    #[error("forced to stop by a second signal before the drain was over")]
    Forced,
    /// The system gave no signal handler.
    #[error("cannot listen for SIGTERM and SIGINT")]
    Signals(#[source] std::io::Error),
}

impl Tasks {
    /// A supervisor without tasks.
    pub fn new() -> Self {
        let (failed, failure) = mpsc::channel(1);
        let inner = Inner {
            registry: Registry::default(),
            shutdown: Shutdown::new(),
            failed,
            failure: tokio::sync::Mutex::new(failure),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Runs work that may fail without stopping the process, such as one connection. A panic is logged and counted.
    ///
    /// A drain waits for it. Call within a tokio runtime.
    pub fn spawn(&self, name: &'static str, fut: impl Future<Output = ()> + Send + 'static) {
        self.start(name, Kind::Plain, fut.map(Ok));
    }

    /// Runs work without which the process is useless. Its end before a shutdown, its error or its panic stops the
    /// process. A drain waits for it; an error during the drain still makes [`Tasks::run`] fail.
    pub fn critical(&self, name: &'static str, fut: impl Future<Output = Result<(), BoxError>> + Send + 'static) {
        self.start(name, Kind::Critical, fut);
    }

    /// Runs work that goes on through the drain and is not waited for, such as the health server: it is dropped when
    /// all other tasks have ended. Like a critical task it must not end before a shutdown.
    pub fn background(&self, name: &'static str, fut: impl Future<Output = Result<(), BoxError>> + Send + 'static) {
        self.start(name, Kind::Background, fut);
    }

    /// The token that all tasks can watch.
    pub fn shutdown(&self) -> Shutdown {
        self.inner.shutdown.clone()
    }

    /// How many tasks of each name are running.
    pub fn running(&self) -> BTreeMap<&'static str, usize> {
        self.inner.registry.running()
    }

    /// How many tasks of each name have panicked.
    pub fn panics(&self) -> BTreeMap<&'static str, u64> {
        self.inner.registry.panics()
    }

    /// Waits for SIGTERM, SIGINT, a requested [`Shutdown`] or a critical task's failure; then requests shutdown, waits
    /// up to `grace` for tasks to end, and aborts the rest. Another signal meanwhile aborts at once.
    ///
    /// Also lifts the process's limit of open files as far as it may go: every connection is one.
    pub async fn run(self, grace: Duration) -> Result<(), TaskError> {
        crate::open_files::raise();
        let mut terminate = signal(SignalKind::terminate()).map_err(TaskError::Signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(TaskError::Signals)?;
        let (stop, force) = (CancellationToken::new(), CancellationToken::new());
        let (on_first, on_second, shutdown) = (stop.clone(), force.clone(), self.shutdown());
        self.background("signals", async move {
            loop {
                let signal = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                // A signal during a drain that something else began also forces: the user wants it over.
                let again = on_first.is_cancelled() || shutdown.is_requested();
                tracing::info!(signal, again, "signal received");
                if again { &on_second } else { &on_first }.cancel();
            }
        });
        self.supervise(stop.cancelled(), force.cancelled(), grace).await
    }

    /// The same without signals, for tests and embedding: stops when `stop` resolves.
    pub async fn run_until(self, stop: impl Future<Output = ()>, grace: Duration) -> Result<(), TaskError> {
        self.supervise(stop, std::future::pending(), grace).await
    }

    async fn supervise(
        self,
        stop: impl Future<Output = ()>,
        force: impl Future<Output = ()>,
        grace: Duration,
    ) -> Result<(), TaskError> {
        let mut failure = self.inner.failure.lock().await;
        let mut outcome = tokio::select! {
            // A failure that is already there must win over a stop that came later.
            biased;
            Some(error) = failure.recv() => Err(error),
            () = self.inner.shutdown.requested() => Ok(()),
            () = stop => Ok(()),
        };
        match &outcome {
            Ok(()) => tracing::info!(grace = ?grace, "draining"),
            // What it is called is for whoever reads the code; what went wrong comes first.
            Err(TaskError::Failed { name, source }) => {
                tracing::error!(error = %chain(source.as_ref()), task = name, "stopping");
            }
            Err(error) => tracing::error!(error = %chain(error), "stopping"),
        }
        self.inner.shutdown.request();
        tokio::select! {
            biased;
            () = self.inner.registry.drained() => {}
            () = force => {
                tracing::warn!("drain cut short by a second signal");
                outcome = outcome.and(Err(TaskError::Forced));
            }
            () = time::sleep(grace) => {}
        }
        let aborted = self.inner.registry.abort_all();
        if !aborted.is_empty() {
            tracing::warn!(tasks = ?aborted, grace = ?grace, "tasks that did not end in time are aborted");
        }
        if time::timeout(ABORT_PATIENCE, self.inner.registry.empty()).await.is_err() {
            tracing::warn!(tasks = ?self.running(), "tasks that block their thread are left behind");
        }
        // A critical task that failed during the drain: the verdict if there is none yet, else at least in the log.
        match (outcome, failure.try_recv()) {
            (Ok(()), Ok(error)) => Err(error),
            (verdict, Ok(error)) => {
                tracing::error!(error = %chain(&error), "another critical task failed");
                verdict
            }
            (verdict, Err(_)) => verdict,
        }
    }

    fn start(&self, name: &'static str, kind: Kind, fut: impl Future<Output = Result<(), BoxError>> + Send + 'static) {
        let Some(entry) = self.inner.registry.enter(name, kind) else {
            tracing::debug!(task = name, "not started: the process has stopped");
            return;
        };
        let (inner, id) = (self.inner.clone(), entry.id());
        let span = tracing::info_span!("task", task = name);
        // Combinators rather than an async block, which would hold the future twice: once captured, once awaited. There
        // are tasks by the ten thousand.
        let supervised = AssertUnwindSafe(fut).catch_unwind().map(move |ended| {
            inner.ended(name, kind, ended);
            drop(entry);
        });
        let handle = tokio::spawn(supervised.instrument(span));
        self.inner.registry.started(id, handle.abort_handle());
    }
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    fn ended(&self, name: &'static str, kind: Kind, ended: std::thread::Result<Result<(), BoxError>>) {
        let error = match ended {
            Ok(Ok(())) if kind == Kind::Plain || self.shutdown.is_requested() => return,
            Ok(Ok(())) => TaskError::Ended { name },
            Ok(Err(source)) => TaskError::Failed { name, source },
            Err(payload) => {
                let message = panic_message(payload.as_ref());
                self.registry.count_panic(name);
                tracing::error!(task = name, panic = %message, "task panicked");
                TaskError::Panicked { name, message }
            }
        };
        if kind == Kind::Plain {
            return;
        }
        if let Err(mpsc::error::TrySendError::Full(error)) = self.failed.try_send(error) {
            tracing::error!(error = %chain(&error), "another critical task failed");
        }
    }
}

/// The token that asks everything to stop; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// A token of its own, not yet requested.
    pub fn new() -> Self {
        Self::default()
    }

    /// Resolves once shutdown is requested, at once if it already was. Cancel-safe.
    pub async fn requested(&self) {
        self.token.cancelled().await;
    }

    /// Whether shutdown is requested.
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Asks everything to stop. Idempotent.
    pub fn request(&self) {
        self.token.cancel();
    }
}

/// The messages of an error and all its sources, joined by `: `, as logs print them.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
