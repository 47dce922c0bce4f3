//! `isthmusctl wait`: until everyone who is connected has applied a revision.

use std::{io::Write, time::Duration};

use anyhow::bail;
use isthmus_model::ids::ClusterName;
use tokio::time::{Instant, sleep, timeout_at};

use super::cluster::unknown_cluster;
use crate::{
    Verdict,
    args::{Target, WaitArgs},
    client::Client,
    shapes::{Stamp, Status},
};

const INTERVAL: Duration = Duration::from_millis(100);
/// Laggards named in one message.
const NAMED: usize = 10;

/// How far the wait is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// This many consumers have it, which is all that are connected.
    Done(usize),
    /// Who has not.
    Pending(Vec<String>),
}

pub(super) async fn run(client: &Client, args: WaitArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let began = Instant::now();
    let deadline = began + args.timeout;
    let mut target = None;
    let mut told = String::new();
    let mut last = None;
    loop {
        let polled = timeout_at(deadline, client.get::<Status>("status")).await;
        match polled {
            Ok(Ok(status)) => {
                if let Some(name) = args.cluster.as_ref()
                    && !status.clusters.iter().any(|c| c.name == name.as_str())
                {
                    bail!(unknown_cluster(name, &status));
                }
                let wanted = *target.get_or_insert(match args.revision {
                    Target::Latest => status.stamp,
                    Target::Revision(revision) => Stamp { epoch: status.stamp.epoch, revision },
                    Target::Stamp(stamp) => stamp,
                });
                match progress(&status, wanted, args.cluster.as_ref()) {
                    Progress::Done(consumers) => {
                        let took = humantime::format_duration(Duration::from_millis(
                            u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
                        ));
                        writeln!(out, "revision {wanted} applied by {consumers} consumers ({took})")?;
                        for away in uncounted(&status, args.cluster.as_ref()) {
                            eprintln!("not counted: {away}, whose agent is not connected");
                        }
                        return Ok(Verdict::Yes);
                    }
                    Progress::Pending(laggards) => {
                        let line = format!("waiting for revision {wanted}: {}", named(&laggards));
                        if line != told {
                            eprintln!("{line}");
                            told = line;
                        }
                        last = Some((wanted, laggards));
                    }
                }
            }
            // The control plane may be starting, too.
            Ok(Err(error)) if last.is_none() && Instant::now() + INTERVAL >= deadline => return Err(error),
            Ok(Err(error)) => {
                let line = format!("{error:#}");
                if line != told {
                    eprintln!("{line}");
                    told = line;
                }
            }
            Err(_elapsed) => {}
        }
        if Instant::now() + INTERVAL >= deadline {
            break;
        }
        sleep(INTERVAL).await;
    }
    match last {
        Some((wanted, laggards)) => {
            eprintln!(
                "revision {wanted} is not applied everywhere after {}:",
                humantime::format_duration(args.timeout)
            );
            for laggard in &laggards {
                eprintln!("  {laggard}");
            }
        }
        None => eprintln!("{} gave no status within {}", client.server(), humantime::format_duration(args.timeout)),
    }
    Ok(Verdict::No)
}

/// The condition. Counted are connected consumers of active clusters whose agent is connected: of others the control
/// plane only has old news. A cluster asked for by name must be connected. Nobody connected at all is not success.
pub(super) fn progress(status: &Status, target: Stamp, only: Option<&ClusterName>) -> Progress {
    let mut laggards = Vec::new();
    if status.stamp < target {
        laggards.push(format!("control plane {} (at {})", status.node, status.stamp));
    }
    let mut applied = 0;
    let clusters = status.clusters.iter().filter(|c| only.is_none_or(|name| c.name == name.as_str()));
    for cluster in clusters.filter(|c| c.is_active()) {
        if !cluster.is_connected() {
            if only.is_some() {
                laggards.push(format!("{} (its agent is not connected)", cluster.name));
            }
            continue;
        }
        for consumer in cluster.consumers.iter().filter(|c| c.connected) {
            match consumer.applied {
                Some(stamp) if stamp >= target => applied += 1,
                stamp => {
                    let at = stamp.map_or_else(|| "nothing applied".to_owned(), |s| format!("at {s}"));
                    let why = consumer.problems.iter().map(|p| format!("; {p}")).collect::<String>();
                    laggards.push(format!("{} {}/{} ({at}{why})", cluster.name, consumer.kind, consumer.name));
                }
            }
        }
    }
    if !laggards.is_empty() {
        return Progress::Pending(laggards);
    }
    if applied == 0 {
        return Progress::Pending(vec!["any consumer (none is connected)".to_owned()]);
    }
    Progress::Done(applied)
}

/// Active clusters of which nothing current is known.
fn uncounted<'a>(status: &'a Status, only: Option<&ClusterName>) -> Vec<&'a str> {
    let clusters = status.clusters.iter().filter(|c| only.is_none_or(|name| c.name == name.as_str()));
    clusters.filter(|c| c.is_active() && !c.is_connected()).map(|c| c.name.as_str()).collect()
}

fn named(laggards: &[String]) -> String {
    let more = laggards.len().saturating_sub(NAMED);
    let list = laggards.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{list} and {more} more") } else { list }
}
