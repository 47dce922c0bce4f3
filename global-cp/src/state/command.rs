//! What can be asked of the replicated state, and what it answers. Both are data: they are stored in the log and sent
//! between nodes, so a variant, once released, keeps its meaning.

use isthmus_model::{
    global::{Locality, Settings},
    grant::ClusterGrant,
    ids::{ClusterName, NodeName, Revision, ServiceName, SpiffeId, Stamp, TrustDomain},
    service::{Publication, TrustBundle},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

use super::State;
use super::{
    access::{AccessName, MintApiToken, RoleBinding},
    incarnation::Incarnation,
    nodes::{AdmitNode, MintNodeToken, SetNode},
    resources::Apply,
};

/// SHA-256 of a join token's secret. The secret itself is never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenHash(pub [u8; 32]);

/// SHA-256 of the public key that an agent asked a certificate for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash(pub [u8; 32]);

/// One change to the replicated state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Founds the federation, or rotates its bundle to a successor.
    SetFederationBundle {
        /// The federation's own trust domain is fixed by the first of these.
        bundle: TrustBundle,
    },
    /// Replaces the federation-wide settings.
    SetSettings {
        /// All of them.
        settings: Settings,
    },
    /// Registers a join token.
    MintToken(MintToken),
    /// Makes a cluster a member, and uses its token up: from then on it is good only for the same key, so that an agent
    /// that never got the answer can ask again.
    Join(Join),
    /// Replaces all that a cluster says of itself.
    Publish(Publish),
    /// Cuts a cluster off for good.
    Revoke {
        /// Which.
        cluster: ClusterName,
    },
    /// Takes other clusters' traffic off a cluster, or lets it come again.
    Drain {
        /// Which.
        cluster: ClusterName,
        /// Off it, or on again.
        drain: bool,
    },
    /// Believes a withdrawal of many exports, which was held.
    ConfirmWithdrawal {
        /// Whose.
        cluster: ClusterName,
    },
    /// Proposed when something is due that only time brings (see [`State::due`]).
    PassTime {
        /// When it was proposed.
        now: Timestamp,
    },
    /// Creates, changes and deletes resources, all or none.
    Apply(Apply),
    /// Registers a token for a new node of the control plane.
    MintNodeToken(MintNodeToken),
    /// Makes the bearer of such a token a node, and its root one of the federation's.
    AdmitNode(AdmitNode),
    /// Registers the founding node, or a node's new address.
    SetNode(SetNode),
    /// Takes a node out of the group for good. The certificates that it signed stay valid until they end.
    RemoveNode {
        /// Which.
        node: NodeName,
    },
    /// Puts the settings of an earlier revision in force again, as a new one.
    Rollback {
        /// Which.
        to: Revision,
    },
    /// Lets commands be used that need this feature level.
    RaiseLevel {
        /// To which.
        to: u32,
    },
    /// Takes over what a backup held, in a new epoch. Only while no cluster has joined.
    Restore(Box<State>),
    /// Starts the next epoch: members take the state whole, whatever they hold of this one.
    StartEpoch,
    /// Gives a role to users, groups, tokens or certificates; replaces the binding of that name.
    SetRoleBinding {
        /// What is to hold.
        binding: RoleBinding,
        /// The version that the present one must have, 0 if there must be none. Absent: whatever there is.
        #[serde(default)]
        expected: Option<u64>,
    },
    /// Takes it back.
    DeleteRoleBinding {
        /// Which.
        name: AccessName,
        /// The version that it must have. Absent: whatever it has.
        #[serde(default)]
        expected: Option<u64>,
    },
    /// Registers a token for the admin API.
    MintApiToken(MintApiToken),
    /// Makes it worthless.
    DeleteApiToken {
        /// Which.
        name: AccessName,
    },
}

/// See [`Command::MintToken`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MintToken {
    /// Of the secret.
    pub hash: TokenHash,
    /// The only cluster that may use it. It need not exist yet.
    pub cluster: ClusterName,
    /// From then on it is worthless.
    pub expires_at: Timestamp,
    /// What the cluster may do once it has joined with it; `None`: the default, or, if it is a member, what it may already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<ClusterGrant>,
    /// When it was proposed.
    pub now: Timestamp,
}

