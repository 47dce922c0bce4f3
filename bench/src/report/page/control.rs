//! The blocks on the control plane: committed writes beside etcd, and what a thousand agents cost.

use super::{circumstances, image, table, yes_or_no};
use crate::report::{
    Better,
    machine::Machine,
    plot::{self, Plot},
    read::{Gateway, Row},
    table::Shown,
};

pub(super) fn block(measured: &Gateway, rows: &[Row], machine: Option<&Machine>, plots: &[Plot]) -> String {
    let mut out = circumstances(machine);
    if measured.quick {
        out += "\n**A rough run (`--quick`): one round, short.**\n";
    }
    if !measured.notes.is_empty() {
        out += "\nWhat the run itself noted:\n\n";
        measured.notes.iter().for_each(|note| out += &format!("- {note}\n"));
    }
    let judged: Vec<&Row> = rows.iter().filter(|row| row.holds.is_some()).collect();
    let held = judged.iter().filter(|row| row.holds == Some(true)).count();
    out += &format!("\n{held} of {} goals held.\n\n", judged.len());
    let systems = plot::systems(rows.iter().flat_map(|row| row.systems.keys().map(String::as_str)));
    let beside = rows.iter().any(|row| row.rival_name.is_some());
    let mut head = vec!["median".to_owned()];
    head.extend(systems.iter().map(|system| system.title.to_owned()));
    head.extend(beside.then(|| "ours : rival".to_owned()));
    head.extend(["goal".to_owned(), "held".to_owned()]);
    let line = |row: &Row| {
        let unit = Shown::fit(&row.unit, row.systems.values().copied());
        let mut line = vec![format!("{} [{}]", row.metric, unit.name)];
        let value = |name: &str| row.systems.get(name).map_or_else(|| "–".to_owned(), |value| unit.text(*value));
        line.extend(systems.iter().map(|system| value(system.name)));
        line.extend(beside.then(|| row.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))));
        let bound = |goal: f64| if beside { goal.to_string() } else { format!("{} {}", unit.text(goal), unit.name) };
        let sign = if row.better == Better::Lower { "≤" } else { "≥" };
        line.push(row.goal.map(|goal| format!("{sign} {}", bound(goal))).unwrap_or_default());
        line.push(yes_or_no(row.holds));
        line
    };
    out += &table(&head, &rows.iter().map(line).collect::<Vec<_>>());
    plots.iter().for_each(|plot| out += &format!("\n{}", image(plot)));
    out
}
