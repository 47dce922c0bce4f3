//! Those who must get nothing: gateways of clusters that never joined or were revoked, workloads of foreign trust domains,
//! clients without a certificate. Each function says what the attempt got, so that a check can also show that the same
//! attempt with good credentials succeeds.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use isthmus_api::proto::{
    common::v1::ServiceName,
    tunnel::v1::{ControlFrame, ControlHello, StreamHeader, StreamReply, control_frame, stream_reply},
};
use isthmus_identity::{ca::CertificateAuthority, keys::KeyPair, svid::Svid};
use isthmus_model::ids::SpiffeId;
use prost::Message;
use rustls::pki_types::{PrivateKeyDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

const DEADLINE: Duration = Duration::from_secs(3);
const TUNNEL_ALPN: &[u8] = b"isthmus-tunnel/1";

/// Credentials that a made-up CA issued for `id`: what someone without a join token can make.
pub fn forged(id: &str) -> anyhow::Result<Svid> {
    let id: SpiffeId = id.parse()?;
    let ca = CertificateAuthority::create(id.trust_domain(), Duration::from_secs(3600))?;
    let key = KeyPair::generate()?;
    let chain = ca.sign_csr(&key.csr_der()?, &id, &[], Duration::from_secs(600))?;
    Ok(Svid::new(chain, &key)?)
}

/// Accepts any server: an intruder does not care whom he talks to.
#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn client(credentials: Option<&Svid>, alpn: &[u8]) -> anyhow::Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)));
    let mut config = match credentials {
        Some(svid) => {
            let key = PrivateKeyDer::from_pem_slice(svid.key_pem().as_bytes()).context("read the key")?;
            builder.with_client_auth_cert(svid.chain().to_vec(), key)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// Sends an HTTP request to a workload's mTLS port and returns the status line, or why there was none.
pub async fn knock(address: SocketAddr, credentials: Option<&Svid>) -> anyhow::Result<String> {
    let run = async {
        let tls = tokio_rustls::TlsConnector::from(Arc::new(client(credentials, b"http/1.1")?));
        let tcp = TcpStream::connect(address).await.context("connect")?;
        let mut stream = tls.connect(ServerName::try_from("intruder.example")?, tcp).await.context("handshake")?;
        stream.write_all(b"GET /intruder HTTP/1.1\r\nhost: cart\r\nconnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.take(64 << 10).read_to_end(&mut answer).await.context("read the answer")?;
        let text = String::from_utf8_lossy(&answer);
        let status = text.lines().next().context("closed without an answer")?;
        Ok(status.to_owned())
    };
    timeout(DEADLINE, run).await.context("no answer in time")?
}

/// Dials a gateway's tunnel as a gateway with `credentials` and asks for `shop/cart`. Returns the reply's kind ("accept"
/// or "reject: …"), or why no stream was had.
pub async fn tunnel(gateway: SocketAddr, credentials: &Svid, sni: &str) -> anyhow::Result<String> {
    let tls = client(Some(credentials), TUNNEL_ALPN)?;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
    let mut endpoint = quinn::Endpoint::client(SocketAddr::new([127, 0, 0, 1].into(), 0)).context("open a socket")?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    let run = async {
        let connection = endpoint.connect(gateway, "gateway.example")?.await.context("connect")?;
        let (mut control, _control_in) = connection.open_bi().await.context("open the control stream")?;
        let hello = ControlHello { version: 1, gateway: "intruder".to_owned() };
        control.write_all(&framed(&ControlFrame { kind: Some(control_frame::Kind::Hello(hello)) })).await?;
        let (mut send, mut receive) = connection.open_bi().await.context("open a stream")?;
        let header = StreamHeader {
            version: 1,
            service: Some(ServiceName { namespace: "shop".to_owned(), name: "cart".to_owned() }),
            port: 8080,
            deadline_ms: 2000,
            ..Default::default()
        };
        send.write_all(&framed(&header)).await.context("send the header")?;
        send.write_all(&client_hello(sni)?).await.context("send the ClientHello")?;
        let mut length = [0; 2];
        receive.read_exact(&mut length).await.context("read the reply")?;
        let mut body = vec![0; usize::from(u16::from_be_bytes(length))];
        receive.read_exact(&mut body).await.context("read the reply")?;
        match StreamReply::decode(body.as_slice())?.kind {
            Some(stream_reply::Kind::Accept(_)) => Ok("accept".to_owned()),
            Some(stream_reply::Kind::Reject(r)) => Ok(format!("reject: {:?} {}", r.reason(), r.detail)),
            None => bail!("an empty reply"),
        }
    };
    let outcome = timeout(DEADLINE, run).await.context("no answer in time").flatten();
    endpoint.close(0_u32.into(), b"done");
    outcome
}

fn framed(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut bytes = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes().to_vec();
    bytes.extend(body);
    bytes
}

/// A real ClientHello with `sni`.
fn client_hello(sni: &str) -> anyhow::Result<Vec<u8>> {
    let name = ServerName::try_from(sni.to_owned())?;
    let mut connection = rustls::ClientConnection::new(Arc::new(client(None, b"h2")?), name)?;
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes)?;
    Ok(bytes)
}
