//! `isthmusctl backup` and `restore`: the control plane's whole state as one file.

use std::{
    fs::{self, File},
    io::{BufRead as _, IsTerminal as _, Write},
    path::Path,
};

use anyhow::{Context as _, bail};

use crate::{Verdict, client::Client, shapes::Restored};

pub(super) async fn take(client: &Client, file: &Path) -> anyhow::Result<Verdict> {
    if file.exists() {
        bail!("{} exists; a backup replaces no file: name another one", file.display());
    }
    let bytes = client.download("backup").await?;
    write(file, &bytes).with_context(|| format!("write {}", file.display()))?;
    eprintln!("{}: {} bytes. `head -2` of it says what it is of.", file.display(), bytes.len());
    Ok(Verdict::Yes)
}

/// On disk whole, or not at all.
fn write(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = file.with_file_name(name);
    let mut out = File::create(&part)?;
    out.write_all(bytes)?;
    out.sync_all()?;
    fs::rename(&part, file)
}

pub(super) async fn restore(client: &Client, file: &Path, yes: bool, out: &mut dyn Write) -> anyhow::Result<Verdict> {
    let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    if !yes && !confirmed(client)? {
        eprintln!("Nothing was changed.");
        return Ok(Verdict::No);
    }
    let restored: Restored = client.upload("restore", bytes).await?;
    writeln!(
        out,
        "revision {} restored as {}: {} clusters, {} services",
        restored.of, restored.stamp, restored.clusters, restored.services
    )?;
    if restored.same_authority {
        eprintln!("The CAs are those of then: the clusters' agents come back by themselves.");
    } else {
        eprintln!(
            "The CAs are new, so no cluster knows this control plane: each must join again with a token of its own \
             (`isthmusctl cluster join-token NAME`). Until then its traffic goes on as it is."
        );
    }
    Ok(Verdict::Yes)
}

fn confirmed(client: &Client) -> anyhow::Result<bool> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        bail!("say --yes if there is nobody to ask");
    }
    eprint!("Put the backup's state into the control plane at {}? Type yes to go on: ", client.server());
    let mut line = String::new();
    stdin.lock().read_line(&mut line)?;
    Ok(line.trim() == "yes")
}
