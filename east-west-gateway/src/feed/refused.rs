//! Why a session with the agent failed, in words, and what helps where trying again does not.
//!
//! In: what the agent, or the connection to it, says. What holds: no text of the library that carries it. Whoever follows
//! the agent tries on in any case: the remedy may be at the agent's end.

use isthmus_identity::grpc::words;
use tonic::{Code, Status};

/// The agent's, or the connection's, failure.
#[derive(Debug, thiserror::Error)]
#[error("{}", words(.0))]
pub(super) struct CallError(Status);

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

impl CallError {
    /// What to do about it; `None` if it may pass by itself.
    pub(super) fn remedy(&self) -> Option<&'static str> {
        match self.0.code() {
            Code::InvalidArgument => Some(
                "correct this gateway's configuration and restart it: `advertise`, or else `listen.tunnel`, is what it \
                 calls its tunnel address, `listen.local` its local IP",
            ),
            Code::PermissionDenied | Code::Unauthenticated => Some(CERTIFICATE),
            Code::ResourceExhausted | Code::FailedPrecondition | Code::AlreadyExists => {
                Some("see the agent's log and `isthmusctl status`")
            }
            Code::Unimplemented => Some("the agent is of another version: upgrade it"),
            // A certificate that is refused during the handshake: the alert's name is all there is.
            _ if ALERTS.iter().any(|alert| words(&self.0).contains(alert)) => Some(CERTIFICATE),
            _ => None,
        }
    }
}

const CERTIFICATE: &str = "the agent does not take this gateway's certificate, as of another cluster or federation: start \
                           with an empty stateDir and a new token (`isthmus-agent token gateway NAME`)";

/// RFC 8446, 6.2, as rustls spells them.
const ALERTS: [&str; 5] = ["AccessDenied", "UnknownCA", "BadCertificate", "CertificateRevoked", "CertificateUnknown"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_further_attempt_mends_comes_with_a_remedy_and_without_the_librarys_words() {
        let refused = CallError::from(Status::invalid_argument("tunnel_address: 0.0.0.0:15443 is no address to dial"));
        assert_eq!(refused.to_string(), "tunnel_address: 0.0.0.0:15443 is no address to dial");
        assert!(refused.remedy().unwrap().contains("`advertise`"));
        let denied = CallError::from(Status::permission_denied("GatewayFeed is only for gateways of this cluster"));
        assert!(denied.remedy().unwrap().contains("isthmus-agent token gateway"));
        let alert = std::io::Error::other("received fatal alert: AccessDenied");
        let handshake = CallError::from(Status::from_error(Box::new(alert)));
        assert!(handshake.remedy().unwrap().contains("certificate"), "{handshake}");
        assert!(!handshake.to_string().contains("metadata"), "{handshake}");
    }

    #[test]
    fn an_agent_that_is_away_needs_none() {
        assert_eq!(CallError::from(Status::unavailable("connection refused")).remedy(), None);
        assert_eq!(CallError::from(Status::deadline_exceeded("no answer")).remedy(), None);
    }
}
