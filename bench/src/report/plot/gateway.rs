//! Which measurements of the data path, and of committed writes, are shown together, and how.

use serde_json::Value;

use super::{
    Plot, System,
    bars::{self, Bar, Scale},
    grid::Band,
    ranges::{self, Range},
    systems,
};
use crate::report::{
    read::{Gateway, Series},
    table::Shown,
};

/// What is shown together.
struct Figure {
    name: &'static str,
    title: &'static str,
    group: &'static str,
    form: Form,
    /// Each with what to call its row of panels.
    quantities: &'static [(&'static str, &'static str)],
}

enum Form {
    /// Of quantities with these names.
    Bars(Scale),
    /// Of quantities whose names go on with a quantile.
    Ranges,
}

const FIGURES: [Figure; 11] = [
    Figure {
        name: "gateway-throughput",
        title: "Throughput by number of streams",
        group: "bulk",
        form: Form::Bars(Scale::Shared),
        quantities: &[
            ("throughput server to client", "server to client"),
            ("throughput client to server", "client to server"),
        ],
    },
    Figure {
        name: "gateway-cpu",
        title: "CPU time of both sides, seconds per gigabyte (less is better)",
        group: "bulk",
        form: Form::Bars(Scale::Shared),
        quantities: &[
            ("CPU of both sides server to client", "server to client"),
            ("CPU of both sides client to server", "client to server"),
        ],
    },
    Figure {
        name: "gateway-latency",
        title: "Latency of small requests on warm connections, at one rate for all (less is better)",
        group: "rr",
        form: Form::Ranges,
        quantities: &[("latency ", "")],
    },
    Figure {
        name: "gateway-requests",
        title: "Small requests on warm connections: how many, and what each costs",
        group: "rr",
        form: Form::Bars(Scale::Shared),
        quantities: &[
            ("requests, one after the other", "requests per second, one after the other on each connection"),
            ("CPU of both sides per request", "CPU of both sides per request, at one rate for all (less is better)"),
        ],
    },
    Figure {
        name: "gateway-connect",
        title: "New connections per second",
        group: "connect",
        form: Form::Bars(Scale::Shared),
        quantities: &[("new connections", "")],
    },
    Figure {
        name: "gateway-connect-latency",
        title: "Time to a new connection's first byte (less is better)",
        group: "connect",
        form: Form::Ranges,
        quantities: &[("latency ", "")],
    },
    Figure {
        name: "gateway-memory",
        title: "Memory of both sides for each connection (less is better)",
        group: "memory",
        form: Form::Bars(Scale::Shared),
        quantities: &[("idle", "idle connections"), ("busy", "busy connections")],
    },
    Figure {
        name: "gateway-loss",
        title: "Over a long path with loss: small requests and new connections (less is better)",
        group: "wan",
        form: Form::Ranges,
        quantities: &[
            ("request latency ", "small requests on warm connections"),
            ("new connection ", "new connections"),
        ],
    },
    Figure {
        name: "gateway-loss-throughput",
        title: "Over a long path with loss: throughput",
        group: "wan",
        form: Form::Bars(Scale::Own),
        quantities: &[("throughput server to client", "")],
    },
    Figure {
        name: "raft-writes",
        title: "Committed writes per second",
        group: "raft",
        form: Form::Bars(Scale::Own),
        quantities: &[("writes", "")],
    },
    Figure {
        name: "raft-latency",
        title: "Time to a committed write (less is better)",
        group: "raft",
        form: Form::Ranges,
        quantities: &[("latency ", "")],
    },
];

/// What there are measurements for.
pub(super) fn plots(measured: &Gateway) -> Vec<Plot> {
    FIGURES.iter().filter_map(|figure| Page::of(figure, measured).plot()).collect()
}

/// One figure and its measurements.
struct Page<'a> {
    figure: &'a Figure,
    measured: &'a Gateway,
    /// Those that have values in it.
    shown: Vec<System>,
}

impl<'a> Page<'a> {
    fn of(figure: &'a Figure, measured: &'a Gateway) -> Self {
        let mut page = Self { figure, measured, shown: Vec::new() };
        let belongs = |series: &&Series| {
            let name = series.quantity.as_str();
            figure.quantities.iter().any(|(quantity, _)| match figure.form {
                Form::Bars(_) => name == *quantity,
                Form::Ranges => name.starts_with(quantity),
            })
        };
        page.shown = systems(page.group().filter(belongs).flat_map(Series::systems));
        page
    }

    /// `None` without measurements.
    fn plot(&self) -> Option<Plot> {
        let Figure { name, title, .. } = *self.figure;
        let svg = match self.figure.form {
            Form::Bars(scale) => self.bars(scale),
            Form::Ranges => self.ranges(),
        }?;
        Some(Plot { name, title: title.to_owned(), svg })
    }

