//! Client channels: TCP and TLS by hand, so that the SPIFFE verifier of the given configuration decides.

use std::{error::Error as _, io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use rustls::{CertificateError, ClientConfig, OtherError};
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(5);

/// A channel to `target` ("host:port") that connects at first use and again after a loss. A server that is silent for
/// 10 s (a ping after 5, 5 for its answer) counts as lost. An unusable target shows as an error of each call.
pub fn connect_lazy(target: &str, tls: Arc<ClientConfig>) -> Channel {
    // The URI only becomes the `:authority` of requests; the connector dials `target` whatever it says.
    let endpoint = Endpoint::from_shared(format!("http://{target}"))
        .unwrap_or_else(|_| Endpoint::from_static("http://invalid.invalid"))
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true);
    let target: Arc<str> = target.into();
    endpoint.connect_with_connector_lazy(service_fn(move |_: http::Uri| {
        let (target, tls) = (Arc::clone(&target), Arc::clone(&tls));
        async move {
            match timeout(CONNECT_DEADLINE, connect(&target, tls)).await {
                Ok(result) => result.map(TokioIo::new),
                Err(_) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("{target} did not answer within {} s", CONNECT_DEADLINE.as_secs()),
                )),
            }
        }
    }))
}

/// A status in words: the peer's, or, if the transport failed, the innermost reason.
pub fn words(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = status.source();
    while let Some(error) = source {
        text = error.to_string();
        source = error.source();
    }
    text
}

async fn connect(target: &str, tls: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let name = server_name(target).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{target:?} is not an address: write it as host:port"))
    })?;
    let about = |e: io::Error| io::Error::new(e.kind(), format!("connect to {target}: {e}"));
    let tcp = TcpStream::connect(target).await.map_err(about)?;
    tcp.set_nodelay(true)?;
    let about = |e: io::Error| io::Error::new(e.kind(), format!("TLS handshake with {target}: {}", reason(&e)));
    TlsConnector::from(tls).connect(name, tcp).await.map_err(about)
}

/// In our verifier's own words, if it was that.
fn reason(error: &io::Error) -> String {
    match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(reason)))) => reason.to_string(),
        _ => error.to_string(),
    }
}

/// The host part; sent as SNI if it is a DNS name, never checked.
fn server_name(target: &str) -> Option<ServerName<'static>> {
    let (host, port) = target.rsplit_once(':')?;
    port.parse::<u16>().ok()?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(host.to_owned()).ok()
}
