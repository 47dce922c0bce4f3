//! ClientHellos as rustls really writes them (classic and post-quantum), broken ones, and any bytes at all.

use std::sync::Arc;

use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::aws_lc_rs};

use super::{BadHello, Hello, HelloReader, Progress};

const NAME: &str = "80.cart.shop.svc.any.isthmus.example";
const MAX: usize = 16 * 1024;

fn hello_of(versions: &[&'static rustls::SupportedProtocolVersion], sni: bool, post_quantum: bool) -> Vec<u8> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = if post_quantum {
        vec![aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519]
    } else {
        vec![aws_lc_rs::kx_group::X25519]
    };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.enable_sni = sni;
    let mut client = ClientConnection::new(Arc::new(config), NAME.try_into().unwrap()).unwrap();
    let mut out = Vec::new();
    client.write_tls(&mut out).unwrap();
    out
}

fn tls13(post_quantum: bool) -> Vec<u8> {
    hello_of(&[&rustls::version::TLS13], true, post_quantum)
}

fn read(bytes: &[u8], max: usize) -> Progress {
    HelloReader::new(max).push(bytes)
}

fn good(len: usize) -> Progress {
    Progress::Hello(Hello { sni: NAME.to_owned(), len })
}

/// The same handshake message, cut into records of at most `size` bytes.
fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
    let record = |chunk: &[u8]| {
        let mut out = vec![22, 3, 1];
        out.extend_from_slice(&u16::try_from(chunk.len()).unwrap().to_be_bytes());
        out.extend_from_slice(chunk);
        out
    };
    hello[5..].chunks(size).flat_map(record).collect()
}

/// Appends an extension to a hello that is one record.
fn with_extension(hello: &[u8], kind: u16, data: &[u8]) -> Vec<u8> {
    let mut out = hello.to_vec();
    let added = u16::try_from(4 + data.len()).unwrap();
    let grow = |out: &mut Vec<u8>, at: usize| {
        let n = u16::from_be_bytes([out[at], out[at + 1]]) + added;
        out[at..at + 2].copy_from_slice(&n.to_be_bytes());
    };
    let session = 5 + 4 + 34;
    let suites = session + 1 + usize::from(out[session]);
    let compression = suites + 2 + usize::from(u16::from_be_bytes([out[suites], out[suites + 1]]));
    let extensions = compression + 1 + usize::from(out[compression]);
    grow(&mut out, 3);
    grow(&mut out, 7);
    grow(&mut out, extensions);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
    out.extend_from_slice(data);
    out
}

#[test]
fn a_classic_and_a_post_quantum_hello_give_their_server_name() {
    let classic = tls13(false);
    let post_quantum = tls13(true);
    assert!(post_quantum.len() > 1200, "a post-quantum hello exceeds one segment: {}", post_quantum.len());
    assert_eq!(read(&classic, MAX), good(classic.len()));
    assert_eq!(read(&post_quantum, MAX), good(post_quantum.len()));
}

#[test]
fn a_hello_over_several_records_is_read_whole() {
    let hello = in_records(&tls13(true), 100);
    assert_eq!(read(&hello, MAX), good(hello.len()));
}

#[test]
fn reading_what_is_wanted_never_passes_the_hello() {
    for size in [1, 7, 500, 16384] {
        let hello = in_records(&tls13(true), size);
        let mut stream = hello.clone();
        stream.extend_from_slice(b"application data");
        let mut reader = HelloReader::new(MAX);
        let mut at = 0;
        while reader.wanted() > 0 {
            let end = at + reader.wanted();
            reader.push(&stream[at..end]);
            at = end;
        }
        assert_eq!(at, hello.len());
        assert_eq!(reader.raw, hello);
    }
}

#[test]
fn bytes_after_the_hello_do_not_belong_to_it() {
    let hello = tls13(false);
    let mut more = hello.clone();
    more.extend_from_slice(&[23, 3, 3, 0, 1, 0]);
    assert_eq!(read(&more, MAX), good(hello.len()));
}

#[test]
fn what_is_not_tls_is_refused_at_its_first_byte() {
    for first in [b'G', b'S', 0, 0x80, 23, 21] {
        assert_eq!(read(&[first], MAX), Progress::Bad(BadHello::NotTls));
    }
    assert_eq!(read(&[22, 2], MAX), Progress::Bad(BadHello::NotTls));
}

#[test]
fn a_hello_without_server_name_is_refused() {
    let hello = hello_of(&[&rustls::version::TLS13], false, false);
    assert_eq!(read(&hello, MAX), Progress::Bad(BadHello::NoServerName));
}

