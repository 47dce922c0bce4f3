//! Throughput one way, and what a byte costs.

use crate::{
    gateway::{
        metrics,
        plan::Plan,
        samples::Samples,
        session::{Progress, Session, Step},
    },
    load::command::{Command, Moved, Way},
};

/// Both ways, each number of streams.
pub(in crate::gateway) async fn run(session: &mut Session, plan: &Plan, samples: &mut Samples) -> anyhow::Result<()> {
    let cases: Vec<(usize, Way)> =
        plan.bulk.streams.iter().flat_map(|streams| [(*streams, Way::Down), (*streams, Way::Up)]).collect();
    let mut progress = Progress::of(plan.rounds * cases.len() * session.systems.len());
    for round in 1..=plan.rounds {
        for (streams, way) in &cases {
            let metric = metrics::bulk(*way, *streams);
            let step = Step { section: "bulk", what: metric.name(), round, rounds: plan.rounds };
            for index in 0..session.systems.len() {
                let owed = [metric.clone()];
                let work = async |session: &mut Session, samples: &mut Samples| {
                    once(session, index, (*streams, *way), plan, samples).await
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
    (streams, way): (usize, Way),
    plan: &Plan,
    samples: &mut Samples,
) -> anyhow::Result<String> {
    let running = session.running(index)?;
    let (system, target, before) = (running.system, running.target.clone(), running.cpu()?);
    let span = plan.bulk.span;
    let moved: Moved = session.ask(&Command::Bulk { target, streams, way, span }, Some(span)).await?;
    let metric = metrics::bulk(way, streams);
    samples.add_with(&metric, system, moved.rate, &moved);
    super::note_failures(samples, &metric.name(), system.name(), moved.failed);
    let used = session.running(index)?.cpu()?;
    let mut text = format!("{:.2} Gbit/s", moved.rate / 1e9);
    if let Some((before, after)) = before.zip(used) {
        let cost = (after - before) / (moved.bytes as f64 / 1e9);
        samples.add(&metrics::bulk_cpu(way, streams), system, cost);
        text += &format!(", {cost:.2} CPU s/GB");
    }
    Ok(text)
}
