//! Whose a QUIC datagram is, by the connection ID that it is addressed to (RFC 8999, RFC 9000 section 17).
//!
//! Every connection ID that a gateway issues is signed with the key of its process. The signature is no protection
//! against forgery, and need not be: whoever forges one reaches an endpoint that does not know the connection.

use quinn::ConnectionId;
use quinn_proto::{ConnectionIdGenerator as _, HashedConnectionIdGenerator};

/// The length of the connection IDs that [`HashedConnectionIdGenerator`] issues.
const LENGTH: usize = 8;
const LONG_HEADER: u8 = 0x80;
/// Flags and version; the destination's length and bytes follow.
const LONG_PREFIX: usize = 5;

/// The key under which one process issues its connection IDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CidKey(pub(crate) u64);

impl CidKey {
    /// A key that no other process has.
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }

    /// What issues and recognises connection IDs under this key.
    pub(crate) fn generator(self) -> HashedConnectionIdGenerator {
        HashedConnectionIdGenerator::from_key(self.0)
    }

    /// Whether `datagram` is addressed to a connection of the process with this key. A client's first datagrams are
    /// addressed to nobody's.
    pub(crate) fn owns(self, datagram: &[u8]) -> bool {
        destination(datagram).is_some_and(|id| self.generator().validate(&ConnectionId::new(id)).is_ok())
    }
}

/// The connection ID that `datagram` is addressed to, if it can be one of ours. All packets of a datagram share it.
fn destination(datagram: &[u8]) -> Option<&[u8]> {
    let (&first, rest) = datagram.split_first()?;
    if first & LONG_HEADER == 0 {
        return rest.get(..LENGTH);
    }
    let (&length, rest) = datagram.get(LONG_PREFIX..)?.split_first()?;
    if usize::from(length) == LENGTH { rest.get(..LENGTH) } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn short(id: &[u8]) -> Vec<u8> {
        [&[0x40], id, &[7; 30]].concat()
    }

    fn long(id: &[u8]) -> Vec<u8> {
        [&[0xc0, 0, 0, 0, 1, u8::try_from(id.len()).unwrap()], id, &[0; 30]].concat()
    }

    #[test]
    fn a_process_knows_its_own_connection_ids_and_no_others() {
        let (own, other) = (CidKey::random(), CidKey::random());
        for _ in 0..10_000 {
            let id = own.generator().generate_cid();
            for datagram in [short(&id), long(&id)] {
                assert!(own.owns(&datagram));
                assert!(!other.owns(&datagram));
            }
        }
    }

    #[test]
    fn what_is_addressed_to_no_connection_is_nobodys() {
        let key = CidKey::random();
        let id = key.generator().generate_cid();
        for datagram in [
            &[][..],
            &[0x40],
            &[0xc0, 0, 0, 0, 1],
            &[0xc0, 0, 0, 0, 1, 8, 1, 2],
            &long(&[3; 20]),
            &long(&[]),
            &short(&id)[..LENGTH],
        ] {
            assert!(!key.owns(datagram), "{datagram:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            CidKey(1).owns(&bytes);
        }
    }
}
