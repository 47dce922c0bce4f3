//! What travels inside one cluster (`local.proto`), and between gateways (`tunnel.proto`), ↔ [`isthmus_model::local`].

use std::net::IpAddr;

use isthmus_model::{
    availability::{Availability, Report},
    ids::{PortName, ServiceName, check_label},
    local::{Endpoint, Inbound, LocalEndpoints, LocalGateway, Sidecar, Transport, TunnelState},
};

use super::{
    ConvertError, Result,
    common::{app_protocol, counts, dialable, known, maybe_dialable},
    limits, list, name, port, required, unique,
};
use crate::proto::{common::v1 as common, local::v1 as pb};

const MILLION: u32 = 1_000_000;

/// Everything one gateway knows of other clusters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AvailabilityReport {
    /// Per service and cluster.
    pub availability: Vec<Report>,
    /// Per far gateway.
    pub tunnels: Vec<TunnelState>,
}

impl TryFrom<pb::AvailabilityReport> for AvailabilityReport {
    type Error = ConvertError;

    fn try_from(p: pb::AvailabilityReport) -> Result<Self> {
        Ok(Self {
            availability: list("availability", limits::AVAILABILITY, p.availability, Report::try_from)?,
            tunnels: list("tunnels", limits::CLUSTERS * limits::GATEWAYS, p.tunnels, TunnelState::try_from)?,
        })
    }
}

impl From<&AvailabilityReport> for pb::AvailabilityReport {
    fn from(r: &AvailabilityReport) -> Self {
        Self {
            availability: r.availability.iter().map(Into::into).collect(),
            tunnels: r.tunnels.iter().map(Into::into).collect(),
        }
    }
}

/// Characters that are kept of what a gateway says of a failed attempt.
const MAX_DIAL_ERROR: usize = 300;

impl TryFrom<common::TunnelStatus> for TunnelState {
    type Error = ConvertError;

    fn try_from(p: common::TunnelStatus) -> Result<Self> {
        check_label("gateway name", &p.gateway).map_err(|e| ConvertError::new("gateway", e.to_string()))?;
        let transport = match known::<common::Transport>("transport", p.transport)? {
            common::Transport::Quic | common::Transport::Unspecified => Transport::Quic,
            common::Transport::Tcp => Transport::Tcp,
        };
        Ok(Self {
            cluster: name("cluster", &p.cluster)?,
            gateway: p.gateway,
            up: p.up,
            rtt_us: p.rtt_us,
            transport,
            // These are for people to look at, and come with what is acted upon: nonsense is put right, not refused.
            downgraded: p.downgraded && transport == Transport::Tcp,
            loss_ppm: p.loss_ppm.min(MILLION),
            cwnd_bytes: p.cwnd_bytes,
            dial_error: p.dial_error.chars().filter(|c| !c.is_control()).take(MAX_DIAL_ERROR).collect(),
        })
    }
}

impl From<&TunnelState> for common::TunnelStatus {
    fn from(t: &TunnelState) -> Self {
        let transport = match t.transport {
            Transport::Quic => common::Transport::Quic,
            Transport::Tcp => common::Transport::Tcp,
        };
        Self {
            cluster: t.cluster.to_string(),
            gateway: t.gateway.clone(),
            up: t.up,
            rtt_us: t.rtt_us,
            transport: transport.into(),
            downgraded: t.downgraded,
            loss_ppm: t.loss_ppm,
            cwnd_bytes: t.cwnd_bytes,
            dial_error: t.dial_error.clone(),
        }
    }
}

/// An entry of a tunnel's availability update, where the cluster is not named: the peer's certificate names it.
pub fn own_availability(p: common::Availability) -> Result<(ServiceName, Availability)> {
    if !p.cluster.is_empty() {
        return Err(ConvertError::new("cluster", "must be empty; a gateway speaks only for its own cluster"));
    }
    let availability = counts(&p)?;
    Ok((required("service", p.service)?, availability))
}

impl TryFrom<pb::LocalEndpoints> for LocalEndpoints {
    type Error = ConvertError;

    fn try_from(p: pb::LocalEndpoints) -> Result<Self> {
        let services = unique("services", limits::EXPORTS, p.services, service_endpoints, |(name, _)| name.clone())?;
        Ok(Self { services: services.into_values().collect() })
    }
}

impl From<&LocalEndpoints> for pb::LocalEndpoints {
    fn from(e: &LocalEndpoints) -> Self {
        let service = |(name, endpoints): (&ServiceName, &Vec<Endpoint>)| pb::ServiceEndpoints {
            service: Some(name.into()),
            endpoints: endpoints.iter().map(Into::into).collect(),
        };
        Self { services: e.services.iter().map(service).collect() }
    }
}

