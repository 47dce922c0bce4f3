//! Connections from local sidecars: the listeners they come in on.
//!
//! One port where the gateway chooses the cluster, and one for each other active cluster, at a fixed base plus the
//! cluster's index. Level-triggered: listeners are bound and dropped as the view's clusters come and go. A port that is
//! taken is reported and tried again; it never stops the others.

pub(crate) mod budget;
mod connection;
pub(crate) mod outcasts;
mod place;
pub(crate) mod sources;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use isthmus_model::ids::ClusterName;
use isthmus_runtime::net;
use tokio::{net::TcpListener, time};
use tokio_util::sync::CancellationToken;

use crate::{
    core::Core,
    handover::shelf::{Given, Role},
    splice,
    standing::{Area, Part},
    view::View,
};

/// Between attempts to bind a port that was taken.
const REBIND: Duration = Duration::from_secs(1);
/// After a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a listener's connections may ask for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Entry {
    /// The gateway chooses.
    Auto,
    /// This cluster only.
    Pinned(ClusterName),
}

/// Where each pinned cluster is listened for: what tests and `/debug/listeners` see.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    pinned: Mutex<BTreeMap<ClusterName, SocketAddr>>,
}

impl Listeners {
    /// The bound pinned ports.
    pub(crate) fn pinned(&self) -> BTreeMap<ClusterName, SocketAddr> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, cluster: &ClusterName, address: Option<SocketAddr>) {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        match address {
            Some(address) => pinned.insert(cluster.clone(), address),
            None => pinned.remove(cluster),
        };
    }
}

/// Serves all listeners until the drain closes them. Pinned ones that a predecessor gave are used before others are bound.
pub(crate) async fn listen(core: Arc<Core>, auto: TcpListener, listeners: Arc<Listeners>, given: Arc<Given>) {
    core.tasks.spawn("ingress.auto", accept(core.clone(), auto, Entry::Auto, core.doors.clone()));
    let mut view = core.view.clone();
    let mut bound: BTreeMap<(ClusterName, u16), CancellationToken> = BTreeMap::new();
    loop {
        let whole = reconcile(&core, &listeners, &given, &mut bound).await;
        let retry = async { if !whole { time::sleep(REBIND).await } else { std::future::pending().await } };
        tokio::select! {
            () = core.doors.cancelled() => return,
            () = retry => {}
            changed = view.changed() => if changed.is_err() {
                core.doors.cancelled().await;
                return;
            }
        }
    }
}

/// Makes the pinned listeners fit the view, as far as they can be bound. Returns whether all of them are.
async fn reconcile(
    core: &Arc<Core>,
    listeners: &Arc<Listeners>,
    given: &Given,
    bound: &mut BTreeMap<(ClusterName, u16), CancellationToken>,
) -> bool {
    let view = core.current_view();
    let (wanted, mut problems) = wanted(core, &view);
    bound.retain(|key, stop| {
        let keep = wanted.contains(key);
        if !keep {
            stop.cancel();
            listeners.set(&key.0, None);
        }
        keep
    });
    for (cluster, port) in wanted {
        if bound.contains_key(&(cluster.clone(), port)) {
            continue;
        }
        let address = SocketAddr::new(core.config.listen.local, port);
        let role = Role::Pinned(cluster.clone());
        let adopted = given.tcp(&role, address).and_then(|listener| TcpListener::from_std(listener).ok());
        let listener = match adopted {
            Some(listener) => Ok(listener),
            None => net::bind_tcp(address, "listen.pinnedPortBase").await,
        };
        match listener {
            Ok(listener) => {
                listeners.set(&cluster, listener.local_addr().ok());
                let stop = core.doors.child_token();
                let entry = Entry::Pinned(cluster.clone());
                core.tasks.spawn("ingress.pinned", accept(core.clone(), listener, entry, stop.clone()));
                bound.insert((cluster, port), stop);
            }
            Err(error) => {
                tracing::warn!(%cluster, %error, "traffic pinned to this cluster cannot enter; trying again");
                core.metrics.reject("pinned_port_taken");
                problems.push(format!("traffic pinned to {cluster} cannot enter: {error}"));
            }
        }
    }
    let whole = problems.is_empty();
    core.standing.set_problems(Area::Listeners, problems);
    if let Some(global) = &view.global {
        core.standing.followed(Part::Listeners, global.stamp, whole);
    }
    whole
}

/// Each other active cluster and its port; port 0 where the base is 0. And the clusters that have none.
fn wanted(core: &Core, view: &View) -> (BTreeSet<(ClusterName, u16)>, Vec<String>) {
    let (mut wanted, mut problems) = (BTreeSet::new(), Vec::new());
    let Some(global) = &view.global else { return (wanted, problems) };
    let base = core.config.listen.pinned_port_base;
    for c in global.clusters.values().filter(|c| c.state.is_member() && c.name != core.cluster) {
        match if base == 0 { Some(0) } else { base.checked_add(c.index.0) } {
            Some(port) => drop(wanted.insert((c.name.clone(), port))),
            None => problems.push(format!(
                "traffic pinned to {} cannot enter: its index {} and listen.pinnedPortBase {base} make no port; choose a lower base",
                c.name, c.index
            )),
        }
    }
    (wanted, problems)
}

async fn accept(core: Arc<Core>, listener: TcpListener, entry: Entry, stop: CancellationToken) {
    let role = match &entry {
        Entry::Auto => Role::Auto,
        Entry::Pinned(cluster) => Role::Pinned(cluster.clone()),
    };
    let _shelved = core.shelf.put(role, &listener).inspect_err(|error| {
        tracing::warn!(%error, "no successor can be given this listener");
    });
    // Until then, a predecessor accepts from the same queue.
    tokio::select! {
        () = core.steps.open.cancelled() => {}
        () = stop.cancelled() => return,
    }
    // Before the first byte, too: whatever ends this process is no orderly end of what it has accepted.
    splice::abort(&listener);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let (tcp, source) = match accepted {
            Ok((tcp, source)) => (tcp, source.ip()),
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                core.metrics.reject("accept_failed");
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(why) = core.admit() {
            core.metrics.reject(why.reject_label());
            splice::abort(&tcp);
            continue;
        }
        let Some(share) = core.hello_sources.try_acquire(source) else {
            core.metrics.reject("source_pending");
            splice::abort(&tcp);
            continue;
        };
        let slots = (core.local_slots.clone().try_acquire_owned(), core.hello_slots.clone().try_acquire_owned());
        let (Ok(open), Ok(hello)) = slots else {
            core.metrics.reject("overloaded");
            splice::abort(&tcp);
            continue;
        };
        let carried = core.carried.token();
        let mut connection = connection::Local { core: core.clone(), entry: entry.clone(), tcp, _carried: carried };
        core.tasks.spawn("ingress.connection", async move {
            connection.serve((hello, share)).await;
            drop(open);
        });
    }
}
