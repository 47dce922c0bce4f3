//! Growth: how quantities grow with the number of agents, both axes logarithmic, one panel for each kind of quantity.

use super::{
    Plot,
    svg::{Anchor, Font, GREY, HEADING, PLAIN, SMALL, Svg},
};
use crate::report::read::{Gateway, Series};

const WIDTH: f64 = 880.0;
const GAP: f64 = 40.0;
const TOP: f64 = 64.0;
const HEIGHT: f64 = 190.0;
/// Left of a panel for its axis, right of it for what its lines are called.
const AXIS: f64 = 62.0;
const COLOURS: [&str; 3] = ["#3d8bfd", "#e0762b", "#1fa38c"];

/// A panel: its heading, and its lines, each with what it is called.
type Panel = (&'static str, &'static [(&'static str, &'static str)]);

const PANELS: [Panel; 3] = [
    (
        "first publications, all in sync",
        &[("first publications, until all are in sync", "all"), ("join of all", "join")],
    ),
    (
        "one change, to the last agent",
        &[
            ("one change, until the last agent has it, p99", "p99"),
            ("one change, until the last agent has it, p50", "p50"),
        ],
    ),
    ("memory of a node", &[("memory of a node, at its peak", "peak"), ("memory of a node", "now")]),
];

/// `None` with fewer than two sizes.
pub(super) fn plot(measured: &Gateway) -> Option<Plot> {
    let mut sizes: Vec<f64> = measured.metrics.iter().filter_map(size).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let (first, last) = (*sizes.first()?, *sizes.last()?);
    if first >= last {
        return None;
    }
    let title = "How a control plane of three nodes grows with its agents, each with 100 exports";
    let mut svg = Svg::new(WIDTH, title);
    svg.text((0.0, 16.0), Anchor::Start, HEADING, title);
    let rounds = measured.metrics.iter().map(Series::rounds).max().unwrap_or_default();
    let rough = if measured.quick { ", of a rough run" } else { "" };
    let values = if rounds == 1 { "one round".to_owned() } else { format!("medians of {rounds} rounds") };
    svg.text(
        (0.0, 34.0),
        Anchor::Start,
        PLAIN,
        &format!("number of agents along, both axes logarithmic; {values}{rough}"),
    );
    let width = (WIDTH - GAP * (PANELS.len() as f64 - 1.0)) / PANELS.len() as f64;
    for (nth, (heading, lines)) in PANELS.iter().enumerate() {
        let left = (width + GAP) * nth as f64;
        svg.text((left, TOP - 8.0), Anchor::Start, Font { bold: true, ..PLAIN }, heading);
        let of_line = |quantity: &str| points(measured, quantity);
        let all: Vec<(f64, f64)> = lines.iter().flat_map(|(quantity, _)| of_line(quantity)).collect();
        let low = all.iter().map(|(_, y)| *y).filter(|y| *y > 0.0).fold(f64::INFINITY, f64::min);
        let high = all.iter().map(|(_, y)| *y).fold(0.0, f64::max);
        if !low.is_finite() {
            continue;
        }
        // A decade at least, so that a flat line looks flat.
        let (low, high) = (low / 1.3, (high * 1.3).max(low * 10.0));
        let x = |agents: f64| left + AXIS + share(agents, first, last) * (width - AXIS - 34.0);
        let y = |value: f64| TOP + HEIGHT - share(value, low, high) * HEIGHT;
        let unit =
            measured.metrics.iter().find(|s| lines.iter().any(|(q, _)| s.quantity == *q)).map(|s| s.unit.as_str());
        for tick in ticks(low, high) {
            svg.line((left + AXIS, y(tick)), (x(last), y(tick)), (GREY, 1.0), 0.2);
            svg.text((left + AXIS - 5.0, y(tick) + 4.0), Anchor::End, SMALL, &amount(tick, unit.unwrap_or_default()));
        }
        for agents in &sizes {
            svg.text((x(*agents), TOP + HEIGHT + 15.0), Anchor::Middle, SMALL, &count(*agents));
        }
        for ((quantity, name), colour) in lines.iter().zip(COLOURS) {
            let line: Vec<(f64, f64)> =
                of_line(quantity).into_iter().map(|(agents, value)| (x(agents), y(value))).collect();
            svg.path(&line, colour);
            line.iter().for_each(|point| svg.dot(*point, 3.0, colour));
            if let Some((right, height)) = line.last() {
                svg.text((right + 6.0, height + 4.0), Anchor::Start, Font { colour, ..SMALL }, name);
            }
        }
    }
    Some(Plot { name: "agents-growth", title: title.to_owned(), svg: svg.finish(TOP + HEIGHT + 24.0) })
}

fn size(series: &Series) -> Option<f64> {
    series.params.get("agents")?.as_f64()
}

/// By number of agents.
fn points(measured: &Gateway, quantity: &str) -> Vec<(f64, f64)> {
    let series = measured.metrics.iter().filter(|series| series.quantity == quantity);
    let mut points: Vec<(f64, f64)> = series.filter_map(|s| Some((size(s)?, s.median("ours")?))).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

/// Thousands apart.
fn count(agents: f64) -> String {
    if agents < 1e3 { format!("{agents:.0}") } else { format!("{:.0},{:03.0}", (agents / 1e3).floor(), agents % 1e3) }
}

fn share(value: f64, low: f64, high: f64) -> f64 {
    ((value.max(f64::MIN_POSITIVE) / low).ln() / (high / low).ln()).clamp(0.0, 1.0)
}

/// Powers of ten; twice and five times those, too, where they would be fewer than two.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let from = low.log10().floor() as i32;
    let to = high.log10().ceil() as i32;
    let of = |steps: &[f64]| -> Vec<f64> {
        let all = (from..=to).flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)));
        all.filter(|tick| (low..=high).contains(tick)).collect()
    };
    let tens = of(&[1.0]);
    if tens.len() >= 2 { tens } else { of(&[1.0, 2.0, 5.0]) }
}

fn amount(value: f64, unit: &str) -> String {
    let (value, unit) = match (unit, value) {
        ("µs", v) if v < 1e3 => (v, "µs"),
        ("µs", v) if v < 1e6 => (v / 1e3, "ms"),
        ("µs", v) => (v / 1e6, "s"),
        ("bytes", v) => (v / f64::from(1 << 20), "MiB"),
        ("s", v) if v < 1.0 => (v * 1e3, "ms"),
        (unit, v) => (v, unit),
    };
    if value >= 10.0 { format!("{value:.0} {unit}") } else { format!("{value:.3} {unit}").replace(".000", "") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_the_unit_that_suits_them_and_an_axis_has_two_ticks() {
        let shown = [amount(1e5, "µs"), amount(1e6, "µs"), amount(104_857_600.0, "bytes"), amount(0.1, "s")];
        assert_eq!(shown, ["100 ms", "1 s", "100 MiB", "100 ms"]);
        assert_eq!([count(10.0), count(1_000.0), count(4_250.0)], ["10", "1,000", "4,250"]);
        for (low, high) in [(1.0, 1e4), (20.0, 200.0), (3.0, 31.0)] {
            assert!(ticks(low, high).len() >= 2, "{low} to {high}: {:?}", ticks(low, high));
        }
    }
}
