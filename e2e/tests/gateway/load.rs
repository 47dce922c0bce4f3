//! Clients and endpoints on both sides of the gateways. A client's hello carries its connection's number where TLS has
//! its random bytes, so that the endpoint that gets it knows the plan, and checks that the hello came whole.

use std::{
    collections::HashMap,
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use isthmus_model::sni;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};

use crate::{
    carry::{Seen, play},
    plan::{Plan, Sender},
    rig::{FEDERATION, service},
};

/// Where a ClientHello has its random bytes: after the headers of record and handshake, and the version.
const RANDOM: usize = 5 + 4 + 2;
/// For one connection, all of it.
const DEADLINE: Duration = Duration::from_secs(120);

/// Not yet answered at one time: systems keep no more than 1,024 or so waiting for a program that is slow to accept.
const OPENING: usize = 400;

/// Why a connection did not come to its end at both ends.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The gateway takes no connection.
    Refused(io::Error),
    /// It took the connection, and broke it before any endpoint had it.
    Nobody(Option<Seen>),
    /// It is not over in time.
    Hangs,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => write!(f, "connect to the gateway: {error}"),
            Self::Nobody(client) => write!(f, "no endpoint got it; the client saw {client:?}"),
            Self::Hangs => write!(f, "hangs: not over after {DEADLINE:?}"),
        }
    }
}

/// Both ends of all connections.
pub(crate) struct Load {
    pub(crate) endpoints: Vec<SocketAddr>,
    hello: Vec<u8>,
    opening: Arc<Semaphore>,
    expected: Mutex<HashMap<u64, Expected>>,
    /// What endpoints saw that nobody had announced.
    strange: Mutex<Vec<String>>,
}

struct Expected {
    plan: Arc<Plan>,
    seen: mpsc::Sender<Seen>,
}

impl Load {
    /// With two endpoints that serve from now on. Clients ask for any cluster, or for `pinned`.
    pub(crate) async fn serve(pinned: Option<&str>) -> Arc<Self> {
        // An address each, as endpoints have.
        let listeners =
            [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.2:0").await.unwrap()];
        let load = Arc::new(Self {
            endpoints: listeners.iter().map(|l| l.local_addr().unwrap()).collect(),
            hello: hello(pinned),
            opening: Arc::new(Semaphore::new(OPENING)),
            expected: Mutex::default(),
            strange: Mutex::default(),
        });
        for listener in listeners {
            let load = load.clone();
            tokio::spawn(async move {
                loop {
                    let (tcp, _) = listener.accept().await.unwrap();
                    tokio::spawn(load.clone().endpoint(tcp));
                }
            });
        }
        load
    }

    /// One connection by way of the gateway at `entry`, to its end at both ends.
    pub(crate) async fn connection(&self, entry: SocketAddr, plan: &Arc<Plan>) -> Result<(Seen, Seen), Fault> {
        // A replayed hello makes the endpoints' side play more than once; the last one counts.
        let (seen, mut servers) = mpsc::channel(8);
        self.expected.lock().unwrap().insert(plan.id, Expected { plan: plan.clone(), seen });
        let outcome = timeout(DEADLINE, async {
            let opening = self.opening.clone().acquire_owned().await.unwrap();
            let mut tcp = TcpStream::connect(entry).await.map_err(Fault::Refused)?;
            tcp.write_all(&self.hello_of(plan.id)).await.map_err(|_| Fault::Nobody(None))?;
            let client = play(tcp, plan, Sender::Client, Some(opening)).await;
            // Whoever plays keeps a sender of its own until its end.
            self.expected.lock().unwrap().remove(&plan.id);
            let mut server = None;
            while let Some(seen) = servers.recv().await {
                server = Some(seen);
            }
            match server {
                Some(server) => Ok((client, server)),
                None => Err(Fault::Nobody(Some(client))),
            }
        })
        .await;
        self.expected.lock().unwrap().remove(&plan.id);
        outcome.unwrap_or(Err(Fault::Hangs))
    }

    /// What endpoints saw that nobody had announced, since the last time.
    pub(crate) fn strange(&self) -> Vec<String> {
        std::mem::take(&mut *self.strange.lock().unwrap())
    }

    fn hello_of(&self, id: u64) -> Vec<u8> {
        let mut hello = self.hello.clone();
        hello[RANDOM..RANDOM + 8].copy_from_slice(&id.to_be_bytes());
        hello
    }

    async fn endpoint(self: Arc<Self>, mut tcp: TcpStream) {
        let mut hello = vec![0; self.hello.len()];
        let mut read = 0;
        while read < hello.len() {
            match tcp.read(&mut hello[read..]).await {
                Ok(n) if n > 0 => read += n,
                // Probes connect and say nothing; a gateway that is killed may have said half of it.
                _ => return,
            }
        }
        let id = u64::from_be_bytes(hello[RANDOM..RANDOM + 8].try_into().unwrap());
        if hello != self.hello_of(id) {
            return self.strange.lock().unwrap().push(format!("a hello came changed: {hello:02x?}"));
        }
        let known = self.expected.lock().unwrap().get(&id).map(|e| (e.plan.clone(), e.seen.clone()));
        // One whose client has left already has nobody to tell.
        let Some((plan, seen)) = known else { return };
        let saw = play(tcp, &plan, Sender::Server, None).await;
        drop(seen.try_send(saw));
    }
}

/// A real one, post-quantum and so larger than a segment, for `shop/orders:80` in any cluster or in `pinned`.
fn hello(pinned: Option<&str>) -> Vec<u8> {
    let cluster = pinned.map(|name| name.parse().unwrap());
    let route = sni::Route { service: service(), port: 80, cluster, selector: None };
    let name = sni::encode(&route, &FEDERATION.parse().unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
    let mut out = Vec::new();
    client.write_tls(&mut out).unwrap();
    out
}
