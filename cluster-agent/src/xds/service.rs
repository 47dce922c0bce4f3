//! The agent's aggregated discovery service: one [`DeltaStream`] per connected Envoy, fed from the view.
//!
//! In: requests that the launchers relay, and every new view. Out: responses; the board learns who has applied which stamp
//! and what was refused. Only a registered sidecar gets configuration, and only over a connection whose certificate bears
//! that sidecar's identity. What the agent does not know (yet, or any more after a damaged disk) is never taken from an
//! Envoy that has it: without a state there is no stream, and states only go forward. Each stream lives inside the response that tonic polls, so nothing is left behind when it ends,
//! and each watches the shutdown signal, since dropping the server does not end live streams.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddrV4,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
};
use futures_util::{Stream, StreamExt, stream};
use isthmus_identity::grpc::PeerInfo;
use isthmus_model::{
    ids::{SpiffeId, Stamp},
    time::Timestamp,
    vip,
};
use isthmus_runtime::tasks::Shutdown;
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tonic::{Request, Response, Status, Streaming};

use super::{
    delta::{DeltaStream, Rejection},
    problems,
    resources::{Resources, build},
};
use crate::{
    status::StatusBoard,
    view::{Sidecar, View},
};

/// A stream whose first request does not come in this time is closed.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// A client that leaves a configuration unfinished for this long no longer holds the rest of it back.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a listener that could not bind is offered again.
const BIND_RETRY: Duration = Duration::from_secs(5);
/// Requests of an Envoy that reconnects list everything it holds.
const MAX_REQUEST: usize = 32 * 1024 * 1024;

/// Serves configuration. Clones share everything.
#[derive(Clone)]
pub struct AdsService {
    view: watch::Receiver<Arc<View>>,
    board: StatusBoard,
    shutdown: Shutdown,
    metrics: AdsMetrics,
    /// Streams per sidecar: a new one may begin before the old one's end is noticed.
    streams: Arc<Mutex<BTreeMap<String, usize>>>,
}

#[derive(Clone, Debug, Default)]
struct AdsMetrics {
    streams: Gauge<i64, AtomicI64>,
    responses: Counter<u64, AtomicU64>,
    refusals: Counter<u64, AtomicU64>,
}

impl AdsService {
    /// Serves what `view` says until `shutdown`.
    pub fn new(view: watch::Receiver<Arc<View>>, board: StatusBoard, shutdown: Shutdown) -> Self {
        Self { view, board, shutdown, metrics: AdsMetrics::default(), streams: Arc::default() }
    }

    /// Adds this service's metrics.
    pub fn register(&self, registry: &mut Registry) {
        let m = &self.metrics;
        registry.register("isthmus_agent_ads_streams", "Connected Envoys", m.streams.clone());
        registry.register("isthmus_agent_ads_responses", "xDS responses sent", m.responses.clone());
        registry.register("isthmus_agent_ads_nacks", "xDS responses refused by an Envoy", m.refusals.clone());
    }

