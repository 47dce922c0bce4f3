//! Errors of the admin API, in one JSON shape.

use std::time::Duration;

use axum::{
    Json,
    body::Bytes,
    extract::{FromRequest, Request},
    http::{
        HeaderValue, StatusCode,
        header::{RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use isthmus_runtime::tasks::chain;
use serde::Serialize;

use crate::{
    raft::{ProposeError, ReadError},
    state::{Rejection, RejectionKind},
};

/// What a failed call answers.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    field: Option<&'static str>,
    /// It is among the replicated events.
    committed: bool,
    /// Goes into a header: how to be let in, or when to come back.
    challenge: Option<&'static str>,
    retry_after: Option<Duration>,
    problems: Vec<Place>,
}

/// One of the things that are wrong with what was sent.
#[derive(Debug, Serialize)]
pub(super) struct Place {
    pub(super) file: String,
    /// From 1; 0 if it is about the whole file.
    pub(super) line: u64,
    /// Dotted path; empty if not about one field.
    pub(super) field: String,
    pub(super) message: String,
}

/// What went wrong, beside the response, for the audit log.
#[derive(Clone, Debug, Default)]
pub(super) struct Failure {
    pub(super) code: &'static str,
    pub(super) message: String,
    /// It is among the replicated events.
    pub(super) committed: bool,
}

/// A request's body, within the route's limit.
pub(super) struct Body(pub(super) Bytes);

#[derive(Serialize)]
struct Wrapped<'a> {
    error: Detail<'a>,
}

#[derive(Serialize)]
struct Detail<'a> {
    code: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    problems: &'a [Place],
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            status,
            code,
            message,
            field: None,
            committed: false,
            challenge: None,
            retry_after: None,
            problems: Vec::new(),
        }
    }

    /// Something in the request is wrong.
    pub(super) fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self { field: Some(field), ..Self::new(StatusCode::BAD_REQUEST, "invalid", message) }
    }

    /// Several things in what was sent are wrong.
    pub(super) fn problems(problems: Vec<Place>) -> Self {
        let message = match problems.len() {
            1 => "there is a problem; nothing was changed".to_owned(),
            n => format!("there are {n} problems; nothing was changed"),
        };
        Self { problems, ..Self::new(StatusCode::BAD_REQUEST, "invalid", message) }
    }

    /// What was named is not there.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// The path exists, but not with this method.
    pub(super) fn method(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    /// Not yet.
    pub(super) fn not_ready() -> Self {
        let message = "the control plane is not ready; try again in a moment";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message)
    }

    /// Nobody is known to be calling.
    pub(super) fn unauthenticated(code: &'static str, message: impl Into<String>, nothing_shown: bool) -> Self {
        // RFC 6750, 3.1: whoever has shown nothing is not told that it was wrong.
        let challenge = match nothing_shown {
            true => "Bearer realm=\"isthmus\"",
            false => "Bearer realm=\"isthmus\", error=\"invalid_token\"",
        };
        Self { challenge: Some(challenge), ..Self::new(StatusCode::UNAUTHORIZED, code, message) }
    }

    /// The caller may not.
    pub(super) fn denied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "denied", message)
    }

    /// The caller asks too often.
    pub(super) fn throttled(wait: Duration) -> Self {
        let message = format!(
            "too many requests; the next one may come in {:.1} s. `admin.requestsPerSecond` and `admin.burst` set the limit",
            wait.as_secs_f64()
        );
        Self { retry_after: Some(wait), ..Self::new(StatusCode::TOO_MANY_REQUESTS, "throttled", message) }
    }

    /// A bug, or an engine that stops.
    pub(super) fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "something went wrong in here; see the node's log")
    }
}

/// The body whole, or why not.
impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let read = Bytes::from_request(request, state).await;
        read.map(Self).map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too_large",
                "the request's body is over this route's limit",
            ),
            _ => ApiError::invalid("body", "it ended before all of it was here"),
        })
    }
}

impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let status = match rejection.kind() {
            RejectionKind::Invalid => StatusCode::BAD_REQUEST,
            RejectionKind::Denied | RejectionKind::Conflict => StatusCode::CONFLICT,
            RejectionKind::NotFound => StatusCode::NOT_FOUND,
            RejectionKind::Exhausted => StatusCode::INSUFFICIENT_STORAGE,
            RejectionKind::NotReady => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, rejection.code(), rejection.to_string())
    }
}

impl From<ProposeError> for ApiError {
    fn from(error: ProposeError) -> Self {
        let (status, code) = match error {
            ProposeError::Rejected(rejection) => return Self { committed: true, ..rejection.into() },
            ProposeError::NoLeader { .. } => (StatusCode::SERVICE_UNAVAILABLE, "no_leader"),
            ProposeError::Refused { .. } => (StatusCode::BAD_GATEWAY, "refused_by_leader"),
            ProposeError::Deadline => (StatusCode::GATEWAY_TIMEOUT, "deadline"),
            ProposeError::Stopped(_) | ProposeError::NoAnswer => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        tracing::error!(error = %chain(&error), "an administrator's change was not committed");
        Self::new(status, code, error.to_string())
    }
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        let (status, code) = match error {
            ReadError::NoLeader { .. } => (StatusCode::SERVICE_UNAVAILABLE, "no_leader"),
            ReadError::Stopped(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let detail = Detail { code: self.code, message: &self.message, field: self.field, problems: &self.problems };
        let mut response = (self.status, Json(Wrapped { error: detail })).into_response();
        if let Some(challenge) = self.challenge {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if let Some(wait) = self.retry_after {
            // Whole seconds, and never zero: who comes back too early is refused again.
            let seconds = wait.as_secs().saturating_add(1);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        let failure = Failure { code: self.code, message: self.message, committed: self.committed };
        response.extensions_mut().insert(failure);
        response
    }
}
