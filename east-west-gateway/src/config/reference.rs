//! Holds docs/gateway-configuration.md and the program together: keys, defaults, metrics, words.

use std::{collections::BTreeSet, path::Path};

use super::tests::{MINIMAL, load};

fn page() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/gateway-configuration.md")).unwrap()
}

fn source(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file)).unwrap()
}

/// What stands between `open` and `close`, every time.
fn between<'a>(text: &'a str, open: &str, close: char) -> Vec<&'a str> {
    text.split(open).skip(1).filter_map(|rest| rest.split(close).next()).collect()
}

/// The keys below `section`, as the refusal of an unknown one lists them; `None` if it is no section.
fn keys(section: &[String]) -> Option<Vec<String>> {
    // Through the environment, so that a section that the minimal file has is added to.
    let variable =
        ["ISTHMUS".to_owned()].iter().chain(section).cloned().chain(["unheardOf".to_owned()]).collect::<Vec<_>>();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gateway.yaml");
    std::fs::write(&path, MINIMAL).unwrap();
    let env = [(variable.join("__").into(), "1".into())];
    let error = isthmus_runtime::config::load_with_env::<super::Config>(&path, "ISTHMUS", env).unwrap_err();
    let error = isthmus_runtime::tasks::chain(&error);
    let (_, expected) = error.split_once("unknown field `unheardOf`; expected ")?;
    Some(expected.lines().next()?.split('`').skip(1).step_by(2).map(str::to_owned).collect())
}

/// All keys, with their sections.
fn all_keys() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut sections = vec![Vec::new()];
    while let Some(section) = sections.pop() {
        for key in keys(&section).unwrap_or_default() {
            let path: Vec<String> = section.iter().cloned().chain([key]).collect();
            if keys(&path).is_some() {
                sections.push(path);
            } else {
                found.insert(path.join("."));
            }
        }
    }
    found
}

/// The rows about keys: key and default.
fn documented(page: &str) -> Vec<(String, String)> {
    let (tables, _) = page.split_once("\n## The access log").unwrap();
    let rows = tables.lines().filter(|line| line.starts_with("| `"));
    let cells =
        rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).map(str::to_owned).collect::<Vec<_>>());
    cells.map(|cells| (cells[0].trim_matches('`').to_owned(), cells[2].clone())).collect()
}

#[test]
fn every_key_is_documented_and_every_documented_key_exists() {
    let keys = all_keys();
    assert!(keys.contains("tunnel.tcp.userTimeout") && keys.contains("name"), "{keys:?}");
    let documented: BTreeSet<String> = documented(&page()).into_iter().map(|(key, _)| key).collect();
    assert_eq!(documented, keys);
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let mut text = MINIMAL.to_owned();
    let mut sections: std::collections::BTreeMap<String, Vec<(String, String)>> = Default::default();
    for (key, default) in documented(&page()) {
        let Some(value) = default.strip_prefix('`').and_then(|rest| rest.strip_suffix('`')) else { continue };
        let (section, key) = key.rsplit_once('.').unwrap_or(("", &key));
        sections.entry(section.to_owned()).or_default().push((key.to_owned(), value.to_owned()));
    }
    assert!(sections.len() >= 9, "{sections:?}");
    // In the flow style, so that a section within a section needs no care.
    let flow = |entries: &[(String, String)]| {
        entries.iter().map(|(key, value)| format!("{key}: {value}")).collect::<Vec<_>>().join(", ")
    };
    for nested in ["tunnel.tcp", "telemetry.log"] {
        let (section, key) = nested.split_once('.').unwrap();
        let inner = format!("{{ {} }}", flow(&sections.remove(nested).unwrap()));
        sections.entry(section.to_owned()).or_default().push((key.to_owned(), inner));
    }
    for (section, entries) in &sections {
        match section.as_str() {
            "" => entries.iter().for_each(|(key, value)| text.push_str(&format!("{key}: {value}\n"))),
            _ => text.push_str(&format!("{section}: {{ {} }}\n", flow(entries))),
        }
    }
    assert_eq!(format!("{:?}", load(&text).unwrap()), format!("{:?}", load(MINIMAL).unwrap()), "{text}");
}

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let text = source("metrics.rs");
    let registered: BTreeSet<&str> =
        between(&text, "\"isthmus_gateway_", '"').into_iter().filter(|name| !name.is_empty()).collect();
    assert!(registered.len() > 15, "{registered:?}");
    let page = page();
    let (_, table) = page.split_once("\n## Metrics").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let listed = between(table, "`isthmus_gateway_", '`').into_iter();
    let listed: BTreeSet<&str> = listed.map(|name| name.strip_suffix("_total").unwrap_or(name)).collect();
    assert_eq!(listed, registered);
}

#[test]
fn every_word_of_the_access_log_and_of_rejects_is_documented() {
    let mut words = BTreeSet::new();
    let word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    for file in [
        "choose.rs",
        "egress/endpoint.rs",
        "egress/mod.rs",
        "hello/mod.rs",
        "ingress/connection.rs",
        "ingress/mod.rs",
        "ingress/place.rs",
        "overload/mod.rs",
        "serve.rs",
        "splice/mod.rs",
        "tunnel/accept.rs",
        "tunnel/link/tcp/accept.rs",
        "tunnel/mod.rs",
    ] {
        let text = source(file);
        let text = text.split("#[cfg(test)]").next().unwrap();
        for open in [
            "=> \"",
            "reject(\"",
            "reject_counter(\"",
            "Failed::new(\"",
            "access.failed(\"",
            "=> (\"",
            ", None, \"",
            "\", \"",
        ] {
            words.extend(between(text, open, '"').into_iter().filter(|text| word(text)).map(str::to_owned));
        }
    }
    for known in ["finished", "silent", "quic_garbage", "tcp_no_link", "rejected_timeout", "peer_dead", "abandoned"] {
        assert!(words.contains(known), "{known} in {words:?}");
    }
    // A drained link is no reject; the others are heads of their own.
    let page = page();
    let missing: Vec<&String> =
        words.iter().filter(|word| word.as_str() != "drained" && !page.contains(&format!("`{word}`"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
