//! The launcher's stream to its agent: who this sidecar is and whether its app answers go up, the trust set comes down.

use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use isthmus_api::proto::{
    common::v1 as common,
    local::v1::{
        AppReadiness, InboundPort, PortReadiness, SidecarHello, SidecarMessage, local_client::LocalClient,
        sidecar_message, sidecar_update,
    },
};
use isthmus_identity::enrol::{EnrolError, Member};
use isthmus_runtime::{
    backoff::Backoff,
    tasks::{Shutdown, chain},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tonic::Status;

use super::{config::Config, metrics::Metrics, probe::Ready, relay::MAX_MESSAGE, secrets::Secrets};

const CALL: Duration = Duration::from_secs(10);
/// How long the agent may take to end the stream after our end.
const GOODBYE: Duration = Duration::from_secs(1);
const RETRY_BASE: Duration = Duration::from_millis(100);
const RETRY_CAP: Duration = Duration::from_secs(3);

/// Everything the stream needs.
pub(super) struct Feed {
    pub(super) member: Member,
    pub(super) hello: SidecarHello,
    pub(super) ready: watch::Receiver<Ready>,
    pub(super) registered: watch::Sender<bool>,
    pub(super) secrets: Secrets,
    pub(super) metrics: Metrics,
}

#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error("prepare the connection to the agent")]
    Connection(#[from] EnrolError),
    #[error("the agent did not answer in time")]
    Deadline,
    #[error("the agent ended the stream")]
    Ended,
    #[error("the agent refused or the connection broke")]
    Status(#[from] Status),
}

/// What the launcher says of itself.
pub(super) fn hello(config: &Config) -> SidecarHello {
    SidecarHello {
        name: config.name.clone(),
        address: config.address.to_string(),
        inbound: config
            .inbound
            .iter()
            .map(|i| InboundPort {
                port: i.port.into(),
                app: i.app.to_string(),
                protocol: common::AppProtocol::from(i.protocol).into(),
            })
            .collect(),
        upstreams: config.upstreams.iter().map(ToString::to_string).collect(),
    }
}

impl Feed {
    /// Keeps the stream up until shutdown.
    pub(super) async fn run(mut self, shutdown: Shutdown) {
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        loop {
            let error = tokio::select! {
                error = self.stream(&mut backoff, &shutdown) => error,
                () = overdue(&shutdown) => return,
            };
            self.metrics.agent_connected.set(0);
            self.registered.send_replace(false);
            if shutdown.is_requested() {
                return;
            }
            tracing::warn!(agent = self.member.record().address, error = %chain(&error), "no stream to the agent");
            tokio::select! {
                () = shutdown.requested() => return,
                () = sleep(backoff.next()) => {}
            }
        }
    }

    async fn stream(&mut self, backoff: &mut Backoff, shutdown: &Shutdown) -> FeedError {
        match self.try_stream(backoff, shutdown).await {
            Ok(()) => FeedError::Ended,
            Err(error) => error,
        }
    }

    async fn try_stream(&mut self, backoff: &mut Backoff, shutdown: &Shutdown) -> Result<(), FeedError> {
        let mut client = LocalClient::new(self.member.channel()?).max_decoding_message_size(MAX_MESSAGE);
        let stop = shutdown.clone();
        // The end of our side, in order, tells the agent that this workload goes on purpose.
        let messages =
            messages(self.hello.clone(), self.ready.clone()).take_until(async move { stop.requested().await });
        let call = timeout(CALL, client.sidecar_feed(messages)).await.map_err(|_| FeedError::Deadline)?;
        let mut updates = call?.into_inner();
        // No deadline here: silence is normal, and a dead connection is found by the channel's pings.
        while let Some(update) = updates.message().await? {
            match update.kind {
                Some(sidecar_update::Kind::Registered(_)) => {
                    tracing::info!(agent = self.member.record().address, "registered with the agent");
                    self.metrics.agent_connected.set(1);
                    self.registered.send_replace(true);
                    backoff.reset();
                }
                Some(sidecar_update::Kind::Trust(set)) => match self.secrets.set_trust(set) {
                    Ok(trust) => {
                        let revision = i64::try_from(trust.stamp.revision.0).unwrap_or(i64::MAX);
                        self.metrics.trust_revision.set(revision);
                    }
                    Err(error) => tracing::warn!(%error, "trust set refused"),
                },
                None => tracing::debug!("an update of a kind that this release does not know"),
            }
        }
        Ok(())
    }
}

/// Some time after shutdown is requested: the agent has had its chance to end the stream.
async fn overdue(shutdown: &Shutdown) {
    shutdown.requested().await;
    sleep(GOODBYE).await;
}

/// First the hello, then the app's readiness, whole, now and on every change.
fn messages(hello: SidecarHello, ready: watch::Receiver<Ready>) -> impl Stream<Item = SidecarMessage> + Send + 'static {
    let first = (Some(hello), ready, false);
    stream::unfold(first, |(hello, mut ready, told)| async move {
        if let Some(hello) = hello {
            let kind = Some(sidecar_message::Kind::Hello(hello));
            return Some((SidecarMessage { kind }, (None, ready, told)));
        }
        if told {
            ready.changed().await.ok()?;
        }
        let now = ready.borrow_and_update().clone();
        let ports = now.into_iter().map(|(port, ready)| PortReadiness { port: port.into(), ready }).collect();
        let kind = Some(sidecar_message::Kind::Readiness(AppReadiness { ports }));
        Some((SidecarMessage { kind }, (None, ready, true)))
    })
}
