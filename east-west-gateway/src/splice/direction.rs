//! The two directions of a carried connection, polled by hand.
//!
//! There are tens of thousands of them, mostly idle: what an idle one holds is a few words, no buffer and no timer. What
//! was read is written before more is read, so that the slower side sets the pace.

use std::{
    collections::VecDeque,
    future::Future,
    io::{ErrorKind, IoSlice},
    net::Shutdown,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{self, Instant, Sleep},
};

use super::End;
use crate::tunnel::{
    link::{Broken, RecvHalf, SendHalf, Watch},
    stalled::{Place, Stalled},
};

const MIN_BUFFER: usize = 2 * 1024;
const MAX_BUFFER: usize = 64 * 1024;
/// A near side that takes nothing for so long holds what was sent for it.
const HELD: Duration = Duration::from_millis(10);
/// And for so long is a slow reader.
const SLOW: Duration = Duration::from_millis(100);
/// Bytes moved at a time: then it is the turn of what else waits for the processor. Beside 32 bulk streams over TCP on one
/// thread a new connection and an exchange took 550 ms without it, take 210 ms with it, and would take 100 ms with half of
/// it; but 64 bulk streams alone move 10 % less with it, and 25 % less with half, as what they move leaves the caches.
const TURN: usize = 1 << 20;
/// As many as one system call takes.
const SLICES: usize = 64;

type Signal = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Both directions of one connection.
pub(super) struct Both<'a> {
    /// From near to far.
    outward: Direction<'a>,
    /// From far to near.
    pub(super) backward: Direction<'a>,
    /// Tells that far's link has ended, where reading from far does not tell.
    link_closed: Option<Signal>,
    /// Tells that far takes no more, once its own direction has ended or is not read for want of a near side that takes it.
    far_gone: Option<Watch>,
}

impl<'a> Both<'a> {
    pub(super) fn new(outward: Direction<'a>, backward: Direction<'a>) -> Self {
        let link_closed = match &outward.to {
            Writer::Link(send) => send.link_closed().map(|closed| Box::pin(closed) as Signal),
            Writer::Tcp(_) => None,
        };
        Self { outward, backward, link_closed, far_gone: None }
    }

    /// Moves what can be moved; ready with how it all ended.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let backward = match self.backward.poll(cx) {
            Poll::Ready(Err(Stop::Reader)) => return Poll::Ready(End::Far),
            Poll::Ready(Err(Stop::Writer)) => return Poll::Ready(End::Near),
            Poll::Ready(Err(Stop::GivenUp)) => return Poll::Ready(End::Stalled),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let outward = match self.outward.poll(cx) {
            Poll::Ready(Err(Stop::Reader)) => return Poll::Ready(End::Near),
            Poll::Ready(Err(Stop::Writer | Stop::GivenUp)) => return Poll::Ready(End::Far),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if outward && backward {
            return Poll::Ready(End::Finished);
        }
        if !outward && self.poll_far(backward, cx).is_ready() {
            return Poll::Ready(End::Far);
        }
        Poll::Pending
    }

    /// Ready when far, of which nothing is read for now, is gone.
    fn poll_far(&mut self, has_ended: bool, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(closed) = &mut self.link_closed
            && closed.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(());
        }
        let Writer::Link(send) = &mut self.outward.to else { return Poll::Pending };
        if !has_ended && !self.backward.is_slow() {
            // What is read tells.
            self.far_gone = None;
            return Poll::Pending;
        }
        self.far_gone.get_or_insert_with(|| Watch::new(send)).poll(send, cx)
    }
}

/// Who ended a direction before its end.
enum Stop {
    Reader,
    Writer,
    /// Nobody: the writer was too slow for too long.
    GivenUp,
}

#[derive(PartialEq, Eq)]
enum State {
    Open,
    /// All was read; the rest and the end are to be written.
    Ending,
    Done,
}

/// One direction.
pub(super) struct Direction<'a> {
    from: Reader<'a>,
    to: Writer<'a>,
    moved: &'a AtomicU64,
    state: State,
    /// Read, and not written yet.
    pending: VecDeque<Bytes>,
    stalled: Option<&'a Stalled>,
    patience: Option<Box<Patience>>,
    /// Tells that the reader's connection broke while nothing is read from it.
    from_gone: Option<Pin<Box<dyn Future<Output = ()> + Send + 'a>>>,
}