/// See [`Command::Join`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Join {
    /// Of the secret that the agent showed.
    pub hash: TokenHash,
    /// Of the agent's key. Absent in entries of versions that did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyHash>,
    /// Who joins.
    pub cluster: ClusterName,
    /// Where it runs.
    pub locality: Locality,
    /// Its own trust domain, with the first bundle (or, when it joins again, the present one or a successor).
    pub bundle: TrustBundle,
    /// When it was proposed.
    pub now: Timestamp,
}

/// See [`Command::Publish`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Publish {
    /// Whose; taken from the caller's certificate.
    pub cluster: ClusterName,
    /// Replaces the one before.
    pub publication: Publication,
    /// Of the agent that publishes; `None` from versions that know of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// When it was proposed.
    pub now: Timestamp,
}

/// What a command that was accepted did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Where the state stands after it.
    pub stamp: Stamp,
    /// Members see a difference.
    pub changed: bool,
}

/// The answer to one log entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// The entry carried no command (a new leader's first entry, a membership change).
    NoCommand,
    /// Done.
    Accepted(Outcome),
    /// Refused; nothing changed.
    Rejected(Rejection),
}

/// Why a command was refused. `Display` is for the person who asked: what is wrong, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are what the messages name")]
pub enum Rejection {
    /// A command came before the federation's bundle was set.
    #[error("the federation is not founded yet; try again when the control plane is ready")]
    NotFounded,
    /// The stored state is another federation's.
    #[error("the stored state belongs to the federation {stored}, not {offered}; check `federation` and `stateDir`")]
    OtherFederation { stored: TrustDomain, offered: TrustDomain },
    /// The federation's CA changed without its predecessor's signature.
    #[error("the federation's new trust bundle is not a successor of the stored one: {why}; restore the CA folder")]
    FederationBundle { why: String },
    /// No token has this secret.
    #[error(
        "the join token is unknown (mistyped, or minted by another federation or long ago); \
         mint a new one: isthmusctl cluster join-token {cluster}"
    )]
    UnknownToken { cluster: ClusterName },
    /// Too late.
    #[error("the join token expired {}; mint a new one: isthmusctl cluster join-token {cluster}", ago(*.at))]
    TokenExpired { cluster: ClusterName, at: Timestamp },
    /// Tokens work once.
    #[error(
        "the join token was already used {}, with another key; a token works once: mint a new one: \
         isthmusctl cluster join-token {cluster}", ago(*.at)
    )]
    TokenUsed { cluster: ClusterName, at: Timestamp },
    /// Tokens name their cluster.
    #[error(
        "the join token is for cluster {token}, not {cluster}; \
         mint one for it: isthmusctl cluster join-token {cluster}"
    )]
    TokenForAnother { token: ClusterName, cluster: ClusterName },
    /// Revocation is for good.
    #[error("cluster {cluster} was revoked, and a revoked cluster cannot return; join it under a new name")]
    ClusterRevoked { cluster: ClusterName },
    /// Not a member.
    #[error("cluster {cluster} is not a member of this federation; see `isthmusctl status` for those that are")]
    UnknownCluster { cluster: ClusterName },
    /// A trust domain has one owner, fixed at join.
    #[error(
        "trust domain {trust_domain} belongs to {owner}; \
         give cluster {cluster} a `trustDomain` of its own, for example {cluster}.example"
    )]
    TrustDomainTaken { trust_domain: TrustDomain, owner: String, cluster: ClusterName },
    /// A cluster has one trust domain, fixed at join.
    #[error("cluster {cluster} joined with trust domain {fixed} and cannot change it to {offered}")]
    TrustDomainFixed { cluster: ClusterName, fixed: TrustDomain, offered: TrustDomain },
    /// A malformed first bundle, or one that its predecessor's owner did not sign.
    #[error(
        "cluster {cluster}'s trust bundle is refused: {why}; \
         if its CA was lost, restore it from backup, or join under a new name and trust domain"
    )]
    Bundle { cluster: ClusterName, why: String },
    /// A cluster speaks only for itself.
    #[error("export {service} names identity {identity}, which is outside the cluster's trust domain {trust_domain}")]
    ForeignIdentity { service: ServiceName, identity: SpiffeId, trust_domain: TrustDomain },
    /// Somebody else publishes for the cluster now.
    #[error(
        "another agent publishes as cluster {cluster} and took over from this one: two installations claim to be the same \
         cluster; stop one of them (a copied machine or state folder needs a name and a join token of its own), and restart \
         the agent that is to go on"
    )]
    Fenced { cluster: ClusterName },
    /// Its program is too old.
    #[error(
        "node {node} runs a program that supports feature level {supports}, but level {level} is needed; upgrade it to the \
         version of the other nodes"
    )]
    NotSupported { node: NodeName, supports: u32, level: u32 },
    /// Changed meanwhile.
    #[error(
        "{resource} was changed meanwhile: it is at version {version} now, not {expected}; look at it again and repeat"
    )]
    VersionConflict { resource: String, version: Revision, expected: Revision },
    /// Not there.
    #[error("there is no {resource}")]
    UnknownResource { resource: String },
    /// No node token has this secret.
    #[error(
        "the token is unknown (mistyped, or of another federation, or long ago); mint a new one: isthmusctl cp add {node}"
    )]
    UnknownNodeToken { node: NodeName },
    /// Too late.
    #[error("the token expired {}; mint a new one: isthmusctl cp add {node}", ago(*.at))]
    NodeTokenExpired { node: NodeName, at: Timestamp },
    /// Tokens work once.
    #[error("the token was already used {}, by a node with another CA; mint a new one: isthmusctl cp add {node}", ago(*.at))]
    NodeTokenUsed { node: NodeName, at: Timestamp },
    /// Tokens name their node.
    #[error("the token is for node {token}, not {node}; mint one for it: isthmusctl cp add {node}")]
    TokenForAnotherNode { token: NodeName, node: NodeName },
    /// A name belongs to one node.
    #[error("there is a node {node} already; to replace it, remove it first: isthmusctl cp remove {node}")]
    NodeExists { node: NodeName },
    /// Not a node, or not any more.
    #[error("{node} is no node of this control plane (any more); see `isthmusctl cp status` for those that are")]
    UnknownNode { node: NodeName },
    /// There must be one.
    #[error("{node} is the only node; add another one before it is removed")]
    LastNode { node: NodeName },
    /// It has not come yet.
    #[error("there is no revision {revision} yet; the latest one is {latest}")]
    FutureRevision { revision: Revision, latest: Revision },
    /// Too long ago.
    #[error("what was in force at revision {revision} is not remembered any more; the oldest one that is is {oldest}")]
    ForgottenRevision { revision: Revision, oldest: Revision },
    /// A restore would lose what there is.
    #[error("{clusters} clusters have joined already; restore into a control plane that nobody has joined")]
    NotEmpty { clusters: u64 },
    /// A limit.
    #[error("{what}: {count}, but at most {limit} are allowed")]
    TooMany { what: String, count: u64, limit: u64 },
    /// A publication that contradicts itself.
    #[error("{what}")]
    Malformed { what: String },
    /// Nothing has this name.
    #[error("there is no role binding {name}; see `isthmusctl role-binding list` for those that are")]
    UnknownRoleBinding { name: AccessName },
    /// Somebody else was faster.
    #[error(
        "role binding {name} is at version {found}, not {expected} (0: it is not there): somebody changed it meanwhile; \
         read it again, and repeat the change if it is still wanted"
    )]
    StaleRoleBinding { name: AccessName, expected: u64, found: u64 },
    /// Nothing has this name.
    #[error("there is no API token {name}; see `isthmusctl token list` for those that are")]
    UnknownApiToken { name: AccessName },
    /// A name belongs to one token.
    #[error(
        "there is an API token {name} already; delete it first (isthmusctl token delete {name}), or take another name"
    )]
    ApiTokenExists { name: AccessName },
}

