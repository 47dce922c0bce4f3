//! The faults, each begun and ended, with what must hold while it lasts.

use std::time::Duration;

use hyper::StatusCode;
use rand::{RngExt as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    damage,
    place::{
        self,
        Lost::{self, All, Requests},
    },
    rig::{Admin, Group},
};

/// For a node that found its disk full, or its log damaged, to end.
const ENDS: Duration = Duration::from_secs(15);

/// For a node to take part again.
const RECOVERS: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

/// What is done to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    KillLeader,
    KillFollower,
    KillAll,
    KillMajority,
    PauseLeader,
    PauseFollower,
    /// The leader alone on one side.
    LeaderAlone,
    /// A follower alone on one side.
    FollowerAlone,
    /// Each alone.
    AllAlone,
    /// The leader's requests to another node are lost.
    LeaderUnheardByOne,
    /// The leader's requests are lost; it is reached by all.
    LeaderUnheard,
    /// A follower gets nothing, and is heard.
    DeafFollower,
    /// Two nodes do not reach each other; the third one reaches both.
    PairApart,
    FullLeader,
    FullFollower,
    TornTail,
    FlippedBit,
    ClockAhead,
    ClockBehind,
}

impl Fault {
    pub(crate) const ALL: [Self; 19] = [
        Self::KillLeader,
        Self::KillFollower,
        Self::KillAll,
        Self::KillMajority,
        Self::PauseLeader,
        Self::PauseFollower,
        Self::LeaderAlone,
        Self::FollowerAlone,
        Self::AllAlone,
        Self::LeaderUnheardByOne,
        Self::LeaderUnheard,
        Self::DeafFollower,
        Self::PairApart,
        Self::FullLeader,
        Self::FullFollower,
        Self::TornTail,
        Self::FlippedBit,
        Self::ClockAhead,
        Self::ClockBehind,
    ];

    /// All in an order by chance.
    pub(crate) fn shuffled(rng: &mut StdRng) -> Vec<Self> {
        let mut all = Self::ALL.to_vec();
        all.shuffle(rng);
        all
    }

    pub(crate) fn what(self) -> &'static str {
        match self {
            Self::KillLeader => "kill -9 of the leader",
            Self::KillFollower => "kill -9 of a follower",
            Self::KillAll => "kill -9 of all",
            Self::KillMajority => "kill -9 of a majority",
            Self::PauseLeader => "SIGSTOP of the leader",
            Self::PauseFollower => "SIGSTOP of a follower",
            Self::LeaderAlone => "partition: the leader alone",
            Self::FollowerAlone => "partition: a follower alone",
            Self::AllAlone => "partition: each node alone",
            Self::LeaderUnheardByOne => "one-way: a follower does not hear the leader",
            Self::LeaderUnheard => "one-way: nobody hears the leader",
            Self::DeafFollower => "one-way: a follower hears nobody",
            Self::PairApart => "partition: two nodes apart, the third one reaches both",
            Self::FullLeader => "full disk of the leader",
            Self::FullFollower => "full disk of a follower",
            Self::TornTail => "kill -9 and a torn end of the log",
            Self::FlippedBit => "kill -9 and a flipped bit on disk, the node replaced",
            Self::ClockAhead => "a clock hours ahead",
            Self::ClockBehind => "a clock hours behind",
        }
    }

    /// Begins and ends it.
    pub(crate) async fn happen(self, group: &mut Group, rng: &mut StdRng) {
        let count = group.nodes.len();
        let any = rng.random_range(0..count);
        let leader = group.leader().await.unwrap_or(any);
        let follower = (leader + rng.random_range(1..count)) % count;
        let away = Duration::from_millis(rng.random_range(200..2_500));
        match self {
            Self::KillLeader => kill(group, &[leader], away).await,
            Self::KillFollower => kill(group, &[follower], away).await,
            Self::KillAll => kill(group, &(0..count).collect::<Vec<_>>(), away).await,
            Self::KillMajority => kill(group, &[any, (any + 1) % count], away).await,
            Self::PauseLeader => pause(group, leader, away).await,
            Self::PauseFollower => pause(group, follower, away).await,
            Self::LeaderAlone => part(group, &alone(group, leader), &[leader], away).await,
            Self::FollowerAlone => part(group, &alone(group, follower), &[follower], away).await,
            Self::AllAlone => {
                let cuts: Vec<_> = (0..count).flat_map(|node| alone(group, node)).collect();
                part(group, &cuts, &(0..count).collect::<Vec<_>>(), away).await;
            }
            Self::LeaderUnheardByOne => {
                let cuts = [(group.nodes[leader].number, group.nodes[follower].number, Requests)];
                part(group, &cuts, &[], away * 3).await;
            }
            Self::LeaderUnheard => {
                let cuts: Vec<_> = alone(group, leader)
                    .into_iter()
                    .filter(|(from, _, _)| *from == group.nodes[leader].number)
                    .map(|(from, to, _)| (from, to, Requests))
                    .collect();
                part(group, &cuts, &[], away * 3).await;
            }
            Self::DeafFollower => {
                let to = group.nodes[follower].number;
                let cuts: Vec<_> = alone(group, follower).into_iter().filter(|cut| cut.1 == to).collect();
                part(group, &cuts, &[], away * 3).await;
            }
            Self::PairApart => {
                let (a, b) = (group.nodes[leader].number, group.nodes[follower].number);
                part(group, &[(a, b, All), (b, a, All)], &[], away * 3).await;
            }
            Self::FullLeader => full(group, leader).await,
            Self::FullFollower => full(group, follower).await,
            Self::TornTail => {
                group.nodes[any].process.kill().await.unwrap();
                sleep(away).await;
                damage::tear(&group.nodes[any].state, rng);
                group.nodes[any].process.start().unwrap();
                group.nodes[any].process.ready(RECOVERS).await.unwrap();
            }
            Self::FlippedBit => flipped(group, any, rng).await,
            Self::ClockAhead | Self::ClockBehind => {
                let hours = rng.random_range(2..12);
                group.nodes[any].set_clock(if self == Self::ClockAhead { hours } else { -hours });
                sleep(away + Duration::from_secs(2)).await;
                group.nodes[any].set_clock(0);
            }
        }
    }
}

