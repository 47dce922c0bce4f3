//! What is done with measurements: medians, comparison with the best rival, goals, a table to look at, JSON, plots.
//!
//! In: a [`Metric`] with each system's values, one for each round. Out: a [`Row`] for each of our systems ([`json`]) and a line of
//! the closing table for each metric ([`table`]). Judged is the ratio of medians, ours to the best of the rivals that give the
//! same protection.

pub(crate) mod json;
pub(crate) mod machine;
pub(crate) mod page;
mod plot;
mod read;
pub(crate) mod samples;
pub(crate) mod stats;
pub(crate) mod table;

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

pub(crate) use self::stats::Better;

/// What is measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Metric {
    /// Metrics that are shown together.
    pub(crate) group: &'static str,
    /// For example "throughput, server to client".
    pub(crate) quantity: String,
    /// Under which circumstances, for example `streams: 8`.
    pub(crate) params: BTreeMap<&'static str, Value>,
    /// Of the values.
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    /// At most one for each of our systems.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) goals: Vec<Goal>,
}

/// What one of our systems should reach.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Goal {
    pub(crate) ours: &'static str,
    /// The best of these counts. None: there is no rival, and the value itself is judged.
    pub(crate) rivals: &'static [&'static str],
    /// The ratio, ours to the rival's, that must be kept to; without a rival the value, in the metric's unit.
    pub(crate) limit: f64,
}

/// One of our systems beside its best rival.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) group: &'static str,
    /// Quantity and circumstances in words.
    pub(crate) metric: String,
    pub(crate) params: BTreeMap<&'static str, Value>,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    pub(crate) ours: Option<f64>,
    pub(crate) ours_name: &'static str,
    pub(crate) rival: Option<f64>,
    pub(crate) rival_name: Option<String>,
    pub(crate) ratio: Option<f64>,
    /// Of the ratio; of the value, where there is no rival.
    pub(crate) goal: Option<f64>,
    /// `null` without a goal; a goal that could not be measured does not hold.
    pub(crate) holds: Option<bool>,
    /// Every system's median, for information.
    pub(crate) systems: BTreeMap<String, f64>,
    /// Of each.
    pub(crate) rounds: usize,
}

/// Who is compared with whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contest {
    /// Ours, in the order of the table.
    pub(crate) ours: &'static [&'static str],
    /// Those that give the same protection.
    pub(crate) rivals: &'static [&'static str],
}

impl Metric {
    /// Quantity and circumstances in words.
    pub(crate) fn name(&self) -> String {
        let params = self.params.iter().map(|(name, value)| match (*name, value) {
            ("loss", value) => format!("{} % loss", value.as_f64().unwrap_or_default()),
            ("rtt_ms", value) => format!("{value} ms"),
            (name, Value::Number(one)) if one.as_u64() == Some(1) => format!("1 {}", name.trim_end_matches('s')),
            (name, value) => format!("{} {name}", grouped(value)),
        });
        std::iter::once(self.quantity.clone()).chain(params).collect::<Vec<_>>().join(", ")
    }

    /// One row for each of our systems that was measured, or has a goal.
    pub(crate) fn rows(&self, contest: Contest, rounds: &BTreeMap<&'static str, Vec<f64>>) -> Vec<Row> {
        let medians: BTreeMap<&str, f64> =
            rounds.iter().filter_map(|(system, values)| Some((*system, stats::median(values)?))).collect();
        let row = |ours_name: &'static str| {
            let goal = self.goals.iter().find(|goal| goal.ours == ours_name);
            let ours = medians.get(ours_name).copied();
            if ours.is_none() && (goal.is_none() || !rounds.contains_key(ours_name)) {
                return None;
            }
            let rivals = goal.map_or(contest.rivals, |goal| goal.rivals);
            let known = rivals.iter().filter_map(|name| Some((*name, *medians.get(name)?)));
            let rival = self.better.best(known);
            let ratio = ours.zip(rival).map(|(ours, (_, rival))| ours / rival).filter(|ratio| ratio.is_finite());
            let judge = |goal: &Goal| {
                let judged = if goal.rivals.is_empty() { ours } else { ratio };
                judged.is_some_and(|value| self.better.holds(value, goal.limit))
            };
            Some(Row {
                group: self.group,
                metric: self.name(),
                params: self.params.clone(),
                unit: self.unit,
                better: self.better,
                ours,
                ours_name,
                rival: rival.map(|(_, value)| value),
                rival_name: rival.map(|(name, _)| name.to_owned()),
                ratio,
                goal: goal.map(|goal| goal.limit),
                holds: goal.map(judge),
                systems: medians.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
                rounds: rounds.values().map(Vec::len).max().unwrap_or_default(),
            })
        };
        contest.ours.iter().filter_map(|name| row(name)).collect()
    }
}

