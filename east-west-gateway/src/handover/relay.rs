//! The pair of Unix datagram sockets through which one process passes the other's UDP datagrams on.
//!
//! One message is one datagram, with what the system said of it in front: its source, its ECN bits, the address that it
//! came to. A full socket loses the datagram, as a full UDP socket would; QUIC sends it again. What is not a message of
//! this form is passed over.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::{fd::OwnedFd, unix::net::UnixDatagram as StdDatagram},
    task::{Context, Poll, ready},
};

use quinn::udp::{EcnCodepoint, RecvMeta};
use socket2::SockRef;
use tokio::{io::Interest, net::UnixDatagram};

/// Source: IP (IPv4 as mapped), port, scope. Destination IP. Which of them are there, and ECN.
const HEADER: usize = 16 + 2 + 4 + 16 + 1;
const ECN: u8 = 0b11;
const IPV4: u8 = 1 << 2;
const DESTINATION: u8 = 1 << 3;
const DESTINATION_IPV4: u8 = 1 << 4;

/// One end.
#[derive(Debug)]
pub(super) struct Relay {
    socket: UnixDatagram,
}

/// Both ends of a new pair: this process's, and the one to give away.
pub(super) fn pair(buffer_bytes: usize) -> io::Result<(Relay, OwnedFd)> {
    let (ours, theirs) = StdDatagram::pair()?;
    for end in [&ours, &theirs] {
        // The system may grant less; then more is lost under load, and sent again.
        drop(SockRef::from(end).set_send_buffer_size(buffer_bytes));
    }
    Ok((Relay::adopt(ours.into())?, theirs.into()))
}

impl Relay {
    /// The end that another process made.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let socket = StdDatagram::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: UnixDatagram::from_std(socket)? })
    }

    /// Passes one datagram on. False if there was no room, or nobody is there.
    pub(super) fn pass(&self, datagram: &[u8], meta: &RecvMeta) -> bool {
        let header = encode(meta);
        // Not through tokio: nobody waits for room.
        rustix::io::writev(&self.socket, &[IoSlice::new(&header), IoSlice::new(datagram)]).is_ok()
    }

    /// Takes datagrams that were passed on, as quinn asks for them: one in each buffer.
    pub(super) fn poll_take(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            // Fails only when the runtime ends.
            ready!(self.socket.poll_recv_ready(cx))?;
            let mut taken = 0;
            for (buffer, meta) in buffers.iter_mut().zip(metas.iter_mut()) {
                match self.take(buffer) {
                    Ok(Some(received)) => *meta = received,
                    // Not to be expected of ourselves in another version; an empty entry is skipped.
                    Ok(None) => *meta = RecvMeta::default(),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Such as that the other process died; the end of its control connection tells that, too.
                    Err(error) => {
                        tracing::debug!(%error, "no datagrams from the other process");
                        return Poll::Ready(Ok(taken));
                    }
                }
                taken += 1;
            }
            if taken > 0 {
                return Poll::Ready(Ok(taken));
            }
        }
    }

    fn take(&self, buffer: &mut IoSliceMut<'_>) -> io::Result<Option<RecvMeta>> {
        let mut header = [0; HEADER];
        let n = self.socket.try_io(Interest::READABLE, || {
            let mut message = [IoSliceMut::new(&mut header), IoSliceMut::new(buffer)];
            match rustix::io::readv(&self.socket, &mut message)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                n => Ok(n),
            }
        })?;
        Ok(n.checked_sub(HEADER).filter(|payload| *payload > 0).and_then(|payload| decode(&header, payload)))
    }
}

fn encode(meta: &RecvMeta) -> [u8; HEADER] {
    let mut flags = meta.ecn.map_or(0, |ecn| ecn as u8);
    let scope = match meta.addr {
        SocketAddr::V4(_) => {
            flags |= IPV4;
            0
        }
        SocketAddr::V6(v6) => v6.scope_id(),
    };
    let destination = match meta.dst_ip {
        None => Ipv6Addr::UNSPECIFIED,
        Some(ip) => {
            flags |= DESTINATION | if ip.is_ipv4() { DESTINATION_IPV4 } else { 0 };
            mapped(ip)
        }
    };
    let mut header = [0; HEADER];
    let parts: [&[u8]; 5] = [
        &mapped(meta.addr.ip()).octets(),
        &meta.addr.port().to_be_bytes(),
        &scope.to_be_bytes(),
        &destination.octets(),
        &[flags],
    ];
    for (to, from) in header.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    header
}