    /// One band for each quantity, one panel for each circumstance.
    fn bars(&self, scale: Scale) -> Option<String> {
        let mut bands = Vec::new();
        for (quantity, heading) in self.figure.quantities {
            let series: Vec<&Series> = self.group().filter(|s| s.quantity == *quantity).collect();
            for (heading, of_row) in rows(&series, heading) {
                let panels = of_row.iter().map(|series| self.bar_panel(series)).collect();
                bands.push(Band { heading, panels });
            }
        }
        let own = if scale == Scale::Own { "; each panel has its own scale" } else { "" };
        let spread = if self.rounds() > 1 { "; a thin line shows their spread" } else { "" };
        let subtitle = format!("{}{spread}{own}", self.values());
        let draw = || bars::draw((self.figure.title, &subtitle), &self.shown, &bands, scale, |s| s.name == "raw");
        (!bands.is_empty()).then(draw)
    }

    /// One band for each quantity, one panel for each circumstance, all quantiles in one.
    fn ranges(&self) -> Option<String> {
        let mut bands = Vec::new();
        for (prefix, heading) in self.figure.quantities {
            let middle = format!("{prefix}p50");
            let of_band = self.group().filter(|series| series.quantity == middle);
            let panels: Vec<ranges::Panel> = of_band.map(|series| self.range_panel(series, prefix)).collect();
            if !panels.is_empty() {
                bands.push(Band { heading: (*heading).to_owned(), panels });
            }
        }
        let marks = "dot: p50, block with its value: p99, right end: p99.9 where measured";
        let subtitle = format!("{marks}; {}", self.values());
        (!bands.is_empty()).then(|| ranges::draw((self.figure.title, &subtitle), &self.shown, &bands))
    }

    fn bar_panel(&self, series: &Series) -> bars::Panel {
        let unit = Shown::fit(&series.unit, self.shown.iter().filter_map(|s| series.median(s.name)));
        let bar = |system: &System| {
            let (median, span) = (series.median(system.name)?, series.span(system.name)?);
            Some(Bar { median, span, text: format!("{} {}", unit.text(median), unit.name) })
        };
        bars::Panel {
            name: circumstances(series),
            bars: self.shown.iter().map(|s| bar(s).ok_or(series.absence(s.name))).collect(),
        }
    }

    fn range_panel(&self, p50: &Series, prefix: &str) -> ranges::Panel {
        let other = |quantile: &str| {
            let quantity = format!("{prefix}{quantile}");
            self.group().find(|series| series.quantity == quantity && series.params == p50.params)
        };
        let (p99, p999) = (other("p99"), other("p99.9"));
        let range = |system: &System| {
            Some(Range {
                p50: p50.median(system.name)?,
                p99: p99?.median(system.name)?,
                p999: p999.and_then(|series| series.median(system.name)),
            })
        };
        ranges::Panel {
            name: circumstances(p50),
            ranges: self.shown.iter().map(|s| range(s).ok_or(p50.absence(s.name))).collect(),
        }
    }

    fn group(&self) -> impl Iterator<Item = &'a Series> + use<'a> {
        let group = self.figure.group;
        self.measured.metrics.iter().filter(move |series| series.group == group)
    }

    fn rounds(&self) -> usize {
        self.measured.metrics.iter().map(Series::rounds).max().unwrap_or_default()
    }

    /// What is shown of the rounds.
    fn values(&self) -> String {
        let rough = if self.measured.quick { " of a rough run" } else { "" };
        match self.rounds() {
            1 => format!("one round{rough}"),
            many => format!("medians of {many} rounds{rough}"),
        }
    }
}

/// Series with two circumstances, streams and loss, get a row of panels for each number of streams; others are one row.
fn rows<'a>(series: &[&'a Series], heading: &str) -> Vec<(String, Vec<&'a Series>)> {
    let mut rows: Vec<(String, Vec<&Series>)> = Vec::new();
    for one in series {
        let heading = match (one.params.get("streams"), one.params.get("loss")) {
            (Some(streams), Some(_)) => counted("streams", streams),
            _ => heading.to_owned(),
        };
        match rows.iter_mut().find(|(known, _)| *known == heading) {
            Some((_, row)) => row.push(one),
            None => rows.push((heading, vec![one])),
        }
    }
    rows
}

/// What the panel is about: the loss if there is one, else what there are so many of.
fn circumstances(series: &Series) -> String {
    if let Some(loss) = series.params.get("loss") {
        return format!("{} % loss", loss.as_f64().unwrap_or_default());
    }
    series.params.iter().map(|(name, value)| counted(name, value)).collect::<Vec<_>>().join(", ")
}

fn counted(name: &str, value: &Value) -> String {
    match value.as_u64() {
        Some(1) => format!("1 {}", name.trim_end_matches('s')),
        Some(many) if many >= 1_000 => format!("{},{:03} {name}", many / 1_000, many % 1_000),
        _ => format!("{value} {name}"),
    }
}
