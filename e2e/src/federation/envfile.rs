//! `target/demo/env`: shell variables with every address, pid, log and credential file, so that other tools can attach.

use std::{fmt::Write as _, path::Path};

use anyhow::Context;

use super::{Federation, layout::ControlPlaneLayout, process::Process};

/// Writes the file, replacing an older one.
pub fn write(federation: &Federation, path: &Path) -> anyhow::Result<()> {
    let mut text = String::from("# The running demo. Load it with: . target/demo/env\n");
    let mut set = |key: &str, value: &dyn std::fmt::Display| {
        // Values are paths, addresses and numbers; quotes guard against spaces in paths.
        writeln!(text, "{key}='{value}'").ok();
    };
    let cp = ControlPlaneLayout::new(federation.base);
    set("ISTHMUS_CONTEXT", &federation.ctl.context().display());
    set("GLOBAL_CP_GRPC", &cp.grpc);
    set("GLOBAL_CP_ADMIN", &cp.admin);
    set("GLOBAL_CP_HEALTH", &cp.health);
    process(&mut set, "GLOBAL_CP", &federation.control_plane);
    for (name, cluster) in &federation.clusters {
        let prefix = shell(name);
        let layout = &cluster.layout;
        set(&format!("{prefix}_AGENT"), &layout.agent);
        set(&format!("{prefix}_AGENT_HEALTH"), &layout.agent_health);
        set(&format!("{prefix}_DNS"), &layout.dns);
        set(&format!("{prefix}_DNS_HEALTH"), &layout.dns_health);
        set(&format!("{prefix}_AGENT_STATE"), &cluster.dir.join("agent").display());
        set(&format!("{prefix}_DNS_STATE"), &cluster.dir.join("dns-1").display());
        set(&format!("{prefix}_MANIFESTS"), &cluster.manifests().display());
        set(&format!("{prefix}_VIPS"), &format!("{}0.0/16", layout.vip_prefix()));
        process(&mut set, &format!("{prefix}_AGENT"), &cluster.agent);
        process(&mut set, &format!("{prefix}_DNS"), &cluster.dns);
        for gateway in &layout.gateways {
            let key = format!("{prefix}_{}", shell(&gateway.name));
            set(&format!("{key}_TUNNEL"), &gateway.tunnel);
            set(&format!("{key}_LOCAL"), &gateway.local);
            set(&format!("{key}_AUTO_PORT"), &gateway.auto_port);
            set(&format!("{key}_PINNED_PORT_BASE"), &gateway.pinned_port_base);
            set(&format!("{key}_HEALTH"), &gateway.health);
            set(&format!("{key}_STATE"), &cluster.dir.join(&gateway.name).display());
            if let Some(running) = cluster.gateways.get(&gateway.name) {
                process(&mut set, &key, running);
            }
        }
        for (app, workload) in &cluster.workloads {
            let key = format!("{prefix}_{}", shell(app));
            set(&format!("{key}_ADDRESS"), &workload.layout.ip);
            for (port, number, local, _) in &workload.layout.ports {
                set(&format!("{key}_{}_PORT", shell(port)), number);
                set(&format!("{key}_{}_APP", shell(port)), local);
            }
            set(&format!("{key}_ENVOY_ADMIN"), &format!("{}:9902", workload.layout.ip));
            set(&format!("{key}_STATE"), &cluster.dir.join(&workload.layout.instance).display());
            process(&mut set, &key, &workload.app);
            process(&mut set, &format!("{key}_SIDECAR"), &workload.sidecar);
        }
    }
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn process(set: &mut impl FnMut(&str, &dyn std::fmt::Display), key: &str, process: &Process) {
    set(&format!("{key}_LOG"), &process.log().display());
    if let Some(pid) = process.pid() {
        set(&format!("{key}_PID"), &pid);
    }
}

fn shell(name: &str) -> String {
    name.to_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}
