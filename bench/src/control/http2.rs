//! One connection over TCP, TLS and HTTP/2 that is kept, for whoever is measured: REST and gRPC are both requests on it.
//!
//! In: a request. Out: the answer whole, with its trailers. Requests share the connection, as many as the server lets be under
//! way. A connection that broke stays broken, and says so.

use std::{error::Error, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, StatusCode,
    body::{Body, Bytes},
    client::conn::http2,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, task::AbortHandle, task::JoinSet, time::timeout};
use tokio_rustls::TlsConnector;

/// To connect, and for an answer: longer than a control plane takes to say that it has no leader.
const DEADLINE: Duration = Duration::from_secs(15);
/// What a server may send before it is read, as gRPC clients have it.
const WINDOW: u32 = 1 << 20;
/// As our agents have it: a server that is silent for this long, and then again, is gone.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// An open connection. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    sender: http2::SendRequest<Full<Bytes>>,
    _driver: Arc<Driver>,
}

/// What drives a connection; that ends with the last clone.
#[derive(Debug)]
pub(crate) struct Driver(AbortHandle);

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) head: HeaderMap,
    pub(crate) body: Bytes,
    /// Empty if there were none.
    pub(crate) trailers: HeaderMap,
}

impl Connection {
    /// Dials `address`, whose certificate is checked as `tls` says; `tasks` drives the connection.
    pub(crate) async fn open(
        address: SocketAddr,
        tls: &Arc<rustls::ClientConfig>,
        tasks: &mut JoinSet<()>,
    ) -> anyhow::Result<Self> {
        let (sender, driver) = dial(address, tls, tasks).await?;
        Ok(Self { sender, _driver: driver })
    }

    /// Sends `request`, whose URI is absolute, and waits for the whole answer.
    pub(crate) async fn exchange(&mut self, request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
        timeout(DEADLINE, self.try_exchange(request)).await.context("no answer in time")?
    }

    async fn try_exchange(&mut self, request: Request<Full<Bytes>>) -> anyhow::Result<Answer> {
        self.sender.ready().await.context("the connection is closed")?;
        let (head, body) = self.sender.send_request(request).await.context("send a request")?.into_parts();
        let body = body.collect().await.context("read an answer")?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        Ok(Answer { status: head.status, head: head.headers, body: body.to_bytes(), trailers })
    }

    /// A call of a REST API: the body of a successful answer, else an error with the server's words.
    pub(crate) async fn call(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<serde_json::Value> {
        let request = rest(method, path, body)?;
        let answer = self.exchange(request).await.with_context(|| format!("{method} {path}"))?;
        answer.json().with_context(|| format!("{method} {path}"))
    }
}

impl Answer {
    /// What a successful answer says.
    pub(crate) fn json(&self) -> anyhow::Result<serde_json::Value> {
        if self.status != StatusCode::OK {
            return Err(anyhow!("{}: {}", self.status, String::from_utf8_lossy(&self.body)));
        }
        serde_json::from_slice(&self.body).context("understand the answer")
    }
}

/// A connection to `address`, whose certificate is checked as `tls` says; `tasks` drives it.
pub(crate) async fn dial<B>(
    address: SocketAddr,
    tls: &Arc<rustls::ClientConfig>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<(http2::SendRequest<B>, Arc<Driver>)>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + Unpin + 'static,
{
    let name = ServerName::try_from("localhost").context("a server name")?;
    let connect = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        TlsConnector::from(tls.clone()).connect(name, tcp).await
    };
    let stream = timeout(DEADLINE, connect).await.with_context(|| format!("{address} does not answer"))?;
    let stream = stream.with_context(|| format!("connect to {address}"))?;
    let greet = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake(TokioIo::new(stream));
    let (sender, connection) = timeout(DEADLINE, greet).await.context("no HTTP/2 greeting")?.context("HTTP/2")?;
    // Its end shows as the error of a request.
    let driver = tasks.spawn(async move { drop(connection.await) });
    Ok((sender, Arc::new(Driver(driver))))
}

/// A request of a REST API.
pub(crate) fn rest(method: &str, path: &str, body: &str) -> anyhow::Result<Request<Full<Bytes>>> {
    let request = Request::builder().method(method).uri(format!("https://localhost{path}"));
    request.body(Full::new(Bytes::from(body.to_owned()))).context("make a request")
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}
