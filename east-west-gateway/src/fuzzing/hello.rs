//! The peek into a ClientHello: the outcome does not depend on how the bytes come, nothing but the hello is held, never
//! more than the limit, and the name is the one that rustls reads.

use rustls::server::Acceptor;

use isthmus_model::{ids::TrustDomain, sni};

use super::{Cuts, Input};
use crate::hello::{HelloReader, Progress};

/// The smallest limit tried; `ingress.maxHelloBytes` starts at 512.
const LEAST: usize = 64;

/// Limit, cuts, then a connection's first bytes.
pub fn hello(data: &[u8]) {
    let mut input = Input(data);
    let max = LEAST + usize::from(input.short()) % (16 * 1024);
    let cuts = input.cuts();
    let bytes = input.0;

    let mut whole = HelloReader::new(max);
    let outcome = whole.push(bytes);
    let wanted = whole.wanted();
    let raw = whole.into_raw();
    assert!(raw.len() <= max, "{} bytes held, {max} allowed", raw.len());
    assert!(bytes.starts_with(&raw), "what is held is not what came");
    assert_eq!(wanted > 0, outcome == Progress::NeedMore, "wants {wanted} after {outcome:?}");

    let mut cut = HelloReader::new(max);
    let cut_outcome = cuts.segments(bytes).map(|segment| cut.push(segment)).last().unwrap_or(Progress::NeedMore);
    assert_eq!(cut_outcome, outcome, "cut by {cuts:?}");
    let cut_raw = cut.into_raw();
    // A refusal holds what was read up to it, which depends on the cut; nobody sends that on.
    assert!(cut_raw == raw || matches!(outcome, Progress::Bad(_)), "held differently when cut by {cuts:?}");
    assert!(cut_raw.len() <= max, "{} bytes held, {max} allowed, cut by {cuts:?}", cut_raw.len());

    let (asked_outcome, asked_raw) = as_asked(bytes, max, cuts);
    assert_eq!(asked_outcome, outcome, "reading no more than is wanted, by {cuts:?}");

    match outcome {
        Progress::NeedMore => assert_eq!(raw, bytes, "all that came belongs to a hello that is not complete"),
        Progress::Hello(hello) => {
            assert_eq!(raw.len(), hello.len, "what is replayed is the hello");
            assert_eq!(asked_raw, raw, "reading as asked never passes the hello");
            if let Some(name) = rustls_name(&raw) {
                assert_eq!(hello.sni, name, "rustls reads another name");
            }
            routes_back(&hello.sni);
        }
        Progress::Bad(_) => {}
    }
}

/// Reads as the ingress does: never more than is wanted.
fn as_asked(mut bytes: &[u8], max: usize, cuts: Cuts<'_>) -> (Progress, Vec<u8>) {
    let mut reader = HelloReader::new(max);
    let mut taken = 0;
    let mut last = Progress::NeedMore;
    for size in cuts.sizes() {
        let (now, later) = bytes.split_at(size.min(reader.wanted()).min(bytes.len()));
        if now.is_empty() {
            break;
        }
        bytes = later;
        taken += now.len();
        last = reader.push(now);
    }
    let raw = reader.into_raw();
    assert!(raw.len() <= max, "{} bytes held, {max} allowed", raw.len());
    assert!(raw.len() == taken || matches!(last, Progress::Bad(_)), "{taken} bytes were read, {} are held", raw.len());
    (last, raw)
}

/// The server name as rustls has it, if it takes the hello at all.
fn rustls_name(mut raw: &[u8]) -> Option<String> {
    let mut acceptor = Acceptor::default();
    while !raw.is_empty() {
        acceptor.read_tls(&mut raw).ok()?;
        if let Some(accepted) = acceptor.accept().ok()? {
            return accepted.client_hello().server_name().map(str::to_ascii_lowercase);
        }
    }
    None
}

/// A name that is a route is the one name of that route.
fn routes_back(name: &str) {
    let federation: TrustDomain = crate::testkit::FEDERATION.parse().expect("a trust domain");
    if let Ok(route) = sni::parse(name, &federation) {
        assert_eq!(sni::encode(&route, &federation).as_deref(), Some(name), "another spelling of {route:?}");
    }
}
