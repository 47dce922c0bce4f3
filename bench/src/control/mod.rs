//! What the benchmarks of the control plane share: three of its nodes as real processes ([`group`]), a client over HTTP/2 and
//! mutual TLS ([`http2`]), and what the kernel says of a process ([`process`]).

pub(crate) mod group;
pub(crate) mod http2;
pub(crate) mod process;
