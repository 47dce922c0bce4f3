//! Which of the agents that claim to be a cluster's is believed: the one that began to publish last.
//!
//! An agent makes up an incarnation whenever it begins to publish for its cluster. A new one takes over from the one before,
//! which is fenced from then on: a copy of a machine, or an agent that was thought dead, cannot make exports flap.

use std::collections::VecDeque;

use isthmus_model::ids::ClusterName;
use serde::{Deserialize, Serialize};

use super::Rejection;

/// Fenced incarnations that are remembered for each cluster.
const REMEMBERED: usize = 16;

/// A random number that an agent makes up when it begins to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Incarnation(pub [u8; 16]);

/// Who publishes for a cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Publisher {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    now: Option<Incarnation>,
    /// The latest at the back.
    #[serde(default, skip_serializing_if = "VecDeque::is_empty")]
    fenced: VecDeque<Incarnation>,
}

impl Publisher {
    /// Is it `incarnation` already? An agent that tells none is of a version that knows of none.
    pub(super) fn is(&self, incarnation: Option<Incarnation>) -> bool {
        incarnation.is_none() || self.now == incarnation
    }

    /// After a publication of `incarnation`; refused if that one is fenced.
    pub(super) fn followed_by(&self, cluster: &ClusterName, next: Option<Incarnation>) -> Result<Self, Rejection> {
        let mut after = self.clone();
        let Some(next) = next.filter(|next| self.now != Some(*next)) else { return Ok(after) };
        if self.fenced.contains(&next) {
            return Err(Rejection::Fenced { cluster: cluster.clone() });
        }
        after.fenced.extend(after.now.replace(next));
        if after.fenced.len() > REMEMBERED {
            after.fenced.pop_front();
        }
        Ok(after)
    }
}

impl TryFrom<String> for Incarnation {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl From<Incarnation> for String {
    fn from(incarnation: Incarnation) -> Self {
        hex::encode(incarnation.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_to_begin_publishes_and_those_before_are_fenced() {
        let cluster: ClusterName = "us-east".parse().unwrap();
        let [first, second] = [1, 2].map(|n| Some(Incarnation([n; 16])));
        let publisher = Publisher::default().followed_by(&cluster, first).unwrap();
        assert!(publisher.is(first) && publisher.is(None));
        assert_eq!(publisher.followed_by(&cluster, first).unwrap(), publisher, "it goes on");
        let publisher = publisher.followed_by(&cluster, second).unwrap();
        assert!(publisher.is(second) && !publisher.is(first));
        assert!(matches!(publisher.followed_by(&cluster, first), Err(Rejection::Fenced { .. })));
    }

    #[test]
    fn what_is_remembered_of_the_past_is_bounded() {
        let cluster: ClusterName = "us-east".parse().unwrap();
        let mut publisher = Publisher::default();
        for n in 0..100 {
            publisher = publisher.followed_by(&cluster, Some(Incarnation([n; 16]))).unwrap();
        }
        assert_eq!(publisher.fenced.len(), REMEMBERED);
        assert!(publisher.followed_by(&cluster, Some(Incarnation([98; 16]))).is_err());
    }
}
