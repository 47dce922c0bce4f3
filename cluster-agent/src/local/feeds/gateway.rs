//! A gateway's feed: the federation's state and the exported endpoints down; its registration, the revision it applied
//! and what it knows of other clusters up.

use std::sync::Arc;

use isthmus_api::{
    convert::{AvailabilityReport, ConsumerKind, ConvertError},
    proto::local::v1::{GatewayHello, GatewayMessage, GatewayUpdate, gateway_message, gateway_update},
};
use isthmus_model::{
    ids::Stamp,
    local::{self, LocalEndpoints},
};
use tokio::sync::{mpsc::Sender, watch};
use tonic::{Status, Streaming};

use super::{End, Parts, first, hello_again, hello_missing, place, taken};
use crate::{
    hub::{
        Feeds,
        gateways::Hello,
        state::{Event, GatewayEvent, Session},
    },
    status::Attached,
    view::LocalGateway,
};

const MAX_INSTANCE: usize = 64;

type Out = Sender<Result<GatewayUpdate, Status>>;

pub(super) async fn run(parts: &Parts, mut inbound: Streaming<GatewayMessage>, out: &Out) -> Result<(), Status> {
    let Some(gateway_message::Kind::Hello(hello)) = first(&mut inbound).await?.kind else {
        return Err(hello_missing());
    };
    let instance = instance(&hello)?;
    let gateway = LocalGateway { hello: local::LocalGateway::try_from(hello)?, draining: false };
    let name = gateway.hello.name.clone();
    let hello = Hello { gateway, instance };
    let session = parts.hub.session();
    taken(parts.hub.send(Event::Gateway(name.clone(), session, GatewayEvent::Hello(hello))).await)?;
    let standing = parts.status.attach(ConsumerKind::Gateway, &name, session);
    tracing::info!(gateway = %name, "gateway connected");
    let stream =
        Stream { parts, name: &name, session, standing, feeds: parts.hub.feeds.clone(), sent: Sent::default() };
    let outcome = stream.run(inbound, out).await;
    let end = *outcome.as_ref().unwrap_or(&End::Lost);
    tracing::info!(gateway = %name, ?end, "gateway disconnected");
    let event = match end {
        End::Goodbye => GatewayEvent::Goodbye,
        End::Lost => GatewayEvent::Lost,
        End::Shutdown => return Ok(()),
    };
    taken(parts.hub.send(Event::Gateway(name, session, event)).await)?;
    outcome.map(|_| ())
}

/// Which process of its name it is.
fn instance(hello: &GatewayHello) -> Result<String, ConvertError> {
    match hello.instance.len() {
        0..=MAX_INSTANCE => Ok(hello.instance.clone()),
        n => Err(ConvertError::new("instance", format!("{n} bytes; at most {MAX_INSTANCE} are allowed"))),
    }
}

struct Stream<'a> {
    parts: &'a Parts,
    name: &'a str,
    session: Session,
    standing: Attached,
    feeds: watch::Receiver<Feeds>,
    sent: Sent,
}

/// What the gateway was told last.
#[derive(Default)]
struct Sent {
    stamp: Option<Stamp>,
    endpoints: Option<Arc<LocalEndpoints>>,
}

impl Stream<'_> {
    async fn run(mut self, mut inbound: Streaming<GatewayMessage>, out: &Out) -> Result<End, Status> {
        loop {
            let due = self.next().is_some();
            // All branches are cancel-safe: a reserved place that is not used goes back.
            tokio::select! {
                () = self.parts.shutdown.requested() => return Ok(End::Shutdown),
                place = place(out, due) => match (place, self.next()) {
                    (Some(place), Some(update)) => {
                        self.mark(&update);
                        place.send(Ok(update.message()));
                    }
                    (Some(_), None) => {}
                    (None, _) => return Ok(End::Lost),
                },
                () = out.closed() => return Ok(End::Lost),
                message = inbound.message() => match message {
                    Ok(Some(message)) => self.take(message).await?,
                    Ok(None) => return Ok(End::Goodbye),
                    Err(_) => return Ok(End::Lost),
                },
                changed = self.feeds.changed() => if changed.is_err() {
                    return Ok(End::Shutdown);
                },
            }
        }
    }

    async fn take(&self, message: GatewayMessage) -> Result<(), Status> {
        let event = match message.kind {
            Some(gateway_message::Kind::Hello(_)) => return Err(hello_again()),
            Some(gateway_message::Kind::Applied(stamp)) => {
                self.standing.applied(Stamp::try_from(stamp)?);
                return Ok(());
            }
            Some(gateway_message::Kind::Problems(problems)) => {
                self.standing.problems(problems.texts);
                return Ok(());
            }
            Some(gateway_message::Kind::Availability(report)) => {
                let report = AvailabilityReport::try_from(report)?;
                self.standing.tunnels(report.tunnels);
                GatewayEvent::Report(report.availability)
            }
            Some(gateway_message::Kind::Draining(_)) => GatewayEvent::Draining,
            // Of a newer version.
            None => return Ok(()),
        };
        taken(self.parts.hub.send(Event::Gateway(self.name.to_owned(), self.session, event)).await)
    }

    fn next(&self) -> Option<Update> {
        self.sent.lacks(&self.feeds.borrow())
    }

    fn mark(&mut self, update: &Update) {
        match update {
            Update::Global(feeds) => self.sent.stamp = Some(feeds.view.global.stamp),
            Update::Endpoints(endpoints) => self.sent.endpoints = Some(endpoints.clone()),
        }
    }
}

impl Sent {
    /// What the gateway does not have yet. Of what this agent does not know it keeps what it has.
    fn lacks(&self, feeds: &Feeds) -> Option<Update> {
        let stamp = feeds.view.global.stamp;
        // Stamp zero is the state before the first one.
        if stamp != Stamp::default() && self.stamp != Some(stamp) {
            return Some(Update::Global(feeds.clone()));
        }
        let known = self.endpoints.as_ref().is_some_and(|sent| Arc::ptr_eq(sent, &feeds.exported));
        (feeds.view.objects_known && !known).then(|| Update::Endpoints(feeds.exported.clone()))
    }
}

enum Update {
    Global(Feeds),
    Endpoints(Arc<LocalEndpoints>),
}

impl Update {
    fn message(&self) -> GatewayUpdate {
        let kind = match self {
            Self::Global(feeds) => gateway_update::Kind::Global((&*feeds.view.global).into()),
            Self::Endpoints(endpoints) => gateway_update::Kind::Endpoints((&**endpoints).into()),
        };
        GatewayUpdate { kind: Some(kind) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{view::View, xds::fixture::view};

    #[test]
    fn endpoints_are_sent_only_once_the_objects_were_read() {
        let feeds =
            |objects_known| Feeds { view: Arc::new(View { objects_known, ..view() }), exported: Arc::default() };
        let sent = Sent { stamp: Some(view().global.stamp), endpoints: None };
        assert!(sent.lacks(&feeds(false)).is_none());
        assert!(matches!(sent.lacks(&feeds(true)), Some(Update::Endpoints(_))));
        assert!(matches!(Sent::default().lacks(&feeds(false)), Some(Update::Global(_))));
    }
}
