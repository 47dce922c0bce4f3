//! Names outside `clusterset.local`: asked of the configured resolvers, and cached by hickory.
//!
//! Bounded: at most [`IN_FLIGHT`] questions at once (more: SERVFAIL, at once, so that a flood cannot pile up), each with
//! a deadline. Never asks for a name of our own zone; the caller checks that.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, Record, RecordType},
};
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
};
use tokio::{sync::Semaphore, time::timeout};

use super::Reply;
use crate::BuildError;

/// Questions under way.
const IN_FLIGHT: usize = 512;
/// For one question, retries included. A stub resolver gives up after 5 s.
const DEADLINE: Duration = Duration::from_secs(4);
/// For one try at one resolver.
const ATTEMPT: Duration = Duration::from_millis(1500);

/// Asks upstream resolvers.
pub(super) struct Forwarder {
    resolver: TokioResolver,
    permits: Semaphore,
}

impl Forwarder {
    /// For `upstreams`, tried by measured speed.
    pub(super) fn new(upstreams: &[SocketAddr]) -> Result<Self, BuildError> {
        let mut ports = BTreeMap::<_, Vec<u16>>::new();
        for upstream in upstreams {
            ports.entry(upstream.ip()).or_default().push(upstream.port());
        }
        let servers = ports.into_iter().map(|(ip, ports)| {
            let connections = ports.into_iter().flat_map(|port| {
                [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                    connection.port = port;
                    connection
                })
            });
            NameServerConfig::new(ip, true, connections.collect())
        });
        let config = ResolverConfig::from_name_servers(servers.collect());
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        let options = builder.options_mut();
        options.timeout = ATTEMPT;
        options.attempts = 2;
        options.use_hosts_file = ResolveHosts::Never;
        // CNAMEs on the way belong to the answer (RFC 1034, 4.3.2).
        options.preserve_intermediates = true;
        options.try_tcp_on_error = true;
        Ok(Self { resolver: builder.build().map_err(BuildError::Forwarder)?, permits: Semaphore::new(IN_FLIGHT) })
    }

    /// The upstreams' answer, or SERVFAIL.
    pub(super) async fn lookup(&self, name: &Name, kind: RecordType) -> Reply {
        let Ok(_permit) = self.permits.try_acquire() else {
            return Reply::empty(ResponseCode::ServFail);
        };
        // Fully qualified, or the resolver would try search domains.
        let mut name = name.clone();
        name.set_fqdn(true);
        match timeout(DEADLINE, self.resolver.lookup(name.clone(), kind)).await {
            Ok(Ok(lookup)) => {
                let records = lookup.answers().iter().filter(|r| r.record_type() != RecordType::OPT);
                Reply { records: records.cloned().collect(), ..Reply::empty(ResponseCode::NoError) }
            }
            Ok(Err(NetError::Dns(DnsError::NoRecordsFound(none)))) => {
                let soa: Option<Record> = none.soa.map(|soa| soa.into_record_of_rdata());
                Reply { authority: soa.into_iter().collect(), ..Reply::empty(none.response_code) }
            }
            Ok(Err(NetError::Dns(DnsError::ResponseCode(code)))) => Reply::empty(code),
            Ok(Err(error)) => {
                tracing::debug!(%name, %kind, %error, "upstream resolvers failed");
                Reply::empty(ResponseCode::ServFail)
            }
            Err(_elapsed) => {
                tracing::debug!(%name, %kind, deadline = ?DEADLINE, "upstream resolvers did not answer");
                Reply::empty(ResponseCode::ServFail)
            }
        }
    }
}
