//! What predecessor and successor say to each other over the handover socket.
//!
//! JSON messages, each with its length in four bytes, big endian, in front; file descriptors as SCM_RIGHTS, each batch with
//! one byte that carries it. Both sides are this program, perhaps in two versions, of one user; lengths and numbers are
//! bounded all the same.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest},
    net::UnixStream,
};

use super::shelf::Role;

/// Ten thousand clusters' names are well below this.
const MAX_MESSAGE: u32 = 1 << 20;
/// Descriptors that come at most: a listener for each cluster, and a few.
const MAX_SOCKETS: usize = 16_384;
/// Descriptors in one batch; the system allows 253.
const BATCH: usize = 64;

/// What a successor says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum FromSuccessor {
    /// It wants the sockets.
    #[serde(rename_all = "camelCase")]
    TakeOver {
        version: u32,
        pid: u32,
        /// The gateway's name: another name is another gateway.
        name: String,
        /// The key of its connection IDs.
        cid_key: u64,
    },
    /// It could serve from now on.
    #[serde(rename_all = "camelCase")]
    Ready {
        /// It uses the tunnel's UDP socket that it was given.
        shares_tunnel: bool,
    },
    /// The agent feeds it.
    Following,
}

/// What a predecessor says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum FromPredecessor {
    /// It gives its sockets, in this order, and the relay's end after them.
    #[serde(rename_all = "camelCase")]
    Offer { pid: u32, cid_key: u64, sockets: Vec<Role> },
    /// It does not.
    Refused { why: String },
    /// Serve from now on.
    Go,
}

/// Writes one message. The caller sets the deadline.
pub(super) async fn write(stream: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len()).ok().filter(|n| *n <= MAX_MESSAGE).ok_or(io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_be_bytes(), body.as_slice()].concat()).await
}

/// Reads one message. Not cancel-safe. The caller sets the deadline.
pub(super) async fn read<M: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<M> {
    let length = stream.read_u32().await?;
    if length > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes")));
    }
    let mut body = vec![0; usize::try_from(length).unwrap_or_default()];
    stream.read_exact(&mut body).await?;
    Ok(serde_json::from_slice(&body)?)
}

/// Sends copies of `sockets`. The caller sets the deadline.
pub(super) async fn send_sockets(stream: &UnixStream, sockets: &[OwnedFd]) -> io::Result<()> {
    for batch in sockets.chunks(BATCH) {
        let descriptors: Vec<_> = batch.iter().map(AsFd::as_fd).collect();
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // There is room: the space is for a whole batch.
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
            Ok(sendmsg(stream, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL)?)
        };
        stream.async_io(Interest::WRITABLE, send).await?;
    }
    Ok(())
}

/// Receives exactly `count` sockets. The caller sets the deadline.
pub(super) async fn receive_sockets(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    if count > MAX_SOCKETS {
        return Err(wrong(format!("{count} sockets")));
    }
    let mut sockets = Vec::new();
    while sockets.len() < count {
        let before = sockets.len();
        let receive = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    sockets.extend(descriptors);
                }
            }
            Ok(())
        };
        stream.async_io(Interest::READABLE, receive).await?;
        if sockets.len() == before || sockets.len() > count {
            // An end, a byte without sockets (this process may have no more file descriptors), or too many.
            return Err(wrong(format!("{} sockets of {count}; is the limit of open files too low?", sockets.len())));
        }
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn messages_and_more_than_a_batch_of_sockets_come_through() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let listeners: Vec<TcpListener> = (0..BATCH + 3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
        let sockets: Vec<OwnedFd> = listeners.into_iter().map(Into::into).collect();
        write(&mut a, &FromPredecessor::Go).await.unwrap();
        send_sockets(&a, &sockets).await.unwrap();
        write(&mut a, &FromPredecessor::Refused { why: "busy".to_owned() }).await.unwrap();
        assert!(matches!(read(&mut b).await.unwrap(), FromPredecessor::Go));
        let received = receive_sockets(&b, sockets.len()).await.unwrap();
        drop(sockets);
        let received: Vec<_> = received.into_iter().map(|s| TcpListener::from(s).local_addr().unwrap()).collect();
        assert_eq!(received, addresses);
        assert!(matches!(read(&mut b).await.unwrap(), FromPredecessor::Refused { why } if why == "busy"));
    }

    #[tokio::test]
    async fn bytes_without_sockets_and_oversized_messages_are_errors() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"x").await.unwrap();
        assert!(receive_sockets(&b, 1).await.is_err());
        a.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
        assert!(read::<FromSuccessor>(&mut b).await.is_err());
        assert!(receive_sockets(&b, usize::MAX).await.is_err());
        drop(a);
        assert!(receive_sockets(&b, 1).await.is_err());
    }
}
