//! The stream from the cluster's agent that keeps the zone current, and what keeps the server serving without it.
//!
//! In: `Local.DnsFeed`. Out: the zone, swapped whole; last-known-good on disk; an acknowledgement of each revision.
//! Holds: losing the agent, or the certificate, changes no answer; a restart serves the saved state before any agent
//! answers, even with a certificate that has ended. It never empties the zone by itself.

mod state;
#[cfg(test)]
mod tests;

use std::{net::Ipv4Addr, path::PathBuf, sync::Arc, time::Duration};

use isthmus_api::proto::local::v1::{
    DnsConfig, DnsHello, DnsMessage, DnsUpdate, dns_message, dns_update, local_client::LocalClient,
};
use isthmus_identity::{
    enrol::{EnrolError, Member, Newcomer, Subject},
    grpc::words,
};
use isthmus_model::{global::GlobalSnapshot, ids::Stamp};
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

use self::state::{Refused, State};
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
    name: String,
    newcomer: Newcomer,
    /// None at the first start.
    held: Option<(Member, State)>,
    server: Option<Ipv4Addr>,
    keep: Keeper,
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
    Connection(#[from] EnrolError),
}

impl Feed {
    /// Reads what an earlier run left and serves it at once. Fails only where a person must act first: without a
    /// certificate and without a usable token.
    pub(crate) fn start(config: FeedConfig) -> Result<Self, EnrolError> {
        let saved = LastKnownGood::new(config.state_dir.join("dns.lkg"), LKG_FORMAT);
        let keep = Keeper { zone: config.zone, metrics: config.metrics, known: config.known, saved };
        let newcomer = Newcomer {
            subject: Subject::Dns(config.name.clone()),
            state_dir: config.state_dir,
            token_file: config.token_file,
        };
        let held = match newcomer.load()? {
            Some(member) => {
                let mut state = state_of(&member, config.server);
                restore(&member, &mut state, &keep);
                Some((member, state))
            }
            None => {
                newcomer.token()?;
                None
            }
        };
        Ok(Self { name: config.name, newcomer, held, server: config.server, keep })
    }

    /// Follows the agent until `shutdown`. Fails if the agent refuses the token of a first start.
    pub(crate) async fn run(self, shutdown: Shutdown) -> Result<(), BoxError> {
        tokio::select! {
            ended = self.follow() => Ok(ended?),
            () = shutdown.requested() => Ok(()),
        }
    }

    async fn follow(self) -> Result<(), EnrolError> {
        let (member, mut state) = match self.held {
            Some(held) => held,
            None => {
                let member = self.newcomer.enrol().await?;
                let state = state_of(&member, self.server);
                (member, state)
            }
        };
        let metrics = &self.keep.metrics;
        metrics.svid_expires(member.source().current().not_after());
        let renewals = member.clone().keep_fresh(|outcome| {
            if let Ok(svid) = outcome {
                metrics.svid_expires(svid.not_after());
            }
        });
        tokio::select! {
            () = renewals => {}
            () = sessions(&self.name, &member, &mut state, &self.keep) => {}
        }
        Ok(())
    }
}

/// Nothing accepted yet.
fn state_of(member: &Member, server: Option<Ipv4Addr>) -> State {
    let record = member.record();
    State::new(record.cluster.clone(), record.federation().clone(), record.bundle, server)
}

/// Serves last-known-good, if there is any that can be read.
fn restore(member: &Member, state: &mut State, keep: &Keeper) {
    let bytes = match keep.saved.load() {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return,
        Err(error) => {
            tracing::error!(error = chain(&error), "last-known-good is lost; waiting for the agent");
            return;
        }
    };
    match DnsConfig::decode(bytes.as_slice()).map_err(BoxError::from).and_then(|c| Ok(state.configure(c)?)) {
        Ok(zone) => {
            trust(member, state);
            tracing::info!(revision = %zone.stamp(), "serving last-known-good");
            keep.serve(zone);
        }
        Err(error) => {
            tracing::error!(error = chain(&*error), "last-known-good is not usable; waiting for the agent");
        }
    }
}

/// One stream after the other, for ever.
async fn sessions(name: &str, member: &Member, state: &mut State, keep: &Keeper) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    loop {
        if let Err(error) = stream(name, member, state, keep, &mut backoff).await {
            tracing::warn!(error = chain(&error), "the agent's feed is down; serving what is known");
        }
        keep.metrics.connected(false);
        time::sleep(backoff.next()).await;
    }
}

/// Where accepted state goes.
struct Keeper {
    zone: CurrentZone,
    metrics: Metrics,
    /// Opened once there is a zone.
    known: Gate,
    saved: LastKnownGood,
}

impl Keeper {
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
    member: &Member,
    state: &mut State,
    keep: &Keeper,
    backoff: &mut Backoff,
) -> Result<(), SessionError> {
    let mut client = LocalClient::new(member.channel()?).max_decoding_message_size(MAX_UPDATE);
    let (outbox, messages) = mpsc::channel(OUTBOX);
    let hello = dns_message::Kind::Hello(DnsHello { name: name.to_owned() });
    send(&outbox, hello)?;
    let opened = time::timeout(OPEN, client.dns_feed(ReceiverStream::new(messages))).await;
    let mut updates = match opened {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Err(SessionError::Agent(words(&status))),
        Err(_) => return Err(SessionError::Silent),
    };
    keep.metrics.connected(true);
    tracing::info!(agent = member.record().address, "following the agent");
    // No deadline: silence is normal here, a dead peer is found by HTTP/2 keepalive.
    loop {
        match updates.message().await {
            Ok(Some(DnsUpdate { kind: Some(kind) })) => match accept(kind, state, member, keep).await {
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
            Err(status) => return Err(SessionError::Agent(words(&status))),
        }
    }
}

/// Takes one update: zone first, disk second. Returns what to acknowledge.
async fn accept(
    kind: dns_update::Kind,
    state: &mut State,
    member: &Member,
    keep: &Keeper,
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
            for service in zone.unaddressed() {
                tracing::warn!(%service, "no address: policy closes it to this cluster, or vipRange is too small");
            }
            tracing::debug!(revision = %stamp, services = zone.len(), "zone applied");
            keep.serve(zone);
            keep.save(bytes).await;
            // After the state, which must never be older than the bundle that vouches for it.
            trust(member, state);
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

/// Verifies the agent with the federation's roots as of `state`, also after a restart.
fn trust(member: &Member, state: &State) {
    if let Err(error) = member.succeed(state.bundle()) {
        tracing::error!(error = chain(&error), "the federation's new trust bundle cannot be taken over");
    }
}

fn send(outbox: &mpsc::Sender<DnsMessage>, kind: dns_message::Kind) -> Result<(), SessionError> {
    outbox.try_send(DnsMessage { kind: Some(kind) }).map_err(|e| match e {
        mpsc::error::TrySendError::Full(_) => SessionError::Stuck,
        mpsc::error::TrySendError::Closed(_) => SessionError::Closed,
    })
}
