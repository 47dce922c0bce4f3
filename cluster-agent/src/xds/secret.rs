//! The two secrets that the launcher serves to its Envoy: the workload's certificate and the trust set.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate, secret,
        spiffe_cert_validator_config,
    },
};
use isthmus_model::ids::TrustDomain;

use super::{
    names::{TRUST_SECRET, WORKLOAD_SECRET},
    wire::extension,
};

/// Key and chain, PEM.
pub fn workload(chain_pem: &str, key_pem: &str) -> Secret {
    Secret {
        name: WORKLOAD_SECRET.to_owned(),
        r#type: Some(secret::Type::TlsCertificate(TlsCertificate {
            certificate_chain: inline(chain_pem),
            private_key: inline(key_pem),
            ..Default::default()
        })),
    }
}

/// Each trust domain with its own roots (PEM): an SVID is verified with its own domain's bundle alone. A domain without
/// roots trusts nobody and is left out, for Envoy refuses an empty bundle.
pub fn trust(domains: &BTreeMap<TrustDomain, String>) -> Secret {
    let trust_domains = domains
        .iter()
        .filter(|(_, roots)| !roots.is_empty())
        .map(|(domain, roots)| spiffe_cert_validator_config::TrustDomain {
            name: domain.to_string(),
            trust_bundle: inline(roots),
            ..Default::default()
        })
        .collect();
    let spiffe = SpiffeCertValidatorConfig { trust_domains, ..Default::default() };
    Secret {
        name: TRUST_SECRET.to_owned(),
        r#type: Some(secret::Type::ValidationContext(CertificateValidationContext {
            custom_validator_config: Some(extension("envoy.tls.cert_validator.spiffe", spiffe)),
            ..Default::default()
        })),
    }
}

fn inline(text: &str) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineString(text.to_owned())), ..Default::default() })
}
