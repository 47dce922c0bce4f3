//! How a link ended, in words for the log: what happened, and whether somebody should look.
//!
//! In: the link, why this end has closed it if it has, what the transport or the peer says otherwise. What holds: no bare
//! code, and no "closed" without by whom.

use std::time::Duration;

use isthmus_model::local::Transport;
use quinn::ConnectionError;

use super::{Close, registry::Tunnel};
use crate::config::TunnelConfig;

/// A link's end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    /// What happened.
    pub(crate) words: String,
    /// It was to be: a drain, a replacement, a peer that left.
    pub(crate) planned: bool,
}

/// Silence that means a peer's death. TCP tells nothing of packets, and sends a lost ping again after 200 ms or more, a
/// second time after twice that.
pub(crate) fn dead_after(config: &TunnelConfig, transport: Transport) -> Duration {
    match transport {
        Transport::Quic => config.dead_after,
        Transport::Tcp => config.dead_after * 2,
    }
}

/// How `tunnel`'s link, which is closed, came to its end.
pub(crate) fn of(tunnel: &Tunnel) -> Ending {
    let link = &tunnel.link;
    match (link.own_reason(), tunnel.replaced_because()) {
        (Some(Close::Replaced), Some(words)) => Ending { words: format!("replaced: {words}"), planned: true },
        (Some(why), _) => by_us(why, tunnel.dead_because()),
        (None, _) => link.why_closed().map_or_else(|| because("it broke".to_owned()), |why| by_others(&why)),
    }
}

fn by_us(why: Close, dead_because: Option<&str>) -> Ending {
    let (words, planned) = match why {
        Close::Drained => ("this gateway has drained", true),
        Close::Replaced => ("replaced: the peer moved, left its cluster's list, or its certificate ended", true),
        Close::Revoked => ("the peer's cluster left the federation or was revoked", true),
        Close::NotAMember => ("the peer's cluster is no active member", true),
        Close::Overloaded => ("the peer's cluster has too many links", false),
        Close::Protocol => ("the peer broke the protocol", false),
        Close::Dead => return because(format!("peer dead: {}", dead_because.unwrap_or("no sign of life"))),
    };
    Ending { words: words.to_owned(), planned }
}

/// By the peer, in one of our own words; or by nobody.
fn by_others(why: &str) -> Ending {
    let Some(known) = Close::from_label(why) else { return because(why.to_owned()) };
    let (words, planned) = match known {
        Close::Drained => ("it has drained", true),
        Close::Replaced => ("it replaced the link, or its certificate or ours ended", true),
        Close::Revoked => ("there, this cluster is revoked or has left", false),
        Close::NotAMember => ("there, this cluster is no active member", false),
        Close::Overloaded => ("it has too many links", false),
        Close::Protocol => ("it says that this gateway broke the protocol", false),
        Close::Dead => ("it had no sign of life from here", false),
    };
    Ending { words: format!("closed by the peer: {words}"), planned }
}

fn because(words: String) -> Ending {
    Ending { words, planned: false }
}

/// What QUIC says of a connection's end that was not ours: the peer's word, as [`Close::label`] has it, or words.
pub(super) fn quic(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(close) if close.reason.is_empty() => {
            "closed by the peer without a reason, as by a process that ends".to_owned()
        }
        ConnectionError::ApplicationClosed(close) => printable(&close.reason),
        ConnectionError::ConnectionClosed(close) if close.reason.is_empty() => {
            format!("closed by the peer's QUIC: {}", close.error_code)
        }
        ConnectionError::ConnectionClosed(close) => {
            format!("closed by the peer's QUIC: {}", printable(&close.reason))
        }
        ConnectionError::Reset => "the peer does not know it any more: its process ended or was replaced".to_owned(),
        ConnectionError::TimedOut => "no packet came for tunnel.idleTimeout".to_owned(),
        ConnectionError::LocallyClosed => "closed here".to_owned(),
        other => other.to_string(),
    }
}

/// What a peer says, bounded and in one line.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use quinn::{ApplicationClose, VarInt};

    use super::*;

    fn closed(code: u32, reason: &'static [u8]) -> Ending {
        let close = ApplicationClose { error_code: VarInt::from_u32(code), reason: Bytes::from_static(reason) };
        by_others(&quic(&ConnectionError::ApplicationClosed(close)))
    }

    #[test]
    fn a_dead_peer_is_told_with_what_showed_it() {
        let ending = by_us(Close::Dead, Some("no sign of life for 401.3ms"));
        assert_eq!(ending.words, "peer dead: no sign of life for 401.3ms");
        assert!(!ending.planned);
    }

    #[test]
    fn what_the_peer_says_is_put_into_words() {
        assert_eq!(closed(0, b"drained").words, "closed by the peer: it has drained");
        assert!(closed(0, b"drained").planned);
        assert_eq!(
            closed(0x10, b"peer_not_a_member").words,
            "closed by the peer: there, this cluster is no active member"
        );
        assert!(!closed(0x12, b"peer_dead").planned);
        let silent = closed(0, b"");
        assert!(silent.words.contains("without a reason") && !silent.words.contains('0'), "{silent:?}");
    }

    #[test]
    fn what_a_hostile_peer_says_is_bounded_and_stays_in_its_line() {
        let reason: &'static [u8] = Box::leak([b"a\nb\x1b[2J".as_slice(), &[b'x'; 5_000]].concat().into_boxed_slice());
        let words = closed(0x99, reason).words;
        assert!(words.len() <= 200 && words.starts_with("ab[2J"), "{words}");
    }

    #[test]
    fn every_reason_has_a_label_of_its_own() {
        for why in Close::ALL {
            assert_eq!(Close::from_label(why.label()), Some(why));
        }
    }
}
