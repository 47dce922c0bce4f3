//! Room for bytes that nobody has read yet: the windows of QUIC links, and their slow readers.
//!
//! All links share one amount of memory for their windows (`tunnel.totalWindowBytes`), evenly, and none has more than
//! `tunnel.connectionWindowBytes`. All streams of a QUIC connection share its window, the control stream too. A stream
//! whose near side takes nothing may hold a whole stream window of it. So that none of the others ever waits for it, the
//! connection's window grows with the slow readers, by memory that all links share (`tunnel.slowReaderBytes`); when that
//! is used up, the one of the link that has been slow for the longest is given up.
//!
//! Windows grow at once and shrink slowly ([`Room::shrink`]). What a window shrinks by is a debt: the peer gets no credit
//! before so much was read (quinn), and then nobody's bytes pass, not even those of the control stream. A link whose
//! window swung by a hundred megabytes was given up for dead. So no more than a part of what was read of late is owed.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time,
};
use tokio_util::sync::CancellationToken;

use crate::config::TunnelConfig;

/// Between two steps of a window that shrinks.
const STEP_EVERY: Duration = Duration::from_millis(50);
/// Of what was read since the last step a window shrinks by one part in so many: the rest is credit.
const OWED: u64 = 4;
/// After so many steps without a byte a link carries nothing: a second, longer than a lost packet takes.
const IDLE: u32 = 20;

