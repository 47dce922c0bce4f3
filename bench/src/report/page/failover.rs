//! The block on faults: for each, what it did to the requests of each system, and whether our goal held.

use super::{circumstances, image, table, yes_or_no};
use crate::report::{
    machine::Machine,
    plot::{self, Plot},
    read::{Fault, Verdict},
};

const OURS: &str = "ours";

pub(super) fn block(faults: &[Fault], verdicts: &[Verdict], machine: Option<&Machine>, plot: Option<&Plot>) -> String {
    let mut out = circumstances(machine);
    let systems = plot::systems(faults.iter().map(|fault| fault.system.as_str()));
    let mut cases: Vec<(&str, &str)> = Vec::new();
    for fault in faults {
        let case = (fault.fault.as_str(), fault.scope.as_str());
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    let mut head = vec!["fault".to_owned()];
    head.extend(systems.iter().map(|system| system.title.to_owned()));
    head.extend(["goal".to_owned(), "held".to_owned()]);
    let mut lines = Vec::new();
    for (kind, scope) in cases {
        let mut line = vec![format!("{kind} of a {scope}")];
        line.extend(systems.iter().map(|system| sum(faults, kind, scope, system.name)));
        let of_case = format!("failover.{kind}.{scope}.");
        let verdict = verdicts.iter().find(|v| v.metric.starts_with(&of_case) && v.goal.is_some());
        line.push(verdict.and_then(|v| v.goal.clone()).unwrap_or_default());
        line.push(yes_or_no(verdict.and_then(|v| v.holds)));
        lines.push(line);
    }
    let rounds = faults.iter().map(|fault| fault.round).max().unwrap_or_default();
    let judged: Vec<bool> = verdicts.iter().filter_map(|verdict| verdict.holds).collect();
    let held = judged.iter().filter(|held| **held).count();
    out += &format!(
        "\n{held} of {} goals held. Failed requests / slow ones (over 250 ms) / time from the fault to the end of the last such \
         request; medians of {rounds} round{}, with the worst round's failures where they differ.\n\n",
        judged.len(),
        if rounds == 1 { "" } else { "s" }
    );
    out += &table(&head, &lines);
    out += &behind(faults, &systems);
    if let Some(plot) = plot {
        out += &format!("\n{}", image(plot));
    }
    out
}

/// Says in which faults another system had fewer failures or was done sooner than ours.
fn behind(faults: &[Fault], systems: &[plot::System]) -> String {
    let mut lost = Vec::new();
    for fault in faults.iter().filter(|fault| fault.system == OURS && fault.round == 1) {
        let (kind, scope) = (fault.fault.as_str(), fault.scope.as_str());
        let figures = |system: &str| {
            let of = rounds(faults, kind, scope, system);
            Some((median(of.iter().map(|f| f.failed))?, median(of.iter().map(|f| f.last_affected_ms))?))
        };
        let Some(ours) = figures(OURS) else { continue };
        for system in systems.iter().filter(|system| system.name != OURS) {
            let Some(theirs) = figures(system.name) else { continue };
            let mut said = |what: &str| lost.push(format!("- {kind} of a {scope}: {} has {what}\n", system.title));
            if theirs.0 < ours.0 {
                said(&format!("fewer failures, {} against {}", theirs.0, ours.0));
            }
            if theirs.1 < ours.1 {
                said(&format!("its last affected request sooner, after {} ms against {} ms", theirs.1, ours.1));
            }
        }
    }
    if lost.is_empty() {
        return "\nIn no fault did another system fail fewer requests or finish sooner than ours.\n".to_owned();
    }
    format!("\nWhere another system is ahead of ours:\n\n{}", lost.concat())
}

fn sum(faults: &[Fault], kind: &str, scope: &str, system: &str) -> String {
    let rounds = rounds(faults, kind, scope, system);
    let medians = (
        median(rounds.iter().map(|f| f.failed)),
        median(rounds.iter().map(|f| f.slow)),
        median(rounds.iter().map(|f| f.last_affected_ms)),
    );
    let (Some(failed), Some(slow), Some(last)) = medians else { return "–".to_owned() };
    let most = rounds.iter().map(|f| f.failed).max().unwrap_or(failed);
    let worst = if most > failed { format!(" (worst {most})") } else { String::new() };
    let last = match (last, rounds.iter().all(|f| f.settled)) {
        (0, true) => "none".to_owned(),
        (ms, true) => format!("{ms} ms"),
        (ms, false) => format!("≥ {ms} ms"),
    };
    format!("{failed}{worst} / {slow} / {last}")
}

fn rounds<'a>(faults: &'a [Fault], kind: &str, scope: &str, system: &str) -> Vec<&'a Fault> {
    faults.iter().filter(|f| f.fault == kind && f.scope == scope && f.system == system).collect()
}

/// The lower one of two.
fn median(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied()
}
