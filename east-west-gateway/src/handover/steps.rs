//! How far a gateway is between its predecessor and its successor.
//!
//! Tokens only, each cancelled once and never taken back. A gateway that neither takes over nor is taken over passes the
//! first step as it starts and never comes to the others.

use tokio_util::sync::CancellationToken;

/// The steps of one gateway's life that a handover adds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    /// It accepts connections. Until then they wait in the accept queues, or its predecessor takes them.
    pub(crate) open: CancellationToken,
    /// The agent's feed is connected.
    pub(crate) following: CancellationToken,
    /// The predecessor, if there was one, has ended: this gateway may be succeeded.
    pub(crate) alone: CancellationToken,
    /// The successor serves: nothing new is accepted, and neither agent nor peers are told that this gateway leaves.
    pub(crate) taken_over: CancellationToken,
    /// The agent feeds the successor: this gateway needs no feed.
    pub(crate) feed_over: CancellationToken,
}

impl Steps {
    /// Of a gateway that starts afresh.
    pub(crate) fn afresh() -> Self {
        let steps = Self::default();
        steps.open.cancel();
        steps.alone.cancel();
        steps
    }
}
