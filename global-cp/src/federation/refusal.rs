//! Refusals and failures as gRPC statuses: a code that machines can act upon, a message for the person.

use isthmus_runtime::tasks::chain;
use tonic::{Code, Status};

use crate::{
    authority::AuthorityError,
    raft::ProposeError,
    state::{Rejection, RejectionKind},
};

/// Of a rule's refusal.
pub(crate) fn status_of(rejection: &Rejection) -> Status {
    let code = match rejection.kind() {
        RejectionKind::Invalid => Code::InvalidArgument,
        RejectionKind::Denied => Code::PermissionDenied,
        RejectionKind::NotFound => Code::NotFound,
        RejectionKind::Conflict => Code::FailedPrecondition,
        RejectionKind::Exhausted => Code::ResourceExhausted,
        RejectionKind::NotReady => Code::Unavailable,
    };
    Status::new(code, rejection.to_string())
}

/// Of a command that was not accepted.
pub(crate) fn status_of_proposal(error: &ProposeError) -> Status {
    match error {
        ProposeError::Rejected(rejection) => status_of(rejection),
        ProposeError::NoLeader { .. }
        | ProposeError::Refused { .. }
        | ProposeError::Stopped(_)
        | ProposeError::NoAnswer => Status::unavailable(error.to_string()),
        ProposeError::Deadline => Status::deadline_exceeded(error.to_string()),
    }
}

/// Of a certificate that was not signed. Only what is wrong with the request is told to the peer.
pub(super) fn status_of_signing(error: &AuthorityError) -> Status {
    match error {
        AuthorityError::Ca(ca) if ca.is_requesters_fault() => Status::invalid_argument(chain(error)),
        other => {
            tracing::error!(error = %chain(other), "cannot sign a certificate");
            Status::internal("the certificate could not be signed; see the control plane's log")
        }
    }
}
