//! This cluster's own endpoints: which to dial next, which are out, and what peers are told of them.
//!
//! In: the view, and what connections experience. Out: leases on endpoints (the better of two by open connections times
//! how long they take to answer), and a table of availability per exported service, published whenever it changes. What is out does not count as ready, so a
//! dead endpoint leaves peers' candidates without the control plane; a connect every now and then finds out when it is
//! back ([`crate::egress::ejection`]). One that no traffic tells of is looked at the same way.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use isthmus_model::{availability::Availability, global::GlobalService, ids::ClusterName, local::Endpoint};
use tokio::{
    net::TcpStream,
    sync::{Notify, watch},
    time,
};
use tokio_util::sync::CancellationToken;

use crate::{
    clock,
    config::EgressConfig,
    egress::{
        ejection::{Ejections, Failure},
        race,
    },
    metrics::Metrics,
    tunnel::outbox::Table,
    view::View,
};

/// Probes under way at one time.
const PROBES: usize = 64;

/// The endpoints of this cluster.
#[derive(Debug)]
pub(crate) struct LocalPool {
    cluster: ClusterName,
    connect_timeout: Duration,
    health_interval: Duration,
    metrics: Metrics,
    inner: Mutex<Inner>,
    table: watch::Sender<Arc<Table>>,
    ejected: Notify,
}

#[derive(Debug)]
struct Inner {
    view: Arc<View>,
    ejections: Ejections,
    open: HashMap<SocketAddr, usize>,
    records: HashMap<SocketAddr, Record>,
}

/// What is known of a serving endpoint from connections to it.
#[derive(Clone, Copy, Debug)]
struct Record {
    /// When one last told of it.
    heard: Instant,
    /// From its ClientHello to its first byte, smoothed.
    answers_in: Duration,
}

/// Differences below this are noise.
const QUICK: Duration = Duration::from_millis(1);

impl LocalPool {
    /// An empty pool of `cluster`.
    pub(crate) fn new(cluster: ClusterName, config: &EgressConfig, metrics: Metrics) -> Self {
        let inner = Inner {
            view: Arc::default(),
            ejections: Ejections::new(config.ejection_base, config.ejection_max),
            open: HashMap::new(),
            records: HashMap::new(),
        };
        Self {
            cluster,
            connect_timeout: config.connect_timeout,
            health_interval: config.health_interval,
            metrics,
            inner: Mutex::new(inner),
            table: watch::Sender::default(),
            ejected: Notify::new(),
        }
    }

    /// Follows the view. An endpoint that was not serving before and now is gets a clean record: its agent vouches for
    /// it.
    pub(crate) fn set_view(&self, view: Arc<View>) {
        let mut inner = self.lock();
        let before = serving(&inner.view);
        let now = serving(&view);
        inner.ejections.retain(|a| now.contains(&a) && before.contains(&a));
        inner.view = view;
        let heard = clock::now();
        inner.records.retain(|address, _| now.contains(address));
        for address in now {
            inner.records.entry(address).or_insert(Record { heard, answers_in: QUICK });
        }
        self.publish(&inner);
    }

    /// What peers are told, and when it changes.
    pub(crate) fn table(&self) -> watch::Receiver<Arc<Table>> {
        self.table.subscribe()
    }

    /// An endpoint for `port` of `service` that is neither out nor `tried`.
    pub(crate) fn pick(
        self: &Arc<Self>,
        service: &GlobalService,
        port: u16,
        selector: Option<&str>,
        tried: &[SocketAddr],
    ) -> Option<Lease> {
        let mut inner = self.lock();
        let mut candidates = inner.ejections.usable(inner.view.addresses(service, port, selector));
        candidates.retain(|a| !tried.contains(a));
        let load = |a: &SocketAddr| {
            let open = inner.open.get(a).copied().unwrap_or_default() as u128;
            let answers_in = inner.records.get(a).map_or(QUICK, |record| record.answers_in).max(QUICK);
            (open + 1) * answers_in.as_micros()
        };
        let address = better_of_two(&candidates, load)?;
        *inner.open.entry(address).or_default() += 1;
        Some(Lease { pool: self.clone(), address })
    }

    /// Among how many endpoints [`LocalPool::pick`] would choose.
    pub(crate) fn choices(
        &self,
        service: &GlobalService,
        port: u16,
        selector: Option<&str>,
        tried: &[SocketAddr],
    ) -> usize {
        let inner = self.lock();
        let usable = inner.ejections.usable(inner.view.addresses(service, port, selector));
        usable.iter().filter(|a| !tried.contains(a)).count()
    }

