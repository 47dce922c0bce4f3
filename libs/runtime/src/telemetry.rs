//! Logs on stderr and, when an endpoint is configured, traces over OTLP (gRPC).
//!
//! Every log line carries the fields `service` and `instance`. The exporter has threads of its own, so that neither a
//! busy nor an ending service keeps spans from leaving; dropping the guard flushes them. Metrics are not pushed: they
//! are scraped from [`crate::health`].

mod format;
#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use serde::Deserialize;
use tokio::runtime::Runtime;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use crate::config::{Problems, Validate};
use format::{JsonLines, TextLines};

/// How long the exporter may take for one batch, and how long a flush at the end may hold the process.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Beginnings of targets whose spans are never exported: the exporter's own transport, which would trace itself without end, and our
/// task spans, which last as long as the process and would make one trace of all that happens in it.
const NOT_EXPORTED: [&str; 6] = ["h2", "hyper", "tonic", "tower", "opentelemetry", "isthmus_runtime::tasks"];

/// What to log and where traces go.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Logs on stderr.
    pub log: LogConfig,
    /// URL of an OTLP gRPC collector, such as `http://127.0.0.1:4317`; none: no traces.
    pub otlp_endpoint: Option<String>,
    /// Share of the traces begun here that are exported, in percent; a trace that was begun elsewhere goes by what was
    /// decided there. Absent: all.
    pub sample_percent: Option<f64>,
}

/// How much is logged, and how it looks.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LogConfig {
    /// A level, or a filter such as `info,isthmus_gateway=debug`.
    pub level: String,
    /// Lines for machines or for people.
    pub format: LogFormat,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object per line.
    #[default]
    Json,
    /// Text for reading.
    Text,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::default() }
    }
}

impl Validate for TelemetryConfig {
    fn validate(&self, problems: &mut Problems) {
        if let Err(error) = self.log.filter() {
            problems.add("log.level", error.to_string());
        }
        if let Some(Err(error)) = self.otlp_endpoint.as_deref().map(check_endpoint) {
            problems.add("otlpEndpoint", error.to_string());
        }
        if self.sample_percent.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
            problems.add("samplePercent", "use 0 to 100".to_owned());
        }
    }
}

/// Why telemetry did not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// A word of the log filter is neither a level nor of the form module=level.
    #[error(
        "log level {level:?} is neither a level (error, warn, info, debug, trace, off) nor a filter such as \
         \"info,isthmus_gateway=debug\""
    )]
    Word {
        /// What was configured.
        level: String,
    },
    /// The log filter cannot be parsed.
    #[error(
        "log level {level:?} is neither a level (error, warn, info, debug, trace) nor a filter such as \
         \"info,isthmus_gateway=debug\""
    )]
    Level {
        /// What was configured.
        level: String,
        /// What the parser said.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The endpoint is no URL that spans can be sent to.
    #[error("OTLP endpoint {endpoint:?} {problem}; write http://host:port of a collector's gRPC port, usually 4317")]
    Endpoint {
        /// What was configured.
        endpoint: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The exporter refused its settings.
    #[error("start the OTLP exporter for {endpoint:?}")]
    Exporter {
        /// What was configured.
        endpoint: String,
        /// What it said.
        source: ExporterBuildError,
    },
    /// The exporter's threads did not start.
    #[error("start the threads of the OTLP exporter")]
    Threads(#[source] io::Error),
    /// This process has a subscriber already.
    #[error("telemetry is already initialised in this process")]
    AlreadyInitialised(#[source] TryInitError),
}

/// Keeps telemetry alive; flushes spans when it is dropped.
#[derive(Debug)]
#[must_use = "spans are flushed and exporting ends when the guard is dropped"]
pub struct TelemetryGuard {
    exporter: Option<Exporter>,
}

/// Installs logging, and tracing if configured, for the whole process. Panics are logged at ERROR from then on.
///
/// Call it once, first thing in `main`; it needs no async runtime.
pub fn init(service: &'static str, instance: &str, cfg: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    let (subscriber, guard) = build(service, instance, cfg, io::stderr)?;
    subscriber.try_init().map_err(TelemetryError::AlreadyInitialised)?;
    log_panics();
    Ok(guard)
}

impl TelemetryGuard {
    /// Flushes what is buffered, for at most 5 s, and ends exporting. Blocks; the same as dropping the guard.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(Exporter { provider, runtime }) = self.exporter.take() {
            if let Err(error) = provider.shutdown_with_timeout(EXPORT_TIMEOUT) {
                tracing::warn!(%error, "the last spans may not have been exported");
            }
            // Not dropped in place: that would panic inside an async context, where guards usually end.
            runtime.shutdown_background();
        }
    }
}

#[derive(Debug)]
struct Exporter {
    provider: SdkTracerProvider,
    runtime: Runtime,
}

impl Exporter {
    fn start(service: &'static str, instance: &str, endpoint: &str, share: f64) -> Result<Self, TelemetryError> {
        check_endpoint(endpoint)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp-export")
            .enable_all()
            .build()
            .map_err(TelemetryError::Threads)?;
        let entered = runtime.enter();
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(|source| TelemetryError::Exporter { endpoint: endpoint.to_owned(), source })?;
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
            .build();
        let sampler = Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(share)));
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .with_sampler(sampler)
            .build();
        drop(entered);
        Ok(Self { provider, runtime })
    }
}

