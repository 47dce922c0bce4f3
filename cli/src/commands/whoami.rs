//! `isthmusctl whoami`: as whom one is seen.

use std::io::Write;

use serde_json::Value;

use crate::{Verdict, args::Format, client::Client, output, shapes::WhoAmI};

pub(super) async fn run(client: &Client, format: Format, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let raw: Value = client.get("whoami").await?;
    match format {
        Format::Json => output::json(out, &raw)?,
        Format::Yaml => output::yaml(out, &raw)?,
        Format::Table => write!(out, "{}", lines(&serde_json::from_value(raw)?))?,
    }
    Ok(Verdict::Yes)
}

fn lines(me: &WhoAmI) -> String {
    let mut text = format!("{} ({})\n", me.who, me.kind);
    if !me.groups.is_empty() {
        text.push_str(&format!("groups: {}\n", me.groups.join(", ")));
    }
    for held in &me.roles {
        let place =
            if held.namespaces.iter().any(|n| n == "*") { "everywhere".to_owned() } else { held.namespaces.join(", ") };
        text.push_str(&format!("{}: {place}\n", held.role));
    }
    if me.root {
        text.push_str("admin: the control plane's own administrator, whatever the bindings say\n");
    } else if me.roles.is_empty() {
        text.push_str("no role: an administrator can give one, with `isthmusctl role-binding set`\n");
    }
    text
}
