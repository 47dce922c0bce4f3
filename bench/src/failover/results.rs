//! From findings to medians, the closing table and the files.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    fault::{Fault, Scope},
    impact::Impact,
};

/// Goal for the last affected request of a blackhole.
const BLACKHOLE_MS: u64 = 1_000;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Entry {
    pub(super) round: u32,
    pub(super) system: String,
    pub(super) fault: Fault,
    pub(super) scope: Scope,
    pub(super) victims: Vec<String>,
    #[serde(flatten)]
    pub(super) impact: Impact,
}

/// All measurements.
#[derive(Debug, Default)]
pub(super) struct Results {
    entries: Vec<Entry>,
}

/// Medians over the rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sum {
    failed: usize,
    slow: usize,
    last_ms: u64,
    /// Of the rounds.
    most_failed: usize,
    settled: bool,
}

impl Results {
    pub(super) fn add(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Writes every measurement with its time line.
    pub(super) fn write_raw(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string(&self.entries).context("write JSON")?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    /// Writes the metrics, ours beside `rival`'s.
    pub(super) fn write(&self, path: &Path, rival: &str) -> anyhow::Result<()> {
        let metrics: Vec<Value> = self.cases().into_iter().flat_map(|case| self.metrics(case, rival)).collect();
        let text = serde_json::to_string_pretty(&metrics).context("write JSON")?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
    }

    /// Whether the goals held, in a sentence. Where none was judged, none held.
    pub(super) fn conclusion(&self) -> &'static str {
        let verdicts: Vec<bool> = self.cases().into_iter().filter_map(|case| Some(self.verdict(case)?.1)).collect();
        match verdicts.as_slice() {
            [] => "No goal was judged: none was set for what was measured.",
            all if all.iter().all(|held| *held) => "Every goal held.",
            _ => "Not every goal held.",
        }
    }

    /// The closing table; `rivals` are its further columns, the first one gives the ratio.
    pub(super) fn table(&self, rivals: &[&str]) -> String {
        let mut head = vec!["fault".to_owned(), "of a".to_owned()];
        head.extend(std::iter::once(&"ours").chain(rivals).map(|name| format!("{name}: failed / slow / last")));
        head.extend(["ratio of last", "goal", "held"].map(str::to_owned));
        let mut lines = vec![head];
        for case in self.cases() {
            let (fault, scope) = case;
            let mut line = vec![fault.name().to_owned(), scope.name().to_owned()];
            for system in std::iter::once(&"ours").chain(rivals) {
                line.push(self.sum(system, case).map_or_else(|| "–".to_owned(), |s| s.text()));
            }
            let first = rivals.first().and_then(|rival| self.sum(rival, case));
            line.push(match (self.sum("ours", case), first) {
                (Some(ours), Some(rival)) => ratio(ours.last_ms, rival.last_ms)
                    .map_or_else(|| "–".to_owned(), |r| format!("{}{r:.3}", if rival.settled { "" } else { "≤ " })),
                _ => "–".to_owned(),
            });
            let (goal, held) =
                self.verdict(case).map_or(("report", "–"), |(goal, h)| (goal, if h { "yes" } else { "NO" }));
            line.extend([goal.to_owned(), held.to_owned()]);
            lines.push(line);
        }
        layout(&lines)
    }

    /// Why requests failed, most frequent first.
    pub(super) fn reasons(&self) -> String {
        let mut text = String::new();
        for e in self.entries.iter().filter(|e| e.impact.failed > 0) {
            text += &format!("{} {} of {}, round {}:\n", e.system, e.fault.name(), e.scope.name(), e.round);
            let mut reasons: Vec<_> = e.impact.reasons.iter().collect();
            reasons.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
            for (reason, n) in reasons {
                text += &format!("  {n:>6} × {reason}\n");
            }
        }
        text
    }

    fn cases(&self) -> Vec<(Fault, Scope)> {
        let all: BTreeMap<(Fault, Scope), ()> = self.entries.iter().map(|e| ((e.fault, e.scope), ())).collect();
        all.into_keys().collect()
    }

    fn sum(&self, system: &str, case: (Fault, Scope)) -> Option<Sum> {
        let of = |e: &&Entry| e.system == system && (e.fault, e.scope) == case;
        let impacts: Vec<&Impact> = self.entries.iter().filter(of).map(|e| &e.impact).collect();
        Some(Sum {
            failed: median(impacts.iter().map(|i| i.failed))?,
            slow: median(impacts.iter().map(|i| i.slow))?,
            last_ms: median(impacts.iter().map(|i| i.last_affected_ms))?,
            most_failed: impacts.iter().map(|i| i.failed).max()?,
            settled: impacts.iter().all(|i| i.settled),
        })
    }

    /// Our goal for the case, if there is one, and whether it held. No round may fail a request where none is to fail.
    fn verdict(&self, case: (Fault, Scope)) -> Option<(&'static str, bool)> {
        let ours = self.sum("ours", case)?;
        match case.0 {
            Fault::Kill | Fault::Drain => Some(("0 failed", ours.most_failed == 0)),
            Fault::Blackhole => Some(("last ≤ 1 s", ours.settled && ours.last_ms <= BLACKHOLE_MS)),
            Fault::Stop => None,
        }
    }

    fn metrics(&self, case: (Fault, Scope), rival: &str) -> Vec<Value> {
        let Some(ours) = self.sum("ours", case) else { return vec![] };
        let theirs = self.sum(rival, case);
        let name = |what| format!("failover.{}.{}.{what}", case.0.name(), case.1.name());
        let verdict = self.verdict(case);
        let as_u64 = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let counts = case.0 != Fault::Blackhole;
        let line = |what, unit, ours: u64, theirs: Option<u64>, is_goal: bool| {
            let verdict = verdict.filter(|_| is_goal);
            json!({
                "metric": name(what), "unit": unit, "ours": ours, "rival": theirs, "rival_name": rival,
                "ratio": theirs.and_then(|t| ratio(ours, t)),
                "goal": verdict.map(|(goal, _)| goal), "holds": verdict.map(|(_, held)| held),
            })
        };
        vec![
            line("failed", "requests", as_u64(ours.failed), theirs.map(|t| as_u64(t.failed)), counts),
            line("slow", "requests", as_u64(ours.slow), theirs.map(|t| as_u64(t.slow)), false),
            line("last_affected_ms", "ms", ours.last_ms, theirs.map(|t| t.last_ms), !counts),
        ]
    }
}

impl Sum {
    fn text(self) -> String {
        let Self { failed, slow, last_ms, most_failed, settled } = self;
        let worst = if most_failed > failed { format!(" (worst {most_failed})") } else { String::new() };
        let last = match (last_ms, settled) {
            (0, true) => "none".to_owned(),
            (ms, true) => format!("{ms} ms"),
            (ms, false) => format!("≥ {ms} ms"),
        };
        format!("{failed}{worst} / {slow} / {last}")
    }
}

/// Ours over theirs; none where theirs is nothing.
#[expect(clippy::cast_precision_loss, reason = "milliseconds and counts of a few minutes")]
fn ratio(ours: u64, theirs: u64) -> Option<f64> {
    (theirs > 0).then(|| ours as f64 / theirs as f64)
}

/// The lower one of two.
fn median<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut values: Vec<T> = values.collect();
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied()
}

