//! `GET /debug/view` on the health server: what the agent knows now, as JSON, for people and `jq`.
//!
//! A summary, not an interface: its fields may change. It holds no secrets.

use axum::{Json, Router, extract::State, routing::get};
use isthmus_model::{failover::choose, local::Endpoint, time::Timestamp};
use serde_json::{Value, json};

use crate::{
    hub::Hub,
    status::{Standing, StatusBoard},
};

/// The route.
pub(crate) fn router(hub: Hub, status: StatusBoard) -> Router {
    Router::new().route("/debug/view", get(view)).with_state((hub, status))
}

async fn view(State((hub, status)): State<(Hub, StatusBoard)>) -> Json<Value> {
    let Standing { consumers, problems, tunnels } = status.standing();
    let view = hub.view.borrow().clone();
    let now = Timestamp(isthmus_runtime::now());
    let endpoints: serde_json::Map<String, Value> = view
        .endpoints
        .services
        .iter()
        .map(|(service, endpoints)| {
            let endpoint =
                |e: &Endpoint| json!({ "ip": e.ip, "ports": e.ports, "ready": e.ready, "hasSidecar": e.has_sidecar });
            (service.to_string(), endpoints.iter().map(endpoint).collect())
        })
        .collect();
    let choices: serde_json::Map<String, Value> = view
        .global
        .services
        .values()
        .map(|s| {
            let candidates = choose(s, None, &view.cluster, &view.global, &view.observations, now);
            (s.name.to_string(), json!(candidates))
        })
        .collect();
    Json(json!({
        "cluster": view.cluster,
        "vipRange": view.vip_range,
        "stamp": view.global.stamp,
        "clusters": view.global.clusters,
        "services": view.global.services,
        "endpoints": endpoints,
        "gateways": view.gateways,
        "sidecars": view.sidecars,
        "observations": view.observations,
        "choices": choices,
        "consumers": consumers,
        "problems": problems,
        "tunnels": tunnels,
    }))
}
