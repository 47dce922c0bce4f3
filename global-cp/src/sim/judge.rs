//! What must hold, whatever happened: checked whenever an entry is applied, an agent is shown a state, or a proposal is
//! acknowledged, and at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use isthmus_model::{
    global::{ClusterState, GlobalService, GlobalSnapshot},
    ids::{ClusterName, ServiceName, Stamp},
    time::Timestamp,
};
use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};

use super::{
    plan,
    replica::{Entry, Replica},
    world::Bug,
};
use crate::state::{Actor, Answers, Batch, Command, Proposal, ProposalId, Publish, Response, State};

/// What was decided at each index, by whoever applied it first.
#[derive(Debug, Default)]
pub(super) struct Judge {
    decided: Vec<Decided>,
    first_answers: BTreeMap<ProposalId, Response>,
    acknowledged: BTreeMap<ProposalId, Response>,
    shown: BTreeMap<Stamp, Arc<GlobalSnapshot>>,
    services: Numbers<ServiceName>,
    clusters: Numbers<ClusterName>,
    leaders: BTreeMap<u64, usize>,
}

#[derive(Debug)]
struct Decided {
    entry: Entry,
    answers: Answers,
    state: Arc<State>,
}

/// Numbers that never move, and that no two share.
#[derive(Debug)]
struct Numbers<T> {
    of: BTreeMap<T, u32>,
    owners: BTreeMap<u32, T>,
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self { of: BTreeMap::new(), owners: BTreeMap::new() }
    }
}

impl<T: Ord + Clone + std::fmt::Display> Numbers<T> {
    fn see(&mut self, name: &T, number: u32) -> Result<(), String> {
        let held = *self.of.entry(name.clone()).or_insert(number);
        let owner = self.owners.entry(number).or_insert_with(|| name.clone());
        match () {
            () if held != number => Err(format!("the index of {name} moved from {held} to {number}")),
            () if owner != name => Err(format!("{owner} and {name} share the index {number}")),
            () => Ok(()),
        }
    }
}

impl Judge {
    /// `node` leads in `term`.
    pub(super) fn leads(&mut self, node: usize, term: u64) -> Result<(), String> {
        let leader = *self.leaders.entry(term).or_insert(node);
        if leader == node { Ok(()) } else { Err(format!("term {term} has the leaders {leader} and {node}")) }
    }

    /// `node` has applied `entry` at `index`.
    pub(super) fn applied(
        &mut self,
        (node, replica): (usize, &Replica),
        (index, entry, answers): (u64, &Entry, &Answers),
    ) -> Result<(), String> {
        let nth = usize::try_from(index - 1).unwrap();
        let state = replica.view.state();
        let Some(decided) = self.decided.get(nth) else {
            if nth > self.decided.len() {
                return Err(format!("node {node} applied {index}, and nobody {}", self.decided.len() + 1));
            }
            return self.decide(entry, answers, state);
        };
        let differs = |what: &str| Err(format!("node {node} has another {what} at {index} than whoever was first"));
        match () {
            () if decided.entry != *entry => differs("entry"),
            () if decided.answers != *answers => differs("answer"),
            () if *decided.state != *state => differs("state"),
            () => Ok(()),
        }
    }

    fn decide(&mut self, entry: &Entry, answers: &Answers, state: &State) -> Result<(), String> {
        let before = self.decided.last().map(|decided| decided.state.clone()).unwrap_or_default();
        if before.clock() > state.clock() {
            return Err(format!("time went back from {:?} to {:?}", before.clock(), state.clock()));
        }
        let fresh = |proposal: &&Proposal| !self.first_answers.contains_key(&proposal.id);
        let fresh: BTreeSet<ProposalId> = entry.batch.0.iter().filter(fresh).map(|proposal| proposal.id).collect();
        let (events, events_before) = (state.events().count(), before.events().count());
        if events - events_before != fresh.len() {
            let effects = events - events_before;
            return Err(format!("{} new proposals had {effects} effects", fresh.len()));
        }
        for (proposal, answer) in entry.batch.0.iter().zip(&answers.0) {
            let first = self.first_answers.entry(proposal.id).or_insert_with(|| answer.clone());
            if first != answer {
                return Err(format!("{:?} was answered {first:?}, and then {answer:?}", proposal.id));
            }
        }
        let outcome = |answer: &Response| matches!(answer, Response::Accepted(outcome) if outcome.changed);
        let changes =
            entry.batch.0.iter().zip(&answers.0).filter(|(p, answer)| fresh.contains(&p.id) && outcome(answer));
        let steps = state.stamp().revision.0 - before.stamp().revision.0;
        if steps != changes.count() as u64 {
            return Err(format!("the revision went on by {steps}, which the answers do not tell"));
        }
        if let Some(global) = state.global().filter(|_| state.stamp() != before.stamp()) {
            if global.stamp <= before.stamp() && before.global().is_some() {
                return Err(format!("the stamp went from {} to {}", before.stamp(), global.stamp));
            }
            global.check().map_err(|error| error.to_string())?;
            self.numbers(global)?;
            self.shown.insert(global.stamp, global.clone());
        }
        self.decided.push(Decided { entry: entry.clone(), answers: answers.clone(), state: Arc::new(state.clone()) });
        Ok(())
    }

    fn numbers(&mut self, global: &GlobalSnapshot) -> Result<(), String> {
        for service in global.services.values() {
            self.services.see(&service.name, service.index.0)?;
        }
        for cluster in global.clusters.values() {
            self.clusters.see(&cluster.name, u32::from(cluster.index.0))?;
        }
        Ok(())
    }

