//! (a) SNI passthrough on both sides, what Istio's east-west gateway does: each side reads the server name and passes TCP on.

use serde_json::{Value, json};

use super::{BACKLOG, Site, address, tcp_proxy};
use crate::gateway::place::End;

/// This side's listener and cluster.
pub(super) fn side(site: &Site<'_>, end: End) -> (Value, Value) {
    let inspector = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
    });
    let listener = json!({
        "name": "entry",
        "address": address(site.at(end)),
        "tcp_backlog_size": BACKLOG,
        "listener_filters": [{ "name": "envoy.filters.listener.tls_inspector", "typed_config": inspector }],
        "filter_chains": [{
            "filter_chain_match": { "server_names": [site.name] },
            "filters": [tcp_proxy(Value::Null)],
        }],
    });
    (listener, site.cluster(end))
}
