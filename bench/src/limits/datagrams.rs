//! Datagrams, many for each system call (GSO and GRO), bare or sealed as QUIC seals its packets.

use std::{
    io::{ErrorKind, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};

use super::{DATAGRAM, Moved, cpu};

const TAG: usize = 16;
/// As our gateways ask for.
const BUFFER: usize = 4 << 20;
/// Of one send (UDP's own limit, less its headers).
const LARGEST: usize = 65_507;
/// Sent and not received yet, at most: nothing is lost for want of room.
const WINDOW: u64 = 1 << 20;

/// As many for each system call as the kernel takes.
pub(super) fn bare(time: Duration) -> anyhow::Result<Moved> {
    measure(time, usize::MAX, None)
}

/// One.
pub(super) fn single(time: Duration) -> anyhow::Result<Moved> {
    measure(time, 1, None)
}

pub(super) fn sealed(time: Duration) -> anyhow::Result<Moved> {
    let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).map_err(|_| anyhow!("make a key"))?;
    measure(time, usize::MAX, Some(&LessSafeKey::new(key)))
}

/// Each datagram has a nonce of its own on the wire side of things only; here one is enough.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn socket() -> anyhow::Result<(UdpSocket, UdpSocketState)> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let state = UdpSocketState::new((&socket).into())?;
    // The system may grant less.
    drop(state.set_send_buffer_size((&socket).into(), BUFFER));
    drop(state.set_recv_buffer_size((&socket).into(), BUFFER));
    Ok((socket, state))
}

fn measure(time: Duration, at_once: usize, key: Option<&LessSafeKey>) -> anyhow::Result<Moved> {
    let ((near, sending), (far, receiving)) = (socket()?, socket()?);
    let to = far.local_addr()?;
    let (sent, received, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let (began, before) = (Instant::now(), cpu());
    thread::scope(|scope| {
        let receiver = scope.spawn(|| -> anyhow::Result<()> {
            let done = receive((&far, &receiving), key, &received, &over);
            over.store(true, Ordering::Relaxed);
            done
        });
        let mut batch = vec![7; DATAGRAM * sending.max_gso_segments().min(LARGEST / DATAGRAM).min(at_once)];
        let mut result = Ok(());
        while began.elapsed() < time && !over.load(Ordering::Relaxed) {
            if sent.load(Ordering::Relaxed) - received.load(Ordering::Acquire) > WINDOW {
                thread::yield_now();
                continue;
            }
            result = send((&near, &sending), to, key, &mut batch);
            if result.is_err() {
                break;
            }
            sent.fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
        over.store(true, Ordering::Relaxed);
        receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
        result
    })?;
    let bytes = received.into_inner();
    anyhow::ensure!(bytes > 0, "no datagram arrived");
    Ok(Moved::since(began, before, bytes))
}

fn send(
    (socket, state): (&UdpSocket, &UdpSocketState),
    destination: SocketAddr,
    key: Option<&LessSafeKey>,
    batch: &mut [u8],
) -> anyhow::Result<()> {
    if let Some(key) = key {
        for datagram in batch.chunks_exact_mut(DATAGRAM) {
            let (text, tag) = datagram.split_at_mut(DATAGRAM - TAG);
            text.fill(7);
            let sealed = key.seal_in_place_separate_tag(nonce(), Aad::empty(), text).map_err(|_| anyhow!("seal"))?;
            tag.copy_from_slice(sealed.as_ref());
        }
    }
    let transmit = Transmit { destination, ecn: None, contents: batch, segment_size: Some(DATAGRAM), src_ip: None };
    loop {
        match state.try_send(socket.into(), &transmit) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::yield_now(),
            sent => return sent.context("send"),
        }
    }
}

/// Until it is `over` and nothing more comes.
fn receive(
    (socket, state): (&UdpSocket, &UdpSocketState),
    key: Option<&LessSafeKey>,
    received: &AtomicU64,
    over: &AtomicBool,
) -> anyhow::Result<()> {
    let mut buffers = vec![vec![0; 64 * 1024]; quinn::udp::BATCH_SIZE];
    let mut metas = vec![RecvMeta::default(); quinn::udp::BATCH_SIZE];
    loop {
        let mut slices: Vec<IoSliceMut<'_>> = buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
        let count = match state.recv(socket.into(), &mut slices, &mut metas) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if over.load(Ordering::Relaxed) {
                    return Ok(());
                }
                thread::yield_now();
                continue;
            }
            Err(error) => return Err(error).context("receive"),
        };
        drop(slices);
        for (buffer, meta) in buffers.iter_mut().zip(&metas).take(count) {
            let bytes = buffer.get_mut(..meta.len).context("a datagram beyond its buffer")?;
            if let Some(key) = key {
                for datagram in bytes.chunks_mut(meta.stride.max(1)) {
                    key.open_in_place(nonce(), Aad::empty(), datagram)
                        .map_err(|_| anyhow!("a datagram does not open"))?;
                }
            }
            received.fetch_add(meta.len as u64, Ordering::Release);
        }
    }
}
