//! TLS between sidecars: mutual, 1.3 only, no resumption, the peer judged by its SPIFFE ID.
//!
//! Certificates come from the launcher's SDS: `workload` and `trust`. Resumption is off on both sides, since Envoy keeps
//! one session store per cluster and a ticket of one far cluster is worthless in another (docs/tunnel.md).

use std::collections::BTreeSet;

use envoy_types::pb::envoy::{
    config::core::v3::TransportSocket,
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, SubjectAltNameMatcher,
        TlsParameters, UpstreamTlsContext,
        common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
        downstream_tls_context::SessionTicketKeysType,
        subject_alt_name_matcher::SanType,
        tls_parameters::TlsProtocol,
    },
    r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
};
use isthmus_model::ids::SpiffeId;

use super::{
    names::{TRUST_SECRET, WORKLOAD_SECRET},
    wire::{boolean, exactly, launcher_sds, tls_socket, uint},
};

/// Only workloads may call, never a gateway or another part of the federation, whatever trust set the launcher holds.
const ANY_WORKLOAD: &str = "spiffe://[^/]+/ns/[^/]+/sa/[^/]+";

/// Which SNI a connection carries.
pub(super) enum Sni {
    /// The same for every endpoint.
    Fixed(String),
    /// Each endpoint's hostname.
    OfEndpoint,
}

/// Towards a service. `identities` must not be empty: Envoy would read "no matcher" as "anyone".
pub(super) fn upstream(identities: &BTreeSet<SpiffeId>, sni: Sni, alpn: &[&str]) -> Option<TransportSocket> {
    let peers = identities.iter().map(|id| uri(exactly(id.as_str()))).collect();
    let (sni, auto_host_sni) = match sni {
        Sni::Fixed(name) => (name, false),
        Sni::OfEndpoint => (String::new(), true),
    };
    tls_socket(UpstreamTlsContext {
        common_tls_context: Some(common(peers, alpn)),
        sni,
        auto_host_sni,
        max_session_keys: uint(0),
        ..Default::default()
    })
}

/// Towards this workload.
pub(super) fn downstream(alpn: &[&str]) -> Option<TransportSocket> {
    let pattern = RegexMatcher { regex: ANY_WORKLOAD.to_owned(), ..Default::default() };
    let workload = StringMatcher { match_pattern: Some(MatchPattern::SafeRegex(pattern)), ..Default::default() };
    tls_socket(DownstreamTlsContext {
        common_tls_context: Some(common(vec![uri(Some(workload))], alpn)),
        require_client_certificate: boolean(true),
        disable_stateful_session_resumption: true,
        session_ticket_keys_type: Some(SessionTicketKeysType::DisableStatelessSessionResumption(true)),
        ..Default::default()
    })
}

fn uri(matcher: Option<StringMatcher>) -> SubjectAltNameMatcher {
    SubjectAltNameMatcher { san_type: SanType::Uri.into(), matcher, ..Default::default() }
}

fn common(peers: Vec<SubjectAltNameMatcher>, alpn: &[&str]) -> CommonTlsContext {
    CommonTlsContext {
        // Envoy's upstream default ends at TLS 1.2.
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv13.into(),
            tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
            ..Default::default()
        }),
        alpn_protocols: alpn.iter().map(ToString::to_string).collect(),
        tls_certificate_sds_secret_configs: vec![sds(WORKLOAD_SECRET)],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(
            CombinedCertificateValidationContext {
                default_validation_context: Some(CertificateValidationContext {
                    match_typed_subject_alt_names: peers,
                    ..Default::default()
                }),
                validation_context_sds_secret_config: Some(sds(TRUST_SECRET)),
                ..Default::default()
            },
        )),
        ..Default::default()
    }
}

fn sds(name: &str) -> SdsSecretConfig {
    SdsSecretConfig { name: name.to_owned(), sds_config: launcher_sds() }
}
