//! What was measured: a value for each metric, system and round, with what else the step saw.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::Metric;

/// All of it, metrics in the order of their first value.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Samples {
    pub(crate) metrics: Vec<Measured>,
    /// What a reader of the figures should know: steps that failed, requests that were lost.
    pub(crate) notes: Vec<String>,
}

/// One metric's values.
#[derive(Debug, Serialize)]
pub(crate) struct Measured {
    #[serde(flatten)]
    pub(crate) metric: Metric,
    /// By system, one for each round.
    pub(crate) rounds: BTreeMap<&'static str, Vec<f64>>,
    /// By system, for each round what the step saw beside the value.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) details: BTreeMap<&'static str, Vec<Value>>,
}

impl Samples {
    /// Adds a value.
    pub(crate) fn add(&mut self, metric: &Metric, system: impl Into<&'static str>, value: f64) {
        self.of(metric).rounds.entry(system.into()).or_default().push(value);
    }

    /// Adds a value with what the step saw.
    pub(crate) fn add_with(
        &mut self,
        metric: &Metric,
        system: impl Into<&'static str>,
        value: f64,
        detail: &impl Serialize,
    ) {
        let (measured, system) = (self.of(metric), system.into());
        measured.rounds.entry(system).or_default().push(value);
        measured.details.entry(system).or_default().push(serde_json::to_value(detail).unwrap_or(Value::Null));
    }

    /// Adds a word for the reader.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// The values of a metric by system name.
    pub(crate) fn rounds(&self, metric: &Metric) -> Option<&BTreeMap<&'static str, Vec<f64>>> {
        self.metrics.iter().find(|m| m.metric == *metric).map(|m| &m.rounds)
    }

    fn of(&mut self, metric: &Metric) -> &mut Measured {
        let at = self.metrics.iter().position(|m| m.metric == *metric).unwrap_or_else(|| {
            let (rounds, details) = (BTreeMap::new(), BTreeMap::new());
            self.metrics.push(Measured { metric: metric.clone(), rounds, details });
            self.metrics.len() - 1
        });
        #[expect(clippy::indexing_slicing, reason = "found or pushed right above")]
        &mut self.metrics[at]
    }
}
