//! Log lines as they are written, and spans as a collector receives them.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::HeaderMap;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::*;
use crate::tasks::Tasks;

/// A writer that keeps what was logged.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Written {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn logged(cfg: &TelemetryConfig, work: impl FnOnce()) -> String {
    let written = Written::default();
    let writer = written.clone();
    let (subscriber, _guard) = build("isthmus-gateway", "gateway-\"1\"", cfg, move || writer.clone()).unwrap();
    tracing::subscriber::with_default(subscriber, work);
    written.text()
}

fn config(level: &str, format: LogFormat) -> TelemetryConfig {
    TelemetryConfig { log: LogConfig { level: level.to_owned(), format }, ..TelemetryConfig::default() }
}

#[test]
fn a_field_that_holds_json_becomes_a_value() {
    let text = logged(&config("info", LogFormat::Json), || {
        tracing::info!(tried.json = r#"[{"cluster":"west"}]"#, other.json = "no json", plain = "[1]");
        tracing::info!(tried.json = r#"[{"cluster":"west"}]"#, plain = "[1]");
    });
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        lines[0]["fields"]["tried.json"], r#"[{"cluster":"west"}]"#,
        "what is not JSON leaves the line as it is"
    );
    assert_eq!(lines[1]["fields"]["tried"][0]["cluster"], "west");
    assert_eq!(lines[1]["fields"]["plain"], "[1]");
    assert!(lines[1]["fields"].get("tried.json").is_none() && lines[1]["timestamp"].is_string());
}

#[test]
fn json_lines_carry_service_instance_fields_and_spans() {
    let text = logged(&config("info", LogFormat::Json), || {
        let span = tracing::info_span!("stream", service = "shop/cart");
        span.in_scope(|| tracing::warn!(service = "shop/web", attempt = 2, "peer went away"));
    });
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["service"], &line["instance"]), (&"isthmus-gateway".into(), &"gateway-\"1\"".into()));
    assert_eq!((&line["level"], &line["fields"]["message"]), (&"WARN".into(), &"peer went away".into()));
    assert_eq!((&line["fields"]["service"], &line["fields"]["attempt"]), (&"shop/web".into(), &2.into()));
    assert_eq!((&line["span"]["name"], &line["span"]["service"]), (&"stream".into(), &"shop/cart".into()));
    assert!(line["timestamp"].is_string());
}

#[test]
fn text_lines_carry_the_same() {
    let text = logged(&config("info", LogFormat::Text), || {
        tracing::info_span!("stream", id = 7).in_scope(|| tracing::warn!(attempt = 2, "peer went away"));
    });
    assert!(text.contains(" isthmus-gateway/gateway-\"1\"  WARN stream{id=7}: "), "{text}");
    assert!(text.ends_with("peer went away attempt=2\n"), "{text}");
}

