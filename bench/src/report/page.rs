//! `isthmus-bench report`: puts the last measurements into `docs/benchmarks.md` and its plots.
//!
//! In: the files that `gateway`, `failover`, `raft` and `agents` left. Out: `docs/benchmarks/*.svg`, and what stands between
//! `<!-- begin:NAME -->` and `<!-- end:NAME -->` in the page, written anew. All other words of the page are left alone, and so is
//! the block of a benchmark that was not run.

mod control;
mod failover;
mod gateway;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use super::{
    machine::{self, Machine},
    plot::{self, Plot},
    read,
};

/// Options.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  isthmus-bench report                             from target/bench into docs/
  isthmus-bench report --from /tmp/run --docs /tmp/page")]
pub(crate) struct Args {
    /// Folder with the results.
    #[arg(long, default_value = "target/bench")]
    from: PathBuf,
    /// Folder with benchmarks.md; the plots go to its subfolder `benchmarks`.
    #[arg(long, default_value = "docs")]
    docs: PathBuf,
}

/// Reads, draws, writes.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let page = args.docs.join("benchmarks.md");
    let mut text = fs::read_to_string(&page).with_context(|| format!("read {}", page.display()))?;
    let mut plots = Vec::new();
    let mut blocks = Vec::new();
    if let Some(measured) = read::file(&args.from.join("gateway-raw.json"))? {
        let drawn = plot::gateway(&measured);
        let rows: Vec<read::Row> = read::file(&args.from.join("gateway.json"))?.unwrap_or_default();
        let machine = read::file(&args.from.join(machine::file("gateway")))?;
        blocks.push(("gateway", gateway::block(&measured, &rows, machine.as_ref(), &drawn)));
        plots.extend(drawn);
    }
    if let Some(faults) = read::file::<Vec<read::Fault>>(&args.from.join("failover-raw.json"))? {
        let drawn = plot::failover(&faults);
        let verdicts: Vec<read::Verdict> = read::file(&args.from.join("failover.json"))?.unwrap_or_default();
        let machine = read::file(&args.from.join(machine::file("failover")))?;
        blocks.push(("failover", failover::block(&faults, &verdicts, machine.as_ref(), drawn.as_ref())));
        plots.extend(drawn);
    }
    for (name, draw) in [("raft", plot::raft as fn(&read::Gateway) -> Vec<Plot>), ("agents", plot::agents)] {
        let Some(measured) = read::file(&args.from.join(format!("{name}-raw.json")))? else { continue };
        let drawn = draw(&measured);
        let rows: Vec<read::Row> = read::file(&args.from.join(format!("{name}.json")))?.unwrap_or_default();
        let machine = read::file(&args.from.join(machine::file(name)))?;
        blocks.push((name, control::block(&measured, &rows, machine.as_ref(), &drawn)));
        plots.extend(drawn);
    }
    if blocks.is_empty() {
        bail!(
            "no results in {}: run `isthmus-bench gateway`, `failover`, `raft` or `agents` first",
            args.from.display()
        );
    }
    for (name, block) in &blocks {
        text = replace(&text, name, block).with_context(|| format!("fill in {}", page.display()))?;
    }
    let folder = args.docs.join("benchmarks");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    for Plot { name, svg, .. } in &plots {
        write(&folder.join(format!("{name}.svg")), svg)?;
    }
    write(&page, &text)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    println!("Wrote {}", path.display());
    Ok(())
}

/// The text with another block between the marks.
fn replace(text: &str, name: &str, block: &str) -> anyhow::Result<String> {
    let (begin, end) = (format!("<!-- begin:{name} -->"), format!("<!-- end:{name} -->"));
    let parts = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(&end)?.1)));
    let (before, after) = parts.with_context(|| format!("there is no `{begin}` with an `{end}` after it"))?;
    Ok(format!("{before}{begin}\n\n{}\n\n{end}{after}", block.trim()))
}

/// When, with what and where it was measured.
fn circumstances(machine: Option<&Machine>) -> String {
    let Some(m) = machine else { return "Which machine this was measured on was not recorded.\n".to_owned() };
    let known = |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
    let date = m.began.split('T').next().unwrap_or_default();
    let debug = if m.build == "debug" { " **Debug build: the figures mean nothing.**" } else { "" };
    let rival = match (m.envoy.as_str(), m.etcd.as_str()) {
        ("", "") => String::new(),
        ("", etcd) => format!(" beside etcd {etcd},"),
        (envoy, _) => format!(" beside Envoy {envoy},"),
    };
    format!(
        "Measured on {date} with `isthmus-bench {}`: Isthmus {}, {} build,{rival} on {}, {} cores, {} GiB, Linux {}; TCP \
         congestion control of the machine: {}; largest UDP receive buffer: {} bytes; load average when it began: {}.{debug}\n",
        m.command.join(" "),
        m.isthmus,
        m.build,
        known(&m.cpu),
        m.cores,
        m.memory_gib,
        known(&m.kernel),
        known(&m.congestion_control),
        known(&m.udp_buffer_max),
        known(&m.load),
    )
}

/// A table in Markdown; the first column to the left, the others to the right.
fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let rule: Vec<String> = (0..head.len()).map(|at| if at == 0 { "---" } else { "---:" }.to_owned()).collect();
    let mut out = line(head) + &line(&rule);
    rows.iter().for_each(|row| out += &line(row));
    out
}

fn image(plot: &Plot) -> String {
    format!("![{}](benchmarks/{}.svg)\n", plot.title, plot.name)
}

fn yes_or_no(holds: Option<bool>) -> String {
    match holds {
        Some(true) => "yes",
        Some(false) => "**no**",
        None => "",
    }
    .to_owned()
}

#[cfg(test)]
mod tests;
