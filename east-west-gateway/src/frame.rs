//! Frames inside a tunnel: a protobuf message preceded by its length in two bytes, big endian (docs/tunnel.md).
//!
//! In and out: bytes and messages. [`Decoder`] is sans-IO: how the bytes are cut never changes the messages. A length
//! beyond the reader's own limit is refused before anything is allocated for it. [`FrameReader`] puts a stream in
//! front; its `next` may be cancelled without losing bytes.

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

use crate::tunnel::link::{Broken, RecvHalf};

/// The longest header or reply of a carried connection.
pub(crate) const MAX_HEADER: usize = 2 * 1024;
/// The longest control frame: all that the length prefix can say.
pub(crate) const MAX_CONTROL: usize = 65_535;
const PREFIX: usize = 2;

/// Why a frame cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    /// Longer than the limit for its kind.
    #[error("a frame of {length} bytes exceeds the limit of {max}")]
    TooLong {
        /// Announced, or to be written.
        length: usize,
        /// Allowed.
        max: usize,
    },
    /// Not the message that belongs here.
    #[error("a frame is not the expected message")]
    Malformed(#[source] prost::DecodeError),
    /// The stream ended within, or instead of, a frame.
    #[error("the stream ended before its frame did")]
    Ended,
    /// The stream broke.
    #[error("the stream broke")]
    Broken(#[source] Broken),
}

/// `message` with its length in front.
pub(crate) fn encode(message: &impl Message) -> Result<BytesMut, FrameError> {
    let length = message.encoded_len();
    let too_long = || FrameError::TooLong { length, max: MAX_CONTROL };
    let prefix = u16::try_from(length).map_err(|_| too_long())?;
    let mut out = BytesMut::with_capacity(PREFIX + length);
    out.extend_from_slice(&prefix.to_be_bytes());
    message.encode(&mut out).map_err(|_| too_long())?;
    Ok(out)
}

/// Turns bytes into messages.
#[derive(Debug)]
pub(crate) struct Decoder {
    max: usize,
    buffer: BytesMut,
}

impl Decoder {
    /// Refuses frames longer than `max`.
    pub(crate) fn new(max: usize) -> Self {
        Self { max, buffer: BytesMut::new() }
    }

    /// Takes the next bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, if it is complete.
    pub(crate) fn next<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let Some([high, low]) = self.buffer.get(..PREFIX) else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length > self.max {
            return Err(FrameError::TooLong { length, max: self.max });
        }
        if self.buffer.len() < PREFIX + length {
            return Ok(None);
        }
        self.buffer.advance(PREFIX);
        M::decode(self.buffer.split_to(length)).map(Some).map_err(FrameError::Malformed)
    }

    /// What was pushed and belongs to no message taken so far.
    pub(crate) fn into_rest(self) -> Bytes {
        self.buffer.freeze()
    }
}

/// Messages from a stream.
#[derive(Debug)]
pub(crate) struct FrameReader {
    recv: RecvHalf,
    decoder: Decoder,
}

impl FrameReader {
    /// Refuses frames longer than `max`.
    pub(crate) fn new(recv: RecvHalf, max: usize) -> Self {
        Self { recv, decoder: Decoder::new(max) }
    }

    /// The next message. Cancel-safe. The caller sets the deadline.
    pub(crate) async fn next<M: Message + Default>(&mut self) -> Result<M, FrameError> {
        loop {
            if let Some(message) = self.decoder.next()? {
                return Ok(message);
            }
            // Cancel-safe: a chunk is taken only when it is returned.
            let chunk = self.recv.chunk().await.map_err(FrameError::Broken)?;
            self.decoder.push(&chunk.ok_or(FrameError::Ended)?);
        }
    }

    /// The next bytes as they are: what follows the last frame. Cancel-safe. The caller sets the deadline.
    pub(crate) async fn bytes(&mut self) -> Result<Bytes, FrameError> {
        if !self.decoder.buffer.is_empty() {
            return Ok(self.decoder.buffer.split().freeze());
        }
        let chunk = self.recv.chunk().await.map_err(FrameError::Broken)?;
        chunk.ok_or(FrameError::Ended)
    }

    /// The stream, and the bytes read from it that no frame has used.
    pub(crate) fn into_parts(self) -> (RecvHalf, Bytes) {
        (self.recv, self.decoder.into_rest())
    }
}

#[cfg(test)]
mod tests {
    use isthmus_api::proto::{common::v1::ServiceName, tunnel::v1::StreamHeader};
    use proptest::prelude::*;

    use super::*;

    fn header(selector: &str) -> StreamHeader {
        StreamHeader {
            version: 1,
            service: Some(ServiceName { namespace: "shop".into(), name: "cart".into() }),
            port: 80,
            selector: selector.into(),
            deadline_ms: 900,
            traceparent: String::new(),
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_from_the_prefix_alone() {
        let mut decoder = Decoder::new(MAX_HEADER);
        decoder.push(&[0xff, 0xff]);
        assert!(matches!(decoder.next::<StreamHeader>(), Err(FrameError::TooLong { length: 65_535, .. })));
    }

    #[test]
    fn a_message_beyond_the_prefix_cannot_be_written() {
        assert!(matches!(encode(&header(&"x".repeat(70_000))), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn bytes_after_a_frame_are_kept_for_what_follows() {
        let mut decoder = Decoder::new(MAX_HEADER);
        decoder.push(&encode(&header("")).unwrap());
        decoder.push(b"hello");
        assert_eq!(decoder.next::<StreamHeader>().unwrap(), Some(header("")));
        assert_eq!(decoder.into_rest(), "hello");
    }

    #[test]
    fn a_frame_that_is_no_message_is_malformed() {
        let mut decoder = Decoder::new(MAX_HEADER);
        decoder.push(&[0, 2, 0xff, 0xff]);
        assert!(matches!(decoder.next::<StreamHeader>(), Err(FrameError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut(
            selectors in prop::collection::vec("[a-z]{0,40}", 1..6),
            cuts in prop::collection::vec(1_usize..20, 1..20),
        ) {
            let messages: Vec<_> = selectors.iter().map(|s| header(s)).collect();
            let bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).unwrap()).collect();
            let mut decoder = Decoder::new(MAX_HEADER);
            let mut out = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now);
                rest = later;
                while let Some(message) = decoder.next::<StreamHeader>().unwrap() {
                    out.push(message);
                }
            }
            prop_assert_eq!(out, messages);
        }

        #[test]
        fn any_bytes_decode_or_fail_cleanly(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            let mut decoder = Decoder::new(MAX_HEADER);
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next::<StreamHeader>() {}
        }
    }
}
