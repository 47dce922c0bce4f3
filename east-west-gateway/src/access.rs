//! One line of log, and one span, per carried connection.
//!
//! The line (target `access`) says which service, from where to where, what was tried and why it failed, how it ended, how
//! many bytes and how long. In JSON, `tried` is an array of objects. Failures of what named a service are INFO, the rest is DEBUG but for a configured sample. The span joins the
//! trace that the near gateway began, by the W3C traceparent in the stream's header.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use isthmus_identity::tls;
use isthmus_model::ids::{ClusterName, ServiceName};
use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use rustls::pki_types::CertificateDer;
use serde::Serialize;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::{
    clock,
    core::Core,
    egress::endpoint::Tried,
    metrics::Direction,
    splice::{Carried, End},
    tunnel::registry::Tunnel,
};

/// What a connection is for.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) service: ServiceName,
    pub(crate) port: u16,
}

/// Where a connection came from, beyond its cluster.
pub(crate) enum Source<'a> {
    /// A local sidecar: its address. Who it is, is between the two workloads.
    Local(Option<SocketAddr>),
    /// A gateway of another cluster: its name, and its certificate as verified.
    Peer { gateway: &'a str, id: Option<CertificateDer<'static>> },
}

/// One attempt to place a connection.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Attempt {
    pub(crate) cluster: ClusterName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gateway: Option<String>,
    /// One of this cluster's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) outcome: &'static str,
    /// The far gateway's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
}

impl Attempt {
    /// One at `cluster`, through `tunnel`, that ended so.
    pub(crate) fn new(cluster: &ClusterName, tunnel: Option<&Tunnel>, outcome: &'static str) -> Self {
        let gateway = tunnel.map(|tunnel| tunnel.gateway.clone());
        Self { cluster: cluster.clone(), gateway, endpoint: None, outcome, detail: None }
    }

    /// One at an endpoint of `own`.
    pub(crate) fn at(own: &ClusterName, tried: &Tried) -> Self {
        Self { endpoint: Some(tried.endpoint), ..Self::new(own, None, tried.outcome) }
    }
}

/// Gathers what the line will say.
#[derive(Debug)]
pub(crate) struct Access {
    direction: Direction,
    source: ClusterName,
    destination: ClusterName,
    route: Option<Route>,
    client: Option<SocketAddr>,
    source_gateway: Option<String>,
    source_id: Option<String>,
    destination_gateway: Option<String>,
    endpoint: Option<SocketAddr>,
    tried: Vec<Attempt>,
    outcome: &'static str,
    detail: Option<&'static str>,
    began: Instant,
    first_byte: Option<Duration>,
    span: Span,
}

impl Access {
    /// A connection from `source`, which goes to `destination` unless it is tried elsewhere.
    pub(crate) fn new(direction: Direction, source: ClusterName, destination: ClusterName, began: Instant) -> Self {
        let span = tracing::info_span!(
            "connection",
            direction = direction.label(),
            source.cluster = %source,
            destination.cluster = tracing::field::Empty,
            service = tracing::field::Empty,
            outcome = tracing::field::Empty,
        );
        Self {
            direction,
            source,
            destination,
            route: None,
            client: None,
            source_gateway: None,
            source_id: None,
            destination_gateway: None,
            endpoint: None,
            tried: Vec::new(),
            outcome: "none",
            detail: None,
            began,
            first_byte: None,
            span,
        }
    }

    /// Who opened it.
    pub(crate) fn came_from(&mut self, source: Source<'_>) {
        match source {
            Source::Local(client) => self.client = client,
            Source::Peer { gateway, id } => {
                self.source_gateway = Some(gateway.to_owned());
                self.source_id = id.and_then(|leaf| tls::peer_id(Some(&[leaf]))).map(|id| id.to_string());
            }
        }
    }

    /// It is for this service.
    pub(crate) fn route(&mut self, route: Route) {
        self.span.record("service", tracing::field::display(&route.service));
        self.route = Some(route);
    }

    /// Makes the span a child of the peer's. What is no traceparent is ignored.
    pub(crate) fn join(&self, traceparent: &str) {
        if let Some(remote) = parse_traceparent(traceparent) {
            // Fails only without an OpenTelemetry layer, when there is nothing to join.
            drop(self.span.set_parent(Context::new().with_remote_span_context(remote)));
        }
    }