/// With a writer that takes nothing.
struct Patience {
    timer: Pin<Box<Sleep>>,
    stage: Stage,
    borne: Option<(Place, Signal)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It takes what it is given.
    Quick,
    /// Since less than [`HELD`].
    Waiting,
    /// Since less than [`SLOW`]: it is given room.
    Held,
    /// For longer: it is given up when there is no more room.
    Slow,
}

impl<'a> Direction<'a> {
    pub(super) fn new(from: Reader<'a>, to: Writer<'a>, moved: &'a AtomicU64, stalled: Option<&'a Stalled>) -> Self {
        let pending = VecDeque::new();
        Self { from, to, moved, state: State::Open, pending, stalled, patience: None, from_gone: None }
    }

    /// Writes this before what is read.
    pub(super) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.pending.push_back(bytes);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        let mut moved = 0;
        loop {
            if self.state == State::Done {
                return Poll::Ready(Ok(()));
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            match self.to.poll_write(cx, &mut self.pending) {
                Poll::Ready(Ok(0)) => {}
                Poll::Ready(Ok(written)) => {
                    moved += written;
                    self.moved.fetch_add(written as u64, Ordering::Relaxed);
                    if let Some(patience) = &mut self.patience {
                        patience.rest();
                    }
                    continue;
                }
                Poll::Ready(Err(Broken)) => return Poll::Ready(Err(Stop::Writer)),
                Poll::Pending => return self.poll_blocked(cx),
            }
            if self.state == State::Ending {
                ready!(self.to.poll_finish(cx)).map_err(|Broken| Stop::Writer)?;
                self.state = State::Done;
                continue;
            }
            match ready!(self.from.poll_read(cx, &mut self.pending)) {
                Ok(true) => {}
                Ok(false) => self.state = State::Ending,
                Err(Broken) => return Poll::Ready(Err(Stop::Reader)),
            }
        }
    }

    /// The writer takes nothing now, so nothing is read. Ready when the writer has been given up, or the reader has broken:
    /// what it has sent before that is for nobody.
    fn poll_blocked(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        if let Reader::Tcp(tcp, _) = &self.from {
            let tcp: &TcpStream = tcp;
            let gone = self.from_gone.get_or_insert_with(|| Box::pin(async { drop(tcp.ready(Interest::ERROR).await) }));
            ready!(gone.as_mut().poll(cx));
            return Poll::Ready(Err(Stop::Reader));
        }
        let patience = self.patience.get_or_insert_with(|| Box::new(Patience::new()));
        patience.poll(cx, self.stalled).map(|()| Err(Stop::GivenUp))
    }

    /// The writer has taken nothing for a while.
    fn is_slow(&self) -> bool {
        self.patience.as_ref().is_some_and(|patience| patience.stage == Stage::Slow)
    }
}

impl Patience {
    fn new() -> Self {
        Self { timer: Box::pin(time::sleep(HELD)), stage: Stage::Waiting, borne: None }
    }

    /// It has taken something.
    fn rest(&mut self) {
        self.stage = Stage::Quick;
        self.borne = None;
    }

    fn poll(&mut self, cx: &mut Context<'_>, stalled: Option<&Stalled>) -> Poll<()> {
        loop {
            match self.stage {
                Stage::Quick => {
                    self.stage = Stage::Waiting;
                    self.timer.as_mut().reset(Instant::now() + HELD);
                }
                Stage::Waiting => {
                    ready!(self.timer.as_mut().poll(cx));
                    self.stage = Stage::Held;
                    self.timer.as_mut().reset(Instant::now() + SLOW - HELD);
                    self.borne = stalled.map(|stalled| {
                        let place = stalled.enter();
                        let given_up: Signal = Box::pin(place.given_up());
                        (place, given_up)
                    });
                }
                Stage::Held => {
                    ready!(self.timer.as_mut().poll(cx));
                    self.stage = Stage::Slow;
                    if let Some((place, _)) = &self.borne {
                        place.overdue();
                    }
                }
                Stage::Slow => {
                    return match &mut self.borne {
                        Some((_, given_up)) => given_up.as_mut().poll(cx),
                        None => Poll::Pending,
                    };
                }
            }
        }
    }
}

