//! What agents tell the control plane: publications (intent, replicated) and status (for people, kept in memory).

use isthmus_model::{
    availability::Report,
    ids::{Stamp, check_label},
    local::TunnelReport,
    service::{Export, Publication, ServicePort},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::{
    ConvertError, Result, at_most,
    common::{gateways, known, service_kind},
    global::identities,
    limits, list, optional, required, text, unique,
};
use crate::proto::{common::v1 as common, federation::v1 as pb};

impl TryFrom<pb::Export> for Export {
    type Error = ConvertError;

    fn try_from(p: pb::Export) -> Result<Self> {
        Ok(Self {
            service: required("service", p.service)?,
            created_at: Timestamp(p.created_at_unix_ms),
            kind: service_kind("kind", p.kind)?,
            ports: ports(p.ports)?,
            identities: identities(p.identities)?,
        })
    }
}

/// Ports in the order sent; as in Kubernetes, names are unique, several ports need names, and a (protocol, number)
/// stands only once. Every protocol here is TCP below.
fn ports(items: Vec<common::ServicePort>) -> Result<Vec<ServicePort>> {
    let ports = list("ports", limits::PORTS, items, ServicePort::try_from)?;
    for (i, port) in ports.iter().enumerate() {
        let earlier = ports.get(..i).unwrap_or_default();
        let fail = |field, message: String| Err(ConvertError::new(format!("ports[{i}].{field}"), message));
        if ports.len() > 1 && port.name.as_str().is_empty() {
            return fail("name", "is empty; each of several ports needs a name".to_owned());
        }
        if earlier.iter().any(|p| p.name == port.name) {
            return fail("name", format!("{} is there twice", port.name));
        }
        if earlier.iter().any(|p| p.number == port.number) {
            return fail("number", format!("{} is there twice", port.number));
        }
    }
    Ok(ports)
}

impl From<&Export> for pb::Export {
    fn from(e: &Export) -> Self {
        Self {
            service: Some((&e.service).into()),
            created_at_unix_ms: e.created_at.0,
            kind: common::ServiceKind::from(e.kind).into(),
            ports: e.ports.iter().map(Into::into).collect(),
            identities: e.identities.iter().map(ToString::to_string).collect(),
        }
    }
}

impl TryFrom<pb::Publication> for Publication {
    type Error = ConvertError;

    fn try_from(p: pb::Publication) -> Result<Self> {
        let publication = Self {
            bundle: required("bundle", p.bundle)?,
            gateways: gateways("gateways", p.gateways)?,
            exports: unique("exports", limits::EXPORTS, p.exports, Export::try_from, |e| e.service.clone())?,
        };
        let own = &publication.bundle.trust_domain;
        for (service, export) in &publication.exports {
            // A cluster cannot name identities that its own bundle does not vouch for.
            if let Some(id) = export.identities.iter().find(|id| id.trust_domain() != own) {
                let message = format!("{service} names {id}, which is outside the cluster's trust domain {own}");
                return Err(ConvertError::new("exports", message));
            }
        }
        Ok(publication)
    }
}

impl From<&Publication> for pb::Publication {
    fn from(p: &Publication) -> Self {
        Self {
            exports: p.exports.values().map(Into::into).collect(),
            gateways: p.gateways.iter().map(Into::into).collect(),
            bundle: Some((&p.bundle).into()),
        }
    }
}

/// What consumes the global state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsumerKind {
    /// The cluster's agent.
    Agent,
    /// A gateway.
    Gateway,
    /// A DNS server.
    Dns,
    /// An Envoy.
    Sidecar,
}

/// Where one consumer of the global state stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsumerStatus {
    /// What it is.
    pub kind: ConsumerKind,
    /// Unique within its cluster and kind.
    pub name: String,
    /// What it has applied; `None`: nothing yet.
    pub applied: Option<Stamp>,
    /// Its agent hears from it.
    pub connected: bool,
    /// What it refused, in its own words.
    pub problems: Vec<String>,
}

