//! Files for programs: rows and raw values, as JSON.

use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// Writes `what` to `path`, and the folder if need be.
pub(crate) fn write(path: &Path, what: &impl Serialize) -> anyhow::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let mut text = serde_json::to_string_pretty(what).context("write JSON")?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
