//! Printing values: JSON as it came, or the same as YAML.

use std::io::Write;

use anyhow::Context as _;
use serde::Serialize;

/// JSON, indented.
pub(crate) fn json(out: &mut dyn Write, value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("write JSON")?;
    Ok(writeln!(out, "{text}")?)
}

/// YAML, one document.
pub(crate) fn yaml(out: &mut dyn Write, value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_saphyr::to_string(value).context("write YAML")?;
    Ok(write!(out, "{text}{}", if text.ends_with('\n') { "" } else { "\n" })?)
}

/// YAML, a document for each.
pub(crate) fn yaml_documents(out: &mut dyn Write, values: &[serde_json::Value]) -> anyhow::Result<()> {
    for (i, value) in values.iter().enumerate() {
        if i > 0 {
            writeln!(out, "---")?;
        }
        yaml(out, value)?;
    }
    Ok(())
}

/// The reader of our output has gone.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|e| e.downcast_ref::<std::io::Error>());
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
