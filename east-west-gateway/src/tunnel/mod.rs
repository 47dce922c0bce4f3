//! Tunnels between gateways of different clusters (docs/tunnel.md): mutually authenticated links, over QUIC or TCP, each
//! with a control stream and one stream per carried connection.
//!
//! Every gateway dials every gateway of every other active cluster that can be dialled ([`peers`]) and accepts their
//! links ([`accept`]). Either end of a [`link`] opens streams; one that the peer dialled is used when no own one works,
//! as for a peer that cannot be dialled. [`control`] runs a link's control stream by the rules of [`session`].
//! [`registry`] is what the rest of the gateway sees of it: working tunnels, and what their peers say of their clusters.
//! Quinn is known in `link` and nowhere else.

pub(crate) mod accept;
pub(crate) mod control;
mod ending;
pub(crate) mod inbox;
mod lane;
pub(crate) mod link;
mod liveness;
pub(crate) mod outbox;
pub(crate) mod peers;
mod quiet;
pub(crate) mod registry;
pub(crate) mod session;
pub(crate) mod stalled;

use quinn::VarInt;

/// The version in headers and control hellos.
pub(crate) const VERSION: u32 = 1;

/// Why a connection is closed, as the peer sees it: QUIC application error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    /// The gateway has drained, or the link, which another one has replaced.
    Drained,
    /// The peer's cluster is no active member.
    NotAMember,
    /// The peer's cluster left or was revoked while connected.
    Revoked,
    /// No answer to probes.
    Dead,
    /// The peer broke the protocol.
    Protocol,
    /// The peer's address changed, its certificate has ended, or the gateway left its cluster's list.
    Replaced,
    /// Too many connections.
    Overloaded,
}

impl Close {
    const ALL: [Self; 7] =
        [Self::Drained, Self::NotAMember, Self::Revoked, Self::Dead, Self::Protocol, Self::Replaced, Self::Overloaded];

    /// The one that goes by these words.
    fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|why| why.label() == label)
    }

    /// The code on the wire.
    pub(crate) fn code(self) -> VarInt {
        VarInt::from_u32(match self {
            Self::Drained => 0,
            Self::NotAMember => 0x10,
            Self::Revoked => 0x11,
            Self::Dead => 0x12,
            Self::Protocol => 0x13,
            Self::Replaced => 0x14,
            Self::Overloaded => 0x15,
        })
    }

    /// The words that go with it, and its metric label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Drained => "drained",
            Self::NotAMember => "peer_not_a_member",
            Self::Revoked => "peer_revoked",
            Self::Dead => "peer_dead",
            Self::Protocol => "peer_protocol",
            Self::Replaced => "peer_replaced",
            Self::Overloaded => "peer_overload",
        }
    }
}
