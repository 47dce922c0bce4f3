//! A session's stream as it comes off the wire, read without being kept.
//!
//! A thousand agents in one process would hold a thousand copies of a state of many megabytes, each while it arrives. Real agents
//! are on machines of their own. So of a long message only the beginning is looked at, where its stamps are, and the rest goes by.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    Request, StatusCode,
    body::{Bytes, Frame, Incoming},
};
use isthmus_api::proto::{
    common::v1::Stamp,
    federation::v1::{AgentMessage, ControlMessage, Piece, PieceOf, agent_message, control_message},
};
use prost::{
    Message,
    encoding::{WireType, decode_key, decode_varint},
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;

use crate::control::http2::{Driver, dial};

/// Messages up to this length are kept whole.
const WHOLE: usize = 40 << 10;
/// Of a longer one.
const BEGINNING: usize = 256;
/// Before each message: not compressed, and how long it is.
const PREFIX: usize = 5;

/// What an agent says.
#[derive(Debug)]
pub(super) struct Up(mpsc::Sender<Result<Frame<Bytes>, Infallible>>);

/// What it hears.
#[derive(Debug)]
pub(super) struct Wire {
    body: Incoming,
    reader: Reader,
    _driver: Arc<Driver>,
    _tasks: JoinSet<()>,
}

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Heard {
    Snapshot(Stamp),
    Delta {
        from: Stamp,
        to: Stamp,
    },
    /// The first one tells of what it is.
    Piece {
        of: Option<Box<Heard>>,
        last: bool,
    },
    Other(Option<control_message::Kind>),
}

impl Wire {
    /// Opens a connection and a session, which begins with `hello`.
    pub(super) async fn open(
        address: SocketAddr,
        tls: &Arc<rustls::ClientConfig>,
        hello: agent_message::Kind,
    ) -> anyhow::Result<(Up, Self)> {
        let mut tasks = JoinSet::new();
        let (mut sender, driver) = dial(address, tls, &mut tasks).await?;
        let (up, frames) = mpsc::channel(8);
        let up = Up(up);
        up.send(hello).await?;
        let request = Request::post("https://localhost/isthmus.federation.v1.Federation/Session")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(StreamBody::new(ReceiverStream::new(frames)))
            .context("make a request")?;
        let answer = sender.send_request(request).await.context("open a session")?;
        ensure!(answer.status() == StatusCode::OK, "the control plane says {}", answer.status());
        if let Some(status) = answer.headers().get("grpc-status") {
            bail!("the control plane says {status:?}: {:?}", answer.headers().get("grpc-message"));
        }
        let (body, reader) = (answer.into_body(), Reader::default());
        Ok((up, Self { body, reader, _driver: driver, _tasks: tasks }))
    }

    /// The next message; `None` at the end. May be dropped and called again.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Heard>> {
        loop {
            if let Some(heard) = self.reader.take()? {
                return Ok(Some(heard));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.context("the connection broke")?;
            match frame.into_data() {
                Ok(data) => self.reader.push(data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    let said = |name: &str| {
                        trailers
                            .get(name)
                            .map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned())
                            .unwrap_or_default()
                    };
                    bail!("the control plane ended the session: {} {}", said("grpc-status"), said("grpc-message"));
                }
            }
        }
    }
}

impl Up {
    pub(super) async fn send(&self, kind: agent_message::Kind) -> anyhow::Result<()> {
        let message = AgentMessage { kind: Some(kind) };
        let length = u32::try_from(message.encoded_len()).context("a short message")?;
        let mut bytes = Vec::with_capacity(message.encoded_len() + PREFIX);
        bytes.push(0);
        bytes.extend_from_slice(&length.to_be_bytes());
        message.encode(&mut bytes).context("encode a message")?;
        self.0.send(Ok(Frame::data(bytes.into()))).await.ok().context("the session has ended")
    }
}

/// Cuts the stream into messages.
#[derive(Debug, Default)]
struct Reader {
    /// What came and was not looked at.
    pending: Bytes,
    prefix: Vec<u8>,
    /// Of the message under way: its length, and what is kept of it.
    message: Option<(usize, Vec<u8>)>,
    /// How much of it has come.
    seen: usize,
}

impl Reader {
    /// To be called when [`Self::take`] has no more.
    fn push(&mut self, data: Bytes) {
        self.pending = data;
    }

