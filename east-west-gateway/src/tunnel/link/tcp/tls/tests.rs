//! Two ends over loopback, with rustls' own keys.

use std::{future::poll_fn, sync::Arc};

use bytes::Bytes;
use isthmus_identity::tls::{ClientAuth, IdentitySource, client_config, server_config};
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};

use super::{Tls, accept, connect};
use crate::{
    splice,
    testkit::FEDERATION,
    tests::rig::{svid, trust},
    tunnel::link::{Broken, quic},
};

pub(in crate::tunnel::link::tcp) async fn pair() -> (Tls, Tls) {
    let (client, server) = (IdentitySource::new(svid("east")), IdentitySource::new(svid("west")));
    let policy = || quic::any_gateway(&FEDERATION.parse().unwrap());
    let mut client = client_config(Some(&client), &trust(), policy(), &[b"test"]).unwrap();
    let mut server = server_config(&server, &trust(), ClientAuth::Required(policy()), &[b"test"]).unwrap();
    client.enable_secret_extraction = true;
    server.enable_secret_extraction = true;
    let (client, server) = (Arc::new(client), Arc::new(server));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let name = ServerName::IpAddress(address.ip().into());
    let (near, far) = tokio::join!(connect(&client, name, near.unwrap()), accept(&server, far.unwrap().0));
    (Tls::new(near.unwrap()).unwrap(), Tls::new(far.unwrap()).unwrap())
}

pub(in crate::tunnel::link::tcp) async fn say(tls: &mut Tls, bytes: &[u8]) {
    let mut chunks = [Bytes::copy_from_slice(bytes)];
    while chunks.iter().any(|chunk| !chunk.is_empty()) {
        poll_fn(|cx| tls.poll_write(cx, &mut chunks)).await.unwrap();
    }
    poll_fn(|cx| tls.poll_flush(cx)).await.unwrap();
}

#[tokio::test]
async fn keys_are_renewed_before_they_have_sealed_too_much_and_when_the_peer_asks() {
    let (mut near, mut far) = pair().await;
    for n in 0..20_u8 {
        // A new key begins anew, with the cipher's own limit.
        near.sealer.set_limit(1);
        say(&mut near, &[n]).await;
        assert_eq!(near.sealer.is_spent(), n == 0, "the first key has sealed one record, each other one is new");
        assert_eq!(far.chunk().await.unwrap().unwrap(), [n][..]);
        far.renewal_due = n % 3 == 0;
        say(&mut far, &[n, n]).await;
        assert_eq!(near.chunk().await.unwrap().unwrap(), [n, n][..]);
        assert!(!far.renewal_due);
    }
}

#[tokio::test]
async fn only_a_close_notify_is_an_end() {
    let (mut near, mut far) = pair().await;
    say(&mut near, b"all").await;
    poll_fn(|cx| near.poll_finish(cx)).await.unwrap();
    assert_eq!(far.chunk().await.unwrap().unwrap(), b"all"[..]);
    assert_eq!((far.chunk().await, far.chunk().await), (Ok(None), Ok(None)));

    // A FIN and a reset without one are cuts.
    for reset in [false, true] {
        let (mut near, mut far) = pair().await;
        say(&mut near, b"some").await;
        assert_eq!(far.chunk().await.unwrap().unwrap(), b"some"[..]);
        if reset {
            splice::abort(near.tcp());
        }
        drop(near);
        assert_eq!((far.chunk().await, far.chunk().await), (Err(Broken), Err(Broken)));
    }
}

#[tokio::test]
async fn what_is_no_record_breaks_the_connection_and_an_idle_one_is_quiet() {
    let (near, mut far) = pair().await;
    assert!(far.is_quiet());
    near.tcp().writable().await.unwrap();
    near.tcp().try_write(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(far.chunk().await, Err(Broken));
    assert!(!far.is_quiet());
}
