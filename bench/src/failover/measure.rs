//! One measurement: steady load, the fault, what follows, recovery. Everything waits for conditions.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use tokio::time::{Instant, sleep};

use super::{
    fault::{self, Fault, Scope},
    impact::{Impact, SLOW, is_affected},
    load::{Load, Outcome, Plan, Sample},
    ours::{NEAR, Ours},
    rival::Rival,
};

/// Requests per second.
pub(super) const RATE: u32 = 500;
/// Load must have been undisturbed for so long before a fault.
const STEADY: Duration = Duration::from_secs(2);
/// Traffic returns after a hold-down and on connections that live a minute, so this is generous.
const STEADY_DEADLINE: Duration = Duration::from_secs(120);
/// A drain that has not ended by then, on top of what we would look at anyway, will not.
const DRAIN_DEADLINE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(25);

/// How patient everyone is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// The client gives up on a request after this.
    pub(super) patience: Duration,
    /// The fault's effect is over when nothing was affected for so long.
    pub(super) quiet: Duration,
    /// So long after the fault (or the end of its drain) we stop looking, and say so.
    pub(super) at_most: Duration,
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contender {
    Ours,
    /// By row.
    Rival(usize),
}

/// Both sides, running.
pub(super) struct Field {
    pub(super) ours: Ours,
    pub(super) rival: Rival,
}

/// What was found.
pub(super) struct Finding {
    /// Who was hit.
    pub(super) victims: Vec<String>,
    pub(super) impact: Impact,
}

impl Field {
    /// Measures one fault.
    pub(super) async fn measure(
        &mut self,
        who: Contender,
        (fault, scope): (Fault, Scope),
        pace: Pace,
    ) -> anyhow::Result<Finding> {
        let host = "cart.shop.svc.clusterset.local".to_owned();
        let target = self.target(who)?;
        let load = Load::start(Plan { target, host, per_second: RATE, patience: pace.patience });
        self.steady(who, &load).await?;
        let chosen = match who {
            Contender::Ours => self.ours.choose(scope).await?,
            Contender::Rival(_) => vec![],
        };
        let mut victims = match who {
            Contender::Ours => self.ours.victims(&chosen)?,
            Contender::Rival(_) => self.rival.victims(scope),
        };
        let names = victims.iter().map(|v| v.process.name().to_owned()).collect();
        let struck = fault::strike(fault, &mut victims).await?;
        let settled = settle(&load, pace, struck.at, || fault::is_over(&struck, &mut victims)).await;
        // The fault lasts until every request has ended.
        let samples = load.stop().await?;
        let impact = Impact::of(&samples, struck.at, settled);
        fault::heal(struck, &mut victims).await?;
        drop(victims);
        if let Contender::Rival(row) = who {
            self.rival.renew(row).await?;
        }
        Ok(Finding { victims: names, impact })
    }

    fn target(&self, who: Contender) -> anyhow::Result<SocketAddr> {
        match who {
            Contender::Ours => Ok(self.ours.target),
            Contender::Rival(row) => self.rival.target(row),
        }
    }

    /// Waits until all goes to the near cluster, undisturbed.
    async fn steady(&self, who: Contender, load: &Load) -> anyhow::Result<()> {
        let deadline = Instant::now() + STEADY_DEADLINE;
        loop {
            let undisturbed = load.look(is_steady) && load.oldest_open() < SLOW;
            if undisturbed && (who != Contender::Ours || self.ours.is_whole().await.context("look at our gateways")?) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{who:?}: not steady after {STEADY_DEADLINE:?}; the last requests: {}",
                load.look(|all| format!(
                    "{:?}",
                    all.iter().rev().take(5).map(|s| (&s.took, &s.outcome)).collect::<Vec<_>>()
                ))
            );
            sleep(POLL).await;
        }
    }
}

fn is_steady(samples: &[Sample]) -> bool {
    let recent: Vec<&Sample> = samples.iter().rev().take_while(|s| s.due.elapsed() < STEADY).collect();
    let enough = STEADY.as_secs() * u64::from(RATE) * 9 / 10;
    let near = |s: &&Sample| matches!(&s.outcome, Outcome::Served(cluster) if cluster == NEAR) && !is_affected(s);
    u64::try_from(recent.len()).is_ok_and(|n| n >= enough) && recent.iter().all(near)
}

/// Waits until nothing has been affected for a while and `over` holds; false if that does not come.
async fn settle(load: &Load, pace: Pace, fault: Instant, mut over: impl FnMut() -> bool) -> bool {
    // A drain's own end starts the last quiet stretch.
    let mut since = fault;
    let mut ended = false;
    loop {
        let now = Instant::now();
        if !ended && over() {
            (ended, since) = (true, now);
        }
        let from = now.checked_sub(pace.quiet).unwrap_or(fault).max(fault);
        let calm = load.look(|all| !all.iter().rev().take_while(|s| s.due + s.took >= from).any(is_affected));
        if ended && calm && load.oldest_open() < SLOW && now.duration_since(since) >= pace.quiet {
            return true;
        }
        let looked = now.duration_since(since);
        if (ended && looked >= pace.at_most) || looked >= pace.at_most + DRAIN_DEADLINE {
            return false;
        }
        sleep(POLL).await;
    }
}
