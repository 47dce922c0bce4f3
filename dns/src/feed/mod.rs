//! The stream from the cluster's agent that keeps the zone current, and what keeps the server serving without it.
//!
//! In: `Local.DnsFeed`. Out: the zone, swapped whole; last-known-good on disk; an acknowledgement of each revision.
//! Holds: losing the agent, or the certificate, changes no answer; a restart serves the saved state before any agent
//! answers. It never empties the zone by itself.

mod credentials;
mod state;
#[cfg(test)]
mod tests;

use std::{error::Error, net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use isthmus_api::proto::local::v1::{
    DnsConfig, DnsHello, DnsMessage, DnsUpdate, dns_message, dns_update, local_client::LocalClient,
};
use isthmus_identity::{
    bundle::{BundleDocument, TrustStore},
    grpc, renew,
};
use isthmus_model::{global::GlobalSnapshot, ids::Stamp, time::Timestamp};
use isthmus_runtime::{
    BoxError,
    backoff::Backoff,
    files::LastKnownGood,
    health::Gate,
    tasks::{Shutdown, chain},
};
use prost::Message as _;
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;

pub use self::credentials::CredentialError;
use self::{
    credentials::{Credentials, Desk, client_config},
    state::{Refused, State},
};
use crate::{
    metrics::{Metrics, Refusal},
    server::CurrentZone,
    zone::Zone,
};

/// The payload of the last-known-good file: a `DnsConfig` message.
const LKG_FORMAT: u32 = 1;
/// Largest update taken: a federation's whole state.
const MAX_UPDATE: usize = 256 * 1024 * 1024;
/// Until the agent answers the opening of the stream.
const OPEN: Duration = Duration::from_secs(10);
/// Messages to the agent under way. Only acknowledgements: if it does not read them, the stream is given up.
const OUTBOX: usize = 16;
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Certificates so short that they are always due are still not renewed in a busy loop.
const RENEW_PAUSE: Duration = Duration::from_secs(1);
const RENEW_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// What the feed needs from the rest of the server.
pub(crate) struct FeedConfig {
    pub(crate) name: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) token_file: Option<PathBuf>,
    pub(crate) server: Option<Ipv4Addr>,
    pub(crate) zone: CurrentZone,
    pub(crate) metrics: Metrics,
    /// Opened once there is a zone.
    pub(crate) known: Gate,
}

/// Keeps the zone current; see the module.
pub(crate) struct Feed {
    desk: Desk,
    server: Option<Ipv4Addr>,
    zone: CurrentZone,
    metrics: Metrics,
    known: Gate,
    saved: LastKnownGood,
    trust: TrustStore,
    held: Option<(Credentials, State)>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("{0}")]
    Agent(String),
    #[error("the agent did not answer within {} s", OPEN.as_secs())]
    Silent,
    #[error("the agent closed the stream")]
    Closed,
    #[error("the agent does not read acknowledgements")]
    Stuck,
    #[error(transparent)]
    Credentials(#[from] CredentialError),
}

impl Feed {
    /// Reads what an earlier run left and serves it at once. Fails only where a person must act first: without a
    /// certificate and without a usable token.
    pub(crate) fn start(config: FeedConfig) -> Result<Self, CredentialError> {
        let saved = LastKnownGood::new(config.state_dir.join("dns.lkg"), LKG_FORMAT);
        let desk = Desk { name: config.name, state_dir: config.state_dir, token_file: config.token_file };
        let found = desk.load()?;
        if found.is_none() {
            desk.token()?;
        }
        let mut feed = Self {
            desk,
            server: config.server,
            zone: config.zone,
            metrics: config.metrics,
            known: config.known,
            saved,
            trust: TrustStore::new(),
            held: None,
        };
        if let Some(credentials) = found {
            feed.adopt(credentials);
            feed.restore();
        }
        Ok(feed)
    }

    /// Follows the agent until `shutdown`.
    pub(crate) async fn run(mut self, shutdown: Shutdown) -> Result<(), BoxError> {
        tokio::select! {
            () = self.follow() => Ok(()),
            () = shutdown.requested() => Ok(()),
        }
    }

