//! Keeps one Envoy running: starts it, knows when it is live, starts it again when it dies, drains and stops it at the end.

use std::{io, time::Duration};

use isthmus_runtime::{
    BoxError,
    backoff::Backoff,
    health::Gate,
    tasks::{Shutdown, chain},
};
use tokio::{
    sync::watch,
    time::{Instant, interval, sleep, timeout},
};

use super::{
    admin::Admin,
    metrics::Metrics,
    probe::Ready,
    process::{Launch, Process},
};

const POLL: Duration = Duration::from_millis(20);
/// While live, Envoy is asked this seldom.
const WATCH: Duration = Duration::from_secs(1);
const RESTART_BASE: Duration = Duration::from_millis(100);
const RESTART_CAP: Duration = Duration::from_secs(10);
/// An Envoy that lived this long is not failing at its start.
const STABLE: Duration = Duration::from_secs(30);
/// How long Envoy may take to exit when asked, before it is killed.
const EXIT: Duration = Duration::from_secs(3);
/// Nothing may be under way for this long before a drain is over: callers need a moment to learn of it.
const QUIET: Duration = Duration::from_millis(500);

/// Everything the supervision needs.
pub(super) struct Supervisor {
    pub(super) launch: Launch,
    pub(super) admin: Admin,
    pub(super) gate: Gate,
    pub(super) metrics: Metrics,
    pub(super) drain_timeout: Duration,
    /// Set to all unready when a drain begins, so that the agent takes this workload out.
    pub(super) ready: watch::Sender<Ready>,
}

enum Ended {
    Died(io::Result<std::process::ExitStatus>),
    Shutdown,
}

impl Supervisor {
    /// Runs until shutdown; an error means that Envoy cannot be started at all.
    pub(super) async fn run(self, shutdown: Shutdown) -> Result<(), BoxError> {
        let mut backoff = Backoff::new(RESTART_BASE, RESTART_CAP);
        loop {
            self.clear_predecessor().await?;
            let mut process =
                self.launch.start().await.map_err(|e| {
                    io::Error::new(e.kind(), format!("start Envoy ({}): {e}", self.launch.envoy.display()))
                })?;
            self.metrics.envoy_starts.inc();
            let started = Instant::now();
            tracing::info!(pid = process.pid, "Envoy started");
            match self.watch(&mut process, &shutdown, started).await {
                Ended::Shutdown => {
                    self.stop(process).await;
                    return Ok(());
                }
                Ended::Died(status) => {
                    self.metrics.envoy_live.set(0);
                    self.metrics.envoy_deaths.inc();
                    let how = match status {
                        Ok(status) => status.to_string(),
                        Err(error) => error.to_string(),
                    };
                    let log = match &self.launch.log {
                        Some(path) => path.display().to_string(),
                        None => "stderr".to_owned(),
                    };
                    tracing::error!(status = how, lived = ?started.elapsed(), log, "Envoy died");
                    self.gate.unready(&format!("Envoy died ({how}); see its log: {log}"));
                    if started.elapsed() > STABLE {
                        backoff.reset();
                    }
                    tokio::select! {
                        () = shutdown.requested() => return Ok(()),
                        () = sleep(backoff.next()) => {}
                    }
                }
            }
        }
    }

    async fn watch(&self, process: &mut Process, shutdown: &Shutdown, started: Instant) -> Ended {
        let mut live = false;
        let mut polls = interval(POLL);
        polls.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut next_look = started;
        loop {
            tokio::select! {
                () = shutdown.requested() => return Ended::Shutdown,
                status = process.exited() => return Ended::Died(status),
                _ = polls.tick() => {}
            }
            if Instant::now() < next_look {
                continue;
            }
            let is_live = self.admin.is_live().await;
            if is_live != live {
                live = is_live;
                self.metrics.envoy_live.set(i64::from(live));
                if live {
                    tracing::info!(after = ?started.elapsed(), "Envoy is live");
                    self.gate.ready();
                } else {
                    tracing::warn!("Envoy is not live any more");
                    self.gate.unready("Envoy does not say that it is live");
                }
            }
            if live {
                next_look = Instant::now() + WATCH;
            }
        }
    }

    /// Ends an Envoy that an earlier launcher left behind: it would hold the ports.
    async fn clear_predecessor(&self) -> io::Result<()> {
        let socket = self.admin.socket();
        if self.admin.quit().await.is_ok() {
            tracing::warn!("an Envoy of an earlier run was still there; asked it to exit");
            let gone = async {
                while tokio::net::UnixStream::connect(socket).await.is_ok() {
                    sleep(POLL).await;
                }
            };
            if timeout(EXIT, gone).await.is_err() {
                tracing::error!(socket = %socket.display(), "it does not exit");
            }
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Unready → no new requests → those under way finish, or their time is up → exit, or be killed.
    async fn stop(&self, mut process: Process) {
        self.gate.unready("draining");
        self.ready.send_modify(|ready| ready.values_mut().for_each(|r| *r = false));
        if let Err(error) = self.admin.drain_inbound().await {
            tracing::warn!(error = %chain(&error), "cannot drain Envoy");
        } else if timeout(self.drain_timeout, self.quiet()).await.is_err() {
            tracing::warn!(after = ?self.drain_timeout, "requests were still under way when the drain's time was up");
        }
        // A failure to ask shows as Envoy still being there.
        drop(self.admin.quit().await);
        if timeout(EXIT, process.exited()).await.is_err() {
            tracing::warn!("Envoy does not exit; killing it");
            process.kill();
            drop(timeout(EXIT, process.exited()).await);
        }
        self.metrics.envoy_live.set(0);
        tracing::info!("Envoy stopped");
    }

    async fn quiet(&self) {
        let mut since = Instant::now();
        while since.elapsed() < QUIET {
            sleep(POLL).await;
            match self.admin.active_inbound().await {
                Ok(0) => {}
                Ok(_) => since = Instant::now(),
                // Gone, or not answering: nothing to wait for.
                Err(_) => return,
            }
        }
    }
}
