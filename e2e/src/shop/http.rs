//! `cart` and `catalog`: HTTP/1.1 on one port and, for catalog, gRPC on another.

use anyhow::Context;
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, Method, Uri},
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

use super::{
    Answer, Instance, caller_of,
    proto::{
        LookupRequest, LookupResponse,
        catalog_server::{Catalog, CatalogServer},
    },
};

const XFCC: &str = "x-forwarded-client-cert";

/// Serves HTTP/1.1 on `listener`: every path answers with an [`Answer`].
pub async fn serve(listener: TcpListener, service: String, me: Instance) -> anyhow::Result<()> {
    let app = Router::new().fallback(answer).with_state((service, me));
    axum::serve(listener, app).await.context("serve HTTP")
}

async fn answer(
    State((service, me)): State<(String, Instance)>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
) -> Json<Answer> {
    let caller = headers.get(XFCC).and_then(|v| v.to_str().ok()).map(caller_of).unwrap_or_default();
    Json(Answer { service, cluster: me.cluster, instance: me.instance, caller, request: format!("{method} {uri}") })
}

/// Serves catalog's gRPC on `listener`.
pub async fn serve_grpc(listener: TcpListener, me: Instance) -> anyhow::Result<()> {
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tonic::transport::Server::builder()
        .add_service(CatalogServer::new(CatalogService { me }))
        .serve_with_incoming(incoming)
        .await
        .context("serve gRPC")
}

struct CatalogService {
    me: Instance,
}

#[tonic::async_trait]
impl Catalog for CatalogService {
    async fn lookup(&self, request: Request<LookupRequest>) -> Result<Response<LookupResponse>, Status> {
        let caller = request.metadata().get(XFCC).and_then(|v| v.to_str().ok()).map(caller_of).unwrap_or_default();
        let item = request.into_inner().item;
        let price_cents = item.bytes().fold(99, |sum, b| sum + u32::from(b));
        let Instance { cluster, instance } = self.me.clone();
        Ok(Response::new(LookupResponse { item, price_cents, cluster, instance, caller }))
    }
}
