use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::ConnectInfo, routing::get};
use isthmus_api::proto::local::v1::{
    MintTokenRequest, MintTokenResponse,
    local_admin_client::LocalAdminClient,
    local_admin_server::{LocalAdmin, LocalAdminServer},
};
use isthmus_runtime::{health::Registry, tasks::Tasks, wait::wait_for};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tonic::{Code, Request, Response, Status};

use super::{admission::Limits, *};
use crate::{
    testkit::*,
    tls::{ClientAuth, client_config, server_config},
};

const CLIENT: &str = "spiffe://east.example/cluster/east/dns";

/// Answers with the name of whoever asks.
struct WhoAmI;

#[tonic::async_trait]
impl LocalAdmin for WhoAmI {
    async fn mint_token(&self, request: Request<MintTokenRequest>) -> Result<Response<MintTokenResponse>, Status> {
        let peer = request.extensions().get::<PeerInfo>().ok_or_else(|| Status::internal("no PeerInfo"))?;
        assert!(peer.remote.ip().is_loopback());
        let token = peer.id.as_ref().map_or_else(|| "nobody".to_owned(), ToString::to_string);
        Ok(Response::new(MintTokenResponse { token, expires_at_unix_ms: 0 }))
    }
}

struct Fixture {
    ca: crate::ca::CertificateAuthority,
    address: SocketAddr,
    handshakes: Handshakes,
}

impl Fixture {
    /// Binds, and runs `test` while `serve` serves.
    async fn run<S, T>(
        serve: impl FnOnce(TlsIncoming, isthmus_runtime::tasks::Shutdown) -> S,
        test: impl AsyncFnOnce(Self) -> T,
    ) where
        S: Future<Output = ()> + Send + 'static,
    {
        let ca = ca("east.example");
        let config = server_config(
            &source(&ca, "cluster/east/agent"),
            &store(&[&ca]),
            ClientAuth::Optional(anyone()),
            &[b"h2", b"http/1.1"],
        )
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let incoming = TlsIncoming::new(listener, Arc::new(config));
        let fixture = Self { ca, address: incoming.local_addr().unwrap(), handshakes: incoming.handshakes() };
        let tasks = Tasks::new();
        tasks.spawn("serve", serve(incoming, tasks.shutdown()));
        let stop = async {
            timeout(DEADLINE, test(fixture)).await.unwrap();
        };
        tasks.run_until(stop, Duration::from_secs(5)).await.unwrap();
    }

    fn tls(&self, known: bool) -> Arc<rustls::ClientConfig> {
        let identity = known.then(|| source(&self.ca, "cluster/east/dns"));
        let server = only("spiffe://east.example/cluster/east/agent");
        Arc::new(client_config(identity.as_ref(), &store(&[&self.ca]), server, &[b"h2"]).unwrap())
    }

    async fn ask(&self, known: bool) -> String {
        let channel = connect_lazy(&self.address.to_string(), self.tls(known));
        let response = LocalAdminClient::new(channel).mint_token(MintTokenRequest::default()).await;
        response.unwrap().into_inner().token
    }
}

async fn serve_grpc(incoming: TlsIncoming, shutdown: isthmus_runtime::tasks::Shutdown) {
    let server = tonic::transport::Server::builder().add_service(LocalAdminServer::new(WhoAmI));
    server.serve_with_incoming_shutdown(incoming, async move { shutdown.requested().await }).await.unwrap();
}

async fn serve_http(incoming: TlsIncoming, shutdown: isthmus_runtime::tasks::Shutdown) {
    let app = Router::new().route(
        "/",
        get(async |ConnectInfo(peer): ConnectInfo<PeerInfo>| peer.id.map(|id| id.to_string()).unwrap_or_default()),
    );
    let service = app.into_make_service_with_connect_info::<PeerInfo>();
    axum::serve(incoming, service).with_graceful_shutdown(async move { shutdown.requested().await }).await.unwrap();
}

