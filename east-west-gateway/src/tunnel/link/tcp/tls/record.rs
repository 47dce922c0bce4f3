//! TLS 1.3 records of an established connection (RFC 8446, section 5): sealed into buffers of their own, opened where they
//! were read. No IO.
//!
//! rustls makes the handshake, the keys and the cipher; this only frames, so that what is read is decrypted in the buffer
//! that the socket filled and handed on from there, and an idle connection holds no buffer. What holds: a record is opened
//! whole or not at all; whatever rustls' cipher rejects, is no TLS 1.3 record, or belongs into a handshake is [`Corrupt`].

use bytes::{Buf, Bytes, BytesMut};
use rustls::{
    ConnectionTrafficSecrets, ContentType, ProtocolVersion, Tls13CipherSuite,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
    },
};

/// The most plaintext in a record.
pub(super) const MAX_PLAINTEXT: usize = 16 * 1024;
/// Type, version, length.
const HEADER: usize = 5;
/// The most that padding, type and tag may add to a record's plaintext.
const MAX_EXPANSION: usize = 256;
const KEY_UPDATE: u8 = 24;
const NEW_SESSION_TICKET: u8 = 4;
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;
const WARNING: u8 = 1;
/// Records without data, one after the other, that a peer may send. Each costs us as much as one with data.
const MAX_IDLE_RECORDS: u8 = 32;

/// The number of the next record, and what it is sealed with.
pub(super) type Secrets = (u64, ConnectionTrafficSecrets);

/// Not what a TLS 1.3 peer in its right mind sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a corrupt or unexpected TLS record")]
pub(crate) struct Corrupt;

/// What a record says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record {
    Data(Bytes),
    /// The peer's direction has ended in good order.
    CloseNotify,
    /// The peer's next record is under its next key. It may want the same of us.
    KeyUpdate {
        answer: bool,
    },
    /// Payloads of NewSessionTicket.
    Tickets(Vec<Bytes>),
}

/// Takes records apart.
pub(super) struct Opener {
    cipher: Box<dyn MessageDecrypter>,
    sequence: u64,
    without_data: u8,
}

impl Opener {
    /// # Errors
    /// The cipher is unknown here.
    pub(super) fn new(suite: &Tls13CipherSuite, (sequence, secrets): Secrets) -> Result<Self, Corrupt> {
        let (key, iv) = parts(secrets)?;
        Ok(Self { cipher: suite.aead_alg.decrypter(key, iv), sequence, without_data: 0 })
    }

    /// Goes on with the peer's next key.
    pub(super) fn renew(&mut self, suite: &Tls13CipherSuite, secrets: Secrets) -> Result<(), Corrupt> {
        let without_data = self.without_data;
        *self = Self { without_data, ..Self::new(suite, secrets)? };
        Ok(())
    }

    /// The first record of `incoming`, which loses it; `None` while it is not whole.
    pub(super) fn open(&mut self, incoming: &mut BytesMut) -> Result<Option<Record>, Corrupt> {
        loop {
            let Some(length) = length_of_first(incoming)? else { return Ok(None) };
            if incoming.len() < length {
                return Ok(None);
            }
            let mut record = incoming.split_to(length);
            let body = record.get_mut(HEADER..).ok_or(Corrupt)?;
            let began = body.as_ptr().addr();
            let opaque = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, body);
            let plain = self.cipher.decrypt(opaque, self.sequence).map_err(|_| Corrupt)?;
            let (kind, at, n) = (plain.typ, plain.payload.as_ptr().addr() - began, plain.payload.len());
            self.sequence = self.sequence.checked_add(1).ok_or(Corrupt)?;
            let mut payload = record.freeze();
            payload.advance(HEADER + at);
            payload.truncate(n);
            if kind == ContentType::ApplicationData && !payload.is_empty() {
                self.without_data = 0;
                return Ok(Some(Record::Data(payload)));
            }
            self.without_data += 1;
            if self.without_data > MAX_IDLE_RECORDS {
                return Err(Corrupt);
            }
            match kind {
                ContentType::ApplicationData => {}
                ContentType::Alert => match *payload {
                    [_, CLOSE_NOTIFY] => return Ok(Some(Record::CloseNotify)),
                    [_, USER_CANCELED] => {}
                    _ => return Err(Corrupt),
                },
                ContentType::Handshake => return handshake(payload).map(Some),
                _ => return Err(Corrupt),
            }
        }
    }
}

