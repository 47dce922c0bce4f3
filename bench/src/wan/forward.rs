//! One direction of the link: packets in, a queue ordered by due time, packets out.
//!
//! A thread of its own per direction: read what came, decide loss, note when it is due (arrival + half the round-trip time),
//! write what is due, sleep until the next event. Order is kept even when the delay shrinks. The queue holds at most
//! [`QUEUE_PACKETS`]; a packet that finds it full is dropped (drop-tail) and counted. Memory is bounded by that number times the
//! MTU. The thread sleeps with a timer slack of 1 ns and at real-time priority, for the link must not slow down because the
//! programs that use it keep the processors busy.

use std::{
    collections::VecDeque,
    fmt::{self, Display, Formatter},
    num::NonZeroU64,
    os::fd::{AsFd, OwnedFd},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};
use tun_rs::SyncDevice;

use super::{
    link::{DEVICE, MTU, Path},
    netns::Namespace,
};

/// Packets on their way in one direction, at most: 12 MB, which is 20 ms at 4.9 Gbit/s.
pub(crate) const QUEUE_PACKETS: usize = 8192;

/// Packets read before due ones are looked at again.
const BATCH: usize = 64;

/// What became of the packets of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Direction {
    /// Packets delivered.
    pub(crate) passed: u64,
    /// Bytes delivered, IP headers included.
    pub(crate) bytes: u64,
    /// Lost on purpose, as the path's loss asks for.
    pub(crate) lost: u64,
    /// Dropped because the queue was full, before the forwarder (the device's own queue) or in it.
    pub(crate) overflowed: u64,
    /// Swallowed by the black hole.
    pub(crate) swallowed: u64,
}

/// A running direction; stops when dropped.
#[derive(Debug)]
pub(super) struct Lane {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Lane {
    /// Begins to forward from the first device, which is in namespace `inside`, to the second.
    pub(super) fn start(
        inside: &Namespace,
        path: Path,
        seed: u64,
        (from, to): (Arc<SyncDevice>, Arc<SyncDevice>),
    ) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            wake: eventfd(0, EventfdFlags::CLOEXEC).context("make an eventfd")?,
            stop: AtomicBool::new(false),
            blackhole: AtomicBool::new(false),
            delay: AtomicU64::new(0),
            loss: AtomicU64::new(0),
            thread: AtomicU64::new(0),
            passed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
            swallowed: AtomicU64::new(0),
        });
        shared.set(path);
        let worker = Worker {
            shared: shared.clone(),
            from,
            to,
            random: StdRng::seed_from_u64(seed),
            queue: VecDeque::new(),
            spare: Vec::new(),
            last_due: Instant::now(),
        };
        let thread = inside.spawn("wan-forward", move || {
            // Said at once: whoever measures over the link sees only that nothing comes any more.
            worker.run().unwrap_or_else(|error| eprintln!("the link's forwarder ended early: {error:#}"));
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn set(&self, path: Path) {
        self.shared.set(path);
    }

    pub(super) fn blackhole(&self, on: bool) {
        self.shared.blackhole.store(on, Relaxed);
    }

    pub(super) fn counted(&self) -> Direction {
        let shared = &self.shared;
        Direction {
            passed: shared.passed.load(Relaxed),
            bytes: shared.bytes.load(Relaxed),
            lost: shared.lost.load(Relaxed),
            overflowed: shared.overflowed.load(Relaxed) + dropped_by_device(shared.thread.load(Relaxed)),
            swallowed: shared.swallowed.load(Relaxed),
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        let woken = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("the link's forwarder did not start: {error:#}"),
                Err(_) => eprintln!("the link's forwarder died"),
            }
        }
    }
}

/// What the owner and the thread both see.
#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    stop: AtomicBool,
    blackhole: AtomicBool,
    /// Nanoseconds.
    delay: AtomicU64,
    /// The bits of an `f64`.
    loss: AtomicU64,
    /// The forwarder's thread id, for `/proc`.
    thread: AtomicU64,
    passed: AtomicU64,
    bytes: AtomicU64,
    lost: AtomicU64,
    overflowed: AtomicU64,
    swallowed: AtomicU64,
}

impl Shared {
    fn set(&self, path: Path) {
        let delay = u64::try_from((path.rtt / 2).as_nanos()).unwrap_or(u64::MAX);
        self.delay.store(delay, Relaxed);
        self.loss.store(path.loss.to_bits(), Relaxed);
    }
}

struct Packet {
    due: Instant,
    length: usize,
    bytes: Box<[u8; MTU as usize]>,
}

struct Worker {
    shared: Arc<Shared>,
    from: Arc<SyncDevice>,
    to: Arc<SyncDevice>,
    random: StdRng,
    queue: VecDeque<Packet>,
    /// Buffers of delivered packets, for the next ones; with those in the queue never more than the queue's limit and one.
    #[expect(clippy::vec_box, reason = "buffers move between the two collections without being copied")]
    spare: Vec<Box<[u8; MTU as usize]>>,
    last_due: Instant,
}

