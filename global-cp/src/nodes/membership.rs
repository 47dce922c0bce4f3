//! Makes the group's members those that the state lists, on whichever node leads: a newcomer learns, then votes; one that
//! was removed leaves. Whoever leads next goes on where the last one stopped. It also raises the feature level when all nodes
//! support a higher one.

use std::{collections::BTreeMap, time::Duration};

use isthmus_runtime::tasks::{Tasks, chain};
use tokio::time::sleep;

use crate::{
    raft::{Group, Peer, Proposer},
    state::Command,
};

/// After a change that failed, and while a learner is behind.
const RETRY: Duration = Duration::from_millis(500);

pub(crate) fn follow(tasks: &Tasks, group: Group, proposer: Proposer) {
    let shutdown = tasks.shutdown();
    tasks.spawn("group-members", async move {
        let (mut engine, mut views) = (group.metrics(), group.views());
        loop {
            let leads = {
                let engine = engine.borrow_and_update();
                engine.current_leader == Some(engine.id)
            };
            let wanted: BTreeMap<u64, Peer> = views
                .borrow_and_update()
                .state()
                .nodes()
                .iter()
                .map(|(name, info)| (info.id, Peer { name: name.to_string(), address: info.address.clone() }))
                .collect();
            let attainable = views.borrow().state().attainable_level().filter(|_| leads);
            if let Some(to) = attainable {
                match proposer.propose(Command::RaiseLevel { to }).await {
                    Ok(_) => tracing::info!(level = to, "all nodes support it: the feature level rises"),
                    Err(error) => {
                        tracing::warn!(%error, "the feature level could not be raised; trying again");
                        sleep(RETRY).await;
                    }
                }
                continue;
            }
            // Before the founding node has said who it is there is nothing to follow.
            if leads && !wanted.is_empty() {
                match group.follow(&wanted).await {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(error = %chain(&error), "the group's members could not be changed; trying again");
                        sleep(RETRY).await;
                    }
                }
            }
            tokio::select! {
                () = shutdown.requested() => return,
                changed = views.changed() => if changed.is_err() { return },
                changed = engine.changed() => if changed.is_err() { return },
            }
        }
    });
}
