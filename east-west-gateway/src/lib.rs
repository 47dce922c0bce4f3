//! isthmus-gateway: carries connections between clusters without reading them.
//!
//! A local sidecar's TLS connection comes in ([`ingress`]), its ClientHello is peeked for the server name ([`hello`]), a
//! cluster is chosen by evidence ([`observed`], [`choose`]), and the bytes go through a QUIC tunnel ([`tunnel`]) to a
//! gateway over there, which hands them to an endpoint ([`egress`]). Until the endpoint's first byte comes back the
//! ClientHello can be replayed elsewhere. [`availability`] knows the own endpoints, [`feed`] the agent.
//!
//! [`build`] binds, [`Bound::run`] serves; main and tests use both. [`take_over`] binds, too, but first asks a running
//! gateway for its sockets ([`handover`]). Deliberately absent: workload keys, plaintext, and any
//! decision about order or policy, which is `isthmus_model`'s.

mod access;
mod availability;
mod beginning;
mod choose;
mod clock;
pub mod config;
mod core;
mod debug;
mod drain;
mod egress;
mod feed;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod handover;
mod hello;
mod ingress;
mod metrics;
mod observed;
mod overload;
mod serve;
mod shares;
mod splice;
mod standing;
#[cfg(any(test, feature = "fuzzing"))]
mod testkit;
#[cfg(test)]
mod tests;
mod tunnel;
mod view;

pub use crate::{
    beginning::BuildError,
    config::Config,
    debug::Inspector,
    feed::{Feed, Given},
    handover::{lock::LockError, successor::TakeOverError},
    serve::{Bound, RunError, build, take_over},
    tunnel::registry::TunnelInfo,
    view::View,
};
