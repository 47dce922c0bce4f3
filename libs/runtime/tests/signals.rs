//! Real signals to a real process: a test binary of its own, since signals go to the whole process.

use std::future::pending;
use std::process::Command;
use std::time::Duration;

use isthmus_runtime::tasks::{TaskError, Tasks};

/// Longer than the test may take, so that a test that relied on it would be seen to hang.
const GRACE: Duration = Duration::from_secs(60);

fn send(signal: &str) {
    let pid = std::process::id().to_string();
    let sent = Command::new("kill").args(["-s", signal, &pid]).status();
    assert!(sent.is_ok_and(|status| status.success()), "the kill command is needed");
}

#[tokio::test]
async fn the_first_signal_drains_and_the_second_forces() {
    for signal in ["TERM", "INT"] {
        let tasks = Tasks::new();
        let shutdown = tasks.shutdown();
        tasks.critical("server", async move {
            shutdown.requested().await;
            Ok(())
        });
        // `join!` polls in order: the handlers stand before the signal is sent.
        let (outcome, ()) = tokio::join!(tasks.run(GRACE), async { send(signal) });
        outcome.unwrap();
    }

    let tasks = Tasks::new();
    let shutdown = tasks.shutdown();
    tasks.spawn("stuck", pending());
    let twice = async {
        send("TERM");
        shutdown.requested().await;
        send("INT");
    };
    let (outcome, ()) = tokio::join!(tasks.run(GRACE), twice);
    assert!(matches!(outcome, Err(TaskError::Forced)), "{outcome:?}");
}
