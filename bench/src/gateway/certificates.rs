//! The identities of both sides, from one CA: the same for every system.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use isthmus_identity::{ca::CertificateAuthority, keys::KeyPair, svid::Svid};
use isthmus_model::ids::{ClusterName, SpiffeId, TrustDomain};

use super::place::End;

pub(super) const FEDERATION: &str = "isthmus.example";
const LIFETIME: Duration = Duration::from_secs(86_400);

/// A folder with `ca.pem`, and key and certificate of each side.
#[derive(Clone, Debug)]
pub(super) struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    /// Makes them in `dir`.
    pub(super) fn make(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let ca = CertificateAuthority::load_or_create(dir, &federation()?).context("make a CA")?;
        for end in [End::Near, End::Far] {
            let key = KeyPair::generate()?;
            // Envoy's QUIC client wants a DNS name in the certificate beside the SPIFFE ID.
            let chain = ca.sign_csr(&key.csr_der()?, &id(end)?, &[dns_name(end)], LIFETIME)?;
            Svid::new(chain, &key)?.save(dir, stem(end)).context("save a certificate")?;
        }
        Ok(Self { dir: dir.to_owned() })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    pub(super) fn chain(&self, end: End) -> PathBuf {
        self.dir.join(format!("{}.pem", stem(end)))
    }

    pub(super) fn key(&self, end: End) -> PathBuf {
        self.dir.join(format!("{}.key", stem(end)))
    }
}

pub(super) fn federation() -> anyhow::Result<TrustDomain> {
    FEDERATION.parse().context("the federation's name")
}

/// The side's cluster.
pub(super) fn cluster(end: End) -> anyhow::Result<ClusterName> {
    stem(end).parse().context("a cluster's name")
}

/// The side's SPIFFE ID.
pub(super) fn id(end: End) -> anyhow::Result<SpiffeId> {
    SpiffeId::component(&federation()?, &cluster(end)?, "gateway").context("a SPIFFE ID")
}

/// The side's DNS name.
pub(super) fn dns_name(end: End) -> String {
    format!("{}.{FEDERATION}", stem(end))
}

/// The side's name, and that of its files.
pub(super) fn stem(end: End) -> &'static str {
    match end {
        End::Near => "near",
        End::Far => "far",
    }
}
