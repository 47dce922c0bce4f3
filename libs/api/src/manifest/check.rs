//! What an object's fields may hold, beyond their types: names, ports, addresses, sizes. Follows the Kubernetes API's own
//! validation for what Isthmus reads.

use std::{collections::BTreeSet, net::IpAddr};

use isthmus_model::{
    ids::{IdError, check_label},
    service::AppProtocol,
};
use k8s_openapi::{
    api::{
        core::v1::{Service, ServicePort},
        discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use super::document::Path;
use crate::convert::limits;

/// On an EndpointSlice: the Service that it belongs to.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// On a Service: the service accounts of the workloads behind it, comma-separated.
pub const SERVICE_ACCOUNTS_ANNOTATION: &str = "isthmus.io/service-accounts";

/// The Kubernetes API's own limits.
const MAX_SLICE_ENDPOINTS: usize = 1_000;
const MAX_SLICE_PORTS: usize = 100;

type Check = Result<(), Vec<(Path, String)>>;

/// How the app speaks on a port with this `appProtocol`. What is not known passes through as TCP, untouched.
pub fn app_protocol(app_protocol: Option<&str>) -> AppProtocol {
    match app_protocol {
        Some("http") => AppProtocol::Http,
        Some("grpc" | "kubernetes.io/h2c") => AppProtocol::Grpc,
        _ => AppProtocol::Tcp,
    }
}

/// The service accounts behind `service`: its annotation's, else one of the Service's own name.
pub fn service_accounts(service: &Service) -> BTreeSet<String> {
    let annotations = service.metadata.annotations.as_ref();
    match annotations.and_then(|a| a.get(SERVICE_ACCOUNTS_ANNOTATION)) {
        Some(list) => list.split(',').map(|account| account.trim().to_owned()).collect(),
        None => service.metadata.name.iter().cloned().collect(),
    }
}

/// Name and namespace are there and can be names.
pub(super) fn metadata(metadata: &ObjectMeta) -> Check {
    let mut problems = Problems::default();
    match metadata.name.as_deref() {
        None | Some("") => problems.add(Path::from(["metadata", "name"]), "is missing"),
        Some(name) if !is_subdomain(name) => problems.add(
            Path::from(["metadata", "name"]),
            format!("{name:.64?} is not a name; use up to 253 lower-case letters, digits, '-' and '.'"),
        ),
        Some(_) => {}
    }
    if let Some(namespace) = &metadata.namespace {
        problems.add_err(Path::from(["metadata", "namespace"]), check_label("namespace", namespace));
    }
    problems.into()
}

/// The name is an RFC 1123 label.
pub(super) fn label(metadata: &ObjectMeta, what: &'static str) -> Check {
    let mut problems = Problems::default();
    let name = metadata.name.as_deref().unwrap_or_default();
    problems.add_err(Path::from(["metadata", "name"]), check_label(what, name));
    problems.into()
}

pub(super) fn service(service: &Service) -> Check {
    label(&service.metadata, "service name")?;
    let mut problems = Problems::default();
    check_accounts(service, &mut problems);

    let Some(spec) = &service.spec else {
        problems.add(Path::from(["spec"]), "is missing");
        return problems.into();
    };
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    if !matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer" | "ExternalName") {
        let message = format!("{kind:.64?} is not a type; use ClusterIP, NodePort, LoadBalancer or ExternalName");
        problems.add(Path::from(["spec", "type"]), message);
    }
    let at = Path::from(["spec", "ports"]);
    let ports = spec.ports.as_deref().unwrap_or_default();
    let may_lack_ports = kind == "ExternalName" || spec.cluster_ip.as_deref() == Some("None");
    if ports.is_empty() && !may_lack_ports {
        problems.add(at.clone(), "is empty; a Service that is not headless has at least one port");
    }
    if ports.len() > limits::PORTS {
        problems.add(at, format!("has {} entries; at most {} are allowed", ports.len(), limits::PORTS));
        return problems.into();
    }
    let mut seen = Seen::default();
    for (i, port) in ports.iter().enumerate() {
        check_service_port(port, &at.clone().item(i), ports.len() > 1, &mut seen, &mut problems);
    }
    problems.into()
}

fn check_accounts(service: &Service, problems: &mut Problems) {
    let at = Path::from(["metadata", "annotations", SERVICE_ACCOUNTS_ANNOTATION]);
    let accounts = service_accounts(service);
    if accounts.len() > limits::IDENTITIES {
        let message = format!("names {} accounts; at most {} are allowed", accounts.len(), limits::IDENTITIES);
        return problems.add(at, message);
    }
    if let Some(bad) = accounts.iter().find(|account| !is_subdomain(account)) {
        problems.add(at, format!("{bad:.64?} is not the name of a service account; write names with commas between"));
    }
}

/// What earlier ports of the same Service use.
#[derive(Default)]
struct Seen<'a> {
    names: BTreeSet<&'a str>,
    numbers: BTreeSet<(&'a str, i32)>,
}

fn check_service_port<'a>(
    port: &'a ServicePort,
    at: &Path,
    name_required: bool,
    seen: &mut Seen<'a>,
    problems: &mut Problems,
) {
    let name = port.name.as_deref().unwrap_or_default();
    match name {
        "" if name_required => problems.add(at.clone().field("name"), "is missing; each of several ports needs one"),
        "" => {}
        name => problems.add_err(at.clone().field("name"), check_label("port name", name)),
    }
    if !name.is_empty() && !seen.names.insert(name) {
        problems.add(at.clone().field("name"), format!("{name:.64?} is there twice"));
    }
    problems.add_port(at.clone().field("port"), port.port);
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    if !matches!(protocol, "TCP" | "UDP" | "SCTP") {
        problems.add(at.clone().field("protocol"), format!("{protocol:.64?} is not a protocol; use TCP, UDP or SCTP"));
    }
    if !seen.numbers.insert((protocol, port.port)) {
        problems.add(at.clone().field("port"), format!("{} {protocol:.64} is there twice", port.port));
    }
    match &port.target_port {
        Some(IntOrString::Int(number)) => problems.add_port(at.clone().field("targetPort"), *number),
        Some(IntOrString::String(name)) => {
            problems.add_err(at.clone().field("targetPort"), check_label("port name", name));
        }
        None => {}
    }
}