/// How many bytes the first record of `incoming` has, with its header; `None` while that is not known.
///
/// # Errors
/// It is no record of an established TLS 1.3 connection.
pub(super) fn length_of_first(incoming: &[u8]) -> Result<Option<usize>, Corrupt> {
    let Some(&[kind, major, minor, high, low]) = incoming.first_chunk::<HEADER>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let fits = (1..=MAX_PLAINTEXT + MAX_EXPANSION).contains(&length);
    if kind != u8::from(ContentType::ApplicationData) || [major, minor] != [3, 3] || !fits {
        return Err(Corrupt);
    }
    Ok(Some(HEADER + length))
}

/// What may come after the handshake, whole: tickets, or a key update by itself (section 4.6).
fn handshake(mut messages: Bytes) -> Result<Record, Corrupt> {
    let mut tickets = Vec::new();
    while !messages.is_empty() {
        let Some(&[kind, a, b, c]) = messages.first_chunk::<4>() else { return Err(Corrupt) };
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        messages.advance(4);
        if length > messages.len() {
            return Err(Corrupt);
        }
        let payload = messages.split_to(length);
        match (kind, &*payload) {
            (KEY_UPDATE, &[answer @ (0 | 1)]) if tickets.is_empty() && messages.is_empty() => {
                return Ok(Record::KeyUpdate { answer: answer == 1 });
            }
            (NEW_SESSION_TICKET, _) => tickets.push(payload),
            _ => return Err(Corrupt),
        }
    }
    Ok(Record::Tickets(tickets))
}

/// Makes records.
pub(super) struct Sealer {
    cipher: Box<dyn MessageEncrypter>,
    sequence: u64,
    /// How many records one key may seal.
    limit: u64,
}

impl Sealer {
    /// # Errors
    /// The cipher is unknown here.
    pub(super) fn new(suite: &Tls13CipherSuite, (sequence, secrets): Secrets) -> Result<Self, Corrupt> {
        let (key, iv) = parts(secrets)?;
        // Far enough below the limit that the update itself fits, and nobody has to count.
        let limit = suite.common.confidentiality_limit / 2;
        Ok(Self { cipher: suite.aead_alg.encrypter(key, iv), sequence, limit })
    }

    /// Whether the key has sealed as much as it may: send a [`Sealer::key_update`] and go on with the next key.
    pub(super) fn is_spent(&self) -> bool {
        self.sequence >= self.limit
    }

    /// As if the cipher allowed no more records for each key.
    #[cfg(test)]
    pub(super) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// One record of no more than [`MAX_PLAINTEXT`] bytes.
    pub(super) fn data(&mut self, chunks: &[&[u8]]) -> Result<Vec<u8>, Corrupt> {
        self.seal(ContentType::ApplicationData, OutboundChunks::new(chunks))
    }

    pub(super) fn close_notify(&mut self) -> Result<Vec<u8>, Corrupt> {
        self.seal(ContentType::Alert, OutboundChunks::Single(&[WARNING, CLOSE_NOTIFY]))
    }

    /// Says that the next record is under the next key. Asks for nothing.
    pub(super) fn key_update(&mut self) -> Result<Vec<u8>, Corrupt> {
        self.seal(ContentType::Handshake, OutboundChunks::Single(&[KEY_UPDATE, 0, 0, 1, 0]))
    }

    fn seal(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> Result<Vec<u8>, Corrupt> {
        let plain = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_3, payload };
        let sealed = self.cipher.encrypt(plain, self.sequence).map_err(|_| Corrupt)?;
        self.sequence = self.sequence.checked_add(1).ok_or(Corrupt)?;
        Ok(sealed.encode())
    }
}