/// Families of [`Rejection`]s, as callers must tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectionKind {
    /// The request itself is wrong.
    Invalid,
    /// The caller may not.
    Denied,
    /// Something that was named does not exist.
    NotFound,
    /// It contradicts what is stored.
    Conflict,
    /// A limit is reached.
    Exhausted,
    /// Try again later.
    NotReady,
}

impl Rejection {
    /// Which family it belongs to.
    pub fn kind(&self) -> RejectionKind {
        match self {
            Self::NotFounded => RejectionKind::NotReady,
            Self::OtherFederation { .. } | Self::FederationBundle { .. } => RejectionKind::Conflict,
            Self::UnknownToken { .. }
            | Self::TokenExpired { .. }
            | Self::TokenUsed { .. }
            | Self::TokenForAnother { .. }
            | Self::ClusterRevoked { .. }
            | Self::UnknownNodeToken { .. }
            | Self::NodeTokenExpired { .. }
            | Self::NodeTokenUsed { .. }
            | Self::Fenced { .. }
            | Self::TokenForAnotherNode { .. } => RejectionKind::Denied,
            Self::UnknownCluster { .. }
            | Self::UnknownNode { .. }
            | Self::UnknownResource { .. }
            | Self::FutureRevision { .. }
            | Self::UnknownRoleBinding { .. }
            | Self::UnknownApiToken { .. }
            | Self::ForgottenRevision { .. } => RejectionKind::NotFound,
            Self::TrustDomainTaken { .. }
            | Self::TrustDomainFixed { .. }
            | Self::NodeExists { .. }
            | Self::LastNode { .. }
            | Self::NotSupported { .. }
            | Self::VersionConflict { .. }
            | Self::StaleRoleBinding { .. }
            | Self::ApiTokenExists { .. }
            | Self::NotEmpty { .. } => RejectionKind::Conflict,
            Self::Bundle { .. } | Self::ForeignIdentity { .. } | Self::Malformed { .. } => RejectionKind::Invalid,
            Self::TooMany { .. } => RejectionKind::Exhausted,
        }
    }

