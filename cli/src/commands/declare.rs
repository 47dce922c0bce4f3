//! `isthmusctl apply`, `delete` and `diff -f`: what operators declare, in files.

use std::{
    fmt::Write as _,
    io::{Read as _, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde_json::Value;
use similar::{ChangeTag, TextDiff};

use super::rough_list;
use crate::{
    Verdict,
    args::{ApplyArgs, DeleteArgs},
    client::Client,
    shapes::{ApplyAnswer, ApplyFile, ApplyRequest, ApplyResult},
};

/// Of all files together, as the control plane takes them.
const MAX_BYTES: u64 = 4 << 20;

pub(super) async fn apply(client: &Client, args: ApplyArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let request = ApplyRequest { files: read(&args.files)?, dry_run: args.dry_run, delete: false };
    report(&client.post("apply", &request).await?, out)
}

pub(super) async fn delete(client: &Client, args: DeleteArgs, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let answer: ApplyAnswer = match (&args.kind, &args.name) {
        (Some(kind), Some(name)) => {
            if !kind.is_declared() {
                bail!("{} are not declared, so they cannot be deleted; {}", kind.path(), kind.instead());
            }
            client.delete(&format!("resources/{}/{name}", kind.path())).await?
        }
        _ => {
            let request = ApplyRequest { files: read(&args.files)?, dry_run: args.dry_run, delete: true };
            client.post("apply", &request).await?
        }
    };
    report(&answer, out)
}

/// What applying the files would change: exit code 1 if anything.
pub(super) async fn diff(client: &Client, files: &[PathBuf], out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let request = ApplyRequest { files: read(files)?, dry_run: true, delete: false };
    let answer: ApplyAnswer = client.post("apply", &request).await?;
    let text: String = answer.results.iter().map(difference).collect::<anyhow::Result<_>>()?;
    write!(out, "{text}")?;
    if text.is_empty() {
        eprintln!("No difference.");
        return Ok(Verdict::Yes);
    }
    Ok(Verdict::No)
}

fn report(answer: &ApplyAnswer, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    for result in &answer.results {
        let dry = if answer.dry_run { " (dry run: nothing was changed)" } else { "" };
        writeln!(out, "{}/{} {}{dry}", result.kind, result.name, result.outcome)?;
    }
    if !answer.dry_run && answer.results.iter().any(|result| result.outcome != "unchanged") {
        eprintln!(
            "In force as revision {}; `isthmusctl wait` tells when every connected consumer has it.",
            answer.stamp
        );
    }
    Ok(Verdict::Yes)
}

/// The object as YAML, before and after, line by line; empty if they are the same.
pub(super) fn difference(result: &ApplyResult) -> anyhow::Result<String> {
    let yaml = |object: &Option<Value>| match object {
        Some(object) => serde_saphyr::to_string(object).context("write YAML"),
        None => Ok(String::new()),
    };
    let (before, after) = (yaml(&result.before)?, yaml(&result.after)?);
    let mut text = String::new();
    if before == after {
        return Ok(text);
    }
    writeln!(text, "--- {}/{} as it is\n+++ {}/{} as it would be", result.kind, result.name, result.kind, result.name)?;
    for change in TextDiff::from_lines(&before, &after).iter_all_changes() {
        let sign = match change.tag() {
            ChangeTag::Delete => '-',
            ChangeTag::Insert => '+',
            ChangeTag::Equal => ' ',
        };
        writeln!(text, "{sign}{}", change.value().trim_end_matches('\n'))?;
    }
    Ok(text)
}

/// All files, folders' files with them; "-" is the standard input.
fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<ApplyFile>> {
    let mut files = Vec::new();
    let mut total = 0;
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().take(MAX_BYTES + 1).read_to_string(&mut text).context("read the standard input")?;
            files.push(ApplyFile { name: "(standard input)".to_owned(), text });
        } else if path.is_dir() {
            for file in manifests(path)? {
                files.push(read_file(&file)?);
            }
        } else {
            files.push(read_file(path)?);
        }
        total = files.iter().map(|file| file.text.len() as u64).sum();
        if total > MAX_BYTES {
            bail!("the files hold more than {MAX_BYTES} bytes, which one request may not; apply them in parts");
        }
    }
    if total == 0 {
        bail!("there is nothing to read in {}", rough_list(paths.iter().map(|path| path.display().to_string())));
    }
    Ok(files)
}

fn read_file(path: &Path) -> anyhow::Result<ApplyFile> {
    let at = || format!("read {}", path.display());
    let length = std::fs::metadata(path).with_context(at)?.len();
    if length > MAX_BYTES {
        bail!("{} has {length} bytes; at most {MAX_BYTES} can be applied at once", path.display());
    }
    Ok(ApplyFile { name: path.display().to_string(), text: std::fs::read_to_string(path).with_context(at)? })
}

fn manifests(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("read the folder {}", folder.display()))?;
    let paths: Result<Vec<PathBuf>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let is_manifest = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        path.is_file() && matches!(extension, Some("yaml" | "yml" | "json"))
    };
    let mut paths: Vec<PathBuf> = paths?.into_iter().filter(is_manifest).collect();
    if paths.is_empty() {
        bail!("there is no .yaml, .yml or .json file in {}", folder.display());
    }
    paths.sort();
    Ok(paths)
}
