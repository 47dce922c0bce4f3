//! Routes: what is retried, where, and for how long a request may stand still.
//!
//! Retries are bounded by what HTTP allows. Idempotent methods (RFC 9110, 9.2.2) are retried after any failure of the path
//! and after 502 to 504. Others only when the request provably never reached the app: the connection or stream failed before
//! it was sent, or the far sidecar says so with a header that it alone sets. Each cluster is tried three times, on different
//! hosts where there are, before the next one's turn.
//!
//! There is no timeout per try and none for the whole exchange: both would cut what is merely slow or long. A dead path is
//! found by HTTP/2 pings (`cluster`), a stuck app by the stream's idle timeout below, which is never retried.

use std::time::Duration;

use envoy_types::{
    pb::envoy::{
        config::route::v3::{
            HeaderMatcher, RetryPolicy, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
            header_matcher::HeaderMatchSpecifier,
            retry_policy::{RetryBackOff, RetryHostPredicate, RetryPriority, retry_host_predicate, retry_priority},
            route::Action,
            route_action::ClusterSpecifier,
            route_match::PathSpecifier,
        },
        extensions::retry::{
            host::previous_hosts::v3::PreviousHostsPredicate,
            priority::previous_priorities::v3::PreviousPrioritiesConfig,
        },
        r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
    },
    util::pack_any,
};
use isthmus_model::service::AppProtocol;

use super::{
    names::UNREACHED_HEADER,
    wire::{boolean, duration, millis, uint},
};

/// With three tries per cluster this reaches the third cluster.
const RETRIES: u32 = 7;
/// Tries per priority. When a far gateway dies, the connections through each local gateway break at moments of their own
/// (each notices by itself): after two that broke, the third goes over a tunnel that works.
const TRIES_PER_PRIORITY: i32 = 3;
/// An HTTP exchange in which no byte moves for this long is over (504 if the response had not begun). The figure is Envoy's
/// default request timeout; here it does not cut a transfer that makes progress.
const HTTP_IDLE_TIMEOUT: Duration = Duration::from_secs(15);
const IDEMPOTENT_METHODS: &str = "GET|HEAD|OPTIONS|TRACE|PUT|DELETE";
const RETRY_IDEMPOTENT: &str =
    "gateway-error,connect-failure,refused-stream,reset,reset-before-request,retriable-headers";
const RETRY_UNSENT: &str = "connect-failure,refused-stream,reset-before-request,retriable-headers";

/// The route table of an upstream port.
pub(super) fn outbound(name: &str, protocol: AppProtocol) -> RouteConfiguration {
    let idle = match protocol {
        // Streams may be silent for hours; the caller's deadline (grpc-timeout) rules.
        AppProtocol::Grpc => Duration::ZERO,
        AppProtocol::Http | AppProtocol::Tcp => HTTP_IDLE_TIMEOUT,
    };
    let idempotent = RouteMatch { headers: vec![method_is(IDEMPOTENT_METHODS)], ..any_path() };
    table(
        name,
        vec![
            route(name, idempotent, idle, Some(retry(RETRY_IDEMPOTENT))),
            route(name, any_path(), idle, Some(retry(RETRY_UNSENT))),
        ],
    )
}

/// The route table of one of the workload's own ports: straight to the app; the caller's side has the timeouts and retries.
pub(super) fn inbound(name: &str) -> RouteConfiguration {
    table(name, vec![route(name, any_path(), Duration::ZERO, None)])
}

fn table(name: &str, routes: Vec<Route>) -> RouteConfiguration {
    RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: name.to_owned(),
            domains: vec!["*".to_owned()],
            routes,
            ..Default::default()
        }],
        // Between sidecars only: an app neither sets nor sees it.
        response_headers_to_remove: vec![UNREACHED_HEADER.to_owned()],
        validate_clusters: boolean(false),
        ..Default::default()
    }
}

fn route(cluster: &str, on: RouteMatch, idle: Duration, retry_policy: Option<RetryPolicy>) -> Route {
    Route {
        r#match: Some(on),
        action: Some(Action::Route(RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
            timeout: duration(Duration::ZERO),
            idle_timeout: duration(idle),
            retry_policy,
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn any_path() -> RouteMatch {
    RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..Default::default() }
}

fn method_is(regex: &str) -> HeaderMatcher {
    let pattern = RegexMatcher { regex: regex.to_owned(), ..Default::default() };
    HeaderMatcher {
        name: ":method".to_owned(),
        header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(StringMatcher {
            match_pattern: Some(MatchPattern::SafeRegex(pattern)),
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn retry(on: &str) -> RetryPolicy {
    let other_host = RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_host_predicate::ConfigType::TypedConfig(pack_any(PreviousHostsPredicate {}))),
    };
    let next_priority = PreviousPrioritiesConfig { update_frequency: TRIES_PER_PRIORITY };
    RetryPolicy {
        retry_on: on.to_owned(),
        num_retries: uint(RETRIES),
        retry_host_predicate: vec![other_host],
        host_selection_retry_max_attempts: 5,
        retry_priority: Some(RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".to_owned(),
            config_type: Some(retry_priority::ConfigType::TypedConfig(pack_any(next_priority))),
        }),
        retry_back_off: Some(RetryBackOff { base_interval: millis(10), max_interval: millis(250) }),
        retriable_headers: vec![HeaderMatcher {
            name: UNREACHED_HEADER.to_owned(),
            header_match_specifier: Some(HeaderMatchSpecifier::PresentMatch(true)),
            ..Default::default()
        }],
        ..Default::default()
    }
}
