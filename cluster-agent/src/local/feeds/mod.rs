//! The feeds: one task per stream, which tells the consumer the latest state and the hub what the consumer says.
//!
//! What holds: a consumer that does not say hello in time is cut off; at most one message waits for a slow reader, and it
//! is made when the reader takes it, so it is always the latest state.

mod dns;
mod gateway;
mod sidecar;

use std::{sync::Arc, time::Duration};

use isthmus_api::proto::local::v1::{
    DnsMessage, DnsUpdate, GatewayMessage, GatewayUpdate, SidecarMessage, SidecarUpdate,
};
use isthmus_model::ids::SpiffeId;
use tokio::{
    sync::mpsc::{self, Permit, Sender},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Parts, Updates};
use crate::hub::HubError;

/// A consumer says who it is within this time.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

/// How a consumer's stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// In order: it goes on purpose.
    Goodbye,
    /// Broken.
    Lost,
    /// We go.
    Shutdown,
}

pub(super) fn gateway(parts: Arc<Parts>, inbound: Streaming<GatewayMessage>) -> Updates<GatewayUpdate> {
    let (out, updates) = mpsc::channel(1);
    parts.tasks.clone().spawn("gateway-feed", async move {
        let outcome = gateway::run(&parts, inbound, &out).await;
        finish("gateway", outcome, out).await;
    });
    Box::pin(ReceiverStream::new(updates))
}

pub(super) fn dns(parts: Arc<Parts>, inbound: Streaming<DnsMessage>) -> Updates<DnsUpdate> {
    let (out, updates) = mpsc::channel(1);
    parts.tasks.clone().spawn("dns-feed", async move {
        let outcome = dns::run(&parts, inbound, &out).await;
        finish("DNS server", outcome, out).await;
    });
    Box::pin(ReceiverStream::new(updates))
}

pub(super) fn sidecar(
    parts: Arc<Parts>,
    identity: SpiffeId,
    inbound: Streaming<SidecarMessage>,
) -> Updates<SidecarUpdate> {
    let (out, updates) = mpsc::channel(1);
    parts.tasks.clone().spawn("sidecar-feed", async move {
        let outcome = sidecar::run(&parts, identity, inbound, &out).await;
        finish("sidecar", outcome, out).await;
    });
    Box::pin(ReceiverStream::new(updates))
}

async fn finish<T>(what: &str, outcome: Result<(), Status>, out: Sender<Result<T, Status>>) {
    if let Err(status) = outcome {
        tracing::warn!(reason = status.message(), "a {what}'s feed ends");
        // A reader that is gone, or never reads, does not learn why.
        let _ = timeout(HELLO_DEADLINE, out.send(Err(status))).await;
    }
}

/// The first message, in time.
async fn first<T>(inbound: &mut Streaming<T>) -> Result<T, Status> {
    timeout(HELLO_DEADLINE, inbound.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no hello within {HELLO_DEADLINE:?}")))??
        .ok_or_else(|| Status::invalid_argument("the stream ended before a hello"))
}

/// A place for one message, when there is one to send.
async fn place<T>(out: &Sender<Result<T, Status>>, due: bool) -> Option<Permit<'_, Result<T, Status>>> {
    match due {
        true => out.reserve().await.ok(),
        false => std::future::pending().await,
    }
}

fn taken(outcome: Result<(), HubError>) -> Result<(), Status> {
    outcome.map_err(|e| match e {
        HubError::Refused(refusal) => Status::already_exists(refusal.to_string()),
        HubError::Busy => Status::unavailable(e.to_string()),
    })
}

fn hello_again() -> Status {
    Status::invalid_argument("hello is only the first message")
}

fn hello_missing() -> Status {
    Status::invalid_argument("the first message must be a hello")
}
