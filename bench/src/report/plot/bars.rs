//! Bars: an amount for each system, panel by panel, medians with a line from the lowest to the highest round.
//!
//! The systems under comparison fill the scale; what is only there for orientation may be longer than its panel, is cut off with a
//! gap near its end, and keeps its true value in words.

use super::{
    System,
    grid::{Area, Band, ROW, layout},
    svg::{Anchor, PLAIN, SMALL, Svg},
};

/// Left free for the values.
const VALUES: f64 = 86.0;

/// One panel.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) name: String,
    /// By system; where there is none, a word on why.
    pub(super) bars: Vec<Result<Bar, &'static str>>,
}

/// One system's amount.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) median: f64,
    /// Of the rounds.
    pub(super) span: (f64, f64),
    pub(super) text: String,
}

/// Which panels can be compared by length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    /// All of a band.
    Shared,
    /// None: amounts are too far apart.
    Own,
}

/// The drawing. Systems of which `orientation` is true do not set the scale.
pub(super) fn draw(
    titles: (&str, &str),
    systems: &[System],
    bands: &[Band<Panel>],
    scale: Scale,
    orientation: impl Fn(&System) -> bool,
) -> String {
    let longest = |panels: &[Panel], all: bool| {
        let of = |panel: &Panel| {
            let counted = systems.iter().zip(&panel.bars).filter(|(system, _)| all || !orientation(system));
            counted.filter_map(|(_, bar)| Some(bar.as_ref().ok()?.span.1)).fold(0.0, f64::max)
        };
        panels.iter().map(of).fold(0.0, f64::max)
    };
    layout(
        titles,
        systems,
        bands,
        14.0,
        |panel| panel.name.clone(),
        |svg, area, band, panel| {
            let panels = if scale == Scale::Shared { &band.panels } else { std::slice::from_ref(panel) };
            let compared = longest(panels, false);
            let scale = if compared > 0.0 { compared } else { longest(panels, true) };
            for (index, (system, bar)) in systems.iter().zip(&panel.bars).enumerate() {
                match bar {
                    Ok(bar) => one(svg, area, area.row(index), (bar, scale), system.colour),
                    Err(why) => svg.text((area.left + 4.0, area.row(index) + 4.0), Anchor::Start, SMALL, why),
                }
            }
            svg.line((area.left, area.top), (area.left, area.top + area.height), ("#7a838c", 1.0), 0.6);
        },
    )
}

fn one(svg: &mut Svg, area: Area, middle: f64, (bar, scale): (&Bar, f64), colour: &str) {
    let room = area.width - VALUES;
    let length = |value: f64| if scale > 0.0 { room * value / scale } else { 0.0 };
    let (thickness, top) = (ROW - 8.0, middle - (ROW - 8.0) / 2.0);
    let full = length(bar.median);
    let mut end = full;
    if full > room + 0.5 {
        // Cut off: a gap, then a stump.
        svg.bar((area.left, top), (room - 16.0, thickness), colour, 0.9);
        svg.bar((area.left + room - 12.0, top), (4.0, thickness), colour, 0.9);
        svg.bar((area.left + room - 4.0, top), (4.0, thickness), colour, 0.9);
        end = room;
    } else {
        svg.bar((area.left, top), (full, thickness), colour, 0.9);
        // The spread: light within the bar, of its colour beyond.
        let (low, high) = (length(bar.span.0), length(bar.span.1).min(room));
        if high - low > 1.0 {
            svg.line((area.left + low, middle), (area.left + full, middle), ("#ffffff", 1.5), 0.8);
            svg.line((area.left + full, middle), (area.left + high, middle), (colour, 1.5), 1.0);
            end = end.max(high);
        }
    }
    svg.text((area.left + end + 5.0, middle + 4.0), Anchor::Start, PLAIN, &bar.text);
}