    /// Brings endpoints back when they answer a plain connect. Runs until `stop`.
    pub(crate) async fn probe(self: Arc<Self>, stop: CancellationToken) {
        // Kept over the turns of the loop: however often others are probed, the quiet ones are looked at in time.
        let mut look = clock::now() + self.health_interval;
        loop {
            let next = self.lock().ejections.next_due();
            let due = async {
                match next {
                    Some(at) => time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.ejected.notified() => continue,
                () = due => {}
                () = time::sleep_until(look.into()), if !self.health_interval.is_zero() => {
                    self.look_at_the_quiet().await;
                    look = clock::now() + self.health_interval;
                    continue;
                }
            }
            let due = self.lock().ejections.due(clock::now());
            for some in due.chunks(PROBES) {
                futures_util::future::join_all(some.iter().map(|a| self.probe_one(*a))).await;
            }
        }
    }

    /// Connects to endpoints that no traffic has told of lately.
    async fn look_at_the_quiet(&self) {
        let quiet: Vec<SocketAddr> = {
            let inner = self.lock();
            let quiet = |record: &Record| clock::since(record.heard) >= self.health_interval;
            let out = |address: &SocketAddr| inner.ejections.is_out(*address);
            inner.records.iter().filter(|(a, record)| quiet(record) && !out(a)).map(|(a, _)| *a).collect()
        };
        for some in quiet.chunks(PROBES) {
            futures_util::future::join_all(some.iter().map(|a| self.look_at(*a))).await;
        }
    }

    async fn look_at(&self, address: SocketAddr) {
        let answered = matches!(time::timeout(self.connect_timeout, TcpStream::connect(address)).await, Ok(Ok(_)));
        let now = clock::now();
        let mut inner = self.lock();
        // It may be gone meanwhile.
        let Some(record) = inner.records.get_mut(&address) else { return };
        record.heard = now;
        if !answered && inner.ejections.failed(address, Failure::Connect, now) {
            tracing::warn!(endpoint = %address, "quiet endpoint does not answer; it is probed until it does");
            self.metrics.ejection();
            self.publish(&inner);
            self.ejected.notify_one();
        }
    }

    async fn probe_one(&self, address: SocketAddr) {
        let answered = matches!(time::timeout(self.connect_timeout, TcpStream::connect(address)).await, Ok(Ok(_)));
        let mut inner = self.lock();
        if inner.ejections.probed(address, answered, clock::now()) {
            tracing::info!(endpoint = %address, "endpoint answers again");
            self.publish(&inner);
        }
    }

    fn note_failure(&self, inner: &mut Inner, address: SocketAddr, failure: Failure) {
        if inner.ejections.failed(address, failure, clock::now()) {
            tracing::warn!(endpoint = %address, ?failure, "endpoint taken out; it is probed until it answers");
            self.metrics.ejection();
            self.publish(inner);
            self.ejected.notify_one();
        }
    }

    fn publish(&self, inner: &Inner) {
        let table = tabulate(&self.cluster, inner);
        self.table.send_if_modified(|current| {
            let changed = **current != table;
            if changed {
                *current = Arc::new(table);
            }
            changed
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every section leaves the state whole, so a panic in another one does not spoil it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to one connection to an endpoint; counts as open while it lives.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<LocalPool>,
    address: SocketAddr,
}

impl Lease {
    /// Where to connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The endpoint failed this connection before its first byte.
    pub(crate) fn failed(&self, failure: Failure) {
        let mut inner = self.pool.lock();
        if let Some(record) = inner.records.get_mut(&self.address) {
            record.heard = clock::now();
        }
        self.pool.note_failure(&mut inner, self.address, failure);
    }

    /// The endpoint answered after so long, while those others, asked for as long, were silent.
    pub(crate) fn succeeded(&self, answered_in: Duration, silent: &[(SocketAddr, Duration)]) {
        let mut inner = self.pool.lock();
        if let Some(record) = inner.records.get_mut(&self.address) {
            record.heard = clock::now();
            record.answers_in = (record.answers_in * 7 + answered_in) / 8;
        }
        if inner.ejections.succeeded(self.address) {
            self.pool.publish(&inner);
        }
        // This one is in, so however many others go out, silence never takes the last.
        for (address, _) in silent.iter().filter(|(_, silent_for)| race::outrun(*silent_for, answered_in)) {
            self.pool.note_failure(&mut inner, *address, Failure::Outrun);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut inner = self.pool.lock();
        if let Some(open) = inner.open.get_mut(&self.address) {
            *open = open.saturating_sub(1);
            if *open == 0 {
                inner.open.remove(&self.address);
            }
        }
    }
}

/// The less loaded of two taken at random; a lone candidate as it is.
pub(crate) fn better_of_two<T: Clone, L: Ord>(candidates: &[T], load: impl Fn(&T) -> L) -> Option<T> {
    let n = candidates.len();
    let first = rand::random_range(0..n.max(1));
    // Any other, each as likely.
    let second = (first + rand::random_range(1..n.max(2))) % n.max(1);
    let (a, b) = (candidates.get(first)?, candidates.get(second)?);
    Some(if load(b) < load(a) { b.clone() } else { a.clone() })
}

/// The availability of every service that this cluster exports.
fn tabulate(cluster: &ClusterName, inner: &Inner) -> Table {
    let Some(global) = &inner.view.global else { return Table::new() };
    let out = |e: &Endpoint| addresses(e).any(|a| inner.ejections.is_out(a));
    let dead = |e: &Endpoint| addresses(e).any(|a| inner.ejections.is_dead(a));
    let exported = global.services.values().filter(|s| s.exporters.contains_key(cluster));
    let entry = |s: &GlobalService| {
        let endpoints = inner.view.endpoints.of(&s.name);
        let serving = || endpoints.iter().filter(|e| e.is_serving());
        let ready = match serving().filter(|e| !out(e)).count() {
            // As for whoever picks one: slow is better than nothing.
            0 => serving().filter(|e| !dead(e)).count(),
            ready => ready,
        };
        let availability = Availability { ready: saturate(ready), total: saturate(endpoints.len()), reachable: true };
        (s.name.clone(), availability)
    };
    exported.map(AsRef::as_ref).map(entry).collect()
}

fn serving(view: &View) -> HashSet<SocketAddr> {
    view.endpoints.services.values().flatten().filter(|e| e.is_serving()).flat_map(addresses).collect()
}

fn addresses(endpoint: &Endpoint) -> impl Iterator<Item = SocketAddr> {
    endpoint.ports.values().map(|port| SocketAddr::new(endpoint.ip, *port))
}

fn saturate(n: usize) -> u8 {
    u8::try_from(n).unwrap_or(u8::MAX)
}
