//! Mixed load for a while, with a far gateway killed and brought back again and again, and a look at the others' memory
//! and files every second. Flat means: no more later than earlier, and no trend, once warm; and all files given back.

use std::{
    fmt, fs,
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_runtime::wait::wait_for;
use tokio::time::{interval, sleep_until};

use crate::{
    load::Load,
    plan::Sender,
    rig::World,
    traffic::{Attempts, Places, Route, Traffic},
};

const PLACES: Places = Places { short: 48, long: 16, lasting: (1_000, 8_000) };
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

/// Runs it all, prints the table, and fails on whatever is not flat or not right.
pub(crate) async fn run(mut world: World, load: Arc<Load>, seed: u64, lasting: Duration) {
    let pids = MEASURED.map(|name| world.gateways[&name].pid());
    let baseline = pids.map(look);
    let route = Route { entry: world.east().at.auto, mortal: Sender::Server, attempts: Attempts::Many };
    let traffic = Traffic::start(load.clone(), route, seed, PLACES);

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
                traffic.done()
            );
        }
        if Instant::now() >= kill_at {
            kill_at += KILL_EVERY;
            kills += 1;
            traffic.disturb();
            let victim = world.gateways.get_mut(&VICTIM).unwrap();
            victim.kill().await;
            // Once more: a connection may have come to it between the first word and its death.
            traffic.disturb();
            sleep_until((Instant::now() + AWAY).into()).await;
            victim.restart().await;
        }
    }
    let (carried, mut wrong) = traffic.stop().await;
    wrong.extend(load.strange());
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
