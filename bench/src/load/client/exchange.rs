//! Requests and answers on connections that are open already: as fast as answers come, or at a fixed rate.
//!
//! Paced requests are due at times that depend on nothing but the rate. One that cannot be sent yet, because its connection still
//! waits for an answer, is sent late, and its latency counts from when it was due: a stall shows in every request that it held up
//! (no coordinated omission). Every answer's first bytes are compared with its request's.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::{
    Part,
    shard::{LOOK, Progress, Retries, Shard, Stage, token},
};
use crate::load::{command::Span, histogram::Histogram, poll::Ready};

/// For answers still under way when the time is over.
const GRACE: Duration = Duration::from_secs(5);
/// Broken connections that are brought back at one time.
const AT_ONCE: usize = 64;
/// What is compared.
const MARK: usize = 16;

/// What one thread saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) rate: f64,
    pub(super) latency: Histogram,
    pub(super) failed: u64,
}

/// One connection's requests.
#[derive(Debug, Default)]
struct Slot {
    /// When the request that waits for its answer was due.
    waiting: Option<Instant>,
    /// When those were due that wait for that answer.
    backlog: VecDeque<Instant>,
    sent: u64,
    got: usize,
    head: [u8; MARK],
}

/// When requests are due.
#[derive(Debug)]
enum Due {
    /// With the answer to the one before.
    AtOnce,
    /// At these times, on the connections in turn.
    Paced { next: Instant, every: Duration, turn: usize },
}

struct Run {
    slots: Vec<Slot>,
    due: Due,
    from: Instant,
    until: Instant,
    waiting: usize,
    answered: u64,
    seen: Seen,
    request: Vec<u8>,
    /// Connections that broke, and those of them that are on their way back.
    retries: Retries,
    young: usize,
}

impl Shard {
    /// One request after the other on each connection.
    pub(super) fn closed_loop(&mut self, span: Span) -> anyhow::Result<Seen> {
        let mut run = Run::new(self, span, Due::AtOnce);
        for index in 0..self.conns.len() {
            run.send(self, index, Instant::now());
        }
        run.finish(self, span)
    }

    /// `rate` requests per second, this thread's part of it.
    pub(super) fn paced(&mut self, span: Span, rate: f64, part: Part) -> anyhow::Result<Seen> {
        ensure!(rate > 0.0, "the rate must be above zero");
        if self.conns.is_empty() {
            return Ok(Seen::default());
        }
        let every = Duration::from_secs_f64(part.count as f64 / rate);
        let next = Instant::now() + Duration::from_secs_f64(part.index as f64 / rate);
        Run::new(self, span, Due::Paced { next, every, turn: 0 }).finish(self, span)
    }
}

impl Run {
    fn new(shard: &Shard, span: Span, due: Due) -> Self {
        let from = Instant::now() + Duration::from_secs_f64(span.warm);
        Self {
            slots: shard.conns.iter().map(|_| Slot::default()).collect(),
            due,
            from,
            until: from + Duration::from_secs_f64(span.measure),
            waiting: 0,
            answered: 0,
            seen: Seen::default(),
            request: vec![0xa5; shard.size],
            retries: Retries::default(),
            young: 0,
        }
    }

