//! The link as its users see it: start, change, run things at either end, read counters, gone when dropped.
//!
//! Addresses are `198.18.n.1` and `.2` (RFC 2544, for benchmarks), the same on every link with the same number; namespaces keep
//! them apart. What a link holds always: no route but the link itself, TCP settings that do not depend on the machine's
//! (congestion control as asked for, no memory of earlier connections between runs).

use std::{
    ffi::OsStr,
    fmt::{self, Display, Formatter},
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, ensure};
use tokio::process::Command;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::{
    forward::{Direction, Lane, QUEUE_PACKETS},
    netns::{self, Namespace},
};

/// Of the devices at both ends.
pub(crate) const MTU: u16 = 1500;

pub(super) const DEVICE: &str = "wan0";

/// No path on earth, or to a satellite above it, takes longer.
const MAX_RTT: Duration = Duration::from_secs(10);

/// What a path does to packets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Path {
    /// Both directions together; each delays by half.
    pub(crate) rtt: Duration,
    /// Probability, 0 to 1, that a packet is lost; each packet in each direction on its own.
    pub(crate) loss: f64,
}

/// What most links leave as it is.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// The same seed loses the same packets, by their number in each direction.
    pub(crate) seed: u64,
    /// TCP congestion control in both namespaces.
    pub(crate) congestion: String,
}

impl Default for Options {
    /// CUBIC is what kernels come with.
    fn default() -> Self {
        Self { seed: 1, congestion: "cubic".to_owned() }
    }
}

/// One end of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The first, usually the client's.
    A,
    /// The second, usually the server's.
    B,
}

/// Counters of both directions.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stats {
    /// Packets from A.
    pub(crate) a_to_b: Direction,
    /// Packets from B.
    pub(crate) b_to_a: Direction,
}

/// Two namespaces and what lies between them; dropping it removes everything.
#[derive(Debug)]
pub(crate) struct Link {
    // In order of their end: the forwarder, then the devices (with the last handle on them), then the namespaces.
    lanes: [Lane; 2],
    namespaces: [Namespace; 2],
    addresses: [IpAddr; 2],
}

impl Link {
    /// Brings a link up; blocks for some tens of milliseconds. Removes what killed runs have left behind.
    pub(crate) fn start(path: Path) -> anyhow::Result<Self> {
        Self::start_with(path, Options::default())
    }

    /// As [`Self::start`], with a seed or congestion control of one's own.
    pub(crate) fn start_with(path: Path, options: Options) -> anyhow::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);

        path.check()?;
        netns::remove_leftovers().context("remove the namespaces of earlier runs")?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let addresses = [1, 2].map(|host| Ipv4Addr::new(198, 18, number.to_le_bytes()[0], host));
        let [near, far] = addresses;
        let (a, b) = (Namespace::create(number, "a")?, Namespace::create(number, "b")?);
        let a_device = Arc::new(device(&a, near, &options.congestion)?);
        let b_device = Arc::new(device(&b, far, &options.congestion)?);
        let lanes = [
            Lane::start(&a, path, options.seed, (a_device.clone(), b_device.clone()))?,
            // Another sequence than the first direction's.
            Lane::start(&b, path, !options.seed, (b_device, a_device))?,
        ];
        Ok(Self { lanes, namespaces: [a, b], addresses: addresses.map(IpAddr::V4) })
    }

    /// Changes delay and loss from the next packet on. Packets on the way keep their time; none overtakes another.
    pub(crate) fn set(&self, path: Path) -> anyhow::Result<()> {
        path.check()?;
        self.lanes.iter().for_each(|lane| lane.set(path));
        Ok(())
    }

    /// While on, every packet that enters or leaves the link vanishes in silence, those on the way too.
    pub(crate) fn blackhole(&self, on: bool) {
        self.lanes.iter().for_each(|lane| lane.blackhole(on));
    }

    /// Names, of A and of B, for `ip netns exec`.
    pub(crate) fn namespaces(&self) -> [&str; 2] {
        self.namespaces.each_ref().map(Namespace::name)
    }

    /// Of A and of B.
    pub(crate) fn addresses(&self) -> [IpAddr; 2] {
        self.addresses
    }

    /// A command that will run `program` at `side` under its own process id. The kernel kills it when this process dies,
    /// dropping the child kills it, and so does dropping the link.
    pub(crate) fn command(&self, side: Side, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "ip", "netns", "exec", self.namespace(side).name()]);
        command.arg(program).kill_on_drop(true);
        command
    }

    /// Runs `work` on a new thread at `side`. Sockets made there stay there, whoever uses them; so do threads made there, so
    /// that a tokio runtime built inside is a client or server of that side within this process.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        side: Side,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
        self.namespace(side).spawn("wan-inside", work)
    }

    /// Counters since the start.
    pub(crate) fn stats(&self) -> Stats {
        let [a_to_b, b_to_a] = self.lanes.each_ref().map(Lane::counted);
        Stats { a_to_b, b_to_a }
    }

    fn namespace(&self, side: Side) -> &Namespace {
        let [a, b] = &self.namespaces;
        match side {
            Side::A => a,
            Side::B => b,
        }
    }
}

impl Path {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.rtt <= MAX_RTT, "a round-trip time of {:?} is beyond the limit of {MAX_RTT:?}", self.rtt);
        ensure!((0.0..=1.0).contains(&self.loss), "a loss of {} is not between 0 and 1", self.loss);
        Ok(())
    }
}

impl Display for Path {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} round trip, {} % loss each way", self.rtt, self.loss * 100.0)
    }
}

impl Display for Stats {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "A to B: {}", self.a_to_b)?;
        write!(f, "B to A: {}", self.b_to_a)
    }
}

/// The device of one side, addressed and up.
fn device(namespace: &Namespace, address: Ipv4Addr, congestion: &str) -> anyhow::Result<SyncDevice> {
    let device = namespace.run(move || {
        // IPv6 would send packets of its own over the link. Metrics of earlier connections would make the order of runs matter.
        let settings = [("ipv6/conf/default/disable_ipv6", "1"), ("ipv4/tcp_no_metrics_save", "1")];
        for (setting, value) in settings {
            let file = std::path::Path::new("/proc/sys/net").join(setting);
            if file.exists() {
                let written = std::fs::write(&file, value);
                written.with_context(|| format!("set {} to {value}", file.display()))?;
            }
        }
        let device = DeviceBuilder::new()
            .name(DEVICE)
            .ipv4(address, 30, None)
            .mtu(MTU)
            .tx_queue_len(u32::try_from(QUEUE_PACKETS).context("queue length")?)
            .build_sync()
            .context("make a TUN device (is /dev/net/tun there?)")?;
        device.set_nonblocking(true).context("set the TUN device to non-blocking")?;
        Ok(device)
    })?;
    tune_routes(namespace, congestion).with_context(|| format!("set TCP's congestion control to {congestion}"))?;
    Ok(device)
}

/// Sets TCP's congestion control on every route there is, loopback's too. A namespace's own default would be simpler, but it may
/// only be what the whole machine allows.
fn tune_routes(namespace: &Namespace, congestion: &str) -> anyhow::Result<()> {
    for table in ["main", "local"] {
        let routes = netns::ip(&["-n", namespace.name(), "-4", "route", "show", "table", table])?;
        for route in routes.lines().filter(|route| !route.starts_with("broadcast")) {
            let mut arguments = vec!["-n", namespace.name(), "route", "change"];
            arguments.extend(route.split_whitespace());
            arguments.extend(["table", table, "congctl", congestion]);
            netns::ip(&arguments)?;
        }
    }
    Ok(())
}
