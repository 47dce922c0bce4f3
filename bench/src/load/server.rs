//! The server: greets, then echoes, sends or swallows.
//!
//! One thread per share of the connections (the kernel deals them out by SO_REUSEPORT), each an epoll loop. What it holds per
//! connection is the hello until it is complete, and nothing once messages come whole. A connection that says something else
//! than it should is closed. It runs until it is killed.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use socket2::{Domain, Socket, Type};

use super::{
    CHUNK, GREETING, ORDER, Order, hello,
    poll::{Interest, Poll, Ready},
};

const LISTENER: u64 = u64::MAX;
const BACKLOG: i32 = 4_096;
/// Between a sink's words on what it has read.
const TALLY: Duration = Duration::from_millis(5);
/// Reads or writes on one connection before the others have a turn.
const TURNS: usize = 4;

/// Options of the hidden subcommand.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

/// Serves until killed.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    super::open_files();
    let serve = || Shard::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?.serve();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..args.threads.max(1)).map(|_| scope.spawn(serve)).collect();
        threads.into_iter().try_for_each(|t| t.join().map_err(|_| anyhow!("a server thread died"))?)
    })
}

#[derive(Debug)]
struct Conn {
    tcp: TcpStream,
    state: State,
    /// Read and not dealt with yet.
    held: Vec<u8>,
    /// To be written before anything else.
    owed: Vec<u8>,
    writing: bool,
}

#[derive(Debug)]
enum State {
    Hello,
    Order,
    Echo(usize),
    Source,
    Sink { total: u64, told: Instant },
}

struct Shard {
    poll: Poll,
    listener: TcpListener,
    conns: Vec<Option<Conn>>,
    free: Vec<usize>,
    scratch: Vec<u8>,
}

/// The connection is over, one way or another.
struct Over;

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl Shard {
    fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from(socket);
        let poll = Poll::new()?;
        poll.add(&listener, LISTENER, Interest::Read)?;
        Ok(Self { poll, listener, conns: Vec::new(), free: Vec::new(), scratch: vec![0x5a; CHUNK] })
    }

    fn serve(mut self) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        loop {
            self.poll.wait(&mut ready, None).context("wait for events")?;
            for event in &ready {
                if event.token == LISTENER {
                    self.accept();
                } else {
                    self.step(*event);
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((tcp, _)) = self.listener.accept() {
            // A connection that cannot be prepared is closed; its client will count it.
            drop(self.admit(tcp));
        }
    }

    fn admit(&mut self, tcp: TcpStream) -> io::Result<()> {
        tcp.set_nonblocking(true)?;
        tcp.set_nodelay(true)?;
        let slot = self.free.pop().unwrap_or(self.conns.len());
        let added = self.poll.add(&tcp, slot as u64, Interest::Read);
        let conn = Conn { tcp, state: State::Hello, held: Vec::new(), owed: Vec::new(), writing: false };
        match self.conns.get_mut(slot) {
            Some(free) => *free = Some(conn),
            None => self.conns.push(Some(conn)),
        }
        if added.is_err() {
            self.close(slot);
        }
        added
    }

    fn close(&mut self, slot: usize) {
        if let Some(conn) = self.conns.get_mut(slot) {
            *conn = None;
            self.free.push(slot);
        }
    }

    fn step(&mut self, event: Ready) {
        let Ok(slot) = usize::try_from(event.token) else { return };
        let Some(Some(conn)) = self.conns.get_mut(slot) else { return };
        let stepped = conn.step(event, &mut self.scratch);
        let watched = stepped.and_then(|()| {
            let writing = conn.wants_to_write();
            if writing != conn.writing {
                conn.writing = writing;
                let interest = if writing { Interest::Both } else { Interest::Read };
                self.poll.set(&conn.tcp, event.token, interest)?;
            }
            Ok(())
        });
        if watched.is_err() {
            self.close(slot);
        }
    }
}

impl Conn {
    fn wants_to_write(&self) -> bool {
        !self.owed.is_empty() || matches!(self.state, State::Source)
    }

    fn step(&mut self, event: Ready, scratch: &mut [u8]) -> Result<(), Over> {
        if event.write {
            self.settle()?;
            if self.owed.is_empty() && matches!(self.state, State::Source) {
                self.pour(scratch)?;
            }
        }
        // Unsent answers hold the next request back, so that memory is bounded.
        if event.read && self.owed.is_empty() {
            self.read(scratch)?;
        }
        Ok(())
    }

    fn read(&mut self, scratch: &mut [u8]) -> Result<(), Over> {
        for _ in 0..TURNS {
            let n = match self.tcp.read(scratch) {
                Ok(0) => return Err(Over),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Err(Over),
            };
            self.take(scratch.get(..n).unwrap_or_default())?;
            // A short read has emptied the socket; asking again would cost a call.
            if n < scratch.len() || !self.owed.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Over> {
        match &mut self.state {
            State::Hello => {
                self.held.extend_from_slice(bytes);
                match hello::end(&self.held) {
                    Ok(None) => Ok(()),
                    // What follows a hello comes only after the greeting.
                    Ok(Some(end)) if end == self.held.len() => {
                        self.held = Vec::new();
                        self.state = State::Order;
                        self.send(&[GREETING])
                    }
                    Ok(Some(_)) | Err(hello::NotAHello) => Err(Over),
                }
            }
            State::Order => {
                self.held.extend_from_slice(bytes);
                let held = std::mem::take(&mut self.held);
                let Some((order, rest)) = held.split_first_chunk::<ORDER>() else {
                    self.held = held;
                    return Ok(());
                };
                self.state = match Order::decode(*order).ok_or(Over)? {
                    Order::Echo(size) => State::Echo(size as usize),
                    Order::Source => State::Source,
                    Order::Sink => State::Sink { total: 0, told: Instant::now() },
                };
                if rest.is_empty() { Ok(()) } else { self.take(rest) }
            }
            State::Echo(size) => {
                let size = *size;
                if !self.held.is_empty() || !bytes.len().is_multiple_of(size) {
                    self.held.extend_from_slice(bytes);
                    let whole = self.held.len() - self.held.len() % size;
                    let rest = self.held.split_off(whole);
                    let whole = std::mem::replace(&mut self.held, rest);
                    return self.send(&whole);
                }
                self.send(bytes)
            }
            State::Source => Ok(()),
            State::Sink { total, told } => {
                *total += bytes.len() as u64;
                if told.elapsed() < TALLY {
                    return Ok(());
                }
                *told = Instant::now();
                let tally = total.to_be_bytes();
                self.send(&tally)
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Over> {
        let sent = if self.owed.is_empty() { write_some(&mut self.tcp, bytes)? } else { 0 };
        self.owed.extend_from_slice(bytes.get(sent..).unwrap_or_default());
        Ok(())
    }

    fn settle(&mut self) -> Result<(), Over> {
        if !self.owed.is_empty() {
            let sent = write_some(&mut self.tcp, &self.owed)?;
            self.owed.drain(..sent);
        }
        Ok(())
    }

    fn pour(&mut self, chunk: &[u8]) -> Result<(), Over> {
        for _ in 0..TURNS {
            if write_some(&mut self.tcp, chunk)? < chunk.len() {
                break;
            }
        }
        Ok(())
    }
}

/// Writes what the socket takes now.
fn write_some(tcp: &mut TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        match tcp.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => sent += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(sent)
}

/// A server on a free port for as long as the process lives.
#[cfg(test)]
pub(super) fn in_background() -> SocketAddr {
    let shard = Shard::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = shard.listener.local_addr().unwrap();
    std::thread::spawn(move || shard.serve());
    address
}
