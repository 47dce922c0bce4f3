//! The four faults, done to processes and addresses, and undone.
//!
//! A victim is one process with its address; what belongs to it (the Envoy under a launcher) shares its lot.

use std::{collections::BTreeSet, net::IpAddr, net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use isthmus_e2e::federation::{
    START_DEADLINE,
    process::{Process, http_get},
};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::netns;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Fault {
    /// SIGKILL: sockets are closed by the kernel, which says so to peers.
    Kill,
    /// SIGSTOP: the kernel goes on to accept and acknowledge; nobody answers.
    Stop,
    /// Packets vanish both ways.
    Blackhole,
    /// An orderly end, as each system is told to end.
    Drain,
}

/// To whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Scope {
    /// One of the far cluster's two gateways.
    Gateway,
    /// Both, and the proxy of the app there.
    Cluster,
}

impl Fault {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Blackhole => "blackhole",
            Self::Drain => "drain",
        }
    }
}

impl Scope {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Cluster => "cluster",
        }
    }
}

/// How a program is told to end in order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    /// SIGTERM; it knows what to do.
    Term,
    /// As Istio's agent ends an Envoy: this path at its admin address first, SIGTERM after a while.
    DrainListeners { path: &'static str, then_term_after: Duration },
}

/// How to know that a program that was started again serves.
#[derive(Clone, Copy, Debug)]
pub(super) enum Readiness {
    /// `/readyz` at its health address.
    Health,
    /// `/ready` at Envoy's admin address.
    EnvoyAdmin(SocketAddr),
}

/// One process that a fault hits.
pub(super) struct Victim<'a> {
    pub(super) process: &'a mut Process,
    pub(super) address: IpAddr,
    pub(super) ending: Ending,
    pub(super) readiness: Readiness,
}

/// A fault under way.
pub(super) struct Struck {
    fault: Fault,
    /// Just before the first victim was hit.
    pub(super) at: Instant,
    /// Who was stopped.
    stopped: Vec<u32>,
    /// What a drain has yet to do.
    later: JoinSet<anyhow::Result<()>>,
}

/// How long an orderly end may take before it is cut short.
const END_DEADLINE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// Hits all of them.
pub(super) async fn strike(fault: Fault, victims: &mut [Victim<'_>]) -> anyhow::Result<Struck> {
    // Found out beforehand: the blow itself must be one moment.
    let mut pids = vec![];
    for victim in victims.iter() {
        pids.extend(with_descendants(
            victim.process.pid().with_context(|| format!("{} is gone", victim.process.name()))?,
        )?);
    }
    let mut struck = Struck { fault, at: Instant::now(), stopped: vec![], later: JoinSet::new() };
    match fault {
        Fault::Kill => {
            signal("KILL", &pids).await?;
            for victim in victims.iter_mut() {
                victim.process.kill().await?;
            }
        }
        Fault::Stop => {
            signal("STOP", &pids).await?;
            struck.stopped = pids;
        }
        Fault::Blackhole => netns::vanish(&victims.iter().map(|v| v.address).collect()).await?,
        Fault::Drain => {
            for victim in victims.iter_mut() {
                match (victim.ending, victim.readiness, victim.process.pid()) {
                    (Ending::DrainListeners { path, then_term_after }, Readiness::EnvoyAdmin(admin), Some(pid)) => {
                        struck.later.spawn(drain_listeners(admin, path, then_term_after, pid));
                    }
                    _ => victim.process.terminate(),
                }
            }
        }
    }
    Ok(struck)
}

/// True once a drain has ended its victims; of every other fault at once.
pub(super) fn is_over(struck: &Struck, victims: &mut [Victim<'_>]) -> bool {
    struck.fault != Fault::Drain || victims.iter_mut().all(|v| !v.process.is_running())
}

/// Undoes it, and waits until every victim serves again.
pub(super) async fn heal(mut struck: Struck, victims: &mut [Victim<'_>]) -> anyhow::Result<()> {
    match struck.fault {
        Fault::Stop => signal("CONT", &struck.stopped).await?,
        Fault::Blackhole => netns::reappear().await?,
        Fault::Kill | Fault::Drain => {
            while let Some(step) = struck.later.join_next().await {
                step.context("drain")??;
            }
            for victim in victims.iter_mut() {
                victim.process.reap_until(Instant::now() + END_DEADLINE).await;
                victim.process.start()?;
            }
        }
    }
    for victim in victims.iter_mut() {
        ready(victim.process, victim.readiness).await?;
    }
    Ok(())
}

/// Waits until the program serves.
pub(super) async fn ready(process: &mut Process, how: Readiness) -> anyhow::Result<()> {
    let Readiness::EnvoyAdmin(admin) = how else { return process.ready(START_DEADLINE).await };
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        ensure!(process.is_running(), "{} ended while starting; {}", process.name(), process.tail());
        let answer = timeout(Duration::from_secs(2), http_get(admin, "/ready")).await;
        if matches!(answer, Ok(Ok((200, _)))) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{} is not ready; {}", process.name(), process.tail());
        sleep(POLL).await;
    }
}

/// What Istio's agent does on SIGTERM (`terminationDrainDuration` is the pause).
async fn drain_listeners(admin: SocketAddr, path: &str, pause: Duration, pid: u32) -> anyhow::Result<()> {
    let post = async {
        let mut stream = TcpStream::connect(admin).await.context("connect to Envoy's admin page")?;
        let text = format!("POST {path} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.context("write")?;
        let mut answer = String::new();
        stream.take(64 * 1024).read_to_string(&mut answer).await.context("read")?;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "POST {path}: {answer}");
        anyhow::Ok(())
    };
    timeout(Duration::from_secs(2), post).await.context("Envoy's admin page is silent")??;
    sleep(pause).await;
    signal("TERM", &[pid]).await
}

/// One `kill` for all, so that they are hit in the same millisecond.
async fn signal(signal: &str, pids: &[u32]) -> anyhow::Result<()> {
    let status = Command::new("kill").arg(format!("-{signal}")).args(pids.iter().map(u32::to_string)).status().await;
    ensure!(status.context("run kill")?.success(), "kill -{signal} {pids:?} failed");
    Ok(())
}

/// The process and all that it started, directly or not.
fn with_descendants(pid: u32) -> anyhow::Result<BTreeSet<u32>> {
    let mut parents = vec![];
    for entry in std::fs::read_dir("/proc").context("read /proc")? {
        let name = entry.context("read /proc")?.file_name();
        let Some(child) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        // One that has just ended has no parent worth knowing.
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        // proc(5): pid (comm) state ppid …; comm may hold anything, also parentheses.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)).and_then(|p| p.parse().ok());
        parents.extend(parent.map(|parent: u32| (child, parent)));
    }
    let mut family = BTreeSet::from([pid]);
    loop {
        let more: Vec<u32> =
            parents.iter().filter(|(c, p)| family.contains(p) && !family.contains(c)).map(|(c, _)| *c).collect();
        if more.is_empty() {
            return Ok(family);
        }
        family.extend(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn descendants_of_a_shell_are_found() {
        let mut shell = Command::new("sh").args(["-c", "sleep 60 & wait"]).kill_on_drop(true).spawn().unwrap();
        let pid = shell.id().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while with_descendants(pid).unwrap().len() < 2 {
            assert!(Instant::now() < deadline, "the shell's child is not found");
            sleep(POLL).await;
        }
        let family: Vec<u32> = with_descendants(pid).unwrap().into_iter().collect();
        signal("KILL", &family).await.unwrap();
        shell.wait().await.unwrap();
    }
}
