//! The story that `make demo` plays and checks: everything is lost in turn, and the traffic goes on.
//!
//! `stage` sets up the federation and the load, `steps` are the story's eight parts (`noticed` is a part of the sixth), `ledger` keeps what each part's load
//! saw and judges it at the end, `report` is what a person reads.

pub mod ledger;
pub mod noticed;
pub mod report;
pub mod stage;
pub mod steps;

use std::path::PathBuf;

use self::{report::Report, stage::Stage};

/// How the demo was asked to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder for everything it writes.
    pub dir: PathBuf,
    /// Leave the federation running at the end.
    pub stay: bool,
}

/// Plays the scenario. The stage is returned even when a step failed, so that the caller can stop it or leave it.
pub async fn play(options: &Options, report: &mut Report) -> (Option<Stage>, anyhow::Result<()>) {
    let mut stage = match Stage::set(options, report).await {
        Ok(stage) => stage,
        Err(e) => return (None, Err(e)),
    };
    let outcome = story(&mut stage, report).await;
    (Some(stage), outcome)
}

async fn story(stage: &mut Stage, report: &mut Report) -> anyhow::Result<()> {
    stage.write_env()?;
    steps::one_revision(stage, report).await?;
    steps::names(stage, report).await?;
    steps::near(stage, report).await?;
    steps::apps_killed(stage, report).await?;
    steps::gateways_killed(stage, report).await?;
    steps::control_plane_gone(stage, report).await?;
    steps::all_back(stage, report).await?;
    stage.write_env()?;
    stage.stop_load().await?;
    stage.ledger.judge(&mut stage.samples, report)?;
    steps::strangers(stage, report).await
}