#[test]
fn a_text_line_with_a_structured_field_is_readable_and_says_nothing_twice() {
    let text = logged(&config("info", LogFormat::Text), || {
        tracing::info_span!("connection", service = "shop/cart").in_scope(|| {
            tracing::info!(target: "access", service = "shop/cart", tried.json = r#"[{"cluster":"west"}]"#, bytes = 7);
        });
    });
    let line = r#"  INFO access: service="shop/cart" tried=[{"cluster":"west"}] bytes=7"#;
    assert!(text.ends_with(&format!("{line}\n")), "{text}");
    assert_eq!(text.matches("shop/cart").count(), 1, "{text}");
}

#[test]
fn the_filter_decides_by_target_and_level() {
    let text = logged(&config("warn,chatty=debug", LogFormat::Text), || {
        tracing::info!("left out");
        tracing::debug!(target: "chatty", "kept");
    });
    assert!(text.contains("kept") && !text.contains("left out"), "{text}");
}

#[test]
fn a_config_needs_nothing_and_rejects_what_it_does_not_know() {
    let default: TelemetryConfig = serde_saphyr::from_str("{}").unwrap();
    assert_eq!((default.log.level.as_str(), default.log.format), ("info", LogFormat::Json));
    let text = serde_saphyr::from_str::<TelemetryConfig>("log: { level: debug, format: text }").unwrap();
    assert_eq!((text.log.level.as_str(), text.log.format), ("debug", LogFormat::Text));
    assert!(serde_saphyr::from_str::<TelemetryConfig>("otlp: http://x").is_err());
}

#[test]
fn bad_levels_and_endpoints_are_found_by_validation_with_their_fields() {
    let endpoints = [
        ("127.0.0.1:4317", "has no scheme"),
        ("https://collector:4317", "asks for TLS"),
        ("ftp://collector", "has an unknown scheme"),
        ("http://", "is not a URL"),
        ("not a url", "is not a URL"),
    ];
    for (endpoint, problem) in endpoints {
        let mut cfg = config("loud=very", LogFormat::Json);
        cfg.otlp_endpoint = Some(endpoint.to_owned());
        let mut problems = Problems::default();
        problems.within("telemetry", &cfg);
        let found: Vec<_> = problems.iter().collect();
        assert_eq!((found[0].0, found[1].0), ("telemetry.log.level", "telemetry.otlpEndpoint"));
        assert!(found[1].1.contains(problem) && found[1].1.contains("http://host:port"), "{}", found[1].1);
    }
}

#[test]
fn a_word_that_is_no_level_is_not_taken_for_a_module() {
    for level in ["loud", "info,loud", "isthmus_gateway"] {
        let mut problems = Problems::default();
        config(level, LogFormat::Json).validate(&mut problems);
        assert!(problems.iter().any(|(field, text)| field == "log.level" && text.contains(level)), "{level}");
    }
    for level in ["off", "WARN", "info,isthmus_gateway=debug", "info,openraft=warn", "[connection]=trace"] {
        let mut problems = Problems::default();
        config(level, LogFormat::Json).validate(&mut problems);
        assert!(problems.is_empty(), "{level}: {:?}", problems.iter().collect::<Vec<_>>());
    }
}

#[test]
fn a_bad_endpoint_stops_the_start_with_the_same_words() {
    let mut cfg = config("info", LogFormat::Json);
    cfg.otlp_endpoint = Some("127.0.0.1:4317".to_owned());
    let error = init("isthmus-gateway", "gateway-1", &cfg).unwrap_err();
    assert!(error.to_string().starts_with("OTLP endpoint \"127.0.0.1:4317\" has no scheme"), "{error}");
}

/// A collector's gRPC port: hands on the bodies that were posted to the trace service.
async fn collector() -> (String, mpsc::Receiver<Vec<u8>>) {
    let (sender, received) = mpsc::channel(16);
    let export = async move |request: Request| {
        assert_eq!(request.uri().path(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
        let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
        sender.send(body.to_vec()).await.unwrap();
        // An answer without a body: an empty success as far as this test needs one.
        let mut headers = HeaderMap::new();
        headers.insert("content-type", "application/grpc".parse().unwrap());
        headers.insert("grpc-status", "0".parse().unwrap());
        headers
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let serve = async move { axum::serve(listener, Router::new().fallback(export)).await.map_err(Into::into) };
    Tasks::new().background("collector", serve);
    (endpoint, received)
}

fn holds(body: &[u8], text: &str) -> bool {
    body.windows(text.len()).any(|window| window == text.as_bytes())
}

// Two threads: dropping the guard blocks one, and the collector needs another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_the_guard_flushes_spans_to_the_collector() {
    let (endpoint, mut received) = collector().await;
    let mut cfg = config("info", LogFormat::Json);
    cfg.otlp_endpoint = Some(endpoint);
    let (subscriber, guard) = build("isthmus-gateway", "gateway-1", &cfg, io::sink).unwrap();
    tracing::subscriber::with_default(subscriber, || {
        tracing::info_span!(target: "isthmus_runtime::tasks", "long-lived task").in_scope(|| {
            tracing::info_span!("accepted stream", cluster = "us-west").in_scope(|| ());
        });
    });
    guard.shutdown();
    let body = tokio::time::timeout(EXPORT_TIMEOUT, received.recv()).await.unwrap().unwrap();
    for text in ["accepted stream", "us-west", "isthmus-gateway", "gateway-1"] {
        assert!(holds(&body, text), "{text} was not exported");
    }
    assert!(!holds(&body, "long-lived task"));
}

#[test]
fn without_a_collector_shutdown_still_ends() {
    let mut cfg = config("info", LogFormat::Json);
    // Port 9 (discard) has no listener.
    cfg.otlp_endpoint = Some("http://127.0.0.1:9".to_owned());
    let (subscriber, guard) = build("isthmus-gateway", "gateway-1", &cfg, io::sink).unwrap();
    tracing::subscriber::with_default(subscriber, || tracing::info_span!("lost").in_scope(|| ()));
    guard.shutdown();
}
