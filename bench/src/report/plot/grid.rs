//! What bars and ranges have in common: panels side by side, one row for each system in all of them, the systems' names once.

use super::{
    System,
    svg::{Anchor, Font, HEADING, PLAIN, Svg},
};

pub(super) const WIDTH: f64 = 880.0;
/// For the systems' names.
const NAMES: f64 = 84.0;
/// Between panels.
const GAP: f64 = 18.0;
pub(super) const ROW: f64 = 21.0;
const TITLE: f64 = 50.0;
const BAND: f64 = 26.0;
const PANEL_TITLE: f64 = 20.0;

/// A row of panels under a heading of its own.
#[derive(Debug)]
pub(super) struct Band<P> {
    /// Empty if there is only one.
    pub(super) heading: String,
    pub(super) panels: Vec<P>,
}

/// Where a panel's marks go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) width: f64,
    /// Of all rows.
    pub(super) height: f64,
}

impl Area {
    /// The middle of a row.
    pub(super) fn row(self, index: usize) -> f64 {
        self.top + ROW * (index as f64 + 0.5)
    }
}

/// Draws frame and names, and calls `draw` for each panel; `foot` pixels below each band are left for axes.
pub(super) fn layout<P>(
    (title, subtitle): (&str, &str),
    systems: &[System],
    bands: &[Band<P>],
    foot: f64,
    name_of: impl Fn(&P) -> String,
    mut draw: impl FnMut(&mut Svg, Area, &Band<P>, &P),
) -> String {
    let mut svg = Svg::new(WIDTH, title);
    svg.text((0.0, 16.0), Anchor::Start, HEADING, title);
    svg.text((0.0, 34.0), Anchor::Start, PLAIN, subtitle);
    let mut top = TITLE;
    let height = ROW * systems.len() as f64;
    for band in bands {
        if !band.heading.is_empty() {
            svg.text((0.0, top + 14.0), Anchor::Start, Font { bold: true, ..PLAIN }, &band.heading);
            top += BAND - 6.0;
        }
        let count = band.panels.len().max(1) as f64;
        let width = (WIDTH - NAMES - GAP * (count - 1.0)) / count;
        let rows = top + PANEL_TITLE;
        for (index, system) in systems.iter().enumerate() {
            let font = Font { colour: system.colour, bold: true, ..PLAIN };
            let y = Area { left: 0.0, top: rows, width, height }.row(index) + 4.0;
            svg.text((NAMES - 8.0, y), Anchor::End, font, system.title);
        }
        for (index, panel) in band.panels.iter().enumerate() {
            let area = Area { left: NAMES + (width + GAP) * index as f64, top: rows, width, height };
            svg.text((area.left, top + 13.0), Anchor::Start, PLAIN, &name_of(panel));
            draw(&mut svg, area, band, panel);
        }
        top = rows + height + foot;
    }
    svg.finish(top)
}
