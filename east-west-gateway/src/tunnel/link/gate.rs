//! Who may write to a QUIC connection whose window is used up, and how much was read from it.
//!
//! All streams share the connection's windows, and quinn lets whoever asks first have what becomes free: with more bulk
//! streams than the windows hold, a control frame or the head of a new stream could wait for as long as these go on, and
//! the link would be given up for dead. So what is short goes ahead: while such a write waits, bulk holds still. A short
//! write of a carried connection only tries before bulk does, and not for ever: it may be its own stream's window that it
//! waits for, which quinn does not tell, and bulk must not hold still for a slow reader.

use std::{
    collections::{HashMap, HashSet},
    future::poll_fn,
    ops::{Deref, DerefMut},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use quinn::StreamId;

use super::Broken;

/// What a carried connection writes at once, when it is no bulk.
const SHORT: usize = 4 * 1024;
/// Tries in vain until a short write is taken to wait for its own stream's window.
const TRIES: u8 = u8::MAX;

/// One for each connection.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// For how many writes bulk holds still.
    ahead: AtomicUsize,
    /// Bulk that holds still.
    held: Mutex<Wakers>,
    shorts: Mutex<Shorts>,
    /// Bytes that were read from the connection's streams.
    read: AtomicU64,
}

type Wakers = HashMap<StreamId, Waker>;

/// Short writes of carried connections that found no room.
#[derive(Debug, Default)]
struct Shorts {
    waiting: Wakers,
    /// Woken to try before bulk does; bulk holds still for each until it has.
    asked: HashSet<StreamId>,
}

impl Gate {
    /// Bytes that were read from the connection's streams so far.
    pub(super) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// So many more.
    pub(super) fn count_read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bulk holds still while this lives.
    fn go_ahead(&self) -> Ahead<'_> {
        self.ahead.fetch_add(1, Ordering::AcqRel);
        Ahead(self)
    }

    /// Whether bulk on `stream` is to hold still; it is woken when that is over.
    fn holds(&self, stream: StreamId, cx: &Context<'_>) -> bool {
        let waits = || self.ahead.load(Ordering::Acquire) > 0;
        if !waits() {
            return false;
        }
        locked(&self.held).insert(stream, cx.waker().clone());
        // Whoever was last may have woken the others before this one was among them.
        waits()
    }

    /// Whether bulk on `stream` may try now; it is woken if not. Those who wait with something short try before it, once:
    /// then bulk must, whatever came of it, since only a try in vain makes quinn wake it when there is room.
    fn bulk_may_try(&self, stream: StreamId, asked: &mut bool, cx: &Context<'_>) -> bool {
        if !std::mem::replace(asked, true) {
            self.ask_shorts();
        }
        if self.holds(stream, cx) {
            return false;
        }
        *asked = false;
        true
    }

    fn ask_shorts(&self) {
        let mut shorts = locked(&self.shorts);
        if shorts.waiting.is_empty() {
            return;
        }
        let woken = std::mem::take(&mut shorts.waiting);
        self.ahead.fetch_add(woken.len(), Ordering::AcqRel);
        shorts.asked.extend(woken.keys());
        drop(shorts);
        woken.into_values().for_each(Waker::wake);
    }

    /// Something short on `stream` has tried, and found no room if it gives a waker. Whether it was asked to try.
    fn tried(&self, stream: StreamId, waker: Option<Waker>) -> bool {
        let mut shorts = locked(&self.shorts);
        shorts.waiting.remove(&stream);
        shorts.waiting.extend(waker.map(|waker| (stream, waker)));
        let asked = shorts.asked.remove(&stream);
        drop(shorts);
        if asked {
            self.one_done();
        }
        asked
    }

    /// Bulk need not hold still for this one any more.
    fn one_done(&self) {
        if self.ahead.fetch_sub(1, Ordering::AcqRel) == 1 {
            let held = std::mem::take(&mut *locked(&self.held));
            held.into_values().for_each(Waker::wake);
        }
    }
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every section leaves it whole, so a panic in another one does not spoil it.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Ahead<'a>(&'a Gate);

impl Drop for Ahead<'_> {
    fn drop(&mut self) {
        self.0.one_done();
    }
}

/// What [`GatedSend::look`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// The peer has stopped the stream, or the connection is gone.
    Stopped,
    /// It has not.
    Read,
    /// There is no room in the connection's windows to find out.
    Unknown,
}

/// A stream of a connection with a gate.
#[derive(Debug)]
pub(crate) struct GatedSend {
    stream: quinn::SendStream,
    gate: Arc<Gate>,
    /// What is to be written is the rest of more, or has tried too often: bulk, however little it is.
    bulk: bool,
    /// Tries in vain with something short.
    tries: u8,
    /// For this try of bulk, those with something short were asked.
    asked: bool,
}