/// Where bytes come from.
pub(super) enum Reader<'a> {
    /// With the size of its next buffer, which starts small and grows while reads fill it: most connections never need
    /// much.
    Tcp(&'a TcpStream, usize),
    Link(&'a mut RecvHalf),
}

impl<'a> Reader<'a> {
    pub(super) fn tcp(tcp: &'a TcpStream) -> Self {
        Self::Tcp(tcp, MIN_BUFFER)
    }

    /// Adds what has come to `into`; false at the end.
    fn poll_read(&mut self, cx: &mut Context<'_>, into: &mut VecDeque<Bytes>) -> Poll<Result<bool, Broken>> {
        match self {
            Self::Tcp(tcp, size) => loop {
                ready!(tcp.poll_read_ready(cx)).map_err(|_| Broken)?;
                // No buffer while there is nothing to put into it.
                let mut buffer = BytesMut::with_capacity(*size);
                match tcp.try_read_buf(&mut buffer) {
                    Ok(0) => return Poll::Ready(Ok(false)),
                    Ok(n) => {
                        if n >= *size {
                            *size = (*size * 2).min(MAX_BUFFER);
                        } else if n < *size / 8 {
                            *size = (*size / 2).max(MIN_BUFFER);
                        }
                        into.push_back(buffer.freeze());
                        return Poll::Ready(Ok(true));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return Poll::Ready(Err(Broken)),
                }
            },
            Self::Link(recv) => {
                let Some(chunk) = ready!(recv.poll_chunk(cx))? else { return Poll::Ready(Ok(false)) };
                into.push_back(chunk);
                into.extend(recv.more());
                Poll::Ready(Ok(true))
            }
        }
    }
}

/// Where bytes go.
pub(super) enum Writer<'a> {
    Tcp(&'a TcpStream),
    Link(&'a mut SendHalf),
}

impl Writer<'_> {
    /// Takes from the front of `chunks`: how many bytes; 0 if there is nothing left to write.
    fn poll_write(&mut self, cx: &mut Context<'_>, chunks: &mut VecDeque<Bytes>) -> Poll<Result<usize, Broken>> {
        if chunks.is_empty() {
            // What an idle connection keeps.
            if chunks.capacity() > 0 {
                *chunks = VecDeque::new();
            }
            return match self {
                Self::Tcp(_) => Poll::Ready(Ok(0)),
                Self::Link(send) => send.poll_flush(cx).map_ok(|()| 0),
            };
        }
        match self {
            Self::Tcp(tcp) => loop {
                let written = if let [one] = chunks.make_contiguous() {
                    tcp.try_write(one)
                } else {
                    let slices: Vec<IoSlice<'_>> =
                        chunks.iter().take(SLICES).map(|chunk| IoSlice::new(chunk)).collect();
                    tcp.try_write_vectored(&slices)
                };
                match written {
                    Ok(0) => return Poll::Ready(Err(Broken)),
                    Ok(n) => {
                        advance(chunks, n);
                        return Poll::Ready(Ok(n));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        ready!(tcp.poll_write_ready(cx)).map_err(|_| Broken)?;
                    }
                    Err(_) => return Poll::Ready(Err(Broken)),
                }
            },
            Self::Link(send) => {
                let written = ready!(send.poll_write(cx, chunks.make_contiguous()))?;
                while chunks.front().is_some_and(Bytes::is_empty) {
                    chunks.pop_front();
                }
                Poll::Ready(Ok(written))
            }
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        match self {
            Self::Tcp(tcp) => Poll::Ready(SockRef::from(*tcp).shutdown(Shutdown::Write).map_err(|_| Broken)),
            Self::Link(send) => send.poll_finish(cx),
        }
    }
}

fn advance(chunks: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(first) = chunks.front_mut() {
        let n = written.min(first.len());
        first.advance(n);
        written -= n;
        if !first.is_empty() {
            return;
        }
        chunks.pop_front();
    }
}