    async fn follow(&mut self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let now = Timestamp(isthmus_runtime::now());
            if self.held.as_ref().is_none_or(|(credentials, _)| credentials.expired(now)) {
                match self.desk.enrol().await {
                    Ok(credentials) => {
                        tracing::info!(agent = credentials.agent.address, "enrolled");
                        self.adopt(credentials);
                    }
                    Err(error) => {
                        tracing::error!(error = chain(&error), "no certificate from the agent; trying again");
                        time::sleep(backoff.next()).await;
                        continue;
                    }
                }
            }
            if let Err(error) = self.session(&mut backoff).await {
                tracing::warn!(error = chain(&error), "the agent's feed is down; serving what is known");
            }
            self.metrics.connected(false);
            time::sleep(backoff.next()).await;
        }
    }

    /// One stream and, beside it, the renewal of the certificate. Ends with the stream.
    async fn session(&mut self, backoff: &mut Backoff) -> Result<(), SessionError> {
        let Some((credentials, state)) = &mut self.held else { return Ok(()) };
        let keep = Keeper { zone: &self.zone, metrics: &self.metrics, known: &self.known, saved: &self.saved };
        let stream = stream(&self.desk.name, credentials, state, &self.trust, &keep, backoff);
        tokio::select! {
            ended = stream => ended,
            () = renewals(&self.desk, credentials, &self.trust, &self.metrics) => Ok(()),
        }
    }

    /// Takes a certificate into use. What was known stays known.
    fn adopt(&mut self, credentials: Credentials) {
        let agent = &credentials.agent;
        let state = match self.held.take() {
            Some((_, state)) => state,
            None => State::new(agent.cluster.clone(), agent.federation.clone(), agent.bundle.clone(), self.server),
        };
        trust(&self.trust, &state);
        self.metrics.svid_expires(credentials.source.current().not_after());
        self.held = Some((credentials, state));
    }

    /// Serves last-known-good, if there is any that can be read.
    fn restore(&mut self) {
        let bytes = match self.saved.load() {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(error = chain(&error), "last-known-good is lost; waiting for the agent");
                return;
            }
        };
        let Some((_, state)) = &mut self.held else { return };
        let keep = Keeper { zone: &self.zone, metrics: &self.metrics, known: &self.known, saved: &self.saved };
        match DnsConfig::decode(bytes.as_slice()).map_err(BoxError::from).and_then(|c| Ok(state.configure(c)?)) {
            Ok(zone) => {
                trust(&self.trust, state);
                tracing::info!(revision = %zone.stamp(), "serving last-known-good");
                keep.serve(zone);
            }
            Err(error) => {
                tracing::error!(error = chain(&*error), "last-known-good is not usable; waiting for the agent");
            }
        }
    }
}

/// Where accepted state goes.
struct Keeper<'a> {
    zone: &'a CurrentZone,
    metrics: &'a Metrics,
    known: &'a Gate,
    saved: &'a LastKnownGood,
}

impl Keeper<'_> {
    fn serve(&self, zone: Arc<Zone>) {
        self.metrics.zone(zone.stamp(), zone.len());
        self.zone.store(Some(zone));
        self.known.ready();
    }

    /// The file is synced to disk on a thread that may block, so that queries do not wait for it.
    async fn save(&self, bytes: Vec<u8>) {
        let saved = self.saved.clone();
        match tokio::task::spawn_blocking(move || saved.save(&bytes)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(error = chain(&error), "state not saved: a restart would serve an older one");
            }
            Err(error) => tracing::error!(%error, "state not saved: a restart would serve an older one"),
        }
    }
}

