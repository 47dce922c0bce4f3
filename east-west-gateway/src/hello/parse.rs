//! The body of a ClientHello (RFC 8446, 4.1.2): checks its structure and finds what routing needs.
//!
//! In: the complete message without its handshake header. Out: the server name in lower case, or the reason for refusal.
//! Cipher suites, key shares and the rest are the endpoints' business and only skipped over.

use std::collections::BTreeSet;

use super::BadHello;

const SERVER_NAME: u16 = 0;
const EARLY_DATA: u16 = 42;
const SUPPORTED_VERSIONS: u16 = 43;
const TLS_1_3: u16 = 0x0304;

/// Reads the body whole and returns the server name.
pub(super) fn client_hello(body: &[u8]) -> Result<String, BadHello> {
    let extensions = extensions(body).ok_or(BadHello::Malformed)?;
    let mut seen = BTreeSet::new();
    let mut name = None;
    let mut only_tls13 = false;
    let mut cursor = Cursor(extensions);
    while !cursor.0.is_empty() {
        let (kind, data) = cursor.extension().ok_or(BadHello::Malformed)?;
        if !seen.insert(kind) {
            return Err(BadHello::Malformed);
        }
        match kind {
            SERVER_NAME => name = Some(server_name(data).ok_or(BadHello::Malformed)?),
            EARLY_DATA => return Err(BadHello::EarlyData),
            SUPPORTED_VERSIONS => only_tls13 = offers_only_tls13(data).ok_or(BadHello::Malformed)?,
            _ => {}
        }
    }
    if !only_tls13 {
        return Err(BadHello::Version);
    }
    name.ok_or(BadHello::NoServerName)
}

/// Skips the fixed part; `None` if any length is wrong.
fn extensions(body: &[u8]) -> Option<&[u8]> {
    let mut cursor = Cursor(body);
    cursor.take(2 + 32)?; // legacy_version, random
    let session = cursor.vector8()?;
    let suites = cursor.vector16()?;
    let compression = cursor.vector8()?;
    let ok = session.len() <= 32 && suites.len() >= 2 && suites.len() % 2 == 0 && !compression.is_empty();
    if !ok {
        return None;
    }
    // TLS before 1.2 allowed a hello to end here; that is a version matter, not a malformed one.
    let extensions = if cursor.0.is_empty() { &[][..] } else { cursor.vector16()? };
    cursor.0.is_empty().then_some(extensions)
}

/// RFC 6066, 3: a list of one host name, ASCII, without a trailing dot.
fn server_name(data: &[u8]) -> Option<String> {
    let mut outer = Cursor(data);
    let mut list = Cursor(outer.vector16()?);
    let kind = list.byte()?;
    let name = list.vector16()?;
    let shape = kind == 0 && outer.0.is_empty() && list.0.is_empty() && matches!(name.len(), 1..=253);
    let plain = name.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    (shape && plain && name.last() != Some(&b'.'))
        .then(|| name.iter().map(|b| char::from(b.to_ascii_lowercase())).collect())
}

/// RFC 8446, 4.2.1, with GREASE values (RFC 8701) passed over.
fn offers_only_tls13(data: &[u8]) -> Option<bool> {
    let mut outer = Cursor(data);
    let mut versions = Cursor(outer.vector8()?);
    if !outer.0.is_empty() || versions.0.is_empty() {
        return None;
    }
    let (mut tls13, mut other) = (false, false);
    while !versions.0.is_empty() {
        match versions.short()? {
            TLS_1_3 => tls13 = true,
            grease if grease & 0x0f0f == 0x0a0a && grease >> 8 == grease & 0xff => {}
            _ => other = true,
        }
    }
    Some(tls13 && !other)
}

/// Reads forward over bytes; every read says `None` rather than pass the end.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn short(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    fn vector8(&mut self) -> Option<&'a [u8]> {
        let n = self.byte()?;
        self.take(n.into())
    }

    fn vector16(&mut self) -> Option<&'a [u8]> {
        let n = self.short()?;
        self.take(n.into())
    }

    fn extension(&mut self) -> Option<(u16, &'a [u8])> {
        Some((self.short()?, self.vector16()?))
    }
}