    fn finish(mut self, shard: &mut Shard, span: Span) -> anyhow::Result<Seen> {
        let allowed = 100 + 10 * self.slots.len() as u64;
        let mut looked = Instant::now();
        let mut ready = Vec::new();
        loop {
            let now = Instant::now();
            if now >= self.until && (self.waiting == 0 || now >= self.until + GRACE) {
                break;
            }
            self.send_due(shard, now);
            self.revive(shard)?;
            shard.poll.wait(&mut ready, Some(self.pause(Instant::now()))).context("wait for events")?;
            for event in &ready {
                self.step(shard, *event)?;
            }
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                self.young -= shard.give_up_late(&mut self.retries)?;
            }
            ensure!(self.seen.failed <= allowed, "{} connections broke; giving up", self.seen.failed);
        }
        self.give_up_on_the_rest(shard)?;
        self.seen.rate = self.answered as f64 / span.measure;
        Ok(self.seen)
    }

    /// Until something is due, or the end.
    fn pause(&self, now: Instant) -> Duration {
        let end = if now < self.until { self.until } else { self.until + GRACE };
        let next = match self.due {
            Due::Paced { next, .. } if next < self.until => next.min(end),
            _ => end,
        };
        let next = self.retries.next().map_or(next, |at| at.min(next));
        next.saturating_duration_since(now).min(LOOK)
    }

    /// Brings broken connections back, some at a time.
    fn revive(&mut self, shard: &mut Shard) -> anyhow::Result<()> {
        while self.young < AT_ONCE
            && let Some(index) = self.retries.pop()
        {
            let (address, _) = shard.again.as_ref().context("no connection is open")?;
            shard.renew(*address, index)?;
            self.young += 1;
        }
        Ok(())
    }

    fn send_due(&mut self, shard: &mut Shard, now: Instant) {
        let count = self.slots.len();
        while let Due::Paced { next, every, turn } = &mut self.due
            && *next <= now
            && *next < self.until
        {
            let (due, index) = (*next, *turn);
            *next += *every;
            *turn = (*turn + 1) % count;
            self.send(shard, index, due);
        }
    }

    fn send(&mut self, shard: &mut Shard, index: usize, due: Instant) {
        let (Some(slot), Some(conn)) = (self.slots.get_mut(index), shard.conns.get_mut(index)) else { return };
        if slot.waiting.is_some() || conn.stage != Stage::Up {
            slot.backlog.push_back(due);
            return;
        }
        slot.sent += 1;
        slot.got = 0;
        slot.waiting = Some(due);
        self.waiting += 1;
        if let Some(mark) = self.request.first_chunk_mut::<MARK>() {
            *mark = mark_of(index, slot.sent);
        }
        // A socket that does not take a small message with nothing else under way is broken; reading will tell.
        if conn.tcp.write_all(&self.request).is_err() {
            drop(conn.tcp.shutdown(std::net::Shutdown::Both));
        }
    }

    fn step(&mut self, shard: &mut Shard, event: Ready) -> anyhow::Result<()> {
        let Some(index) = token(event.token) else { return Ok(()) };
        let order = shard.order();
        let Some(conn) = shard.conns.get_mut(index) else { return Ok(()) };
        if conn.stage != Stage::Up {
            let (_, hello) = shard.again.as_ref().context("no connection is open")?;
            match conn.step(event, &shard.poll, hello, Some(order)) {
                Progress::Waiting => {}
                Progress::Up => {
                    self.young -= 1;
                    self.go_on(shard, index);
                }
                Progress::Broken => {
                    self.young -= 1;
                    conn.down(&shard.poll).context("stop watching a socket")?;
                    self.retries.push(index);
                }
            }
            return Ok(());
        }
        match read_some(&mut conn.tcp, &mut shard.scratch) {
            Ok(Some(0)) | Err(_) => self.lost(shard, index),
            Ok(None) => Ok(()),
            Ok(Some(n)) => {
                let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
                slot.take(shard.scratch.get(..n).unwrap_or_default());
                if slot.got >= shard.size {
                    self.answered(shard, index)?;
                }
                Ok(())
            }
        }
    }

    fn answered(&mut self, shard: &mut Shard, index: usize) -> anyhow::Result<()> {
        let Some(slot) = self.slots.get_mut(index) else { return Ok(()) };
        let now = Instant::now();
        let due = slot.waiting.take().context("an answer came without a request")?;
        let whole = slot.got == shard.size && slot.head == mark_of(index, slot.sent);
        ensure!(whole, "an answer differs from its request: {} bytes beginning {:x?}", slot.got, slot.head);
        self.waiting -= 1;
        let counts = match self.due {
            Due::AtOnce => now,
            Due::Paced { .. } => due,
        };
        if counts >= self.from && counts < self.until {
            self.seen.latency.record(now - due);
        }
        if now >= self.from && now < self.until {
            self.answered += 1;
        }
        self.go_on(shard, index);
        Ok(())
    }

    /// The next request on a connection that is free.
    fn go_on(&mut self, shard: &mut Shard, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let next = slot.backlog.pop_front();
        match (next, &self.due) {
            (Some(due), _) => self.send(shard, index, due),
            (None, Due::AtOnce) => {
                let now = Instant::now();
                if now < self.until {
                    self.send(shard, index, now);
                }
            }
            (None, Due::Paced { .. }) => {}
        }
    }

    /// Its connection broke: the request is lost, and another connection will take its place.
    fn lost(&mut self, shard: &mut Shard, index: usize) -> anyhow::Result<()> {
        self.seen.failed += 1;
        if let Some(slot) = self.slots.get_mut(index)
            && slot.waiting.take().is_some()
        {
            self.waiting -= 1;
        }
        if let Some(conn) = shard.conns.get_mut(index) {
            conn.down(&shard.poll).context("stop watching a socket")?;
            self.retries.push(index);
        }
        Ok(())
    }

    /// Requests that are still open have failed, and took at least this long. Their connections are of no more use.
    fn give_up_on_the_rest(&mut self, shard: &mut Shard) -> anyhow::Result<()> {
        let now = Instant::now();
        for (slot, conn) in self.slots.iter_mut().zip(&mut shard.conns) {
            let open = slot.waiting.take();
            if open.is_some() {
                conn.down(&shard.poll).context("stop watching a socket")?;
            }
            for due in open.into_iter().chain(slot.backlog.drain(..)) {
                self.seen.failed += 1;
                self.seen.latency.record(now - due);
            }
        }
        Ok(())
    }
}

impl Slot {
    fn take(&mut self, bytes: &[u8]) {
        for (at, byte) in self.head.iter_mut().skip(self.got).zip(bytes) {
            *at = *byte;
        }
        self.got += bytes.len();
    }
}

fn mark_of(index: usize, sent: u64) -> [u8; MARK] {
    let mut mark = [0; MARK];
    let (which, number) = mark.split_at_mut(MARK / 2);
    which.copy_from_slice(&(index as u64).to_be_bytes());
    number.copy_from_slice(&sent.to_be_bytes());
    mark
}

/// What is there to read; `None` if nothing is.
fn read_some(tcp: &mut std::net::TcpStream, into: &mut [u8]) -> io::Result<Option<usize>> {
    match tcp.read(into) {
        Ok(n) => Ok(Some(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(e),
    }
}
