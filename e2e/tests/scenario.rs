//! The demo's scenario, whole, as a test: what `make demo` shows must hold on every change.
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unwrap_used, reason = "test code")]

use std::time::Duration;

use isthmus_e2e::{
    federation::repository,
    scenario::{self, Options, report::Report},
};

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_holds() {
    isthmus_identity::install_crypto();
    let dir = repository().join("target/e2e/scenario");
    let mut report = Report::new();
    let (stage, outcome) = scenario::play(&Options { dir: dir.clone(), stay: false }, &mut report).await;
    report.close();
    if let Some(mut stage) = stage {
        stage.federation.stop(Duration::from_secs(10)).await.unwrap();
    }
    outcome.unwrap_or_else(|e| panic!("{e:#}\nlogs: {}", dir.join("logs").display()));
    assert!(report.held(), "a window did not hold, see the table; logs: {}", dir.join("logs").display());
}
