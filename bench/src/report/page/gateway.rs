//! The block on the data path: what was to be reached, where rivals are ahead, all figures.

use super::{circumstances, image, table, yes_or_no};
use crate::report::{
    Better,
    machine::Machine,
    plot::{self, Plot},
    read::{Gateway, Row},
    table::Shown,
};

/// Groups of metrics, what they are called, and the plots that show them.
const GROUPS: [(&str, &str, &[&str]); 5] = [
    ("bulk", "Bulk", &["gateway-throughput", "gateway-cpu"]),
    ("rr", "Small requests on warm connections", &["gateway-latency", "gateway-requests"]),
    ("connect", "New connections", &["gateway-connect"]),
    ("memory", "Memory", &["gateway-memory"]),
    ("wan", "Over a long path, with loss", &["gateway-loss", "gateway-loss-throughput"]),
];
/// Ratios are given for these.
const OURS: [&str; 2] = ["ours-quic", "ours-tcp"];

pub(super) fn block(measured: &Gateway, rows: &[Row], machine: Option<&Machine>, plots: &[Plot]) -> String {
    let mut out = circumstances(machine);
    if measured.quick {
        out += "\n**A rough run (`--quick`): one round, short spans, fewer connections.**\n";
    }
    if !measured.notes.is_empty() {
        out += "\nWhat the run itself noted:\n\n";
        measured.notes.iter().for_each(|note| out += &format!("- {note}\n"));
    }
    out += &goals(rows);
    out += &behind(rows);
    for (group, heading, names) in GROUPS {
        let of_group: Vec<&Row> = rows.iter().filter(|row| row.group == group).collect();
        if of_group.is_empty() {
            continue;
        }
        out += &format!("\n### {heading}\n\n");
        for plot in plots.iter().filter(|plot| names.contains(&plot.name)) {
            out += &format!("{}\n", image(plot));
        }
        out += &figures(&of_group);
    }
    out
}

fn goals(rows: &[Row]) -> String {
    let judged: Vec<&Row> = rows.iter().filter(|row| row.holds.is_some()).collect();
    if judged.is_empty() {
        return String::new();
    }
    let held = judged.iter().filter(|row| row.holds == Some(true)).count();
    let head = ["what", "ours", "best rival", "ratio", "goal", "held"].map(str::to_owned);
    let lines: Vec<Vec<String>> = judged
        .iter()
        .map(|row| {
            let mut line = sides(row).to_vec();
            line.extend([ratio(row.ratio), limit(row), yes_or_no(row.holds)]);
            line
        })
        .collect();
    format!("\n### Goals\n\n{held} of {} held.\n\n{}", judged.len(), table(&head, &lines))
}

/// Every metric in which the best rival of the same protection is better than one of ours, the worst first.
fn behind(rows: &[Row]) -> String {
    let with_ratio: Vec<(&Row, f64)> = rows.iter().filter_map(|row| Some((row, row.ratio?))).collect();
    let mut lost: Vec<(&Row, f64)> =
        with_ratio.iter().filter(|(row, ratio)| !row.better.holds(*ratio, 1.0)).copied().collect();
    // How many times better the rival is.
    let by = |(row, ratio): &(&Row, f64)| match row.better {
        Better::Lower => *ratio,
        Better::Higher => 1.0 / ratio,
    };
    lost.sort_by(|a, b| by(b).total_cmp(&by(a)));
    let mut out = format!(
        "\n### Wins and losses\n\nOf {} comparisons with the best rival of the same protection, {} are won or even",
        with_ratio.len(),
        with_ratio.len() - lost.len()
    );
    if lost.is_empty() {
        return out + ".\n";
    }
    let head = ["lost", "ours", "best rival", "ratio"].map(str::to_owned);
    let lines: Vec<Vec<String>> = lost
        .iter()
        .map(|(row, _)| {
            let mut line = sides(row).to_vec();
            line.push(ratio(row.ratio));
            line
        })
        .collect();
    out += &format!(", {} lost:\n\n{}", lost.len(), table(&head, &lines));
    out
}

/// Metric, ours and the rival's value, each with its system's name.
fn sides(row: &Row) -> [String; 3] {
    let value = |name: &str| row.systems.get(name).copied();
    let rival = row.rival_name.as_deref();
    let both = [value(&row.ours_name), rival.and_then(value)];
    let unit = Shown::fit(&row.unit, both.into_iter().flatten());
    let shown = |name: &str, value: Option<f64>| {
        let value = value.map_or_else(|| "–".to_owned(), |value| format!("{} {}", unit.text(value), unit.name));
        format!("{value} ({})", plot::title(name))
    };
    let [ours, theirs] = both;
    let rival = rival.map_or_else(|| "–".to_owned(), |name| shown(name, theirs));
    [row.metric.clone(), shown(&row.ours_name, ours), rival]
}

/// One line for each metric, one column for each system.
fn figures(rows: &[&Row]) -> String {
    let systems = plot::systems(rows.iter().flat_map(|row| row.systems.keys().map(String::as_str)));
    let mut head = vec!["median".to_owned()];
    head.extend(systems.iter().map(|system| system.title.to_owned()));
    let ratios: Vec<&str> = OURS.into_iter().filter(|ours| rows.iter().any(|row| row.ours_name == *ours)).collect();
    head.extend(ratios.iter().map(|ours| format!("{} : best rival", plot::title(ours))));
    let mut lines: Vec<Vec<String>> = Vec::new();
    let mut written: Vec<&str> = Vec::new();
    for row in rows {
        if written.contains(&row.metric.as_str()) {
            continue;
        }
        written.push(&row.metric);
        let unit = Shown::fit(&row.unit, row.systems.values().copied());
        let mut line = vec![format!("{} [{}]", row.metric, unit.name)];
        for system in &systems {
            let value = row.systems.get(system.name).map(|value| unit.text(*value));
            line.push(value.unwrap_or_else(|| "–".to_owned()));
        }
        for ours in &ratios {
            let same = rows.iter().find(|other| other.metric == row.metric && other.ours_name == *ours);
            line.push(same.map_or_else(|| "–".to_owned(), |row| verdict(row)));
        }
        lines.push(line);
    }
    table(&head, &lines)
}

/// The ratio, bold where ours is ahead.
fn verdict(row: &Row) -> String {
    match row.ratio {
        Some(value) if row.better.holds(value, 1.0) => format!("**{}**", ratio(row.ratio)),
        _ => ratio(row.ratio),
    }
}

fn ratio(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))
}

fn limit(row: &Row) -> String {
    let Some(goal) = row.goal else { return String::new() };
    match row.better {
        Better::Lower => format!("≤ {goal}"),
        Better::Higher => format!("≥ {goal}"),
    }
}
