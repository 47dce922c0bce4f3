//! The health server over real sockets.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::tasks::TaskError;

const GRACE: Duration = Duration::from_secs(5);

/// Status code, head and body of `GET path`.
async fn fetch(addr: SocketAddr, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

/// Serves, runs `check` against it, and drains.
async fn with_server<F>(registry: Registry, readiness: Readiness, extra: Router, check: F) -> Result<(), TaskError>
where
    F: AsyncFnOnce(SocketAddr),
{
    let tasks = Tasks::new();
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = listener.local_addr();
    listener.serve(&tasks, Arc::new(registry), readiness, extra);
    tasks.run_until(check(addr), GRACE).await
}

#[tokio::test]
async fn live_while_not_ready_and_the_pending_gates_are_listed() {
    let readiness = Readiness::new();
    let (gate, other) = (readiness.gate("snapshot"), readiness.gate("tunnels"));
    other.ready();
    with_server(Registry::default(), readiness, Router::new(), async |addr| {
        let (status, _, body) = fetch(addr, "/livez").await;
        assert_eq!((status, body.as_str()), (200, "ok\n"));
        let (status, _, body) = fetch(addr, "/readyz").await;
        assert_eq!((status, body.as_str()), (503, "not ready\npending snapshot: not yet\n"));
        gate.ready();
        let (status, _, body) = fetch(addr, "/readyz").await;
        assert_eq!((status, body.as_str()), (200, "ready\n"));
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn metrics_hold_the_service_and_the_process_and_end_as_open_metrics_must() {
    let mut registry = Registry::default();
    let streams = prometheus_client::metrics::gauge::Gauge::<i64>::default();
    streams.set(7);
    registry.register("isthmus_gateway_streams", "Open streams", streams);
    with_server(registry, Readiness::new(), Router::new(), async |addr| {
        let (status, head, body) = fetch(addr, "/metrics").await;
        assert_eq!(status, 200);
        assert!(head.to_lowercase().contains(OPEN_METRICS), "{head}");
        for line in [
            "isthmus_gateway_streams 7\n",
            concat!("isthmus_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1\n"),
            "process_start_time_seconds ",
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
            "isthmus_runtime_tasks{task=\"health\"} 1\n",
        ] {
            assert!(body.contains(line), "{line:?} is not in\n{body}");
        }
        assert!(body.ends_with("# EOF\n"), "{body}");
        assert_eq!(body.matches("# EOF").count(), 1, "{body}");
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn panics_of_tasks_are_metered_by_name() {
    let tasks = Tasks::new();
    tasks.spawn("connection", async { panic!("bad peer") });
    crate::wait::wait_for("the panic", GRACE, async || !tasks.panics().is_empty()).await.unwrap();
    let mut body = String::new();
    text::encode(&mut body, &process::registry(&tasks)).unwrap();
    assert!(body.contains("isthmus_runtime_task_panics_total{task=\"connection\"} 1\n"), "{body}");
}

#[tokio::test]
async fn a_services_own_routes_are_served_beside() {
    let extra = Router::new().route("/debug/routes", get(async || "none"));
    with_server(Registry::default(), Readiness::new(), extra, async |addr| {
        assert_eq!(fetch(addr, "/debug/routes").await.2, "none");
        assert_eq!(fetch(addr, "/nowhere").await.0, 404);
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_drain_is_answered_as_unready_not_refused() {
    let tasks = Tasks::new();
    let readiness = Readiness::new();
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = listener.local_addr();
    listener.serve(&tasks, Arc::new(Registry::default()), readiness.clone(), Router::new());
    let shutdown = tasks.shutdown();
    let (sender, answer) = tokio::sync::oneshot::channel();
    tasks.spawn("drain", async move {
        shutdown.requested().await;
        readiness.begin_drain();
        sender.send(fetch(addr, "/readyz").await).unwrap();
    });
    tasks.run_until(async {}, GRACE).await.unwrap();
    let (status, _, body) = answer.await.unwrap();
    assert_eq!((status, body.as_str()), (503, "not ready\ndraining\n"));
}

#[tokio::test]
async fn a_taken_port_names_the_field() {
    let holder = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let message = bind(holder.local_addr()).await.unwrap_err().to_string();
    assert!(message.starts_with("listen.health: TCP address"), "{message}");
}

#[tokio::test]
async fn silent_connections_take_a_bounded_number_of_places() {
    with_server(Registry::default(), Readiness::new(), Router::new(), async |addr| {
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }
        let mut extra = TcpStream::connect(addr).await.unwrap();
        assert_eq!(extra.read(&mut [0]).await.unwrap_or(0), 0, "closed at once");
        drop(silent);
        let served = async || {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            stream.write_all(b"GET /livez HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.is_ok() && answer.starts_with("HTTP/1.1 200")
        };
        crate::wait::wait_for("room", GRACE, served).await.unwrap();
    })
    .await
    .unwrap();
}
