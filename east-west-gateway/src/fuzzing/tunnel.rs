//! The tunnel's frames: how bytes are cut never changes the messages, a frame is as long as its prefix says and no longer
//! than allowed, what follows a frame is kept, and what passes the checks is within bounds.

use std::{
    fmt::Debug,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use isthmus_api::proto::tunnel::v1::{ControlFrame, StreamHeader, StreamReply, TcpPreface, control_frame::Kind};
use prost::Message;

use super::{Cuts, Input};
use crate::{
    egress,
    frame::{self, Decoder, FrameError, MAX_CONTROL, MAX_HEADER},
    tunnel::{
        inbox::MAX_SERVICES,
        outbox::Table,
        session::{Own, Response, Rhythm, Session, Told},
    },
};

const STEP: Duration = Duration::from_millis(10);

/// Kind of stream, cuts, then the stream's bytes.
pub fn tunnel(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte() % 4;
    let cuts = input.cuts();
    let bytes = input.0;
    match kind {
        0 => messages::<StreamHeader>(bytes, cuts, MAX_HEADER).into_iter().for_each(|header| {
            egress::passes(header);
        }),
        1 => drop(messages::<StreamReply>(bytes, cuts, MAX_HEADER)),
        2 => control(messages::<ControlFrame>(bytes, cuts, MAX_CONTROL)),
        _ => drop(messages::<TcpPreface>(bytes, cuts, MAX_HEADER)),
    }
}

/// By the rules of the control stream, ten milliseconds apart.
fn control(frames: Vec<ControlFrame>) {
    let mut table = Table::new();
    let mut now = Instant::now();
    let rhythm = Rhythm { interval: STEP * 10, dead_after: STEP * 40 };
    let mut session = Session::new(rhythm, now);
    let own = Arc::default();
    for frame in frames {
        now += STEP;
        let Ok((_, wake)) =
            session.poll(&Own { table: &own, draining: false, succeeded: false, offers: 0, packets: 0 }, now)
        else {
            return;
        };
        assert!(wake > now, "it would ask again at once, for ever");
        let Ok(Response { reply, told }) = session.heard(frame.clone(), 0, now) else { return };
        match (frame.kind, reply) {
            (Some(Kind::Ping(ping)), Some(Kind::Pong(pong))) => assert_eq!(ping.sequence, pong.sequence),
            (kind, reply) => assert!(reply.is_none(), "{kind:?} was answered with {reply:?}"),
        }
        match told {
            Some(Told::Availability(heard)) => drop(heard.apply(&mut table, MAX_SERVICES)),
            Some(Told::Closing(reason)) => assert!(reason.chars().count() <= 200),
            Some(Told::Alive { rtt, .. }) => assert!(rtt <= rhythm.dead_after, "{rtt:?}"),
            _ => {}
        }
        assert!(table.len() <= MAX_SERVICES);
    }
}

/// The messages in `bytes` up to the first error, after all that must hold of them was checked.
fn messages<M: Message + Default + PartialEq + Debug>(bytes: &[u8], cuts: Cuts<'_>, max: usize) -> Vec<M> {
    let whole = decode::<M>([bytes].into_iter(), max);
    let cut = decode::<M>(cuts.segments(bytes), max);
    assert_eq!(whole.messages, cut.messages, "cut by {cuts:?}");
    assert_eq!(whole.error, cut.error, "cut by {cuts:?}");
    if whole.error.is_none() {
        let consumed: usize = framed(bytes).take(whole.messages.len()).map(|body| 2 + body.len()).sum();
        assert_eq!(Some(&*whole.rest), bytes.get(consumed..), "what follows the last frame is kept");
        assert_eq!(whole.rest, cut.rest, "cut by {cuts:?}");
    }
    for (message, body) in whole.messages.iter().zip(framed(bytes)) {
        assert!(body.len() <= max, "a frame of {} bytes, {max} allowed", body.len());
        assert_eq!(*message, M::decode(body).expect("decoded before"), "the frame is what its prefix says");
        survives(message);
    }
    whole.messages
}

struct Decoded<M> {
    messages: Vec<M>,
    error: Option<String>,
    rest: Bytes,
}

fn decode<'a, M: Message + Default>(segments: impl Iterator<Item = &'a [u8]>, max: usize) -> Decoded<M> {
    let mut decoder = Decoder::new(max);
    let mut messages = Vec::new();
    for segment in segments {
        decoder.push(segment);
        loop {
            match decoder.next::<M>() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return Decoded { messages, error: Some(error.to_string()), rest: decoder.into_rest() },
            }
        }
    }
    Decoded { messages, error: None, rest: decoder.into_rest() }
}

/// The frames in `bytes`, read the simplest way.
fn framed(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (prefix, rest) = bytes.split_first_chunk()?;
        let (body, rest) = rest.split_at_checked(u16::from_be_bytes(*prefix).into())?;
        bytes = rest;
        Some(body)
    })
}

/// A message comes through a frame as it was.
fn survives<M: Message + Default + PartialEq + Debug>(message: &M) {
    match frame::encode(message) {
        Ok(bytes) => {
            let again = decode::<M>([&*bytes].into_iter(), MAX_CONTROL);
            assert!(again.error.is_none() && again.rest.is_empty(), "{message:?}");
            assert_eq!(again.messages, std::slice::from_ref(message));
        }
        // Only what came in fewer bytes than it is written in can be too long.
        Err(error) => assert!(matches!(error, FrameError::TooLong { .. }), "{error}"),
    }
}
