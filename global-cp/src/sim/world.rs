//! One schedule: nodes, links, clients and agents, and what happens to them, one step after the other, as its seed decides.

use std::{collections::BTreeMap, ops::AddAssign, sync::Arc};

use isthmus_model::time::Timestamp;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{
    agents::{Agent, Did},
    judge::Judge,
    plan::{self, Plan},
    replica::Replica,
};
use crate::state::{Actor, Batch, Proposal, ProposalId};

/// Steps of a schedule.
const STEPS: u32 = 600;
const AGENTS: usize = 3;
/// Events and answers that the state keeps are more than that.
const MOST_PROPOSALS: u32 = 150;

/// A bug that is planted, to see that it is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Bug {
    /// An entry counts as committed with one node too few.
    CommittedWithoutMajority,
    /// One of an earlier term counts as committed by its copies (Raft, figure 8).
    CommittedOfAnEarlierTerm,
    /// A vote does not survive a crash.
    ForgottenVote,
    /// A candidate that lacks entries is elected.
    VoteForWhoeverAsks,
    /// An acknowledged entry was not on disk.
    UnflushedTail,
    /// A follower keeps what contradicts the leader.
    KeptTail,
    /// A follower counts a snapshot as applied and goes on with its old state.
    SnapshotNotTaken,
    /// A client is told before the entry is committed.
    AcknowledgedEarly,
    /// A repeated proposal gets another id.
    NewIdOnRetry,
    /// A node that has restarted applies what it has applied.
    AppliedTwice,
    /// One node applies an entry's proposals in another order.
    BatchReversed,
    /// Answers go to the wrong proposals of an entry.
    AnswersSwapped,
    /// A delta lacks a service.
    StaleDelta,
    /// A delta goes to somebody who holds something else.
    DeltaOfAnother,
    /// A node that is behind sends an agent what it has.
    SentBack,
    /// A message is dropped, and the session goes on.
    LostMessage,
    /// The publications that are compared are not all.
    OrderMatters,
}

impl Bug {
    pub(super) const ALL: [Self; 17] = [
        Self::CommittedWithoutMajority,
        Self::CommittedOfAnEarlierTerm,
        Self::ForgottenVote,
        Self::VoteForWhoeverAsks,
        Self::UnflushedTail,
        Self::KeptTail,
        Self::SnapshotNotTaken,
        Self::AcknowledgedEarly,
        Self::NewIdOnRetry,
        Self::AppliedTwice,
        Self::BatchReversed,
        Self::AnswersSwapped,
        Self::StaleDelta,
        Self::DeltaOfAnother,
        Self::SentBack,
        Self::LostMessage,
        Self::OrderMatters,
    ];
}

/// How often things happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    fn count(&mut self, what: &'static str) {
        self.0.entry(what).or_default().add_assign(1);
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (what, times) in &other.0 {
            self.0.entry(what).or_default().add_assign(times);
        }
    }
}

/// A proposal whose client waits.
struct Pending {
    proposal: Proposal,
    /// Where it stands: node and its run, term and index, place in the entry.
    placed: Vec<(usize, u64, (u64, u64), usize)>,
}

pub(super) struct World {
    rng: StdRng,
    bug: Option<Bug>,
    nodes: Vec<Replica>,
    /// Many stand for election, and nodes come back soon.
    stormy: bool,
    /// Which hear each other.
    sides: Vec<u8>,
    /// Of each node's clock.
    skews: Vec<i64>,
    now: i64,
    plan: Plan,
    proposed: u32,
    pending: Vec<Pending>,
    agents: Vec<Agent>,
    judge: Judge,
    counts: Counts,
}

