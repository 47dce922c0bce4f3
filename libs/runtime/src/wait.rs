//! Waiting for a condition instead of sleeping: for tests and for commands that wait on a user's behalf.
//!
//! Services do not poll; they watch. This is for what can only be asked, such as another process's status.

use std::time::Duration;

use tokio::time;

/// How often the condition is asked.
const INTERVAL: Duration = Duration::from_millis(10);

/// The condition did not hold in time.
#[derive(Debug, thiserror::Error)]
#[error("timed out after {deadline:?} waiting for {what}")]
pub struct WaitTimeout {
    /// What was waited for, in the caller's words.
    pub what: String,
    /// How long it was waited for.
    pub deadline: Duration,
}

/// Asks `condition` every 10 ms until it holds, for at most `deadline`.
///
/// The deadline also cuts off a condition that hangs. A condition that already holds is not waited for.
pub async fn wait_for<F: AsyncFnMut() -> bool>(
    what: &str,
    deadline: Duration,
    mut condition: F,
) -> Result<(), WaitTimeout> {
    let polls = async {
        while !condition().await {
            time::sleep(INTERVAL).await;
        }
    };
    time::timeout(deadline, polls).await.map_err(|_| WaitTimeout { what: what.to_owned(), deadline })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn returns_once_the_condition_holds() {
        let mut asked = 0;
        let started = time::Instant::now();
        let outcome = wait_for("the third ask", Duration::from_secs(5), async || {
            asked += 1;
            asked == 3
        });
        outcome.await.unwrap();
        assert_eq!(asked, 3);
        assert_eq!(started.elapsed(), INTERVAL * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_condition_that_never_holds_times_out_by_name() {
        let error = wait_for("pigs to fly", Duration::from_secs(5), async || false).await.unwrap_err();
        assert_eq!(error.to_string(), "timed out after 5s waiting for pigs to fly");
    }

    #[tokio::test(start_paused = true)]
    async fn a_condition_that_hangs_times_out_too() {
        let hangs = async || std::future::pending().await;
        assert!(wait_for("an answer", Duration::from_secs(5), hangs).await.is_err());
    }
}
