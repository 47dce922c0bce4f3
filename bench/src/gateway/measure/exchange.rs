//! Small requests on warm connections: as many as go, and their latency at a rate that all systems can hold.
//!
//! The rate is a share of what the slowest system reached, the same for all, at each number of connections. So the systems first
//! run flat out, all rounds of it, and then at that rate.

use anyhow::Context;

use crate::{
    gateway::{
        metrics,
        plan::{FASTEST, Plan, SHARE},
        samples::Samples,
        session::{Progress, Session, Step},
        system::System,
    },
    load::command::{Command, Exchanged, Span},
    report::stats,
};

/// Each number of connections, flat out and then paced.
pub(in crate::gateway) async fn run(session: &mut Session, plan: &Plan, samples: &mut Samples) -> anyhow::Result<()> {
    let counts = &plan.exchange.connections;
    let mut progress = Progress::of(2 * plan.rounds * counts.len() * session.systems.len());
    for round in 1..=plan.rounds {
        for connections in counts {
            let metric = metrics::closed(*connections);
            let step = Step { section: "rr", what: metric.name(), round, rounds: plan.rounds };
            for index in 0..session.systems.len() {
                let work = async |session: &mut Session, samples: &mut Samples| {
                    flat_out(session, index, *connections, plan.exchange.closed, samples).await
                };
                session.step((&step, &mut progress), index, (std::slice::from_ref(&metric), samples), work).await?;
            }
        }
    }
    for round in 1..=plan.rounds {
        for connections in counts {
            let rate = rate(samples, *connections)?;
            let owed: Vec<_> = super::NAMES.map(|name| metrics::paced(name, *connections)).into();
            let what = format!("latency at {rate:.0}/s, {connections} connections");
            let step = Step { section: "rr", what, round, rounds: plan.rounds };
            for index in 0..session.systems.len() {
                let work = async |session: &mut Session, samples: &mut Samples| {
                    paced(session, index, (*connections, rate), plan.exchange.paced, samples).await
                };
                session.step((&step, &mut progress), index, (&owed, samples), work).await?;
            }
        }
    }
    Ok(())
}

/// A share of the slowest system's median, but for systems that failed.
pub(super) fn rate(samples: &Samples, connections: usize) -> anyhow::Result<f64> {
    let metric = metrics::closed(connections);
    let rounds = samples.rounds(&metric).context("nothing was measured flat out")?;
    let medians = rounds.values().filter_map(|values| stats::median(values));
    let slowest = medians.fold(f64::INFINITY, f64::min);
    anyhow::ensure!(slowest.is_finite() && slowest > 0.0, "no system held {connections} connections");
    Ok((SHARE * slowest).min(FASTEST).round())
}

async fn flat_out(
    session: &mut Session,
    index: usize,
    connections: usize,
    span: Span,
    samples: &mut Samples,
) -> anyhow::Result<String> {
    let running = session.running(index)?;
    let (system, target) = (running.system, running.target.clone());
    session.open(&target, connections).await?;
    let seen: Exchanged = session.ask(&Command::Closed { span }, Some(span)).await?;
    session.close().await?;
    let metric = metrics::closed(connections);
    samples.add_with(&metric, system, seen.rate, &seen);
    super::note_failures(samples, &metric.name(), system.name(), seen.failed);
    Ok(format!("{:.0}/s", seen.rate))
}

async fn paced(
    session: &mut Session,
    index: usize,
    (connections, rate): (usize, f64),
    span: Span,
    samples: &mut Samples,
) -> anyhow::Result<String> {
    let running = session.running(index)?;
    let (system, target) = (running.system, running.target.clone());
    session.open(&target, connections).await?;
    session.running(index)?.rest().await?;
    let before = session.running(index)?.cpu()?;
    let seen: Exchanged = session.ask(&Command::Paced { span, rate }, Some(span)).await?;
    let after = session.running(index)?.cpu()?;
    session.close().await?;
    record(samples, system, |name| metrics::paced(name, connections), &seen);
    let metric = metrics::paced("p99", connections);
    super::note_failures(samples, &metric.name(), system.name(), seen.failed);
    if let Some((before, after)) = before.zip(after) {
        let requests = rate * (span.warm + span.measure);
        samples.add(&metrics::paced_cpu(connections), system, (after - before) / requests / super::MICRO);
    }
    Ok(format!("p50 {}, p99 {}", super::millis(seen.latency.p50), super::millis(seen.latency.p99)))
}

/// All reported quantiles.
pub(super) fn record(
    samples: &mut Samples,
    system: System,
    metric: impl Fn(&'static str) -> crate::report::Metric,
    seen: &Exchanged,
) {
    for (name, value) in super::quantiles(&seen.latency) {
        samples.add_with(&metric(name), system, value, seen);
    }
}