/// A connection's windows.
pub(crate) struct Windows {
    /// Sets those for receiving and for sending, in bytes.
    pub(crate) resize: Box<dyn Fn(u64, u64) + Send + Sync>,
    /// Bytes that were read from it so far.
    pub(crate) read: Box<dyn Fn() -> u64 + Send + Sync>,
}

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
    /// Some window is not as it should be yet.
    unsettled: Arc<Notify>,
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
    windows: Windows,
    spare: Arc<Semaphore>,
    unsettled: Arc<Notify>,
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
    /// The windows as they are: as they should be, or on their way there.
    receive: u64,
    send: u64,
    /// What had been read at the last step.
    read: u64,
    /// What the window has shrunk by and was not read since: the peer has credit for it beyond the window.
    owed: u64,
    /// Steps since something was read.
    still: u32,
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
            unsettled: Arc::default(),
        }
    }

    /// Makes windows smaller that are larger than they should be, step by step, for ever.
    pub(crate) async fn shrink(self: Arc<Self>) {
        loop {
            self.unsettled.notified().await;
            while self.step() {
                time::sleep(STEP_EVERY).await;
            }
        }
    }

    /// One step of all that shrink; whether there is more to do.
    fn step(&self) -> bool {
        let links: Vec<Arc<Shared>> = self.lock().all.values().cloned().collect();
        links.iter().fold(false, |more, link| link.step() | more)
    }

    /// The part of one more link, which is told the windows that it should have from now on.
    pub(crate) fn link(self: &Arc<Self>, windows: Windows) -> Stalled {
        let (spare, unsettled, inner) = (self.spare.clone(), self.unsettled.clone(), Mutex::default());
        let shared = Arc::new(Shared { stream: self.stream, windows, spare, unsettled, inner });
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
            self.shared.resize(&mut inner);
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
            self.resize(&mut inner);
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

    /// The window with `grown` stream windows more than its own. Slow readers have three quarters of these, too: a receiver
    /// tells its sender of room only when it is an eighth of the whole (quinn), so that a smaller rest would never be told
    /// of.
    fn window(&self, inner: &Inner, grown: usize) -> u64 {
        inner.own + grown as u64 * self.stream * 4 / 3
    }

    /// Up at once, down later. What a peer was granted and has not used is not granted again.
    fn resize(&self, inner: &mut Inner) {
        let target = self.window(inner, inner.grown.len());
        let (receive, send) = (inner.receive.max(target.saturating_sub(inner.owed)), inner.own.max(inner.send));
        self.set(inner, receive, send);
        if receive != target || send > inner.own {
            self.unsettled.notify_one();
        }
    }

    /// By how many stream windows it is to have grown. Half of it at a time, and late, since slow readers come and go many
    /// times a second.
    fn wanted(&self, inner: &Inner) -> usize {
        let grown = inner.grown.len();
        if inner.places.len() <= (self.borne(inner) + grown) / 2 { grown / 2 } else { grown }
    }

    /// One step towards the windows that there should be; whether there is more to do.
    fn step(&self) -> bool {
        let mut inner = self.lock();
        let read = (self.windows.read)();
        let since = read.saturating_sub(std::mem::replace(&mut inner.read, read));
        inner.owed = inner.owed.saturating_sub(since);
        inner.still = if since == 0 { inner.still.saturating_add(1) } else { 0 };
        // Nobody waits for the credit of a link that carries nothing.
        let idle = inner.still >= IDLE && inner.places.is_empty();
        let most = if idle { u64::MAX } else { since / OWED };
        let wanted = self.wanted(&inner);
        let target = self.window(&inner, wanted);
        let receive = if inner.receive > target {
            target.max(inner.receive.saturating_sub(most))
        } else {
            inner.receive.max(target.saturating_sub(inner.owed))
        };
        let send = inner.own.max(inner.send.saturating_sub(most));
        self.set(&mut inner, receive, send);
        // The memory is free when the window is.
        while inner.grown.len() > wanted && self.window(&inner, inner.grown.len() - 1) >= receive {
            inner.grown.pop();
        }
        receive != self.window(&inner, self.wanted(&inner)) || send > inner.own
    }

    fn set(&self, inner: &mut Inner, receive: u64, send: u64) {
        if (receive, send) != (inner.receive, inner.send) {
            inner.owed += inner.receive.saturating_sub(receive);
            (inner.receive, inner.send) = (receive, send);
            (self.windows.resize)(receive, send);
        }
    }

    /// One has caught up, or ended.
    fn leave(&self, id: u64) {
        let mut inner = self.lock();
        inner.places.remove(&id);
        if self.wanted(&inner) < inner.grown.len() {
            self.unsettled.notify_one();
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

    /// A link that carries nothing, and the window that it was told of last.
    fn link(room: &Arc<Room>) -> (Stalled, Arc<AtomicU64>) {
        busy_link(room, Arc::default())
    }

    /// The same with a counter of what was read from it.
    fn busy_link(room: &Arc<Room>, read: Arc<AtomicU64>) -> (Stalled, Arc<AtomicU64>) {
        let window = Arc::new(AtomicU64::new(0));
        let told = window.clone();
        let windows = Windows {
            resize: Box::new(move |receive, _| told.store(receive, Ordering::Relaxed)),
            read: Box::new(move || read.load(Ordering::Relaxed)),
        };
        (room.link(windows), window)
    }

    /// As many steps as there are.
    fn settle(room: &Room) {
        while room.step() {}
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
        settle(&room);
        assert_eq!(of(&window), 12, "they may come back at once");
        places.clear();
        settle(&room);
        assert_eq!((of(&window), room.spare.available_permits()), (4, 8));
    }

    #[test]
    fn a_window_shrinks_by_a_part_of_what_is_read() {
        let (room, read) = (room(4 * MIB, 8), Arc::new(AtomicU64::new(0)));
        let (stalled, window) = busy_link(&room, read.clone());
        let places: Vec<Place> = (0..9).map(|_| slow(&stalled)).collect();
        let mut before = window.load(Ordering::Relaxed);
        let _one_stays = places.into_iter().next();
        let mut steps = 0;
        loop {
            let more = room.step();
            let after = window.load(Ordering::Relaxed);
            // Nothing is owed where nothing was read, since somebody holds what has come.
            assert!(before - after <= if steps == 0 { 0 } else { MIB / OWED }, "step {steps}: {before} {after}");
            before = after;
            if !more {
                break;
            }
            read.fetch_add(MIB, Ordering::Relaxed);
            steps += 1;
        }
        assert_eq!((of(&window), room.spare.available_permits()), (4, 8));
        assert!(steps >= 8 * OWED, "{steps}");
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
        let read = Arc::new(AtomicU64::new(0));
        let (first, window) = busy_link(&room, read.clone());
        assert_eq!(of(&window), 4, "no more than a link may have");
        let others: Vec<_> = (0..2).map(|_| link(&room)).collect();
        settle(&room);
        assert_eq!((of(&window), of(&others[1].1)), (2, 2));
        let many: Vec<_> = (0..20).map(|_| link(&room)).collect();
        settle(&room);
        assert_eq!((of(&window), of(&many[19].1)), (1, 1), "one stream must fit");
        drop((others, many));
        assert_eq!(of(&window), 1, "its peer was granted the rest before");
        read.fetch_add(3 * MIB, Ordering::Relaxed);
        settle(&room);
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
