//! The domain of Isthmus, pure: ids, exports and their merge into global services, locality and failover choice,
//! availability, names on the wire (SNI, VIP). No IO, no clock, no tokio, tonic or kube: time comes in as a value.
//!
//! Every decision that more than one part makes lives here once: [`merge`] (control plane), [`failover::choose`]
//! (agent, gateway, DNS, `isthmusctl explain`), [`access::may_use`] (both gateways of a connection), [`sni`] (agent and gateway), [`vip`] (agent and DNS).

pub mod access;
pub mod availability;
pub mod failover;
pub mod global;
pub mod grant;
pub mod ids;
pub mod local;
pub mod merge;
pub mod service;
pub mod sni;
pub mod time;
pub mod vip;
