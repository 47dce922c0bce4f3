//! A real TLS 1.3 ClientHello, written and read.
//!
//! Written by rustls, once per server name: its bytes are the same on every connection, which no system here minds, since none
//! of them can tell. Read only as far as to know where it ends (RFC 8446, 4 and 5.1).

use std::sync::Arc;

use anyhow::Context;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

const RECORD_HEADER: usize = 5;
const MESSAGE_HEADER: usize = 4;
/// More is not gathered.
pub(super) const MAX: usize = 16 * 1024;

/// The bytes of a ClientHello for `name`.
pub(crate) fn write(name: &str) -> anyhow::Result<Vec<u8>> {
    let config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = name.to_owned().try_into().with_context(|| format!("{name:?} is no server name"))?;
    let mut client = ClientConnection::new(Arc::new(config), name).context("begin a TLS handshake")?;
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).context("write a ClientHello")?;
    Ok(bytes)
}

/// Where the ClientHello at the start of `bytes` ends; `None` while it is not all there.
pub(super) fn end(bytes: &[u8]) -> Result<Option<usize>, NotAHello> {
    let mut message = Vec::new();
    let mut at = 0;
    while let Some(header) = bytes.get(at..at + RECORD_HEADER) {
        let [22, 3, _, high, low] = *header else { return Err(NotAHello) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let Some(record) = bytes.get(at + RECORD_HEADER..at + RECORD_HEADER + length) else { break };
        message.extend_from_slice(record);
        at += RECORD_HEADER + length;
        if let Some([kind, a, b, c]) = message.get(..MESSAGE_HEADER) {
            if *kind != 1 {
                return Err(NotAHello);
            }
            if message.len() >= MESSAGE_HEADER + u32::from_be_bytes([0, *a, *b, *c]) as usize {
                return Ok(Some(at));
            }
        }
    }
    if bytes.len() >= MAX { Err(NotAHello) } else { Ok(None) }
}

/// The bytes are something else, or too many.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotAHello;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_ends_where_it_ends_and_not_before() {
        isthmus_identity::install_crypto();
        let hello = write("80.orders.shop.svc.any.isthmus.example").unwrap();
        for cut in 0..hello.len() {
            assert_eq!(end(&hello[..cut]), Ok(None), "cut at {cut}");
        }
        assert_eq!(end(&hello), Ok(Some(hello.len())));
        let more = [hello.as_slice(), b"more"].concat();
        assert_eq!(end(&more), Ok(Some(hello.len())));
    }

    #[test]
    fn a_hello_in_two_records_is_one() {
        isthmus_identity::install_crypto();
        let whole = write("orders.example").unwrap();
        let (first, second) = whole[RECORD_HEADER..].split_at(100);
        let record = |part: &[u8]| [&[22, 3, 1], &u16::try_from(part.len()).unwrap().to_be_bytes()[..], part].concat();
        let split = [record(first), record(second)].concat();
        assert_eq!(end(&split[..split.len() - 1]), Ok(None));
        assert_eq!(end(&split), Ok(Some(split.len())));
    }

    #[test]
    fn what_is_no_hello_is_refused() {
        assert_eq!(end(b"GET / HTTP/1.1\r\n"), Err(NotAHello));
        assert_eq!(end(&[22, 3, 1, 0, 4, 2, 0, 0, 0]), Err(NotAHello));
    }
}
