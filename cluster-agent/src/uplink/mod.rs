//! The agent's one connection to the global control plane: outbound, mutually authenticated, long-lived.
//!
//! In: what the hub publishes, the status board. Out: accepted states of the federation, to disk first, then to the
//! verifiers' roots, then to the hub. What holds: states only go forward; a bundle that its owner did not sign is not
//! used ([`mod@admit`]); losing the control plane changes nothing but the status.

pub mod admit;
pub mod control;
pub mod join;
pub mod renew;
mod session;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use isthmus_identity::{
    bundle::{BundleDocument, TrustStore},
    ca::CertificateAuthority,
};
use isthmus_model::{global::GlobalSnapshot, ids::ClusterName, service::TrustBundle};
use isthmus_runtime::{
    backoff::Backoff,
    files::LastKnownGood,
    health::Gate,
    tasks::{Shutdown, chain},
};
use prost::Message as _;
use rustls_pki_types::CertificateDer;
use tokio::time::sleep;

use self::{
    admit::{Admitted, Pins, admit, is_news},
    control::ControlPlane,
    session::{Ended, encode},
};
use crate::{
    hub::{
        Hub,
        state::{Event, Intent},
    },
    metrics::Metrics,
    status::{Area, StatusBoard, problem},
};

const BACKOFF_BASE: Duration = Duration::from_millis(100);
const BACKOFF_CAP: Duration = Duration::from_secs(5);

/// Where the federation's state is kept.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The state as it came, in wire form.
    pub global: LastKnownGood,
    /// [`Pins`].
    pub pins: LastKnownGood,
}

/// What is known of the federation, as it came and as it is believed.
#[derive(Clone, Debug)]
pub struct Known {
    /// As it came: what deltas start from.
    pub raw: Option<Arc<GlobalSnapshot>>,
    /// The bundles believed.
    pub pins: Pins,
}

/// The uplink. Construct, then [`Uplink::run`].
pub struct Uplink {
    /// This cluster.
    pub own: ClusterName,
    /// Its CA, whose bundle is published.
    pub ca: Arc<CertificateAuthority>,
    /// The channel.
    pub control: ControlPlane,
    /// From the disk.
    pub known: Known,
    /// To the disk.
    pub disk: Disk,
    /// Roots of those who talk to this agent.
    pub trust: TrustStore,
    /// Where accepted states go.
    pub hub: Hub,
    /// Status up.
    pub status: StatusBoard,
    /// Counters.
    pub metrics: Metrics,
    /// Opens once a state is known.
    pub gate: Gate,
    /// The end.
    pub shutdown: Shutdown,
    /// The next session asks for everything.
    pub resync: bool,
    /// What was last sent.
    pub published: Option<Arc<Intent>>,
    /// Of this agent as the one that publishes for its cluster: of two the later one is believed.
    pub incarnation: [u8; 16],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accept {
    Taken,
    Refused,
}

impl Uplink {
    /// Sessions, one after another, until shutdown.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(BACKOFF_BASE, BACKOFF_CAP);
        let mut last = String::new();
        loop {
            let begun = tokio::time::Instant::now();
            let ended = session::run(&mut self).await;
            self.metrics.uplink_connected.set(0);
            if matches!(ended, Ended::Shutdown) {
                return;
            }
            if begun.elapsed() > BACKOFF_CAP {
                backoff.reset();
            }
            let why = chain(&ended);
            // Once per cause: the control plane may be away for long, by design.
            if why != last {
                tracing::warn!(control_plane = %self.control.address(), "no session with the control plane, trying again: {why}");
                last = why;
            }
            if matches!(ended, Ended::Closed(_) | Ended::Finished | Ended::Unanswered) {
                self.control.use_next();
            }
            tokio::select! {
                () = self.shutdown.requested() => return,
                () = sleep(backoff.next()) => {}
            }
        }
    }

    /// What is held, unless everything is to be sent again.
    fn held(&self) -> Option<&GlobalSnapshot> {
        self.known.raw.as_deref().filter(|_| !self.resync)
    }

