//! Who may use what across clusters: the one decision that both gateways of a connection make, each by the state it holds.
//!
//! In: the federation's state, the caller's cluster (at the far side from the peer's certificate, never from what it says),
//! the cluster that is to answer, the service and the port. Out: the service and its port, or why not. A caller that is no
//! active member learns nothing else. It looks at intent alone (membership, exports, grants, policy): whether anyone is there to
//! answer is [`crate::failover::choose`]'s matter, which never calls usable what is denied here.

use crate::{
    global::{ClusterInfo, GlobalPort, GlobalService, GlobalSnapshot},
    ids::{ClusterName, Namespace, Region, ServiceName},
};

/// A port of a service, used from one cluster and answered by another, or by the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use<'a> {
    /// Whose workload calls.
    pub caller: &'a ClusterName,
    /// Whose workload is to answer.
    pub exporter: &'a ClusterName,
    /// What is called.
    pub service: &'a ServiceName,
    /// The port, as the global service names it.
    pub port: u16,
}

/// What may be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Permitted<'g> {
    /// The service.
    pub service: &'g GlobalService,
    /// Its port; endpoints know it by its name.
    pub port: &'g GlobalPort,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The caller is revoked, or was never a member.
    #[error("{0} is no active member of the federation")]
    CallerInactive(ClusterName),
    /// Nobody exports it.
    #[error("no cluster exports {0}")]
    UnknownService(ServiceName),
    /// Nobody exposes the port.
    #[error("{0} has no port {1}")]
    UnknownPort(ServiceName, u16),
    /// Others do, this one does not.
    #[error("{exporter} does not export port {port} of {service}")]
    NotExported {
        /// Who was to answer.
        exporter: ClusterName,
        /// What.
        service: ServiceName,
        /// Which port.
        port: u16,
    },
    /// The exporter is revoked.
    #[error("{0}, which was to answer, is no active member of the federation")]
    ExporterInactive(ClusterName),
    /// The caller's grant leaves the namespace out.
    #[error("{caller}'s grant does not let it import services of namespace {namespace}")]
    ImportNotGranted {
        /// Who calls.
        caller: ClusterName,
        /// Of the service.
        namespace: Namespace,
    },
    /// The exporter's grant leaves the namespace out.
    #[error("{exporter}'s grant does not let it export services of namespace {namespace}")]
    ExportNotGranted {
        /// Who was to answer.
        exporter: ClusterName,
        /// Of the service.
        namespace: Namespace,
    },
    /// A region that policy keeps traffic out of; an unknown one is outside every boundary.
    #[error("{exporter} is in region {region:?}, which is outside the regions that traffic may enter")]
    OutsideRegions {
        /// Who was to answer.
        exporter: ClusterName,
        /// Where it is.
        region: Region,
    },
}

impl Denied {
    /// A bounded metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::CallerInactive(_) => "caller_inactive",
            Self::UnknownService(_) => "unknown_service",
            Self::UnknownPort(..) => "unknown_port",
            Self::NotExported { .. } => "not_exported",
            Self::ExporterInactive(_) => "exporter_inactive",
            Self::ImportNotGranted { .. } => "import_not_granted",
            Self::ExportNotGranted { .. } => "export_not_granted",
            Self::OutsideRegions { .. } => "outside_regions",
        }
    }

    /// Another exporter might be permitted where this one is not.
    pub fn retry_elsewhere(&self) -> bool {
        matches!(
            self,
            Self::NotExported { .. }
                | Self::ExporterInactive(_)
                | Self::ExportNotGranted { .. }
                | Self::OutsideRegions { .. }
        )
    }
}

/// May `what` be used, by the state `global`?
pub fn may_use<'g>(global: &'g GlobalSnapshot, what: &Use<'_>) -> Result<Permitted<'g>, Denied> {
    let Use { caller, exporter, service: name, port: number } = *what;
    let here = global.active_cluster(caller).ok_or_else(|| Denied::CallerInactive(caller.clone()))?;
    let service = global.services.get(name).ok_or_else(|| Denied::UnknownService(name.clone()))?;
    let port = service.ports.iter().find(|p| p.port.number == number);
    let port = port.ok_or_else(|| Denied::UnknownPort(name.clone(), number))?;
    if !service.exporters.contains_key(exporter) || !port.clusters.contains(exporter) {
        return Err(Denied::NotExported { exporter: exporter.clone(), service: name.clone(), port: number });
    }
    let there = global.active_cluster(exporter).ok_or_else(|| Denied::ExporterInactive(exporter.clone()))?;
    granted(here, there, &name.namespace)?;
    if !global.settings.failover.allows(&there.locality.region) {
        return Err(Denied::OutsideRegions { exporter: exporter.clone(), region: there.locality.region.clone() });
    }
    Ok(Permitted { service, port })
}

/// Do the grants of both let `caller` use services of `namespace` that `exporter` exports? What a cluster exports it may
/// itself use.
pub fn granted(caller: &ClusterInfo, exporter: &ClusterInfo, namespace: &Namespace) -> Result<(), Denied> {
    if caller.name != exporter.name && !caller.grant.may_import(namespace) {
        return Err(Denied::ImportNotGranted { caller: caller.name.clone(), namespace: namespace.clone() });
    }
    if !exporter.grant.may_export(namespace) {
        return Err(Denied::ExportNotGranted { exporter: exporter.name.clone(), namespace: namespace.clone() });
    }
    Ok(())
}

#[cfg(test)]
#[path = "access_tests.rs"]
mod tests;
