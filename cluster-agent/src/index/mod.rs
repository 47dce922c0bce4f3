//! Objects → what this cluster exports, and where its Services' endpoints are. Pure.
//!
//! In: the objects of all files, and when each export was first seen. Out: an [`Index`], the same for the same input in
//! any order of arrival. An object that does not fit is left out with a problem and never hides another. It knows
//! nothing of sidecars: [`endpoints`] joins them.

pub mod endpoints;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use isthmus_api::{
    convert::Problem,
    manifest::{Object, SERVICE_ACCOUNTS_ANNOTATION, SERVICE_NAME_LABEL, app_protocol, service_accounts},
};
use isthmus_model::{
    ids::{PortName, ServiceName, SpiffeId, TrustDomain, Zone},
    service::{Export, ServiceKind, ServicePort},
    time::Timestamp,
};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};

use crate::status::problem;

/// What the cluster's objects say together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Index {
    /// Opted in by a ServiceExport, with a Service that can be exported.
    pub exports: BTreeMap<ServiceName, Export>,
    /// Every Service, exported or not.
    pub services: BTreeMap<ServiceName, Service>,
    /// Objects that do not fit together.
    pub problems: Vec<Problem>,
}

/// A Service with its endpoints as the EndpointSlices list them.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// ClusterIP-like or headless.
    pub kind: ServiceKind,
    /// TCP ports in the manifest's order.
    pub ports: Vec<ServicePort>,
    /// Who may answer for it.
    pub identities: BTreeSet<SpiffeId>,
    /// By IP.
    pub endpoints: BTreeMap<IpAddr, SliceEndpoint>,
}

/// One address of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Service port name → port at the endpoint.
    pub ports: BTreeMap<PortName, u16>,
    /// The slice's `ready` condition; absent means ready (Kubernetes API).
    pub ready: bool,
    /// Empty if unknown.
    pub zone: Option<Zone>,
}

/// What the index needs besides the objects.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The cluster's own.
    pub trust_domain: &'a TrustDomain,
    /// When each export without a creationTimestamp was first seen.
    pub first_seen: &'a BTreeMap<ServiceName, Timestamp>,
    /// For those never seen before.
    pub now: Timestamp,
}

/// Builds the index. Of an object that is in two files, the file first by name wins.
pub fn build(files: &BTreeMap<String, Arc<[Object]>>, context: Context<'_>) -> Index {
    let mut problems = Vec::new();
    let objects = unique(files, &mut problems);
    let mut index = Index::default();
    for (file, object) in &objects {
        if let Object::Service(service) = object {
            let at = format!("{file}: {}", object.reference());
            match take_service(service, context.trust_domain, &at, &mut problems) {
                Ok(Some((name, service))) => drop(index.services.insert(name, service)),
                // An ExternalName Service matters only if somebody exports it.
                Ok(None) => {}
                Err(message) => problems.push(problem(at, message)),
            }
        }
    }
    for (file, object) in &objects {
        let at = format!("{file}: {}", object.reference());
        let outcome = match object {
            Object::EndpointSlice(slice) => take_slice(slice, &mut index.services, &at, &mut problems),
            Object::ServiceExport(_) => take_export(object, &objects, &index.services, context)
                .map(|e| drop(index.exports.insert(e.service.clone(), e))),
            Object::Service(_) | Object::Namespace(_) => Ok(()),
        };
        if let Err(message) = outcome {
            problems.push(problem(at, message));
        }
    }
    index.problems = problems;
    index
}

/// Every object once, with its file.
fn unique<'a>(files: &'a BTreeMap<String, Arc<[Object]>>, problems: &mut Vec<Problem>) -> Vec<(&'a str, &'a Object)> {
    let mut first = BTreeMap::new();
    let mut objects = Vec::new();
    for (file, object) in files.iter().flat_map(|(file, objects)| objects.iter().map(move |o| (file.as_str(), o))) {
        let reference = object.reference();
        match first.get(&reference) {
            Some(winner) => {
                problems
                    .push(problem(file, format!("{reference} is also in {winner}, which counts; remove one of them")));
            }
            None => {
                first.insert(reference, file);
                objects.push((file, object));
            }
        }
    }
    objects
}

fn take_service(
    service: &core::Service,
    trust_domain: &TrustDomain,
    at: &str,
    problems: &mut Vec<Problem>,
) -> Result<Option<(ServiceName, Service)>, String> {
    let meta = &service.metadata;
    let name = service_name(meta.namespace.as_deref(), meta.name.as_deref())?;
    let spec = service.spec.clone().unwrap_or_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        return Ok(None);
    }
    let mut ports = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        match take_port(port) {
            Ok(port) => ports.push(port),
            Err((field, message)) => {
                problems.push(Problem { at: at.to_owned(), field: format!("spec.ports[{i}].{field}"), message })
            }
        }
    }
    let kind = match spec.cluster_ip.as_deref() {
        Some("None") => ServiceKind::Headless,
        _ => ServiceKind::ClusterSetIp,
    };
    let identity = |account: String| {
        SpiffeId::workload(trust_domain, &name.namespace, &account)
            .map_err(|e| format!("annotation {SERVICE_ACCOUNTS_ANNOTATION}: {e}"))
    };
    let identities = service_accounts(service).into_iter().map(identity).collect::<Result<_, _>>()?;
    Ok(Some((name, Service { kind, ports, identities, endpoints: BTreeMap::new() })))
}

