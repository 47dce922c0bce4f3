//! Which address everything has. All loopback: the control plane at 127.1.0.1, cluster i in 127.1.i.0/24, its VIPs in
//! 127.(63+i).0.0/16, apps on 127.0.0.1. `Base` shifts the second octet, so that two federations can run at once.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use crate::shop::web::ports;

/// The federation's trust domain.
pub const FEDERATION: &str = "isthmus.example";

const HEALTH: u16 = 9900;
const CP_GRPC: u16 = 7443;
const CP_ADMIN: u16 = 7444;
const AGENT_LOCAL: u16 = 7500;
const TUNNEL: u16 = 15443;
const AUTO: u16 = 15440;
const PINNED: u16 = 15500;
const DNS: u16 = 5353;
/// Envoy's admin page, at its sidecar's address.
pub const SIDECAR_ADMIN: u16 = 9902;

/// Shifts all addresses of one federation: 0 is the demo's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Base(pub u8);

impl Base {
    fn host(self, third: u8, fourth: u8) -> IpAddr {
        Ipv4Addr::new(127, 1 + self.0, third, fourth).into()
    }

    /// Apps have ports of their own on 127.0.0.1.
    fn app(self, cluster: u8, app: u8) -> SocketAddr {
        let port = 18_000 + u16::from(self.0) * 1000 + u16::from(cluster) * 100 + u16::from(app);
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)
    }
}

/// The control plane's addresses.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each field is the address of its name")]
pub struct ControlPlaneLayout {
    pub grpc: SocketAddr,
    pub admin: SocketAddr,
    pub health: SocketAddr,
}

impl ControlPlaneLayout {
    /// In the federation `base`.
    pub fn new(base: Base) -> Self {
        let at = |port| SocketAddr::new(base.host(0, 1), port);
        Self { grpc: at(CP_GRPC), admin: at(CP_ADMIN), health: at(HEALTH) }
    }

    /// The control plane's configuration file.
    pub fn config(&self, state: &Path, hold_down: Duration) -> String {
        let Self { grpc, admin, health } = self;
        format!(
            "node: cp-1\nfederation: {FEDERATION}\nstateDir: {state}\n\
             listen: {{ grpc: \"{grpc}\", admin: \"{admin}\", health: \"{health}\" }}\n\
             advertise: \"{grpc}\"\n\
             settings: {{ failover: {{ holdDownMs: {hold} }} }}\n\
             telemetry: {{ log: {{ level: info, format: json }} }}\n",
            state = state.display(),
            hold = hold_down.as_millis(),
        )
    }
}

/// One workload: an app behind a sidecar.
#[derive(Clone, Debug)]
pub struct WorkloadLayout {
    /// Service, service account and app.
    pub app: &'static str,
    /// For example "cart-1".
    pub instance: String,
    /// The sidecar's address.
    pub ip: IpAddr,
    /// (name of the Service's port, number at Service and sidecar, app's address, appProtocol).
    pub ports: Vec<(&'static str, u16, SocketAddr, &'static str)>,
    /// Services it calls.
    pub upstreams: Vec<&'static str>,
    /// The launcher's health address.
    pub health: SocketAddr,
}

/// One cluster's addresses.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each field is what its name says")]
pub struct ClusterLayout {
    pub base: Base,
    pub name: String,
    pub number: u8,
    pub region: String,
    pub agent: SocketAddr,
    pub agent_health: SocketAddr,
    pub dns: SocketAddr,
    pub dns_health: SocketAddr,
    /// gateway-1, gateway-2.
    pub gateways: Vec<GatewayLayout>,
    pub workloads: Vec<WorkloadLayout>,
}

/// One gateway's addresses.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each field is what its name says")]
pub struct GatewayLayout {
    pub name: String,
    pub tunnel: SocketAddr,
    pub local: IpAddr,
    pub auto_port: u16,
    pub pinned_port_base: u16,
    pub health: SocketAddr,
}

