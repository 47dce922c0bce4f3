//! What the server counts. Labels come from closed sets, so that no client can grow them.

use std::{
    fmt,
    sync::atomic::{AtomicI64, AtomicU64},
};

use hickory_proto::{op::ResponseCode, rr::RecordType};
use isthmus_model::{ids::Stamp, time::Timestamp};
use isthmus_runtime::health::Registry;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

/// All metrics of the process; a cheap handle.
#[derive(Clone, Default)]
pub(crate) struct Metrics {
    queries: Family<QueryLabels, Counter<u64, AtomicU64>>,
    revision: Gauge<i64, AtomicI64>,
    names: Gauge<i64, AtomicI64>,
    svid_expiry: Gauge<i64, AtomicI64>,
    refused: Family<RefusedLabels, Counter<u64, AtomicU64>>,
    connected: Gauge<i64, AtomicI64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueryLabels {
    rcode: Rcode,
    r#type: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reason: Refusal,
}

/// Why an update of the feed was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Refusal {
    /// Lower revision than the one held, in the same epoch.
    Stale,
    /// It does not convert to the domain.
    Malformed,
    /// A trust bundle that its predecessor did not sign.
    Bundle,
    /// Another federation's.
    Foreign,
    /// It takes revocations back; only that part is refused.
    Revocation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(clippy::upper_case_acronyms, reason = "the label is the protocol's own spelling")]
enum Rcode {
    NOERROR,
    FORMERR,
    SERVFAIL,
    NXDOMAIN,
    NOTIMP,
    REFUSED,
    BADVERS,
    OTHER,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(clippy::upper_case_acronyms, reason = "the label is the protocol's own spelling")]
enum Kind {
    A,
    AAAA,
    SRV,
    TXT,
    SOA,
    NS,
    PTR,
    CNAME,
    MX,
    HTTPS,
    ANY,
    OTHER,
}

impl Metrics {
    /// Registers everything under the prefix `isthmus_dns_`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("isthmus_dns");
        // The registry adds the "_total" of counters itself.
        registry.register("queries", "Answered queries by outcome and type", self.queries.clone());
        registry.register("revision", "Revision of the federation that is served", self.revision.clone());
        registry.register("zone_names", "Services with a name in clusterset.local", self.names.clone());
        registry.register(
            "svid_expiry_timestamp_seconds",
            "When this server's certificate ends, in seconds since the Unix epoch; 0 if there is none",
            self.svid_expiry.clone(),
        );
        registry.register("updates_refused", "Updates of the agent that were not taken", self.refused.clone());
        registry.register("agent_connected", "1 while the agent's feed is up", self.connected.clone());
    }

    pub(crate) fn count_query(&self, code: ResponseCode, kind: RecordType) {
        self.queries.get_or_create(&QueryLabels { rcode: code.into(), r#type: kind.into() }).inc();
    }

    pub(crate) fn count_refusal(&self, reason: Refusal) {
        self.refused.get_or_create(&RefusedLabels { reason }).inc();
    }

    pub(crate) fn zone(&self, stamp: Stamp, names: usize) {
        self.revision.set(i64::try_from(stamp.revision.0).unwrap_or(i64::MAX));
        self.names.set(i64::try_from(names).unwrap_or(i64::MAX));
    }

    pub(crate) fn svid_expires(&self, at: Timestamp) {
        self.svid_expiry.set(i64::try_from(at.0 / 1000).unwrap_or(i64::MAX));
    }

    pub(crate) fn connected(&self, connected: bool) {
        self.connected.set(i64::from(connected));
    }
}

impl EncodeLabelValue for Refusal {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        let label = match self {
            Self::Stale => "stale",
            Self::Malformed => "malformed",
            Self::Bundle => "bundle",
            Self::Foreign => "foreign",
            Self::Revocation => "revocation",
        };
        EncodeLabelValue::encode(&label, encoder)
    }
}

impl From<ResponseCode> for Rcode {
    fn from(code: ResponseCode) -> Self {
        match code {
            ResponseCode::NoError => Self::NOERROR,
            ResponseCode::FormErr => Self::FORMERR,
            ResponseCode::ServFail => Self::SERVFAIL,
            ResponseCode::NXDomain => Self::NXDOMAIN,
            ResponseCode::NotImp => Self::NOTIMP,
            ResponseCode::Refused => Self::REFUSED,
            ResponseCode::BADVERS => Self::BADVERS,
            _ => Self::OTHER,
        }
    }
}

impl From<RecordType> for Kind {
    fn from(kind: RecordType) -> Self {
        match kind {
            RecordType::A => Self::A,
            RecordType::AAAA => Self::AAAA,
            RecordType::SRV => Self::SRV,
            RecordType::TXT => Self::TXT,
            RecordType::SOA => Self::SOA,
            RecordType::NS => Self::NS,
            RecordType::PTR => Self::PTR,
            RecordType::CNAME => Self::CNAME,
            RecordType::MX => Self::MX,
            RecordType::HTTPS => Self::HTTPS,
            RecordType::ANY => Self::ANY,
            _ => Self::OTHER,
        }
    }
}