impl LogConfig {
    fn filter(&self) -> Result<EnvFilter, TelemetryError> {
        // A bare word that is no level would be taken for a module's name, and silence everything else.
        let bare = self.level.split(',').map(str::trim).filter(|part| !part.contains(['=', '[']));
        for word in bare {
            if word.parse::<LevelFilter>().is_err() {
                return Err(TelemetryError::Word { level: self.level.clone() });
            }
        }
        EnvFilter::builder()
            .parse(&self.level)
            .map_err(|source| TelemetryError::Level { level: self.level.clone(), source })
    }
}

/// What [`init`] installs, writing lines to `writer`: for who wants to install it for some threads only, such as tests.
pub fn build<W>(
    service: &'static str,
    instance: &str,
    cfg: &TelemetryConfig,
    writer: W,
) -> Result<(impl Subscriber + Send + Sync, TelemetryGuard), TelemetryError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = cfg.log.filter()?;
    let endpoint = cfg.otlp_endpoint.as_deref();
    let share = cfg.sample_percent.map_or(1.0, |percent| percent / 100.0);
    let exporter = endpoint.map(|endpoint| Exporter::start(service, instance, endpoint, share)).transpose()?;
    let traces = exporter.as_ref().map(|exporter| {
        let exported = filter_fn(|metadata| !NOT_EXPORTED.iter().any(|prefix| metadata.target().starts_with(prefix)));
        tracing_opentelemetry::layer().with_tracer(exporter.provider.tracer(service)).with_filter(exported)
    });
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = match cfg.log.format {
        LogFormat::Json => lines.json().event_format(JsonLines::new(service, instance)).boxed(),
        LogFormat::Text => lines.with_ansi(false).event_format(TextLines::new(service, instance)).boxed(),
    };
    Ok((tracing_subscriber::registry().with(filter).with(lines).with(traces), TelemetryGuard { exporter }))
}

fn check_endpoint(endpoint: &str) -> Result<(), TelemetryError> {
    let refuse = |problem| Err(TelemetryError::Endpoint { endpoint: endpoint.to_owned(), problem });
    let Ok(uri) = endpoint.parse::<axum::http::Uri>() else {
        return refuse("is not a URL");
    };
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return refuse("asks for TLS, which the exporter does not do: put a collector beside"),
        Some(_) => return refuse("has an unknown scheme"),
        None => return refuse("has no scheme"),
    }
    if uri.host().is_none_or(str::is_empty) { refuse("has no host") } else { Ok(()) }
}

/// Panics go where all else goes, instead of as bare text between the lines.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("no message");
        // Captured only if RUST_BACKTRACE asks for it.
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(panic = message, location, %backtrace, "panic");
    }));
}
