//! Plays both ends of one carried connection as planned, and judges what each has seen.
//!
//! What must hold: what arrives is what was sent, or a part of it from the beginning; an orderly end only after all of it,
//! and only if the sender ended in order; a reset at one end is a reset at the other; and a reset only if an end reset.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use aws_lc_rs::digest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{OwnedSemaphorePermit, watch},
    time::sleep,
};

use crate::plan::{Order, Plan, Reads, Reset, Sender, Side, Stream};

/// What the server says before it waits for anything.
const GREETING: u64 = 40;

/// How an end saw the connection end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All came, then an orderly end.
    Clean,
    /// A reset by the other side.
    Reset,
    /// It reset the connection itself, as planned.
    Own,
    /// An orderly end too early.
    Cut,
    /// Other bytes than were sent.
    Wrong,
}

/// What one end has seen and done.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) end: End,
    /// It ended its own direction in order.
    pub(crate) finished: bool,
    /// It heard the other direction end in order.
    pub(crate) heard_end: bool,
    pub(crate) received: u64,
    sent_hash: Vec<u8>,
    received_hash: Vec<u8>,
}

/// One end, while it plays.
struct Player<'a> {
    plan: &'a Plan,
    own: Sender,
    began: Instant,
    /// Bytes received, and whether the other direction has ended.
    heard: watch::Sender<(u64, bool)>,
    finished: AtomicBool,
    broken: AtomicBool,
}

/// Why one direction stops the other too.
enum Stop {
    Own,
    Reset,
    Cut,
    Wrong,
}

/// Plays the end `own` on `tcp`. The ClientHello is through; nothing else is. `opening` is let go with the first byte.
pub(crate) async fn play(mut tcp: TcpStream, plan: &Plan, own: Sender, opening: Option<OwnedSemaphorePermit>) -> Seen {
    let player = Player {
        plan,
        own,
        began: Instant::now(),
        heard: watch::Sender::default(),
        finished: AtomicBool::new(false),
        broken: AtomicBool::new(false),
    };
    let mut sent_hash = digest::Context::new(&digest::SHA256);
    let mut received_hash = digest::Context::new(&digest::SHA256);
    let (read, write) = tcp.split();
    let outcome = tokio::try_join!(player.read(read, &mut received_hash, opening), player.write(write, &mut sent_hash));
    let end = match outcome {
        Ok(_) if player.broken.load(Ordering::Relaxed) => End::Reset,
        Ok(_) => End::Clean,
        Err(Stop::Own) => End::Own,
        Err(Stop::Reset) => End::Reset,
        Err(Stop::Cut) => End::Cut,
        Err(Stop::Wrong) => End::Wrong,
    };
    if end == End::Own {
        tcp.set_zero_linger().unwrap();
    }
    drop(tcp);
    Seen {
        end,
        finished: player.finished.load(Ordering::Relaxed),
        heard_end: player.heard.borrow().1,
        received: player.heard.borrow().0,
        sent_hash: sent_hash.finish().as_ref().to_vec(),
        received_hash: received_hash.finish().as_ref().to_vec(),
    }
}

