//! Room for bytes that nobody has read yet: the windows of QUIC links, and their slow readers.
//!
//! All links share one amount of memory for their windows (`tunnel.totalWindowBytes`), evenly, and none has more than
//! `tunnel.connectionWindowBytes`. All streams of a QUIC connection share its window, the control stream too. A stream
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

use crate::config::TunnelConfig;

/// Sets a connection's windows for receiving and for sending, in bytes.
pub(crate) type Resize = Box<dyn Fn(u64, u64) + Send + Sync>;

/// What all links may hold.
#[derive(Debug)]
pub(crate) struct Room {
    /// Of all links' own windows together.
    total: u64,
    /// Of one link's own window, at most.
    connection: u64,
    /// Of one stream.
    stream: u64,
    /// One permit for each stream window beyond the links' own.
    spare: Arc<Semaphore>,
    links: Mutex<Links>,
}

#[derive(Debug, Default)]
struct Links {
    next: u64,
    all: BTreeMap<u64, Arc<Shared>>,
}

/// The slow readers of one link.
#[derive(Debug)]
pub(crate) struct Stalled {
    room: Arc<Room>,
    id: u64,
    shared: Arc<Shared>,
}

struct Shared {
    stream: u64,
    resize: Resize,
    spare: Arc<Semaphore>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The link's own window.
    own: u64,
    next: u64,
    /// Oldest first.
    places: BTreeMap<u64, CancellationToken>,
    /// By how many stream windows the connection's window has grown.
    grown: Vec<OwnedSemaphorePermit>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl Room {
    /// As configured, with no link yet.
    pub(crate) fn new(config: &TunnelConfig) -> Self {
        let stream = u64::from(config.stream_window_bytes.max(1));
        let spare = usize::try_from(config.slow_reader_bytes / stream).unwrap_or(usize::MAX);
        Self {
            total: config.total_window_bytes,
            connection: config.connection_window_bytes.into(),
            stream,
            spare: Arc::new(Semaphore::new(spare.min(Semaphore::MAX_PERMITS))),
            links: Mutex::default(),
        }
    }

    /// The part of one more link; `resize` is told the windows that it should have from now on.
    pub(crate) fn link(self: &Arc<Self>, resize: Resize) -> Stalled {
        let (spare, inner) = (self.spare.clone(), Mutex::default());
        let shared = Arc::new(Shared { stream: self.stream, resize, spare, inner });
        let mut links = self.lock();
        let id = links.next;
        links.next += 1;
        links.all.insert(id, shared.clone());
        self.deal(&links);
        drop(links);
        Stalled { room: self.clone(), id, shared }
    }

    /// To each link the same; one stream must fit.
    fn deal(&self, links: &Links) {
        let each = (self.total / (links.all.len() as u64).max(1)).min(self.connection).max(self.stream);
        links.all.values().for_each(|link| link.give(each));
    }

    fn lock(&self) -> MutexGuard<'_, Links> {
        // Every section leaves it whole, so a panic in another one does not spoil it.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stalled {
    /// One more, until the place is dropped. The window grows if there is memory.
    pub(crate) fn enter(&self) -> Place {
        let mut inner = self.shared.lock();
        let id = inner.next;
        inner.next += 1;
        let given_up = CancellationToken::new();
        inner.places.insert(id, given_up.clone());
        if self.shared.grow(&mut inner) {
            self.shared.resize(&inner);
        }
        Place { shared: self.shared.clone(), id, given_up }
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        let mut links = self.room.lock();
        links.all.remove(&self.id);
        self.room.deal(&links);
    }
}

impl Shared {
    /// The link's own window is this from now on.
    fn give(&self, own: u64) {
        let mut inner = self.lock();
        if inner.own != own {
            inner.own = own;
            while self.grow(&mut inner) {}
            self.resize(&inner);
        }
    }

    /// One stream window more if that is needed and there is memory.
    fn grow(&self, inner: &mut Inner) -> bool {
        let more = self.is_crowded(inner).then(|| self.spare.clone().try_acquire_owned().ok()).flatten();
        let grows = more.is_some();
        inner.grown.extend(more);
        grows
    }

