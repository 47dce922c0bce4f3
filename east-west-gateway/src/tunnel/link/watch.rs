//! Whether the peer still reads a stream that nothing is written to.
//!
//! quinn would tell ([`quinn::SendStream::stopped`]), but keeps some bytes, until its connection ends, for each stream that
//! was asked this and then reset by us: a peer could make that as much as it likes. So over QUIC it is looked at.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{self, Interval, MissedTickBehavior};

use super::{SendHalf, gate::Look};

/// Between two looks, each of which costs an empty frame.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Of one stream, and for as long as it is not finished.
pub(crate) enum Watch {
    Look {
        every: Interval,
        /// The last look found nothing out: the next wake may be the answer.
        again: bool,
    },
    Told(Pin<Box<dyn Future<Output = ()> + Send>>),
}

impl Watch {
    pub(crate) fn new(send: &SendHalf) -> Self {
        match send {
            SendHalf::Quic(_) => {
                let mut every = time::interval(LOOK_EVERY);
                every.set_missed_tick_behavior(MissedTickBehavior::Delay);
                Self::Look { every, again: false }
            }
            SendHalf::Tcp(_) => Self::Told(Box::pin(send.stopped())),
        }
    }

    /// Ready when the peer of `send`, which this was made for, reads no more.
    pub(crate) fn poll(&mut self, send: &mut SendHalf, cx: &mut Context<'_>) -> Poll<()> {
        match (self, send) {
            (Self::Look { every, again }, SendHalf::Quic(send)) => loop {
                let due = every.poll_tick(cx).is_ready();
                if due || *again {
                    match send.look(cx) {
                        Look::Stopped => return Poll::Ready(()),
                        found => *again = found == Look::Unknown,
                    }
                }
                if !due {
                    return Poll::Pending;
                }
            },
            (Self::Told(told), _) => told.as_mut().poll(cx),
            (Self::Look { .. }, SendHalf::Tcp(_)) => Poll::Pending,
        }
    }
}
