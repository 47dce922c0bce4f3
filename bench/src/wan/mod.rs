//! A wide-area path on one machine: two network namespaces joined by a link with delay and loss.
//!
//! [`Link`] makes the namespaces, a TUN device in each, and a forwarder between them that holds every packet for half the
//! round-trip time and loses some; kernels without netem can do no such thing themselves. Nothing leaves the machine: the
//! namespaces have loopback and the link, no other route. What runs inside is started by [`Link::command`] or on a thread of
//! [`Link::spawn`]. Dropping the link takes all of it away; what a killed run left is removed by the next one.
//!
//! Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN), `ip` from iproute2 and `/dev/net/tun`.
//!
//! It does not limit the rate: what the machine forwards is the limit (`isthmus-bench wan --selftest` prints it). It does not
//! reorder, duplicate or corrupt. For faults between processes on loopback use a private namespace (`ip netns add`) with
//! `nft add rule … drop` in it.

mod forward;
mod link;
mod netns;
mod selftest;
#[cfg(test)]
mod tests;

use std::{str::FromStr, time::Duration};

use anyhow::{Context, bail, ensure};

pub(crate) use self::{
    forward::QUEUE_PACKETS,
    link::{Link, MTU, Options, Path, Side, Stats},
};

/// Options of `isthmus-bench wan`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  isthmus-bench wan --rtt 40ms --loss 1%             bring the link up, say how to use it, stay until Ctrl-C
  isthmus-bench wan --rtt 40ms --loss 0% --selftest  measure round trips, loss and TCP throughput over it, then leave")]
pub(crate) struct Args {
    /// Round-trip time; each direction delays by half of it.
    #[arg(long, default_value = "40ms", value_parser = humantime::parse_duration)]
    pub(crate) rtt: Duration,
    /// Share of packets lost in each direction, independently of each other.
    #[arg(long, default_value = "0%")]
    pub(crate) loss: Loss,
    /// Seed of the losses: the same seed loses the same packets, by their number in each direction.
    #[arg(long, default_value_t = Options::default().seed)]
    pub(crate) seed: u64,
    /// TCP congestion control inside the namespaces, whatever this machine's own default is.
    #[arg(long, default_value_t = Options::default().congestion)]
    pub(crate) congestion: String,
    /// Measure the link itself and leave: round trips, loss, TCP throughput.
    #[arg(long)]
    pub(crate) selftest: bool,
}

/// A share of packets, written "1%" or "0.1%".
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Loss(pub(crate) f64);

impl FromStr for Loss {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let Some(percent) = text.strip_suffix('%') else { bail!("write it in per cent, for example 1% or 0.1%") };
        let percent: f64 = percent.trim().parse().context("not a number of per cent")?;
        ensure!((0.0..=100.0).contains(&percent), "it must be between 0% and 100%");
        Ok(Self(percent / 100.0))
    }
}

/// Brings the link up, and either measures it or keeps it until Ctrl-C.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let path = Path { rtt: args.rtt, loss: args.loss.0 };
    let options = Options { seed: args.seed, congestion: args.congestion };
    let link = Link::start_with(path, options)?;
    if args.selftest {
        let report =
            tokio::task::spawn_blocking(move || selftest::run(&link, path)).await.context("self-test died")??;
        println!("{report}");
        return Ok(());
    }
    let ([near, far], [near_address, far_address]) = (link.namespaces(), link.addresses());
    println!("The link is up: {path}, MTU {MTU}, at most {QUEUE_PACKETS} packets on the way in each direction.");
    println!("  side A  {near}  {near_address}");
    println!("  side B  {far}  {far_address}");
    println!("Run programs on either side, for example:");
    println!("  ip netns exec {far} python3 -m http.server --bind {far_address} 8080");
    println!("  ip netns exec {near} curl -s -o /dev/null -w '%{{time_total}}\\n' http://{far_address}:8080/");
    println!("`kill -USR1 {}` makes it swallow every packet, and again to pass them.", std::process::id());
    println!("Ctrl-C takes it away, with everything that runs in it.");
    until_stopped(&link).await?;
    println!("\n{}", link.stats());
    Ok(())
}

/// Until Ctrl-C or SIGTERM; SIGUSR1 opens and closes the black hole.
async fn until_stopped(link: &Link) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut toggle = signal(SignalKind::user_defined1()).context("listen for SIGUSR1")?;
    let mut open = false;
    loop {
        tokio::select! {
            interrupt = tokio::signal::ctrl_c() => return interrupt.context("listen for Ctrl-C"),
            _ = terminate.recv() => return Ok(()),
            _ = toggle.recv() => {
                open = !open;
                link.blackhole(open);
                println!("{}", if open { "Every packet is swallowed now." } else { "Packets pass again." });
            }
        }
    }
}
