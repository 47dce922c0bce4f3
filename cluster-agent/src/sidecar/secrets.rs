//! The two secrets of this workload and what changes them; Envoy's SDS streams watch them.
//!
//! The trust set is kept on disk as the last known good, so that a launcher that starts without its agent still verifies
//! peers. An older set than the one held is refused, unless it is of a newer epoch.

use std::{collections::BTreeMap, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use isthmus_api::proto::local::v1::TrustSet;
use isthmus_identity::svid::Svid;
use isthmus_model::ids::{Stamp, TrustDomain};
use isthmus_runtime::{files::LastKnownGood, tasks::chain};
use prost::Message;
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;

use crate::xds::{
    Resources,
    names::{ResourceType, TRUST_SECRET, WORKLOAD_SECRET},
    secret,
};

/// Trust domains in one set; a federation has one per cluster.
const MAX_DOMAINS: usize = 10_000;
const MAX_ROOTS: usize = 100;

/// Roots by trust domain.
pub(super) type Roots = BTreeMap<TrustDomain, Vec<CertificateDer<'static>>>;

/// Why a trust set was not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TrustError {
    #[error("trust set {new} is older than {held}, which is held")]
    Stale { new: Stamp, held: Stamp },
    #[error("the trust set is malformed: {0}")]
    Malformed(&'static str),
    #[error("the trust set has no roots at all; peers could not be told apart from strangers")]
    Empty,
}

/// A checked trust set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trust {
    pub(super) stamp: Stamp,
    /// Of the clusters.
    pub(super) workloads: Roots,
}

impl Trust {
    pub(super) fn parse(set: TrustSet, federation: &TrustDomain) -> Result<Self, TrustError> {
        let stamp = set.stamp.and_then(|s| Stamp::try_from(s).ok()).ok_or(TrustError::Malformed("no stamp"))?;
        if set.domains.len() > MAX_DOMAINS {
            return Err(TrustError::Malformed("more trust domains than any federation has"));
        }
        let mut workloads = Roots::new();
        for domain in set.domains {
            let name: TrustDomain =
                domain.trust_domain.parse().map_err(|_| TrustError::Malformed("a trust domain's name is not valid"))?;
            if domain.roots.len() > MAX_ROOTS {
                return Err(TrustError::Malformed("too many roots for one trust domain"));
            }
            let roots = domain.roots.into_iter().map(CertificateDer::from).collect();
            if workloads.insert(name, roots).is_some() {
                return Err(TrustError::Malformed("a trust domain is named twice"));
            }
        }
        // They verify the agent, never a workload.
        workloads.remove(federation);
        if workloads.values().all(Vec::is_empty) {
            return Err(TrustError::Empty);
        }
        Ok(Self { stamp, workloads })
    }
}

#[derive(Clone, Default)]
struct Content {
    svid: Option<Svid>,
    trust: Option<Arc<Trust>>,
}

/// The secrets. Clones share them.
#[derive(Clone)]
pub(super) struct Secrets {
    content: watch::Sender<Content>,
    disk: Arc<LastKnownGood>,
    federation: TrustDomain,
}

impl Secrets {
    /// With the trust set that `disk` holds, if any.
    pub(super) fn new(svid: Svid, federation: TrustDomain, disk: LastKnownGood) -> Self {
        let trust = match disk.load() {
            Ok(None) => None,
            Ok(Some(bytes)) => TrustSet::decode(bytes.as_slice())
                .map_err(|_| TrustError::Malformed("not a message"))
                .and_then(|set| Trust::parse(set, &federation))
                .map_err(|error| tracing::warn!(%error, "the trust set on disk is of no use"))
                .ok(),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the trust set on disk cannot be read");
                None
            }
        };
        let content = Content { svid: Some(svid), trust: trust.map(Arc::new) };
        Self { content: watch::Sender::new(content), disk: Arc::new(disk), federation }
    }

    pub(super) fn set_svid(&self, svid: Svid) {
        self.content.send_modify(|content| content.svid = Some(svid));
    }

    /// Takes a set from the agent, if it is not older than the held one; keeps it on disk first.
    pub(super) fn set_trust(&self, set: TrustSet) -> Result<Arc<Trust>, TrustError> {
        let bytes = set.encode_to_vec();
        let trust = Arc::new(Trust::parse(set, &self.federation)?);
        if let Some(held) = &self.content.borrow().trust {
            if trust.stamp < held.stamp {
                return Err(TrustError::Stale { new: trust.stamp, held: held.stamp });
            }
            if trust == *held {
                return Ok(trust);
            }
        }
        if let Err(error) = self.disk.save(&bytes) {
            // Peers of today matter more than a restart tomorrow.
            tracing::error!(error = %chain(&error), "cannot keep the trust set on disk");
        }
        self.content.send_modify(|content| content.trust = Some(Arc::clone(&trust)));
        Ok(trust)
    }

    /// Resolves once there is a trust set.
    pub(super) async fn complete(&self) {
        // The sender lives in `self`, so the channel cannot close meanwhile.
        let _ = self.content.subscribe().wait_for(|content| content.trust.is_some()).await;
    }

    /// The secrets as resources, now and on every change.
    pub(super) fn watch(&self) -> SecretsWatch {
        SecretsWatch(self.content.subscribe())
    }
}

