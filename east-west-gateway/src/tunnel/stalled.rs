//! Slow readers of one link, of which only so many are borne.
//!
//! All streams of a QUIC connection share one window for bytes that nobody has read yet, the control stream too. A stream
//! whose near side takes nothing may hold a whole stream window of it; when too many do, the one that has been slow for the
//! longest is given up, so that none of the others ever waits for it.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// The slow readers of one link.
#[derive(Debug)]
pub(crate) struct Stalled {
    limit: usize,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// Oldest first.
    places: BTreeMap<u64, CancellationToken>,
}

impl Stalled {
    /// Bears as many as fit into three quarters of the connection's window.
    pub(crate) fn new(connection_window: u32, stream_window: u32) -> Self {
        let limit = u64::from(connection_window) * 3 / 4 / u64::from(stream_window.max(1));
        Self { limit: usize::try_from(limit).unwrap_or(usize::MAX).max(1), inner: Arc::default() }
    }

    /// One more, until the place is dropped. If that is one too many, the oldest is given up.
    pub(crate) fn enter(&self) -> Place {
        let mut inner = lock(&self.inner);
        let id = inner.next;
        inner.next += 1;
        let given_up = CancellationToken::new();
        inner.places.insert(id, given_up.clone());
        if inner.places.len() > self.limit
            && let Some((_, oldest)) = inner.places.pop_first()
        {
            oldest.cancel();
        }
        Place { inner: self.inner.clone(), id, given_up }
    }
}

/// One slow reader.
#[derive(Debug)]
pub(crate) struct Place {
    inner: Arc<Mutex<Inner>>,
    id: u64,
    given_up: CancellationToken,
}

impl Place {
    /// Resolves when this one is to end.
    pub(crate) fn given_up(&self) -> impl Future<Output = ()> + Send + use<> {
        self.given_up.clone().cancelled_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.inner).places.remove(&self.id);
    }
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    // Every section leaves the map whole, so a panic in another one does not spoil it.
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn the_one_that_is_slow_for_the_longest_goes_first_and_only_when_there_are_too_many() {
        let stalled = Stalled::new(4 << 20, 1 << 20);
        let mut places: Vec<Place> = (0..3).map(|_| stalled.enter()).collect();
        let gone = |place: &Place| place.given_up().now_or_never().is_some();
        assert!(!places.iter().any(gone));
        places.push(stalled.enter());
        assert_eq!(places.iter().map(gone).collect::<Vec<_>>(), [true, false, false, false]);
        drop(places.remove(1));
        places.push(stalled.enter());
        assert_eq!(places.iter().filter(|p| gone(p)).count(), 1, "whoever caught up made room");
    }
}
