//! TLS 1.3 over one TCP connection, without the copies and the buffers of a general stream: rustls makes the handshake
//! ([`handshake`]), the keys ([`keys`]) and the cipher; records are read, opened and sealed here ([`record`]).
//!
//! What holds: bytes in order; a close_notify is the end of what is read and nothing else is; after any error both
//! directions are broken. An idle connection holds no buffer. A key seals no more records than its cipher allows
//! (RFC 8446, section 5.5).

mod handshake;
mod keys;
pub(crate) mod record;

use std::{
    collections::VecDeque,
    future::poll_fn,
    io::{ErrorKind, IoSlice},
    net::Shutdown,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::net::TcpStream;

pub(super) use self::handshake::{Established, accept, connect};
use self::{
    keys::Keys,
    record::{MAX_PLAINTEXT, Opener, Record, Sealer, length_of_first},
};
use crate::tunnel::link::Broken;

/// Of the buffer that the socket is read into, which grows while reads fill it.
const MIN_READ: usize = 2 * 1024;
const MAX_READ: usize = 128 * 1024;
/// Plaintext that is sealed at a time.
const BATCH: usize = 4 * MAX_PLAINTEXT;
/// Pieces of which one record is made.
const PIECES: usize = 64;

/// One connection.
pub(super) struct Tls {
    tcp: Arc<TcpStream>,
    keys: Keys,
    opener: Opener,
    sealer: Sealer,
    /// Opened, and not taken yet.
    received: VecDeque<Bytes>,
    /// Read, and not opened yet.
    incoming: BytesMut,
    read_size: usize,
    /// Sealed, and not written yet.
    outgoing: VecDeque<Bytes>,
    /// The peer has said close_notify.
    ended: bool,
    /// The peer wants our next record under our next key.
    renewal_due: bool,
    /// We have said close_notify.
    finished: bool,
    broken: bool,
}

impl Tls {
    /// # Errors
    /// The handshake agreed on something that is not spoken here.
    pub(super) fn new(established: Established) -> Result<Self, Broken> {
        let Established { tcp, secrets, keys, received, incoming, .. } = established;
        let suite = keys.suite().map_err(|_| Broken)?;
        Ok(Self {
            tcp: Arc::new(tcp),
            opener: Opener::new(suite, secrets.rx).map_err(|_| Broken)?,
            sealer: Sealer::new(suite, secrets.tx).map_err(|_| Broken)?,
            keys,
            received: received.into(),
            incoming,
            read_size: MIN_READ,
            outgoing: VecDeque::new(),
            ended: false,
            renewal_due: false,
            finished: false,
            broken: false,
        })
    }

    pub(super) fn tcp(&self) -> &Arc<TcpStream> {
        &self.tcp
    }

    /// The next bytes; `None` at the end. Cancel-safe.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// Bytes that the next read gives.
    pub(super) fn push_back(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.received.push_front(bytes);
        }
    }

    /// As [`Tls::chunk`].
    pub(super) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            if let Some(bytes) = self.opened()? {
                return Poll::Ready(Ok(Some(bytes)));
            }
            if self.ended {
                return Poll::Ready(Ok(None));
            }
            if self.incoming.is_empty() {
                self.incoming = BytesMut::new();
            }
            ready!(self.tcp.poll_read_ready(cx)).or_else(|_| self.fail())?;
            self.read()?;
        }
    }

    /// What else was read already; never waits.
    pub(super) fn opened(&mut self) -> Result<Option<Bytes>, Broken> {
        if let Some(bytes) = self.received.pop_front() {
            return Ok(Some(bytes));
        }
        if self.received.capacity() > 0 {
            self.received = VecDeque::new();
        }
        while !self.broken && !self.ended {
            match self.opener.open(&mut self.incoming) {
                Ok(Some(Record::Data(bytes))) => return Ok(Some(bytes)),
                Ok(Some(Record::CloseNotify)) => self.ended = true,
                Ok(Some(Record::KeyUpdate { answer })) => {
                    self.renew_received().or_else(|()| self.fail())?;
                    self.renewal_due |= answer;
                }
                Ok(Some(Record::Tickets(tickets))) => {
                    for ticket in tickets {
                        self.keys.keep(&ticket).or_else(|_| self.fail())?;
                    }
                }
                Ok(None) => return Ok(None),
                Err(_) => self.fail()?,
            }
        }
        if self.broken { Err(Broken) } else { Ok(None) }
    }

    /// Whether nothing has come, not even an end. Takes in what does not count: tickets.
    pub(super) fn is_quiet(&mut self) -> bool {
        loop {
            match self.opened() {
                Ok(None) if !self.ended => {}
                Ok(Some(bytes)) => {
                    self.push_back(bytes);
                    return false;
                }
                _ => return false,
            }
            match self.read() {
                Ok(0) => return true,
                Ok(_) => {}
                Err(Broken) => return false,
            }
        }
    }

    /// Some bytes more from the socket into `incoming`; 0 if there are none now.
    fn read(&mut self) -> Result<usize, Broken> {
        let rest_of_first = match length_of_first(&self.incoming) {
            Ok(length) => length.unwrap_or_default().saturating_sub(self.incoming.len()),
            Err(_) => return self.fail(),
        };
        let room = self.read_size.max(rest_of_first);
        self.incoming.reserve(room);
        match self.tcp.try_read_buf(&mut self.incoming) {
            Ok(0) => self.fail(),
            Ok(n) => {
                if n >= self.read_size {
                    self.read_size = (self.read_size * 2).min(MAX_READ);
                } else if n < self.read_size / 8 {
                    self.read_size = (self.read_size / 2).max(MIN_READ);
                }
                Ok(n)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if self.incoming.is_empty() {
                    self.incoming = BytesMut::new();
                }
                Ok(0)
            }
            Err(_) => self.fail(),
        }
    }

    /// Some of `chunks`, at least a byte if there is one. It may be kept back until [`Tls::poll_flush`].
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<usize, Broken>> {
        // What was sealed before goes first, so that no more than one batch waits.
        ready!(self.poll_flush(cx))?;
        let mut written = 0;
        while written < BATCH {
            let n = self.seal(chunks)?;
            if n == 0 {
                break;
            }
            written += n;
        }
        // What the socket does not take now waits for the next call.
        if let Poll::Ready(Err(Broken)) = self.poll_flush(cx) {
            return Poll::Ready(Err(Broken));
        }
        Poll::Ready(Ok(written))
    }

    /// One record of what is first in `chunks`; how much of it that is.
    fn seal(&mut self, chunks: &mut [Bytes]) -> Result<usize, Broken> {
        if self.finished {
            return Err(Broken);
        }
        let mut pieces: [&[u8]; PIECES] = [&[]; PIECES];
        let mut count = 0;
        let mut total = 0;
        for (piece, chunk) in pieces.iter_mut().zip(chunks.iter().filter(|chunk| !chunk.is_empty())) {
            let room = MAX_PLAINTEXT - total;
            *piece = chunk.get(..room).unwrap_or(chunk);
            total += piece.len();
            count += 1;
            if total == MAX_PLAINTEXT {
                break;
            }
        }
        if total == 0 {
            return Ok(0);
        }
        if self.renewal_due || self.sealer.is_spent() {
            self.renew_sent().or_else(|()| self.fail())?;
        }
        let sealed = self.sealer.data(pieces.get(..count).unwrap_or_default()).or_else(|_| self.fail())?;
        self.outgoing.push_back(sealed.into());
        advance(chunks.iter_mut(), total);
        Ok(total)
    }

    /// Everything that was sealed is with the system.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if self.broken {
            return Poll::Ready(Err(Broken));
        }
        while !self.outgoing.is_empty() {
            let written = if let [one] = self.outgoing.make_contiguous() {
                self.tcp.try_write(one)
            } else {
                let mut slices = [IoSlice::new(&[]); PIECES];
                for (slice, sealed) in slices.iter_mut().zip(&self.outgoing) {
                    *slice = IoSlice::new(sealed);
                }
                self.tcp.try_write_vectored(slices.get(..self.outgoing.len()).unwrap_or(&slices))
            };
            match written {
                Ok(n) if n > 0 => {
                    advance(self.outgoing.iter_mut(), n);
                    while self.outgoing.front().is_some_and(Bytes::is_empty) {
                        self.outgoing.pop_front();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    ready!(self.tcp.poll_write_ready(cx)).or_else(|_| self.fail())?;
                }
                _ => return Poll::Ready(self.fail()),
            }
        }
        if self.outgoing.capacity() > 0 {
            self.outgoing = VecDeque::new();
        }
        Poll::Ready(Ok(()))
    }

    /// close_notify and a FIN, behind all that was written.
    pub(super) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if !self.finished {
            let sealed = self.sealer.close_notify().or_else(|_| self.fail())?;
            self.outgoing.push_back(sealed.into());
            self.finished = true;
        }
        ready!(self.poll_flush(cx))?;
        Poll::Ready(SockRef::from(&*self.tcp).shutdown(Shutdown::Write).or_else(|_| self.fail()))
    }

    /// What comes is under the peer's next key.
    fn renew_received(&mut self) -> Result<(), ()> {
        let suite = self.keys.suite().map_err(drop)?;
        self.opener.renew(suite, self.keys.next_to_receive().map_err(drop)?).map_err(drop)
    }

    /// What goes is under our next key, and the peer is told.
    fn renew_sent(&mut self) -> Result<(), ()> {
        let suite = self.keys.suite().map_err(drop)?;
        self.outgoing.push_back(self.sealer.key_update().map_err(drop)?.into());
        self.sealer = Sealer::new(suite, self.keys.next_to_send().map_err(drop)?).map_err(drop)?;
        self.renewal_due = false;
        Ok(())
    }

    fn fail<T>(&mut self) -> Result<T, Broken> {
        self.broken = true;
        Err(Broken)
    }
}

fn advance<'a>(chunks: impl Iterator<Item = &'a mut Bytes>, mut n: usize) {
    for chunk in chunks {
        let part = n.min(chunk.len());
        chunk.advance(part);
        n -= part;
    }
}

#[cfg(test)]
pub(super) mod tests;
