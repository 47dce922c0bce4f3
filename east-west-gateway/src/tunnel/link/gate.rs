//! Who may write to a QUIC connection whose window is used up.
//!
//! All streams share the connection's windows, and quinn lets whoever asks first have what becomes free: with more bulk
//! streams than the windows hold, a control frame or the head of a new stream could wait for as long as these go on, and
//! the link would be given up for dead. So what is short goes ahead: while such a write waits, bulk holds still.

use std::{
    future::poll_fn,
    ops::{Deref, DerefMut},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;

use super::Broken;

/// One for each connection.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Short writes that wait.
    ahead: AtomicUsize,
    /// Bulk that holds still.
    held: Mutex<Vec<Waker>>,
}

impl Gate {
    /// Bulk holds still while this lives.
    fn go_ahead(&self) -> Ahead<'_> {
        self.ahead.fetch_add(1, Ordering::AcqRel);
        Ahead(self)
    }

    /// Whether bulk is to hold still; it is woken when that is over.
    fn holds(&self, cx: &Context<'_>) -> bool {
        let waits = || self.ahead.load(Ordering::Acquire) > 0;
        if !waits() {
            return false;
        }
        let mut held = self.held();
        if !held.iter().any(|waker| waker.will_wake(cx.waker())) {
            held.push(cx.waker().clone());
        }
        // Whoever was last may have woken the others before this one was among them.
        waits()
    }

    fn held(&self) -> MutexGuard<'_, Vec<Waker>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Ahead<'a>(&'a Gate);

impl Drop for Ahead<'_> {
    fn drop(&mut self) {
        if self.0.ahead.fetch_sub(1, Ordering::AcqRel) == 1 {
            let held = std::mem::take(&mut *self.0.held());
            held.into_iter().for_each(Waker::wake);
        }
    }
}

/// A stream of a connection with a gate.
#[derive(Debug)]
pub(crate) struct GatedSend {
    stream: quinn::SendStream,
    gate: Arc<Gate>,
}

impl GatedSend {
    pub(crate) fn new(stream: quinn::SendStream, gate: Arc<Gate>) -> Self {
        Self { stream, gate }
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
    pub(crate) fn poll_bulk(&mut self, cx: &mut Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<usize, Broken>> {
        if self.gate.holds(cx) {
            return Poll::Pending;
        }
        // The future holds nothing between polls that a new one would not find out.
        pin!(self.stream.write_chunks(chunks)).poll(cx).map_ok(|written| written.bytes).map_err(|_| Broken)
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
        Self { stream, gate: Arc::default() }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker;

    use super::*;

    #[test]
    fn bulk_holds_still_while_something_short_waits() {
        let gate = Gate::default();
        let waker = noop_waker();
        let cx = Context::from_waker(&waker);
        assert!(!gate.holds(&cx));
        let (first, second) = (gate.go_ahead(), gate.go_ahead());
        assert!(gate.holds(&cx) && gate.holds(&cx));
        assert_eq!(gate.held().len(), 1, "one waker for each task");
        drop(first);
        assert!(gate.holds(&cx));
        drop(second);
        assert!(!gate.holds(&cx) && gate.held().is_empty());
    }
}
