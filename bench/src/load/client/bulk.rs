//! As many bytes as go, one way.
//!
//! What counts is what has arrived: downwards what is read here, upwards what the server says it has read, so that bytes in
//! buffers under way are not taken for throughput.

use std::{
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::shard::{Shard, token};
use crate::load::{
    CHUNK, Order,
    command::{Moved, Span, Way},
    poll::{Interest, Ready},
};

/// Reads or writes on one connection before the others have a turn.
const TURNS: usize = 4;

/// One stream's count.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Bytes that have arrived.
    arrived: u64,
    /// Of these, before measuring began.
    before: u64,
    /// The part of a tally that has been read.
    partial: [u8; 8],
    have: usize,
    broken: bool,
}

impl Shard {
    pub(super) fn bulk(
        &mut self,
        address: SocketAddr,
        hello: &[u8],
        streams: usize,
        way: Way,
        span: Span,
    ) -> anyhow::Result<Moved> {
        ensure!(self.conns.is_empty(), "close the open connections first");
        let order = if way == Way::Down { Order::Source } else { Order::Sink };
        self.open_with(address, hello, None, streams, streams)?;
        let moved = self.begin(order).and_then(|()| self.pump(way, span));
        self.close_all();
        moved
    }

    /// All at once and not as they come up: bytes that nobody reads yet would be in the way of those still coming up.
    fn begin(&mut self, order: Order) -> anyhow::Result<()> {
        self.conns.iter_mut().try_for_each(|conn| conn.tcp.write_all(&order.encode())).context("give an order")
    }

    fn pump(&mut self, way: Way, span: Span) -> anyhow::Result<Moved> {
        if way == Way::Up {
            for (token, conn) in self.conns.iter().enumerate() {
                self.poll.set(&conn.tcp, token as u64, Interest::Both).context("watch a socket")?;
            }
        }
        let mut streams = vec![Stream::default(); self.conns.len()];
        let mut ready = Vec::new();
        let began = Instant::now();
        let from = began + Duration::from_secs_f64(span.warm);
        self.pump_until(from, way, &mut streams, &mut ready)?;
        let from = Instant::now();
        for stream in &mut streams {
            stream.before = stream.arrived;
        }
        self.pump_until(from + Duration::from_secs_f64(span.measure), way, &mut streams, &mut ready)?;
        let seconds = from.elapsed().as_secs_f64();
        let rates = || streams.iter().map(|s| (s.arrived - s.before) as f64 * 8.0 / seconds);
        ensure!(rates().any(|rate| rate > 0.0), "nothing arrived");
        Ok(Moved {
            rate: rates().sum(),
            slowest: rates().fold(f64::INFINITY, f64::min),
            fastest: rates().fold(0.0, f64::max),
            bytes: streams.iter().map(|s| s.arrived).sum(),
            failed: streams.iter().filter(|s| s.broken).count() as u64,
        })
    }

    fn pump_until(
        &mut self,
        end: Instant,
        way: Way,
        streams: &mut [Stream],
        ready: &mut Vec<Ready>,
    ) -> anyhow::Result<()> {
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            ensure!(!streams.iter().all(|s| s.broken), "all streams broke");
            self.poll.wait(ready, Some(left)).context("wait for events")?;
            for event in ready.iter() {
                let Some(index) = token(event.token) else { continue };
                let (Some(conn), Some(stream)) = (self.conns.get_mut(index), streams.get_mut(index)) else { continue };
                if stream.broken {
                    continue;
                }
                let chunk = &mut self.scratch;
                let went = match way {
                    Way::Down => stream.swallow(&mut conn.tcp, chunk),
                    Way::Up => {
                        let read = if event.read { stream.tally(&mut conn.tcp) } else { Ok(()) };
                        read.and_then(|()| if event.write { pour(&mut conn.tcp, chunk) } else { Ok(()) })
                    }
                };
                if went.is_err() {
                    stream.broken = true;
                    drop(conn.tcp.shutdown(std::net::Shutdown::Both));
                    // Its hang-up would be reported for ever.
                    self.poll.forget(&conn.tcp).context("stop watching a socket")?;
                }
            }
        }
    }
}

impl Stream {
    fn swallow(&mut self, tcp: &mut std::net::TcpStream, chunk: &mut [u8]) -> std::io::Result<()> {
        for _ in 0..TURNS {
            match tcp.read(chunk) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.arrived += n as u64;
                    if n < chunk.len() {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Reads what the server says it has got.
    fn tally(&mut self, tcp: &mut std::net::TcpStream) -> std::io::Result<()> {
        loop {
            let space = self.partial.get_mut(self.have..).unwrap_or_default();
            match tcp.read(space) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.have += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
            if self.have == self.partial.len() {
                self.arrived = u64::from_be_bytes(self.partial);
                self.have = 0;
            }
        }
    }
}

fn pour(tcp: &mut std::net::TcpStream, chunk: &[u8]) -> std::io::Result<()> {
    debug_assert_eq!(chunk.len(), CHUNK);
    for _ in 0..TURNS {
        match tcp.write(chunk) {
            Ok(n) if n < chunk.len() => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