    fn take(&mut self) -> anyhow::Result<Option<Heard>> {
        loop {
            let Some((length, kept)) = &mut self.message else {
                let missing = PREFIX - self.prefix.len();
                self.prefix.extend_from_slice(&self.pending.split_to(missing.min(self.pending.len())));
                let Ok([compressed, a, b, c, d]) = <[u8; PREFIX]>::try_from(self.prefix.as_slice()) else {
                    return Ok(None);
                };
                ensure!(compressed == 0, "a message is compressed");
                self.prefix.clear();
                let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).context("a length")?;
                (self.message, self.seen) = (Some((length, Vec::new())), 0);
                continue;
            };
            let part = self.pending.split_to((*length - self.seen).min(self.pending.len()));
            self.seen += part.len();
            let wanted = if *length <= WHOLE { *length } else { BEGINNING };
            kept.extend_from_slice(part.get(..part.len().min(wanted - kept.len())).unwrap_or_default());
            if self.seen < *length {
                return Ok(None);
            }
            let heard = read(kept)?;
            self.message = None;
            return Ok(Some(heard));
        }
    }
}

/// What a message, of which this is the beginning or all, says.
fn read(message: &[u8]) -> anyhow::Result<Heard> {
    let first = fields(message).next();
    let stamp = |within: &[u8], tag: u32| {
        let stamp = fields(within).find(|(field, _)| *field == tag).context("a state without a stamp")?.1;
        Stamp::decode(stamp).context("read a stamp")
    };
    match first {
        Some((1, snapshot)) => Ok(Heard::Snapshot(stamp(snapshot, 1)?)),
        Some((2, delta)) => Ok(Heard::Delta { from: stamp(delta, 1)?, to: stamp(delta, 2)? }),
        // Of one that comes in pieces the first tells the stamps, and the last that it is there.
        Some((7, piece)) => {
            let piece = Piece::decode(piece).context("read a piece")?;
            let stamp = |tag| stamp(&piece.bytes, tag).ok();
            let of = match piece.of() {
                PieceOf::Snapshot => stamp(1).map(Heard::Snapshot),
                _ => stamp(1).zip(stamp(2)).map(|(from, to)| Heard::Delta { from, to }),
            };
            Ok(Heard::Piece { of: of.map(Box::new), last: piece.last })
        }
        _ => Ok(Heard::Other(ControlMessage::decode(message).context("read a message")?.kind)),
    }
}

/// The tags and bytes of length-delimited fields, in order, up to the first of another kind; the last one may be cut off.
fn fields(mut bytes: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    std::iter::from_fn(move || {
        let (tag, wire) = decode_key(&mut bytes).ok()?;
        if wire != WireType::LengthDelimited {
            return None;
        }
        let length = usize::try_from(decode_varint(&mut bytes).ok()?).ok()?;
        let (field, rest) = bytes.split_at(length.min(bytes.len()));
        bytes = rest;
        Some((tag, field))
    })
}

#[cfg(test)]
mod tests {
    use isthmus_api::proto::{
        common::v1::{ClusterInfo, GlobalDelta, GlobalSnapshot},
        federation::v1::Published,
    };

    use super::*;

    fn stamp(revision: u64) -> Stamp {
        Stamp { epoch: 1, revision }
    }

    fn framed(kind: control_message::Kind) -> Vec<u8> {
        let message = ControlMessage { kind: Some(kind) }.encode_to_vec();
        [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat()
    }

    #[test]
    fn messages_are_heard_however_they_are_cut_and_however_long() {
        let clusters = |n| vec![ClusterInfo { name: "x".repeat(100), ..ClusterInfo::default() }; n];
        let delta = GlobalDelta {
            from: Some(stamp(7)),
            to: Some(stamp(9)),
            clusters: clusters(2_000),
            ..GlobalDelta::default()
        };
        let snapshot = GlobalSnapshot { stamp: Some(stamp(7)), clusters: clusters(1), ..GlobalSnapshot::default() };
        let published = Published { sequence: 3, stamp: Some(stamp(9)) };
        let kinds = [
            control_message::Kind::Snapshot(snapshot.encode_to_vec().into()),
            control_message::Kind::Delta(delta.encode_to_vec().into()),
            control_message::Kind::Published(published),
        ];
        let stream: Vec<u8> = kinds.into_iter().flat_map(framed).collect();
        assert!(stream.len() > 2 * WHOLE);
        for cut in [1, 3, 100, 4_096, stream.len()] {
            let (mut reader, mut heard) = (Reader::default(), Vec::new());
            for part in stream.chunks(cut) {
                reader.push(Bytes::copy_from_slice(part));
                while let Some(one) = reader.take().unwrap() {
                    heard.push(one);
                }
            }
            let other = Heard::Other(Some(control_message::Kind::Published(published)));
            assert_eq!(
                heard,
                [Heard::Snapshot(stamp(7)), Heard::Delta { from: stamp(7), to: stamp(9) }, other],
                "{cut}"
            );
        }
    }

    #[test]
    fn a_state_without_a_stamp_is_an_error() {
        let delta = GlobalDelta { from: Some(stamp(7)), ..GlobalDelta::default() };
        let mut reader = Reader::default();
        reader.push(framed(control_message::Kind::Delta(delta.encode_to_vec().into())).into());
        assert!(reader.take().unwrap_err().to_string().contains("without a stamp"));
    }
}
