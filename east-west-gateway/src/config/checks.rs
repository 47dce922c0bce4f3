//! What values of the configuration make no sense although each is of the right type: pauses of nothing, addresses
//! that nobody can dial, two listeners on one address.
//!
//! In: a configuration. Out: problems, each with its field and what to write instead. Limits on connections, and those that
//! depend on one another, are checked beside [`Config`] itself.

use std::{net::SocketAddr, time::Duration};

use isthmus_runtime::config::Problems;

use super::Config;

/// Shorter than any deadline that can be kept; TCP_USER_TIMEOUT counts in it.
const SHORTEST: Duration = Duration::from_millis(1);

/// Adds all problems.
pub(super) fn check(config: &Config, problems: &mut Problems) {
    deadlines(config, problems);
    addresses(config, problems);
    problems.within("telemetry", &config.telemetry);
}

fn deadlines(config: &Config, problems: &mut Problems) {
    let t = &config.tunnel;
    for (field, value, example) in [
        ("tunnel.dialBackoffMax", t.dial_backoff_max, "2s"),
        ("tunnel.fallbackAfter", t.fallback_after, "1s"),
        ("tunnel.tcp.userTimeout", t.tcp.user_timeout, "10s"),
    ] {
        if value < SHORTEST {
            problems.add(field, format!("must be above zero, or nothing is ever in time; for example {example}"));
        }
    }
}

fn addresses(config: &Config, problems: &mut Problems) {
    if let Some(address) = config.advertise
        && (address.ip().is_unspecified() || address.ip().is_multicast() || address.port() == 0)
    {
        let message = format!("peers cannot dial {address}: write the IP and port at which they reach this gateway");
        problems.add("advertise", message);
    }
    let listen = &config.listen;
    // All of them over TCP; where one is the same as another, the second cannot be bound.
    let listeners = [
        ("listen.tunnel", listen.tunnel),
        ("listen.autoPort", SocketAddr::new(listen.local, listen.auto_port)),
        ("listen.health", listen.health),
    ];
    for (at, (field, address)) in listeners.iter().enumerate() {
        let earlier = listeners.iter().take(at).find(|(_, other)| overlap(*address, *other));
        if let Some((other, _)) = earlier {
            let message = format!("{address} is this gateway's own {other} already: give each a port of its own");
            problems.add(*field, message);
        }
    }
}

/// Whether both cannot be listened on. Port 0 is a free one.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let every = |address: SocketAddr| address.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || every(a) || every(b))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MINIMAL, load};

    /// The minimal file with `line` under `section`.
    fn with(section: &str, line: &str) -> String {
        match MINIMAL.split_once(&format!("{section}:\n")) {
            Some((before, after)) => format!("{before}{section}:\n{line}\n{after}"),
            None => format!("{MINIMAL}{section}:\n{line}\n"),
        }
    }

    #[track_caller]
    fn refused(text: &str, field: &str, words: &str) {
        let error = load(text).unwrap_err();
        assert!(error.contains(&format!(" {field}: ")) && error.contains(words), "{field}: {error}");
    }

    #[test]
    fn deadlines_of_nothing_are_refused() {
        for key in ["dialBackoffMax", "fallbackAfter"] {
            refused(&with("tunnel", &format!("  {key}: 0s")), &format!("tunnel.{key}"), "for example");
        }
        refused(&with("tunnel", "  tcp: { userTimeout: 0s }"), "tunnel.tcp.userTimeout", "for example 10s");
    }

    #[test]
    fn what_telemetry_would_refuse_at_the_start_is_refused_by_the_check() {
        refused(&with("telemetry", "  log: { level: verbose }"), "telemetry.log.level", "debug");
        refused(&with("telemetry", "  otlpEndpoint: nohost"), "telemetry.otlpEndpoint", "http://host:port");
        refused(&with("telemetry", "  samplePercent: 200"), "telemetry.samplePercent", "use 0 to 100");
    }

    #[test]
    fn an_address_that_nobody_can_dial_is_not_advertised() {
        for address in ["0.0.0.0:15443", "'[::]:15443'", "224.0.0.1:15443", "192.0.2.1:0"] {
            refused(&format!("{MINIMAL}advertise: {address}\n"), "advertise", "peers cannot dial");
        }
        load(&format!("{MINIMAL}advertise: 192.0.2.1:15443\n")).unwrap();
    }

    #[test]
    fn the_open_files_of_the_limits_count_a_links_connections_where_it_may_be_tcp() {
        let files = |more: &str| load(&format!("{MINIMAL}{more}")).unwrap().open_files();
        assert_eq!(files(""), 41_024);
        for over in ["tunnel: { transport: auto }", "tunnel: { links: { us-west: tcp } }"] {
            assert_eq!(files(&format!("{over}\n")), 81_024, "{over}");
        }
    }

    #[test]
    fn two_listeners_on_one_address_are_refused_by_name() {
        let moved = |from: &str, to: &str| MINIMAL.replace(from, to);
        refused(&moved("autoPort: 15440", "autoPort: 15443"), "listen.autoPort", "own listen.tunnel");
        refused(&moved("127.1.1.11:15080", "127.1.1.11:15443"), "listen.health", "own listen.tunnel");
        refused(&moved("127.1.1.11:15080", "0.0.0.0:15440"), "listen.health", "own listen.autoPort");
        load(&moved("127.1.1.11:15080", "127.1.1.12:15443")).unwrap();
    }
}
