//! Ranges: from p50 over p99 to p99.9 of a latency, for each system, on a logarithmic axis that all panels share.

use super::{
    System,
    grid::{Area, Band, layout},
    svg::{Anchor, GREY, PLAIN, SMALL, Svg},
};

/// Left free for the values.
const VALUES: f64 = 70.0;
const TICKS: [f64; 3] = [1.0, 2.0, 5.0];

/// One panel.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) name: String,
    /// By system; where there is none, a word on why.
    pub(super) ranges: Vec<Result<Range, &'static str>>,
}

/// One system's latency, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub(super) p50: f64,
    pub(super) p99: f64,
    /// The right end.
    pub(super) p999: Option<f64>,
}

impl Range {
    fn values(self) -> impl Iterator<Item = f64> {
        [Some(self.p50), Some(self.p99), self.p999].into_iter().flatten()
    }
}

/// The drawing.
pub(super) fn draw(titles: (&str, &str), systems: &[System], bands: &[Band<Panel>]) -> String {
    let panels = bands.iter().flat_map(|band| &band.panels);
    let values: Vec<f64> = panels.flat_map(|p| p.ranges.iter().flatten().flat_map(|r| r.values())).collect();
    let low = values.iter().copied().filter(|v| *v > 0.0).fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(low, f64::max);
    // A little air at both ends, and never an empty axis.
    let axis = Axis { low: (low / 1.15).ln(), high: (high * 1.1).ln() };
    layout(
        titles,
        systems,
        bands,
        34.0,
        |panel| panel.name.clone(),
        |svg, area, _, panel| {
            if !low.is_finite() {
                return;
            }
            axis.draw(svg, area);
            for (index, (system, range)) in systems.iter().zip(&panel.ranges).enumerate() {
                match range {
                    Ok(range) => one(svg, area, area.row(index), (*range, &axis), system.colour),
                    Err(why) => svg.text((area.left + 4.0, area.row(index) + 4.0), Anchor::Start, SMALL, why),
                }
            }
        },
    )
}

fn one(svg: &mut Svg, area: Area, y: f64, (range, axis): (Range, &Axis), colour: &str) {
    let at = |value: f64| axis.at(area, value);
    let (p50, p99) = (at(range.p50), at(range.p99));
    let end = range.p999.map_or(p99, at);
    svg.line((p50, y), (p99, y), (colour, 4.0), 0.9);
    svg.line((p99, y), (end, y), (colour, 1.5), 0.9);
    if range.p999.is_some() {
        svg.line((end, y - 4.0), (end, y + 4.0), (colour, 1.5), 0.9);
    }
    svg.dot((p50, y), 4.0, colour);
    svg.bar((p99 - 1.5, y - 6.0), (3.0, 12.0), colour, 1.0);
    svg.text((end.max(p99).max(p50 + 3.0) + 7.0, y + 4.0), Anchor::Start, PLAIN, &duration(range.p99));
}

/// Natural logarithms of its ends.
#[derive(Clone, Copy, Debug)]
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn at(&self, area: Area, value: f64) -> f64 {
        let share = (value.max(f64::MIN_POSITIVE).ln() - self.low) / (self.high - self.low);
        area.left + share.clamp(0.0, 1.0) * (area.width - VALUES)
    }

    fn draw(&self, svg: &mut Svg, area: Area) {
        let bottom = area.top + area.height;
        let mut written = f64::NEG_INFINITY;
        for value in self.ticks() {
            let x = self.at(area, value);
            svg.line((x, area.top), (x, bottom), (GREY, 1.0), 0.25);
            // Not so near to the one before that they touch.
            if x - written > 44.0 {
                svg.text((x, bottom + 13.0), Anchor::Middle, SMALL, &duration(value));
                written = x;
            }
        }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (low, high) = (self.low, self.high);
        let decades = (0..10).flat_map(|power| TICKS.map(|tick| tick * 10_f64.powi(power)));
        decades.filter(move |value| (low..=high).contains(&value.ln()))
    }
}

/// Microseconds in the unit that suits them.
fn duration(micros: f64) -> String {
    let (value, unit) = match micros {
        m if m < 1e3 => (m, "µs"),
        m if m < 1e6 => (m / 1e3, "ms"),
        m => (m / 1e6, "s"),
    };
    let digits = if value >= 99.95 || value.fract() == 0.0 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_the_unit_and_digits_that_suit_them() {
        let shown = [12.34, 999.0, 1_500.0, 41_234.0, 200_000.0, 2_500_000.0].map(duration);
        assert_eq!(shown, ["12.3 µs", "999 µs", "1.50 ms", "41.2 ms", "200 ms", "2.50 s"]);
    }

    #[test]
    fn ticks_lie_within_the_axis() {
        let axis = Axis { low: 30_f64.ln(), high: 1_100_f64.ln() };
        assert_eq!(axis.ticks().collect::<Vec<_>>(), [50.0, 100.0, 200.0, 500.0, 1_000.0]);
    }
}
