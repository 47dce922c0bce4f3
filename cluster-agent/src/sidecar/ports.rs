//! Who holds a port that Envoy cannot have: read from the kernel's socket tables, for words in the log.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Addresses on which something on this machine listens at TCP `port`.
pub(super) fn listeners(port: u16) -> Vec<IpAddr> {
    let table = |path| fs::read_to_string(path).unwrap_or_default();
    let mut all = parse(&table("/proc/net/tcp"), port);
    all.extend(parse(&table("/proc/net/tcp6"), port));
    all.sort_unstable();
    all.dedup();
    all
}

/// A sentence about `at`, which could not be bound.
pub(super) fn explain(at: SocketAddr) -> String {
    let holders: Vec<_> = listeners(at.port()).into_iter().filter(|ip| *ip == at.ip() || ip.is_unspecified()).collect();
    match holders.first() {
        Some(ip) if ip.is_unspecified() => format!(
            "an app listens on {} and so on every address; make it listen on its own address, or stop it (find it with: \
             ss -ltnp 'sport = :{}')",
            SocketAddr::new(*ip, at.port()),
            at.port()
        ),
        Some(_) => format!("something listens on {at} already; find it with: ss -ltnp 'sport = :{}'", at.port()),
        None => format!("{at} cannot be bound; is {} an address of this machine?", at.ip()),
    }
}

/// Lines as in proc(5): `sl local_address rem_address st …`, addresses in the machine's byte order, state 0A is LISTEN.
fn parse(table: &str, port: u16) -> Vec<IpAddr> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (ip, local_port) = fields.nth(1)?.split_once(':')?;
            let listening = fields.nth(1)? == "0A";
            (listening && u16::from_str_radix(local_port, 16).ok()? == port).then(|| address(ip))?
        })
        .collect()
}

fn address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let bytes = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes: [u8; 16] = bytes.concat().try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_found_and_named() {
        let app = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = app.local_addr().unwrap().port();
        assert_eq!(listeners(port), [IpAddr::V4(Ipv4Addr::UNSPECIFIED)]);
        let text = explain(SocketAddr::new("127.64.0.1".parse().unwrap(), port));
        assert!(text.contains(&format!("0.0.0.0:{port}")), "{text}");
    }

    #[test]
    fn garbage_in_the_table_is_skipped() {
        assert!(parse("head\nx\n 0: zz:50 0:0 0A\n 1: 0100007F 0:0 0A\n", 80).is_empty());
    }
}