fn decode(header: &[u8; HEADER], payload: usize) -> Option<RecvMeta> {
    let (ip, rest) = header.split_first_chunk::<16>()?;
    let (port, rest) = rest.split_first_chunk::<2>()?;
    let (scope, rest) = rest.split_first_chunk::<4>()?;
    let (destination, rest) = rest.split_first_chunk::<16>()?;
    let flags = *rest.first()?;
    let (ip, port) = (Ipv6Addr::from(*ip), u16::from_be_bytes(*port));
    let addr = match flags & IPV4 {
        0 => SocketAddr::V6(SocketAddrV6::new(ip, port, 0, u32::from_be_bytes(*scope))),
        _ => SocketAddr::new(ip.to_ipv4_mapped()?.into(), port),
    };
    let destination = Ipv6Addr::from(*destination);
    let dst_ip = match (flags & DESTINATION, flags & DESTINATION_IPV4) {
        (0, _) => None,
        (_, 0) => Some(destination.into()),
        _ => Some(destination.to_ipv4_mapped()?.into()),
    };
    Some(RecvMeta { addr, len: payload, stride: payload, ecn: EcnCodepoint::from_bits(flags & ECN), dst_ip })
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn meta(addr: &str, dst_ip: Option<&str>, ecn: Option<EcnCodepoint>) -> RecvMeta {
        let dst_ip = dst_ip.map(|ip| ip.parse().unwrap());
        RecvMeta { addr: addr.parse().unwrap(), len: 5, stride: 5, ecn, dst_ip }
    }

    fn same(a: &RecvMeta, b: &RecvMeta) -> bool {
        (a.addr, a.len, a.stride, a.ecn, a.dst_ip) == (b.addr, b.len, b.stride, b.ecn, b.dst_ip)
    }

    #[test]
    fn what_the_system_said_of_a_datagram_survives() {
        for meta in [
            meta("192.0.2.7:443", None, None),
            meta("192.0.2.7:443", Some("127.0.0.1"), Some(EcnCodepoint::Ce)),
            meta("[2001:db8::7]:65535", Some("::1"), Some(EcnCodepoint::Ect0)),
            meta("[fe80::7%3]:1", Some("fe80::1"), Some(EcnCodepoint::Ect1)),
            meta("[::ffff:192.0.2.7]:443", Some("::ffff:127.0.0.1"), None),
        ] {
            let back = decode(&encode(&meta), 5).unwrap();
            assert!(same(&meta, &back), "{meta:?} {back:?}");
        }
    }

    #[tokio::test]
    async fn datagrams_come_through_one_by_one_and_an_absent_reader_costs_nothing() {
        let (ours, theirs) = pair(1 << 20).unwrap();
        let theirs = Relay::adopt(theirs).unwrap();
        let sent = meta("192.0.2.7:443", Some("127.0.0.1"), Some(EcnCodepoint::Ce));
        assert!(ours.pass(b"first", &sent) && ours.pass(b"other", &sent));
        let (mut one, mut two, mut three) = ([0; 64], [0; 64], [0; 64]);
        let mut buffers = [&mut one, &mut two, &mut three].map(|b| IoSliceMut::new(b));
        let mut metas = [RecvMeta::default(); 3];
        let taken = std::future::poll_fn(|cx| theirs.poll_take(cx, &mut buffers, &mut metas)).await.unwrap();
        assert_eq!(taken, 2);
        assert_eq!((&buffers[0][..5], &buffers[1][..5]), (&b"first"[..], &b"other"[..]));
        assert!(metas[..2].iter().all(|m| same(m, &sent)));
        drop(theirs);
        assert!(!ours.pass(b"third", &sent));
    }

    #[tokio::test]
    async fn a_full_relay_loses_and_does_not_block() {
        let (ours, _theirs) = pair(1 << 16).unwrap();
        let sent = meta("192.0.2.7:443", None, None);
        let passed = (0..10_000).take_while(|_| ours.pass(&[0; 1_400], &sent)).count();
        assert!((10..10_000).contains(&passed), "{passed}");
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_passed_over(header in prop::array::uniform32(any::<u8>()), rest in prop::array::uniform7(any::<u8>())) {
            let mut all = [0; HEADER];
            all[..32].copy_from_slice(&header);
            all[32..].copy_from_slice(&rest);
            decode(&all, 9);
        }
    }
}
