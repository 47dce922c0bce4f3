//! The link against its promises. They need root: without it they fail, and the error says so.

use std::{
    fs,
    io::ErrorKind,
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{
    Link, Loss, Options, Path, Side,
    netns::ip,
    selftest::{losses, round_trips, throughput},
};

const NEAR: Path = Path { rtt: Duration::from_millis(4), loss: 0.0 };

#[test]
fn a_round_trip_takes_what_was_asked_for() {
    let path = Path { rtt: Duration::from_millis(40), loss: 0.0 };
    let link = Link::start(path).unwrap();
    let times = round_trips(&link, path, 30).unwrap();
    assert_eq!(times.sorted.len(), 30);
    let (shortest, median) = (times.quantile(0.0), times.quantile(0.5));
    assert!(shortest >= path.rtt, "an answer came after {shortest:?}, sooner than the path allows");
    assert!(median < path.rtt + Duration::from_millis(1), "the median is {median:?}");

    let shorter = Path { rtt: Duration::from_millis(10), ..path };
    link.set(shorter).unwrap();
    let median = round_trips(&link, shorter, 30).unwrap().quantile(0.5);
    assert!((shorter.rtt..shorter.rtt + Duration::from_millis(1)).contains(&median), "the median is {median:?}");
}

#[test]
fn losses_are_near_what_was_asked_for_and_follow_the_seed() {
    let path = Path { loss: 0.03, ..NEAR };
    let count = 20_000;
    let run = |seed| {
        let link = Link::start_with(path, Options { seed, ..Options::default() }).unwrap();
        let seen = losses(&link, path, count).unwrap();
        let counted = link.stats().a_to_b;
        assert_eq!(u64::from(seen.received), counted.passed, "{seen:?}, {counted}");
        assert_eq!(u64::from(count), counted.passed + counted.lost, "{counted}");
        assert_eq!((seen.reordered, counted.overflowed, counted.swallowed), (0, 0, 0));
        // Four standard deviations of a binomial distribution.
        assert!((seen.share() - path.loss).abs() < 4.0 * (0.03_f64 * 0.97 / f64::from(count)).sqrt(), "{seen:?}");
        counted.lost
    };
    let (first, again, other) = (run(7), run(7), run(8));
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[test]
fn a_clean_path_loses_nothing_and_both_directions_count() {
    let link = Link::start(NEAR).unwrap();
    assert_eq!(round_trips(&link, NEAR, 50).unwrap().sorted.len(), 50);
    let stats = link.stats();
    // One more from A, which ends the echo.
    assert_eq!((stats.a_to_b.passed, stats.b_to_a.passed), (51, 50), "{stats}");
    assert_eq!(stats.a_to_b.lost + stats.a_to_b.overflowed + stats.b_to_a.lost + stats.b_to_a.overflowed, 0, "{stats}");
}

#[test]
fn tcp_gets_far_through_a_clean_path() {
    let link = Link::start(NEAR).unwrap();
    let bits = throughput(&link, 2, Duration::from_secs(2)).unwrap();
    // Far below what it does (`wan --selftest`): unoptimized, beside other tests.
    assert!(bits > 50e6, "{:.1} Mbit/s", bits / 1e6);
}

#[test]
fn a_black_hole_swallows_until_it_is_closed() {
    let link = Link::start(NEAR).unwrap();
    link.blackhole(true);
    let times = round_trips(&link, NEAR, 3).unwrap();
    assert!(times.sorted.is_empty());
    // Three questions and the packet that should have ended the echo.
    assert_eq!((link.stats().a_to_b.swallowed, link.stats().a_to_b.passed), (4, 0));
    link.blackhole(false);
    assert_eq!(round_trips(&link, NEAR, 3).unwrap().sorted.len(), 3);
}

#[tokio::test]
async fn commands_run_inside_and_reach_only_the_other_side() {
    let link = Link::start(NEAR).unwrap();
    let output = link.command(Side::B, "ip").args(["-4", "-brief", "address"]).output().await.unwrap();
    let addresses = String::from_utf8(output.stdout).unwrap();
    assert!(addresses.contains("198.18.") && addresses.contains("127.0.0.1"), "{addresses}");
    assert_eq!(addresses.lines().count(), 2, "{addresses}");

    let output = link.command(Side::A, "ip").args(["route"]).output().await.unwrap();
    let routes = String::from_utf8(output.stdout).unwrap();
    assert_eq!(routes.lines().count(), 1, "{routes}");
    let inside = link.spawn(Side::A, || UdpSocket::bind("0.0.0.0:0").unwrap().connect("192.0.2.1:9")).unwrap();
    let error = inside.join().unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
}

#[tokio::test]
async fn tcp_keeps_to_the_congestion_control_asked_for_on_the_link_and_on_loopback() {
    // No machine's default.
    let congestion = "reno".to_owned();
    let link = Link::start_with(NEAR, Options { congestion, ..Options::default() }).unwrap();
    let [_, far] = link.addresses();
    let mut open = Vec::new();
    for (from, address) in [(Side::A, far), (Side::B, far), (Side::B, Ipv4Addr::LOCALHOST.into())] {
        let listen = link.spawn(Side::B, move || TcpListener::bind((address, 0)).unwrap()).unwrap();
        let listener = listen.join().unwrap().unwrap();
        let to = listener.local_addr().unwrap();
        let client = link.spawn(from, move || TcpStream::connect(to).unwrap()).unwrap().join().unwrap().unwrap();
        open.push((client, listener.accept().unwrap()));
    }
    for (side, sockets) in [(Side::A, 1), (Side::B, 5)] {
        let output = link.command(side, "ss").args(["-tinH", "state", "established"]).output().await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.split_whitespace().filter(|word| *word == "reno").count(), sockets, "{side:?}:\n{text}");
    }
}

#[tokio::test]
async fn dropping_the_link_removes_all_of_it_with_what_runs_inside() {
    let link = Link::start(NEAR).unwrap();
    let names = link.namespaces().map(str::to_owned);
    assert!(names.iter().all(|name| fs::exists(format!("/run/netns/{name}")).unwrap()), "{names:?}");
    let mut sleeper = link.command(Side::B, "sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
    let pid = sleeper.id().unwrap();
    let mut reached = String::new();
    let patience = Instant::now() + Duration::from_secs(10);
    // `setpriv` and `ip` come first under the same process id.
    while reached.trim() != "sleep" && Instant::now() < patience {
        reached = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        tokio::task::yield_now().await;
    }
    drop(link);
    let status = tokio::time::timeout(Duration::from_secs(10), sleeper.wait()).await.unwrap().unwrap();
    assert!(!status.success(), "{status}");
    assert!(names.iter().all(|name| !fs::exists(format!("/run/netns/{name}")).unwrap()), "{names:?}");
}

#[test]
fn what_a_killed_run_left_is_removed_by_the_next_and_nothing_else_is() {
    let [mut gone, mut dead] = [(), ()].map(|()| Command::new("true").stdout(Stdio::piped()).spawn().unwrap());
    gone.wait().unwrap();
    // Its end of the pipe closes when it ends; nobody has collected it then.
    std::io::copy(dead.stdout.as_mut().unwrap(), &mut std::io::sink()).unwrap();
    let name = |owner: u32| format!("isthmus-wan-{owner}-0-test{}", std::process::id());
    let names = [gone.id(), dead.id(), 1].map(name);
    for name in &names {
        ip(&["netns", "add", name]).unwrap();
    }
    let zombie = format!("/proc/{}/stat", dead.id());
    let patience = Instant::now() + Duration::from_secs(10);
    while !fs::read_to_string(&zombie).unwrap().contains(") Z ") && Instant::now() < patience {
        std::thread::yield_now();
    }
    drop(Link::start(NEAR).unwrap());
    dead.wait().unwrap();
    let there = names.each_ref().map(|name| fs::exists(format!("/run/netns/{name}")).unwrap());
    ip(&["netns", "delete", &names[2]]).unwrap();
    assert_eq!(there, [false, false, true], "{names:?}");
}

#[test]
fn shares_are_read_in_per_cent() {
    assert_eq!("0.1%".parse::<Loss>().unwrap(), Loss(0.001));
    assert_eq!("3 %".parse::<Loss>().unwrap(), Loss(0.03));
    for wrong in ["1", "101%", "-1%", "NaN%", "%", "one%"] {
        assert!(wrong.parse::<Loss>().is_err(), "{wrong}");
    }
}

#[test]
fn impossible_paths_are_refused() {
    for path in
        [Path { loss: 1.5, ..NEAR }, Path { loss: f64::NAN, ..NEAR }, Path { rtt: Duration::from_secs(60), ..NEAR }]
    {
        assert!(Link::start(path).is_err(), "{path}");
    }
}
