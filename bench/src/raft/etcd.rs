//! etcd: three members with their default settings, in mutual TLS, and its small write, a `Put` of its gRPC API.
//!
//! The program is Debian's, see `deploy/tools/fetch-etcd.sh`. Keys are the same 10,000 over and over, as in its own benchmark. The
//! call is an HTTP/2 request like any other, so that the client costs what ours does.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use futures_util::{FutureExt, future::BoxFuture};
use http_body_util::Full;
use hyper::{Request, StatusCode, body::Bytes};
use isthmus_e2e::federation::process::Process;
use isthmus_identity::{ca::CertificateAuthority, keys::KeyPair, svid::Svid, tls::IdentitySource};
use isthmus_model::ids::SpiffeId;
use prost::Message;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    drive::{Connections, Contender, Writes},
    metrics,
};
use crate::control::{
    group::{FEDERATION, NODES, client_tls},
    http2::{Answer, Connection},
};

/// Bytes of a value: what one of our small writes takes in the log.
pub(super) const VALUE: usize = 256;
const KEYS: u64 = 10_000;
/// The members share an address, as their certificate's name is looked up; the ports tell them apart.
const CLIENTS: u16 = 32_379;
const PEERS: u16 = 32_479;
const READY: Duration = Duration::from_secs(60);
const LIFETIME: Duration = Duration::from_secs(86_400);

/// Where the program is: `ISTHMUS_ETCD`, or where the tools' script has put it.
pub(super) fn program() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("ISTHMUS_ETCD") {
        Some(path) => PathBuf::from(path),
        None => isthmus_e2e::federation::repository().join(".tools/etcd/etcd"),
    };
    ensure!(
        path.is_file(),
        "etcd is missing at {}: run deploy/tools/fetch-etcd.sh, or set ISTHMUS_ETCD",
        path.display()
    );
    path.canonicalize().context("resolve etcd's path")
}

/// `etcdserverpb.PutRequest`, as far as it is used.
#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `etcdserverpb.RangeRequest`.
#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

/// Of a put and of a range: the header is the first field of both.
#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
}

/// `etcdserverpb.ResponseHeader`.
#[derive(Clone, PartialEq, Message)]
struct ResponseHeader {
    /// Grows by one with each put.
    #[prost(int64, tag = "3")]
    revision: i64,
}

/// Three members.
pub(super) struct Etcd {
    members: Vec<Process>,
    tls: Arc<rustls::ClientConfig>,
    puts: Arc<Puts>,
    revision: u64,
}

struct Puts {
    next: AtomicU64,
    acknowledged: AtomicU64,
}

impl Etcd {
    pub(super) async fn start(dir: &Path, program: &Path) -> anyhow::Result<Self> {
        let tls = certificates(dir)?;
        let url = |port: u16, number: u8| format!("https://localhost:{}", port + u16::from(number));
        let at = |port: u16, number: u8| format!("https://127.0.0.1:{}", port + u16::from(number));
        let group: Vec<String> = (1..=NODES).map(|n| format!("etcd-{n}={}", url(PEERS, n))).collect();
        let mut members = Vec::new();
        for number in 1..=NODES {
            let name = format!("etcd-{number}");
            let mut process = Process::new(&name, program, dir).arg("--data-dir").arg(dir.join(&name)).args([
                format!("--name={name}"),
                format!("--listen-client-urls={}", at(CLIENTS, number)),
                format!("--advertise-client-urls={}", url(CLIENTS, number)),
                format!("--listen-peer-urls={}", at(PEERS, number)),
                format!("--initial-advertise-peer-urls={}", url(PEERS, number)),
                format!("--initial-cluster={}", group.join(",")),
                "--initial-cluster-state=new".to_owned(),
            ]);
            for kind in ["", "peer-"] {
                process = process.arg(format!("--{kind}client-cert-auth")).args(
                    [("trusted-ca-file", "ca.pem"), ("cert-file", "etcd.pem"), ("key-file", "etcd.key")]
                        .map(|(flag, file)| format!("--{kind}{flag}={}", dir.join(file).display())),
                );
            }
            process.start()?;
            members.push(process);
        }
        let puts = Arc::new(Puts { next: AtomicU64::new(0), acknowledged: AtomicU64::new(0) });
        let mut etcd = Self { members, tls, puts, revision: 0 };
        etcd.revision = etcd.ready().await?;
        Ok(etcd)
    }

    /// Waits until a linearizable read is answered, and tells the revision.
    async fn ready(&mut self) -> anyhow::Result<u64> {
        let deadline = Instant::now() + READY;
        loop {
            for member in &mut self.members {
                ensure!(member.is_running(), "{} ended while starting; {}", member.name(), member.tail());
            }
            match self.last_revision().await {
                Ok(revision) => return Ok(revision),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    async fn last_revision(&self) -> anyhow::Result<u64> {
        let mut tasks = JoinSet::new();
        let mut connection = Connection::open(address(NODES), &self.tls, &mut tasks).await?;
        let answer = connection.exchange(call("Range", &RangeRequest { key: b"0".to_vec() })?).await?;
        response(&answer)
    }
}

fn address(number: u8) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], CLIENTS + u16::from(number)))
}

