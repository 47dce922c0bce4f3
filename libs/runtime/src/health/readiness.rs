//! Whether a process may be given traffic: gates that its parts open, and the drain that closes them all.

use std::sync::Arc;

use tokio::sync::watch;

/// Ready when every gate is open and no drain has begun; without gates, at once. Clones share the state.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    state: Arc<watch::Sender<State>>,
}

/// One thing that must be in place, such as the first snapshot. A gate dropped while closed stays closed.
#[derive(Debug)]
pub struct Gate {
    readiness: Readiness,
    index: usize,
}

#[derive(Debug, Default)]
struct State {
    draining: bool,
    gates: Vec<(&'static str, Option<String>)>,
}

impl Readiness {
    /// Without gates.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a gate, closed.
    pub fn gate(&self, name: &'static str) -> Gate {
        let mut index = 0;
        self.state.send_modify(|state| {
            index = state.gates.len();
            state.gates.push((name, Some("not yet".to_owned())));
        });
        Gate { readiness: self.clone(), index }
    }

    /// Makes the process unready for good: the first step of a drain.
    pub fn begin_drain(&self) {
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.draining, true));
    }

    /// Whether the process may be given traffic.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().is_ready()
    }

    /// The names of the gates that are closed, in the order they were added.
    pub fn pending(&self) -> Vec<&'static str> {
        self.state.borrow().closed().map(|(name, _)| name).collect()
    }

    /// Resolves once the process is ready. Cancel-safe; give it a deadline.
    pub async fn ready(&self) {
        // The sender lives in `self`, so the channel cannot close meanwhile.
        let _ = self.state.subscribe().wait_for(State::is_ready).await;
    }

    /// What `/readyz` answers while unready: a line for the drain and for each closed gate, with the reason.
    pub(super) fn report(&self) -> String {
        let state = self.state.borrow();
        let mut report = String::from("not ready\n");
        if state.draining {
            report.push_str("draining\n");
        }
        for (name, why) in state.closed() {
            report.push_str(&format!("pending {name}: {why}\n"));
        }
        report
    }
}

impl Gate {
    /// Opens the gate.
    pub fn ready(&self) {
        self.set(None);
    }

    /// Closes it, with a reason that `/readyz` shows.
    pub fn unready(&self, why: &str) {
        self.set(Some(why.to_owned()));
    }

    fn set(&self, closed: Option<String>) {
        self.readiness.state.send_if_modified(|state| match state.gates.get_mut(self.index) {
            Some((_, current)) if *current != closed => {
                *current = closed;
                true
            }
            _ => false,
        });
    }
}

impl State {
    fn is_ready(&self) -> bool {
        !self.draining && self.closed().next().is_none()
    }

    fn closed(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.gates.iter().filter_map(|(name, why)| Some((*name, why.as_deref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_only_when_every_gate_is_open() {
        let readiness = Readiness::new();
        let (snapshot, tunnels) = (readiness.gate("snapshot"), readiness.gate("tunnels"));
        assert_eq!(readiness.pending(), ["snapshot", "tunnels"]);
        snapshot.ready();
        assert!(!readiness.is_ready());
        tunnels.ready();
        assert!(readiness.is_ready());
        assert!(readiness.pending().is_empty());
    }

    #[test]
    fn a_gate_that_closes_again_tells_why() {
        let readiness = Readiness::new();
        let gate = readiness.gate("envoy");
        gate.ready();
        gate.unready("exited with status 1");
        assert!(!readiness.is_ready());
        assert_eq!(readiness.report(), "not ready\npending envoy: exited with status 1\n");
    }

    #[test]
    fn a_drain_is_unready_whatever_the_gates_say() {
        let readiness = Readiness::new();
        let gate = readiness.gate("snapshot");
        readiness.begin_drain();
        gate.ready();
        assert!(!readiness.is_ready());
        assert_eq!(readiness.report(), "not ready\ndraining\n");
    }

    #[tokio::test]
    async fn waiting_ends_when_the_last_gate_opens() {
        let readiness = Readiness::new();
        let gate = readiness.gate("snapshot");
        let waiting = readiness.ready();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        gate.ready();
        waiting.await;
    }
}
