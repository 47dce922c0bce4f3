//! Behaviour of the task supervisor; time is paused wherever a grace period matters.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;

use super::*;

const GRACE: Duration = Duration::from_secs(10);

/// Sets its flag when it is dropped: shows that a task's future is gone.
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_fails_stops_the_process_with_its_name_and_cause() {
    let tasks = Tasks::new();
    tasks.critical("uplink", async { Err("no route".into()) });
    let error = tasks.run_until(pending(), GRACE).await.unwrap_err();
    assert_eq!(chain(&error), "critical task uplink failed: no route");
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_ends_early_stops_the_process() {
    let tasks = Tasks::new();
    tasks.critical("uplink", async { Ok(()) });
    let error = tasks.run_until(pending(), GRACE).await.unwrap_err();
    assert!(matches!(error, TaskError::Ended { name: "uplink" }));
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_panics_stops_the_process_and_shutdown_is_requested() {
    let tasks = Tasks::new();
    let shutdown = tasks.shutdown();
    tasks.critical("raft", async { panic!("log index went {}", "back") });
    let error = tasks.clone().run_until(pending(), GRACE).await.unwrap_err();
    assert_eq!(error.to_string(), "critical task raft panicked: log index went back");
    assert!(shutdown.is_requested());
    assert_eq!(tasks.panics()["raft"], 1);
}

#[tokio::test(start_paused = true)]
async fn the_panic_of_a_plain_task_is_counted_and_stops_nothing() {
    let tasks = Tasks::new();
    for _ in 0..2 {
        tasks.spawn("connection", async { panic!("bad peer") });
    }
    let seen = tasks.clone();
    let both_panicked = async move {
        crate::wait::wait_for("two panics", GRACE, async || seen.panics().get("connection") == Some(&2)).await.unwrap();
    };
    tasks.run_until(both_panicked, GRACE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_tasks_and_no_longer_than_they_need() {
    let tasks = Tasks::new();
    let (shutdown, done) = (tasks.shutdown(), Arc::new(AtomicBool::new(false)));
    let finished = done.clone();
    tasks.critical("server", async move {
        shutdown.requested().await;
        time::sleep(GRACE / 2).await;
        finished.store(true, Ordering::SeqCst);
        Ok(())
    });
    let started = time::Instant::now();
    tasks.run_until(async {}, GRACE).await.unwrap();
    assert!(done.load(Ordering::SeqCst));
    assert_eq!(started.elapsed(), GRACE / 2);
}

#[tokio::test(start_paused = true)]
async fn tasks_that_outlast_the_grace_are_aborted_and_gone() {
    let tasks = Tasks::new();
    let dropped = Arc::new(AtomicBool::new(false));
    let held = SetOnDrop(dropped.clone());
    tasks.spawn("stuck", async move {
        let _held = held;
        pending().await
    });
    let started = time::Instant::now();
    tasks.clone().run_until(async {}, GRACE).await.unwrap();
    assert_eq!(started.elapsed(), GRACE);
    assert!(dropped.load(Ordering::SeqCst));
    assert!(tasks.running().is_empty());
}

#[tokio::test(start_paused = true)]
async fn background_tasks_live_through_the_drain_and_are_not_waited_for() {
    let tasks = Tasks::new();
    let (alive, seen_alive) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let (dropped, shutdown) = (Arc::new(AtomicBool::new(false)), tasks.shutdown());
    let held = SetOnDrop(dropped.clone());
    tasks.background("health", async move {
        let _held = held;
        pending().await
    });
    let (probe, noted) = (dropped.clone(), seen_alive.clone());
    tasks.spawn("draining", async move {
        shutdown.requested().await;
        time::sleep(GRACE / 2).await;
        noted.store(alive.load(Ordering::SeqCst) && !probe.load(Ordering::SeqCst), Ordering::SeqCst);
    });
    let started = time::Instant::now();
    tasks.run_until(async {}, GRACE).await.unwrap();
    assert!(seen_alive.load(Ordering::SeqCst), "still running during the drain");
    assert!(dropped.load(Ordering::SeqCst), "gone after it");
    assert_eq!(started.elapsed(), GRACE / 2);
}

#[tokio::test(start_paused = true)]
async fn an_error_during_the_drain_is_not_lost() {
    let tasks = Tasks::new();
    let shutdown = tasks.shutdown();
    tasks.critical("store", async move {
        shutdown.requested().await;
        Err("disk full".into())
    });
    let error = tasks.run_until(async {}, GRACE).await.unwrap_err();
    assert_eq!(chain(&error), "critical task store failed: disk full");
}

#[tokio::test(start_paused = true)]
async fn a_requested_shutdown_stops_the_process() {
    let tasks = Tasks::new();
    tasks.shutdown().request();
    tasks.run_until(pending(), GRACE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn forcing_cuts_the_grace_short() {
    let tasks = Tasks::new();
    tasks.spawn("stuck", pending());
    let started = time::Instant::now();
    let force = time::sleep(Duration::from_secs(1));
    let error = tasks.supervise(async {}, force, GRACE).await.unwrap_err();
    assert!(matches!(error, TaskError::Forced));
    assert_eq!(started.elapsed(), Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn nothing_starts_after_the_process_has_stopped() {
    let tasks = Tasks::new();
    tasks.clone().run_until(async {}, GRACE).await.unwrap();
    let (sender, receiver) = oneshot::channel::<()>();
    tasks.spawn("late", async move {
        let _sender = sender;
        pending().await
    });
    assert!(receiver.await.is_err(), "its future was dropped without running");
}

#[tokio::test(start_paused = true)]
async fn running_tasks_are_counted_by_name_until_they_end() {
    let tasks = Tasks::new();
    let (sender, receiver) = oneshot::channel::<()>();
    tasks.spawn("short", async move { drop(receiver.await) });
    tasks.spawn("long", pending());
    assert_eq!(tasks.running(), [("long", 1), ("short", 1)].into());
    sender.send(()).unwrap();
    crate::wait::wait_for("the short one to end", GRACE, async || tasks.running().len() == 1).await.unwrap();
}
