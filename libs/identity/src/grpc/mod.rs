//! gRPC and HTTP over our TLS: an accept loop for tonic and axum that says who the peer is, and client channels.
//!
//! What holds: a handshake has a deadline and at most [`MAX_PENDING`] are under way; a peer that sends garbage, or
//! nothing, holds up nobody else; errors of `accept` never end the loop. Open connections are bounded, those of peers
//! without a certificate apart ([`MAX_STRANGERS`]) and in time ([`STRANGER_LIFETIME`]).

mod admission;
mod client;
mod conn;
mod incoming;

pub use self::{
    admission::{MAX_KNOWN, MAX_STRANGERS, MAX_STRANGERS_PER_SOURCE, STRANGER_LIFETIME},
    client::{connect_lazy, words},
    conn::{PeerInfo, TlsConn},
    incoming::{HANDSHAKE_DEADLINE, Handshakes, MAX_PENDING, TlsIncoming},
};

#[cfg(test)]
mod tests;
