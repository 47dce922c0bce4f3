//! One thread's connections: opening them, and knowing each one's state.
//!
//! A connection is opened without blocking: connect, hello, greeting, order. The same for all kinds of work.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use socket2::{Domain, SockRef, Socket, Type};

use crate::load::{
    CHUNK, GREETING, Order,
    poll::{Interest, Poll, Ready},
};

/// From connect to greeting: beyond any system's own deadlines.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Between looks for connections that are too late.
pub(super) const LOOK: Duration = Duration::from_millis(200);
/// For all connections of one command together.
const OPENING: Duration = Duration::from_secs(120);

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Connecting,
    Greeted,
    Up,
}

/// What a step on a young connection brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Waiting,
    /// The greeting has come, and the order is given.
    Up,
    Broken,
}

#[derive(Debug)]
pub(super) struct Conn {
    pub(super) tcp: TcpStream,
    pub(super) stage: Stage,
    pub(super) began: Instant,
}

/// One thread's connections and what it needs to serve them.
pub(super) struct Shard {
    pub(super) poll: Poll,
    pub(super) size: usize,
    pub(super) scratch: Vec<u8>,
    /// The kept echo connections; their tokens are their places here.
    pub(super) conns: Vec<Conn>,
    /// How to open one more, if one breaks.
    pub(super) again: Option<(SocketAddr, Vec<u8>)>,
}

impl Conn {
    /// Begins to connect.
    pub(super) fn begin(address: SocketAddr, poll: &Poll, token: u64) -> io::Result<Self> {
        let began = Instant::now();
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock || e.raw_os_error() == Some(EINPROGRESS) => {}
            Err(e) => return Err(e),
        }
        let tcp = TcpStream::from(socket);
        poll.add(&tcp, token, Interest::Write)?;
        Ok(Self { tcp, stage: Stage::Connecting, began })
    }

    /// Brings a young connection on.
    pub(super) fn step(&mut self, ready: Ready, poll: &Poll, hello: &[u8], order: Option<Order>) -> Progress {
        self.try_step(ready, poll, hello, order).unwrap_or(Progress::Broken)
    }

    fn try_step(&mut self, ready: Ready, poll: &Poll, hello: &[u8], order: Option<Order>) -> io::Result<Progress> {
        match self.stage {
            Stage::Connecting if ready.write => {
                if let Some(error) = self.tcp.take_error()? {
                    return Err(error);
                }
                // An empty socket buffer takes all of a hello.
                self.tcp.write_all(hello)?;
                self.stage = Stage::Greeted;
                poll.set(&self.tcp, ready.token, Interest::Read)?;
                Ok(Progress::Waiting)
            }
            Stage::Greeted if ready.read => {
                let mut greeting = [0];
                match self.tcp.read(&mut greeting) {
                    Ok(1) if greeting == [GREETING] => {}
                    Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Progress::Waiting),
                    Err(e) => return Err(e),
                    Ok(_) => return Err(ErrorKind::UnexpectedEof.into()),
                }
                if let Some(order) = order {
                    self.tcp.write_all(&order.encode())?;
                }
                self.stage = Stage::Up;
                Ok(Progress::Up)
            }
            _ => Ok(Progress::Waiting),
        }
    }

    /// Closes with a reset, at once and without a trace in the port table.
    pub(super) fn abort(self) {
        // Fails only on a socket that is gone already.
        drop(SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO)));
    }
}

const EINPROGRESS: i32 = 115;

impl Shard {
    pub(super) fn new(size: u32) -> io::Result<Self> {
        Ok(Self { poll: Poll::new()?, size: size as usize, scratch: vec![0xa5; CHUNK], conns: Vec::new(), again: None })
    }

    pub(super) fn len(&self) -> usize {
        self.conns.len()
    }

    pub(super) fn order(&self) -> Order {
        Order::Echo(u32::try_from(self.size).unwrap_or(u32::MAX))
    }

    pub(super) fn close_all(&mut self) {
        self.conns.drain(..).for_each(Conn::abort);
    }

    /// Opens `wanted` more connections, `at_once` at a time, and says how many attempts failed. Too many failures are an error.
    pub(super) fn open(
        &mut self,
        address: SocketAddr,
        hello: &[u8],
        wanted: usize,
        at_once: usize,
    ) -> anyhow::Result<u64> {
        self.again = Some((address, hello.to_vec()));
        let order = self.order();
        let opened = self.open_with(address, hello, order, wanted, at_once)?;
        Ok(opened)
    }

    /// As [`Self::open`], with an order of one's own.
    pub(super) fn open_with(
        &mut self,
        address: SocketAddr,
        hello: &[u8],
        order: Order,
        wanted: usize,
        at_once: usize,
    ) -> anyhow::Result<u64> {
        let deadline = Instant::now() + OPENING;
        let wanted = self.conns.len() + wanted;
        let allowed = 100 + wanted as u64 / 10;
        let (mut failed, mut young) = (0, 0);
        let mut ready = Vec::new();
        let mut up = self.conns.len();
        let mut looked = Instant::now();
        while up < wanted {
            while young < at_once && self.conns.len() < wanted {
                let token = self.conns.len() as u64;
                self.conns.push(Conn::begin(address, &self.poll, token).context("begin to connect")?);
                young += 1;
            }
            self.poll.wait(&mut ready, Some(Duration::from_millis(100))).context("wait for events")?;
            for event in &ready {
                let Some(conn) = token(event.token).and_then(|t| self.conns.get_mut(t)) else { continue };
                if conn.stage == Stage::Up {
                    continue;
                }
                match conn.step(*event, &self.poll, hello, Some(order)) {
                    Progress::Waiting => {}
                    Progress::Up => (up, young) = (up + 1, young - 1),
                    Progress::Broken => {
                        failed += 1;
                        *conn = Conn::begin(address, &self.poll, event.token).context("begin to connect again")?;
                    }
                }
            }
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                failed += self.replace_late(address).context("begin to connect again")?;
            }
            ensure!(failed <= allowed, "{failed} connections to {address} failed while {up} of {wanted} were open");
            ensure!(Instant::now() < deadline, "only {up} of {wanted} connections to {address} within {OPENING:?}");
        }
        Ok(failed)
    }

    /// Tries those again that have been silent for too long since they began, and says how many.
    pub(super) fn replace_late(&mut self, address: SocketAddr) -> io::Result<u64> {
        let mut failed = 0;
        for (token, conn) in self.conns.iter_mut().enumerate() {
            if conn.stage != Stage::Up && conn.began.elapsed() > PATIENCE {
                failed += 1;
                *conn = Conn::begin(address, &self.poll, token as u64)?;
            }
        }
        Ok(failed)
    }
}

pub(super) fn token(token: u64) -> Option<usize> {
    usize::try_from(token).ok()
}
