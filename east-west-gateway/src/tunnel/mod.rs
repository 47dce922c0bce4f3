//! Tunnels between gateways of different clusters (docs/tunnel.md): QUIC connections, mutually authenticated, each with a
//! control stream and one stream per carried connection.
//!
//! Every gateway dials every gateway of every other active cluster ([`peers`]) and accepts their connections
//! ([`accept`]); streams are opened by the dialler only, so each direction's health is judged by the connection that
//! carries it. [`registry`] is what the rest of the gateway sees of it: working tunnels, and what their peers say of
//! their clusters. Quinn is known in this folder, in `frame` and in `splice`, and nowhere else.

pub(crate) mod accept;
pub(crate) mod control;
pub(crate) mod endpoint;
pub(crate) mod inbox;
pub(crate) mod liveness;
pub(crate) mod outbox;
pub(crate) mod peers;
pub(crate) mod registry;

use quinn::VarInt;

/// The protocol's name (ALPN).
pub(crate) const ALPN: &[u8] = b"isthmus-tunnel/1";
/// The version in headers and control hellos.
pub(crate) const VERSION: u32 = 1;

/// Why a connection is closed, as the peer sees it: QUIC application error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    /// The gateway has drained.
    Drained,
    /// The peer's cluster is no active member.
    NotAMember,
    /// The peer's cluster left or was revoked while connected.
    Revoked,
    /// No answer to probes.
    Dead,
    /// The peer broke the protocol.
    Protocol,
    /// Replaced: the peer's address changed, or the gateway left its cluster's list.
    Replaced,
    /// Too many connections.
    Overloaded,
}

impl Close {
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

    /// Closes `connection` so.
    pub(crate) fn apply(self, connection: &quinn::Connection) {
        connection.close(self.code(), self.label().as_bytes());
    }
}
