//! Whole gateways in one process: real sockets, real QUIC, real TLS, with the view given by the test.

mod adversity;
mod bad_input;
mod carry;
mod drain;
mod endpoints;
mod evidence;
mod feed;
mod flood;
mod grants;
mod handover;
mod limits;
mod links;
mod lock;
mod outcasts;
mod relay;
pub(crate) mod rig;
mod sim;
mod told;
mod traces;
