//! What the federation lets a member cluster do: the namespaces that it may export and import, the parts that it may play,
//! how much it may publish.
//!
//! Given with its join token, or later. The control plane's state enforces it when exports are merged; every agent and
//! gateway enforces it again on what it is told ([`crate::access`], [`GlobalSnapshot::keep_to_grants`]).

use std::{collections::BTreeSet, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    global::GlobalSnapshot,
    ids::{ClusterName, Namespace},
};

/// Stands for every namespace.
const ALL: &str = "*";

/// What a cluster may do. The default of a federation: everything but being the source of others' configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClusterGrant {
    /// Of these it may export services.
    pub export_namespaces: Namespaces,
    /// Of these it may use services of other clusters.
    pub import_namespaces: Namespaces,
    /// What its members may be.
    pub roles: BTreeSet<MemberRole>,
    /// Bounds that are narrower than everybody's.
    pub limits: GrantLimits,
}

/// A set of namespaces. As data: a list of names, `["*"]` for all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeSet<String>", into = "BTreeSet<String>")]
pub enum Namespaces {
    /// Every one, also those that are yet to come.
    #[default]
    All,
    /// These; none, if it is empty.
    Only(BTreeSet<Namespace>),
}

/// A part that a cluster plays in the federation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MemberRole {
    /// Runs gateways, which carry traffic from and to other clusters.
    Gateway,
    /// Runs DNS servers for the federation's names.
    Dns,
    /// Policies that are applied in it hold for the whole federation.
    ConfigSource,
}

/// See [`ClusterGrant::limits`]. `None`: as everybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct GrantLimits {
    /// Exports in one publication.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exports: Option<u32>,
    /// Gateways in one publication.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateways: Option<u32>,
}

/// A namespace that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespacesError {
    /// Not a name.
    #[error("{0:?} is not a namespace: use names of 1 to 63 lower-case letters, digits or '-', or \"*\" alone for all")]
    Name(String),
    /// All and some.
    #[error("\"*\" stands for all namespaces; leave out either it or the names beside it")]
    AllAndSome,
}

impl Default for ClusterGrant {
    fn default() -> Self {
        Self {
            export_namespaces: Namespaces::All,
            import_namespaces: Namespaces::All,
            roles: BTreeSet::from([MemberRole::Gateway, MemberRole::Dns]),
            limits: GrantLimits::default(),
        }
    }
}

impl ClusterGrant {
    /// May it export services of this namespace?
    pub fn may_export(&self, namespace: &Namespace) -> bool {
        self.export_namespaces.contain(namespace)
    }

    /// May it use services of this namespace that other clusters export?
    pub fn may_import(&self, namespace: &Namespace) -> bool {
        self.import_namespaces.contain(namespace)
    }
}

impl Namespaces {
    /// Is `namespace` one of them?
    pub fn contain(&self, namespace: &Namespace) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(namespace),
        }
    }
}

impl TryFrom<BTreeSet<String>> for Namespaces {
    type Error = NamespacesError;

    fn try_from(names: BTreeSet<String>) -> Result<Self, NamespacesError> {
        if names.contains(ALL) {
            return if names.len() == 1 { Ok(Self::All) } else { Err(NamespacesError::AllAndSome) };
        }
        let name = |name: String| name.parse().map_err(|_| NamespacesError::Name(name.chars().take(64).collect()));
        names.into_iter().map(name).collect::<Result<_, _>>().map(Self::Only)
    }
}

impl From<Namespaces> for BTreeSet<String> {
    fn from(namespaces: Namespaces) -> Self {
        match namespaces {
            Namespaces::All => Self::from([ALL.to_owned()]),
            Namespaces::Only(names) => names.into_iter().map(|name| name.to_string()).collect(),
        }
    }
}

impl GlobalSnapshot {
    /// Takes out what grants do not allow: exporters outside theirs, and, of services that `own` may not import, all
    /// exporters but itself. What no one is left to export is gone.
    pub fn keep_to_grants(&mut self, own: &ClusterName) {
        let Self { clusters, services, .. } = self;
        let grant = |cluster: &ClusterName| clusters.get(cluster).map(|info| &info.grant);
        services.retain(|name, service| {
            let namespace = &name.namespace;
            let imports = grant(own).is_none_or(|grant| grant.may_import(namespace));
            let keeps = |cluster: &ClusterName| {
                (imports || cluster == own) && grant(cluster).is_none_or(|grant| grant.may_export(namespace))
            };
            if service.exporters.keys().all(keeps) {
                return true;
            }
            let service = Arc::make_mut(service);
            service.exporters.retain(|cluster, _| keeps(cluster));
            service.ports.retain_mut(|port| {
                port.clusters.retain(keeps);
                !port.clusters.is_empty()
            });
            !service.exporters.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces(json: &str) -> Result<Namespaces, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn namespaces_are_names_or_all() {
        assert_eq!(namespaces(r#"["*"]"#).unwrap(), Namespaces::All);
        let some = namespaces(r#"["shop", "pay"]"#).unwrap();
        assert!(some.contain(&"shop".parse().unwrap()) && !some.contain(&"shops".parse().unwrap()));
        assert_eq!(serde_json::to_string(&some).unwrap(), r#"["pay","shop"]"#);
        assert!(!namespaces("[]").unwrap().contain(&"shop".parse().unwrap()), "no namespace is none, not all");
        assert!(namespaces(r#"["*", "shop"]"#).unwrap_err().to_string().contains("all namespaces"));
        assert!(namespaces(r#"["Shop"]"#).unwrap_err().to_string().contains("\"Shop\" is not a namespace"));
    }

    #[test]
    fn what_is_left_out_of_a_grant_is_as_by_default() {
        let grant: ClusterGrant = serde_json::from_str(r#"{"exportNamespaces": ["shop"]}"#).unwrap();
        assert!(!grant.may_export(&"pay".parse().unwrap()) && grant.may_import(&"pay".parse().unwrap()));
        assert_eq!(grant.roles, ClusterGrant::default().roles);
        assert!(serde_json::from_str::<ClusterGrant>(r#"{"exports": ["shop"]}"#).is_err());
    }
}
