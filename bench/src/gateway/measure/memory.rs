//! Memory for each connection: both sides' processes, above what they hold when fresh and empty.
//!
//! Each system is started afresh, carries one connection so that its tunnel is up, and rests. Idle is after opening all
//! connections and a rest; busy is the most that is seen while requests go over them at the paced rate.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    gateway::{
        metrics,
        plan::Plan,
        samples::Samples,
        session::{Progress, Session, Step},
    },
    load::command::{Command, Exchanged},
};

/// Where nothing told what all systems can hold.
const RATE: f64 = 2_000.0;
/// Between looks while busy.
const LOOK: Duration = Duration::from_millis(250);

/// All systems that have sides.
pub(in crate::gateway) async fn run(session: &mut Session, plan: &Plan, samples: &mut Samples) -> anyhow::Result<()> {
    let connections = plan.memory.connections;
    let rate = super::exchange::rate(samples, connections).unwrap_or(RATE);
    let mut progress = Progress::of(plan.memory.rounds * session.systems.len());
    for round in 1..=plan.memory.rounds {
        let what = format!("{connections} connections, idle, then {rate:.0}/s");
        let step = Step { section: "memory", what, round, rounds: plan.memory.rounds };
        for index in 0..session.systems.len() {
            let owed: Vec<_> = match session.running(index)?.memory()? {
                Some(_) => vec![metrics::idle_memory(connections), metrics::busy_memory(connections)],
                None => Vec::new(),
            };
            let work =
                async |session: &mut Session, samples: &mut Samples| once(session, index, rate, plan, samples).await;
            session.step((&step, &mut progress), index, (&owed, samples), work).await?;
        }
    }
    Ok(())
}

async fn once(
    session: &mut Session,
    index: usize,
    rate: f64,
    plan: &Plan,
    samples: &mut Samples,
) -> anyhow::Result<String> {
    let connections = plan.memory.connections;
    if session.running(index)?.memory()?.is_none() {
        return Ok("has no sides".to_owned());
    }
    session.renew(index).await?;
    session.running(index)?.rest().await?;
    let (system, target) = (session.running(index)?.system, session.running(index)?.target.clone());
    let empty = memory(session, index)?;
    session.open(&target, connections).await?;
    session.running(index)?.rest().await?;
    let idle = memory(session, index)?;
    let span = plan.memory.paced;
    let command = Command::Paced { span, rate };
    let mut busy = idle;
    let Session { systems, client, .. } = session;
    let running = systems.get(index).ok_or_else(|| anyhow::anyhow!("no such system"))?;
    let exchange = client.ask::<Exchanged>(&command, Duration::from_secs_f64(span.warm + span.measure + 60.0));
    let look = async {
        loop {
            sleep(LOOK).await;
            match running.memory() {
                Ok(now) => busy = busy.max(now.unwrap_or_default() as f64),
                Err(error) => return error,
            }
        }
    };
    let seen = tokio::select! {
        seen = exchange => seen?,
        error = look => return Err(error),
    };
    session.close().await?;
    super::note_failures(samples, "memory, busy", system.name(), seen.failed);
    let each = |bytes: f64| (bytes - empty) / connections as f64;
    samples.add(&metrics::empty_memory(), system, empty);
    samples.add(&metrics::idle_memory(connections), system, each(idle));
    samples.add(&metrics::busy_memory(connections), system, each(busy));
    let kib = |bytes: f64| format!("{:.1} KiB", bytes / 1024.0);
    Ok(format!("idle {}, busy {} each, empty {:.1} MiB", kib(each(idle)), kib(each(busy)), empty / 1048576.0))
}

fn memory(session: &Session, index: usize) -> anyhow::Result<f64> {
    Ok(session.running(index)?.memory()?.unwrap_or_default() as f64)
}
