//! Names and numbers that identify things, each parsed once, at the edge, and valid ever after.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Why a name was refused. `Display` says what is wrong and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: {rule}")]
pub struct IdError {
    /// What kind of name, for example "cluster name".
    pub what: &'static str,
    /// The refused text, cut to 64 characters.
    pub value: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

impl IdError {
    fn new(what: &'static str, value: &str, rule: &'static str) -> Self {
        Self { what, value: value.chars().take(64).collect(), rule }
    }
}

/// RFC 1123 label: 1 to 63 of `[a-z0-9-]`, alphanumeric at both ends.
fn is_label(s: &str) -> bool {
    let alnum = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = s.as_bytes();
    matches!(bytes.len(), 1..=63)
        && bytes.iter().all(|b| alnum(b) || *b == b'-')
        && bytes.first().is_some_and(alnum)
        && bytes.last().is_some_and(alnum)
}

fn is_label_or_empty(s: &str) -> bool {
    s.is_empty() || is_label(s)
}

/// A cluster's name also stands where an SNI may say "any" for "no particular cluster".
fn is_cluster_name(s: &str) -> bool {
    is_label(s) && s != ANY_CLUSTER
}

/// What stands in a name where a cluster would, when the gateway is to choose. No cluster may be called so.
pub const ANY_CLUSTER: &str = "any";

/// Checks that `value` is an RFC 1123 label; `what` names it in the error, for example "gateway name".
pub fn check_label(what: &'static str, value: &str) -> Result<(), IdError> {
    if is_label(value) { Ok(()) } else { Err(IdError::new(what, value, LABEL_RULE)) }
}

/// SPIFFE-ID, 2.1: lower-case letters, digits, dots, dashes and underscores, at most 255.
fn is_trust_domain(s: &str) -> bool {
    matches!(s.len(), 1..=255)
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'))
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text, as parsed.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(s: &str) -> Result<Self, IdError> {
                if $check(s) { Ok(Self(s.into())) } else { Err(IdError::new($what, s, $rule)) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(s: String) -> Result<Self, IdError> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    };
}

const LABEL_RULE: &str =
    "use 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123)";

name_type!(
    /// A cluster's id in the clusterset (KEP-2149), an RFC 1123 label, except the reserved word "any".
    ClusterName, "cluster name", is_cluster_name,
    "use 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123), and not the reserved word \"any\""
);
name_type!(
    /// The name of a control plane node, an RFC 1123 label: `spiffe://<federation>/cp/<node>`.
    NodeName, "node name", is_label,
    "use 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123)"
);
name_type!(
    /// A Kubernetes namespace, an RFC 1123 label.
    Namespace, "namespace", is_label,
    "use 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123)"
);
name_type!(
    /// The name of a Service's port; empty for a lone unnamed port.
    PortName, "port name", is_label_or_empty,
    "use 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123), or nothing"
);
name_type!(
    /// A region of localities, for example "us"; empty means unknown.
    Region, "region", is_label_or_empty,
    "use 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123), or nothing"
);
name_type!(
    /// A zone within a region, for example "us-east-1a"; empty means unknown.
    Zone, "zone", is_label_or_empty,
    "use 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends (RFC 1123), or nothing"
);
name_type!(
    /// A SPIFFE trust domain (SPIFFE-ID, 2.1).
    TrustDomain, "trust domain", is_trust_domain,
    "use 1 to 255 lower-case letters, digits, '.', '-' or '_' (SPIFFE-ID 2.1)"
);

/// A SPIFFE ID: `spiffe://<trust domain>/<path>` (SPIFFE-ID, 2). At most 2,048 bytes, with a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    uri: Arc<str>,
    domain: TrustDomain,
}

impl SpiffeId {
    const WHAT: &'static str = "SPIFFE ID";
    const PREFIX: &'static str = "spiffe://";

    /// Builds `spiffe://<domain>/<segments joined by '/'>`.
    pub fn new(domain: &TrustDomain, segments: &[&str]) -> Result<Self, IdError> {
        format!("{}{domain}/{}", Self::PREFIX, segments.join("/")).parse()
    }

    /// `spiffe://<domain>/ns/<namespace>/sa/<service account>`: a workload.
    pub fn workload(domain: &TrustDomain, namespace: &Namespace, service_account: &str) -> Result<Self, IdError> {
        Self::new(domain, &["ns", namespace.as_str(), "sa", service_account])
    }