    /// The span's identity for the header; empty while traces are off.
    pub(crate) fn traceparent(&self) -> String {
        let context = self.span.context();
        let span = context.span();
        let span = span.span_context();
        if !span.is_valid() {
            return String::new();
        }
        format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8())
    }

    /// One attempt ended so. What goes nowhere was to go where it was tried last.
    pub(crate) fn tried(&mut self, attempt: Attempt) {
        self.outcome = attempt.outcome;
        self.destination = attempt.cluster.clone();
        self.tried.push(attempt);
    }

    /// It goes there: to another gateway, or to an endpoint.
    pub(crate) fn destined(&mut self, cluster: &ClusterName, gateway: Option<&str>, endpoint: Option<SocketAddr>) {
        self.destination = cluster.clone();
        self.destination_gateway = gateway.map(str::to_owned);
        self.endpoint = endpoint;
    }

    /// The first byte came back.
    pub(crate) fn accepted(&mut self) {
        self.outcome = "accepted";
        // Kept for as long as the connection is.
        self.tried.shrink_to_fit();
        self.first_byte = Some(clock::since(self.began));
    }

    /// It was not placed.
    pub(crate) fn failed(&mut self, why: &'static str) {
        self.outcome = why;
    }

    /// More of why.
    pub(crate) fn because(&mut self, detail: &'static str) {
        self.detail = Some(detail);
    }

    /// Counts, and writes the line.
    pub(crate) fn finish(self, core: &Core, carried: Option<Carried>) {
        let (sent, received, end) = carried.map_or((0, 0, None), |c| (c.out, c.back, Some(c.end)));
        core.metrics.bytes(self.direction, sent.saturating_add(received));
        self.span.record("outcome", self.outcome);
        self.span.record("destination.cluster", tracing::field::display(&self.destination));
        let well = self.outcome == "accepted" && matches!(end, Some(End::Finished));
        let own = Some(core.config.name.as_str());
        let (source_gateway, destination_gateway) = match self.direction {
            Direction::Ingress => (own, self.destination_gateway.as_deref()),
            Direction::Egress => (self.source_gateway.as_deref(), own),
        };
        // Serializing strings and fixed words does not fail.
        let tried = serde_json::to_string(&self.tried).unwrap_or_default();
        let sampled = rand::random_range(0..100) < core.config.access_log.sample_percent;
        // The level of an event is fixed where it is written: hence one macro, twice expanded.
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "access",
                    parent: &self.span,
                    direction = self.direction.label(),
                    service = self.route.as_ref().map(|r| r.service.to_string()),
                    port = self.route.as_ref().map(|r| r.port),
                    source = %self.source,
                    source_gateway,
                    source_id = self.source_id.as_deref(),
                    client = self.client.map(|a| a.to_string()),
                    destination = %self.destination,
                    destination_gateway,
                    endpoint = self.endpoint.map(|a| a.to_string()),
                    // By this ending the log's JSON has a value here, not a string.
                    tried.json = tried,
                    outcome = self.outcome,
                    detail = self.detail,
                    end = end.map(End::label),
                    bytes_sent = sent,
                    bytes_received = received,
                    first_byte_us = self.first_byte.map(|d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX)),
                    duration_us = u64::try_from(clock::since(self.began).as_micros()).unwrap_or(u64::MAX),
                )
            };
        }
        // What never named a service is counted by reason; a flood of it must not become a flood of lines.
        if (well || self.route.is_none()) && !sampled { line!(debug) } else { line!(info) }
    }
}

/// W3C Trace Context, level 1: `00-<32 hex>-<16 hex>-<2 hex>`.
fn parse_traceparent(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    if version != "00" || trace.len() != 32 || span.len() != 16 || flags.len() != 2 || parts.next().is_some() {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(u8::from_str_radix(flags, 16).ok()?),
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_and_garbage_is_not() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = parse_traceparent(good).unwrap();
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(context.is_sampled() && context.is_remote());
        for bad in [
            "",
            "00",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-zzf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert!(parse_traceparent(bad).is_none(), "{bad}");
        }
    }
}