/// Says how many goals held.
pub(crate) fn print_goals(rows: &[Row]) {
    let judged = rows.iter().filter(|row| row.holds.is_some()).count();
    let held = rows.iter().filter(|row| row.holds == Some(true)).count();
    if judged == 0 {
        println!("\nNo goal was judged: that takes ours and a rival of the same protection.");
    } else {
        println!("\n{held} of {judged} goals held.");
    }
}

/// Thousands apart.
fn grouped(value: &Value) -> String {
    let text = value.to_string();
    match value.as_u64() {
        Some(number) if number >= 1_000 => format!("{},{:03}", number / 1_000, number % 1_000),
        _ => text.trim_matches('"').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEST: Contest = Contest { ours: &["ours-quic", "ours-tcp"], rivals: &["envoy-h2", "envoy-h3"] };

    fn metric(better: Better, goals: Vec<Goal>) -> Metric {
        let params = [("streams", 8.into())].into();
        Metric { group: "bulk", quantity: "throughput".to_owned(), params, unit: "Gbit/s", better, goals }
    }

    fn rounds() -> BTreeMap<&'static str, Vec<f64>> {
        [
            ("raw", vec![40.0, 41.0, 39.0]),
            ("envoy-sni", vec![20.0, 20.0, 20.0]),
            ("envoy-h2", vec![4.0, 5.0, 9.0]),
            ("envoy-h3", vec![2.0, 2.0, 2.0]),
            ("ours-quic", vec![3.0, 3.0, 30.0]),
            ("ours-tcp", vec![10.0, 10.0, 10.0]),
        ]
        .into()
    }

    #[test]
    fn without_a_goal_the_best_protected_rival_counts_and_nothing_is_judged() {
        let rows = metric(Better::Higher, vec![]).rows(CONTEST, &rounds());
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].rival_name.as_deref(), rows[0].ratio), (Some("envoy-h2"), Some(0.6)));
        assert_eq!((rows[1].ratio, rows[1].holds), (Some(2.0), None));
        assert_eq!(rows[0].metric, "throughput, 8 streams");
    }

    #[test]
    fn a_goal_names_its_own_rival_and_is_judged_by_medians() {
        let goal = Goal { ours: "ours-quic", rivals: &["envoy-h3"], limit: 1.5 };
        let rows = metric(Better::Higher, vec![goal.clone()]).rows(CONTEST, &rounds());
        assert_eq!((rows[0].rival, rows[0].ratio, rows[0].holds), (Some(2.0), Some(1.5), Some(true)));
        let rows = metric(Better::Higher, vec![Goal { limit: 1.6, ..goal }]).rows(CONTEST, &rounds());
        assert_eq!(rows[0].holds, Some(false));
    }

    #[test]
    fn a_goal_that_could_not_be_measured_does_not_hold() {
        let goal = |ours| Goal { ours, rivals: &["envoy-h3"], limit: 1.0 };
        let mut rounds = rounds();
        rounds.insert("ours-quic", vec![f64::NAN]);
        rounds.remove("ours-tcp");
        let rows = metric(Better::Lower, vec![goal("ours-quic"), goal("ours-tcp")]).rows(CONTEST, &rounds);
        assert_eq!(rows.len(), 1, "what was left out on purpose has no row");
        assert_eq!((rows[0].ours, rows[0].holds), (None, Some(false)));
    }

    #[test]
    fn without_a_rival_the_value_itself_is_judged() {
        let goal = |limit| Goal { ours: "ours-quic", rivals: &[], limit };
        let rounds = [("ours-quic", vec![3.0, 4.0, 5.0])].into();
        let contest = Contest { ours: &["ours-quic"], rivals: &[] };
        let row = |limit| metric(Better::Lower, vec![goal(limit)]).rows(contest, &rounds).remove(0);
        assert_eq!((row(4.0).rival, row(4.0).ratio, row(4.0).holds), (None, None, Some(true)));
        assert_eq!(row(3.9).holds, Some(false));
    }

    #[test]
    fn circumstances_are_told_in_words() {
        let mut metric = metric(Better::Lower, vec![]);
        metric.params = [("streams", 1.into()), ("loss", 0.1.into()), ("connections", 10_000.into())].into();
        assert_eq!(metric.name(), "throughput, 10,000 connections, 0.1 % loss, 1 stream");
    }
}