#[tokio::test]
async fn grpc_services_learn_who_calls() {
    Fixture::run(serve_grpc, async |f: Fixture| {
        assert_eq!(f.ask(true).await, CLIENT);
        assert_eq!(f.ask(false).await, "nobody");
        assert_eq!((f.handshakes.succeeded(), f.handshakes.failed()), (2, 0));
        let mut registry = Registry::default();
        f.handshakes.register(&mut registry, "local");
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains(r#"isthmus_tls_handshakes_total{listener="local",outcome="ok"} 2"#), "{text}");
    })
    .await;
}

#[tokio::test]
async fn axum_handlers_learn_who_calls() {
    Fixture::run(serve_http, async |f: Fixture| {
        let identity = source(&f.ca, "cluster/east/dns");
        let config = client_config(Some(&identity), &store(&[&f.ca]), anyone(), &[b"http/1.1"]).unwrap();
        let tcp = TcpStream::connect(f.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let mut tls = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
        tls.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        tls.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(CLIENT), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn garbage_and_silent_clients_do_not_disturb_others() {
    Fixture::run(serve_grpc, async |f: Fixture| {
        let mut silent = Vec::new();
        for _ in 0..20 {
            silent.push(TcpStream::connect(f.address).await.unwrap());
        }
        for _ in 0..20 {
            let mut garbage = TcpStream::connect(f.address).await.unwrap();
            garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            drop(garbage.read_to_end(&mut answer).await);
        }
        drop(TcpStream::connect(f.address).await.unwrap());
        assert_eq!(f.ask(true).await, CLIENT);
        wait_for("21 failures counted", DEADLINE, async || f.handshakes.failed() == 21).await.unwrap();
        assert_eq!(f.handshakes.succeeded(), 1);
        drop(silent);
    })
    .await;
}

#[tokio::test]
async fn a_silent_client_is_dropped_at_the_deadline() {
    let ca = ca("east.example");
    let config = server_config(&source(&ca, "x"), &store(&[&ca]), ClientAuth::Optional(anyone()), &[b"h2"]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut incoming = TlsIncoming::new(listener, Arc::new(config)).with_handshake_deadline(Duration::from_millis(50));
    let mut silent = TcpStream::connect(incoming.local_addr().unwrap()).await.unwrap();
    let handshakes = incoming.handshakes();
    let accept = async {
        futures_util::StreamExt::next(&mut incoming).await;
    };
    tokio::select! {
        () = accept => panic!("a connection came out of silence"),
        end = silent.read_u8() => assert!(end.is_err()),
    }
    assert_eq!(handshakes.failed(), 1);
}

#[tokio::test]
async fn silent_clients_up_to_the_bound_delay_others_by_the_deadline_at_most() {
    let bounded = async |incoming: TlsIncoming, shutdown| {
        let mut incoming = incoming.with_handshake_deadline(Duration::from_millis(100));
        incoming.max_pending = 2;
        serve_grpc(incoming, shutdown).await;
    };
    Fixture::run(bounded, async |f: Fixture| {
        let mut silent = Vec::new();
        for _ in 0..5 {
            silent.push(TcpStream::connect(f.address).await.unwrap());
        }
        assert_eq!(f.ask(true).await, CLIENT);
        assert!(f.handshakes.failed() >= 4, "{}", f.handshakes.failed());
        drop(silent);
    })
    .await;
}

/// A TLS connection without a certificate that then says nothing.
async fn stranger(f: &Fixture) -> tokio_rustls::client::TlsStream<TcpStream> {
    let tcp = TcpStream::connect(f.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(f.tls(false));
    connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap()
}

#[tokio::test]
async fn a_crowd_without_certificates_leaves_room_for_those_who_have_one() {
    Fixture::run(serve_grpc, async |f: Fixture| {
        let mut crowd = Vec::new();
        for _ in 0..MAX_STRANGERS_PER_SOURCE {
            crowd.push(stranger(&f).await);
        }
        // One more is closed: after the handshake, so the client sees the end of the stream.
        let mut extra = stranger(&f).await;
        let mut rest = Vec::new();
        drop(extra.read_to_end(&mut rest).await);
        assert_eq!(f.handshakes.crowded_out(), 1);
        assert_eq!(f.ask(true).await, CLIENT);
        // Those who leave make room.
        drop(crowd);
        wait_for("room", DEADLINE, async || {
            let channel = connect_lazy(&f.address.to_string(), f.tls(false));
            LocalAdminClient::new(channel).mint_token(MintTokenRequest::default()).await.is_ok()
        })
        .await
        .unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_connection_without_a_certificate_has_a_lifetime_and_one_with_has_not() {
    let brief = async |incoming: TlsIncoming, shutdown| {
        let stranger_lifetime = Duration::from_millis(100);
        serve_grpc(incoming.with_limits(Limits { stranger_lifetime, ..Limits::default() }), shutdown).await;
    };
    Fixture::run(brief, async |f: Fixture| {
        let known = connect_lazy(&f.address.to_string(), f.tls(true));
        let mut known = LocalAdminClient::new(known);
        known.mint_token(MintTokenRequest::default()).await.unwrap();
        let mut silent = stranger(&f).await;
        let mut rest = Vec::new();
        drop(silent.read_to_end(&mut rest).await);
        known.mint_token(MintTokenRequest::default()).await.unwrap();
        assert_eq!(f.handshakes.succeeded(), 2, "the one with a certificate is still the first");
    })
    .await;
}

#[tokio::test]
async fn failed_calls_say_which_server_and_why() {
    Fixture::run(serve_grpc, async |f: Fixture| {
        let call = async |target: &str, tls| {
            LocalAdminClient::new(connect_lazy(target, tls)).mint_token(MintTokenRequest::default()).await.unwrap_err()
        };
        let stranger = ca("west.example");
        let tls = Arc::new(client_config(None, &store(&[&stranger]), anyone(), &[b"h2"]).unwrap());
        let status = call(&f.address.to_string(), tls).await;
        let text = chain(&status);
        assert_eq!(status.code(), Code::Unavailable);
        assert!(text.contains(&f.address.to_string()) && text.contains("no roots are known"), "{text}");

        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let text = chain(&call(&free, f.tls(true)).await);
        assert!(text.contains(&format!("connect to {free}")), "{text}");
        let text = chain(&call("not an address", f.tls(true)).await);
        assert!(text.contains("write it as host:port"), "{text}");
    })
    .await;
}

fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |e| e.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
