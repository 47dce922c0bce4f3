//! Shares of the places for what is pending, such as ClientHellos or handshakes: one source cannot take them all. A source
//! is an address; of IPv6 from elsewhere a prefix of 64 bits, since whoever has one address there may have them all (RFC
//! 4291, 2.5.1). The Pods of a node share such a prefix: within a cluster each address counts for itself.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Counts by source address; holds no more addresses than there are pending connections.
#[derive(Debug)]
pub(crate) struct Sources {
    max: usize,
    prefixes: bool,
    pending: Mutex<HashMap<IpAddr, usize>>,
}

impl Sources {
    /// Each address of this cluster may have `max` connections pending.
    pub(crate) fn near(max: usize) -> Self {
        Self { max, prefixes: false, pending: Mutex::default() }
    }

    /// Each address or prefix of other clusters may.
    pub(crate) fn far(max: usize) -> Self {
        Self { max, prefixes: true, pending: Mutex::default() }
    }

    /// One more of `source`, unless it has its share.
    pub(crate) fn try_acquire(self: &Arc<Self>, source: IpAddr) -> Option<Share> {
        let source = self.source_of(source);
        let mut pending = self.lock();
        let count = pending.entry(source).or_default();
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(Share { sources: self.clone(), source })
    }

    /// Whether `source` has half of its share already.
    pub(crate) fn is_busy(&self, source: IpAddr) -> bool {
        self.lock().get(&self.source_of(source)).is_some_and(|count| *count >= self.max / 2)
    }

    fn source_of(&self, address: IpAddr) -> IpAddr {
        match address.to_canonical() {
            IpAddr::V6(v6) if self.prefixes => IpAddr::from((u128::from(v6) & !u128::from(u64::MAX)).to_be_bytes()),
            address => address,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One pending connection of a source, while it lives.
#[derive(Debug)]
pub(crate) struct Share {
    sources: Arc<Sources>,
    source: IpAddr,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut pending = self.sources.lock();
        if let Some(count) = pending.get_mut(&self.source) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                pending.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_a_share_is_busy_and_no_share_is_not() {
        let sources = Arc::new(Sources::near(4));
        let source = IpAddr::from([10, 0, 0, 1]);
        let first = sources.try_acquire(source).unwrap();
        assert!(!sources.is_busy(source));
        let _second = sources.try_acquire(source).unwrap();
        assert!(sources.is_busy(source) && !sources.is_busy(IpAddr::from([10, 0, 0, 2])));
        drop(first);
        assert!(!sources.is_busy(source));
    }

    #[test]
    fn each_source_has_its_own_share_and_gets_it_back() {
        let sources = Arc::new(Sources::far(1));
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let share = sources.try_acquire(a).unwrap();
        let mapped = IpAddr::from([0, 0, 0, 0, 0, 0xffff, 0x0a00, 1]);
        assert!(sources.try_acquire(a).is_none() && sources.try_acquire(mapped).is_none());
        drop(sources.try_acquire(b).unwrap());
        let v6 = |text: &str| text.parse::<IpAddr>().unwrap();
        let _prefix = sources.try_acquire(v6("2001:db8::1")).unwrap();
        assert!(sources.try_acquire(v6("2001:db8::ffff:0:0:2")).is_none(), "the same /64");
        drop(sources.try_acquire(v6("2001:db8:0:1::1")).unwrap());
        drop(share);
        assert_eq!(sources.lock().len(), 1, "the prefix");
        assert!(sources.try_acquire(a).is_some());

        let near = Arc::new(Sources::near(1));
        let _one = near.try_acquire(v6("2001:db8::1")).unwrap();
        assert!(near.try_acquire(v6("2001:db8::2")).is_some(), "another Pod of the node");
    }
}