    /// `node` holds what a snapshot of `index` says.
    pub(super) fn loaded(&self, node: usize, replica: &Replica) -> Result<(), String> {
        let Some(nth) = usize::try_from(replica.applied).unwrap().checked_sub(1) else { return Ok(()) };
        let Some(decided) = self.decided.get(nth) else {
            return Err(format!("node {node} has a snapshot of {}, which nobody applied", replica.applied));
        };
        if *decided.state == *replica.view.state() {
            return Ok(());
        }
        Err(format!("node {node} has another state than was applied at {}", replica.applied))
    }

    /// Bytes are the same wherever they are written.
    pub(super) fn written(&self, node: usize, replica: &Replica) -> Result<(), String> {
        let nth = usize::try_from(replica.snapshot.index - 1).unwrap();
        let decided = self.decided.get(nth).ok_or("a snapshot of what nobody applied")?;
        if serde_json::to_vec(&*decided.state).unwrap() == *replica.snapshot.bytes {
            return Ok(());
        }
        Err(format!("node {node} wrote other bytes for {}", replica.snapshot.index))
    }

    /// A client was told what became of its proposal.
    pub(super) fn acknowledged(&mut self, id: ProposalId, answer: Response) -> Result<(), String> {
        let before = self.acknowledged.entry(id).or_insert_with(|| answer.clone());
        if *before == answer { Ok(()) } else { Err(format!("{id:?} was acknowledged with two answers")) }
    }

    /// An agent holds `state`.
    pub(super) fn shown(&mut self, agent: usize, state: &GlobalSnapshot) -> Result<(), String> {
        self.numbers(state)?;
        match self.shown.get(&state.stamp) {
            Some(known) if **known == *state => Ok(()),
            Some(_) => Err(format!("agent {agent} holds another state {} than was applied", state.stamp)),
            None => Err(format!("agent {agent} holds {}, which nobody applied", state.stamp)),
        }
    }

    pub(super) fn entries(&self) -> usize {
        self.decided.len()
    }

    /// All is applied everywhere.
    pub(super) fn ended(&self, nodes: &[Replica], rng: &mut StdRng, bug: Option<Bug>) -> Result<(), String> {
        let last = self.decided.last().ok_or("nothing was decided")?;
        let bytes = serde_json::to_vec(&*last.state).unwrap();
        for (node, replica) in nodes.iter().enumerate() {
            if serde_json::to_vec(replica.view.state()).unwrap() != bytes {
                return Err(format!("node {node} differs in the end"));
            }
        }
        for (id, answer) in &self.acknowledged {
            match self.first_answers.get(id) {
                None => return Err(format!("{id:?} was acknowledged and is lost")),
                Some(first) if first != answer => {
                    return Err(format!("{id:?} was acknowledged with {answer:?}, and decided with {first:?}"));
                }
                Some(_) => {}
            }
        }
        if last.state.events().count() != self.first_answers.len() {
            return Err("the events are not those of the proposals that were decided".to_owned());
        }
        self.order_free(&last.state, rng, bug)
    }

    /// The services are what they would be if the latest publications alone had come, in any order: the order of arrival does
    /// not matter, and what was withdrawn is as if it had never been.
    fn order_free(&self, end: &State, rng: &mut StdRng, bug: Option<Bug>) -> Result<(), String> {
        let (mut state, mut latest) = (State::default(), BTreeMap::new());
        let mut nth = 0_u64;
        let mut seen = BTreeSet::new();
        for decided in &self.decided {
            for (proposal, answer) in decided.entry.batch.0.iter().zip(&decided.answers.0) {
                if !seen.insert(proposal.id) {
                    continue;
                }
                let accepted = matches!(answer, Response::Accepted(_));
                match &proposal.command {
                    Command::Publish(publish) => {
                        if accepted {
                            latest.insert(publish.cluster.clone(), publish.clone());
                            nth += 1;
                            propose(&mut state, nth, plan::wait_until(publish.now, nth));
                        }
                    }
                    command => {
                        nth += 1;
                        propose(&mut state, nth, command.clone());
                    }
                }
            }
        }
        let mut latest: Vec<Publish> = latest.into_values().collect();
        latest.shuffle(rng);
        let missing =
            if bug == Some(Bug::OrderMatters) { rng.random_range(0..latest.len().max(1)) } else { usize::MAX };
        for (place, publish) in latest.into_iter().enumerate() {
            let revoked = end.global().and_then(|g| g.clusters.get(&publish.cluster)).map(|c| c.state);
            if revoked == Some(ClusterState::Active) && place != missing {
                nth += 1;
                let now = Timestamp(publish.now.0);
                propose(&mut state, nth, Command::Publish(Publish { now, ..publish }));
            }
        }
        let (found, expected) = (services(&state), services(end));
        if found == expected {
            return Ok(());
        }
        let differs = found.iter().zip(&expected).find(|(found, expected)| found != expected);
        Err(format!("in another order services would be others, for example (found, expected): {differs:?}"))
    }
}

fn propose(state: &mut State, nth: u64, command: Command) {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&nth.to_le_bytes());
    let proposal = Proposal { id: ProposalId(id), by: Actor::default(), at: Timestamp(0), command };
    state.apply_batch(&Batch(Arc::new(vec![proposal])));
}

/// But for their numbers, which tell who was first.
fn services(state: &State) -> Vec<GlobalService> {
    let Some(global) = state.global() else { return Vec::new() };
    let without =
        |service: &Arc<GlobalService>| GlobalService { index: Default::default(), ..service.as_ref().clone() };
    global.services.values().map(without).collect()
}