impl World {
    pub(super) fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let count = if rng.random_bool(0.7) { 3 } else { 5 };
        let mut world = Self {
            bug,
            stormy: rng.random_bool(0.3),
            nodes: (0..count).map(|_| Replica::new(count)).collect(),
            sides: vec![0; count],
            skews: vec![0; count],
            now: 1_000_000_000,
            plan: Plan::default(),
            proposed: 0,
            pending: Vec::new(),
            agents: (0..AGENTS).map(Agent::new).collect(),
            judge: Judge::default(),
            counts: Counts::default(),
            rng,
        };
        let found = world.proposal(0, plan::found());
        world.pending.push(Pending { proposal: found, placed: Vec::new() });
        world
    }

    /// Runs it to the end: the first thing that does not hold, and what happened.
    pub(super) fn run(mut self) -> (Result<(), String>, Counts) {
        let result = self.all_steps();
        self.counts.count("schedules");
        (result, self.counts)
    }

    fn all_steps(&mut self) -> Result<(), String> {
        for nth in 0..STEPS {
            self.step().map_err(|what| format!("step {nth}: {what}"))?;
        }
        self.end().map_err(|what| format!("at the end: {what}"))
    }

    fn any(&mut self) -> usize {
        self.rng.random_range(0..self.nodes.len())
    }

    /// Mostly one that leads, if there is one.
    fn leading(&mut self) -> usize {
        let leaders: Vec<usize> = (0..self.nodes.len()).filter(|node| self.nodes[*node].leads).collect();
        match leaders.len() {
            0 => self.any(),
            _ if self.rng.random_bool(0.2) => self.any(),
            count => leaders[self.rng.random_range(0..count)],
        }
    }

    fn reach(&self, a: usize, b: usize) -> bool {
        self.sides[a] == self.sides[b] && self.nodes[a].up && self.nodes[b].up
    }

    fn step(&mut self) -> Result<(), String> {
        self.now += self.rng.random_range(0..400);
        let (node, leader) = (self.any(), self.leading());
        match self.rng.random_range(0..1000) {
            0..35 => self.elect(node)?,
            35..150 if self.stormy => self.elect(node)?,
            35..350 => self.replicate(leader)?,
            350..520 => self.apply(node)?,
            520..590 => self.propose(leader)?,
            590..650 => self.retry(leader)?,
            650..700 if self.stormy && !self.nodes[node].up => {
                self.nodes[node].start();
                self.judge.loaded(node, &self.nodes[node])?;
            }
            650..925 => self.agent()?,
            925..945 if self.nodes[node].up && self.nodes[node].applied > self.nodes[node].snapshot.index => {
                let keep = self.rng.random_range(0..6);
                self.nodes[node].take_snapshot(keep);
                self.judge.written(node, &self.nodes[node])?;
                self.counts.count("snapshots");
            }
            945..965 if self.nodes[node].up => {
                self.nodes[node].crash(self.bug);
                self.counts.count("crashes");
            }
            965..983 if !self.nodes[node].up => {
                self.nodes[node].start();
                self.judge.loaded(node, &self.nodes[node])?;
            }
            983..988 => {
                let sides = self.sides.len();
                self.sides = (0..sides).map(|_| self.rng.random_range(0..2)).collect();
                self.counts.count("partitions");
            }
            988..994 => self.sides.fill(0),
            994..997 => {
                self.skews[node] = self.rng.random_range(-40_000_000..40_000_000);
                self.counts.count("clock jumps");
            }
            997..1000 => self.skews[node] = 0,
            _ => {}
        }
        Ok(())
    }

    fn elect(&mut self, node: usize) -> Result<(), String> {
        if !self.nodes[node].up || self.nodes[node].leads {
            return Ok(());
        }
        let (term, last) = self.nodes[node].stand(node);
        let mut votes = 1;
        for other in (0..self.nodes.len()).filter(|other| *other != node) {
            // A request, or its answer, may be lost.
            if self.reach(node, other) && self.rng.random_bool(0.8) {
                let granted = self.nodes[other].vote(node, term, last, self.bug);
                let theirs = self.nodes[other].term;
                self.nodes[node].hear(theirs);
                votes += usize::from(granted && self.rng.random_bool(0.9));
            }
        }
        if votes > self.nodes.len() / 2 && self.nodes[node].term == term {
            self.judge.leads(node, term)?;
            self.nodes[node].lead();
            self.counts.count("elections");
        }
        Ok(())
    }

    fn replicate(&mut self, from: usize) -> Result<(), String> {
        let to = self.any();
        if from == to || !self.nodes[from].leads || !self.reach(from, to) {
            return Ok(());
        }
        let most = self.rng.random_range(0..6);
        self.push(from, to, most)
    }

    fn push(&mut self, from: usize, to: usize, most: usize) -> Result<(), String> {
        let [leader, follower] = self.nodes.get_disjoint_mut([from, to]).unwrap();
        if leader.replicate(follower, to, most, self.bug) {
            self.judge.loaded(to, follower)?;
            self.counts.count("snapshots installed");
        }
        if self.nodes[from].leads {
            self.nodes[from].advance(from, self.bug);
        }
        Ok(())
    }

    fn apply(&mut self, node: usize) -> Result<(), String> {
        for _ in 0..self.rng.random_range(1..5) {
            self.apply_one(node)?;
        }
        Ok(())
    }

    fn apply_one(&mut self, node: usize) -> Result<bool, String> {
        if !self.nodes[node].up {
            return Ok(false);
        }
        let Some((index, entry, answers)) = self.nodes[node].apply(self.bug) else { return Ok(false) };
        self.judge.applied((node, &self.nodes[node]), (index, &entry, &answers))?;
        self.counts.count("entries applied");
        let run = self.nodes[node].run;
        let mut answered = Vec::new();
        self.pending.retain(|pending| {
            let here = |placed: &&(usize, u64, (u64, u64), usize)| {
                (placed.0, placed.1, placed.2) == (node, run, (entry.term, index))
            };
            let Some((.., place)) = pending.placed.iter().find(here) else { return true };
            answered.push((pending.proposal.id, answers.0[*place].clone()));
            false
        });
        for (id, answer) in answered {
            self.counts.count("proposals acknowledged");
            self.judge.acknowledged(id, answer)?;
        }
        Ok(true)
    }

    fn proposal(&mut self, node: usize, command: crate::state::Command) -> Proposal {
        self.proposed += 1;
        let id = ProposalId(self.rng.random());
        Proposal { id, by: Actor::default(), at: self.clock(node), command }
    }

    fn clock(&self, node: usize) -> Timestamp {
        Timestamp(u64::try_from(self.now + self.skews[node]).unwrap())
    }

    /// A client asks `node` for something new.
    fn propose(&mut self, node: usize) -> Result<(), String> {
        if self.proposed >= MOST_PROPOSALS || !self.nodes[node].up {
            return Ok(());
        }
        let mut placed = Vec::new();
        for _ in 0..self.rng.random_range(1..3) {
            let latest = self.nodes[node].view.state().stamp().revision;
            let now = self.clock(node).0;
            let command = self.plan.command(&mut self.rng, now, latest);
            let proposal = self.proposal(node, command);
            self.pending.push(Pending { proposal, placed: Vec::new() });
            placed.push(self.pending.len() - 1);
        }
        self.place(node, &placed)
    }

    /// Clients that have no answer ask `node` again.
    fn retry(&mut self, node: usize) -> Result<(), String> {
        let again: Vec<usize> = (0..self.pending.len()).filter(|_| self.rng.random_bool(0.3)).collect();
        if self.bug == Some(Bug::NewIdOnRetry) {
            for pending in &again {
                self.pending[*pending].proposal.id = ProposalId(self.rng.random());
            }
        }
        self.counts.count("repetitions");
        self.place(node, &again)
    }

    /// If it leads, it appends them, as one entry.
    fn place(&mut self, node: usize, which: &[usize]) -> Result<(), String> {
        if !self.nodes[node].leads || which.is_empty() {
            return Ok(());
        }
        let batch = which.iter().map(|pending| self.pending[*pending].proposal.clone()).collect();
        let at = self.nodes[node].append(Batch(Arc::new(batch)));
        let run = self.nodes[node].run;
        for (place, pending) in which.iter().enumerate() {
            self.pending[*pending].placed.push((node, run, at, place));
            if self.bug == Some(Bug::AcknowledgedEarly) {
                let mut state = self.nodes[node].view.state().clone();
                let alone = Batch(Arc::new(vec![self.pending[*pending].proposal.clone()]));
                let answer = state.apply_batch(&alone).0.0.remove(0);
                self.judge.acknowledged(self.pending[*pending].proposal.id, answer)?;
            }
        }
        Ok(())
    }

    fn agent(&mut self) -> Result<(), String> {
        let agent = self.rng.random_range(0..self.agents.len());
        match self.agents[agent].step(&self.nodes, &mut self.rng, (&mut self.judge, self.bug))? {
            Did::Nothing => {}
            Did::Connected => self.counts.count("sessions"),
            Did::Refused => self.counts.count("sessions refused by a node that is behind"),
            Did::Snapshot => self.counts.count("agents' snapshots"),
            Did::Delta => self.counts.count("agents' deltas"),
        }
        Ok(())
    }

    /// Everybody is up and hears everybody, until all is done.
    fn end(&mut self) -> Result<(), String> {
        self.sides.fill(0);
        for node in 0..self.nodes.len() {
            if !self.nodes[node].up {
                self.nodes[node].start();
                self.judge.loaded(node, &self.nodes[node])?;
            }
        }
        let mut leader = None;
        for _ in 0..1_000 {
            leader = leader.or_else(|| (0..self.nodes.len()).find(|node| self.leads(*node)));
            if leader.is_none() {
                let node = self.any();
                self.elect(node)?;
            }
        }
        let leader = leader.ok_or("nobody is elected")?;
        let all: Vec<usize> = (0..self.pending.len()).collect();
        self.place(leader, &all)?;
        // Twice, so that all hear what is committed.
        for _ in 0..2 {
            for other in (0..self.nodes.len()).filter(|other| *other != leader) {
                self.push(leader, other, usize::MAX)?;
            }
        }
        for node in 0..self.nodes.len() {
            while self.apply_one(node)? {}
        }
        if !self.pending.is_empty() {
            return Err(format!("{} proposals got no answer", self.pending.len()));
        }
        for agent in &mut self.agents {
            agent.settle(&self.nodes[leader], leader, &mut self.judge)?;
        }
        for _ in 0..self.judge.entries() {
            self.counts.count("entries");
        }
        self.judge.ended(&self.nodes, &mut self.rng, self.bug)
    }

    /// It leads in the latest term.
    fn leads(&self, node: usize) -> bool {
        let latest = self.nodes.iter().map(|node| node.term).max();
        self.nodes[node].leads && Some(self.nodes[node].term) == latest
    }
}
