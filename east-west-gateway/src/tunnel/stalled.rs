//! Slow readers of one link.
//!
//! All streams of a QUIC connection share one window for bytes that nobody has read yet, the control stream too. A stream
//! whose near side takes nothing may hold a whole stream window of it. So that none of the others ever waits for it, the
//! connection's window grows with the slow readers, by memory that all links share (`tunnel.slowReaderBytes`); when that
//! is used up, the one of the link that has been slow for the longest is given up.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Sets the connection's window, in bytes.
type Resize = Box<dyn Fn(u64) + Send + Sync>;

/// How much unread bytes may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Windows {
    /// Of all streams together, while few are slow.
    pub(crate) connection: u32,
    /// Of one stream.
    pub(crate) stream: u32,
}

/// The slow readers of one link.
#[derive(Debug)]
pub(crate) struct Stalled(Arc<Shared>);

struct Shared {
    windows: Windows,
    resize: Resize,
    /// One permit for each stream window beyond the connections' own.
    memory: Arc<Semaphore>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    /// Oldest first.
    places: BTreeMap<u64, CancellationToken>,
    /// By how many stream windows the connection's window has grown.
    grown: Vec<OwnedSemaphorePermit>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("windows", &self.windows).finish_non_exhaustive()
    }
}

/// What slow readers of all links may hold together beyond the links' own windows.
pub(crate) fn memory(slow_reader_bytes: u64, stream_window: u32) -> Arc<Semaphore> {
    let places = slow_reader_bytes / u64::from(stream_window.max(1));
    Arc::new(Semaphore::new(usize::try_from(places).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)))
}

impl Stalled {
    /// `resize` is told the window that the connection should have from now on.
    pub(crate) fn new(windows: Windows, memory: Arc<Semaphore>, resize: Resize) -> Self {
        Self(Arc::new(Shared { windows, resize, memory, inner: Mutex::default() }))
    }

    /// One more, until the place is dropped. The window grows if there is memory.
    pub(crate) fn enter(&self) -> Place {
        let mut inner = self.0.lock();
        let id = inner.next;
        inner.next += 1;
        let given_up = CancellationToken::new();
        inner.places.insert(id, given_up.clone());
        if self.0.is_crowded(&inner)
            && let Ok(more) = self.0.memory.clone().try_acquire_owned()
        {
            inner.grown.push(more);
            self.0.resize(inner.grown.len());
        }
        Place { shared: self.0.clone(), id, given_up }
    }
}

impl Shared {
    /// As many as fit into three quarters of the connection's own window.
    fn borne(&self) -> usize {
        let places = u64::from(self.windows.connection) * 3 / 4 / u64::from(self.windows.stream.max(1));
        usize::try_from(places).unwrap_or(usize::MAX).max(1)
    }

    fn is_crowded(&self, inner: &Inner) -> bool {
        inner.places.len() > self.borne() + inner.grown.len()
    }

    /// Slow readers have three quarters of the grown window, too: a receiver tells its sender of room only when it is an
    /// eighth of the whole (quinn), so that a smaller rest would never be told of.
    fn resize(&self, grown: usize) {
        let grown = grown as u64 * u64::from(self.windows.stream) * 4 / 3;
        (self.resize)(u64::from(self.windows.connection) + grown);
    }

    /// One has caught up, or ended.
    fn leave(&self, id: u64) {
        let mut inner = self.lock();
        inner.places.remove(&id);
        // Half of it at a time, and late, since slow readers come and go many times a second.
        if !inner.grown.is_empty() && inner.places.len() <= (self.borne() + inner.grown.len()) / 2 {
            let keep = inner.grown.len() / 2;
            inner.grown.truncate(keep);
            self.resize(keep);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every section leaves both whole, so a panic in another one does not spoil them.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One slow reader.
#[derive(Debug)]
pub(crate) struct Place {
    shared: Arc<Shared>,
    id: u64,
    given_up: CancellationToken,
}

impl Place {
    /// It has been slow for long: if there is no room, the one that has been slow for the longest is given up.
    pub(crate) fn overdue(&self) {
        let mut inner = self.shared.lock();
        if self.shared.is_crowded(&inner)
            && let Some((_, oldest)) = inner.places.pop_first()
        {
            oldest.cancel();
        }
    }

    /// Resolves when this one is to end.
    pub(crate) fn given_up(&self) -> impl Future<Output = ()> + Send + use<> {
        self.given_up.clone().cancelled_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::FutureExt as _;

    use super::*;

    const MIB: u32 = 1 << 20;

    fn stalled(spare: usize) -> (Stalled, Arc<AtomicU64>, Arc<Semaphore>) {
        let window = Arc::new(AtomicU64::new(0));
        let memory = Arc::new(Semaphore::new(spare));
        let told = window.clone();
        let windows = Windows { connection: 4 * MIB, stream: MIB };
        let resize = Box::new(move |bytes| told.store(bytes, Ordering::Relaxed));
        (Stalled::new(windows, memory.clone(), resize), window, memory)
    }

    fn slow(stalled: &Stalled) -> Place {
        let place = stalled.enter();
        place.overdue();
        place
    }

    fn gone(place: &Place) -> bool {
        place.given_up().now_or_never().is_some()
    }

    #[test]
    fn the_one_that_is_slow_for_the_longest_goes_first_and_only_when_there_are_too_many() {
        let (stalled, ..) = stalled(0);
        let mut places: Vec<Place> = (0..3).map(|_| slow(&stalled)).collect();
        assert!(!places.iter().any(gone));
        places.push(slow(&stalled));
        assert_eq!(places.iter().map(gone).collect::<Vec<_>>(), [true, false, false, false]);
        drop(places.remove(1));
        places.push(slow(&stalled));
        assert_eq!(places.iter().filter(|p| gone(p)).count(), 1, "whoever caught up made room");
    }

    #[test]
    fn the_window_grows_with_slow_readers_and_shrinks_after_them() {
        let (stalled, window, memory) = stalled(8);
        let mut places: Vec<Place> = (0..9).map(|_| slow(&stalled)).collect();
        assert_eq!(window.load(Ordering::Relaxed), u64::from(12 * MIB), "six more than the three that fit");
        assert!(!places.iter().any(gone));
        places.truncate(5);
        assert_eq!(window.load(Ordering::Relaxed), u64::from(12 * MIB), "they may come back at once");
        places.clear();
        assert_eq!((window.load(Ordering::Relaxed), memory.available_permits()), (u64::from(4 * MIB), 8));
    }

    #[test]
    fn what_links_grow_by_is_bounded_for_all_together() {
        let (first, _, memory) = stalled(2);
        let second = Stalled::new(Windows { connection: 4 * MIB, stream: MIB }, memory, Box::new(drop));
        let (held, theirs): (Vec<_>, Vec<_>) = (0..5).map(|_| (slow(&first), slow(&second))).unzip();
        assert_eq!(held.iter().chain(&theirs).filter(|place| gone(place)).count(), 2);
    }
}
