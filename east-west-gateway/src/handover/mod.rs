//! Upgrading a gateway: a successor starts beside the running one, takes its sockets over, and nothing is dropped.
//!
//! A running gateway serves `<stateDir>/handover.sock` ([`predecessor`]). A gateway started with `--take-over` connects
//! there ([`successor`]); both are checked to be of the same user. It is given every listening socket as a file descriptor
//! ([`wire`]), so that the accept queues are shared: a connection is accepted by one of the two, and none is refused.
//!
//! UDP has no accept queue. Both processes hold the tunnel's UDP socket, both send on it, and at any time one of them
//! reads it ([`socket`]): the predecessor until the handover, the successor after it. QUIC connection IDs tell whose a
//! datagram is, since each process issues them under a key of its own ([`cids`]); the reader passes the other's datagrams
//! on through a pair of Unix datagram sockets ([`relay`]).
//!
//! ```text
//! successor                                   predecessor
//!   TakeOver{key}                →              serves, reads UDP
//!   (prepares: state, listeners, tunnels)  ←    Offer{key}, sockets, relay
//!   Ready                        →              stops reading UDP
//!   reads UDP, accepts           ←              Go; stops accepting, says goaway
//!   Following (the agent's feed) →              ends its own feed
//!                                ← end          running streams have ended, or the deadline is over
//! ```
//!
//! With the sockets goes a descriptor of the state folder's lock ([`lock`]), which both then hold.
//!
//! What holds: until `Go` the predecessor serves as if nobody had asked, whatever becomes of the successor; from `Go` on
//! the successor serves alone if it must. Whoever loses the other reads the UDP socket itself. What is not handed over:
//! connections. Each process ends those that it has.

pub(crate) mod cids;
pub(crate) mod lock;
pub(crate) mod predecessor;
mod relay;
pub(crate) mod shelf;
pub(crate) mod socket;
pub(crate) mod steps;
pub(crate) mod successor;
mod wire;

use std::path::{Path, PathBuf};

/// The version of this protocol. Another one is refused: the upgrade is then a restart.
const VERSION: u32 = 1;

/// Where a gateway with this state directory is asked for its sockets.
pub(crate) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("handover.sock")
}
