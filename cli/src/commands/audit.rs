//! `isthmusctl audit`: every attempt, as the asked node knows it.

use std::io::Write;

use serde_json::Value;

use super::history::time;
use crate::{
    Verdict,
    args::{AuditArgs, HistoryFormat},
    client::Client,
    output,
    shapes::AuditEntry,
    table::Table,
};

pub(super) async fn run(client: &Client, args: AuditArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let mut query = vec![("limit", args.limit.to_string())];
    let texts = [("who", args.who), ("subject", args.subject), ("action", args.action), ("outcome", args.outcome)];
    query.extend(texts.into_iter().filter_map(|(key, value)| Some((key, value?))));
    let times = [("since", args.since), ("until", args.until)];
    query.extend(times.into_iter().filter_map(|(key, value)| Some((key, value?.to_string()))));
    let entries: Vec<Value> = client.query("audit", &query).await?;
    match args.output {
        HistoryFormat::Json => output::json(out, &entries)?,
        HistoryFormat::Yaml => output::yaml(out, &entries)?,
        HistoryFormat::Jsonl => {
            // As a log is read: oldest first.
            for entry in entries.iter().rev() {
                writeln!(out, "{entry}")?;
            }
        }
        HistoryFormat::Table => {
            let entries: Vec<AuditEntry> = serde_json::from_value(Value::Array(entries))?;
            write!(out, "{}", table(&entries))?;
        }
    }
    Ok(Verdict::Yes)
}

fn table(entries: &[AuditEntry]) -> String {
    let mut table = Table::new(&["AT", "WHO", "FROM", "WHAT", "ABOUT", "OUTCOME", "TIMES", "REVISION"]);
    for entry in entries {
        let who = if entry.who.is_empty() { "(stranger)" } else { &entry.who };
        let revision = match entry.before == entry.after {
            true => entry.after.to_string(),
            false => format!("{} -> {}", entry.before, entry.after),
        };
        table.row([
            time(entry.at),
            who.to_owned(),
            entry.from.clone(),
            entry.action.clone(),
            entry.subject.clone(),
            entry.outcome.clone(),
            entry.count.to_string(),
            revision,
        ]);
    }
    if table.is_empty() {
        return "Nothing that is remembered fits.\n".to_owned();
    }
    table.render(0)
}
