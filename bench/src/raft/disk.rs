//! What a flush costs on the disk that both groups write to, without anybody's Raft: the floor under every latency.

use std::{fs::File, io::Write, path::Path, time::Instant};

use anyhow::Context;

use crate::load::histogram::Histogram;

const FLUSHES: usize = 200;
const BLOCK: usize = 4_096;

/// A word on it, for the reader of the figures.
pub(super) fn note(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join("flush-probe");
    let histogram = probe(&path).with_context(|| format!("write {}", path.display()))?;
    std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    let seen = histogram.summary();
    Ok(format!(
        "one fdatasync after {BLOCK} appended bytes takes {:.2} ms on this disk (median; p99 {:.2} ms), before the run",
        seen.p50 / 1e3,
        seen.p99 / 1e3
    ))
}

fn probe(path: &Path) -> std::io::Result<Histogram> {
    let mut file = File::create(path)?;
    let mut histogram = Histogram::default();
    for _ in 0..FLUSHES {
        let began = Instant::now();
        file.write_all(&[b'x'; BLOCK])?;
        file.sync_data()?;
        histogram.record(began.elapsed());
    }
    Ok(histogram)
}