    /// `spiffe://<federation>/cluster/<cluster>/<role>`: an agent, gateway or DNS server.
    pub fn component(federation: &TrustDomain, cluster: &ClusterName, role: &str) -> Result<Self, IdError> {
        Self::new(federation, &["cluster", cluster.as_str(), role])
    }

    /// The trust domain that vouches for this ID.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The path's segments, at least one.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        let path = self.uri.get(Self::PREFIX.len() + self.domain.as_str().len() + 1..).unwrap_or_default();
        path.split('/')
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        let fail = |rule| IdError::new(Self::WHAT, s, rule);
        if s.len() > 2048 {
            return Err(fail("at most 2048 bytes"));
        }
        let rest = s.strip_prefix(Self::PREFIX).ok_or_else(|| fail("start with spiffe://"))?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| fail("a path must follow the trust domain"))?;
        let domain = domain.parse().map_err(|_| fail("the trust domain has characters outside [a-z0-9.-_]"))?;
        let ok = |segment: &str| {
            !matches!(segment, "" | "." | "..")
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        };
        if !path.split('/').all(ok) {
            return Err(fail("path segments are non-empty, of [a-zA-Z0-9.-_], and not '.' or '..'"));
        }
        Ok(Self { uri: s.into(), domain })
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = IdError;

    fn try_from(s: String) -> Result<Self, IdError> {
        s.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.uri.as_ref().to_owned()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.uri, f)
    }
}

/// A Service's namespace and name; written "namespace/name".
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName {
    /// The namespace, the same in all clusters (namespace sameness).
    pub namespace: Namespace,
    name: Arc<str>,
}

impl ServiceName {
    /// From the two parts, each an RFC 1123 label.
    pub fn new(namespace: &str, name: &str) -> Result<Self, IdError> {
        if !is_label(name) {
            return Err(IdError::new("service name", name, LABEL_RULE));
        }
        Ok(Self { namespace: namespace.parse()?, name: name.into() })
    }

    /// The name without its namespace.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for ServiceName {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        let (namespace, name) =
            s.split_once('/').ok_or_else(|| IdError::new("service", s, "write it as namespace/name"))?;
        Self::new(namespace, name)
    }
}

impl TryFrom<String> for ServiceName {
    type Error = IdError;

    fn try_from(s: String) -> Result<Self, IdError> {
        s.parse()
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number_type!(
    /// Counts committed changes of the global state within an epoch.
    Revision(u64)
);
number_type!(
    /// Counts restores from backup.
    Epoch(u64)
);
number_type!(
    /// A cluster's number, from 1; never reused, so a port pinned to it never means another cluster.
    ClusterIndex(u16)
);
number_type!(
    /// A global service's number, from 1; a cluster's VIP for it is its range's base plus this.
    VipIndex(u32)
);

/// Where a fact stands in the federation's history. Ordered by epoch first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// Which history.
    pub epoch: Epoch,
    /// Which change in it.
    pub revision: Revision,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_are_rfc_1123_labels() {
        for good in ["a", "us-east", "0", &"x".repeat(63)] {
            assert!(good.parse::<ClusterName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"x".repeat(64), "é", "any"] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
        assert!("any".parse::<ClusterName>().unwrap_err().to_string().contains("reserved"));
    }

    #[test]
    fn spiffe_ids_need_a_trust_domain_and_a_clean_path() {
        let id: SpiffeId = "spiffe://us-east.example/ns/shop/sa/cart".parse().unwrap();
        assert_eq!(id.trust_domain().as_str(), "us-east.example");
        assert_eq!(id.segments().collect::<Vec<_>>(), ["ns", "shop", "sa", "cart"]);
        for bad in [
            "http://a/b",
            "spiffe://a",
            "spiffe://a/",
            "spiffe:///b",
            "spiffe://A/b",
            "spiffe://a/../b",
            "spiffe://a/b//c",
            "spiffe://u@a/b",
            "spiffe://a/b?x",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn service_names_round_trip_through_text() {
        let name = ServiceName::new("shop", "cart").unwrap();
        assert_eq!(name.to_string().parse::<ServiceName>().unwrap(), name);
        assert!("shop".parse::<ServiceName>().is_err());
        assert!("a/b/c".parse::<ServiceName>().is_err());
    }
}
