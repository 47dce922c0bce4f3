//! What a cluster may do ↔ [`isthmus_model::grant`].

use std::collections::BTreeSet;

use isthmus_model::{
    grant::{ClusterGrant, GrantLimits, MemberRole, Namespaces},
    ids::Namespace,
};

use super::{ConvertError, Result, common::known, limits, name, required, unique};
use crate::proto::common::v1 as pb;

impl TryFrom<pb::ClusterGrant> for ClusterGrant {
    type Error = ConvertError;

    fn try_from(p: pb::ClusterGrant) -> Result<Self> {
        let mut roles = BTreeSet::new();
        for role in p.roles {
            // A part that this version does not know is none that it lets anybody play.
            match known::<pb::MemberRole>("roles", role) {
                Ok(pb::MemberRole::Gateway) => drop(roles.insert(MemberRole::Gateway)),
                Ok(pb::MemberRole::Dns) => drop(roles.insert(MemberRole::Dns)),
                Ok(pb::MemberRole::ConfigSource) => drop(roles.insert(MemberRole::ConfigSource)),
                Ok(pb::MemberRole::Unspecified) | Err(_) => {}
            }
        }
        Ok(Self {
            export_namespaces: required("export_namespaces", p.export_namespaces)?,
            import_namespaces: required("import_namespaces", p.import_namespaces)?,
            roles,
            limits: GrantLimits { exports: p.max_exports, gateways: p.max_gateways },
        })
    }
}

impl From<&ClusterGrant> for pb::ClusterGrant {
    fn from(g: &ClusterGrant) -> Self {
        let role = |role: &MemberRole| match role {
            MemberRole::Gateway => pb::MemberRole::Gateway,
            MemberRole::Dns => pb::MemberRole::Dns,
            MemberRole::ConfigSource => pb::MemberRole::ConfigSource,
        };
        Self {
            export_namespaces: Some((&g.export_namespaces).into()),
            import_namespaces: Some((&g.import_namespaces).into()),
            roles: g.roles.iter().map(|r| role(r).into()).collect(),
            max_exports: g.limits.exports,
            max_gateways: g.limits.gateways,
        }
    }
}

impl TryFrom<pb::Namespaces> for Namespaces {
    type Error = ConvertError;

    fn try_from(p: pb::Namespaces) -> Result<Self> {
        if p.all {
            return Ok(Self::All);
        }
        let names = unique("names", limits::NAMESPACES, p.names, |n| name("", &n), Namespace::clone)?;
        Ok(Self::Only(names.into_keys().collect()))
    }
}

impl From<&Namespaces> for pb::Namespaces {
    fn from(n: &Namespaces) -> Self {
        match n {
            Namespaces::All => Self { all: true, names: Vec::new() },
            Namespaces::Only(names) => Self { all: false, names: names.iter().map(Namespace::to_string).collect() },
        }
    }
}