    /// The tonic service.
    pub fn into_server(self) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    fn count_stream(&self, name: &str, by: isize) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let count = streams.entry(name.to_owned()).or_default();
        *count = count.saturating_add_signed(by);
        let connected = *count > 0;
        streams.retain(|_, count| *count > 0);
        // Under the lock, so that two streams' reports cannot overtake each other.
        self.board.sidecar_connected(name, connected);
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for AdsService {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("use the incremental stream: api_type DELTA_GRPC"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let peer = request
            .extensions()
            .get::<PeerInfo>()
            .and_then(|peer| peer.id.clone())
            .ok_or_else(|| Status::unauthenticated("xDS needs a workload certificate"))?;
        let session = Session::new(self.clone(), peer, request.into_inner());
        let responses = stream::unfold(session, |mut session| async move {
            let item = session.next().await?;
            Some((item, session))
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

/// One Envoy's stream.
struct Session {
    service: AdsService,
    peer: SpiffeId,
    requests: Streaming<DeltaDiscoveryRequest>,
    /// Known after the first request.
    client: Option<Client>,
    outbox: VecDeque<DeltaDiscoveryResponse>,
    ended: bool,
}

struct Client {
    name: String,
    stream: DeltaStream,
    resources: Arc<Resources>,
    /// Whose a virtual address is, for words.
    addresses: BTreeMap<SocketAddrV4, String>,
    applied: Option<Stamp>,
    told: Vec<String>,
    /// Since when a configuration has been incomplete.
    patience: Option<Instant>,
    bind_retry: Option<Instant>,
}

enum Event {
    Request(Option<Result<Box<DeltaDiscoveryRequest>, Status>>),
    View(bool),
    Timer,
    Shutdown,
}

impl Session {
    fn new(service: AdsService, peer: SpiffeId, requests: Streaming<DeltaDiscoveryRequest>) -> Self {
        Self { service, peer, requests, client: None, outbox: VecDeque::new(), ended: false }
    }

    /// The next response; `None` when the client has gone. An error is the last item.
    async fn next(&mut self) -> Option<Result<DeltaDiscoveryResponse, Status>> {
        loop {
            if self.ended {
                return None;
            }
            if let Some(response) = self.outbox.pop_front() {
                self.service.metrics.responses.inc();
                return Some(Ok(response));
            }
            match self.step().await {
                Ok(true) => {}
                Ok(false) => return None,
                Err(status) => {
                    self.ended = true;
                    return Some(Err(status));
                }
            }
        }
    }

    /// Takes one event. `false`: the client is gone.
    async fn step(&mut self) -> Result<bool, Status> {
        let Some(client) = &mut self.client else { return self.first().await };
        let due = client.next_timer();
        let event = tokio::select! {
            // All of these are cancel-safe: nothing is lost when another comes first.
            () = self.service.shutdown.requested() => Event::Shutdown,
            request = self.requests.next() => Event::Request(request.map(|r| r.map(Box::new))),
            changed = self.service.view.changed() => Event::View(changed.is_ok()),
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Event::Timer,
        };
        let responses = match event {
            Event::Shutdown | Event::View(false) => return Err(Status::unavailable("the agent is stopping")),
            Event::Request(None) => return Ok(false),
            Event::Request(Some(Err(status))) => {
                tracing::debug!(sidecar = client.name, %status, "xDS stream broke");
                return Ok(false);
            }
            Event::Request(Some(Ok(request))) => client.request(*request, &self.service.metrics)?,
            Event::View(true) => {
                let view = self.service.view.borrow_and_update().clone();
                match view.sidecars.get(&client.name) {
                    Some(sidecar) => {
                        authorize(sidecar, &self.peer)?;
                        client.rebuild(&view, sidecar)
                    }
                    // Not registered any more is no reason to take anything away from an Envoy that runs.
                    None => Vec::new(),
                }
            }
            Event::Timer => client.timer(Instant::now()),
        };
        self.outbox.extend(responses);
        client.report(&self.service.board, Instant::now());
        Ok(true)
    }

    /// The first request says who it is.
    async fn first(&mut self) -> Result<bool, Status> {
        let request = tokio::select! {
            () = self.service.shutdown.requested() => return Err(Status::unavailable("the agent is stopping")),
            request = timeout(FIRST_REQUEST, self.requests.next()) => request,
        };
        let request = match request {
            Err(_) => return Err(Status::deadline_exceeded("no request came")),
            Ok(None) => return Ok(false),
            Ok(Some(request)) => request?,
        };
        let name = request.node.as_ref().map(|node| node.id.clone()).unwrap_or_default();
        let view = self.service.view.borrow_and_update().clone();
        let sidecar = view.sidecars.get(&name).ok_or_else(|| {
            let name: String = name.chars().take(100).collect();
            Status::failed_precondition(format!("sidecar {name:?} is not registered with this agent"))
        })?;
        authorize(sidecar, &self.peer)?;
        check_known(&view)?;
        let mut client = Client::new(name, &view, sidecar);
        self.service.count_stream(&client.name, 1);
        self.service.metrics.streams.inc();
        tracing::info!(sidecar = client.name, peer.spiffe_id = %self.peer, "Envoy connected");
        let responses = client.request(request, &self.service.metrics);
        let client = self.client.insert(client);
        self.outbox.extend(responses?);
        client.report(&self.service.board, Instant::now());
        Ok(true)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(client) = &self.client {
            self.service.count_stream(&client.name, -1);
            self.service.metrics.streams.dec();
            tracing::info!(sidecar = client.name, "Envoy disconnected");
        }
    }
}

impl Client {
    fn new(name: String, view: &View, sidecar: &Sidecar) -> Self {
        let resources = Arc::new(build(view, sidecar, now()));
        Self {
            name,
            stream: DeltaStream::new(Arc::clone(&resources)),
            resources,
            addresses: addresses(view, sidecar),
            applied: None,
            told: Vec::new(),
            patience: None,
            bind_retry: None,
        }
    }

    fn request(
        &mut self,
        request: DeltaDiscoveryRequest,
        metrics: &AdsMetrics,
    ) -> Result<Vec<DeltaDiscoveryResponse>, Status> {
        if let Some(detail) = &request.error_detail {
            metrics.refusals.inc();
            tracing::warn!(sidecar = self.name, type_url = request.type_url, detail = detail.message, "Envoy refused");
        }
        self.stream.request(request).map_err(|e| Status::resource_exhausted(e.to_string()))
    }

    fn rebuild(&mut self, view: &View, sidecar: &Sidecar) -> Vec<DeltaDiscoveryResponse> {
        if check_known(view).is_err() || view.global.stamp < self.resources.stamp {
            return Vec::new();
        }
        self.resources = Arc::new(build(view, sidecar, now()));
        self.addresses = addresses(view, sidecar);
        self.patience = None;
        self.stream.update(Arc::clone(&self.resources))
    }

    fn next_timer(&self) -> Option<Instant> {
        [self.patience, self.bind_retry].into_iter().flatten().min()
    }

    fn timer(&mut self, now: Instant) -> Vec<DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        if self.patience.is_some_and(|at| at <= now) {
            self.patience = None;
            responses.extend(self.stream.lose_patience());
        }
        if self.bind_retry.is_some_and(|at| at <= now) {
            self.bind_retry = None;
            responses.extend(self.stream.retry_rejected(problems::is_bind_failure));
        }
        responses
    }

    /// Tells the board what changed, and sets the timers.
    fn report(&mut self, board: &StatusBoard, now: Instant) {
        let rejections: Vec<Rejection> = self.stream.rejections();
        if self.stream.is_settled() {
            self.patience = None;
            if self.applied != Some(self.resources.stamp) {
                self.applied = Some(self.resources.stamp);
                board.sidecar_applied(&self.name, self.resources.stamp);
            }
        } else if self.patience.is_none() && !self.stream.is_impatient() {
            self.patience = Some(now + PATIENCE);
        }
        if !rejections.iter().any(problems::is_bind_failure) {
            self.bind_retry = None;
        } else if self.bind_retry.is_none() {
            self.bind_retry = Some(now + BIND_RETRY);
        }
        // A listener that is being tried again is still a problem until it is accepted.
        if rejections.is_empty() && !self.stream.is_settled() && !self.told.is_empty() {
            return;
        }
        let problems = problems::all(&self.resources, &rejections, &self.addresses);
        if problems != self.told {
            board.sidecar_problem(&self.name, problems.clone());
            self.told = problems;
        }
    }
}

/// May a configuration be made of `view`? An Envoy that is refused keeps what it has and asks again.
fn check_known(view: &View) -> Result<(), Status> {
    if view.global.stamp == Stamp::default() {
        return Err(Status::unavailable("no state of the federation is known yet"));
    }
    if !view.objects_known {
        return Err(Status::unavailable("the manifests of this cluster have not been read yet"));
    }
    Ok(())
}

fn authorize(sidecar: &Sidecar, peer: &SpiffeId) -> Result<(), Status> {
    if sidecar.identity == *peer {
        return Ok(());
    }
    tracing::warn!(sidecar = sidecar.hello.name, peer.spiffe_id = %peer, "asked for another workload's configuration");
    Err(Status::permission_denied("the certificate is not the registered sidecar's"))
}

fn addresses(view: &View, sidecar: &Sidecar) -> BTreeMap<SocketAddrV4, String> {
    let mut all = BTreeMap::new();
    for service in sidecar.hello.upstreams.iter().filter_map(|name| view.global.services.get(name)) {
        if let Some(vip) = vip::vip(view.vip_range, service.index) {
            for port in &service.ports {
                all.insert(SocketAddrV4::new(vip, port.port.number), service.name.to_string());
            }
        }
    }
    all
}

fn now() -> Timestamp {
    Timestamp(isthmus_runtime::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::fixture::{sidecar, view};

    fn at(revision: u64) -> View {
        let mut view = view();
        let mut global = (*view.global).clone();
        global.stamp.revision.0 = revision;
        global.services.clear();
        view.global = Arc::new(global);
        view
    }

    fn listeners(client: &Client) -> usize {
        client.resources.of(crate::xds::names::ResourceType::Listener).count()
    }

    #[test]
    fn there_is_no_stream_before_a_state_and_the_objects_are_known() {
        assert!(check_known(&view()).is_ok());
        let mut unknown = view();
        let mut global = (*unknown.global).clone();
        global.stamp = Stamp::default();
        unknown.global = Arc::new(global);
        let unread = View { objects_known: false, ..view() };
        for (view, what) in [(unknown, "federation"), (unread, "manifests")] {
            let refused = check_known(&view).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::Unavailable);
            assert!(refused.message().contains(what), "{refused}");
        }
    }

    #[test]
    fn a_stream_never_goes_back_to_an_older_or_an_unknown_state() {
        let first = view();
        let mut client = Client::new("web-1".to_owned(), &first, &sidecar());
        let before = listeners(&client);
        let mut nothing = at(0);
        Arc::make_mut(&mut nothing.global).stamp = Stamp::default();
        let unread = View { objects_known: false, ..at(9) };
        for older in [at(6), nothing, unread] {
            assert_eq!(client.rebuild(&older, &sidecar()), []);
            assert_eq!((client.resources.stamp, listeners(&client)), (first.global.stamp, before));
        }
        client.rebuild(&at(8), &sidecar());
        assert!(listeners(&client) < before, "a later state counts");
        let mut restored = view();
        Arc::make_mut(&mut restored.global).stamp.epoch.0 += 1;
        Arc::make_mut(&mut restored.global).stamp.revision.0 = 1;
        client.rebuild(&restored, &sidecar());
        assert_eq!(listeners(&client), before, "so does a new epoch");
    }
}
