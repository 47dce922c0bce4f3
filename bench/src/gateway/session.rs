//! One topology with all systems up, and the way a step is taken: told before, told after, and survived if it fails.
//!
//! A step that fails leaves a value that is no number and a note, never a hole that could pass for a win; a system that has died is
//! started again.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anyhow::Context;

use super::{
    client::{self, Client},
    process::Process,
    samples::Samples,
    system::{Running, Setting, System},
};
use crate::{
    load::command::{Command, Opened, Span, Target},
    report::Metric,
};

/// On top of what a command is told to take.
const SLACK: Duration = Duration::from_secs(150);
/// Connections that are being opened at one time, when many are.
const OPENING: usize = 64;

/// A topology with everything running.
pub(super) struct Session {
    pub(super) setting: Setting,
    pub(super) systems: Vec<Running>,
    pub(super) client: Client,
    _server: Process,
}

/// What a step is, for people.
pub(super) struct Step<'a> {
    pub(super) section: &'a str,
    pub(super) what: String,
    pub(super) round: usize,
    pub(super) rounds: usize,
}

/// How far a section is.
#[derive(Debug)]
pub(super) struct Progress {
    done: usize,
    of: usize,
    began: Instant,
}

impl Progress {
    pub(super) fn of(steps: usize) -> Self {
        Self { done: 0, of: steps, began: Instant::now() }
    }

    fn next(&mut self, step: &Step<'_>, system: System) {
        self.done += 1;
        let Step { section, what, round, rounds } = step;
        let (width, of) = (self.of.to_string().len(), self.of);
        print!("{section:<8} {:>width$}/{of}  round {round}/{rounds}  {what:<54} {:<10}", self.done, system.name());
        // Progress that cannot be shown is no reason to stop.
        std::io::stdout().flush().ok();
    }

    fn told(&self, text: &str) {
        let left = self.began.elapsed().as_secs_f64() / self.done as f64 * (self.of - self.done) as f64;
        println!("  {text}   ({left:.0} s left)");
    }
}

impl Session {
    /// Starts the load's processes and all systems.
    pub(super) async fn start(setting: Setting, threads: usize, systems: &[System]) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&setting.dir).with_context(|| format!("create {}", setting.dir.display()))?;
        let server = client::server(&setting.place, threads, &setting.dir)?;
        let client = Client::start(&setting.place, threads)?;
        let mut session = Self { setting, systems: Vec::new(), client, _server: server };
        for system in systems {
            let running = Running::start(*system, &session.setting, &mut session.client).await?;
            session.systems.push(running);
        }
        session.prove().await?;
        Ok(session)
    }

    /// Stops all systems, and the load with them.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        for running in self.systems {
            running.stop().await?;
        }
        Ok(())
    }

    /// Has one command obeyed that takes as long as `span`.
    pub(super) async fn ask<T: serde::de::DeserializeOwned>(
        &mut self,
        command: &Command,
        span: Option<Span>,
    ) -> anyhow::Result<T> {
        let takes = span.map_or(Duration::ZERO, |span| Duration::from_secs_f64(span.warm + span.measure));
        self.client.ask(command, takes + SLACK).await
    }

    /// Opens `connections` to `target`.
    pub(super) async fn open(&mut self, target: &Target, connections: usize) -> anyhow::Result<Opened> {
        let open = Command::Open { target: target.clone(), connections, at_once: OPENING };
        self.ask(&open, None).await
    }

    /// Closes what is open.
    pub(super) async fn close(&mut self) -> anyhow::Result<()> {
        self.ask::<Opened>(&Command::Close, None).await.map(drop)
    }

    /// The system at `index`.
    pub(super) fn running(&self, index: usize) -> anyhow::Result<&Running> {
        self.systems.get(index).context("no such system")
    }

    /// Starts the system at `index` afresh.
    pub(super) async fn renew(&mut self, index: usize) -> anyhow::Result<()> {
        let old = self.systems.get(index).context("no such system")?.system;
        self.systems.remove(index).stop().await?;
        let new = Running::start(old, &self.setting, &mut self.client).await?;
        self.systems.insert(index, new);
        Ok(())
    }

    /// Fails if a system's traffic went another way than its name says, so far.
    pub(super) async fn prove(&self) -> anyhow::Result<()> {
        for running in &self.systems {
            running.prove(&self.setting.place).await?;
        }
        Ok(())
    }

    /// Takes a step for the system at `index`; `metrics` are what it owes a value for.
    pub(super) async fn step(
        &mut self,
        (step, progress): (&Step<'_>, &mut Progress),
        index: usize,
        (metrics, samples): (&[Metric], &mut Samples),
        work: impl AsyncFnOnce(&mut Self, &mut Samples) -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        let system = self.running(index)?.system;
        progress.next(step, system);
        match work(self, samples).await {
            Ok(text) => progress.told(&text),
            Err(error) => {
                progress.told(&format!("FAILED: {error:#}"));
                samples.note(format!("{}, {}, {}: {error:#}", step.section, step.what, system.name()));
                for metric in metrics {
                    samples.add(metric, system, f64::NAN);
                }
                self.close().await?;
                if let Some(Err(dead)) = self.systems.get_mut(index).map(Running::check) {
                    samples.note(format!("{} was started again: {dead:#}", system.name()));
                }
                self.renew(index).await?;
            }
        }
        self.running(index)?.rest().await
    }
}