fn parts(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Corrupt> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(Corrupt),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;

    use super::*;

    fn suite() -> &'static Tls13CipherSuite {
        TLS13_AES_256_GCM_SHA384.tls13().unwrap()
    }

    fn secrets(key: u8) -> Secrets {
        (0, ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([key; 32]), iv: Iv::copy(&[key; 12]) })
    }

    fn pair() -> (Sealer, Opener) {
        (Sealer::new(suite(), secrets(1)).unwrap(), Opener::new(suite(), secrets(1)).unwrap())
    }

    fn open_all(opener: &mut Opener, bytes: &[u8]) -> Result<Vec<Record>, Corrupt> {
        let mut incoming = BytesMut::from(bytes);
        let mut records = Vec::new();
        while let Some(record) = opener.open(&mut incoming)? {
            records.push(record);
        }
        Ok(records)
    }

    #[test]
    fn the_end_and_a_key_update_are_told_from_data() {
        let (mut sealer, mut opener) = pair();
        let bytes = [sealer.data(&[b"a", b"bc"]), sealer.key_update()].map(Result::unwrap).concat();
        let records = open_all(&mut opener, &bytes).unwrap();
        assert_eq!(records, [Record::Data(Bytes::from_static(b"abc")), Record::KeyUpdate { answer: false }]);
        opener.renew(suite(), secrets(2)).unwrap();
        let mut next = Sealer::new(suite(), secrets(2)).unwrap();
        let bytes = [next.data(&[b"d"]), next.close_notify()].map(Result::unwrap).concat();
        assert_eq!(
            open_all(&mut opener, &bytes),
            Ok(vec![Record::Data(Bytes::from_static(b"d")), Record::CloseNotify])
        );
        assert_eq!(open_all(&mut opener, &sealer.data(&[b"old key"]).unwrap()), Err(Corrupt));
    }

    #[test]
    fn what_is_changed_repeated_or_out_of_order_is_corrupt() {
        let (mut sealer, _) = pair();
        let [first, second] = [b"first", b"other"].map(|data| sealer.data(&[data]).unwrap());
        for byte in 0..first.len() {
            let mut changed = first.clone();
            changed[byte] ^= 1;
            // A length that grew asks for more; nothing else gets through.
            assert!(!matches!(open_all(&mut pair().1, &changed), Ok(records) if !records.is_empty()), "byte {byte}");
        }
        assert_eq!(open_all(&mut pair().1, &[first.clone(), first.clone()].concat()), Err(Corrupt));
        assert_eq!(open_all(&mut pair().1, &second), Err(Corrupt));
    }

    #[test]
    fn what_does_not_belong_here_is_refused_by_its_header() {
        for header in [[22, 3, 3, 0, 32], [23, 3, 1, 0, 32], [23, 3, 3, 0, 0], [23, 3, 3, 0x41, 0x01]] {
            assert_eq!(length_of_first(&header), Err(Corrupt), "{header:?}");
        }
        assert_eq!(length_of_first(&[23, 3, 3, 0x41]), Ok(None));
        assert_eq!(length_of_first(&[23, 3, 3, 0x41, 0]), Ok(Some(HEADER + MAX_PLAINTEXT + MAX_EXPANSION)));
    }

    #[test]
    fn a_flood_of_records_without_data_ends_the_connection() {
        let (mut sealer, mut opener) = pair();
        let empty = |sealer: &mut Sealer, n: u8| (0..n).flat_map(|_| sealer.data(&[]).unwrap()).collect::<Vec<u8>>();
        assert_eq!(open_all(&mut opener, &empty(&mut sealer, MAX_IDLE_RECORDS)), Ok(Vec::new()));
        assert_eq!(open_all(&mut opener, &empty(&mut sealer, 1)), Err(Corrupt));
    }

    proptest! {
        #[test]
        fn records_survive_any_cut(
            data in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..400), 1..8),
            cuts in prop::collection::vec(1_usize..300, 1..20),
        ) {
            let (mut sealer, mut opener) = pair();
            let bytes: Vec<u8> = data.iter().flat_map(|data| sealer.data(&[data]).unwrap()).collect();
            let (mut incoming, mut opened, mut rest) = (BytesMut::new(), Vec::new(), bytes.as_slice());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                incoming.extend_from_slice(now);
                rest = later;
                while let Some(record) = opener.open(&mut incoming).unwrap() {
                    opened.push(record);
                }
            }
            let sent: Vec<_> = data.into_iter().map(|data| Record::Data(data.into())).collect();
            prop_assert_eq!(opened, sent);
        }

        #[test]
        fn any_bytes_are_refused_or_wait_for_more(bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
            prop_assert!(!matches!(open_all(&mut pair().1, &bytes), Ok(records) if !records.is_empty()));
        }
    }
}