impl ClusterLayout {
    /// Cluster `number` (from 1) of the federation `base`, with two gateways and the shop's four workloads.
    pub fn new(base: Base, name: &str, number: u8, region: &str) -> Self {
        let host = |fourth| base.host(number, fourth);
        let gateway = |i: u8| GatewayLayout {
            name: format!("gateway-{i}"),
            tunnel: SocketAddr::new(host(10 + i), TUNNEL),
            local: host(10 + i),
            auto_port: AUTO,
            pinned_port_base: PINNED,
            health: SocketAddr::new(host(10 + i), HEALTH),
        };
        let app = |i| base.app(number, i);
        let workload = |i: u8, app: &'static str, ports, upstreams| WorkloadLayout {
            app,
            instance: format!("{app}-1"),
            ip: host(20 + i),
            ports,
            upstreams,
            health: SocketAddr::new(host(20 + i), HEALTH),
        };
        let workloads = vec![
            workload(1, "web", vec![("http", ports::WEB, app(1), "http")], vec!["cart", "catalog", "orders"]),
            workload(2, "cart", vec![("http", ports::CART, app(2), "http")], vec![]),
            workload(
                3,
                "catalog",
                vec![("http", ports::CATALOG, app(3), "http"), ("grpc", ports::CATALOG_GRPC, app(4), "grpc")],
                vec![],
            ),
            workload(4, "orders", vec![("orders", ports::ORDERS, app(5), "tcp")], vec![]),
        ];
        Self {
            base,
            name: name.to_owned(),
            number,
            region: region.to_owned(),
            agent: SocketAddr::new(host(1), AGENT_LOCAL),
            agent_health: SocketAddr::new(host(1), HEALTH),
            dns: SocketAddr::new(host(2), DNS),
            dns_health: SocketAddr::new(host(2), HEALTH),
            gateways: vec![gateway(1), gateway(2)],
            workloads,
        }
    }

    /// The first two octets of this cluster's VIPs.
    pub fn vip_prefix(&self) -> String {
        format!("127.{}.", 63 + self.number + self.base.0 * 8)
    }

    /// The cluster's zone.
    pub fn zone(&self) -> String {
        format!("{}-1", self.name)
    }

    /// The agent's configuration file.
    pub fn agent_config(&self, dir: &Path) -> String {
        let Self { name, region, agent, agent_health, .. } = self;
        format!(
            "cluster: {name}\ntrustDomain: {name}.example\nlocality: {{ region: {region}, zone: {zone} }}\n\
             stateDir: {state}\nmanifests: {manifests}\njoinTokenFile: {token}\n\
             listen: {{ local: \"{agent}\", health: \"{agent_health}\" }}\nadvertise: \"{agent}\"\n\
             vipRange: {vips}0.0/16\ntelemetry: {{ log: {{ level: info, format: json }} }}\n",
            zone = self.zone(),
            state = dir.join("agent").display(),
            manifests = dir.join("manifests").display(),
            token = dir.join("join-token").display(),
            vips = self.vip_prefix(),
        )
    }

    /// A gateway's configuration file.
    pub fn gateway_config(gateway: &GatewayLayout, dir: &Path) -> String {
        let GatewayLayout { name, tunnel, local, auto_port, pinned_port_base, health } = gateway;
        format!(
            "name: {name}\nstateDir: {state}\nagentTokenFile: {token}\n\
             listen:\n  tunnel: \"{tunnel}\"\n  local: \"{local}\"\n  autoPort: {auto_port}\n  \
             pinnedPortBase: {pinned_port_base}\n  health: \"{health}\"\n\
             telemetry: {{ log: {{ level: info, format: json }} }}\n",
            state = dir.join(name).display(),
            token = dir.join(format!("{name}.token")).display(),
        )
    }

    /// The DNS server's configuration file.
    pub fn dns_config(&self, dir: &Path) -> String {
        let Self { dns, dns_health, .. } = self;
        format!(
            "name: dns-1\nstateDir: {state}\nagentTokenFile: {token}\n\
             listen: {{ dns: \"{dns}\", health: \"{dns_health}\" }}\nupstreams: []\n\
             telemetry: {{ log: {{ level: info, format: json }} }}\n",
            state = dir.join("dns-1").display(),
            token = dir.join("dns-1.token").display(),
        )
    }

    /// A sidecar launcher's configuration file.
    pub fn sidecar_config(workload: &WorkloadLayout, dir: &Path, envoy: &Path) -> String {
        let WorkloadLayout { instance, ip, ports, upstreams, health, .. } = workload;
        let mut text = format!(
            "name: {instance}\nagentTokenFile: {token}\nstateDir: {state}\nenvoy: {envoy}\naddress: \"{ip}\"\n\
             adminPort: {SIDECAR_ADMIN}\nlisten: {{ health: \"{health}\" }}\n\
             telemetry: {{ log: {{ level: info, format: json }} }}\ninbound:\n",
            token = dir.join(format!("{instance}.token")).display(),
            state = dir.join(instance).display(),
            envoy = envoy.display(),
        );
        for (_, port, app, protocol) in ports {
            text += &format!("  - {{ port: {port}, app: \"{app}\", protocol: {protocol} }}\n");
        }
        let upstreams: Vec<String> = upstreams.iter().map(|u| format!("shop/{u}")).collect();
        text + &format!("upstreams: [{}]\n", upstreams.join(", "))
    }
}
