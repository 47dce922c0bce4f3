//! How a gateway, DNS server or workload becomes a member of its cluster, and stays one.
//!
//! Once, with a one-time token from the agent: the token names the agent's address and pins the federation's CA; the key is
//! made here and never leaves. What comes back is kept in the state folder: `<role>.pem` and `<role>.key` (the SVID), and
//! `agent.json` (where the agent is and what verifies it), which is written first, so that an SVID never stands without it.
//! From then on each certificate pays for the next, with a new key. One that ended leads back to the token.
//!
//! What holds: a token that cannot work is an error that names the remedy; an agent that cannot be reached is asked again; a
//! federation's bundle is replaced only by one that it vouches for. What to do while there is no certificate is the
//! caller's affair.

mod by_token;
mod error;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use isthmus_api::proto::local::v1::{RenewRequest, local_client::LocalClient};
use isthmus_model::{
    ids::{ClusterName, SpiffeId, TrustDomain},
    service::TrustBundle,
    time::Timestamp,
};
use isthmus_runtime::{backoff::Backoff, files, tasks::chain};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use tonic::transport::Channel;

pub use self::error::EnrolError;
use crate::{
    bundle::{BundleDocument, TrustStore, verify_successor},
    grpc,
    keys::KeyPair,
    now,
    renew::renew_at,
    svid::Svid,
    tls::{IdentitySource, client_config},
};

const RECORD: &str = "agent.json";
/// Written and removed before a token is spent.
const PROBE: &str = ".probe";
const ENROL_RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
const RENEW_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// No certificate is renewed sooner than this after it came, however short its life.
const SHORTEST_USE: Duration = Duration::from_secs(1);
/// The wait before a renewal is cut into pieces of this length, so that a suspended machine does not oversleep.
const RENEWAL_CHECK: Duration = Duration::from_secs(30);

/// As what a program enrols.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A gateway of this name.
    Gateway(String),
    /// A DNS server of this name.
    Dns(String),
    /// The workload that the token names.
    Workload,
}

impl Subject {
    /// The first part of the token's subject, the certificate's files' name, and the last part of a component's SPIFFE ID.
    fn role(&self) -> &'static str {
        match self {
            Self::Gateway(_) => "gateway",
            Self::Dns(_) => "dns",
            Self::Workload => "workload",
        }
    }

    /// As the agent repeats it: empty for workloads.
    fn name(&self) -> &str {
        match self {
            Self::Gateway(name) | Self::Dns(name) => name,
            Self::Workload => "",
        }
    }

    /// Whether a token for `subject` is one for this program.
    fn admits(&self, subject: &str) -> bool {
        subject.strip_prefix(self.role()).and_then(|rest| rest.strip_prefix('/')).is_some_and(|rest| match self {
            Self::Gateway(name) | Self::Dns(name) => rest == name,
            Self::Workload => true,
        })
    }

    /// The command that mints a token for this program.
    fn mint_command(&self) -> String {
        let name = if *self == Self::Workload { "NAMESPACE/SERVICEACCOUNT" } else { self.name() };
        format!("isthmus-agent token {} {name} --config <the agent's config>", self.role())
    }
}

/// A program that is to be a member.
#[derive(Clone, Debug)]
pub struct Newcomer {
    /// As what.
    pub subject: Subject,
    /// Where the membership is kept.
    pub state_dir: PathBuf,
    /// Where the one-time token lies; read only while there is no valid certificate.
    pub token_file: Option<PathBuf>,
}

/// What a member knows of its agent: the content of `agent.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Where the agent is dialled, "host:port".
    pub address: String,
    /// Its cluster, and ours.
    pub cluster: ClusterName,
    /// The federation's, by which the agent is verified.
    pub bundle: TrustBundle,
}

impl Record {
    /// The federation's trust domain.
    pub fn federation(&self) -> &TrustDomain {
        &self.bundle.trust_domain
    }

    fn apply(&self, trust: &TrustStore) -> Result<(), EnrolError> {
        let roots = BundleDocument::parse(&self.bundle.document)?.x509_roots;
        trust.set([(self.federation().clone(), roots)].into());
        Ok(())
    }
}