impl GatedSend {
    pub(crate) fn new(stream: quinn::SendStream, gate: Arc<Gate>) -> Self {
        Self { stream, gate, bulk: false, tries: 0, asked: false }
    }

    /// Something short, all of it.
    pub(crate) async fn write_short(&mut self, bytes: Bytes) -> Result<(), Broken> {
        let mut write = pin!(self.stream.write_chunk(bytes));
        if let Poll::Ready(written) = poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await {
            return written.map_err(|_| Broken);
        }
        let _ahead = self.gate.go_ahead();
        write.await.map_err(|_| Broken)
    }

    /// Some of `chunks`, at least a byte; what is written is gone from them.
    pub(crate) fn poll_some(&mut self, cx: &mut Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<usize, Broken>> {
        let stream = self.stream.id();
        let length: usize = chunks.iter().map(Bytes::len).sum();
        let short = length <= SHORT && !self.bulk;
        if !short {
            self.leave_shorts();
            if !self.gate.bulk_may_try(stream, &mut self.asked, cx) {
                return Poll::Pending;
            }
        }
        // The future holds nothing between polls that a new one would not find out.
        let written = pin!(self.stream.write_chunks(chunks)).poll(cx);
        match &written {
            Poll::Ready(written) => {
                self.bulk = written.as_ref().is_ok_and(|written| written.bytes < length);
                self.leave_shorts();
            }
            Poll::Pending if short && self.tries < TRIES => {
                // It is polled for other reasons, too.
                if self.gate.tried(stream, Some(cx.waker().clone())) || self.tries == 0 {
                    self.tries += 1;
                }
            }
            Poll::Pending => {
                self.bulk = true;
                self.leave_shorts();
            }
        }
        written.map_ok(|written| written.bytes).map_err(|_| Broken)
    }

    /// Whether the peer still reads, for a stream that is not finished. While that is not known, a wake may be due to it.
    pub(super) fn look(&mut self, cx: &mut Context<'_>) -> Look {
        // Writing nothing tells, unless all windows are used up; then there is a wake when that changes.
        match pin!(self.stream.write(&[])).poll(cx) {
            Poll::Ready(Err(_)) => Look::Stopped,
            Poll::Ready(Ok(_)) => Look::Read,
            Poll::Pending => Look::Unknown,
        }
    }

    fn leave_shorts(&mut self) {
        if std::mem::take(&mut self.tries) > 0 {
            self.gate.tried(self.stream.id(), None);
        }
    }
}

impl Drop for GatedSend {
    fn drop(&mut self) {
        self.leave_shorts();
    }
}

impl Deref for GatedSend {
    type Target = quinn::SendStream;

    fn deref(&self) -> &Self::Target {
        &self.stream
    }
}

impl DerefMut for GatedSend {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.stream
    }
}

impl From<quinn::SendStream> for GatedSend {
    /// With a gate of its own.
    fn from(stream: quinn::SendStream) -> Self {
        Self::new(stream, Arc::default())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker;

    use super::*;

    fn stream(index: u64) -> StreamId {
        StreamId::new(quinn::Side::Client, quinn::Dir::Bi, index)
    }

    #[test]
    fn bulk_holds_still_while_something_short_waits() {
        let gate = Gate::default();
        let waker = noop_waker();
        let cx = Context::from_waker(&waker);
        let holds = |index| gate.holds(stream(index), &cx);
        assert!(!holds(0));
        let (first, second) = (gate.go_ahead(), gate.go_ahead());
        assert!(holds(0) && holds(0) && holds(1));
        assert_eq!(locked(&gate.held).len(), 2, "each once");
        drop(first);
        assert!(holds(0));
        drop(second);
        assert!(!holds(0) && locked(&gate.held).is_empty());
    }

    #[test]
    fn what_is_short_on_a_carried_connection_tries_once_before_each_try_of_bulk() {
        let gate = Gate::default();
        let cx = Context::from_waker(Waker::noop());
        let waits = |index| gate.tried(stream(index), Some(Waker::noop().clone()));
        gate.ask_shorts();
        assert!(!gate.holds(stream(0), &cx), "nobody waits");
        waits(1);
        waits(2);
        gate.ask_shorts();
        gate.ask_shorts();
        assert!(gate.holds(stream(0), &cx));
        waits(1);
        assert!(gate.holds(stream(0), &cx), "the other has not tried yet");
        gate.tried(stream(2), None);
        gate.tried(stream(3), None);
        assert!(!gate.holds(stream(0), &cx) && locked(&gate.held).is_empty(), "though one waits still");

        let mut asked = false;
        assert!(!gate.bulk_may_try(stream(0), &mut asked, &cx), "it asks the one that waits");
        waits(1);
        assert!(gate.bulk_may_try(stream(0), &mut asked, &cx), "which has tried in vain");
        assert!(!gate.bulk_may_try(stream(0), &mut asked, &cx), "the next time it asks again");
    }
}
