//! What faults did over time: for each fault the longest request of every tenth of a second, and below it those that failed.
//!
//! Of several rounds the one is shown whose last affected request is the median. All panels share both axes; time ends where the
//! last of them is calm again.

use std::collections::BTreeSet;

use super::{
    Plot, System,
    svg::{Anchor, Font, GREY, HEADING, PLAIN, SMALL, Svg},
    systems,
};
use crate::report::read::{Fault, Slot};

const WIDTH: f64 = 880.0;
const COLUMN: f64 = 416.0;
const COLUMN_GAP: f64 = 48.0;
const AXIS: f64 = 46.0;
const CURVES: f64 = 92.0;
const LANE: f64 = 29.0;
const LEGEND: f64 = 58.0;

/// Milliseconds that the latency's axis spans.
const FASTEST: f64 = 1.0;
/// Of the time line, before the fault and at least after it.
const LEAD_MS: i64 = 1_000;
const SHORTEST_MS: i64 = 3_000;
const SLOT_MS: i64 = 100;
/// A request longer than this is affected.
const SLOW_MS: u64 = 250;

/// `None` without measurements.
pub(super) fn plot(faults: &[Fault]) -> Option<Plot> {
    let shown = systems(faults.iter().map(|fault| fault.system.as_str()));
    let slots = || faults.iter().flat_map(|fault| &fault.timeline);
    let calm = slots().filter(|slot| is_affected(slot)).map(|slot| slot.at_ms).max().unwrap_or_default();
    let slowest = slots().map(|slot| slot.max_ms).max()?.max(100);
    let axes = Axes {
        until_ms: (calm + 1_500).max(SHORTEST_MS),
        // The next power of ten.
        slowest: 10_f64.powf((slowest as f64).log10().ceil()),
    };
    let title = "Requests around a fault: the longest of each tenth of a second, and those that failed";
    let mut svg = Svg::new(WIDTH, title);
    svg.text((0.0, 16.0), Anchor::Start, HEADING, title);
    let mut x = 0.0;
    for system in &shown {
        svg.bar((x, 27.0), (12.0, 4.0), system.colour, 1.0);
        svg.text((x + 17.0, 34.0), Anchor::Start, Font { colour: system.colour, bold: true, ..PLAIN }, system.title);
        x += 40.0 + 7.2 * system.title.chars().count() as f64;
    }
    let height = LEGEND - 14.0 + CURVES + LANE * shown.len() as f64;
    let kinds = in_order(faults.iter().map(|fault| fault.fault.as_str()));
    let scopes = in_order(faults.iter().map(|fault| fault.scope.as_str()));
    for (row, kind) in kinds.iter().enumerate() {
        for (column, scope) in scopes.iter().enumerate() {
            let (left, top) = (column as f64 * (COLUMN + COLUMN_GAP), LEGEND + row as f64 * height);
            let median = |system: &System| median_round(faults, kind, scope, system.name);
            let of_each: Vec<(System, Option<&Fault>)> = shown.iter().map(|s| (*s, median(s))).collect();
            if of_each.iter().any(|(_, fault)| fault.is_some()) {
                panel(&mut svg, (left, top), &axes, (&format!("{} of a {scope}", words(kind)), &of_each));
            }
        }
    }
    Some(Plot {
        name: "failover-timeline",
        title: title.to_owned(),
        svg: svg.finish(LEGEND + kinds.len() as f64 * height),
    })
}