async fn kill(group: &mut Group, victims: &[usize], away: Duration) {
    for victim in victims {
        group.nodes[*victim].process.kill().await.unwrap();
    }
    sleep(away).await;
    for victim in victims {
        group.nodes[*victim].process.start().unwrap();
    }
}

async fn pause(group: &mut Group, victim: usize, away: Duration) {
    group.nodes[victim].process.signal("STOP");
    sleep(away).await;
    group.nodes[victim].process.signal("CONT");
}

/// All links of `node` cut.
fn alone(group: &Group, node: usize) -> Vec<(u8, u8, Lost)> {
    let own = group.nodes[node].number;
    let others = group.nodes.iter().map(|other| other.number).filter(|other| *other != own);
    others.flat_map(|other| [(own, other, All), (other, own, All)]).collect()
}

/// Makes the cuts. Each node of `minorities` acknowledges no write then, and serves no read but stale ones.
async fn part(group: &Group, cuts: &[(u8, u8, Lost)], minorities: &[usize], away: Duration) {
    place::cut(cuts);
    let mut asked = JoinSet::new();
    for node in minorities {
        let node = &group.nodes[*node];
        asked.spawn(refuses(node.name.clone(), node.client()));
    }
    sleep(away).await;
    while let Some(refused) = asked.join_next().await {
        refused.unwrap();
    }
    place::cut(&[]);
}

/// A node without a majority.
async fn refuses(name: String, admin: Admin) {
    let write = admin.call("POST", "/v1/nodes/never/join-token", "");
    let (write, read) = tokio::join!(write, admin.call("GET", "/v1/snapshot", ""));
    // No answer at all comes from a process that has not yet recovered from the fault before.
    for (what, answer) in [("write", write), ("read", read)] {
        if let Ok((status, body)) = answer {
            let refused = matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT);
            assert!(refused, "{name} has no majority, and answered a {what} with {status} {body}");
        }
    }
    let served = async {
        while admin.get("/v1/snapshot?consistency=stale").await.is_err() {
            sleep(LOOK).await;
        }
    };
    assert!(timeout(ENDS, served).await.is_ok(), "{name} serves no stale read without a majority");
}

/// The disk is full for a while. A node that has to write more stops, says why, and does not start before there is room.
async fn full(group: &mut Group, victim: usize) {
    let node = &mut group.nodes[victim];
    place::fill(&node.state);
    let ended = node.process.wait(Duration::from_secs(6)).await;
    if let Ok(status) = ended {
        assert!(!status.success(), "{} took a full disk for nothing", node.name);
        assert!(node.process.tail().contains("No space left on device"), "{}", node.process.tail());
        node.process.start().unwrap();
        let status = node.process.wait(ENDS).await.unwrap();
        let tail = node.process.tail();
        assert!(!status.success() && tail.contains("free space on the disk"), "{}: {tail}", node.name);
    }
    place::free(&node.state);
    if !node.process.is_running() {
        node.process.start().unwrap();
    }
}

/// A bit of the log is another one than was written: the node does not start and says where; the group goes on without it,
/// and with the one that takes its place.
async fn flipped(group: &mut Group, victim: usize, rng: &mut StdRng) {
    let node = &mut group.nodes[victim];
    node.process.kill().await.unwrap();
    let flipped = damage::flip(&node.state, rng);
    node.process.start().unwrap();
    let Some(says) = flipped else { return };
    let status = node.process.wait(ENDS).await.unwrap();
    let tail = node.process.tail();
    assert!(!status.success() && tail.contains(&says) && tail.contains("cp remove"), "{says:?}: {tail}");
    group.replace(victim).await;
}
