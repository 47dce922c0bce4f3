//! What is measured, by name: units, which way is good, and the goals, all of them absolute.

use super::measure::Seen;
use crate::report::{Better, Contest, Goal, Metric, samples::Samples, table::Column};

pub(super) const OURS: &str = "ours";
pub(super) const CONTEST: Contest = Contest { ours: &[OURS], rivals: &[] };
pub(super) const COLUMNS: [Column; 1] = [Column { system: OURS, title: "ours" }];
pub(super) const GROUPS: [(&str, &str); 1] =
    [("agents", "Agents with 100 exports each, a control plane of three nodes")];

/// At which size the goals count.
const JUDGED: u16 = 1_000;
const CHANGE_MICROS: f64 = 250_000.0;
const NODE_BYTES: f64 = 1_073_741_824.0;
const AGENT_BYTES: f64 = 102_400.0;

fn metric(quantity: &str, unit: &'static str, agents: u16, limit: Option<f64>) -> Metric {
    let goal = limit.filter(|_| agents == JUDGED).map(|limit| Goal { ours: OURS, rivals: &[], limit });
    Metric {
        group: "agents",
        quantity: quantity.to_owned(),
        params: [("agents", agents.into())].into(),
        unit,
        better: Better::Lower,
        goals: goal.into_iter().collect(),
    }
}

pub(super) fn add(samples: &mut Samples, agents: u16, seen: &Seen) {
    let mut add = |quantity: &str, unit, limit, value| samples.add(&metric(quantity, unit, agents, limit), OURS, value);
    add("join of all", "s", None, seen.join);
    add("first publications, until all are in sync", "s", None, seen.sync);
    add("one change, until the last agent has it, p50", "µs", None, seen.change.p50);
    add("one change, until the last agent has it, p99", "µs", Some(CHANGE_MICROS), seen.change.p99);
    add("memory of a node", "bytes", Some(NODE_BYTES), seen.resident);
    add("memory of a node, at its peak", "bytes", None, seen.peak);
    add("memory of an idle session", "bytes", None, seen.session);
}

/// What a node's memory grew by for each agent more, above the next smaller size.
pub(super) fn per_agent(agents: u16) -> Metric {
    metric("memory of a node for each further agent", "bytes", agents, Some(AGENT_BYTES))
}
