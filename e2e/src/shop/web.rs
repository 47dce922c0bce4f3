//! `web`: asks `cart`, `catalog` and `orders` by their global names and shows who answered.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use axum::{Json, Router, extract::State, routing::get};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};

use super::{
    Answer, orders,
    proto::{LookupRequest, LookupResponse, catalog_client::CatalogClient},
};

const ZONE: &str = "shop.svc.clusterset.local";
/// What an app would wait for an answer.
const DEADLINE: Duration = Duration::from_secs(5);
const RESOLVE_TRIES: u32 = 20;
const RESOLVE_PAUSE: Duration = Duration::from_millis(50);

/// How `web` finds and calls the others: the cluster's DNS server, then plain TCP to the name's VIP.
pub struct Shop {
    resolver: hickory_resolver::TokioResolver,
    http: Client<HttpConnector, Empty<Bytes>>,
}

impl Shop {
    /// Uses the DNS server at `dns`. Connections are pooled, as an app's would be.
    pub fn new(dns: SocketAddr) -> anyhow::Result<Self> {
        use hickory_resolver::{
            TokioResolver,
            config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts},
            net::runtime::TokioRuntimeProvider,
        };
        let mut udp = ConnectionConfig::udp();
        udp.port = dns.port();
        let mut tcp = ConnectionConfig::tcp();
        tcp.port = dns.port();
        let server = NameServerConfig::new(dns.ip(), true, vec![udp, tcp]);
        let config = ResolverConfig::from_parts(None, vec![], vec![server]);
        let mut options = ResolverOpts::default();
        options.attempts = 3;
        options.timeout = Duration::from_secs(1);
        let resolver = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .context("set up the resolver")?;
        Ok(Self { resolver, http: Client::builder(TokioExecutor::new()).build_http() })
    }

    /// The VIP of `name` in the shop namespace. A server that refuses is asked again, as stub resolvers do: this one has
    /// no second server to turn to while the first restarts.
    pub async fn resolve(&self, name: &str) -> anyhow::Result<IpAddr> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.resolver.lookup_ip(format!("{name}.{ZONE}.")).await {
                Ok(found) => return found.iter().next().context("the name has no address"),
                Err(e) if tries == RESOLVE_TRIES || e.is_no_records_found() => return Err(e).context("resolve"),
                Err(_) => sleep(RESOLVE_PAUSE).await,
            }
        }
    }

    /// `GET /<path>` of an HTTP service.
    pub async fn get(&self, service: &str, port: u16, path: &str) -> anyhow::Result<Answer> {
        let run = async {
            let ip = self.resolve(service).await?;
            let request = hyper::Request::get(format!("http://{}/{path}", SocketAddr::new(ip, port)))
                .header("host", format!("{service}.{ZONE}"))
                .body(Empty::<Bytes>::new())?;
            let response = self.http.request(request).await.context("request")?;
            let status = response.status();
            let body = response.into_body().collect().await.context("body")?.to_bytes();
            ensure!(status.is_success(), "status {status}: {}", String::from_utf8_lossy(&body));
            serde_json::from_slice(&body).context("read the answer")
        };
        timeout(DEADLINE, run).await.context("timed out")?
    }

    /// One gRPC call to catalog.
    pub async fn lookup(&self, port: u16, item: &str) -> anyhow::Result<LookupResponse> {
        let run = async {
            let ip = self.resolve("catalog").await?;
            let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", SocketAddr::new(ip, port)))?
                .connect()
                .await
                .context("connect")?;
            let item = item.to_owned();
            Ok(CatalogClient::new(channel).lookup(LookupRequest { item }).await.context("lookup")?.into_inner())
        };
        timeout(DEADLINE, run).await.context("timed out")?
    }

    /// One order; returns the cluster that took it.
    pub async fn order(&self, port: u16, text: &str) -> anyhow::Result<String> {
        let ip = timeout(DEADLINE, self.resolve("orders")).await.context("resolve timed out")??;
        orders::place_order(SocketAddr::new(ip, port), text, DEADLINE).await
    }
}

/// Ports of the sample app's services, the same in every cluster.
pub mod ports {
    /// cart, HTTP/1.1.
    pub const CART: u16 = 8080;
    /// catalog, HTTP/1.1.
    pub const CATALOG: u16 = 8080;
    /// catalog, gRPC.
    pub const CATALOG_GRPC: u16 = 9090;
    /// orders, server-first TCP.
    pub const ORDERS: u16 = 7000;
    /// web, HTTP/1.1.
    pub const WEB: u16 = 8080;
}

/// Serves the shop's front page on `listener`: one call to each service, as JSON.
pub async fn serve(listener: TcpListener, shop: Arc<Shop>) -> anyhow::Result<()> {
    let app = Router::new().route("/", get(front)).with_state(shop);
    axum::serve(listener, app).await.context("serve HTTP")
}

async fn front(State(shop): State<Arc<Shop>>) -> Json<Value> {
    let (cart, catalog, lookup, order) = tokio::join!(
        shop.get("cart", ports::CART, "items"),
        shop.get("catalog", ports::CATALOG, "items"),
        shop.lookup(ports::CATALOG_GRPC, "tea"),
        shop.order(ports::ORDERS, "tea"),
    );
    let show = |r: anyhow::Result<Value>| r.unwrap_or_else(|e| json!({ "error": format!("{e:#}") }));
    Json(json!({
        "cart": show(cart.and_then(|a| Ok(serde_json::to_value(a)?))),
        "catalog": show(catalog.and_then(|a| Ok(serde_json::to_value(a)?))),
        "catalog (gRPC)": show(lookup.map(|l| json!({ "item": l.item, "priceCents": l.price_cents, "cluster": l.cluster, "instance": l.instance, "caller": l.caller }))),
        "orders": show(order.map(|cluster| json!({ "cluster": cluster }))),
    }))
}