/// One reader's place.
pub(super) struct SecretsWatch(watch::Receiver<Content>);

impl SecretsWatch {
    /// The secrets now; marks them as seen.
    pub(super) fn resources(&mut self) -> Arc<Resources> {
        let content = self.0.borrow_and_update().clone();
        let mut resources = Resources::new(content.trust.as_ref().map(|t| t.stamp).unwrap_or_default());
        if let Some(svid) = content.svid {
            let secret = secret::workload(&svid.chain_pem(), &svid.key_pem());
            resources.insert(ResourceType::Secret, WORKLOAD_SECRET, secret);
        }
        if let Some(trust) = content.trust {
            let domains = trust.workloads.iter().map(|(domain, roots)| (domain.clone(), pem(roots))).collect();
            resources.insert(ResourceType::Secret, TRUST_SECRET, secret::trust(&domains));
        }
        Arc::new(resources)
    }

    /// Resolves when they changed; `false` when nothing changes any more. Cancel-safe.
    pub(super) async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

/// RFC 7468.
fn pem(certificates: &[CertificateDer<'_>]) -> String {
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = STANDARD.encode(certificate);
        let mut rest = encoded.as_str();
        while !rest.is_empty() {
            // Base64 is ASCII, so every place is a boundary.
            let (line, more) = rest.split_at(rest.len().min(64));
            text.push_str(line);
            text.push('\n');
            rest = more;
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use isthmus_api::proto::{common::v1 as common, local::v1::TrustDomainRoots};
    use isthmus_identity::{ca::CertificateAuthority, keys::KeyPair};
    use std::time::Duration;

    use super::*;

    fn set(revision: u64, domains: &[&str]) -> TrustSet {
        TrustSet {
            stamp: Some(common::Stamp { epoch: 1, revision }),
            domains: domains
                .iter()
                .map(|d| TrustDomainRoots { trust_domain: d.to_string(), roots: vec![vec![1, 2, 3]] })
                .collect(),
        }
    }

    fn secrets(dir: &std::path::Path) -> Secrets {
        isthmus_identity::install_crypto();
        let domain = "us-east.example".parse().unwrap();
        let ca = CertificateAuthority::create(&domain, Duration::from_secs(3600)).unwrap();
        let key = KeyPair::generate().unwrap();
        let id = "spiffe://us-east.example/ns/shop/sa/web".parse().unwrap();
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(600)).unwrap();
        let disk = LastKnownGood::new(dir.join("trust.lkg"), 1);
        Secrets::new(Svid::new(chain, &key).unwrap(), "isthmus.example".parse().unwrap(), disk)
    }

    #[test]
    fn the_trust_set_survives_a_restart_and_older_ones_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        secrets(dir.path()).set_trust(set(5, &["us-east.example"])).unwrap();
        let again = secrets(dir.path());
        assert!(again.watch().resources().find(ResourceType::Secret, TRUST_SECRET).is_some());
        let error = again.set_trust(set(4, &["us-east.example"])).unwrap_err();
        assert!(matches!(error, TrustError::Stale { .. }));
    }

    #[test]
    fn the_federations_roots_never_verify_workloads() {
        let dir = tempfile::tempdir().unwrap();
        let trust = secrets(dir.path()).set_trust(set(1, &["us-east.example", "isthmus.example"])).unwrap();
        assert_eq!(trust.workloads.len(), 1);
    }

    #[test]
    fn a_set_without_roots_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(secrets(dir.path()).set_trust(set(1, &["isthmus.example"])).unwrap_err(), TrustError::Empty);
    }
}
