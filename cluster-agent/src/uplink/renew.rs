//! Keeps the agent's own certificate fresh: renewed at half its life, swapped in place.

use std::{path::PathBuf, time::Duration};

use isthmus_api::proto::federation::v1::Role;
use isthmus_identity::{keys::KeyPair, renew::renew_at, rfc3339, svid::Svid, tls::IdentitySource};
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
                    tracing::info!(not_after = %rfc3339(svid.not_after()), "the agent's certificate is renewed");
                    due = renew_at(&svid);
                    self.identity.set(svid);
                    self.status.set_problems(Area::Identity, Vec::new());
                    backoff.reset();
                }
                Err(error) => {
                    let pause = backoff.next();
                    let now = Timestamp(isthmus_runtime::now());
                    due = now + pause;
                    tracing::warn!(%error, ?pause, "the agent's certificate is not renewed; trying again");
                    let message = not_renewed(&self.identity.current(), now, &error);
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

/// What a person must know of a certificate that is not renewed.
fn not_renewed(svid: &Svid, now: Timestamp, error: &str) -> String {
    let until = rfc3339(svid.not_after());
    if svid.not_after() > now {
        return format!("cannot be renewed, and ends at {until}: {error}");
    }
    // No server accepts it any more, the one that would renew it included.
    let cluster = svid.id().segments().nth(1).unwrap_or("CLUSTER");
    format!(
        "ended at {until} and can no longer be renewed ({error}): mint a token with `isthmusctl cluster join-token \
         {cluster}`, write it to the `joinTokenFile`, and restart the agent"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_dates_and_an_ended_certificate_with_the_way_back() {
        isthmus_identity::install_crypto();
        let federation = "isthmus.example".parse().unwrap();
        let ca = isthmus_identity::ca::CertificateAuthority::create(&federation, Duration::from_secs(7200)).unwrap();
        let id = isthmus_model::ids::SpiffeId::component(&federation, &"us-east".parse().unwrap(), "agent").unwrap();
        let key = KeyPair::generate().unwrap();
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(3600)).unwrap();
        let svid = Svid::new(chain, &key).unwrap();
        let until = rfc3339(svid.not_after());
        assert!(until.starts_with("20") && until.ends_with('Z'), "{until}");
        let before = not_renewed(&svid, svid.not_before(), "away");
        assert!(before.contains(&until) && !before.contains("join-token"), "{before}");
        let after = not_renewed(&svid, svid.not_after(), "away");
        assert!(after.contains(&until) && after.contains("isthmusctl cluster join-token us-east"), "{after}");
    }
}
