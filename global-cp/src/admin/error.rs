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
}

impl ApiError {
    /// Something in the request is wrong.
    pub(super) fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, code: "invalid", message: message.into(), field: Some(field) }
    }

    /// What was named is not there.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_FOUND, code: "not_found", message: message.into(), field: None }
    }

    /// The path exists, but not with this method.
    pub(super) fn method(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::METHOD_NOT_ALLOWED,
            code: "method_not_allowed",
            message: message.into(),
            field: None,
        }
    }

    /// Not yet.
    pub(super) fn not_ready() -> Self {
        let message = "the control plane is not ready; try again in a moment".to_owned();
        Self { status: StatusCode::SERVICE_UNAVAILABLE, code: "not_ready", message, field: None }
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
        Self { status, code: rejection.code(), message: rejection.to_string(), field: None }
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
        Self { status, code, message: error.to_string(), field: None }
    }
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> Self {
        let (status, code) = match error {
            ReadError::NoLeader { .. } => (StatusCode::SERVICE_UNAVAILABLE, "no_leader"),
            ReadError::Stopped(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        Self { status, code, message: error.to_string(), field: None }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let detail = Detail { code: self.code, message: &self.message, field: self.field };
        (self.status, Json(Body { error: detail })).into_response()
    }
}
