//! What operators declare: resources that are created, changed and deleted by name, each with the version of its last change.
//!
//! The settings of the federation (there is one of them) and a grant for each cluster. They always exist: what nobody
//! declared is as by default, and to delete one is to go back to that. A grant may be declared before its cluster joins.

use std::{collections::BTreeMap, fmt};

use isthmus_model::{
    global::{ClusterState, Settings},
    grant::ClusterGrant,
    ids::{ClusterName, Revision},
};
use serde::{Deserialize, Serialize};

use super::{Change, Rejection, State, apply::within};

/// Grants of clusters that have not joined.
const MAX_PROMISED: usize = 10_000;
/// Writes of one command.
pub(super) const MAX_WRITES: usize = 10_000;

/// Names a resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ResourceKey {
    /// Of the federation.
    Settings,
    /// Of a cluster.
    ClusterGrant(ClusterName),
}

/// A resource, whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Resource {
    /// Of the federation.
    Settings(Settings),
    /// Of a cluster.
    ClusterGrant(ClusterName, ClusterGrant),
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Write {
    /// Create it or change it to this.
    Put {
        /// All of it.
        resource: Resource,
        /// Only if this is its version; `None`: whatever it is.
        expected: Option<Revision>,
    },
    /// Forget what was declared.
    Delete {
        /// Which.
        key: ResourceKey,
        /// Only if this is its version; `None`: whatever it is.
        expected: Option<Revision>,
    },
}

/// See [`super::Command::Apply`]: all of it happens, or none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    /// In this order.
    pub writes: Vec<Write>,
}

/// What one write did, or would do.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// To which.
    pub key: ResourceKey,
    /// As it was declared before; `None`: it was not.
    pub before: Option<Resource>,
    /// As it is declared afterwards.
    pub after: Option<Resource>,
}

/// Of the resources that were declared, by [`ResourceKey`]'s text: the revision of the last change.
pub(super) type Versions = BTreeMap<String, Revision>;

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Settings => f.write_str("Settings/federation"),
            Self::ClusterGrant(cluster) => write!(f, "ClusterGrant/{cluster}"),
        }
    }
}

impl Resource {
    /// Its name.
    pub fn key(&self) -> ResourceKey {
        match self {
            Self::Settings(_) => ResourceKey::Settings,
            Self::ClusterGrant(cluster, _) => ResourceKey::ClusterGrant(cluster.clone()),
        }
    }
}

impl Write {
    /// Which resource it writes.
    pub fn key(&self) -> ResourceKey {
        match self {
            Self::Put { resource, .. } => resource.key(),
            Self::Delete { key, .. } => key.clone(),
        }
    }

    fn expected(&self) -> Option<Revision> {
        match self {
            Self::Put { expected, .. } | Self::Delete { expected, .. } => *expected,
        }
    }
}

impl Apply {
    /// For the audit log.
    pub(super) fn describe(&self) -> String {
        const NAMED: usize = 8;
        let write = |write: &Write| match write {
            Write::Put { resource, .. } => resource.key().to_string(),
            Write::Delete { key, .. } => format!("-{key}"),
        };
        let named: Vec<String> = self.writes.iter().take(NAMED).map(write).collect();
        let more = self.writes.len() - named.len();
        if more > 0 { format!("{} and {more} more", named.join(" ")) } else { named.join(" ") }
    }
}

impl State {
    /// The resource as it was declared; `None` if nobody did.
    pub fn declared(&self, key: &ResourceKey) -> Option<(Resource, Revision)> {
        let version = *self.versions.get(&key.to_string())?;
        let global = self.global.as_ref()?;
        let resource = match key {
            ResourceKey::Settings => Resource::Settings(global.settings.clone()),
            ResourceKey::ClusterGrant(cluster) => {
                let grant = match global.clusters.get(cluster) {
                    Some(info) => &info.grant,
                    None => self.promised.get(cluster)?,
                };
                Resource::ClusterGrant(cluster.clone(), grant.clone())
            }
        };
        Some((resource, version))
    }

