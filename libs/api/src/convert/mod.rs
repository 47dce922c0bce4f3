//! Protobuf messages ↔ domain types: the one place where what a peer sent is checked.
//!
//! Into the domain (`TryFrom`): names, numbers, lengths and duplicates are checked against the stated limits, and an
//! error names the field by its dotted path, with the index in lists. Out of it (`From`): never fails. What comes out of
//! here is valid for good; nothing behind it checks again. It does not bound the size of the message itself: the
//! transport does, before decoding.

mod common;
mod federation;
mod global;
mod grant;
mod local;

pub use federation::{ConsumerKind, ConsumerStatus, Problem, Status};
pub use global::{DigestSum, snapshot_digest};
pub use local::{AvailabilityReport, own_availability};

use std::{fmt, str::FromStr};

use isthmus_model::ids::IdError;

/// How many of each thing one message may hold.
pub mod limits {
    /// Ports of a service.
    pub const PORTS: usize = 64;
    /// SPIFFE IDs behind one export.
    pub const IDENTITIES: usize = 256;
    /// Exports of one cluster.
    pub const EXPORTS: usize = 10_000;
    /// Clusters of a federation.
    pub const CLUSTERS: usize = isthmus_model::global::GlobalSnapshot::MAX_CLUSTERS;
    /// Global services of a federation.
    pub const SERVICES: usize = 100_000;
    /// Conflicts of one service.
    pub const CONFLICTS: usize = 4_096;
    /// Gateways of one cluster.
    pub const GATEWAYS: usize = 64;
    /// Namespaces of a grant.
    pub const NAMESPACES: usize = 10_000;
    /// Regions of a policy.
    pub const REGIONS: usize = 256;
    /// Endpoints of one service in one cluster.
    pub const ENDPOINTS: usize = 10_000;
    /// Entries of one availability report.
    pub const AVAILABILITY: usize = 1_000_000;
    /// Consumers, and problems, that one cluster may report.
    pub const STATUS: usize = 10_000;
    /// Tunnels that one cluster may report, of all its gateways together.
    pub const TUNNELS: usize = 50_000;
    /// Problems that one consumer may report.
    pub const CONSUMER_PROBLEMS: usize = 64;
    /// Services that one sidecar calls.
    pub const UPSTREAMS: usize = 10_000;
    /// Bytes of a trust bundle document.
    pub const BUNDLE_BYTES: usize = 256 * 1024;
    /// Bytes of a signature.
    pub const SIGNATURE_BYTES: usize = 1_024;
    /// Bytes of a sentence for people.
    pub const TEXT_BYTES: usize = 4_096;
}

/// A message that cannot be taken into the domain: which field, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertError {
    /// Dotted path with indexes, for example `publication.exports[3].ports[0].number`; empty: the message itself.
    pub field: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for ConvertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.field, self.message) }
    }
}

impl std::error::Error for ConvertError {}

impl From<ConvertError> for tonic::Status {
    fn from(error: ConvertError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

impl ConvertError {
    /// An error about `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }

    /// The same error, seen from the message that holds the erring one as `field`.
    #[must_use]
    pub fn within(mut self, field: &str) -> Self {
        self.field = match (self.field.is_empty(), self.field.starts_with('[')) {
            (true, _) => field.to_owned(),
            (false, true) => format!("{field}{}", self.field),
            (false, false) => format!("{field}.{}", self.field),
        };
        self
    }
}

type Result<T> = std::result::Result<T, ConvertError>;

/// A message field that must be there, converted.
fn required<P, T: TryFrom<P, Error = ConvertError>>(field: &str, value: Option<P>) -> Result<T> {
    match value {
        Some(value) => T::try_from(value).map_err(|e| e.within(field)),
        None => Err(ConvertError::new(field, "is missing")),
    }
}

/// A message field that may be absent, converted.
fn optional<P, T: TryFrom<P, Error = ConvertError>>(field: &str, value: Option<P>) -> Result<Option<T>> {
    value.map(|v| T::try_from(v).map_err(|e| e.within(field))).transpose()
}

/// A name, parsed by its type's rule.
fn name<T: FromStr<Err = IdError>>(field: &str, text: &str) -> Result<T> {
    text.parse().map_err(|e: IdError| ConvertError::new(field, e.to_string()))
}

/// A list of at most `max` items, each converted.
fn list<P, T>(field: &str, max: usize, items: Vec<P>, convert: impl Fn(P) -> Result<T>) -> Result<Vec<T>> {
    at_most(field, max, items.len())?;
    let at = |i: usize| move |e: ConvertError| e.within(&format!("{field}[{i}]"));
    items.into_iter().enumerate().map(|(i, item)| convert(item).map_err(at(i))).collect()
}

/// As [`list`], gathered by key into a map or set; a repeated key is an error.
fn unique<P, T, K: Ord + fmt::Display>(
    field: &str,
    max: usize,
    items: Vec<P>,
    convert: impl Fn(P) -> Result<T>,
    key: impl Fn(&T) -> K,
) -> Result<std::collections::BTreeMap<K, T>> {
    let mut out = std::collections::BTreeMap::new();
    for (i, item) in list(field, max, items, convert)?.into_iter().enumerate() {
        let key = key(&item);
        if out.contains_key(&key) {
            return Err(ConvertError::new(format!("{field}[{i}]"), format!("{key} is there twice")));
        }
        out.insert(key, item);
    }
    Ok(out)
}

fn at_most(field: &str, max: usize, len: usize) -> Result<()> {
    if len > max {
        return Err(ConvertError::new(field, format!("has {len} entries; at most {max} are allowed")));
    }
    Ok(())
}

/// A TCP or UDP port, 1..=65535.
fn port(field: &str, number: u32) -> Result<u16> {
    match u16::try_from(number) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(ConvertError::new(field, format!("{number} is not a port; use 1 to 65535"))),
    }
}

/// Text for people: cut to what is worth keeping, never refused.
fn text(mut s: String) -> String {
    if s.len() > limits::TEXT_BYTES {
        let end = (0..=limits::TEXT_BYTES).rev().find(|i| s.is_char_boundary(*i)).unwrap_or(0);
        s.truncate(end);
    }
    s
}

#[cfg(test)]
mod tests;
