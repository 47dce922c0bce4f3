//! Errors of the admin API, in one JSON shape.

use axum::{
    Json,
    http::StatusCode,
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

#[derive(Serialize)]
struct Body<'a> {
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
    /// Something in the request is wrong.
    pub(super) fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self { field: Some(field), ..Self::new(StatusCode::BAD_REQUEST, "invalid", message.into()) }
    }

    /// Several things in what was sent are wrong.
    pub(super) fn problems(problems: Vec<Place>) -> Self {
        let message = match problems.len() {
            1 => "there is a problem; nothing was changed".to_owned(),
            n => format!("there are {n} problems; nothing was changed"),
        };
        Self { problems, ..Self::new(StatusCode::BAD_REQUEST, "invalid", message) }
    }

    fn new(status: StatusCode, code: &'static str, message: String) -> Self {
        Self { status, code, message, field: None, problems: Vec::new() }
    }

    /// What was named is not there.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message.into())
    }

    /// The path exists, but not with this method.
    pub(super) fn method(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message.into())
    }

    /// Not yet.
    pub(super) fn not_ready() -> Self {
        let message = "the control plane is not ready; try again in a moment".to_owned();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", message)
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
            ProposeError::Rejected(rejection) => return rejection.into(),
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
        (self.status, Json(Body { error: detail })).into_response()
    }
}