/// The endpoints come out ordered by IP.
fn service_endpoints(p: pb::ServiceEndpoints) -> Result<(ServiceName, Vec<Endpoint>)> {
    let endpoints = unique("endpoints", limits::ENDPOINTS, p.endpoints, Endpoint::try_from, |e| e.ip)?;
    Ok((required("service", p.service)?, endpoints.into_values().collect()))
}

impl TryFrom<pb::Endpoint> for Endpoint {
    type Error = ConvertError;

    fn try_from(p: pb::Endpoint) -> Result<Self> {
        let endpoint_port = |p: pb::EndpointPort| Ok((name::<PortName>("name", &p.name)?, port("number", p.number)?));
        Ok(Self {
            ip: ip("ip", &p.ip)?,
            ports: unique("ports", limits::PORTS, p.ports, endpoint_port, |(name, _)| name.clone())?
                .into_values()
                .collect(),
            ready: p.ready,
            has_sidecar: p.has_sidecar,
            zone: name("zone", &p.zone)?,
        })
    }
}

impl From<&Endpoint> for pb::Endpoint {
    fn from(e: &Endpoint) -> Self {
        let port =
            |(name, number): (&PortName, &u16)| pb::EndpointPort { name: name.to_string(), number: (*number).into() };
        Self {
            ip: e.ip.to_string(),
            ports: e.ports.iter().map(port).collect(),
            ready: e.ready,
            has_sidecar: e.has_sidecar,
            zone: e.zone.to_string(),
        }
    }
}

impl TryFrom<pb::GatewayHello> for LocalGateway {
    type Error = ConvertError;

    fn try_from(p: pb::GatewayHello) -> Result<Self> {
        check_label("gateway name", &p.name).map_err(|e| ConvertError::new("name", e.to_string()))?;
        Ok(Self {
            name: p.name,
            tunnel: maybe_dialable("tunnel_address", &p.tunnel_address)?,
            local_ip: ip("local_ip", &p.local_ip)?,
            auto_port: port("auto_port", p.auto_port)?,
            pinned_port_base: port("pinned_port_base", p.pinned_port_base)?,
        })
    }
}

impl From<&LocalGateway> for pb::GatewayHello {
    fn from(g: &LocalGateway) -> Self {
        Self {
            name: g.name.clone(),
            tunnel_address: g.tunnel.map(|t| t.to_string()).unwrap_or_default(),
            local_ip: g.local_ip.to_string(),
            auto_port: g.auto_port.into(),
            pinned_port_base: g.pinned_port_base.into(),
            instance: String::new(),
        }
    }
}

impl TryFrom<pb::SidecarHello> for Sidecar {
    type Error = ConvertError;

    fn try_from(p: pb::SidecarHello) -> Result<Self> {
        check_label("sidecar name", &p.name).map_err(|e| ConvertError::new("name", e.to_string()))?;
        let upstream = |text: String| name::<ServiceName>("", &text);
        Ok(Self {
            name: p.name,
            address: ip("address", &p.address)?,
            inbound: unique("inbound", limits::PORTS, p.inbound, inbound, |(port, _)| *port)?.into_values().collect(),
            upstreams: unique("upstreams", limits::UPSTREAMS, p.upstreams, upstream, ServiceName::clone)?
                .into_keys()
                .collect(),
        })
    }
}

fn inbound(p: pb::InboundPort) -> Result<(u16, Inbound)> {
    let app = dialable("app", &p.app)?;
    if !app.ip().is_loopback() {
        // Else the app could be reached around its sidecar.
        return Err(ConvertError::new("app", format!("{app} is not a loopback address; the app must listen on one")));
    }
    Ok((port("port", p.port)?, Inbound { app, protocol: app_protocol("protocol", p.protocol)? }))
}

impl From<&Sidecar> for pb::SidecarHello {
    fn from(s: &Sidecar) -> Self {
        let inbound = |(port, i): (&u16, &Inbound)| pb::InboundPort {
            port: (*port).into(),
            app: i.app.to_string(),
            protocol: common::AppProtocol::from(i.protocol).into(),
        };
        Self {
            name: s.name.clone(),
            address: s.address.to_string(),
            inbound: s.inbound.iter().map(inbound).collect(),
            upstreams: s.upstreams.iter().map(ServiceName::to_string).collect(),
        }
    }
}

/// An address that one host can have.
fn ip(field: &str, text: &str) -> Result<IpAddr> {
    match text.parse::<IpAddr>() {
        Ok(ip) if !ip.is_unspecified() && !ip.is_multicast() => Ok(ip),
        _ => {
            let shown: String = text.chars().take(64).collect();
            Err(ConvertError::new(field, format!("{shown:?} is not the IP address of a host")))
        }
    }
}