    /// As many as fit into three quarters of the connection's own window.
    fn borne(&self, inner: &Inner) -> usize {
        usize::try_from(inner.own * 3 / 4 / self.stream).unwrap_or(usize::MAX).max(1)
    }

    fn is_crowded(&self, inner: &Inner) -> bool {
        inner.places.len() > self.borne(inner) + inner.grown.len()
    }

    /// Slow readers have three quarters of the grown window, too: a receiver tells its sender of room only when it is an
    /// eighth of the whole (quinn), so that a smaller rest would never be told of.
    fn resize(&self, inner: &Inner) {
        let grown = inner.grown.len() as u64 * self.stream * 4 / 3;
        (self.resize)(inner.own + grown, inner.own);
    }

    /// One has caught up, or ended.
    fn leave(&self, id: u64) {
        let mut inner = self.lock();
        inner.places.remove(&id);
        // Half of it at a time, and late, since slow readers come and go many times a second.
        if !inner.grown.is_empty() && inner.places.len() <= (self.borne(&inner) + inner.grown.len()) / 2 {
            let keep = inner.grown.len() / 2;
            inner.grown.truncate(keep);
            self.resize(&inner);
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

    const MIB: u64 = 1 << 20;

    /// For links of up to 4 MiB and streams of 1 MiB.
    fn room(total: u64, spare: u64) -> Arc<Room> {
        Arc::new(Room::new(&TunnelConfig {
            total_window_bytes: total,
            connection_window_bytes: 4 << 20,
            stream_window_bytes: 1 << 20,
            slow_reader_bytes: spare * MIB,
            ..TunnelConfig::default()
        }))
    }

    /// A link, and the window that it was told of last.
    fn link(room: &Arc<Room>) -> (Stalled, Arc<AtomicU64>) {
        let window = Arc::new(AtomicU64::new(0));
        let told = window.clone();
        (room.link(Box::new(move |receive, _| told.store(receive, Ordering::Relaxed))), window)
    }

    fn of(window: &AtomicU64) -> u64 {
        window.load(Ordering::Relaxed) / MIB
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
        let (stalled, _) = link(&room(4 * MIB, 0));
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
        let room = room(4 * MIB, 8);
        let (stalled, window) = link(&room);
        let mut places: Vec<Place> = (0..9).map(|_| slow(&stalled)).collect();
        assert_eq!(of(&window), 12, "six more than the three that fit");
        assert!(!places.iter().any(gone));
        places.truncate(5);
        assert_eq!(of(&window), 12, "they may come back at once");
        places.clear();
        assert_eq!((of(&window), room.spare.available_permits()), (4, 8));
    }

    #[test]
    fn what_links_grow_by_is_bounded_for_all_together() {
        let room = room(8 * MIB, 2);
        let ((first, _), (second, _)) = (link(&room), link(&room));
        let (held, theirs): (Vec<_>, Vec<_>) = (0..5).map(|_| (slow(&first), slow(&second))).unzip();
        assert_eq!(held.iter().chain(&theirs).filter(|place| gone(place)).count(), 2);
    }

    #[test]
    fn links_share_one_amount_evenly_and_have_it_back_when_others_go() {
        let room = room(6 * MIB, 2);
        let (first, window) = link(&room);
        assert_eq!(of(&window), 4, "no more than a link may have");
        let others: Vec<_> = (0..2).map(|_| link(&room)).collect();
        assert_eq!((of(&window), of(&others[1].1)), (2, 2));
        let many: Vec<_> = (0..20).map(|_| link(&room)).collect();
        assert_eq!((of(&window), of(&many[19].1)), (1, 1), "one stream must fit");
        drop((others, many));
        assert_eq!(of(&window), 4);
        let places: Vec<Place> = (0..3).map(|_| slow(&first)).collect();
        let (_second, _) = link(&room);
        assert_eq!(
            of(&window),
            3 + 1,
            "its slow readers do not fit any more, and one that does not is borne beyond it"
        );
        assert!(!places.iter().any(gone));
    }
}
