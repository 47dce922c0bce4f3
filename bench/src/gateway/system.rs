//! The systems that are measured: what they are called, how they start, and proof that each carries what its name says.
//!
//! A system is two processes, near and far, and the address where the client enters; the limit (raw TCP) is only an address. A
//! system counts as started when a connection has gone through it to the server and back.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::time::sleep;

use super::{
    certificates::Certificates,
    client::Client,
    envoy, ours,
    place::{End, Place},
    process::Process,
};
use crate::load::command::{Command, Opened, Target};

/// Where the server listens, at its end.
pub(super) const SERVER_PORT: u16 = 20_000;
/// Each system has a hundred ports from here on.
const FIRST_PORT: u16 = 21_000;
const START: Duration = Duration::from_secs(20);
/// At rest, both processes together use at most this share of a core.
const REST: f64 = 0.1;
const REST_WITHIN: Duration = Duration::from_secs(3);

/// One way from client to server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(super) enum System {
    /// The client connects to the server: the limit.
    Raw,
    /// Envoy, SNI passthrough on both sides: no protection between the sides.
    EnvoySni,
    /// Envoy, HTTP/2 CONNECT over mutual TLS.
    EnvoyH2,
    /// Envoy, HTTP/3 CONNECT over mutual TLS.
    EnvoyH3,
    /// Ours over QUIC.
    OursQuic,
    /// Ours over TLS over TCP.
    OursTcp,
}

impl From<System> for &'static str {
    fn from(system: System) -> Self {
        system.name()
    }
}

impl System {
    pub(super) const ALL: [Self; 6] =
        [Self::Raw, Self::EnvoySni, Self::EnvoyH2, Self::EnvoyH3, Self::OursQuic, Self::OursTcp];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::EnvoySni => "envoy-sni",
            Self::EnvoyH2 => "envoy-h2",
            Self::EnvoyH3 => "envoy-h3",
            Self::OursQuic => "ours-quic",
            Self::OursTcp => "ours-tcp",
        }
    }

    /// Sockets that one side holds for each connection of the client.
    pub(super) fn sockets(self) -> u64 {
        match self {
            Self::Raw | Self::EnvoyH2 | Self::EnvoyH3 | Self::OursQuic => 1,
            Self::EnvoySni | Self::OursTcp => 2,
        }
    }
}

/// Addresses of one system.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports {
    base: u16,
}

impl Ports {
    fn of(system: System) -> Self {
        let index = System::ALL.iter().zip(0..).find(|(s, _)| **s == system).map_or(0, |(_, index)| index);
        Self { base: FIRST_PORT + 100 * index }
    }

    /// Where the client enters.
    pub(super) fn entry(self, place: &Place) -> SocketAddr {
        SocketAddr::new(place.local(End::Near), self.base)
    }

    /// Where a side meets the other.
    pub(super) fn tunnel(self, place: &Place, end: End) -> SocketAddr {
        SocketAddr::new(place.ip(end), self.base + 1)
    }

    /// Where a side tells about itself.
    pub(super) fn admin(self, place: &Place, end: End) -> SocketAddr {
        SocketAddr::new(place.local(end), self.base + 2)
    }

    /// From here on as many ports as a system likes, on a local address.
    pub(super) fn spare(self) -> u16 {
        self.base + 10
    }
}

/// What a system needs in order to start.
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) place: Place,
    pub(super) certificates: Certificates,
    pub(super) envoy: PathBuf,
    /// For configurations and logs.
    pub(super) dir: PathBuf,
    /// Worker threads of an Envoy; ours takes one per core.
    pub(super) workers: usize,
    /// Streams that a tunnel's connection must be able to carry.
    pub(super) streams: usize,
    /// Keys over our gateways' configuration.
    pub(super) ours: Value,
}

impl Setting {
    /// Where the B-side reaches the server.
    pub(super) fn server(&self) -> SocketAddr {
        SocketAddr::new(self.place.local(End::Far), SERVER_PORT)
    }
}

/// A started system.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) system: System,
    pub(super) target: Target,
    ports: Ports,
    sides: Option<[Process; 2]>,
}

