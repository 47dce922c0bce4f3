//! What this crate's tests share: CAs, SVIDs and real handshakes over loopback TCP.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use isthmus_model::ids::{SpiffeId, TrustDomain};
use rustls::{ClientConfig, ServerConfig};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    keys::KeyPair,
    svid::Svid,
    tls::{IdentitySource, PeerPolicy, peer_id},
};

pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn domain(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

pub(crate) fn ca(name: &str) -> CertificateAuthority {
    CertificateAuthority::create(&domain(name), 10 * DAY).unwrap()
}

pub(crate) fn id(uri: &str) -> SpiffeId {
    uri.parse().unwrap()
}

/// An SVID for `spiffe://<the CA's domain>/<path>`.
pub(crate) fn svid(ca: &CertificateAuthority, path: &str, lifetime: Duration) -> Svid {
    let key = KeyPair::generate().unwrap();
    let id = id(&format!("spiffe://{}/{path}", ca.trust_domain()));
    Svid::new(ca.sign_csr(&key.csr_der().unwrap(), &id, &[], lifetime).unwrap(), &key).unwrap()
}

pub(crate) fn source(ca: &CertificateAuthority, path: &str) -> IdentitySource {
    IdentitySource::new(svid(ca, path, DAY))
}

pub(crate) fn store(cas: &[&CertificateAuthority]) -> TrustStore {
    let store = TrustStore::new();
    let mut roots: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for ca in cas {
        roots.entry(ca.trust_domain().clone()).or_default().push(ca.root_der().clone());
    }
    store.set(roots);
    store
}

pub(crate) fn anyone() -> PeerPolicy {
    Arc::new(|_| true)
}

pub(crate) fn only(uri: &str) -> PeerPolicy {
    let wanted = id(uri);
    Arc::new(move |id| *id == wanted)
}

/// What each side made of a handshake: whom it saw, or why it failed.
pub(crate) struct Verdicts {
    pub(crate) server: io::Result<Option<SpiffeId>>,
    pub(crate) client: io::Result<Option<SpiffeId>>,
}

impl Verdicts {
    /// Both failed; the server's words.
    pub(crate) fn server_error(&self) -> String {
        assert!(self.client.is_err(), "the client saw {:?}", self.client);
        self.server.as_ref().unwrap_err().to_string()
    }

    /// Both failed; the client's words.
    pub(crate) fn client_error(&self) -> String {
        assert!(self.server.is_err(), "the server saw {:?}", self.server);
        self.client.as_ref().unwrap_err().to_string()
    }
}

/// A handshake and one byte from the server, over loopback TCP. In TLS 1.3 a client learns with the first byte whether
/// its certificate was accepted.
pub(crate) async fn handshake(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>) -> Verdicts {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (tcp, _) = listener.accept().await?;
        let mut tls = TlsAcceptor::from(Arc::clone(server)).accept(tcp).await?;
        tls.write_all(b"!").await?;
        tls.shutdown().await?;
        Ok(peer_id(tls.get_ref().1.peer_certificates()))
    };
    let dial = async {
        let tcp = TcpStream::connect(address).await?;
        let name = "localhost".try_into().unwrap();
        let mut tls = TlsConnector::from(Arc::clone(client)).connect(name, tcp).await?;
        tls.read_u8().await?;
        Ok(peer_id(tls.get_ref().1.peer_certificates()))
    };
    let (server, client) = timeout(DEADLINE, async { tokio::join!(serve, dial) }).await.unwrap();
    Verdicts { server, client }
}
