//! One thread's connections: opening them, and knowing each one's state.
//!
//! A connection is opened without blocking: connect, hello, greeting, order. The same for all kinds of work.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
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
    /// Broken, and not tried again yet.
    Down,
}

/// Broken connections that will be tried again, each after a pause: what turns clients away must not be stormed.
#[derive(Debug, Default)]
pub(super) struct Retries(VecDeque<(Instant, usize)>);

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

    /// Gives up on it until it is begun anew.
    pub(super) fn down(&mut self, poll: &Poll) -> io::Result<()> {
        self.stage = Stage::Down;
        drop(self.tcp.shutdown(Shutdown::Both));
        poll.forget(&self.tcp)
    }

    /// Neither up nor given up.
    pub(super) fn is_young(&self) -> bool {
        matches!(self.stage, Stage::Connecting | Stage::Greeted)
    }

    /// Closes with a reset, at once and without a trace in the port table.
    pub(super) fn abort(self) {
        // Fails only on a socket that is gone already.
        drop(SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO)));
    }
}

const EINPROGRESS: i32 = 115;
const PAUSE: Duration = Duration::from_millis(20);

impl Retries {
    pub(super) fn push(&mut self, index: usize) {
        self.0.push_back((Instant::now() + PAUSE, index));
    }

    /// One whose pause is over.
    pub(super) fn pop(&mut self) -> Option<usize> {
        let (at, index) = *self.0.front()?;
        (at <= Instant::now()).then(|| self.0.pop_front())?.map(|_| index)
    }

    /// When the next pause is over.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.front().map(|(at, _)| *at)
    }
}

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
        self.open_with(address, hello, Some(self.order()), wanted, at_once)
    }

    /// As [`Self::open`], with another order, or with none yet.
    pub(super) fn open_with(
        &mut self,
        address: SocketAddr,
        hello: &[u8],
        order: Option<Order>,
        wanted: usize,
        at_once: usize,
    ) -> anyhow::Result<u64> {
        let deadline = Instant::now() + OPENING;
        let wanted = self.conns.len() + wanted;
        let allowed = 100 + wanted as u64 / 10;
        let (mut failed, mut young, mut up) = (0, 0, self.conns.len());
        let mut retries = Retries::default();
        let mut ready = Vec::new();
        let mut looked = Instant::now();
        while up < wanted {
            while young < at_once {
                if let Some(index) = retries.pop() {
                    self.renew(address, index)?;
                } else if self.conns.len() < wanted {
                    let token = self.conns.len() as u64;
                    self.conns.push(Conn::begin(address, &self.poll, token).context("begin to connect")?);
                } else {
                    break;
                }
                young += 1;
            }
            self.poll.wait(&mut ready, Some(PAUSE)).context("wait for events")?;
            for event in &ready {
                let Some(index) = token(event.token) else { continue };
                let Some(conn) = self.conns.get_mut(index).filter(|conn| conn.is_young()) else { continue };
                match conn.step(*event, &self.poll, hello, order) {
                    Progress::Waiting => {}
                    Progress::Up => (up, young) = (up + 1, young - 1),
                    Progress::Broken => {
                        conn.down(&self.poll).context("stop watching a socket")?;
                        retries.push(index);
                        (failed, young) = (failed + 1, young - 1);
                    }
                }
            }
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                let late = self.give_up_late(&mut retries)?;
                (failed, young) = (failed + late as u64, young - late);
            }
            ensure!(failed <= allowed, "{failed} connections to {address} failed while {up} of {wanted} were open");
            ensure!(Instant::now() < deadline, "only {up} of {wanted} connections to {address} within {OPENING:?}");
        }
        Ok(failed)
    }

    /// Gives up on those that have been silent for too long since they began, and says how many.
    pub(super) fn give_up_late(&mut self, retries: &mut Retries) -> anyhow::Result<usize> {
        let mut late = 0;
        for (index, conn) in self.conns.iter_mut().enumerate() {
            if conn.is_young() && conn.began.elapsed() > PATIENCE {
                conn.down(&self.poll).context("stop watching a socket")?;
                retries.push(index);
                late += 1;
            }
        }
        Ok(late)
    }

    /// A new connection in the place of one that is down.
    pub(super) fn renew(&mut self, address: SocketAddr, index: usize) -> anyhow::Result<()> {
        let young = Conn::begin(address, &self.poll, index as u64).context("begin to connect again")?;
        if let Some(conn) = self.conns.get_mut(index) {
            std::mem::replace(conn, young).abort();
        }
        Ok(())
    }
}

pub(super) fn token(token: u64) -> Option<usize> {
    usize::try_from(token).ok()
}
