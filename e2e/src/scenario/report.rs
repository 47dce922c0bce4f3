//! What a person reads while the demo plays, and the closing table.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

/// Prints steps as they happen; remembers rows for the closing table.
pub struct Report {
    colour: bool,
    started: Instant,
    rows: Vec<Row>,
    failed: usize,
}

/// One line of the closing table.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each field is the column of its name")]
pub struct Row {
    pub step: String,
    pub what: String,
    pub requests: String,
    pub failed: String,
    pub last_affected: String,
    pub served_by: String,
    pub held: bool,
}

impl Report {
    /// Colours only where they will be seen.
    pub fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { colour, started: Instant::now(), rows: vec![], failed: 0 }
    }

    /// A heading.
    pub fn step(&self, number: &str, title: &str) {
        println!("\n{} {}", self.paint("1;36", number), self.paint("1", title));
    }

    /// Something is under way.
    pub fn doing(&self, what: &str) {
        println!("  {} {what}", self.paint("2", &format!("{:6.1}s", self.started.elapsed().as_secs_f32())));
        std::io::stdout().flush().ok();
    }

    /// Something held.
    pub fn good(&self, what: &str) {
        println!("  {:>7} {} {what}", "", self.paint("32", "✓"));
    }

    /// Something did not hold.
    pub fn bad(&mut self, what: &str) {
        self.failed += 1;
        println!("  {:>7} {} {what}", "", self.paint("1;31", "✗"));
    }

    /// A remark.
    pub fn note(&self, what: &str) {
        println!("  {:>7} {}", "", self.paint("2", &format!("· {what}")));
    }

    /// Adds a row to the closing table.
    pub fn row(&mut self, row: Row) {
        self.failed += usize::from(!row.held);
        self.rows.push(row);
    }

    /// A row for a check that is not about load, and held.
    pub fn checked(&mut self, step: &str, what: &str) {
        self.judged(step, what, true);
    }

    /// A row for a check that is not about load.
    pub fn judged(&mut self, step: &str, what: &str, held: bool) {
        let none = || "–".to_owned();
        self.row(Row {
            step: step.to_owned(),
            what: what.to_owned(),
            requests: none(),
            failed: none(),
            last_affected: none(),
            served_by: none(),
            held,
        });
    }

    /// Nothing failed so far.
    pub fn held(&self) -> bool {
        self.failed == 0
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The closing table as text, without colours.
    pub fn table(&self) -> String {
        let head = ["step", "what happened", "requests", "failed", "last affected", "served by", "held"];
        let mut cells: Vec<[String; 7]> = vec![head.map(str::to_owned)];
        // What is judged by load is added when the load has ended, later than what is judged at once.
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        rows.sort_by(|a, b| a.step.cmp(&b.step));
        for r in rows {
            let held = if r.held { "yes" } else { "NO" };
            cells.push([
                r.step.clone(),
                r.what.clone(),
                r.requests.clone(),
                r.failed.clone(),
                r.last_affected.clone(),
                r.served_by.clone(),
                held.to_owned(),
            ]);
        }
        let width = |i: usize| cells.iter().filter_map(|c| c.get(i)).map(|s| s.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let rule: String = widths.iter().map(|w| "─".repeat(w + 2)).collect::<Vec<_>>().join("┼");
        let mut text = String::new();
        for (n, line) in cells.iter().enumerate() {
            let line: Vec<String> = line.iter().zip(&widths).map(|(s, w)| format!(" {s:<w$} ")).collect();
            text += line.join("│").trim_end();
            text.push('\n');
            if n == 0 {
                text += &rule;
                text.push('\n');
            }
        }
        text
    }

    /// Prints the closing table and the verdict.
    pub fn close(&self) {
        if !self.rows.is_empty() {
            println!("\n{}", self.table());
            println!("Requests and failed: GET to cart + orders sessions (what failed, and why, is told above).");
            println!("Last affected: from the fault to the end of the last request that failed or took over 250 ms.");
        }
        println!();
        let took = self.elapsed().as_secs_f32();
        if self.held() {
            println!("{} in {took:.0} s.", self.paint("1;32", "Every step held"));
        } else {
            println!(
                "{} ({took:.0} s).",
                self.paint("1;31", &format!("Not everything held: {} of the checks failed", self.failed))
            );
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}
