//! Who everyone is: the certificate authority of a trust domain, X.509 SVIDs, SPIFFE bundles, TLS configurations whose
//! verifiers know SPIFFE IDs, gRPC over them, the one-time tokens that bring a newcomer in, and the newcomer's side of it.
//!
//! What always holds: a certificate is verified with the roots of its own trust domain and no other; TLS is 1.3, without
//! resumption or early data; private keys never show in `Debug` or logs and lie in files of mode 0600. The only crypto
//! provider is aws-lc-rs.
//!
//! Deliberately absent: who may do what. Callers say which SPIFFE IDs they accept ([`tls::PeerPolicy`]).

pub mod bundle;
pub mod ca;
pub mod enrol;
pub mod grpc;
pub mod keys;
pub mod renew;
pub mod svid;
pub mod tls;
pub mod token;

mod pem;
mod x509;

use std::time::{Duration, UNIX_EPOCH};

use isthmus_model::time::Timestamp;

/// Makes aws-lc-rs the process's crypto provider. Idempotent; the first line of each `main`.
pub fn install_crypto() {
    // An error only says that a provider is installed already, which is what the caller wants.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
}

fn now() -> Timestamp {
    Timestamp(isthmus_runtime::now())
}

/// The end of the year 9999, the last that RFC 3339 can write.
const LAST_DATE_MS: u64 = 253_402_300_799_000;

/// A point in time for people: RFC 3339, to the second.
pub fn rfc3339(t: Timestamp) -> String {
    let time = UNIX_EPOCH + Duration::from_millis(t.0.min(LAST_DATE_MS));
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod testkit;
