//! isthmus-runtime: the process kit that every Isthmus binary is built from.
//!
//! Owns what has nothing to do with meshes: reading configuration ([`config`]), logs and traces ([`telemetry`]),
//! supervised tasks with drain ([`tasks`]), the health and metrics server ([`health`]), durable files ([`files`]),
//! binding sockets with errors worth reading ([`net`]), retry delays ([`backoff`]) and waiting for conditions
//! ([`wait`]). It depends on no other crate of the workspace, and knows no domain type.

use std::time::{SystemTime, UNIX_EPOCH};

pub mod backoff;
pub mod config;
pub mod files;
pub mod health;
pub mod net;
pub mod open_files;
pub mod tasks;
pub mod telemetry;
pub mod wait;

/// A boxed error that can cross threads: what critical tasks end with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The wall clock in milliseconds since the Unix epoch; 0 for a clock set before 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    #[test]
    fn now_is_the_wall_clock_in_milliseconds() {
        // 2020-01-01 and 2100-01-01: far enough apart to hold anywhere, close enough to catch a wrong unit.
        assert!((1_577_836_800_000..4_102_444_800_000).contains(&super::now()));
    }
}
