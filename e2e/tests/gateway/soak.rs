//! Mixed load for a while, with a far gateway killed and brought back again and again, and a look at the others' memory
//! and files every second. Flat means: no more later than earlier, and no trend, once warm; and all files given back.

use std::{
    fmt, fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use isthmus_runtime::wait::wait_for;
use tokio::{
    task::JoinSet,
    time::{interval, sleep, sleep_until},
};

use crate::{
    carry::judge,
    load::Load,
    plan::{Plan, Random},
    rig::World,
};

/// Short connections at a time, one after the other in each place.
const SHORT: u64 = 48;
/// Long-lived ones.
const LONG: u64 = 16;
/// Between two kills.
const KILL_EVERY: Duration = Duration::from_secs(10);
/// How long the killed gateway is away.
const AWAY: Duration = Duration::from_secs(2);
/// The one that is killed; the other two are measured.
const VICTIM: (&str, &str) = ("west", "gateway-2");
const MEASURED: [(&str, &str); 2] = [("east", "gateway-1"), ("west", "gateway-1")];

/// One look at one process.
#[derive(Clone, Copy, Debug)]
struct Sample {
    rss_kib: u64,
    files: usize,
}

struct Driver {
    load: Arc<Load>,
    auto: SocketAddr,
    seed: u64,
    stop: AtomicBool,
    ids: AtomicU64,
    done: AtomicU64,
    /// Moves with every kill and every return.
    events: AtomicU64,
}

/// Runs it all, prints the table, and fails on whatever is not flat or not right.
pub(crate) async fn run(mut world: World, load: Arc<Load>, seed: u64, lasting: Duration) {
    let pids = MEASURED.map(|name| world.gateways[&name].pid());
    let baseline = pids.map(look);
    let driver = Arc::new(Driver {
        load: load.clone(),
        auto: world.east().at.auto,
        seed,
        stop: AtomicBool::new(false),
        ids: AtomicU64::new(0),
        done: AtomicU64::new(0),
        events: AtomicU64::new(0),
    });
    let mut places = JoinSet::new();
    (0..SHORT).for_each(|_| drop(places.spawn(driver.clone().short())));
    (0..LONG).for_each(|place| drop(places.spawn(driver.clone().long(place))));

    let began = Instant::now();
    let mut samples: Vec<[Sample; 2]> = Vec::new();
    let mut tick = interval(Duration::from_secs(1));
    tick.tick().await;
    let mut kill_at = began + KILL_EVERY / 2;
    let mut kills = 0;
    println!(
        "{:>6} {:>12} {:>6} {:>12} {:>6} {:>10}",
        "s", "east RSS KiB", "files", "west RSS KiB", "files", "carried"
    );
    let every = usize::try_from(lasting.as_secs() / 30).unwrap().max(1);
    while began.elapsed() < lasting {
        tick.tick().await;
        let now = pids.map(look);
        samples.push(now);
        if samples.len().is_multiple_of(every) {
            let [east, west] = now;
            println!(
                "{:>6} {:>12} {:>6} {:>12} {:>6} {:>10}",
                began.elapsed().as_secs(),
                east.rss_kib,
                east.files,
                west.rss_kib,
                west.files,
                driver.done.load(Ordering::Relaxed)
            );
        }
        if Instant::now() >= kill_at {
            kill_at += KILL_EVERY;
            kills += 1;
            driver.events.fetch_add(1, Ordering::SeqCst);
            let victim = world.gateways.get_mut(&VICTIM).unwrap();
            victim.kill().await;
            // Once more: a connection may have come to it between the first word and its death.
            driver.events.fetch_add(1, Ordering::SeqCst);
            sleep_until((Instant::now() + AWAY).into()).await;
            victim.restart().await;
        }
    }
    driver.stop.store(true, Ordering::Relaxed);
    let mut wrong: Vec<String> = Vec::new();
    while let Some(place) = places.join_next().await {
        wrong.extend(place.unwrap());
    }
    wrong.extend(load.strange());
    let carried = driver.done.load(Ordering::Relaxed);
    println!("{carried} connections, {kills} kills, {} samples", samples.len());
    let some: Vec<&String> = wrong.iter().take(5).collect();
    assert!(wrong.is_empty(), "{} went wrong, seed {seed}, logs in {}; {some:#?}", wrong.len(), world.logs());
    assert!(carried > 0, "nothing was carried");

    for (i, (cluster, name)) in MEASURED.into_iter().enumerate() {
        let rss: Vec<f64> = samples.iter().map(|s| s[i].rss_kib as f64).collect();
        let files: Vec<f64> = samples.iter().map(|s| s[i].files as f64).collect();
        let verdict = [Flat::of("RSS KiB", &rss), Flat::of("files", &files)];
        verdict.iter().for_each(|flat| println!("{cluster}/{name}: {flat}"));
        for flat in verdict {
            assert!(flat.holds(lasting), "{cluster}/{name} grows: {flat}; seed {seed}");
        }
    }
    let slack = world.transport.slack();
    let given_back = async || (0..2).all(|i| look(pids[i]).files <= baseline[i].files + slack);
    let what = format!("files are given back, down to {:?}", baseline.map(|s| s.files));
    let waited = wait_for(&what, Duration::from_secs(30), given_back).await;
    waited.unwrap_or_else(|e| panic!("{e}: {:?} are open", pids.map(|pid| look(pid).files)));
    assert_eq!(world.east().open_streams().await, Some(0), "no stream is left behind");
    println!(
        "files at the end {:?}, at the beginning {:?}",
        pids.map(|pid| look(pid).files),
        baseline.map(|s| s.files)
    );
    world.stop().await;
}

impl Driver {
    /// One short connection after the other.
    async fn short(self: Arc<Self>) -> Vec<String> {
        let mut wrong = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let id = self.ids.fetch_add(1, Ordering::Relaxed);
            wrong.extend(self.one(Plan::draw(self.seed, id)).await);
            // Load, not a race for the processor.
            sleep(Duration::from_millis(Random::new(id).between(20, 120))).await;
        }
        wrong
    }

    /// One long connection after the other.
    async fn long(self: Arc<Self>, place: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let id = self.ids.fetch_add(1, Ordering::Relaxed);
            let lasting = Duration::from_millis(Random::new(id ^ place << 32).between(1_000, 8_000));
            wrong.extend(self.one(Plan::trickle(self.seed, id, lasting)).await);
        }
        wrong
    }

    async fn one(&self, plan: Plan) -> Option<String> {
        let before = self.events.load(Ordering::SeqCst);
        let plan = Arc::new(plan);
        let outcome = self.load.connection(self.auto, &plan).await;
        self.done.fetch_add(1, Ordering::Relaxed);
        // A kill is noticed a while later, and what ran through it may have begun long before.
        let excused = self.events.load(Ordering::SeqCst) != before;
        match outcome {
            Ok((client, server)) => {
                let faults = judge(&plan, &client, &server, excused);
                (!faults.is_empty()).then(|| format!("{}: {plan:?}, {client:?}, {server:?}", faults.join("; ")))
            }
            Err(fault) => Some(format!("{fault}: {plan:?}")),
        }
    }
}

