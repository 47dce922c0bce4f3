//! Log lines with the fields `service` and `instance` in front, which the stock formats cannot add.
//!
//! The stock formats do the rest: their line is made first and ours is wrapped around it. One thing they cannot carry is a
//! structured value: an event's field that is called `name.json` and holds JSON text becomes the value `name`. An event with
//! such a field is complete by itself: its text line leaves out the spans, which would say everything twice.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{Format, Full, Json, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The end of the name of a field whose text is JSON.
const STRUCTURED: &str = ".json";

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
        if event.metadata().fields().iter().any(|field| field.name().ends_with(STRUCTURED)) {
            line = unfold(&line).unwrap_or(line);
        }
        // An event always has a timestamp and a level, so there is something behind the brace.
        write!(writer, "{},{}", self.head, line.strip_prefix('{').unwrap_or(&line))
    }
}

/// `line` with the JSON in its fields' text as values. `None` if it is not as expected; then it stays as it is.
fn unfold(line: &str) -> Option<String> {
    let mut object: serde_json::Value = serde_json::from_str(line).ok()?;
    let fields = object.get_mut("fields")?.as_object_mut()?;
    let names: Vec<String> = fields.keys().filter(|name| name.ends_with(STRUCTURED)).cloned().collect();
    for name in names {
        let value = serde_json::from_str(fields.get(&name)?.as_str()?).ok()?;
        fields.remove(&name);
        fields.insert(name.strip_suffix(STRUCTURED)?.to_owned(), value);
    }
    Some(format!("{object}\n"))
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
        let about = event.metadata();
        if about.fields().iter().any(|field| field.name().ends_with(STRUCTURED)) {
            write!(writer, "{:>5} {}:", about.level(), about.target())?;
            let mut fields = Plain { writer: &mut writer, written: Ok(()) };
            event.record(&mut fields);
            fields.written?;
            return writeln!(writer);
        }
        self.inner.format_event(ctx, writer, event)
    }
}

/// An event's fields as ` name=value`, JSON as it is.
struct Plain<'a, 'w> {
    writer: &'a mut Writer<'w>,
    written: fmt::Result,
}

impl Plain<'_, '_> {
    fn put(&mut self, name: &str, value: fmt::Arguments<'_>) {
        if self.written.is_ok() {
            self.written = match name {
                "message" => write!(self.writer, " {value}"),
                _ => write!(self.writer, " {name}={value}"),
            };
        }
    }
}

impl Visit for Plain<'_, '_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field.name(), format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name().strip_suffix(STRUCTURED) {
            Some(name) => self.put(name, format_args!("{value}")),
            None => self.put(field.name(), format_args!("{value:?}")),
        }
    }
}
