//! The end of a gateway's work: agent and peers are told, new connections are taken for a while, running ones finish until
//! the deadline, then all is reset.
//!
//! In: the core, and the shutdown that a second signal requests. Out: `core.stop`, cancelled, and a last line that counts.
//! When a successor serves, the same without a word to the agent, and with more time.

use isthmus_runtime::tasks::Shutdown;
use tokio::time;

use crate::core::Core;

/// Drains to the end.
pub(crate) async fn drain(core: &Core, shutdown: &Shutdown) {
    let drain = &core.config.drain;
    let taken_over = core.steps.taken_over.is_cancelled();
    let deadline = if taken_over { drain.handover_deadline } else { drain.deadline };
    tracing::info!(carried = core.carried.len(), ?deadline, taken_over, "draining");
    let (before, open) = (core.metrics.carried_so_far(), core.metrics.carried_now() as u64);
    core.draining.cancel();
    time::sleep(drain.accept_for).await;
    core.closing.cancel();
    core.carried.close();
    let over = async {
        let left = time::sleep(deadline.saturating_sub(drain.accept_for));
        if taken_over {
            // Whoever asks now wants it over within the time that this takes otherwise.
            tokio::select! {
                () = left => {}
                () = shutdown.requested() => time::sleep(drain.deadline).await,
            }
        } else {
            left.await;
        }
    };
    tokio::select! {
        () = core.carried.wait() => {}
        () = over => tracing::warn!(carried = core.carried.len(), "drain deadline over; the rest is reset"),
    }
    let reset = core.metrics.carried_now() as u64;
    let finished = (core.metrics.carried_so_far() - before + open).saturating_sub(reset);
    tracing::info!(finished, reset, "drained");
    core.stop.cancel();
}
