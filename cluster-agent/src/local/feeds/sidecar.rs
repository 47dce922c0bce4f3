//! A sidecar launcher's feed: bundles to verify peers with down; its registration and the app's readiness up.

use std::{collections::BTreeMap, sync::Arc};

use isthmus_api::proto::local::v1::{
    AppReadiness, Registered, SidecarMessage, SidecarUpdate, TrustDomainRoots, TrustSet, sidecar_message,
    sidecar_update,
};
use isthmus_identity::bundle::BundleDocument;
use isthmus_model::{global::GlobalSnapshot, ids::SpiffeId, local, service::TrustBundle};
use tokio::sync::{mpsc::Sender, watch};
use tonic::{Status, Streaming};

use super::{End, Parts, first, hello_again, hello_missing, place, taken};
use crate::{
    hub::state::{Event, Session, SidecarEvent},
    view::{Sidecar, View},
};

/// Ports in one readiness report.
const MAX_PORTS: usize = isthmus_api::convert::limits::PORTS;

type Out = Sender<Result<SidecarUpdate, Status>>;

pub(super) async fn run(
    parts: &Parts,
    identity: SpiffeId,
    mut inbound: Streaming<SidecarMessage>,
    out: &Out,
) -> Result<(), Status> {
    let Some(sidecar_message::Kind::Hello(hello)) = first(&mut inbound).await?.kind else {
        return Err(hello_missing());
    };
    let sidecar = Sidecar { hello: local::Sidecar::try_from(hello)?, identity };
    let name = sidecar.hello.name.clone();
    let session = parts.hub.session();
    tracing::info!(sidecar = %name, identity = %sidecar.identity, "sidecar connected");
    taken(parts.hub.send(Event::Sidecar(name.clone(), session, SidecarEvent::Hello(sidecar))).await)?;
    let stream = Stream {
        parts,
        name: &name,
        session,
        view: parts.hub.view.clone(),
        registered: false,
        looked: None,
        trust: None,
        trust_due: true,
    };
    let outcome = stream.run(inbound, out).await;
    let end = *outcome.as_ref().unwrap_or(&End::Lost);
    tracing::info!(sidecar = %name, ?end, "sidecar disconnected");
    let event = match end {
        End::Goodbye => SidecarEvent::Goodbye,
        End::Lost => SidecarEvent::Lost,
        End::Shutdown => return Ok(()),
    };
    taken(parts.hub.send(Event::Sidecar(name, session, event)).await)?;
    outcome.map(|_| ())
}

struct Stream<'a> {
    parts: &'a Parts,
    name: &'a str,
    session: Session,
    view: watch::Receiver<Arc<View>>,
    /// It was told that ADS may start.
    registered: bool,
    /// The state whose bundles were compared last.
    looked: Option<Arc<GlobalSnapshot>>,
    /// The bundles, as last sent or about to be.
    trust: Option<TrustSet>,
    trust_due: bool,
}

impl Stream<'_> {
    async fn run(mut self, mut inbound: Streaming<SidecarMessage>, out: &Out) -> Result<End, Status> {
        loop {
            self.look();
            let due = !self.registered || self.trust_due;
            // All branches are cancel-safe: a reserved place that is not used goes back.
            tokio::select! {
                () = self.parts.shutdown.requested() => return Ok(End::Shutdown),
                place = place(out, due) => match place {
                    Some(place) => if let Some(update) = self.next() {
                        place.send(Ok(update));
                    },
                    None => return Ok(End::Lost),
                },
                () = out.closed() => return Ok(End::Lost),
                message = inbound.message() => match message.map(|m| m.map(|m| m.kind)) {
                    Ok(Some(Some(sidecar_message::Kind::Readiness(readiness)))) => self.take(readiness).await?,
                    Ok(Some(Some(sidecar_message::Kind::Hello(_)))) => return Err(hello_again()),
                    // Of a newer version.
                    Ok(Some(None)) => {}
                    Ok(None) => return Ok(End::Goodbye),
                    Err(_) => return Ok(End::Lost),
                },
                changed = self.view.changed() => if changed.is_err() {
                    return Ok(End::Shutdown);
                },
            }
        }
    }

    async fn take(&self, readiness: AppReadiness) -> Result<(), Status> {
        if readiness.ports.len() > MAX_PORTS {
            let n = readiness.ports.len();
            return Err(Status::invalid_argument(format!("ports: has {n} entries; at most {MAX_PORTS} are allowed")));
        }
        let port = |p: u32| u16::try_from(p).map_err(|_| Status::invalid_argument(format!("ports: {p} is not a port")));
        let ports = readiness.ports.into_iter().map(|p| Ok((port(p.port)?, p.ready)));
        let ready = ports.collect::<Result<BTreeMap<_, _>, Status>>()?;
        let event = Event::Sidecar(self.name.to_owned(), self.session, SidecarEvent::Readiness(ready));
        taken(self.parts.hub.send(event).await)
    }

    /// Finds out whether the bundles changed.
    fn look(&mut self) {
        let global = self.view.borrow_and_update().global.clone();
        if self.looked.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &global)) {
            return;
        }
        let trust = trust_set(&global, &self.parts.ca.bundle());
        if self.trust.as_ref().is_none_or(|sent| sent.domains != trust.domains) {
            self.trust_due = true;
            self.trust = Some(trust);
        }
        self.looked = Some(global);
    }

    fn next(&mut self) -> Option<SidecarUpdate> {
        let kind = if !self.registered {
            self.registered = true;
            sidecar_update::Kind::Registered(Registered {})
        } else {
            self.trust_due = false;
            sidecar_update::Kind::Trust(self.trust.clone()?)
        };
        Some(SidecarUpdate { kind: Some(kind) })
    }
}

/// The roots of every active cluster, and always of our own. The federation's root is not among them: workloads talk to
/// workloads.
fn trust_set(global: &GlobalSnapshot, own: &TrustBundle) -> TrustSet {
    let active = global.clusters.values().filter(|c| c.state.is_member()).map(|c| &c.bundle);
    let by_domain: BTreeMap<_, _> = active.chain([own]).map(|bundle| (&bundle.trust_domain, bundle)).collect();
    let domain = |(name, bundle): (_, &TrustBundle)| {
        // What cannot be parsed was reported when it was admitted.
        let roots = BundleDocument::parse(&bundle.document).map(|d| d.x509_roots).unwrap_or_default();
        TrustDomainRoots {
            trust_domain: isthmus_model::ids::TrustDomain::to_string(name),
            roots: roots.iter().map(|der| der.to_vec()).collect(),
        }
    };
    TrustSet {
        stamp: Some(global.stamp.into()),
        domains: by_domain.into_iter().map(domain).filter(|d| !d.roots.is_empty()).collect(),
    }
}
