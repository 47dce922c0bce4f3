//! `isthmusctl token`: API tokens, for programs that have no certificate.

use std::io::Write;

use serde_json::Value;

use super::history::time;
use crate::{
    Verdict,
    args::{Format, TokenCommand},
    client::Client,
    output,
    shapes::{ApiToken, Deleted, TokenRequest, TokenResponse},
    table::Table,
};

pub(super) async fn run(client: &Client, command: TokenCommand, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    match command {
        TokenCommand::Create { name, ttl } => {
            let request = TokenRequest { ttl_seconds: ttl.as_secs(), grant: None };
            let minted: TokenResponse = client.post(&format!("tokens/{name}"), &request).await?;
            writeln!(out, "{}", minted.token)?;
            eprintln!(
                "Good for {}, and shown this once: put it into the file that `tokenFile` in a context names. It can do \
                 nothing until a role binding names it: isthmusctl role-binding set NAME --role ROLE --token {name}",
                humantime::format_duration(ttl)
            );
        }
        TokenCommand::List(args) => {
            let raw: Value = client.get("tokens").await?;
            match args.output {
                Format::Json => output::json(out, &raw)?,
                Format::Yaml => output::yaml(out, &raw)?,
                Format::Table => write!(out, "{}", list(&serde_json::from_value::<Vec<ApiToken>>(raw)?))?,
            }
        }
        TokenCommand::Delete { name } => {
            let deleted: Deleted = client.delete(&format!("tokens/{name}")).await?;
            writeln!(out, "{} deleted", deleted.deleted)?;
        }
    }
    Ok(Verdict::Yes)
}

fn list(tokens: &[ApiToken]) -> String {
    let mut table = Table::new(&["NAME", "CREATED", "EXPIRES"]);
    for token in tokens {
        let expires = time(token.expires_at) + if token.expired { " (expired)" } else { "" };
        table.row([token.name.clone(), time(token.created_at), expires]);
    }
    if table.is_empty() {
        return "There is no API token. `isthmusctl token create NAME` mints one.\n".to_owned();
    }
    table.render(0)
}