    /// A short stable name, for metric labels and JSON.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFounded => "not_founded",
            Self::OtherFederation { .. } => "other_federation",
            Self::FederationBundle { .. } => "federation_bundle",
            Self::UnknownToken { .. } => "unknown_token",
            Self::TokenExpired { .. } => "token_expired",
            Self::TokenUsed { .. } => "token_used",
            Self::TokenForAnother { .. } => "token_for_another_cluster",
            Self::ClusterRevoked { .. } => "cluster_revoked",
            Self::UnknownCluster { .. } => "unknown_cluster",
            Self::TrustDomainTaken { .. } => "trust_domain_taken",
            Self::TrustDomainFixed { .. } => "trust_domain_fixed",
            Self::Bundle { .. } => "bundle_refused",
            Self::ForeignIdentity { .. } => "foreign_identity",
            Self::Fenced { .. } => "fenced",
            Self::NotSupported { .. } => "not_supported",
            Self::VersionConflict { .. } => "version_conflict",
            Self::UnknownResource { .. } => "unknown_resource",
            Self::UnknownNodeToken { .. } => "unknown_node_token",
            Self::NodeTokenExpired { .. } => "node_token_expired",
            Self::NodeTokenUsed { .. } => "node_token_used",
            Self::TokenForAnotherNode { .. } => "token_for_another_node",
            Self::NodeExists { .. } => "node_exists",
            Self::UnknownNode { .. } => "unknown_node",
            Self::LastNode { .. } => "last_node",
            Self::NotEmpty { .. } => "not_empty",
            Self::FutureRevision { .. } => "future_revision",
            Self::ForgottenRevision { .. } => "forgotten_revision",
            Self::TooMany { .. } => "too_many",
            Self::Malformed { .. } => "malformed",
            Self::UnknownRoleBinding { .. } => "unknown_role_binding",
            Self::StaleRoleBinding { .. } => "stale_role_binding",
            Self::UnknownApiToken { .. } => "unknown_api_token",
            Self::ApiTokenExists { .. } => "api_token_exists",
        }
    }
}

macro_rules! hex_text {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = hex::FromHexError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                let mut bytes = [0; 32];
                hex::decode_to_slice(text, &mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl From<$name> for String {
            fn from(hash: $name) -> Self {
                hex::encode(hash.0)
            }
        }
    )*};
}

hex_text!(TokenHash, KeyHash);

/// A time in words that need no clock to write.
fn ago(at: Timestamp) -> String {
    let seconds = i64::try_from(at.0 / 1000).unwrap_or(i64::MAX);
    let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    format!("at {year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time / 3600, time / 60 % 60, time % 60)
}

/// Days since 1970-01-01 → proleptic Gregorian date (Howard Hinnant's `civil_from_days`).
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_the_time_in_utc_and_what_to_do() {
        let cluster: ClusterName = "us-east".parse().unwrap();
        let text = Rejection::TokenExpired { cluster, at: Timestamp(1_709_210_096_000) }.to_string();
        assert_eq!(
            text,
            "the join token expired at 2024-02-29T12:34:56Z; mint a new one: isthmusctl cluster join-token us-east"
        );
    }

    #[test]
    fn token_hashes_survive_json_as_map_keys() {
        let map = std::collections::BTreeMap::from([(TokenHash([7; 32]), 1)]);
        let text = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<std::collections::BTreeMap<TokenHash, i32>>(&text).unwrap(), map);
    }
}