fn take_port(port: &core::ServicePort) -> Result<ServicePort, (&'static str, String)> {
    if let Some(protocol) = port.protocol.as_deref().filter(|p| *p != "TCP") {
        return Err((
            "protocol",
            format!("{protocol} is not carried between clusters, only TCP; the port is left out"),
        ));
    }
    let number = u16::try_from(port.port).ok().filter(|n| *n > 0);
    Ok(ServicePort {
        name: port_name(port.name.as_deref()).map_err(|e| ("name", e))?,
        number: number.ok_or_else(|| ("port", format!("{} is not a port; use 1 to 65535", port.port)))?,
        protocol: app_protocol(port.app_protocol.as_deref()),
    })
}

fn take_slice(
    slice: &discovery::EndpointSlice,
    services: &mut BTreeMap<ServiceName, Service>,
    at: &str,
    problems: &mut Vec<Problem>,
) -> Result<(), String> {
    let meta = &slice.metadata;
    let owner = meta.labels.as_ref().and_then(|l| l.get(SERVICE_NAME_LABEL));
    let owner = owner.ok_or_else(|| format!("has no label {SERVICE_NAME_LABEL}, so it belongs to no Service"))?;
    let name = service_name(meta.namespace.as_deref(), Some(owner))?;
    let service = services.get_mut(&name).ok_or_else(|| format!("there is no Service {name}"))?;
    let mut ports = BTreeMap::new();
    for port in slice.ports.iter().flatten() {
        let Some(number) = port.port.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0) else { continue };
        let port_name = port_name(port.name.as_deref())?;
        if service.ports.iter().any(|p| p.name == port_name) {
            ports.insert(port_name, number);
        }
    }
    if ports.is_empty() && !slice.endpoints.is_empty() {
        return Err(format!("none of its ports has the name of a port of Service {name}"));
    }
    for (i, endpoint) in slice.endpoints.iter().enumerate() {
        // Consumers use the first address only (Kubernetes API).
        let Some(address) = endpoint.addresses.first() else { continue };
        let Ok(ip) = address.parse() else {
            problems.push(Problem {
                at: at.to_owned(),
                field: format!("endpoints[{i}].addresses[0]"),
                message: format!("{address:?} is not an IP address"),
            });
            continue;
        };
        let entry = service.endpoints.entry(ip).or_default();
        entry.ports.extend(ports.clone());
        entry.ready |= endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
        entry.zone = endpoint.zone.as_deref().and_then(|z| z.parse().ok()).or(entry.zone.take());
    }
    Ok(())
}

fn take_export(
    object: &Object,
    objects: &[(&str, &Object)],
    services: &BTreeMap<ServiceName, Service>,
    context: Context<'_>,
) -> Result<Export, String> {
    let Object::ServiceExport(export) = object else { return Err("is not a ServiceExport".to_owned()) };
    let service_name = service_name(export.metadata.namespace.as_deref(), export.metadata.name.as_deref())?;
    let Some(service) = services.get(&service_name) else {
        let same = |o: &Object| matches!(o, Object::Service(s) if s.metadata.name == export.metadata.name && s.metadata.namespace == export.metadata.namespace);
        return Err(match objects.iter().any(|(_, o)| same(o)) {
            true => format!(
                "ServiceExport is not Valid (InvalidServiceType): Service {service_name} cannot be exported; \
                 ExternalName has no endpoints"
            ),
            false => format!("ServiceExport is not Valid (NoService): there is no Service {service_name}"),
        });
    };
    if service.ports.is_empty() {
        return Err(format!("ServiceExport is not Valid: Service {service_name} has no TCP port"));
    }
    let created = export.metadata.creation_timestamp.as_ref().and_then(|t| u64::try_from(t.0.as_millisecond()).ok());
    let created_at = created.map_or_else(
        || context.first_seen.get(&service_name).copied().unwrap_or(context.now),
        // Not from the future: the oldest wins conflicts, and clocks differ.
        |t| Timestamp(t).min(context.now),
    );
    Ok(Export {
        service: service_name,
        created_at,
        kind: service.kind,
        ports: service.ports.clone(),
        identities: service.identities.clone(),
    })
}

fn service_name(namespace: Option<&str>, name: Option<&str>) -> Result<ServiceName, String> {
    ServiceName::new(namespace.unwrap_or("default"), name.unwrap_or_default()).map_err(|e| e.to_string())
}

fn port_name(name: Option<&str>) -> Result<PortName, String> {
    name.unwrap_or_default().parse().map_err(|e: isthmus_model::ids::IdError| e.to_string())
}

#[cfg(test)]
mod tests;
