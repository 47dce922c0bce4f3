//! What a gateway tells of a connection: a line of its log, and a span that a collector receives.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock},
};

use isthmus_runtime::telemetry::{self, LogConfig, LogFormat, TelemetryConfig, TelemetryGuard};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value as Any},
    trace::v1::Span,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport};
use tracing::{Dispatch, subscriber::NoSubscriber};

use super::rig::{Gateway, Server, knock, local, read, refusing, show, sni, until};

/// Keeps what is logged.
#[derive(Clone, Default)]
pub(super) struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// A log in JSON of everything, and of spans if there is a collector.
    pub(super) fn open(instance: &str, collector: Option<SocketAddr>) -> (Self, Dispatch, TelemetryGuard) {
        let log = Self::default();
        let config = TelemetryConfig {
            log: LogConfig { level: "info,access=debug".to_owned(), format: LogFormat::Json },
            otlp_endpoint: collector.map(|address| format!("http://{address}")),
            sample_percent: None,
        };
        // While there is but one, tracing asks only the thread that comes to a line first whether it is wanted, and that may
        // be one of a gateway without a log.
        static SECOND: OnceLock<Dispatch> = OnceLock::new();
        SECOND.get_or_init(|| Dispatch::new(NoSubscriber::default()));
        let writer = log.clone();
        let (subscriber, guard) =
            telemetry::build("isthmus-gateway", instance, &config, move || writer.clone()).unwrap();
        (log, Dispatch::new(subscriber), guard)
    }

    /// The lines with this message.
    pub(super) fn lines(&self, message: &str) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
        lines.filter(|line| line["fields"]["message"].as_str().is_some_and(|m| m.starts_with(message))).collect()
    }

    /// The fields of the lines about connections. Every line must be JSON.
    fn accesses(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
        lines.filter(|line| line["target"] == "access").map(|line| line["fields"].clone()).collect()
    }

    pub(super) async fn one(&self) -> Value {
        until("a line is written", || !self.accesses().is_empty()).await;
        assert_eq!(self.accesses().len(), 1);
        self.accesses().remove(0)
    }
}

/// A connection to its orderly end. Returns the client's address.
async fn connect(entry: SocketAddr) -> SocketAddr {
    let mut client = knock(entry, &sni(None)).await;
    assert_eq!(read(&mut client, 4).await, b"west");
    client.write_all(b"ping").await.unwrap();
    client.shutdown().await.unwrap();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"ping");
    client.local_addr().unwrap()
}

#[tokio::test]
async fn a_line_tells_who_what_where_and_why_in_json() {
    let (near, near_log, _near) = Log::open("near", None);
    let (far, far_log, _far) = Log::open("far", None);
    let (refused, dead_log, _refused) = Log::open("refused", None);
    let gateways = [
        Gateway::start_logging("east", near_log, |_| {}).await,
        Gateway::start_logging("central", dead_log, |_| {}).await,
        Gateway::start_logging("west", far_log, |_| {}).await,
    ];
    let (dead, west) = (refusing().await, Server::bind().await.echo(b"west"));
    show(&gateways, &[("east", &[]), ("central", &[dead]), ("west", &[west])]).await;
    let client = connect(gateways[0].auto).await;

    let line = near.one().await;
    for (field, value) in [
        ("direction", "ingress"),
        ("service", "shop/orders"),
        ("source", "east"),
        ("source_gateway", "gateway-1"),
        ("client", &client.to_string()),
        ("destination", "west"),
        ("destination_gateway", "gateway-1"),
        ("outcome", "accepted"),
        ("end", "finished"),
    ] {
        assert_eq!(line[field], value, "{field} in {line}");
    }
    assert_eq!(line["port"], 80);
    assert_eq!(line["bytes_received"], 8);
    assert!(line["first_byte_us"].as_u64() > Some(0) && line["duration_us"].as_u64() >= line["first_byte_us"].as_u64());
    let tried = serde_json::json!([
        {
            "cluster": "central", "gateway": "gateway-1", "outcome": "rejected_connect_failed",
            "detail": "endpoints refused or closed",
        },
        { "cluster": "west", "gateway": "gateway-1", "outcome": "accepted" },
    ]);
    assert_eq!(line["tried"], tried);

    let line = far.one().await;
    for (field, value) in [
        ("direction", "egress"),
        ("source", "east"),
        ("source_gateway", "gateway-1"),
        ("source_id", "spiffe://isthmus.example/cluster/east/gateway"),
        ("destination", "west"),
        ("endpoint", &west.to_string()),
    ] {
        assert_eq!(line[field], value, "{field} in {line}");
    }
    assert_eq!(line["tried"], serde_json::json!([{ "cluster": "west", "endpoint": west, "outcome": "accepted" }]));
    let tried = serde_json::json!([{ "cluster": "central", "endpoint": dead, "outcome": "connect_failed" }]);
    assert_eq!(refused.one().await["tried"], tried);
}

/// A collector of spans.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let instance = text(&attributes, "service.instance.id").unwrap_or_default();
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().unwrap().extend(spans.map(|span| (instance.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn serve() -> (Self, SocketAddr) {
        let collector = Self::default();
        let listener = TcpListener::bind(local(0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (collector, address)
    }

    fn connection(&self, instance: &str) -> Option<Span> {
        let spans = self.0.lock().unwrap();
        spans.iter().find(|(from, span)| from == instance && span.name == "connection").map(|(_, span)| span.clone())
    }
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|a| a.key == key)?.value.clone()?.value?;
    if let Any::StringValue(text) = value { Some(text) } else { None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_far_gateways_span_is_a_child_of_the_near_ones_in_the_same_trace() {
    let (collector, address) = Collector::serve().await;
    let (_, near_log, near_guard) = Log::open("near", Some(address));
    let (_, far_log, far_guard) = Log::open("far", Some(address));
    let gateways =
        [Gateway::start_logging("east", near_log, |_| {}).await, Gateway::start_logging("west", far_log, |_| {}).await];
    let west = Server::bind().await.echo(b"west");
    show(&gateways, &[("east", &[]), ("west", &[west])]).await;
    connect(gateways[0].auto).await;
    let core = (gateways[0].core().await, gateways[1].core().await);
    until("both are done with it", || core.0.metrics.carried_now() + core.1.metrics.carried_now() == 0).await;
    // Flushes what is batched, and blocks meanwhile.
    tokio::task::spawn_blocking(|| drop((near_guard, far_guard))).await.unwrap();
    until("both spans arrive", || collector.connection("near").is_some() && collector.connection("far").is_some())
        .await;
    let (near, far) = (collector.connection("near").unwrap(), collector.connection("far").unwrap());
    assert!(near.parent_span_id.is_empty(), "the trace begins at the near gateway");
    assert_eq!(far.trace_id, near.trace_id);
    assert_eq!(far.parent_span_id, near.span_id);
    assert_eq!(text(&far.attributes, "source.cluster").as_deref(), Some("east"));
    assert_eq!(text(&near.attributes, "destination.cluster").as_deref(), Some("west"));
}