#[test]
fn a_hello_that_would_settle_for_an_older_version_is_refused() {
    let both = hello_of(&[&rustls::version::TLS13, &rustls::version::TLS12], true, false);
    assert_eq!(read(&both, MAX), Progress::Bad(BadHello::Version));
    let old = hello_of(&[&rustls::version::TLS12], true, false);
    assert_eq!(read(&old, MAX), Progress::Bad(BadHello::Version));
}

#[test]
fn early_data_is_refused() {
    let hello = with_extension(&tls13(false), 42, &[]);
    assert_eq!(read(&hello, MAX), Progress::Bad(BadHello::EarlyData));
}

#[test]
fn a_repeated_extension_is_refused() {
    let hello = with_extension(&with_extension(&tls13(false), 0xfafa, b"x"), 0xfafa, b"y");
    assert_eq!(read(&hello, MAX), Progress::Bad(BadHello::Malformed));
}

#[test]
fn an_oversized_hello_is_refused_before_it_is_gathered() {
    let hello = tls13(true);
    let head = read(&hello[..9], 1000);
    assert_eq!(head, Progress::Bad(BadHello::TooLong));
    // A length of 16 MiB in the handshake header, in a small record.
    assert_eq!(read(&[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff], MAX), Progress::Bad(BadHello::TooLong));
    // Many small records count with their headers.
    let spread = in_records(&hello, 1);
    assert_eq!(read(&spread, hello.len() * 2), Progress::Bad(BadHello::TooLong));
}

#[test]
fn not_even_a_record_header_is_held_beyond_the_limit() {
    let hello = in_records(&tls13(false), 7);
    for max in 280..hello.len() {
        for cut in [1, 3, 12, hello.len()] {
            let mut reader = HelloReader::new(max);
            let last = hello.chunks(cut).map(|bytes| reader.push(bytes)).last();
            assert_eq!(last, Some(Progress::Bad(BadHello::TooLong)), "{max}, by {cut}");
            assert!(reader.raw.len() <= max, "{} bytes are held, {max} allowed, by {cut}", reader.raw.len());
        }
    }
}

#[test]
fn an_empty_record_and_a_foreign_record_amid_the_hello_are_refused() {
    assert_eq!(read(&[22, 3, 1, 0, 0], MAX), Progress::Bad(BadHello::Malformed));
    let mut hello = in_records(&tls13(false), 50)[..55].to_vec();
    hello.push(23);
    assert_eq!(read(&hello, MAX), Progress::Bad(BadHello::Malformed));
}

#[test]
fn a_second_message_in_the_hellos_record_is_refused() {
    let mut hello = tls13(false);
    let n = u16::from_be_bytes([hello[3], hello[4]]) + 1;
    hello[3..5].copy_from_slice(&n.to_be_bytes());
    hello.push(20);
    assert_eq!(read(&hello, MAX), Progress::Bad(BadHello::Malformed));
}

#[test]
fn every_truncation_needs_more() {
    let hello = tls13(false);
    for end in 0..hello.len() {
        assert_eq!(read(&hello[..end], MAX), Progress::NeedMore, "{end} of {}", hello.len());
    }
}

proptest! {
    #[test]
    fn where_the_bytes_are_cut_does_not_matter(
        size in 1_usize..2000,
        cuts in prop::collection::vec(1_usize..300, 1..40),
        damage in prop::option::of((0_usize..1700, any::<u8>())),
    ) {
        let mut bytes = in_records(&tls13(true), size);
        if let Some((at, value)) = damage
            && let Some(byte) = bytes.get_mut(at)
        {
            *byte = value;
        }
        let whole = read(&bytes, MAX);
        let mut reader = HelloReader::new(MAX);
        let mut last = Progress::NeedMore;
        let mut rest = bytes.as_slice();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            last = reader.push(now);
            rest = later;
        }
        prop_assert_eq!(last, whole);
        prop_assert!(reader.raw.len() <= MAX);
    }

    #[test]
    fn any_bytes_end_or_ask_for_more_within_the_limit(bytes in prop::collection::vec(any::<u8>(), 0..3000), tls in any::<bool>()) {
        let mut bytes = bytes;
        if tls && bytes.len() > 6 {
            bytes[..2].copy_from_slice(&[22, 3]);
            bytes[5] = 1;
        }
        let mut reader = HelloReader::new(2000);
        let progress = reader.push(&bytes);
        prop_assert!(reader.raw.len() <= 2000);
        prop_assert_eq!(matches!(progress, Progress::NeedMore), reader.wanted() > 0);
    }
}
