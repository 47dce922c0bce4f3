//! The benchmarks' files, read back: what `gateway` and `failover` write is what tables and plots are made from.

use std::{collections::BTreeMap, fs, io::ErrorKind, path::Path};

use anyhow::Context;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use super::{Better, stats};

/// `gateway-raw.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Gateway {
    pub(crate) quick: bool,
    pub(crate) metrics: Vec<Series>,
    pub(crate) notes: Vec<String>,
}

/// One metric's values by system, one for each round.
#[derive(Debug, Deserialize)]
pub(crate) struct Series {
    pub(crate) group: String,
    pub(crate) quantity: String,
    pub(crate) params: BTreeMap<String, Value>,
    pub(crate) unit: String,
    /// `None` where a round measured nothing.
    rounds: BTreeMap<String, Vec<Option<f64>>>,
}

/// One line of `gateway.json`: one of our systems beside its best rival.
#[derive(Debug, Deserialize)]
pub(crate) struct Row {
    pub(crate) group: String,
    pub(crate) metric: String,
    pub(crate) unit: String,
    pub(crate) better: Better,
    pub(crate) ours_name: String,
    pub(crate) rival_name: Option<String>,
    pub(crate) ratio: Option<f64>,
    pub(crate) goal: Option<f64>,
    pub(crate) holds: Option<bool>,
    pub(crate) systems: BTreeMap<String, f64>,
}

/// One entry of `failover-raw.json`: one fault, one system, one round.
#[derive(Debug, Deserialize)]
pub(crate) struct Fault {
    pub(crate) round: u32,
    pub(crate) system: String,
    pub(crate) fault: String,
    pub(crate) scope: String,
    pub(crate) failed: u64,
    pub(crate) slow: u64,
    pub(crate) last_affected_ms: u64,
    pub(crate) settled: bool,
    pub(crate) timeline: Vec<Slot>,
}

/// Requests that were due in 100 ms of a time line.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Slot {
    /// From the fault.
    pub(crate) at_ms: i64,
    pub(crate) failed: u64,
    /// The longest.
    pub(crate) max_ms: u64,
}

/// One line of `failover.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) metric: String,
    pub(crate) goal: Option<String>,
    pub(crate) holds: Option<bool>,
}

impl Series {
    /// Why there is no median of a system.
    pub(crate) fn absence(&self, system: &str) -> &'static str {
        if self.rounds.contains_key(system) { "failed" } else { "–" }
    }

    /// Of all rounds; `None` if one of them measured nothing.
    pub(crate) fn median(&self, system: &str) -> Option<f64> {
        stats::median(&self.values(system)?)
    }

    /// The lowest and the highest of the rounds.
    pub(crate) fn span(&self, system: &str) -> Option<(f64, f64)> {
        let values = self.values(system)?;
        let low = values.iter().copied().reduce(f64::min)?;
        Some((low, values.iter().copied().reduce(f64::max)?))
    }

    /// How many rounds there were.
    pub(crate) fn rounds(&self) -> usize {
        self.rounds.values().map(Vec::len).max().unwrap_or_default()
    }

    /// Those that have values.
    pub(crate) fn systems(&self) -> impl Iterator<Item = &str> {
        self.rounds.keys().map(String::as_str)
    }

    fn values(&self, system: &str) -> Option<Vec<f64>> {
        self.rounds.get(system)?.iter().copied().collect()
    }
}

/// Reads a file; `None` if it is not there.
pub(crate) fn file<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let read = serde_json::from_str(&text);
    read.map(Some).with_context(|| format!("understand {} (written by another version? measure again)", path.display()))
}
