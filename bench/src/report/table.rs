//! The closing table: a line for each metric, a column for each system, what was reached and whether that was the goal.

use super::{Better, Contest, Metric, Row, stats};
use std::collections::BTreeMap;

/// A column.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    /// The system's name in the measurements.
    pub(crate) system: &'static str,
    /// And in the table.
    pub(crate) title: &'static str,
}

/// A metric and its values.
pub(crate) type Line<'a> = (&'a Metric, &'a BTreeMap<&'static str, Vec<f64>>);

/// The table; groups by name, each with a heading.
pub(crate) fn render(lines: &[Line<'_>], columns: &[Column], contest: Contest, headings: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for (group, heading) in headings {
        let of_group: Vec<&Line<'_>> = lines.iter().filter(|(metric, _)| metric.group == *group).collect();
        if of_group.is_empty() {
            continue;
        }
        let mut cells = vec![head(columns, contest)];
        cells.extend(of_group.iter().map(|(metric, rounds)| line(metric, rounds, columns, contest)));
        out += &format!("\n{heading}\n{}", layout(&cells));
    }
    out
}

fn head(columns: &[Column], contest: Contest) -> Vec<String> {
    let mut head = vec![String::new()];
    head.extend(columns.iter().map(|c| c.title.to_owned()));
    head.extend(contest.ours.iter().map(|name| format!("{}/rival", name.trim_start_matches("ours-"))));
    head.extend(["goal".to_owned(), "held".to_owned()]);
    head
}

fn line(
    metric: &Metric,
    rounds: &BTreeMap<&'static str, Vec<f64>>,
    columns: &[Column],
    contest: Contest,
) -> Vec<String> {
    let rows = metric.rows(contest, rounds);
    let medians: Vec<Option<f64>> =
        columns.iter().map(|c| rounds.get(c.system).and_then(|values| stats::median(values))).collect();
    let unit = Shown::fit(metric.unit, medians.iter().flatten().copied());
    let mut line = vec![format!("{} [{}]", metric.name(), unit.name)];
    line.extend(medians.iter().map(|value| value.map_or_else(|| "–".to_owned(), |v| unit.text(v))));
    let ratio_of = |ours: &str| rows.iter().find(|row| row.ours_name == ours).map(ratio);
    line.extend(contest.ours.iter().map(|ours| ratio_of(ours).unwrap_or_else(|| "–".to_owned())));
    let judged: Vec<&Row> = rows.iter().filter(|row| row.holds.is_some()).collect();
    // Of a ratio, or, where nobody rivals, of the value.
    let limit = |limit: f64| {
        if contest.rivals.is_empty() { format!("{} {}", unit.text(limit), unit.name) } else { limit.to_string() }
    };
    let shown = |row: &Row| Some(goal(metric.better, limit(row.goal?)));
    let mut goals: Vec<String> = judged.iter().filter_map(|row| shown(row)).collect();
    goals.dedup();
    line.push(goals.join(" / "));
    let held = judged.iter().map(|row| if row.holds == Some(true) { "yes" } else { "NO" });
    line.push(held.collect::<Vec<_>>().join(" / "));
    line
}

fn ratio(row: &Row) -> String {
    row.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))
}

fn goal(better: Better, limit: String) -> String {
    match better {
        Better::Lower => format!("≤ {limit}"),
        Better::Higher => format!("≥ {limit}"),
    }
}

/// How values of a line are written: all in the same unit, with digits that mean something.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown<'a> {
    /// Of the unit.
    pub(crate) name: &'a str,
    factor: f64,
}

impl<'a> Shown<'a> {
    /// `unit` is the one that values are measured in.
    pub(crate) fn fit(unit: &'a str, values: impl Iterator<Item = f64>) -> Self {
        let smallest = values.filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
        let (name, factor) = match unit {
            "µs" if smallest >= 1e3 && smallest.is_finite() => ("ms", 1e-3),
            "bytes" => ("KiB", 1.0 / 1024.0),
            "bit/s" if smallest < 1e8 => ("Mbit/s", 1e-6),
            "bit/s" => ("Gbit/s", 1e-9),
            other => (other, 1.0),
        };
        Self { name, factor }
    }

    /// A value, without its unit.
    pub(crate) fn text(&self, value: f64) -> String {
        let value = value * self.factor;
        match value.abs() {
            v if v >= 1e3 => thousands(value),
            v if v >= 100.0 => format!("{value:.0}"),
            v if v >= 10.0 => format!("{value:.1}"),
            _ => format!("{value:.2}"),
        }
    }
}

fn thousands(value: f64) -> String {
    let whole = value.round() as i64;
    let digits = whole.abs().to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if whole < 0 { format!("-{out}") } else { out }
}

/// Columns as wide as their widest cell; the first to the left, the others to the right.
fn layout(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| lines.iter().filter_map(|l| Some(l.get(column)?.chars().count())).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (number, line) in lines.iter().enumerate() {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        let text = cells.collect::<Vec<_>>().join("  ");
        out += &format!("  {}\n", text.trim_end());
        if number == 0 {
            out += &format!("  {}\n", "─".repeat(widths.iter().sum::<usize>() + 2 * (columns - 1)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Goal;

    #[test]
    fn a_line_shows_values_ratios_goal_and_verdict() {
        let metric = Metric {
            group: "rr",
            quantity: "p99".to_owned(),
            params: [("connections", 100.into())].into(),
            unit: "µs",
            better: Better::Lower,
            goals: vec![Goal { ours: "ours", rivals: &["envoy"], limit: 1.0 }],
        };
        let rounds = [("ours", vec![1_500.0]), ("envoy", vec![1_200.0])].into();
        let columns = [Column { system: "envoy", title: "Envoy" }, Column { system: "ours", title: "ours" }];
        let contest = Contest { ours: &["ours"], rivals: &["envoy"] };
        let text = render(&[(&metric, &rounds)], &columns, contest, &[("rr", "Requests"), ("none", "Nothing")]);
        let line = text.lines().find(|line| line.contains("p99")).unwrap();
        let cells: Vec<&str> = line.split("  ").filter(|c| !c.is_empty()).map(str::trim).collect();
        assert_eq!(cells, ["p99, 100 connections [ms]", "1.20", "1.50", "1.25", "≤ 1", "NO"]);
        assert!(!text.contains("Nothing"));
    }

    #[test]
    fn large_numbers_have_their_thousands_apart() {
        assert_eq!(thousands(1_234_567.4), "1,234,567");
        assert_eq!(thousands(-1_000.0), "-1,000");
        assert_eq!(thousands(999.6), "1,000");
    }
}