fn look(pid: u32) -> Sample {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the gateway runs");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let rss_kib = rss.trim().trim_end_matches(" kB").parse().expect("a number");
    Sample { rss_kib, files: fs::read_dir(format!("/proc/{pid}/fd")).expect("the gateway runs").count() }
}

/// What became of one figure once warm.
#[derive(Clone, Copy, Debug)]
struct Flat {
    of: &'static str,
    /// Medians of the two halves.
    earlier: f64,
    later: f64,
    /// By the median of all slopes, from beginning to end.
    drift: f64,
}

impl Flat {
    /// The first third warms up.
    fn of(of: &'static str, values: &[f64]) -> Self {
        let warm = &values[values.len() / 3..];
        let (earlier, later) = warm.split_at(warm.len() / 2);
        let mut slopes = Vec::new();
        for (i, a) in warm.iter().enumerate() {
            slopes.extend(warm.iter().enumerate().skip(i + 1).map(|(j, b)| (b - a) / (j - i) as f64));
        }
        Self { of, earlier: median(earlier), later: median(later), drift: median(&slopes) * warm.len() as f64 }
    }

    /// A leak shows in both; one of them alone is a busy second.
    fn holds(&self, lasting: Duration) -> bool {
        // In half a minute the allocator has not seen everything yet.
        let share = if lasting >= Duration::from_secs(300) { 0.03 } else { 0.10 };
        let allowed = self.earlier * share;
        self.later - self.earlier <= allowed || self.drift <= allowed
    }
}

impl fmt::Display for Flat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { of, earlier, later, drift } = self;
        write!(f, "{of}: median {earlier:.0}, then {later:.0}; drift {drift:+.0}")
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