impl Newcomer {
    /// The membership that an earlier run left, with a certificate that may have ended.
    pub fn load(&self) -> Result<Option<Member>, EnrolError> {
        let path = self.state_dir.join(RECORD);
        let Some(svid) = Svid::load(&self.state_dir, self.subject.role())? else { return Ok(None) };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(EnrolError::State { path, source }),
        };
        let command = self.subject.mint_command();
        let record = serde_json::from_slice(&text).map_err(|source| EnrolError::Damaged { path, command, source })?;
        Member::new(self.clone(), record, svid).map(Some)
    }

    /// A new membership by token. Waits for an agent that cannot be reached, as long as the token is good.
    pub async fn enrol(self) -> Result<Member, EnrolError> {
        self.try_folder()?;
        let mut backoff = Backoff::new(ENROL_RETRY.0, ENROL_RETRY.1);
        loop {
            match self.enrol_once().await {
                Ok((record, svid)) => {
                    self.keep(&record)?;
                    svid.save(&self.state_dir, self.subject.role())?;
                    tracing::info!(id = %svid.id(), agent = record.address, "enrolled");
                    return Member::new(self, record, svid);
                }
                Err(error) if error.is_passing() => {
                    tracing::warn!(error = chain(&error), "not enrolled yet; trying again");
                    sleep(backoff.next()).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The membership from disk, if its certificate is valid, or else a new one by token.
    pub async fn obtain(self) -> Result<Member, EnrolError> {
        match self.load()? {
            Some(member) if !member.has_ended() => return Ok(member),
            Some(member) => {
                tracing::warn!(id = %member.source.current().id(), "the certificate on disk has ended; a token is needed");
            }
            None => {}
        }
        self.enrol().await
    }

    /// A token works once: it is not to be spent on a certificate that cannot be kept.
    fn try_folder(&self) -> Result<(), EnrolError> {
        let path = self.state_dir.join(PROBE);
        let tried = files::write_secret(&path, &[0; 4_096]).and_then(|()| fs::remove_file(&path));
        tried.map_err(|source| EnrolError::State { path, source })
    }

    fn keep(&self, record: &Record) -> Result<(), EnrolError> {
        let path = self.state_dir.join(RECORD);
        let written = serde_json::to_vec_pretty(record).map_err(io::Error::from);
        let written = written.and_then(|text| files::write_secret(&path, &text));
        written.map_err(|source| EnrolError::State { path, source })
    }
}

/// A member of a cluster. Clones share certificate and record.
#[derive(Clone, Debug)]
pub struct Member {
    newcomer: Newcomer,
    record: Arc<Mutex<Record>>,
    source: IdentitySource,
    trust: TrustStore,
}

impl Member {
    fn new(newcomer: Newcomer, record: Record, svid: Svid) -> Result<Self, EnrolError> {
        let trust = TrustStore::new();
        record.apply(&trust)?;
        Ok(Self { newcomer, record: Arc::new(Mutex::new(record)), source: IdentitySource::new(svid), trust })
    }

    /// The certificate, swapped in place.
    pub fn source(&self) -> &IdentitySource {
        &self.source
    }

    /// The federation's roots, swapped in place.
    pub fn trust(&self) -> &TrustStore {
        &self.trust
    }

    /// What is known of the agent now.
    pub fn record(&self) -> Record {
        self.lock().clone()
    }

    /// A channel to the agent, and to nobody else, with the certificate of the moment.
    pub fn channel(&self) -> Result<Channel, EnrolError> {
        let record = self.record();
        let agent = SpiffeId::component(record.federation(), &record.cluster, "agent")?;
        let tls = client_config(Some(&self.source), &self.trust, Arc::new(move |id| *id == agent), &[b"h2"])?;
        Ok(grpc::connect_lazy(&record.address, Arc::new(tls)))
    }

    /// Takes over a new bundle of the federation, if the one before vouches for it; it is kept for the next start.
    pub fn succeed(&self, bundle: &TrustBundle) -> Result<(), EnrolError> {
        let mut record = self.lock();
        if record.bundle.document == bundle.document && record.bundle.trust_domain == bundle.trust_domain {
            return Ok(());
        }
        verify_successor(&record.bundle, bundle)?;
        let next = Record { bundle: bundle.clone(), ..record.clone() };
        next.apply(&self.trust)?;
        self.newcomer.keep(&next)?;
        *record = next;
        Ok(())
    }

    /// Renews the certificate around half of its life, for ever; `tell` hears of each new certificate and each failure.
    pub async fn keep_fresh(self, mut tell: impl FnMut(Result<&Svid, &EnrolError>)) {
        let mut backoff = Backoff::new(RENEW_RETRY.0, RENEW_RETRY.1);
        let mut earliest = Timestamp(0);
        loop {
            let due = renew_at(&self.source.current()).max(earliest);
            while now() < due {
                sleep(due.since(now()).min(RENEWAL_CHECK)).await;
            }
            while let Err(error) = self.refresh().await {
                let ends = self.source.current().not_after();
                tracing::warn!(error = chain(&error), %ends, "certificate not renewed yet");
                tell(Err(&error));
                sleep(backoff.next()).await;
            }
            backoff.reset();
            let svid = self.source.current();
            tracing::info!(id = %svid.id(), ends = %svid.not_after(), "certificate renewed");
            tell(Ok(&svid));
            // A CA dates certificates back, for clocks that differ; half of a short life may have passed at issue.
            earliest = now() + (svid.not_after().since(now()) / 3).max(SHORTEST_USE);
        }
    }

    /// A new certificate by the present one, or by token if that has ended.
    async fn refresh(&self) -> Result<(), EnrolError> {
        if !self.has_ended() {
            return self.renew().await;
        }
        self.newcomer.try_folder()?;
        let (record, svid) = self.newcomer.enrol_once().await?;
        self.is_ours(&svid)?;
        record.apply(&self.trust)?;
        self.newcomer.keep(&record)?;
        *self.lock() = record;
        self.take(svid)
    }

    async fn renew(&self) -> Result<(), EnrolError> {
        let key = KeyPair::generate()?;
        let mut client = LocalClient::new(self.channel()?);
        let asked = by_token::call(client.renew(RenewRequest { csr: key.csr_der()? })).await;
        let answer = asked.map_err(|status| by_token::unreached(&self.record().address, &status))?;
        let bundle = by_token::bundle_of(&answer)?;
        let svid = by_token::svid_of(answer, &key)?;
        self.is_ours(&svid)?;
        // A refused bundle costs only itself: everyone under the roots known goes on working.
        if let Err(error) = self.succeed(&bundle) {
            tracing::error!(error = chain(&error), "the federation's new trust bundle is refused; the old one stands");
        }
        self.take(svid)
    }

    fn is_ours(&self, svid: &Svid) -> Result<(), EnrolError> {
        let same = svid.id() == self.source.current().id();
        if same { Ok(()) } else { Err(EnrolError::Answer("the new certificate is for another identity")) }
    }

    fn take(&self, svid: Svid) -> Result<(), EnrolError> {
        svid.save(&self.newcomer.state_dir, self.newcomer.subject.role())?;
        self.source.set(svid);
        Ok(())
    }

    fn has_ended(&self) -> bool {
        self.source.current().not_after() <= now()
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
