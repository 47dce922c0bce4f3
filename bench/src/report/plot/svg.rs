//! A drawing: text, lines, bars and dots, written as SVG.
//!
//! No background and greys of middle lightness, so that a drawing is readable on white pages and on dark ones; fonts are the
//! reader's own. Coordinates are in pixels, from the top left.

use std::fmt::Write;

/// Of text and axes.
pub(super) const GREY: &str = "#7a838c";

/// A drawing under way.
#[derive(Debug)]
pub(super) struct Svg {
    body: String,
    width: f64,
    label: String,
}

/// Where a text stands relative to its coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// Of a text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Font {
    pub(super) size: u8,
    pub(super) bold: bool,
    pub(super) colour: &'static str,
}

/// Panel and page headings.
pub(super) const HEADING: Font = Font { size: 15, bold: true, colour: GREY };
/// Most text.
pub(super) const PLAIN: Font = Font { size: 12, bold: false, colour: GREY };
/// Axes.
pub(super) const SMALL: Font = Font { size: 11, bold: false, colour: GREY };

impl Svg {
    /// `label` is read aloud to those who cannot see it.
    pub(super) fn new(width: f64, label: &str) -> Self {
        Self { body: String::new(), width, label: label.to_owned() }
    }

    pub(super) fn text(&mut self, (x, y): (f64, f64), anchor: Anchor, font: Font, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let weight = if font.bold { " font-weight=\"600\"" } else { "" };
        self.push(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{}\"{weight} fill=\"{}\">{}</text>",
            font.size,
            font.colour,
            escape(text)
        ));
    }

    /// A filled rectangle; `opacity` from 0 to 1.
    pub(super) fn bar(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), colour: &str, opacity: f64) {
        self.push(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"1.5\" fill=\"{colour}\" \
             fill-opacity=\"{opacity}\"/>",
            width.max(0.6)
        ));
    }

    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), (colour, width): (&str, f64), opacity: f64) {
        self.push(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"{width}\" \
             stroke-opacity=\"{opacity}\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    pub(super) fn dashes(&mut self, from: (f64, f64), to: (f64, f64)) {
        self.push(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{GREY}\" stroke-dasharray=\"3 3\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    pub(super) fn dot(&mut self, (x, y): (f64, f64), radius: f64, colour: &str) {
        self.push(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\"/>"));
    }

    /// A line through all points.
    pub(super) fn path(&mut self, points: &[(f64, f64)], colour: &str) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.push(format_args!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" stroke-linejoin=\"round\"/>",
            points.join(" ")
        ));
    }

    /// The file's text.
    pub(super) fn finish(self, height: f64) -> String {
        let Self { body, width, label } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" role=\"img\" aria-label=\"{}\" font-family=\"system-ui, -apple-system, 'Segoe UI', \
             'DejaVu Sans', sans-serif\">\n{body}</svg>\n",
            escape(&label)
        )
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut svg = Svg::new(10.0, "a \"b\"");
        svg.text((1.0, 2.0), Anchor::Start, PLAIN, "<script>&");
        let text = svg.finish(5.0);
        assert!(text.contains("&lt;script&gt;&amp;") && text.contains("a &quot;b&quot;"), "{text}");
        assert!(text.starts_with("<svg") && text.ends_with("</svg>\n"));
    }
}
