//! What only time brings to the state (a withdrawal that nobody objected to, a virtual IP whose quarantine is over):
//! proposed by whoever leads, when it is due.

use std::time::Duration;

use isthmus_model::time::Timestamp;
use isthmus_runtime::tasks::Tasks;
use tokio::time::sleep;

use crate::{
    raft::{Group, Proposer},
    state::Command,
};

/// Between two looks at the clock, which may be set, while something will be due; and after a failure.
const LOOK: Duration = Duration::from_secs(1);

pub(crate) fn follow(tasks: &Tasks, group: Group, proposer: Proposer) {
    let shutdown = tasks.shutdown();
    tasks.spawn("state-clock", async move {
        let (mut engine, mut views) = (group.metrics(), group.views());
        loop {
            let leads = {
                let engine = engine.borrow_and_update();
                engine.current_leader == Some(engine.id)
            };
            let due = views.borrow_and_update().state().due().filter(|_| leads);
            let now = Timestamp(isthmus_runtime::now());
            if due.is_some_and(|due| due <= now)
                && let Err(error) = proposer.propose(Command::PassTime { now }).await
            {
                tracing::warn!(%error, "what is due could not be done; trying again");
            }
            let look = async {
                match due {
                    Some(_) => sleep(LOOK).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = shutdown.requested() => return,
                () = look => {}
                changed = views.changed(), if due.is_none() => if changed.is_err() { return },
                changed = engine.changed(), if due.is_none() => if changed.is_err() { return },
            }
        }
    });
}