fn panel(svg: &mut Svg, (left, top): (f64, f64), axes: &Axes, (heading, systems): (&str, &[(System, Option<&Fault>)])) {
    svg.text((left, top + 12.0), Anchor::Start, Font { bold: true, ..PLAIN }, heading);
    let top = top + 20.0;
    let lanes = top + CURVES;
    let x = |ms: i64| left + AXIS + axes.along(ms) * (COLUMN - AXIS);
    let y = |ms: f64| lanes - 4.0 - axes.up(ms) * (CURVES - 10.0);
    for power in 0..=4 {
        let tick = 10_f64.powi(power);
        if tick <= axes.slowest * 1.01 {
            svg.line((left + AXIS, y(tick)), (left + COLUMN, y(tick)), (GREY, 1.0), 0.2);
            let text = if power < 3 { format!("{tick} ms") } else { format!("{} s", tick / 1e3) };
            svg.text((left + AXIS - 4.0, y(tick) + 4.0), Anchor::End, SMALL, &text);
        }
    }
    let bottom = lanes + LANE * systems.len() as f64;
    svg.dashes((x(0), top), (x(0), bottom));
    let step = if axes.until_ms > 12_000 { 5_000 } else { 1_000 };
    for ms in (0..=axes.until_ms).step_by(step) {
        svg.text((x(ms), bottom + 13.0), Anchor::Middle, SMALL, &format!("{} s", ms / 1_000));
    }
    // Ours last, so that it is not hidden.
    for (lane, (system, fault)) in systems.iter().enumerate().rev() {
        let Some(fault) = fault else { continue };
        let within = fault.timeline.iter().filter(|slot| (-LEAD_MS..=axes.until_ms).contains(&slot.at_ms));
        let slots: Vec<&Slot> = within.collect();
        let points: Vec<(f64, f64)> =
            slots.iter().map(|slot| (x(slot.at_ms + SLOT_MS / 2), y(slot.max_ms as f64))).collect();
        svg.path(&points, system.colour);
        let floor = lanes + LANE * (lane as f64 + 1.0) - 2.0;
        svg.line((left + AXIS, floor), (left + COLUMN, floor), (system.colour, 1.0), 0.35);
        for slot in slots.iter().filter(|slot| slot.failed > 0) {
            // One failure is to be seen; all of a slot's fifty fill the lane.
            let height = (3.0 + slot.failed as f64 * 0.24).min(14.0);
            svg.bar((x(slot.at_ms), floor - height), (x(SLOT_MS) - x(0), height), system.colour, 1.0);
        }
        let font = Font { colour: system.colour, ..SMALL };
        svg.text((x(0) + 5.0, floor - 16.0), Anchor::Start, font, &summary(fault));
    }
}

fn summary(fault: &Fault) -> String {
    let last = match (fault.last_affected_ms, fault.settled) {
        (0, true) => return "none affected".to_owned(),
        (ms, true) => format!("last after {:.2} s", ms as f64 / 1e3),
        (ms, false) => format!("last after ≥ {:.2} s", ms as f64 / 1e3),
    };
    format!("{} failed, {} slow, {last}", fault.failed, fault.slow)
}

/// What all panels share.
#[derive(Debug)]
struct Axes {
    until_ms: i64,
    slowest: f64,
}

impl Axes {
    fn along(&self, ms: i64) -> f64 {
        ((ms + LEAD_MS) as f64 / (self.until_ms + LEAD_MS) as f64).clamp(0.0, 1.0)
    }

    fn up(&self, ms: f64) -> f64 {
        ((ms.max(FASTEST) / FASTEST).ln() / (self.slowest / FASTEST).ln()).clamp(0.0, 1.0)
    }
}

/// The round in the middle by the end of its effects; the lower one of two.
fn median_round<'a>(faults: &'a [Fault], kind: &str, scope: &str, system: &str) -> Option<&'a Fault> {
    let of = |fault: &&Fault| fault.fault == kind && fault.scope == scope && fault.system == system;
    let mut rounds: Vec<&Fault> = faults.iter().filter(of).collect();
    rounds.sort_by_key(|fault| (fault.last_affected_ms, fault.failed, fault.round));
    rounds.get(rounds.len().saturating_sub(1) / 2).copied()
}

fn is_affected(slot: &Slot) -> bool {
    slot.failed > 0 || slot.max_ms > SLOW_MS
}

/// Without repetition, in the order of their first.
fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = BTreeSet::new();
    names.filter(|name| seen.insert(*name)).collect()
}

fn words(kind: &str) -> &str {
    match kind {
        "kill" => "kill -9",
        "stop" => "SIGSTOP",
        other => other,
    }
}
