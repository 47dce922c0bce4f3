//! Our gateways as a system under test: configured as deployed by default, but for what the number of connections asks for.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use isthmus_model::{ids::ServiceName, sni};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    certificates::{cluster, federation, stem},
    place::{End, Place},
    process::{Process, this_program},
    system::{Ports, Setting, System},
};
use crate::node::Spec;

const PORT: u16 = 80;
/// For a link to come back.
const LINKS_UP: Duration = Duration::from_secs(5);

fn service() -> anyhow::Result<ServiceName> {
    ServiceName::new("shop", "orders").context("the service's name")
}

/// The name in every ClientHello; Envoy's passthrough routes by it too.
pub(super) fn server_name() -> anyhow::Result<String> {
    let route = sni::Route { service: service()?, port: PORT, cluster: None, selector: None };
    sni::encode(&route, &federation()?).context("the route has no name")
}

/// The gateway's configuration for `system`, at `end`.
fn config(system: System, setting: &Setting, ports: Ports, end: End) -> Value {
    let entry = ports.entry(&setting.place).port();
    let mut config = json!({
        "name": "gateway-1",
        "stateDir": setting.dir.join(stem(end)),
        "listen": {
            "tunnel": ports.tunnel(&setting.place, end),
            "local": setting.place.local(end),
            "autoPort": entry,
            "pinnedPortBase": ports.spare(),
            "health": ports.admin(&setting.place, end),
        },
        // As Envoy's: no access log, which would name every connection that a client resets.
        "telemetry": { "log": { "level": "info,access=off" } },
        "tunnel": { "transport": transport(system), "maxStreamsPerPeer": setting.streams },
    });
    lay_over(&mut config, &setting.ours);
    config
}

/// What `--ours` takes: an object.
pub(super) fn keys(text: &str) -> anyhow::Result<Value> {
    let value: Value = serde_json::from_str(text).context("this is not JSON")?;
    ensure!(value.is_object(), "write an object, such as {{\"tunnel\":{{\"mtu\":6400}}}}");
    Ok(value)
}

/// Sets the keys of `over`, and leaves the others.
fn lay_over(config: &mut Value, over: &Value) {
    match (config, over) {
        (Value::Object(config), Value::Object(over)) => {
            for (key, value) in over {
                lay_over(config.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (config, value) => *config = value.clone(),
    }
}

/// The value of `tunnel.transport`.
fn transport(system: System) -> &'static str {
    if system == System::OursTcp { "tcp" } else { "quic" }
}

/// Starts both sides, near first.
pub(super) fn start(system: System, setting: &Setting, ports: Ports) -> anyhow::Result<[Process; 2]> {
    let side = |end: End| -> anyhow::Result<Process> {
        let name = format!("{}-{}", system.name(), stem(end));
        let spec = Spec {
            config: config(system, setting, ports, end),
            cluster: cluster(end)?,
            federation: federation()?,
            certificates: setting.certificates.dir().to_owned(),
            identity: stem(end).to_owned(),
            members: [End::Near, End::Far]
                .into_iter()
                .map(|end| Ok((cluster(end)?, vec![ports.tunnel(&setting.place, end)])))
                .collect::<anyhow::Result<_>>()?,
            service: service()?,
            port: PORT,
            exporters: vec![cluster(End::Far)?],
            endpoints: if end == End::Far { vec![setting.server()] } else { Vec::new() },
        };
        let path = setting.dir.join(format!("{name}.json"));
        spec.write(&path)?;
        let program = this_program();
        let mut command = setting.place.command(end, program);
        command.args([crate::INTERNAL_NODE, "--spec"]).arg(&path);
        Process::start(&name, command, &setting.dir)
    };
    Ok([side(End::Near)?, side(End::Far)?])
}

/// Its own word for what its links run over. Links that are down just now say nothing; one must.
pub(super) async fn prove(system: System, place: &Place, ports: Ports) -> anyhow::Result<()> {
    let deadline = Instant::now() + LINKS_UP;
    loop {
        let text = place.http_get(End::Near, ports.admin(place, End::Near), "/debug/tunnels").await?;
        let tunnels: Vec<Value> = serde_json::from_str(&text).context("read /debug/tunnels")?;
        let carriers: Vec<&str> = tunnels.iter().filter_map(|t| t.get("transport")?.as_str()).collect();
        let wanted = transport(system);
        let other = carriers.iter().find(|carrier| **carrier != wanted);
        ensure!(other.is_none(), "a link runs over {}, not {wanted}", other.unwrap_or(&""));
        if !carriers.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no link is up: {text}");
        sleep(Duration::from_millis(100)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_laid_over_and_the_others_stay() {
        let mut config = json!({ "name": "a", "tunnel": { "transport": "quic", "mtu": 1_452 } });
        lay_over(&mut config, &keys(r#"{"tunnel":{"mtu":6400,"congestion":"bbr"}}"#).unwrap());
        let expected = json!({ "name": "a", "tunnel": { "transport": "quic", "mtu": 6_400, "congestion": "bbr" } });
        assert_eq!(config, expected);
        let before = config.clone();
        lay_over(&mut config, &Value::Null);
        assert_eq!(config, before);
        assert!(keys("[1]").is_err() && keys("tunnel").is_err());
    }
}
