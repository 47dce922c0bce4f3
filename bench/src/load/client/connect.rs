//! New connections, one after the other in each of a few places: from connect to the greeting, then closed.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::shard::{Conn, LOOK, Progress, Retries, Shard, token};
use crate::load::{command::Span, histogram::Histogram};

/// What one thread saw.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) latency: Histogram,
    pub(super) failed: u64,
}

impl Shard {
    pub(super) fn connect(
        &mut self,
        address: SocketAddr,
        hello: &[u8],
        at_once: usize,
        span: Span,
    ) -> anyhow::Result<Seen> {
        ensure!(self.conns.is_empty(), "close the open connections first");
        for place in 0..at_once {
            self.conns.push(Conn::begin(address, &self.poll, place as u64).context("begin to connect")?);
        }
        let seen = self.keep_connecting(address, hello, span);
        self.close_all();
        seen
    }

    fn keep_connecting(&mut self, address: SocketAddr, hello: &[u8], span: Span) -> anyhow::Result<Seen> {
        let from = Instant::now() + Duration::from_secs_f64(span.warm);
        let until = from + Duration::from_secs_f64(span.measure);
        let mut seen = Seen::default();
        let mut ready = Vec::new();
        let mut looked = Instant::now();
        let mut retries = Retries::default();
        loop {
            let now = Instant::now();
            if now >= until {
                return Ok(seen);
            }
            while let Some(place) = retries.pop() {
                self.renew(address, place)?;
            }
            let next = retries.next().unwrap_or(until).min(until);
            self.poll
                .wait(&mut ready, Some(next.saturating_duration_since(now).min(LOOK)))
                .context("wait for events")?;
            for event in &ready {
                let Some(place) = token(event.token) else { continue };
                let Some(conn) = self.conns.get_mut(place).filter(|conn| conn.is_young()) else { continue };
                let now = Instant::now();
                match conn.step(*event, &self.poll, hello, None) {
                    Progress::Waiting => continue,
                    Progress::Up if now >= from && now < until => seen.latency.record(now - conn.began),
                    Progress::Up => {}
                    Progress::Broken => {
                        seen.failed += 1;
                        conn.down(&self.poll).context("stop watching a socket")?;
                        retries.push(place);
                        continue;
                    }
                }
                // Replacing it closes it, in the ordinary way.
                *conn = Conn::begin(address, &self.poll, event.token).context("begin to connect")?;
            }
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                seen.failed += self.give_up_late(&mut retries)? as u64;
            }
            let allowed = 100 + seen.latency.count() / 10;
            ensure!(seen.failed <= allowed, "{} connections to {address} failed; giving up", seen.failed);
        }
    }
}