impl Worker {
    fn run(mut self) -> anyhow::Result<()> {
        let thread = rustix::thread::gettid();
        self.shared.thread.store(u64::from(thread.as_raw_pid().unsigned_abs()), Relaxed);
        rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).context("set the timer slack")?;
        real_time(thread.as_raw_pid())?;
        while !self.shared.stop.load(Relaxed) {
            self.deliver()?;
            if self.receive()? {
                self.sleep()?;
            }
        }
        Ok(())
    }

    /// Writes what is due.
    fn deliver(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        while let Some(packet) = self.queue.pop_front_if(|packet| packet.due <= now) {
            if self.shared.blackhole.load(Relaxed) {
                add(&self.shared.swallowed, 1);
            } else {
                match rustix::io::write(&*self.to, packet.bytes.get(..packet.length).unwrap_or_default()) {
                    Ok(written) => {
                        add(&self.shared.passed, 1);
                        add(&self.shared.bytes, written as u64);
                    }
                    // The far side's kernel is out of buffers.
                    Err(Errno::AGAIN | Errno::NOBUFS) => add(&self.shared.overflowed, 1),
                    Err(error) => return Err(error).context("write to the TUN device"),
                }
            }
            self.spare.push(packet.bytes);
        }
        Ok(())
    }

    /// Takes in what has come, a batch at most; true if nothing more is there.
    fn receive(&mut self) -> anyhow::Result<bool> {
        let delay = Duration::from_nanos(self.shared.delay.load(Relaxed));
        let loss = f64::from_bits(self.shared.loss.load(Relaxed));
        for _ in 0..BATCH {
            let mut bytes = self.spare.pop().unwrap_or_else(|| Box::new([0; MTU as usize]));
            let length = match rustix::io::read(&*self.from, bytes.as_mut_slice()) {
                Ok(length) => length,
                Err(Errno::AGAIN) => {
                    self.spare.push(bytes);
                    return Ok(true);
                }
                Err(error) => return Err(error).context("read from the TUN device"),
            };
            // Drawn for every packet, so that its fate depends on the seed and its number alone.
            let lost = self.random.random::<f64>() < loss;
            let refused = if self.shared.blackhole.load(Relaxed) {
                Some(&self.shared.swallowed)
            } else if lost {
                Some(&self.shared.lost)
            } else if self.queue.len() >= QUEUE_PACKETS {
                Some(&self.shared.overflowed)
            } else {
                None
            };
            if let Some(counter) = refused {
                add(counter, 1);
                self.spare.push(bytes);
                continue;
            }
            self.last_due = self.last_due.max(Instant::now() + delay);
            self.queue.push_back(Packet { due: self.last_due, length, bytes });
        }
        Ok(false)
    }

    /// Until the next packet is due, one comes, or the end is called.
    fn sleep(&self) -> anyhow::Result<()> {
        let left = self.queue.front().map(|packet| packet.due.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose().context("a delay is too long")?;
        let mut events = [
            PollFd::from_borrowed_fd(self.from.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.shared.wake.as_fd(), PollFlags::IN),
        ];
        match poll(&mut events, left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("wait for packets"),
        }
    }
}

impl Display for Direction {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { passed, bytes, lost, overflowed, swallowed } = self;
        write!(f, "{passed} packets ({bytes} bytes) passed, {lost} lost as asked for, ")?;
        write!(f, "{overflowed} dropped by full queues, {swallowed} swallowed by the black hole")
    }
}

/// Only one thread writes a counter, so no read-modify-write is needed.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed) + more, Relaxed);
}

/// Lets the thread run as soon as it has to, before all that is not real-time.
fn real_time(thread: i32) -> anyhow::Result<()> {
    let mut chrt = Command::new("chrt");
    chrt.args(["--fifo", "--pid", "1", &thread.to_string()]).stdin(Stdio::null());
    let status = chrt.status().context("run `chrt` (is util-linux installed?)")?;
    ensure!(status.success(), "`chrt` could not give the link's forwarder real-time priority: {status}");
    Ok(())
}

/// Packets that found the device's own queue full, because the forwarder was late in reading it.
fn dropped_by_device(thread: u64) -> u64 {
    let table = std::fs::read_to_string(format!("/proc/self/task/{thread}/net/dev")).unwrap_or_default();
    let row = table.lines().find_map(|line| line.trim_start().strip_prefix(DEVICE)?.strip_prefix(':'));
    // Eight columns of received packets come first, then bytes, packets, errors and drops of sent ones.
    row.and_then(|row| row.split_whitespace().nth(11)?.parse().ok()).unwrap_or(0)
}