    /// Grants that wait for their clusters.
    pub fn promised(&self) -> &BTreeMap<ClusterName, ClusterGrant> {
        &self.promised
    }

    /// What `apply` would do, or why it would be refused.
    pub fn preview(&self, apply: &Apply) -> Result<Vec<Applied>, Rejection> {
        let mut after = self.clone();
        after.apply_resources(apply)?;
        let declared = |state: &Self, key: &ResourceKey| state.declared(key).map(|(resource, _)| resource);
        let applied = apply.writes.iter().map(|write| {
            let key = write.key();
            let (before, after) = (declared(self, &key), declared(&after, &key));
            Applied { key, before, after }
        });
        Ok(applied.collect())
    }

    pub(super) fn apply_resources(&mut self, apply: &Apply) -> Result<Change, Rejection> {
        within("resources in one request", apply.writes.len(), MAX_WRITES)?;
        let mut after = self.clone();
        let mut change = Change::default();
        for write in &apply.writes {
            change.extend(after.write(write)?);
        }
        *self = after;
        Ok(change)
    }

    fn write(&mut self, write: &Write) -> Result<Change, Rejection> {
        let key = write.key();
        let held = self.versions.get(&key.to_string()).copied();
        if let Some(expected) = write.expected()
            && expected != held.unwrap_or_default()
        {
            let (resource, version) = (key.to_string(), held.unwrap_or_default());
            return Err(Rejection::VersionConflict { resource, version, expected });
        }
        match write {
            Write::Put { resource, .. } => {
                if self.declared(&key).is_some_and(|(declared, _)| declared == *resource) {
                    return Ok(Change::default());
                }
                let mut change = self.put(resource)?;
                change.declared = true;
                self.declare(&key);
                Ok(change)
            }
            Write::Delete { .. } if held.is_none() => Err(Rejection::UnknownResource { resource: key.to_string() }),
            Write::Delete { key, .. } => {
                let mut change = match key {
                    ResourceKey::Settings => self.put(&Resource::Settings(Settings::default()))?,
                    ResourceKey::ClusterGrant(cluster) if self.is_member(cluster) => {
                        self.set_grant(cluster, &ClusterGrant::default())?
                    }
                    ResourceKey::ClusterGrant(cluster) => {
                        self.promised.remove(cluster);
                        Change::default()
                    }
                };
                change.declared = true;
                self.versions.remove(&key.to_string());
                Ok(change)
            }
        }
    }

    fn put(&mut self, resource: &Resource) -> Result<Change, Rejection> {
        match resource {
            Resource::Settings(settings) => {
                if let Some((field, message)) = settings.problems().into_iter().next() {
                    return Err(Rejection::Malformed { what: format!("spec.{field}: {message}") });
                }
                self.set_settings(settings)
            }
            Resource::ClusterGrant(cluster, grant) => {
                let global = self.global.as_ref().ok_or(Rejection::NotFounded)?;
                match global.clusters.get(cluster).map(|info| info.state) {
                    Some(ClusterState::Revoked) => Err(Rejection::ClusterRevoked { cluster: cluster.clone() }),
                    Some(_) => self.set_grant(cluster, grant),
                    None => {
                        within("grants of clusters that have not joined", self.promised.len() + 1, MAX_PROMISED)?;
                        self.promised.insert(cluster.clone(), grant.clone());
                        Ok(Change::default())
                    }
                }
            }
        }
    }

    /// The resource is declared, by the revision that comes next.
    pub(super) fn declare(&mut self, key: &ResourceKey) {
        self.versions.insert(key.to_string(), Revision(self.stamp().revision.0.saturating_add(1)));
    }

    fn is_member(&self, cluster: &ClusterName) -> bool {
        self.global.as_ref().is_some_and(|global| global.clusters.contains_key(cluster))
    }
}