fn layout(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let width =
        |i: usize| lines.iter().filter_map(|line| line.get(i)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let rule: Vec<String> = widths.iter().map(|w| "─".repeat(w + 2)).collect();
    let mut text = String::new();
    for (n, line) in lines.iter().enumerate() {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, w)| format!(" {cell:<w$} ")).collect();
        text += cells.join("│").trim_end();
        text.push('\n');
        if n == 0 {
            text += &rule.join("┼");
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::super::load::{Outcome, Sample};
    use super::*;

    fn entry(system: &str, fault: Fault, failed: usize, took_ms: u64) -> Entry {
        let now = Instant::now();
        let sample = |outcome| Sample { due: now, took: Duration::from_millis(took_ms), outcome };
        let mut samples = vec![sample(Outcome::Served("b".to_owned()))];
        samples.extend((0..failed).map(|_| sample(Outcome::Failed("503".to_owned()))));
        let impact = Impact::of(&samples, now, true);
        Entry { round: 1, system: system.to_owned(), fault, scope: Scope::Gateway, victims: vec![], impact }
    }

    #[test]
    fn one_failed_request_in_one_round_fails_the_goal_that_none_does() {
        let mut results = Results::default();
        for failed in [0, 0, 1] {
            results.add(entry("ours", Fault::Kill, failed, 10));
        }
        assert_eq!(results.verdict((Fault::Kill, Scope::Gateway)), Some(("0 failed", false)));
        assert_eq!(results.conclusion(), "Not every goal held.");
        assert!(results.table(&[]).contains("0 (worst 1)"), "{}", results.table(&[]));
    }

    #[test]
    fn what_was_not_measured_did_not_hold() {
        let mut results = Results::default();
        assert!(results.conclusion().starts_with("No goal was judged"));
        results.add(entry("ours", Fault::Stop, 0, 10));
        assert!(results.conclusion().starts_with("No goal was judged"), "there is none for it");
        results.add(entry("ours", Fault::Kill, 0, 10));
        assert_eq!(results.conclusion(), "Every goal held.");
    }

    #[test]
    fn a_blackhole_is_judged_by_the_median_of_the_last_affected_and_compared() {
        let mut results = Results::default();
        for took in [300, 900, 1400] {
            results.add(entry("ours", Fault::Blackhole, 0, took));
            results.add(entry("istio", Fault::Blackhole, 1, 10 * took));
        }
        let case = (Fault::Blackhole, Scope::Gateway);
        assert_eq!(results.verdict(case), Some(("last ≤ 1 s", true)));
        let metrics = results.metrics(case, "istio");
        let last = metrics.last().unwrap();
        assert_eq!(last["metric"], "failover.blackhole.gateway.last_affected_ms");
        assert_eq!((&last["ours"], &last["rival"], &last["ratio"]), (&json!(900), &json!(9000), &json!(0.1)));
        results.add(entry("ours", Fault::Blackhole, 0, 2000));
        results.add(entry("ours", Fault::Blackhole, 0, 2000));
        assert_eq!(results.verdict(case), Some(("last ≤ 1 s", false)));
    }
}
