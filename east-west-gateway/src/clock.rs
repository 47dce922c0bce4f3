//! The monotonic clock of everything that waits: tokio's, so that a test that holds tokio's time holds all of it.
//!
//! Sans-IO parts take the time as an argument; whoever drives them asks here.

use std::time::{Duration, Instant};

/// Now.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// How long ago `then` was.
pub(crate) fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}
