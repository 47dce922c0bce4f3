//! Whole gateways in one process: real sockets, real QUIC, real TLS, with the view given by the test.

mod bad_input;
mod carry;
mod drain;
mod evidence;
mod feed;
mod handover;
mod limits;
mod links;
mod outcasts;
mod relay;
mod rig;
mod sim;
mod traces;
