//! What the client is told and what it answers: one JSON line each.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::histogram::Summary;

/// Where to connect, and as whose client.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    /// The server name in the ClientHello.
    pub(crate) name: String,
}

/// Which way bulk data goes, seen from the client.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    Down,
    Up,
}

/// Seconds before measuring begins, and while it lasts.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Span {
    pub(crate) warm: f64,
    pub(crate) measure: f64,
}

/// One piece of work.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub(crate) enum Command {
    /// Opens echo connections, some at a time, and keeps them. Answer: [`Opened`].
    Open { target: Target, connections: usize, at_once: usize },
    /// Closes them. Answer: [`Opened`].
    Close,
    /// On every open connection one request after the other. Answer: [`Exchanged`].
    Closed { span: Span },
    /// Requests at a fixed rate over all open connections in turn, whatever comes back. Answer: [`Exchanged`].
    Paced { span: Span, rate: f64 },
    /// As many bytes as go. Answer: [`Moved`].
    Bulk { target: Target, streams: usize, way: Way, span: Span },
    /// New connections, from connect to greeting, so many at a time. Answer: [`Connected`].
    Connect { target: Target, at_once: usize, span: Span },
}

/// How many connections are open now.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Opened {
    pub(crate) open: usize,
    pub(crate) seconds: f64,
    /// Attempts that came to nothing.
    pub(crate) failed: u64,
}

/// Requests and their answers.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Exchanged {
    /// Answers per second.
    pub(crate) rate: f64,
    /// From when a request was due to its answer, microseconds.
    pub(crate) latency: Summary,
    /// Requests lost with their connection, or not answered before the end's grace was over.
    pub(crate) failed: u64,
}

/// Bytes moved.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Moved {
    /// Bits per second that arrived, while measuring.
    pub(crate) rate: f64,
    /// Of the slowest and of the fastest stream.
    pub(crate) slowest: f64,
    pub(crate) fastest: f64,
    /// Bytes in all, the warm-up's too: for CPU per byte.
    pub(crate) bytes: u64,
    /// Streams that broke.
    pub(crate) failed: u64,
}

/// New connections.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Connected {
    /// Per second.
    pub(crate) rate: f64,
    /// From connect to the greeting, microseconds.
    pub(crate) latency: Summary,
    pub(crate) failed: u64,
}