/// Something a person must mend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// File or object, with line where known: "cart.yaml:14".
    pub at: String,
    /// Dotted path, empty if not about one field.
    pub field: String,
    /// What is wrong and what to do.
    pub message: String,
}

/// What an agent says for people to look at; nothing decides from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The cluster's consumers.
    pub consumers: Vec<ConsumerStatus>,
    /// What its gateways observe.
    pub availability: Vec<Report>,
    /// Bad manifests and the like.
    pub problems: Vec<Problem>,
    /// Where its gateways' tunnels stand.
    pub tunnels: Vec<TunnelReport>,
}

impl TryFrom<pb::TunnelReport> for TunnelReport {
    type Error = ConvertError;

    fn try_from(p: pb::TunnelReport) -> Result<Self> {
        check_label("gateway name", &p.from).map_err(|e| ConvertError::new("from", e.to_string()))?;
        Ok(Self { from: p.from, tunnel: required("tunnel", p.tunnel)? })
    }
}

impl From<&TunnelReport> for pb::TunnelReport {
    fn from(t: &TunnelReport) -> Self {
        Self { from: t.from.clone(), tunnel: Some((&t.tunnel).into()) }
    }
}

impl TryFrom<common::ConsumerStatus> for ConsumerStatus {
    type Error = ConvertError;

    fn try_from(p: common::ConsumerStatus) -> Result<Self> {
        let kind = match known::<common::ConsumerKind>("kind", p.kind)? {
            common::ConsumerKind::Agent => ConsumerKind::Agent,
            common::ConsumerKind::Gateway => ConsumerKind::Gateway,
            common::ConsumerKind::Dns => ConsumerKind::Dns,
            common::ConsumerKind::Sidecar => ConsumerKind::Sidecar,
            common::ConsumerKind::Unspecified => return Err(ConvertError::new("kind", "is not specified")),
        };
        check_label("consumer name", &p.name).map_err(|e| ConvertError::new("name", e.to_string()))?;
        at_most("problems", limits::CONSUMER_PROBLEMS, p.problems.len())?;
        Ok(Self {
            kind,
            name: p.name,
            applied: optional("applied", p.applied)?,
            connected: p.connected,
            problems: p.problems.into_iter().map(text).collect(),
        })
    }
}

impl From<&ConsumerStatus> for common::ConsumerStatus {
    fn from(s: &ConsumerStatus) -> Self {
        let kind = match s.kind {
            ConsumerKind::Agent => common::ConsumerKind::Agent,
            ConsumerKind::Gateway => common::ConsumerKind::Gateway,
            ConsumerKind::Dns => common::ConsumerKind::Dns,
            ConsumerKind::Sidecar => common::ConsumerKind::Sidecar,
        };
        Self {
            kind: kind.into(),
            name: s.name.clone(),
            applied: s.applied.map(Into::into),
            connected: s.connected,
            problems: s.problems.clone(),
        }
    }
}

impl TryFrom<pb::Status> for Status {
    type Error = ConvertError;

    fn try_from(p: pb::Status) -> Result<Self> {
        Ok(Self {
            consumers: list("consumers", limits::STATUS, p.consumers, ConsumerStatus::try_from)?,
            availability: list("availability", limits::AVAILABILITY, p.availability, Report::try_from)?,
            problems: list("problems", limits::STATUS, p.problems, |p| {
                Ok(Problem { at: text(p.at), field: text(p.field), message: text(p.message) })
            })?,
            tunnels: list("tunnels", limits::TUNNELS, p.tunnels, TunnelReport::try_from)?,
        })
    }
}

impl From<&Status> for pb::Status {
    fn from(s: &Status) -> Self {
        let problem =
            |p: &Problem| common::Problem { at: p.at.clone(), field: p.field.clone(), message: p.message.clone() };
        Self {
            consumers: s.consumers.iter().map(Into::into).collect(),
            availability: s.availability.iter().map(Into::into).collect(),
            problems: s.problems.iter().map(problem).collect(),
            tunnels: s.tunnels.iter().map(Into::into).collect(),
        }
    }
}
