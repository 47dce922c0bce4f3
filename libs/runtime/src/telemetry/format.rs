//! Log lines with the fields `service` and `instance` in front, which the stock formats cannot add.
//!
//! The stock formats do the rest: their line is made first and ours is wrapped around it.

use std::fmt;

use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Json, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// One JSON object per line: `service`, `instance`, then timestamp, level, target, `fields`, `span`, `spans`.
pub(super) struct JsonLines {
    inner: Format<Json>,
    head: String,
}

impl JsonLines {
    pub(super) fn new(service: &str, instance: &str) -> Self {
        // The event's own fields stay below `fields`: one of them may well be called `service`.
        let head = serde_json::json!({ "service": service, "instance": instance }).to_string();
        Self { inner: Format::default().json(), head: head.trim_end_matches('}').to_owned() }
    }
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(ctx, Writer::new(&mut line), event)?;
        // An event always has a timestamp and a level, so there is something behind the brace.
        write!(writer, "{},{}", self.head, line.strip_prefix('{').unwrap_or(&line))
    }
}

/// A line for people: time, `service/instance`, level, spans, message.
pub(super) struct TextLines {
    inner: Format<Full, ()>,
    head: String,
}

impl TextLines {
    pub(super) fn new(service: &str, instance: &str) -> Self {
        Self { inner: Format::default().without_time(), head: format!("{service}/{instance}") }
    }
}

impl<S, N> FormatEvent<S, N> for TextLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        SystemTime.format_time(&mut writer)?;
        write!(writer, " {} ", self.head)?;
        self.inner.format_event(ctx, writer, event)
    }
}