/// `ca.pem`, `etcd.pem` and `etcd.key` in `dir`: members and clients show the same certificate.
fn certificates(dir: &Path) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let domain = FEDERATION.parse().context("the federation's name")?;
    let ca = CertificateAuthority::load_or_create(dir, &domain).context("make a CA")?;
    let key = KeyPair::generate()?;
    let id = SpiffeId::new(&domain, &["etcd"]).context("a SPIFFE ID")?;
    let svid = Svid::new(ca.sign_csr(&key.csr_der()?, &id, &["localhost".to_owned()], LIFETIME)?, &key)?;
    svid.save(dir, "etcd").context("save a certificate")?;
    client_tls(Some(&IdentitySource::new(svid)), vec![ca.root_der().clone()])
}

impl Contender for Etcd {
    fn name(&self) -> &'static str {
        metrics::ETCD
    }

    fn writes(&self) -> Arc<dyn Writes> {
        self.puts.clone()
    }

    fn pids(&mut self) -> anyhow::Result<Vec<u32>> {
        let pid = |member: &mut Process| {
            ensure!(member.is_running(), "{} has ended; {}", member.name(), member.tail());
            member.pid().with_context(|| format!("{} does not run", member.name()))
        };
        self.members.iter_mut().map(pid).collect()
    }

    fn connect(&self, count: usize) -> BoxFuture<'_, anyhow::Result<Connections>> {
        async move {
            let (mut of_node, mut tasks) = (Vec::new(), JoinSet::new());
            for number in 1..=NODES {
                let mut connections = Vec::new();
                for _ in 0..count {
                    connections.push(Connection::open(address(number), &self.tls, &mut tasks).await?);
                }
                of_node.push(connections);
            }
            Ok(Connections { of_node, _tasks: tasks })
        }
        .boxed()
    }

    fn kept(&mut self) -> BoxFuture<'_, anyhow::Result<(u64, u64)>> {
        async move {
            let kept = self.last_revision().await?.saturating_sub(self.revision);
            Ok((kept, self.puts.acknowledged.load(Ordering::Relaxed)))
        }
        .boxed()
    }

    fn stop(mut self: Box<Self>) -> BoxFuture<'static, ()> {
        async move {
            self.members.iter_mut().for_each(Process::terminate);
            let deadline = Instant::now() + Duration::from_secs(10);
            for member in &mut self.members {
                member.reap_until(deadline).await;
            }
        }
        .boxed()
    }
}

impl Writes for Puts {
    fn request(&self) -> anyhow::Result<Request<Full<Bytes>>> {
        let nth = self.next.fetch_add(1, Ordering::Relaxed);
        let mut value = vec![b'x'; VALUE];
        value.iter_mut().zip(nth.to_be_bytes()).for_each(|(to, from)| *to = from);
        call("Put", &PutRequest { key: format!("key-{:08}", nth % KEYS).into_bytes(), value })
    }

    fn committed(&self, answer: &Answer) -> anyhow::Result<()> {
        ensure!(response(answer)? > 0, "the store has not begun");
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A gRPC call.
fn call(method: &str, message: &impl Message) -> anyhow::Result<Request<Full<Bytes>>> {
    let length = u32::try_from(message.encoded_len()).context("a short message")?;
    // Not compressed, so long.
    let mut body = vec![0];
    body.extend_from_slice(&length.to_be_bytes());
    message.encode(&mut body).context("encode a message")?;
    Request::post(format!("https://localhost/etcdserverpb.KV/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(body)))
        .context("make a request")
}

/// The revision in the answer to one.
fn response(answer: &Answer) -> anyhow::Result<u64> {
    ensure!(answer.status == StatusCode::OK, "etcd says {}", answer.status);
    // With an error and no message, what else is a trailer is in the head.
    let said = |name: &str| {
        let value = answer.trailers.get(name).or_else(|| answer.head.get(name))?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let status = said("grpc-status").context("the answer ends without a status")?;
    ensure!(status == "0", "etcd says {status}: {}", said("grpc-message").unwrap_or_default());
    let message = answer.body.get(5..).context("the answer is empty")?;
    let header = Response::decode(message).context("understand the answer")?.header.context("a header")?;
    u64::try_from(header.revision).context("a revision")
}

#[cfg(test)]
mod tests {
    use hyper::HeaderMap;

    use super::*;

    fn answer(status: &str, body: Vec<u8>) -> Answer {
        let trailers = HeaderMap::from_iter([("grpc-status".parse().unwrap(), status.parse().unwrap())]);
        Answer { status: StatusCode::OK, head: HeaderMap::new(), body: body.into(), trailers }
    }

    #[test]
    fn only_an_answer_without_an_error_and_with_a_revision_is_a_committed_write() {
        let message = Response { header: Some(ResponseHeader { revision: 7 }) }.encode_to_vec();
        let body: Vec<u8> = [0, 0, 0, 0, message.len() as u8].into_iter().chain(message).collect();
        assert_eq!(response(&answer("0", body.clone())).unwrap(), 7);
        assert!(response(&answer("14", body)).unwrap_err().to_string().contains("14"));
        assert!(response(&answer("0", Vec::new())).is_err());
    }
}
