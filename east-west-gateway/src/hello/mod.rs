//! Reading a TLS ClientHello from the outside: enough to route by its server name, and nothing more.
//!
//! In: bytes as they arrive. Out: [`Progress`]. The reader is sans-IO and incremental: a hello may come in any number of
//! reads and span any number of TLS records (post-quantum hellos exceed one segment), and where it is cut never changes
//! the result. [`HelloReader::wanted`] tells the caller how many bytes it may read without passing the hello's end, so
//! that what is held for a replay is the ClientHello and nothing else. No byte is held beyond the limit given.
//!
//! Refused here: what is not TLS (at its first byte), a hello without a server name, one that offers early data (it
//! could not be replayed safely), and one that would settle for anything but TLS 1.3. Formats: RFC 8446, 4.1.2 and 5.1;
//! RFC 6066, 3.

mod parse;
#[cfg(test)]
mod tests;

/// What the bytes so far amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Read on, [`HelloReader::wanted`] bytes at most.
    NeedMore,
    /// The hello is complete.
    Hello(Hello),
    /// It will never be one that can be carried.
    Bad(BadHello),
}

/// A complete ClientHello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// The server name, in lower case.
    pub(crate) sni: String,
    /// How many of the bytes pushed belong to it, record headers included.
    pub(crate) len: usize,
}

/// Why a hello is refused. `label` is its metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadHello {
    /// The first bytes are no TLS handshake record.
    #[error("the client does not speak TLS")]
    NotTls,
    /// Longer than the limit.
    #[error("the ClientHello exceeds the limit")]
    TooLong,
    /// Lengths or structure are wrong.
    #[error("the ClientHello is malformed")]
    Malformed,
    /// No server_name extension.
    #[error("the ClientHello names no server")]
    NoServerName,
    /// early_data: bytes after the hello would be lost or repeated by a replay.
    #[error("the ClientHello offers early data")]
    EarlyData,
    /// TLS 1.3 is not the only version offered.
    #[error("the ClientHello offers a version other than TLS 1.3")]
    Version,
}

impl BadHello {
    /// Its metric label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::NotTls => "not_tls",
            Self::TooLong => "hello_too_long",
            Self::Malformed => "hello_malformed",
            Self::NoServerName => "no_sni",
            Self::EarlyData => "early_data",
            Self::Version => "tls_version",
        }
    }
}

const RECORD_HEADER: usize = 5;
const HANDSHAKE_HEADER: usize = 4;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// RFC 8446, 5.1: a record carries at most 2^14 bytes.
const MAX_RECORD: usize = 1 << 14;

/// Gathers one ClientHello.
#[derive(Debug)]
pub(crate) struct HelloReader {
    max: usize,
    /// All bytes of the hello so far, as they came.
    raw: Vec<u8>,
    /// The handshake message, without record headers.
    message: Vec<u8>,
    /// Bytes still missing from the record being read; its header is complete if not zero.
    in_record: usize,
    /// Bytes of the next record's header seen so far.
    header: Vec<u8>,
    ended: Option<Progress>,
}

impl HelloReader {
    /// A reader that holds at most `max` bytes.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            raw: Vec::new(),
            message: Vec::new(),
            in_record: 0,
            header: Vec::with_capacity(RECORD_HEADER),
            ended: None,
        }
    }

    /// How many bytes may be read without reading past the hello. Zero once it is complete or bad.
    pub(crate) fn wanted(&self) -> usize {
        match (&self.ended, self.in_record) {
            (Some(_), _) => 0,
            (None, 0) => RECORD_HEADER - self.header.len(),
            (None, missing) => missing,
        }
    }

    /// The hello's bytes so far, exactly as they came.
    pub(crate) fn into_raw(self) -> Vec<u8> {
        self.raw
    }

    /// Takes the next bytes. Bytes past the hello's end are ignored; `Hello::len` tells where it ended.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Progress {
        while self.ended.is_none() {
            let take = self.wanted().min(bytes.len());
            if take == 0 {
                return Progress::NeedMore;
            }
            let (now, rest) = bytes.split_at(take);
            bytes = rest;
            if let Err(bad) = self.step(now) {
                self.ended = Some(Progress::Bad(bad));
            }
        }
        self.ended.clone().unwrap_or(Progress::NeedMore)
    }

    /// Takes bytes of which none lies beyond what is wanted.
    fn step(&mut self, bytes: &[u8]) -> Result<(), BadHello> {
        // Another record has a header and a byte at least.
        if self.in_record == 0 && self.raw.len() - self.header.len() + RECORD_HEADER >= self.max {
            return Err(BadHello::TooLong);
        }
        self.raw.extend_from_slice(bytes);
        if self.in_record > 0 {
            self.in_record -= bytes.len();
            self.message.extend_from_slice(bytes);
        } else {
            self.header.extend_from_slice(bytes);
            self.check_header()?;
        }
        let Some(length) = self.message_length()? else { return Ok(()) };
        if self.message.len() < length {
            return Ok(());
        }
        // Not `>=`: a ClientHello is the last message of its record (RFC 8446, 5.1: key changes come next).
        if self.message.len() > length || self.in_record > 0 {
            return Err(BadHello::Malformed);
        }
        let body = self.message.get(HANDSHAKE_HEADER..).unwrap_or_default();
        let sni = parse::client_hello(body)?;
        self.ended = Some(Progress::Hello(Hello { sni, len: self.raw.len() }));
        Ok(())
    }

    /// Judges the record header as far as it is there; a complete one begins the record.
    fn check_header(&mut self) -> Result<(), BadHello> {
        if self.header.first().is_some_and(|kind| *kind != HANDSHAKE) || self.header.get(1).is_some_and(|v| *v != 3) {
            // A non-handshake record amid a hello is a protocol error; as the first thing it is no TLS at all.
            return Err(if self.message.is_empty() { BadHello::NotTls } else { BadHello::Malformed });
        }
        let [_, _, _, high, low] = self.header.as_slice() else { return Ok(()) };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length == 0 || length > MAX_RECORD {
            return Err(BadHello::Malformed);
        }
        if self.raw.len() + length > self.max {
            return Err(BadHello::TooLong);
        }
        self.header.clear();
        self.in_record = length;
        Ok(())
    }

    /// The whole handshake message's length, once known. Refuses it before it is gathered if it cannot be carried.
    fn message_length(&self) -> Result<Option<usize>, BadHello> {
        if self.message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Err(BadHello::Malformed);
        }
        let Some([_, a, b, c]) = self.message.get(..HANDSHAKE_HEADER) else { return Ok(None) };
        let length = HANDSHAKE_HEADER + u32::from_be_bytes([0, *a, *b, *c]) as usize;
        if length > self.max {
            return Err(BadHello::TooLong);
        }
        Ok(Some(length))
    }
}
