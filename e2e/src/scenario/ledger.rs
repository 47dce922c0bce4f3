//! What each part of the story did to the load. Faults and windows are noted while it plays; they are judged at the end,
//! when every request has had its outcome.

use std::collections::BTreeSet;

use crate::{
    samples::{Samples, Span, Summary},
    scenario::report::{Report, Row},
    shop::load::{Kind, Sample},
};

/// A stretch of the story, judged as a whole.
#[derive(Clone, Debug)]
pub struct Window {
    /// For example "4".
    pub step: &'static str,
    /// What happened at its start.
    pub what: String,
    /// When it happened: Unix time, milliseconds. What the load saw counts from the end of the window before.
    pub from_ms: u64,
    /// Unix time, milliseconds.
    pub to_ms: u64,
    /// Only these may serve in it.
    pub allowed: Vec<&'static str>,
    /// The last requests must be served by this one.
    pub settles_on: &'static str,
}

/// A moment at which something was killed: sessions under way then may break, and once the far sidecar has answered no
/// proxy may retry them for the app.
#[derive(Clone, Copy, Debug)]
struct Fault {
    before_ms: u64,
    after_ms: u64,
    /// An app died behind a sidecar that lives on. Until its launcher's next probe the sidecar goes on to answer, so a
    /// session may still be opened in vain; this is the time within which that must end.
    blind_ms: u64,
}

/// Less load than this proves nothing.
const MIN_HTTP_PER_SECOND: f64 = 200.0;
const MIN_TCP_PER_SECOND: f64 = 8.0;
/// Probe interval, and the way of its result to the gateways.
const BLIND_MS: u64 = 300;

/// Faults and windows, in order.
#[derive(Debug, Default)]
pub struct Ledger {
    faults: Vec<Fault>,
    windows: Vec<Window>,
}

impl Ledger {
    /// Notes that something was killed between the two times.
    pub fn fault(&mut self, before_ms: u64, after_ms: u64) {
        self.faults.push(Fault { before_ms, after_ms, blind_ms: 0 });
    }

    /// Notes that an app was killed between the two times, and its sidecar was not.
    pub fn app_fault(&mut self, before_ms: u64, after_ms: u64) {
        self.faults.push(Fault { before_ms, after_ms, blind_ms: BLIND_MS });
    }

    /// Notes a finished stretch.
    pub fn window(&mut self, window: Window) {
        self.windows.push(window);
    }

    /// Notes the stretch from the last window to now, in which nothing more is done to anyone.
    pub fn close(&mut self) {
        if let Some(last) = self.windows.last() {
            let Window { step, to_ms, settles_on, .. } = *last;
            let what = "and stays, until the load ends".to_owned();
            let allowed = vec![settles_on];
            self.windows.push(Window { step, what, from_ms: to_ms, to_ms: u64::MAX, allowed, settles_on });
        }
    }

    /// Judges every window and adds its row to the report.
    pub fn judge(&self, samples: &mut Samples, report: &mut Report) -> anyhow::Result<()> {
        report.step("Σ", "What the load saw, request by request");
        let mut since_ms = self.windows.first().map_or(0, |w| w.from_ms);
        for window in &self.windows {
            let span = Span { from_ms: since_ms, fault_ms: window.from_ms, to_ms: window.to_ms };
            since_ms = window.to_ms;
            let http = samples.summary(&[Kind::Http], span)?;
            let tcp = samples.summary(&[Kind::Tcp], span)?;
            let both = samples.summary(&[Kind::Http, Kind::Tcp], span)?;
            let ended_here = |s: &&Sample| span.contains(s.end_ms());
            let sessions = samples.since(Kind::Tcp, 0)?.filter(|s| s.error.is_some()).filter(ended_here);
            let in_flight = sessions.filter(|s| self.was_beyond_retry(s)).count();
            let unexplained = http.failed() + tcp.failed() - in_flight;
            let strangers: BTreeSet<&String> =
                both.clusters.keys().filter(|c| !window.allowed.contains(&c.as_str())).collect();
            // A stretch too short to have a rate proves what little it holds.
            let brief = both.lasted_ms < 1_000;
            let steady = http.per_second() >= MIN_HTTP_PER_SECOND && tcp.per_second() >= MIN_TCP_PER_SECOND;
            let enough = brief || steady;
            if !enough {
                let (http, tcp) = (http.per_second(), tcp.per_second());
                report.note(&format!(
                    "step {}: too little load to tell: {http:.0} GET/s, {tcp:.1} sessions/s",
                    window.step
                ));
            }
            let held = unexplained == 0 && strangers.is_empty() && enough;
            for (kind, sum) in [("GET cart", &http), ("orders session", &tcp)] {
                for (error, n) in &sum.failures {
                    report.note(&format!("step {}: {n} × {kind} failed: {error}", window.step));
                }
            }
            if in_flight > 0 {
                report.note(&format!(
                    "step {}: {in_flight} orders session(s) under way at the kill, or answered by a sidecar whose app had \
                     just died; no retry is legal there",
                    window.step
                ));
            }
            if !strangers.is_empty() {
                report.note(&format!("step {}: served by {strangers:?}, which had no business there", window.step));
            }
            report.row(Row {
                step: window.step.to_owned(),
                what: window.what.clone(),
                requests: format!("{} + {} tcp", http.requests, tcp.requests),
                failed: format!("{} + {}", http.failed(), tcp.failed()),
                last_affected: both.last_affected_ms.map_or_else(|| "none".to_owned(), |ms| format!("{ms} ms")),
                served_by: shares(&both),
                held,
            });
        }
        Ok(())
    }

    /// No retry was legal: it was under way when something was killed, or a sidecar answered it for an app just dead. One
    /// that began later was owed a replay.
    fn was_beyond_retry(&self, sample: &Sample) -> bool {
        let end_ms = sample.end_ms() + 1;
        self.faults.iter().any(|f| sample.start_ms <= f.after_ms + f.blind_ms && end_ms >= f.before_ms)
    }
}

fn shares(sum: &Summary) -> String {
    let mut by_count: Vec<_> = sum.clusters.iter().collect();
    by_count.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    by_count.iter().map(|(cluster, n)| format!("{cluster} {n}")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(start_ms: u64, micros: u64, error: &str) -> Sample {
        Sample { kind: Kind::Tcp, start_ms, micros, cluster: None, caller: None, error: Some(error.to_owned()) }
    }

    #[test]
    fn only_sessions_that_no_proxy_could_retry_are_excused() {
        let mut ledger = Ledger::default();
        ledger.fault(1000, 1010);
        assert!(ledger.was_beyond_retry(&failed(998, 5_000, "confirmation: reset")));
        assert!(!ledger.was_beyond_retry(&failed(1011, 5_000, "confirmation: reset")), "began after the kill");
        assert!(!ledger.was_beyond_retry(&failed(900, 5_000, "confirmation: reset")), "ended before the kill");
        ledger.app_fault(2000, 2010);
        assert!(ledger.was_beyond_retry(&failed(2300, 5_000, "closed before the greeting")), "before the probe");
        assert!(!ledger.was_beyond_retry(&failed(2311, 5_000, "closed before the greeting")), "the probe was due");
    }
}
