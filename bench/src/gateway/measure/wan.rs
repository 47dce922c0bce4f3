//! The same over a long path, at several rates of loss: requests on warm connections, new connections, bulk.
//!
//! Requests come at a share of what that many connections could do without loss, one after the other; the same rate for all
//! systems and losses.

use std::time::Duration;

use crate::{
    gateway::{
        metrics,
        plan::{Plan, SHARE},
        samples::Samples,
        session::{Progress, Session, Step},
    },
    load::command::{Command, Connected, Exchanged, Moved, Way},
    report::Metric,
    wan::{Link, Path},
};

#[derive(Clone, Copy)]
enum Case {
    Requests,
    Connections,
    Bulk(usize),
}

/// Each loss, each case.
pub(in crate::gateway) async fn run(
    session: &mut Session,
    plan: &Plan,
    link: &Link,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    let wan = &plan.wan;
    let cases: Vec<Case> =
        [Case::Requests, Case::Connections].into_iter().chain(wan.streams.iter().map(|s| Case::Bulk(*s))).collect();
    let mut progress = Progress::of(plan.rounds * wan.losses.len() * cases.len() * session.systems.len());
    let rtt = Duration::from_millis(wan.rtt_ms);
    for round in 1..=plan.rounds {
        for loss in wan.losses {
            link.set(Path { rtt, loss: loss / 100.0 })?;
            for case in &cases {
                let owed = owed(*case, plan, *loss);
                let what = owed.first().map(Metric::name).unwrap_or_default();
                let step = Step { section: "wan", what, round, rounds: plan.rounds };
                for index in 0..session.systems.len() {
                    let work = async |session: &mut Session, samples: &mut Samples| {
                        once(session, index, (*case, *loss), plan, samples).await
                    };
                    session.step((&step, &mut progress), index, (&owed, samples), work).await?;
                }
            }
        }
    }
    Ok(())
}

fn owed(case: Case, plan: &Plan, loss: f64) -> Vec<Metric> {
    match case {
        Case::Requests => super::NAMES.map(|name| metrics::wan_paced(name, plan.wan.connections, loss)).into(),
        Case::Connections => ["p50", "p99"].map(|name| metrics::wan_connect(name, loss)).into(),
        Case::Bulk(streams) => vec![metrics::wan_bulk(streams, loss)],
    }
}

async fn once(
    session: &mut Session,
    index: usize,
    (case, loss): (Case, f64),
    plan: &Plan,
    samples: &mut Samples,
) -> anyhow::Result<String> {
    let running = session.running(index)?;
    let (system, target) = (running.system, running.target.clone());
    let wan = &plan.wan;
    match case {
        Case::Requests => {
            let span = wan.paced;
            let rate = SHARE * wan.connections as f64 / (wan.rtt_ms as f64 / 1e3);
            session.open(&target, wan.connections).await?;
            let seen: Exchanged = session.ask(&Command::Paced { span, rate }, Some(span)).await?;
            session.close().await?;
            let metric = |name| metrics::wan_paced(name, wan.connections, loss);
            super::exchange::record(samples, system, metric, &seen);
            super::note_failures(samples, &metric("p99").name(), system.name(), seen.failed);
            Ok(format!("p50 {}, p99 {}", super::millis(seen.latency.p50), super::millis(seen.latency.p99)))
        }
        Case::Connections => {
            let span = wan.connect;
            let seen: Connected = session.ask(&Command::Connect { target, at_once: 4, span }, Some(span)).await?;
            for (name, value) in [("p50", seen.latency.p50), ("p99", seen.latency.p99)] {
                samples.add_with(&metrics::wan_connect(name, loss), system, value, &seen);
            }
            super::note_failures(samples, &metrics::wan_connect("p50", loss).name(), system.name(), seen.failed);
            Ok(format!("p50 {}, p99 {}", super::millis(seen.latency.p50), super::millis(seen.latency.p99)))
        }
        Case::Bulk(streams) => {
            let span = wan.bulk;
            let moved: Moved =
                session.ask(&Command::Bulk { target, streams, way: Way::Down, span }, Some(span)).await?;
            let metric = metrics::wan_bulk(streams, loss);
            samples.add_with(&metric, system, moved.rate, &moved);
            super::note_failures(samples, &metric.name(), system.name(), moved.failed);
            Ok(format!("{:.1} Mbit/s", moved.rate / 1e6))
        }
    }
}
