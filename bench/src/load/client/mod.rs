//! The client: takes commands, drives connections, says what it saw.
//!
//! Connections are shared out to threads, each an epoll loop of its own ([`Shard`]); their results are added up. Every command
//! ends by itself: connecting, waiting and draining have deadlines.

mod bulk;
mod connect;
mod exchange;
mod shard;
#[cfg(test)]
mod tests;

use std::{
    io::{BufRead, Write},
    time::Instant,
};

use anyhow::{Context, anyhow, ensure};
use serde::Serialize;

use self::shard::Shard;
use super::{
    command::{Command, Connected, Exchanged, Moved, Opened},
    histogram::Histogram,
};

/// Options of the hidden subcommand.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Bytes of a request, and of its answer.
    #[arg(long, default_value_t = 256)]
    size: u32,
}

/// Obeys standard input until it ends.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    super::open_files();
    ensure!((16..=65_536).contains(&args.size), "--size: use 16 to 65536");
    let shards: Result<_, _> = (0..args.threads.max(1)).map(|_| Shard::new(args.size)).collect();
    let mut client = Client { shards: shards.context("make an epoll instance")? };
    for line in std::io::stdin().lock().lines() {
        let line = line.context("read a command")?;
        let answer = match serde_json::from_str(&line).context("not a command").and_then(|c| client.obey(&c)) {
            Ok(answer) => answer,
            Err(error) => serde_json::json!({ "error": format!("{error:#}") }),
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}").and_then(|()| out.flush()).context("answer")?;
    }
    Ok(())
}

struct Client {
    shards: Vec<Shard>,
}

impl Client {
    fn obey(&mut self, command: &Command) -> anyhow::Result<serde_json::Value> {
        match command {
            Command::Open { target, connections, at_once } => {
                let began = Instant::now();
                let hello = super::hello::write(&target.name)?;
                let parts = self.each(|shard, part| {
                    shard.open(target.address, &hello, part.of(*connections), part.of(*at_once).max(1))
                })?;
                let failed = parts.iter().sum();
                self.opened(began, failed)
            }
            Command::Close => {
                let began = Instant::now();
                self.shards.iter_mut().for_each(Shard::close_all);
                self.opened(began, 0)
            }
            Command::Closed { span } => {
                let parts = self.each(|shard, _| shard.closed_loop(*span))?;
                answer(added(&parts)?)
            }
            Command::Paced { span, rate } => {
                let parts = self.each(|shard, part| shard.paced(*span, *rate, part))?;
                answer(added(&parts)?)
            }
            Command::Bulk { target, streams, way, span } => {
                let hello = super::hello::write(&target.name)?;
                let parts = self.each(|shard, part| match part.of(*streams) {
                    0 => Ok(Moved { slowest: f64::INFINITY, ..Moved::default() }),
                    streams => shard.bulk(target.address, &hello, streams, *way, *span),
                })?;
                answer(parts.iter().fold(Moved { slowest: f64::INFINITY, ..Moved::default() }, |sum, part| Moved {
                    rate: sum.rate + part.rate,
                    slowest: sum.slowest.min(part.slowest),
                    fastest: sum.fastest.max(part.fastest),
                    bytes: sum.bytes + part.bytes,
                    failed: sum.failed + part.failed,
                }))
            }
            Command::Connect { target, at_once, span } => {
                let hello = super::hello::write(&target.name)?;
                let parts = self.each(|shard, part| match part.of(*at_once) {
                    0 => Ok(connect::Seen::default()),
                    at_once => shard.connect(target.address, &hello, at_once, *span),
                })?;
                let mut latency = Histogram::default();
                parts.iter().for_each(|part| latency.merge(&part.latency));
                let failed: u64 = parts.iter().map(|part| part.failed).sum();
                // No time at all would be the best time of all.
                ensure!(latency.count() > 0, "no new connection came up, {failed} failed");
                let latency = latency.summary();
                answer(Connected { rate: latency.count as f64 / span.measure, latency, failed })
            }
        }
    }

    fn opened(&self, began: Instant, failed: u64) -> anyhow::Result<serde_json::Value> {
        let open = self.shards.iter().map(Shard::len).sum();
        answer(Opened { open, seconds: began.elapsed().as_secs_f64(), failed })
    }

    /// Runs `work` on every shard at the same time.
    fn each<T: Send>(&mut self, work: impl Fn(&mut Shard, Part) -> anyhow::Result<T> + Sync) -> anyhow::Result<Vec<T>> {
        let count = self.shards.len();
        let work = &work;
        std::thread::scope(|scope| {
            let threads = self.shards.iter_mut().enumerate().map(|(index, shard)| {
                scope.spawn(move || {
                    super::exact_timers();
                    work(shard, Part { index, count })
                })
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|t| t.join().map_err(|_| anyhow!("a client thread died"))?).collect()
        })
    }
}

fn answer(what: impl Serialize) -> anyhow::Result<serde_json::Value> {
    serde_json::to_value(what).context("write an answer")
}

fn added(parts: &[exchange::Seen]) -> anyhow::Result<Exchanged> {
    let mut latency = Histogram::default();
    parts.iter().for_each(|part| latency.merge(&part.latency));
    let rate = parts.iter().map(|part| part.rate).sum();
    let failed: u64 = parts.iter().map(|part| part.failed).sum();
    ensure!(latency.count() > 0, "no request was answered, {failed} failed");
    Ok(Exchanged { rate, latency: latency.summary(), failed })
}

/// One of several that share the work.
#[derive(Clone, Copy, Debug)]
struct Part {
    index: usize,
    count: usize,
}

impl Part {
    /// Its share of `n`; the shares add up to `n`.
    fn of(self, n: usize) -> usize {
        n / self.count + usize::from(self.index < n % self.count)
    }
}
