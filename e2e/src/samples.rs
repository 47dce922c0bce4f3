//! What the load saw: reads the generator's samples and sums up a window of them.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::shop::load::{Kind, Sample};

/// A request is called affected when it failed or took longer than this.
pub const SLOW_MICROS: u64 = 250_000;

/// A stretch of time, Unix milliseconds, with the moment of a fault in it.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "each field is what its name says")]
pub struct Span {
    pub from_ms: u64,
    pub fault_ms: u64,
    pub to_ms: u64,
}

impl Span {
    /// From a fault on.
    pub fn since(fault_ms: u64) -> Self {
        Self { from_ms: fault_ms, fault_ms, to_ms: u64::MAX }
    }

    /// Is `at_ms` in it?
    pub fn contains(self, at_ms: u64) -> bool {
        (self.from_ms..self.to_ms).contains(&at_ms)
    }
}

/// All samples so far, read as the file grows.
pub struct Samples {
    path: PathBuf,
    offset: u64,
    all: Vec<Sample>,
}

/// The sum of a window.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Requests that ended in the window.
    pub requests: usize,
    /// Error text → how often.
    pub failures: BTreeMap<String, usize>,
    /// Cluster → requests it served.
    pub clusters: BTreeMap<String, usize>,
    /// Caller that the callee saw → how often (HTTP only).
    pub callers: BTreeMap<String, usize>,
    /// From the fault to the end of the last affected request, if any was.
    pub last_affected_ms: Option<u64>,
    /// From the first request's end to the last's.
    pub lasted_ms: u64,
    /// Slower than [`SLOW_MICROS`], but served.
    pub slow: usize,
    /// The longest, in milliseconds.
    pub max_ms: u64,
    /// The median, in microseconds.
    pub p50_micros: u64,
    /// The 99th percentile, in microseconds.
    pub p99_micros: u64,
}

impl Samples {
    /// Of the generator that writes to `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), offset: 0, all: vec![] }
    }

    /// Reads what has been added; a last line still being written is left for the next time.
    pub fn refresh(&mut self) -> anyhow::Result<&[Sample]> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(&self.all) };
        file.seek(SeekFrom::Start(self.offset)).context("read samples")?;
        let mut reader = BufReader::new(file);
        let mut line = String::new();
        while reader.read_line(&mut line).context("read samples")? > 0 && line.ends_with('\n') {
            self.offset += line.len() as u64;
            self.all.push(serde_json::from_str(&line).context("a sample is not JSON")?);
            line.clear();
        }
        Ok(&self.all)
    }

    /// Samples of `kind` that started at or after `from_ms` (Unix time).
    pub fn since(&mut self, kind: Kind, from_ms: u64) -> anyhow::Result<impl Iterator<Item = &Sample>> {
        Ok(self.refresh()?.iter().filter(move |s| s.kind == kind && s.start_ms >= from_ms))
    }

    /// The last `n` samples of `kind` (by end of request) that started at or after `from_ms`, newest first.
    pub fn latest(&mut self, kind: Kind, n: usize, from_ms: u64) -> anyhow::Result<Vec<&Sample>> {
        Ok(self.refresh()?.iter().rev().filter(move |s| s.kind == kind && s.start_ms >= from_ms).take(n).collect())
    }

    /// Sums up all of `kinds` that ended within `span`, so that what a fault caught under way counts as that fault's.
    pub fn summary(&mut self, kinds: &[Kind], span: Span) -> anyhow::Result<Summary> {
        let window = self.refresh()?.iter().filter(|s| kinds.contains(&s.kind));
        let mut sum = Summary::default();
        let mut micros = vec![];
        let (mut first, mut last) = (u64::MAX, 0);
        for sample in window.filter(|s| span.contains(s.end_ms())) {
            sum.requests += 1;
            first = first.min(sample.end_ms());
            last = last.max(sample.end_ms());
            micros.push(sample.micros);
            if let Some(error) = &sample.error {
                *sum.failures.entry(error.clone()).or_default() += 1;
            }
            if let Some(cluster) = &sample.cluster {
                *sum.clusters.entry(cluster.clone()).or_default() += 1;
            }
            if let Some(caller) = &sample.caller {
                *sum.callers.entry(caller.clone()).or_default() += 1;
            }
            let slow = sample.micros > SLOW_MICROS;
            sum.slow += usize::from(slow && sample.error.is_none());
            if slow || sample.error.is_some() {
                sum.last_affected_ms = sum.last_affected_ms.max(Some(sample.end_ms().saturating_sub(span.fault_ms)));
            }
        }
        sum.lasted_ms = last.saturating_sub(first);
        micros.sort_unstable();
        let at = |percent: usize| micros.get((micros.len() * percent / 100).min(micros.len().saturating_sub(1)));
        sum.max_ms = micros.last().copied().unwrap_or_default() / 1000;
        sum.p50_micros = at(50).copied().unwrap_or_default();
        sum.p99_micros = at(99).copied().unwrap_or_default();
        Ok(sum)
    }
}

impl Summary {
    /// Requests per second, over the time in which there were any.
    #[allow(clippy::cast_precision_loss, reason = "counts and milliseconds of a few minutes")]
    pub fn per_second(&self) -> f64 {
        self.requests as f64 * 1000.0 / self.lasted_ms.max(1) as f64
    }

    /// How many failed.
    pub fn failed(&self) -> usize {
        self.failures.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn sample(start_ms: u64, micros: u64, error: Option<&str>) -> Sample {
        let cluster = error.is_none().then(|| "us-east".to_owned());
        Sample { kind: Kind::Http, start_ms, micros, cluster, caller: None, error: error.map(str::to_owned) }
    }

    #[test]
    fn a_window_counts_what_started_in_it_and_half_lines_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples");
        let mut file = File::create(&path).unwrap();
        for s in [
            sample(999, 1, None),
            sample(1000, 5_000, None),
            sample(1100, 300_000, None),
            sample(1200, 10_000, Some("boom")),
        ] {
            writeln!(file, "{}", serde_json::to_string(&s).unwrap()).unwrap();
        }
        write!(file, "{{\"kind\":\"http\"").unwrap();
        let sum =
            Samples::new(&path).summary(&[Kind::Http], Span { from_ms: 1000, fault_ms: 1000, to_ms: 2000 }).unwrap();
        assert_eq!((sum.requests, sum.failed(), sum.slow), (3, 1, 1));
        assert_eq!(sum.last_affected_ms, Some(400), "the slow one ended last");
        assert_eq!(sum.clusters["us-east"], 2, "what was under way at the start counts");
    }
}
