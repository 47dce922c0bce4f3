//! `isthmusctl history`, `diff` and `rollback`: the control plane's past.

use std::{fmt::Write as _, io::Write};

use serde_json::Value;

use super::get;
use crate::{
    Verdict,
    args::{Format, HistoryArgs, HistoryFormat},
    client::Client,
    output,
    shapes::{Difference, Event, RolledBack},
    table::Table,
};

pub(super) async fn run(client: &Client, args: HistoryArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let mut path = format!("events?limit={}", args.limit);
    if !args.all {
        path.push_str("&changes");
    }
    if let Some(subject) = &args.subject {
        write!(path, "&subject={subject}")?;
    }
    let events: Vec<Value> = client.get(&path).await?;
    match args.output {
        HistoryFormat::Json => output::json(out, &events)?,
        HistoryFormat::Yaml => output::yaml(out, &events)?,
        HistoryFormat::Jsonl => {
            // As a log is read: oldest first.
            for event in events.iter().rev() {
                writeln!(out, "{event}")?;
            }
        }
        HistoryFormat::Table => {
            let events: Vec<Event> = serde_json::from_value(Value::Array(events))?;
            write!(out, "{}", table(&events))?;
        }
    }
    Ok(Verdict::Yes)
}

pub(super) async fn diff(
    client: &Client,
    (from, to): (u64, u64),
    format: Format,
    out: &mut dyn Write,
) -> anyhow::Result<Verdict> {
    let raw: Value = client.get(&format!("diff/{from}/{to}")).await?;
    match format {
        Format::Json => output::json(out, &raw)?,
        Format::Yaml => output::yaml(out, &raw)?,
        Format::Table => {
            let difference: Difference = serde_json::from_value(raw)?;
            write!(out, "{}", settings_lines(difference.settings.as_ref()))?;
            writeln!(out)?;
            write!(out, "{}", table(&difference.events))?;
        }
    }
    Ok(Verdict::Yes)
}

pub(super) async fn rollback(client: &Client, revision: u64, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let path = format!("rollback/{revision}");
    let done: RolledBack = client.post(&path, &Value::Object(Default::default())).await?;
    if done.changed {
        writeln!(out, "the settings of revision {revision} are in force again, as revision {}", done.stamp)?;
        eprintln!("`isthmusctl wait` tells when every connected consumer has them.");
    } else {
        writeln!(out, "the settings are those of revision {revision} already")?;
    }
    Ok(Verdict::Yes)
}

pub(super) fn table(events: &[Event]) -> String {
    let mut table = Table::new(&["REVISION", "AT", "WHO", "WHAT", "ABOUT", "OUTCOME"]);
    for event in events {
        let outcome = if event.reason.is_empty() { &event.outcome } else { &event.reason };
        table.row([
            event.after.to_string(),
            time(event.at),
            event.who.clone(),
            event.action.clone(),
            event.subject.clone(),
            outcome.clone(),
        ]);
    }
    if table.is_empty() {
        return "Nothing that is remembered changed the state meanwhile.\n".to_owned();
    }
    table.render(0)
}

/// RFC 3339, to the second.
pub(super) fn time(unix_ms: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(unix_ms);
    humantime::format_rfc3339_seconds(at).to_string()
}

/// One line for each value that differs, by its path.
pub(super) fn settings_lines(settings: Option<&[Value; 2]>) -> String {
    let Some([before, after]) = settings else { return "The settings are the same.\n".to_owned() };
    let (before, after) = (get::leaves(before), get::leaves(after));
    let mut text = String::from("Settings:\n");
    let paths: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for path in paths {
        let (then, now) = (before.get(path), after.get(path));
        if then != now {
            let shown = |value: Option<&String>| value.cloned().unwrap_or_else(|| "(none)".to_owned());
            text.push_str(&format!("  {path}: {} -> {}\n", shown(then), shown(now)));
        }
    }
    text
}