impl Player<'_> {
    fn side(&self) -> &Side {
        if self.own == Sender::Client { &self.plan.client } else { &self.plan.server }
    }

    fn other(&self) -> (&Side, Sender) {
        match self.own {
            Sender::Client => (&self.plan.server, Sender::Server),
            Sender::Server => (&self.plan.client, Sender::Client),
        }
    }

    async fn read(
        &self,
        mut tcp: ReadHalf<'_>,
        hash: &mut digest::Context,
        mut opening: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Stop> {
        let (other, sender) = self.other();
        let mut expected = Stream::new(self.plan.id, sender);
        let mut buffer = vec![0; 32 * 1024];
        let mut received = 0;
        loop {
            let most = match self.side().reads {
                Reads::Slowly(most, pause) => {
                    sleep(pause).await;
                    most.min(buffer.len())
                }
                Reads::AfterSilence(silence) => {
                    sleep(silence.saturating_sub(self.began.elapsed())).await;
                    buffer.len()
                }
                Reads::Fast => buffer.len(),
            };
            let most = match self.side().reset {
                // Not a byte more than it takes to reset.
                Some(Reset::Received(at)) => most.min(usize::try_from(at - received).unwrap()),
                _ => most,
            };
            match tcp.read(&mut buffer[..most]).await {
                Ok(0) if received == other.length => break,
                // A socket tells of a reset once: the write may have been told.
                Ok(0) if self.broken.load(Ordering::Relaxed) => return Err(Stop::Reset),
                Ok(0) => return Err(Stop::Cut),
                Ok(n) if !expected.is_next(&buffer[..n]) => return Err(Stop::Wrong),
                Ok(n) => {
                    received += n as u64;
                    drop(opening.take());
                    hash.update(&buffer[..n]);
                    self.heard.send_replace((received, false));
                }
                Err(error) => {
                    must_be_reset(&error);
                    return Err(Stop::Reset);
                }
            }
            if matches!(self.side().reset, Some(Reset::Received(at)) if received >= at) {
                return Err(Stop::Own);
            }
        }
        // A broken socket reads as ended, too.
        self.heard.send_replace((received, !self.broken.load(Ordering::Relaxed)));
        Ok(())
    }

    async fn write(&self, mut tcp: WriteHalf<'_>, hash: &mut digest::Context) -> Result<(), Stop> {
        let side = self.side();
        let mut stream = Stream::new(self.plan.id, self.own);
        let mut left = side.length;
        let resets_at = match side.reset {
            Some(Reset::Sent(at)) => Some(at),
            _ => None,
        };
        let limit = resets_at.unwrap_or(left);
        let mut greeting = if self.own == Sender::Server { GREETING.min(left) } else { 0 };
        loop {
            let sent = side.length - left;
            if greeting == 0 && sent == greeting_of(self.own, side) {
                self.wait_for_turn().await;
            }
            // A reset goes on from the greeting at the earliest: without it there is no connection yet.
            if greeting == 0 && resets_at.is_some() && sent >= limit {
                self.wait_heard().await;
                return Err(Stop::Own);
            }
            if left == 0 {
                break;
            }
            if !side.pause.is_zero() && sent > 0 {
                sleep(side.pause).await;
            }
            let most = if greeting > 0 { greeting } else { left.min(limit.max(sent) - sent) };
            let bytes = stream.take(side.write.min(usize::try_from(most).unwrap()));
            if let Err(error) = tcp.write_all(bytes).await {
                return self.broke(&error);
            }
            hash.update(bytes);
            left -= bytes.len() as u64;
            greeting = greeting.saturating_sub(bytes.len() as u64);
        }
        if let Err(error) = tcp.shutdown().await {
            return self.broke(&error);
        }
        self.finished.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Before all but the greeting.
    async fn wait_for_turn(&self) {
        let mut heard = self.heard.subscribe();
        let last = (self.own, self.plan.order);
        let ended = last == (Sender::Server, Order::ClientFirst) || last == (Sender::Client, Order::ServerFirst);
        let eager = self.own == Sender::Server || self.plan.eager;
        drop(heard.wait_for(|(received, end)| *end || (!ended && (eager || *received > 0))).await);
    }

    /// Until the other end has said something, so that it is known to be there.
    async fn wait_heard(&self) {
        drop(self.heard.subscribe().wait_for(|(received, end)| *end || *received > 0).await);
    }

    /// The other end takes no more; what it has sent may still be read.
    fn broke(&self, error: &io::Error) -> Result<(), Stop> {
        must_be_reset(error);
        self.broken.store(true, Ordering::Relaxed);
        Ok(())
    }
}

fn greeting_of(own: Sender, side: &Side) -> u64 {
    if own == Sender::Server { GREETING.min(side.length) } else { 0 }
}

fn must_be_reset(error: &io::Error) {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    let known = matches!(error.kind(), ConnectionReset | BrokenPipe | ConnectionAborted | NotConnected);
    assert!(known, "an unexpected error of a socket: {error}");
}

/// What is wrong with what both ends saw; empty if nothing is. `killed`: a gateway on the way was killed meanwhile. Then a
/// reset needs no end that did it.
pub(crate) fn judge(plan: &Plan, client: &Seen, server: &Seen, killed: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let ends = [(Sender::Client, client, server, &plan.server), (Sender::Server, server, client, &plan.client)];
    for (name, own, other, others_part) in ends {
        let mut check = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("{name:?} {what}"));
            }
        };
        check(own.end != End::Wrong, "got other bytes than were sent");
        check(own.received <= others_part.length, "got more than was sent");
        check(own.end != End::Cut, "took a cut for an end");
        check(!own.heard_end || other.finished, "heard an end that the other never made");
        if own.end == End::Clean {
            check(own.received == others_part.length, "ended in order without all bytes");
            check(own.received_hash == other.sent_hash, "got bytes with another hash than was sent");
        }
        check(own.end != End::Reset || killed || other.end == End::Own, "was reset though the other did not reset");
    }
    wrong
}