impl Running {
    /// Starts both sides and waits until a connection goes through.
    pub(super) async fn start(system: System, setting: &Setting, client: &mut Client) -> anyhow::Result<Self> {
        let ports = Ports::of(system);
        let name = ours::server_name()?;
        let (address, sides) = match system {
            System::Raw => (SocketAddr::new(setting.place.ip(End::Far), SERVER_PORT), None),
            System::EnvoySni | System::EnvoyH2 | System::EnvoyH3 => {
                (ports.entry(&setting.place), Some(envoy::start(system, setting, ports, &name)?))
            }
            System::OursQuic | System::OursTcp => {
                (ports.entry(&setting.place), Some(ours::start(system, setting, ports)?))
            }
        };
        let mut running = Self { system, target: Target { address, name }, ports, sides };
        running.try_until_it_carries(client).await.with_context(|| format!("start {}", system.name()))?;
        Ok(running)
    }

    async fn try_until_it_carries(&mut self, client: &mut Client) -> anyhow::Result<()> {
        let deadline = Instant::now() + START;
        loop {
            self.check()?;
            let open = Command::Open { target: self.target.clone(), connections: 1, at_once: 1 };
            match client.ask::<Opened>(&open, START).await {
                Ok(_) => return client.ask::<Opened>(&Command::Close, START).await.map(drop),
                Err(error) => {
                    let tails = || self.sides.iter().flatten().map(Process::tail).collect::<Vec<_>>().join("\n");
                    ensure!(Instant::now() < deadline, "nothing gets through: {error:#}\n{}", tails());
                    client.ask::<Opened>(&Command::Close, START).await?;
                    sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Both sides are there.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.sides.iter_mut().flatten().try_for_each(Process::check)
    }

    /// Fails unless the traffic so far went the way that the name says.
    pub(super) async fn prove(&self, place: &Place) -> anyhow::Result<()> {
        let proof = match self.system {
            System::Raw => Ok(()),
            System::EnvoySni | System::EnvoyH2 | System::EnvoyH3 => envoy::prove(self.system, place, self.ports).await,
            System::OursQuic | System::OursTcp => ours::prove(self.system, place, self.ports).await,
        };
        proof.with_context(|| format!("{} does not carry what it should", self.system.name()))
    }

    /// CPU seconds of both sides; `None` for a system without sides.
    pub(super) fn cpu(&self) -> anyhow::Result<Option<f64>> {
        let Some(sides) = &self.sides else { return Ok(None) };
        sides.iter().map(Process::cpu).sum::<anyhow::Result<f64>>().map(Some)
    }

    /// Bytes of memory of both sides.
    pub(super) fn memory(&self) -> anyhow::Result<Option<u64>> {
        let Some(sides) = &self.sides else { return Ok(None) };
        sides.iter().map(Process::memory).sum::<anyhow::Result<u64>>().map(Some)
    }

    /// Waits until it has done what was left to do; gives up after a while, since some never rest.
    pub(super) async fn rest(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + REST_WITHIN;
        let pause = Duration::from_millis(60);
        while Instant::now() < deadline {
            let before = self.cpu()?.unwrap_or_default();
            sleep(pause).await;
            let used = self.cpu()?.unwrap_or_default() - before;
            // One tick of the clock says nothing.
            if used <= (REST * pause.as_secs_f64()).max(0.011) {
                break;
            }
        }
        Ok(())
    }

    /// Stops both sides.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        for side in self.sides.into_iter().flatten() {
            side.stop().await?;
        }
        Ok(())
    }
}

/// The address as a configuration of Envoy's writes it.
pub(super) fn host(ip: IpAddr) -> String {
    ip.to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_systems_share_a_port() {
        let place = Place::together(None);
        let mut seen = BTreeSet::from([SocketAddr::new(place.local(End::Far), SERVER_PORT)]);
        for system in System::ALL {
            let ports = Ports::of(system);
            let tunnels = [End::Near, End::Far].map(|end| ports.tunnel(&place, end));
            let admins = [End::Near, End::Far].map(|end| ports.admin(&place, end));
            for address in [ports.entry(&place)].into_iter().chain(tunnels).chain(admins) {
                assert!(address.port() < ports.spare());
                assert!(seen.insert(address), "{system:?}: {address} is taken");
            }
        }
    }
}
