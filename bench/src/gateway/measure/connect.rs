//! New connections: how many a second, and how long one takes when nothing else goes on.

use crate::{
    gateway::{
        metrics,
        plan::Plan,
        samples::Samples,
        session::{Progress, Session, Step},
    },
    load::command::{Command, Connected},
};

/// The rate with many at once, the latency one at a time.
pub(in crate::gateway) async fn run(session: &mut Session, plan: &Plan, samples: &mut Samples) -> anyhow::Result<()> {
    let cases = [plan.connect.at_once, 1];
    let mut progress = Progress::of(plan.rounds * cases.len() * session.systems.len());
    for round in 1..=plan.rounds {
        for at_once in cases {
            let step = Step {
                section: "connect",
                what: format!("new connections, {at_once} at once"),
                round,
                rounds: plan.rounds,
            };
            let owed = match at_once {
                1 => ["p50", "p99"].map(metrics::connect_latency).to_vec(),
                many => vec![metrics::connects(many)],
            };
            for index in 0..session.systems.len() {
                let work = async |session: &mut Session, samples: &mut Samples| {
                    once(session, index, at_once, plan, samples).await
                };
                session.step((&step, &mut progress), index, (&owed, samples), work).await?;
            }
        }
    }
    Ok(())
}

async fn once(
    session: &mut Session,
    index: usize,
    at_once: usize,
    plan: &Plan,
    samples: &mut Samples,
) -> anyhow::Result<String> {
    let running = session.running(index)?;
    let (system, target) = (running.system, running.target.clone());
    let span = plan.connect.span;
    let seen: Connected = session.ask(&Command::Connect { target, at_once, span }, Some(span)).await?;
    super::note_failures(samples, &format!("new connections, {at_once} at once"), system.name(), seen.failed);
    if at_once == 1 {
        samples.add_with(&metrics::connect_latency("p50"), system, seen.latency.p50, &seen);
        samples.add_with(&metrics::connect_latency("p99"), system, seen.latency.p99, &seen);
        return Ok(format!("p50 {}, p99 {}", super::millis(seen.latency.p50), super::millis(seen.latency.p99)));
    }
    samples.add_with(&metrics::connects(at_once), system, seen.rate, &seen);
    Ok(format!("{:.0}/s", seen.rate))
}
