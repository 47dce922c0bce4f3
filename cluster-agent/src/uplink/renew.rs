//! Keeps the agent's own certificate fresh: renewed at half its life, swapped in place.

use std::{path::PathBuf, time::Duration};

use isthmus_api::proto::federation::v1::Role;
use isthmus_identity::{keys::KeyPair, renew::renew_at, svid::Svid, tls::IdentitySource};
use isthmus_model::time::Timestamp;
use isthmus_runtime::{
    backoff::Backoff,
    tasks::{Shutdown, chain},
};
use tokio::time::sleep;

use super::{
    control::{ControlPlane, words},
    join::SVID_NAME,
};
use crate::{
    metrics::Metrics,
    status::{Area, StatusBoard, problem},
};

const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_CAP: Duration = Duration::from_secs(300);
/// Clocks may be set: how long until the next renewal is looked at again at least this often.
const LOOK: Duration = Duration::from_secs(3600);

/// What renewal needs.
#[derive(Clone, Debug)]
pub struct Renewal {
    /// Who signs.
    pub control: ControlPlane,
    /// What is renewed.
    pub identity: IdentitySource,
    /// Where it is kept.
    pub state_dir: PathBuf,
    /// For problems.
    pub status: StatusBoard,
    /// For the expiry.
    pub metrics: Metrics,
}

impl Renewal {
    /// Renews until shutdown.
    pub async fn run(self, shutdown: Shutdown) {
        let mut backoff = Backoff::new(BACKOFF_BASE, BACKOFF_CAP);
        let mut due = renew_at(&self.identity.current());
        loop {
            self.metrics.expiry(self.identity.current().not_after());
            let rest = due.since(Timestamp(isthmus_runtime::now()));
            tokio::select! {
                () = shutdown.requested() => return,
                () = sleep(rest.min(LOOK)) => {}
            }
            if Timestamp(isthmus_runtime::now()) < due {
                continue;
            }
            match self.renew().await {
                Ok(svid) => {
                    tracing::info!(not_after = %svid.not_after(), "the agent's certificate is renewed");
                    due = renew_at(&svid);
                    self.identity.set(svid);
                    self.status.set_problems(Area::Identity, Vec::new());
                    backoff.reset();
                }
                Err(error) => {
                    let pause = backoff.next();
                    due = Timestamp(isthmus_runtime::now()) + pause;
                    tracing::warn!(%error, ?pause, "the agent's certificate is not renewed; trying again");
                    let until = self.identity.current().not_after();
                    let message = format!("cannot be renewed, and ends at {until} since 1970: {error}");
                    self.status.set_problems(Area::Identity, vec![problem("the agent's certificate", message)]);
                }
            }
        }
    }

    /// A new key and certificate of the same identity, on disk.
    async fn renew(&self) -> Result<Svid, String> {
        let key = KeyPair::generate().map_err(|e| chain(&e))?;
        let csr = key.csr_der().map_err(|e| chain(&e))?;
        let signed = self.control.sign(Role::Agent, csr).await.map_err(|s| words(&s))?;
        let svid = Svid::new(signed.chain, &key).map_err(|e| chain(&e))?;
        let id = self.identity.current().id().clone();
        if *svid.id() != id {
            return Err(format!("the control plane signed for {}, not for {id}", svid.id()));
        }
        let (saved, dir) = (svid.clone(), self.state_dir.clone());
        tokio::task::spawn_blocking(move || saved.save(&dir, SVID_NAME))
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| chain(&e))?;
        Ok(svid)
    }
}
