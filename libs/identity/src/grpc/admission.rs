//! How many connections a listener keeps open, and for how long: what a peer may take before anyone knows who it is.
//!
//! In: the peer of a finished handshake. Out: a [`Place`] that the connection holds while it is open, or a refusal.
//! Two pools, so that strangers (peers without a certificate, who come to join or to enrol) never take a place from
//! those who showed one. Strangers are also bounded by source, and in time.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::PeerInfo;

/// Most open connections of peers whose identity was verified, per listener.
pub const MAX_KNOWN: usize = 4096;

/// Most open connections of peers without a certificate, per listener.
pub const MAX_STRANGERS: usize = 128;

/// Most of those from one address (IPv6: from one /64, which is what one host can have).
pub const MAX_STRANGERS_PER_SOURCE: usize = 32;

/// How long a connection without a certificate lasts, whatever it does. A join takes seconds.
pub const STRANGER_LIFETIME: Duration = Duration::from_secs(60);

/// The bounds; the constants above unless a test says otherwise.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) known: usize,
    pub(super) strangers: usize,
    pub(super) strangers_per_source: usize,
    pub(super) stranger_lifetime: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            known: MAX_KNOWN,
            strangers: MAX_STRANGERS,
            strangers_per_source: MAX_STRANGERS_PER_SOURCE,
            stranger_lifetime: STRANGER_LIFETIME,
        }
    }
}

/// The pools of one listener. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Admission {
    limits: Limits,
    known: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    sources: Sources,
}

/// Open connections of strangers, by source; no entry is 0.
type Sources = Arc<Mutex<BTreeMap<IpAddr, usize>>>;

/// A connection's place in its pool, free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    _source: Option<SourcePlace>,
    /// The connection ends then.
    pub(super) lifetime: Option<Duration>,
}

#[derive(Debug)]
struct SourcePlace {
    sources: Sources,
    source: IpAddr,
}

impl Admission {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            known: Arc::new(Semaphore::new(limits.known)),
            strangers: Arc::new(Semaphore::new(limits.strangers)),
            sources: Sources::default(),
        }
    }

    /// A place for `peer`, or the words for why there is none.
    pub(super) fn admit(&self, peer: &PeerInfo) -> Result<Place, &'static str> {
        if peer.id.is_some() {
            let permit = Arc::clone(&self.known).try_acquire_owned();
            let permit = permit.map_err(|_| "too many connections are open")?;
            return Ok(Place { _permit: permit, _source: None, lifetime: None });
        }
        let permit = Arc::clone(&self.strangers).try_acquire_owned();
        let permit = permit.map_err(|_| "too many connections without a certificate are open")?;
        let source = self.place_of(source_of(peer.remote.ip()));
        let source = source.ok_or("its address has too many connections without a certificate open")?;
        Ok(Place { _permit: permit, _source: Some(source), lifetime: Some(self.limits.stranger_lifetime) })
    }

    fn place_of(&self, source: IpAddr) -> Option<SourcePlace> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let open = sources.get(&source).copied().unwrap_or(0);
        if open >= self.limits.strangers_per_source {
            return None;
        }
        sources.insert(source, open + 1);
        Some(SourcePlace { sources: Arc::clone(&self.sources), source })
    }
}

impl Drop for SourcePlace {
    fn drop(&mut self) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        match sources.get_mut(&self.source) {
            Some(open) if *open > 1 => *open -= 1,
            _ => {
                sources.remove(&self.source);
            }
        }
    }
}

/// Whom the address stands for: IPv4 as it is, even when mapped into IPv6, and of IPv6 the /64.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stranger(address: &str) -> PeerInfo {
        PeerInfo { id: None, remote: std::net::SocketAddr::new(address.parse().unwrap(), 1) }
    }

    fn known() -> PeerInfo {
        PeerInfo { id: Some("spiffe://east.example/x".parse().unwrap()), ..stranger("192.0.2.1") }
    }

    fn limits(known: usize, strangers: usize, strangers_per_source: usize) -> Admission {
        Admission::new(Limits { known, strangers, strangers_per_source, ..Limits::default() })
    }

    #[test]
    fn strangers_take_no_place_from_the_known_nor_the_other_way_round() {
        let admission = limits(1, 1, 9);
        let open = (admission.admit(&stranger("192.0.2.1")).unwrap(), admission.admit(&known()).unwrap());
        assert!(admission.admit(&stranger("192.0.2.2")).is_err());
        assert!(admission.admit(&known()).is_err());
        drop(open);
        assert!(admission.admit(&known()).is_ok() && admission.admit(&stranger("192.0.2.2")).is_ok());
    }

    #[test]
    fn one_source_gets_only_its_share_and_leaves_no_trace() {
        let admission = limits(9, 9, 2);
        let open: Vec<_> =
            ["2001:db8::1", "2001:db8::2"].map(|a| admission.admit(&stranger(a)).unwrap()).into_iter().collect();
        assert!(admission.admit(&stranger("2001:db8::3")).is_err(), "the same /64");
        assert!(admission.admit(&stranger("2001:db8:0:1::3")).is_ok());
        drop(open);
        assert!(admission.sources.lock().unwrap().is_empty());
        let _v4 = ["192.0.2.1", "::ffff:192.0.2.1"].map(|a| admission.admit(&stranger(a)).unwrap());
        assert!(admission.admit(&stranger("192.0.2.1")).is_err(), "mapped or not, it is one host");
    }

    #[test]
    fn only_strangers_have_a_lifetime() {
        let admission = Admission::new(Limits::default());
        assert_eq!(admission.admit(&known()).unwrap().lifetime, None);
        assert_eq!(admission.admit(&stranger("192.0.2.1")).unwrap().lifetime, Some(STRANGER_LIFETIME));
    }
}