async fn stream(
    name: &str,
    credentials: &Credentials,
    state: &mut State,
    roots: &TrustStore,
    keep: &Keeper<'_>,
    backoff: &mut Backoff,
) -> Result<(), SessionError> {
    let channel = grpc::connect_lazy(&credentials.agent.address, client_config(credentials, roots)?);
    let mut client = LocalClient::new(channel).max_decoding_message_size(MAX_UPDATE);
    let (outbox, messages) = mpsc::channel(OUTBOX);
    let hello = dns_message::Kind::Hello(DnsHello { name: name.to_owned() });
    send(&outbox, hello)?;
    let opened = time::timeout(OPEN, client.dns_feed(ReceiverStream::new(messages))).await;
    let mut updates = match opened {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Err(SessionError::Agent(describe(&status))),
        Err(_) => return Err(SessionError::Silent),
    };
    keep.metrics.connected(true);
    tracing::info!(agent = credentials.agent.address, "following the agent");
    // No deadline: silence is normal here, a dead peer is found by HTTP/2 keepalive.
    loop {
        match updates.message().await {
            Ok(Some(DnsUpdate { kind: Some(kind) })) => match accept(kind, state, roots, keep).await {
                Ok(Some(applied)) => {
                    backoff.reset();
                    send(&outbox, dns_message::Kind::Applied(applied.into()))?;
                }
                Ok(None) => {}
                Err(refused) => {
                    keep.metrics.count_refusal(refused.kind());
                    tracing::error!(error = chain(&refused), "update refused; serving what was known before");
                }
            },
            // A kind that only newer agents know.
            Ok(Some(DnsUpdate { kind: None })) => {}
            Ok(None) => return Err(SessionError::Closed),
            Err(status) => return Err(SessionError::Agent(describe(&status))),
        }
    }
}

/// Takes one update: zone first, disk second. Returns what to acknowledge.
async fn accept(
    kind: dns_update::Kind,
    state: &mut State,
    roots: &TrustStore,
    keep: &Keeper<'_>,
) -> Result<Option<Stamp>, Refused> {
    match kind {
        dns_update::Kind::Config(update) => {
            let mut bytes = update.encode_to_vec();
            let zone = state.configure(update)?;
            let stamp = zone.stamp();
            if let Some((clusters, global)) = state.unrevoked() {
                keep.metrics.count_refusal(Refusal::Revocation);
                tracing::error!(?clusters, "the agent's state takes revocations back; they stand");
                bytes = corrected(&bytes, global);
            }
            trust(roots, state);
            for service in zone.unaddressed() {
                tracing::warn!(%service, "no address: policy closes it to this cluster, or vipRange is too small");
            }
            tracing::debug!(revision = %stamp, services = zone.len(), "zone applied");
            keep.serve(zone);
            keep.save(bytes).await;
            Ok(Some(stamp))
        }
        dns_update::Kind::Availability(report) => {
            if let Some(zone) = state.observe(report)? {
                keep.serve(zone);
            }
            Ok(None)
        }
    }
}

/// The configuration that `bytes` hold, with `global` as its state: what is saved must not take back what stands.
fn corrected(bytes: &[u8], global: &GlobalSnapshot) -> Vec<u8> {
    // These bytes were a message a moment ago.
    let update = DnsConfig::decode(bytes).unwrap_or_default();
    DnsConfig { global: Some(global.into()), ..update }.encode_to_vec()
}

/// Renews the certificate at half its life, for ever.
async fn renewals(desk: &Desk, credentials: &Credentials, trust: &TrustStore, metrics: &Metrics) {
    let mut backoff = Backoff::new(RENEW_RETRY.0, RENEW_RETRY.1);
    loop {
        let due = renew::renew_at(&credentials.source.current());
        time::sleep(due.since(Timestamp(isthmus_runtime::now())).max(RENEW_PAUSE)).await;
        while let Err(error) = desk.renew(credentials, trust).await {
            tracing::warn!(error = chain(&error), "certificate not renewed; trying again");
            time::sleep(backoff.next()).await;
        }
        backoff.reset();
        metrics.svid_expires(credentials.source.current().not_after());
        tracing::info!("certificate renewed");
    }
}

/// Verifies the agent with the federation's roots as of `state`.
fn trust(store: &TrustStore, state: &State) {
    let bundle = state.bundle();
    match BundleDocument::parse(&bundle.document) {
        Ok(document) => store.set([(bundle.trust_domain.clone(), document.x509_roots)].into()),
        Err(error) => tracing::error!(error = chain(&error), "the federation's trust bundle is not usable"),
    }
}

fn send(outbox: &mpsc::Sender<DnsMessage>, kind: dns_message::Kind) -> Result<(), SessionError> {
    outbox.try_send(DnsMessage { kind: Some(kind) }).map_err(|e| match e {
        mpsc::error::TrySendError::Full(_) => SessionError::Stuck,
        mpsc::error::TrySendError::Closed(_) => SessionError::Closed,
    })
}

/// A status in words: the peer's, or, if the transport failed, the innermost reason.
fn describe(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = status.source();
    while let Some(error) = source {
        text = error.to_string();
        source = error.source();
    }
    text
}
