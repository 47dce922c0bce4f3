//! A DNS server's feed: the federation's state, the VIP range, endpoints of headless services and availability down; the
//! revision it applied up.

use std::sync::Arc;

use isthmus_api::{
    convert::{AvailabilityReport, ConsumerKind},
    proto::local::v1::{DnsConfig, DnsMessage, DnsUpdate, dns_message, dns_update},
};
use isthmus_model::{
    availability::Observations,
    global::GlobalSnapshot,
    ids::{Stamp, check_label},
    local::LocalEndpoints,
    service::ServiceKind,
};
use tokio::sync::{mpsc::Sender, watch};
use tonic::{Status, Streaming};

use super::{End, Parts, first, hello_again, hello_missing, place};
use crate::{hub::Feeds, status::Attached};

type Out = Sender<Result<DnsUpdate, Status>>;

pub(super) async fn run(parts: &Parts, mut inbound: Streaming<DnsMessage>, out: &Out) -> Result<(), Status> {
    let Some(dns_message::Kind::Hello(hello)) = first(&mut inbound).await?.kind else {
        return Err(hello_missing());
    };
    check_label("DNS server name", &hello.name).map_err(|e| Status::invalid_argument(e.to_string()))?;
    let session = parts.hub.session();
    let standing = parts.status.attach(ConsumerKind::Dns, &hello.name, session);
    tracing::info!(dns = %hello.name, "DNS server connected");
    let stream = Stream { parts, standing, feeds: parts.hub.feeds.clone(), sent: Sent::default() };
    let outcome = stream.run(inbound, out).await;
    tracing::info!(dns = %hello.name, "DNS server disconnected");
    outcome.map(|_| ())
}

struct Stream<'a> {
    parts: &'a Parts,
    standing: Attached,
    feeds: watch::Receiver<Feeds>,
    sent: Sent,
}

/// What the server was told last.
#[derive(Default)]
struct Sent {
    config: Option<(Arc<GlobalSnapshot>, LocalEndpoints)>,
    observations: Option<Arc<Observations>>,
}

enum Update {
    Config(Arc<GlobalSnapshot>, LocalEndpoints),
    Availability(Arc<Observations>),
}

impl Stream<'_> {
    async fn run(mut self, mut inbound: Streaming<DnsMessage>, out: &Out) -> Result<End, Status> {
        loop {
            let due = self.next().is_some();
            // All branches are cancel-safe: a reserved place that is not used goes back.
            tokio::select! {
                () = self.parts.shutdown.requested() => return Ok(End::Shutdown),
                place = place(out, due) => match (place, self.next()) {
                    (Some(place), Some(update)) => place.send(Ok(self.message(update))),
                    (Some(_), None) => {}
                    (None, _) => return Ok(End::Lost),
                },
                () = out.closed() => return Ok(End::Lost),
                message = inbound.message() => match message.map(|m| m.map(|m| m.kind)) {
                    Ok(Some(Some(dns_message::Kind::Applied(stamp)))) => {
                        self.standing.applied(Stamp::try_from(stamp)?);
                    }
                    Ok(Some(Some(dns_message::Kind::Hello(_)))) => return Err(hello_again()),
                    // Of a newer version.
                    Ok(Some(None)) => {}
                    Ok(None) => return Ok(End::Goodbye),
                    Err(_) => return Ok(End::Lost),
                },
                changed = self.feeds.changed() => if changed.is_err() {
                    return Ok(End::Shutdown);
                },
            }
        }
    }

    fn next(&self) -> Option<Update> {
        self.sent.lacks(&self.feeds.borrow())
    }

    fn message(&mut self, update: Update) -> DnsUpdate {
        let kind = match update {
            Update::Config(global, endpoints) => {
                let vip_range = self.feeds.borrow().view.vip_range.to_string();
                let config =
                    DnsConfig { global: Some((&*global).into()), vip_range, endpoints: Some((&endpoints).into()) };
                self.sent.config = Some((global, endpoints));
                dns_update::Kind::Config(config)
            }
            Update::Availability(observations) => {
                let report = AvailabilityReport { availability: observations.reports().collect(), tunnels: Vec::new() };
                self.sent.observations = Some(observations);
                dns_update::Kind::Availability((&report).into())
            }
        };
        DnsUpdate { kind: Some(kind) }
    }
}

impl Sent {
    /// What the server does not have yet. Until this agent knows the federation's state (stamp zero comes before the
    /// first one) and its own objects, the server answers from what it has.
    fn lacks(&self, feeds: &Feeds) -> Option<Update> {
        let view = &feeds.view;
        if view.global.stamp == Stamp::default() || !view.objects_known {
            return None;
        }
        let endpoints = headless(&view.global, &feeds.exported);
        let known = self.config.as_ref();
        if known.is_none_or(|(global, sent)| !Arc::ptr_eq(global, &view.global) || *sent != endpoints) {
            return Some(Update::Config(view.global.clone(), endpoints));
        }
        let known = self.observations.as_ref().is_some_and(|sent| Arc::ptr_eq(sent, &view.observations));
        (!known).then(|| Update::Availability(view.observations.clone()))
    }
}

/// Only headless services are answered with endpoints.
fn headless(global: &GlobalSnapshot, exported: &LocalEndpoints) -> LocalEndpoints {
    let is_headless = |name| global.services.get(name).is_some_and(|s| s.kind == ServiceKind::Headless);
    let services = exported.services.iter().filter(|(name, _)| is_headless(name));
    LocalEndpoints { services: services.map(|(name, e)| (name.clone(), e.clone())).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{view::View, xds::fixture::view};

    #[test]
    fn nothing_is_sent_before_the_objects_were_read() {
        let feeds =
            |objects_known| Feeds { view: Arc::new(View { objects_known, ..view() }), exported: Arc::default() };
        assert!(Sent::default().lacks(&feeds(false)).is_none());
        assert!(matches!(Sent::default().lacks(&feeds(true)), Some(Update::Config(..))));
    }
}
