//! The small messages of `common.proto` ↔ [`isthmus_model`]: stamps, names, ports, bundles, localities, policies.

use std::{net::SocketAddr, time::Duration};

use isthmus_model::{
    availability::{Availability, Report},
    failover::FailoverPolicy,
    global::{Locality, Settings, WithdrawalPolicy},
    ids::{Epoch, Region, Revision, ServiceName, Stamp, check_label},
    service::{AppProtocol, GatewayAddress, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};

use super::{ConvertError, Result, limits, name, optional, port, required, unique};
use crate::proto::common::v1 as pb;

impl TryFrom<pb::Stamp> for Stamp {
    type Error = ConvertError;

    fn try_from(p: pb::Stamp) -> Result<Self> {
        Ok(Self { epoch: Epoch(p.epoch), revision: Revision(p.revision) })
    }
}

impl From<Stamp> for pb::Stamp {
    fn from(s: Stamp) -> Self {
        Self { epoch: s.epoch.0, revision: s.revision.0 }
    }
}

impl TryFrom<pb::ServiceName> for ServiceName {
    type Error = ConvertError;

    fn try_from(p: pb::ServiceName) -> Result<Self> {
        check_label("namespace", &p.namespace).map_err(|e| ConvertError::new("namespace", e.to_string()))?;
        Self::new(&p.namespace, &p.name).map_err(|e| ConvertError::new("name", e.to_string()))
    }
}

impl From<&ServiceName> for pb::ServiceName {
    fn from(n: &ServiceName) -> Self {
        Self { namespace: n.namespace.to_string(), name: n.name().to_owned() }
    }
}

impl From<ServiceName> for pb::ServiceName {
    fn from(n: ServiceName) -> Self {
        Self::from(&n)
    }
}

impl From<AppProtocol> for pb::AppProtocol {
    fn from(p: AppProtocol) -> Self {
        match p {
            AppProtocol::Tcp => Self::Tcp,
            AppProtocol::Http => Self::Http,
            AppProtocol::Grpc => Self::Grpc,
        }
    }
}

impl TryFrom<pb::AppProtocol> for AppProtocol {
    type Error = ConvertError;

    fn try_from(p: pb::AppProtocol) -> Result<Self> {
        match p {
            pb::AppProtocol::Tcp => Ok(Self::Tcp),
            pb::AppProtocol::Http => Ok(Self::Http),
            pb::AppProtocol::Grpc => Ok(Self::Grpc),
            pb::AppProtocol::Unspecified => Err(ConvertError::new("", "is not specified; use tcp, http or grpc")),
        }
    }
}

/// An `AppProtocol` field as prost holds it.
pub(super) fn app_protocol(field: &str, value: i32) -> Result<AppProtocol> {
    known::<pb::AppProtocol>(field, value)?.try_into().map_err(|e: ConvertError| e.within(field))
}

impl From<ServiceKind> for pb::ServiceKind {
    fn from(k: ServiceKind) -> Self {
        match k {
            ServiceKind::ClusterSetIp => Self::ClusterSetIp,
            ServiceKind::Headless => Self::Headless,
        }
    }
}

impl TryFrom<pb::ServiceKind> for ServiceKind {
    type Error = ConvertError;

    fn try_from(k: pb::ServiceKind) -> Result<Self> {
        match k {
            pb::ServiceKind::ClusterSetIp => Ok(Self::ClusterSetIp),
            pb::ServiceKind::Headless => Ok(Self::Headless),
            pb::ServiceKind::Unspecified => {
                Err(ConvertError::new("", "is not specified; use cluster-set-IP or headless"))
            }
        }
    }
}

/// A `ServiceKind` field as prost holds it.
pub(super) fn service_kind(field: &str, value: i32) -> Result<ServiceKind> {
    known::<pb::ServiceKind>(field, value)?.try_into().map_err(|e: ConvertError| e.within(field))
}

/// An enum field's number, if this version knows it.
pub(super) fn known<E: TryFrom<i32>>(field: &str, value: i32) -> Result<E> {
    E::try_from(value).map_err(|_| ConvertError::new(field, format!("{value} is not a value that this version knows")))
}

impl TryFrom<pb::ServicePort> for ServicePort {
    type Error = ConvertError;

    fn try_from(p: pb::ServicePort) -> Result<Self> {
        Ok(Self {
            name: name("name", &p.name)?,
            number: port("number", p.number)?,
            protocol: app_protocol("protocol", p.protocol)?,
        })
    }
}

impl From<&ServicePort> for pb::ServicePort {
    fn from(p: &ServicePort) -> Self {
        Self { name: p.name.to_string(), number: p.number.into(), protocol: pb::AppProtocol::from(p.protocol).into() }
    }
}

impl TryFrom<pb::TrustBundle> for TrustBundle {
    type Error = ConvertError;

    fn try_from(p: pb::TrustBundle) -> Result<Self> {
        let too_long = |field, len, max| ConvertError::new(field, format!("{len} bytes; at most {max} are allowed"));
        if p.document.len() > limits::BUNDLE_BYTES {
            return Err(too_long("document", p.document.len(), limits::BUNDLE_BYTES));
        }
        if p.predecessor_signature.len() > limits::SIGNATURE_BYTES {
            return Err(too_long("predecessor_signature", p.predecessor_signature.len(), limits::SIGNATURE_BYTES));
        }
        Ok(Self {
            trust_domain: name("trust_domain", &p.trust_domain)?,
            document: String::from_utf8(p.document).map_err(|_| ConvertError::new("document", "is not UTF-8"))?,
            predecessor_signature: p.predecessor_signature,
        })
    }
}

impl From<&TrustBundle> for pb::TrustBundle {
    fn from(b: &TrustBundle) -> Self {
        Self {
            trust_domain: b.trust_domain.to_string(),
            document: b.document.clone().into_bytes(),
            predecessor_signature: b.predecessor_signature.clone(),
        }
    }
}

impl TryFrom<pb::GatewayAddress> for GatewayAddress {
    type Error = ConvertError;

    fn try_from(p: pb::GatewayAddress) -> Result<Self> {
        check_label("gateway name", &p.name).map_err(|e| ConvertError::new("name", e.to_string()))?;
        Ok(Self { tunnel: maybe_dialable("tunnel", &p.tunnel)?, name: p.name })
    }
}

impl From<&GatewayAddress> for pb::GatewayAddress {
    fn from(a: &GatewayAddress) -> Self {
        Self { name: a.name.clone(), tunnel: a.tunnel.map(|t| t.to_string()).unwrap_or_default() }
    }
}

/// Gateways of one cluster, sorted by name, each name once.
pub(super) fn gateways(field: &str, items: Vec<pb::GatewayAddress>) -> Result<Vec<GatewayAddress>> {
    let by_name = unique(field, limits::GATEWAYS, items, GatewayAddress::try_from, |g| g.name.clone())?;
    Ok(by_name.into_values().collect())
}

/// As [`dialable`]; empty: nothing can be sent there.
pub(super) fn maybe_dialable(field: &str, text: &str) -> Result<Option<SocketAddr>> {
    if text.is_empty() { Ok(None) } else { dialable(field, text).map(Some) }
}

/// "ip:port" that something can be sent to.
pub(super) fn dialable(field: &str, text: &str) -> Result<SocketAddr> {
    let fail = |why| {
        let shown: String = text.chars().take(64).collect();
        ConvertError::new(field, format!("{shown:?} {why}; write ip:port, for example 192.0.2.7:15443"))
    };
    let address: SocketAddr = text.parse().map_err(|_| fail("is not an address with port"))?;
    if address.port() == 0 {
        return Err(fail("has port 0"));
    }
    if address.ip().is_unspecified() || address.ip().is_multicast() {
        return Err(fail("cannot be dialled"));
    }
    Ok(address)
}

impl TryFrom<pb::Locality> for Locality {
    type Error = ConvertError;

    fn try_from(p: pb::Locality) -> Result<Self> {
        Ok(Self { region: name("region", &p.region)?, zone: name("zone", &p.zone)? })
    }
}

impl From<&Locality> for pb::Locality {
    fn from(l: &Locality) -> Self {
        Self { region: l.region.to_string(), zone: l.zone.to_string() }
    }
}

impl TryFrom<pb::FailoverPolicy> for FailoverPolicy {
    type Error = ConvertError;

    fn try_from(p: pb::FailoverPolicy) -> Result<Self> {
        let regions = unique(
            "allowed_regions",
            limits::REGIONS,
            p.allowed_regions,
            |r| match name::<Region>("", &r)? {
                // An empty region means "unknown": allowing it would open the boundary to every unlabelled cluster.
                region if region.as_str().is_empty() => Err(ConvertError::new("", "is empty")),
                region => Ok(region),
            },
            Region::clone,
        )?;
        Ok(Self {
            hold_down: Duration::from_millis(p.hold_down_ms),
            allowed_regions: (!regions.is_empty()).then(|| regions.into_keys().collect()),
        })
    }
}

impl From<&FailoverPolicy> for pb::FailoverPolicy {
    fn from(p: &FailoverPolicy) -> Self {
        Self {
            hold_down_ms: u64::try_from(p.hold_down.as_millis()).unwrap_or(u64::MAX),
            allowed_regions: p.allowed_regions.iter().flatten().map(Region::to_string).collect(),
        }
    }
}

impl TryFrom<pb::Settings> for Settings {
    type Error = ConvertError;

    fn try_from(p: pb::Settings) -> Result<Self> {
        Ok(Self {
            failover: optional("failover", p.failover)?.unwrap_or_default(),
            withdrawals: p.withdrawals.map(Into::into).unwrap_or_default(),
        })
    }
}

impl From<&Settings> for pb::Settings {
    fn from(s: &Settings) -> Self {
        Self { failover: Some((&s.failover).into()), withdrawals: Some(s.withdrawals.into()) }
    }
}

impl From<pb::WithdrawalPolicy> for WithdrawalPolicy {
    fn from(p: pb::WithdrawalPolicy) -> Self {
        Self {
            hold: p.hold,
            above_exports: p.above_exports,
            above_percent: p.above_percent,
            confirm_after_ms: (p.confirm_after_ms > 0).then_some(p.confirm_after_ms),
        }
    }
}

impl From<WithdrawalPolicy> for pb::WithdrawalPolicy {
    fn from(p: WithdrawalPolicy) -> Self {
        Self {
            hold: p.hold,
            above_exports: p.above_exports,
            above_percent: p.above_percent,
            confirm_after_ms: p.confirm_after_ms.unwrap_or_default(),
        }
    }
}

impl TryFrom<pb::Availability> for Report {
    type Error = ConvertError;

    fn try_from(p: pb::Availability) -> Result<Self> {
        Ok(Self {
            current: counts(&p)?,
            cluster: name("cluster", &p.cluster)?,
            recovered_at: (p.recovered_at_unix_ms > 0).then_some(Timestamp(p.recovered_at_unix_ms)),
            service: required("service", p.service)?,
        })
    }
}

impl From<&Report> for pb::Availability {
    fn from(r: &Report) -> Self {
        Self {
            service: Some((&r.service).into()),
            cluster: r.cluster.to_string(),
            ready: r.current.ready.into(),
            total: r.current.total.into(),
            reachable: r.current.reachable,
            recovered_at_unix_ms: r.recovered_at.unwrap_or_default().0,
        }
    }
}

/// The numbers of an availability message, capped at 255 as they are coarse on purpose.
pub(super) fn counts(p: &pb::Availability) -> Result<Availability> {
    if p.ready > p.total {
        return Err(ConvertError::new("ready", format!("{} is more than the total of {}", p.ready, p.total)));
    }
    let cap = |n: u32| u8::try_from(n).unwrap_or(u8::MAX);
    Ok(Availability { ready: cap(p.ready), total: cap(p.total), reachable: p.reachable })
}