pub(super) fn endpoint_slice(slice: &EndpointSlice) -> Check {
    let mut problems = Problems::default();
    let at = Path::from(["metadata", "labels", SERVICE_NAME_LABEL]);
    match slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL)) {
        None => problems.add(at, "is missing; it names the Service that the endpoints belong to"),
        Some(service) => problems.add_err(at, check_label("service name", service)),
    }
    let v4 = match slice.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        other => {
            problems.add(Path::from(["addressType"]), format!("{other:.64?} is not supported; use IPv4 or IPv6"));
            return problems.into();
        }
    };

    let ports = slice.ports.as_deref().unwrap_or_default();
    for (what, len, max) in
        [("ports", ports.len(), MAX_SLICE_PORTS), ("endpoints", slice.endpoints.len(), MAX_SLICE_ENDPOINTS)]
    {
        if len > max {
            problems.add(Path::from([what]), format!("has {len} entries; at most {max} are allowed"));
            return problems.into();
        }
    }
    let mut names = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        check_slice_port(port, &Path::from(["ports"]).item(i), &mut names, &mut problems);
    }
    for (i, endpoint) in slice.endpoints.iter().enumerate() {
        check_endpoint(endpoint, v4, &Path::from(["endpoints"]).item(i), &mut problems);
    }
    problems.into()
}

fn check_slice_port<'a>(port: &'a EndpointPort, at: &Path, names: &mut BTreeSet<&'a str>, problems: &mut Problems) {
    let name = port.name.as_deref().unwrap_or_default();
    if !name.is_empty() {
        problems.add_err(at.clone().field("name"), check_label("port name", name));
    }
    if !names.insert(name) {
        problems.add(at.clone().field("name"), format!("{name:.64?} is there twice"));
    }
    match port.port {
        Some(number) => problems.add_port(at.clone().field("port"), number),
        None => problems.add(at.clone().field("port"), "is missing"),
    }
}

fn check_endpoint(endpoint: &Endpoint, v4: bool, at: &Path, problems: &mut Problems) {
    let at_addresses = at.clone().field("addresses");
    // Kubernetes reads the first address only, too; the rest has no meaning there.
    match endpoint.addresses.as_slice() {
        [] => problems.add(at_addresses, "is empty"),
        [address] => {
            let at = at_addresses.item(0);
            match address.parse::<IpAddr>() {
                Err(_) => problems.add(at, format!("{address:.64?} is not an IP address")),
                Ok(ip) if ip.is_ipv4() != v4 => problems.add(at, format!("{ip} is not of the slice's addressType")),
                Ok(ip) if ip.is_unspecified() || ip.is_multicast() => {
                    problems.add(at, format!("{ip} is not the address of a host"));
                }
                Ok(_) => {}
            }
        }
        more => problems.add(at_addresses, format!("has {} entries; write one endpoint per address", more.len())),
    }
    if let Some(zone) = endpoint.zone.as_deref().filter(|z| !z.is_empty()) {
        problems.add_err(at.clone().field("zone"), check_label("zone", zone));
    }
    if let Some(hostname) = &endpoint.hostname {
        problems.add_err(at.clone().field("hostname"), check_label("hostname", hostname));
    }
}

/// RFC 1123 subdomain: labels with dots between, at most 253 bytes.
fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(|label| check_label("", label).is_ok())
}

/// All that is wrong with one object, up to a handful.
#[derive(Default)]
struct Problems(Vec<(Path, String)>);

impl Problems {
    fn add(&mut self, at: Path, message: impl Into<String>) {
        const MAX_PROBLEMS: usize = 16;
        if self.0.len() < MAX_PROBLEMS {
            self.0.push((at, message.into()));
        }
    }

    fn add_err(&mut self, at: Path, result: Result<(), IdError>) {
        if let Err(e) = result {
            self.add(at, e.to_string());
        }
    }

    fn add_port(&mut self, at: Path, number: i32) {
        if !(1..=65_535).contains(&number) {
            self.add(at, format!("{number} is not a port; use 1 to 65535"));
        }
    }
}

impl From<Problems> for Check {
    fn from(problems: Problems) -> Self {
        if problems.0.is_empty() { Ok(()) } else { Err(problems.0) }
    }
}