    /// Takes a state if it is news and can be believed.
    async fn accept(&mut self, raw: GlobalSnapshot) -> Accept {
        let held = self.known.raw.as_ref().map(|s| s.stamp);
        let bundle = self.ca.bundle();
        let judged = match is_news(held, raw.stamp) {
            Ok(false) => {
                self.resync = false;
                self.status.set_problems(Area::Refused, Vec::new());
                return Accept::Taken;
            }
            Ok(true) => admit(&raw, &self.known.pins, (&self.own, &bundle)),
            Err(e) => Err(e),
        };
        let Admitted { snapshot, pins, problems } = match judged {
            Ok(admitted) => admitted,
            Err(refused) => {
                tracing::error!(stamp = %raw.stamp, "a state from the control plane is refused: {}", chain(&refused));
                self.status.set_problems(Area::Refused, vec![problem("control plane", chain(&refused))]);
                return Accept::Refused;
            }
        };
        for p in &problems {
            tracing::error!(at = %p.at, "{}", p.message);
        }
        self.status.set_problems(Area::Federation, problems);
        self.status.set_problems(Area::Refused, Vec::new());
        let raw = Arc::new(raw);
        let pins_changed = pins != self.known.pins;
        self.known = Known { raw: Some(raw.clone()), pins };
        self.resync = false;
        self.save(raw, pins_changed).await;
        self.trust.set(roots(&self.known.pins.federation, &bundle));
        let stamp = snapshot.stamp;
        if self.hub.send(Event::Global(Arc::new(snapshot))).await.is_err() {
            // Going down; the state is on disk.
            return Accept::Taken;
        }
        self.metrics.revision(stamp);
        self.gate.ready();
        tracing::info!(%stamp, "the federation's state is applied");
        Accept::Taken
    }

    async fn save(&self, raw: Arc<GlobalSnapshot>, pins_changed: bool) {
        let disk = self.disk.clone();
        let pins = pins_changed.then(|| self.known.pins.clone());
        let saved = tokio::task::spawn_blocking(move || {
            if let Some(pins) = pins {
                save_pins(&disk.pins, &pins)?;
            }
            disk.global.save(&encode(&raw)).map_err(|e| chain(&e))
        });
        let outcome = saved.await.unwrap_or_else(|e| Err(e.to_string()));
        let problems = outcome.err().map(|e| {
            tracing::error!("the federation's state cannot be saved: {e}");
            problem(
                "state folder",
                format!("the federation's state cannot be saved, so a restart would begin with an older one: {e}"),
            )
        });
        self.status.set_problems(Area::GlobalStore, problems.into_iter().collect());
    }
}

/// What was last accepted, if anything. A damaged file counts as none, with a problem: the control plane has it.
pub fn load_global(disk: &LastKnownGood, status: &StatusBoard) -> Option<GlobalSnapshot> {
    let loaded = disk.load().map_err(|e| chain(&e)).and_then(|bytes| {
        bytes
            .map(|b| {
                let message =
                    isthmus_api::proto::common::v1::GlobalSnapshot::decode(b.as_slice()).map_err(|e| e.to_string())?;
                GlobalSnapshot::try_from(message).map_err(|e| e.to_string())
            })
            .transpose()
    });
    loaded.unwrap_or_else(|e| {
        tracing::error!("the last known state of the federation is not usable: {e}");
        status.set_problems(Area::GlobalStore, vec![problem("state folder", e)]);
        None
    })
}

/// Saves the bundles believed.
pub fn save_pins(disk: &LastKnownGood, pins: &Pins) -> Result<(), String> {
    let bytes = serde_json::to_vec(pins).map_err(|e| e.to_string())?;
    disk.save(&bytes).map_err(|e| chain(&e))
}

/// The roots of those who may talk to this agent: the federation's and the cluster's own.
pub fn roots(
    federation: &TrustBundle,
    own: &TrustBundle,
) -> BTreeMap<isthmus_model::ids::TrustDomain, Vec<CertificateDer<'static>>> {
    let of = |bundle: &TrustBundle| {
        let roots = BundleDocument::parse(&bundle.document).map(|d| d.x509_roots).unwrap_or_default();
        (bundle.trust_domain.clone(), roots)
    };
    BTreeMap::from([of(federation), of(own)])
}
