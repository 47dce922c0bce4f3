//! A cluster's Kubernetes objects, as files: one per service, as a user would keep them.

use std::path::Path;

use anyhow::Context;

use super::layout::{ClusterLayout, WorkloadLayout};

/// Writes the shop's manifests into `folder`, each file at once (written aside, then renamed).
pub fn write(folder: &Path, layout: &ClusterLayout) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    replace(folder, "namespace.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: { name: shop }\n")?;
    for workload in &layout.workloads {
        replace(folder, &format!("{}.yaml", workload.app), &service(workload))?;
    }
    Ok(())
}

/// Writes `text` as `folder/name` in one step, so that a watcher never reads half a file.
pub fn replace(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let aside = folder.join(format!(".{name}.tmp"));
    std::fs::write(&aside, text).with_context(|| format!("write {}", aside.display()))?;
    std::fs::rename(&aside, folder.join(name)).with_context(|| format!("rename to {name}"))
}

/// Service, EndpointSlice and, for all but `web`, ServiceExport.
pub fn service(workload: &WorkloadLayout) -> String {
    let WorkloadLayout { app, ip, ports, .. } = workload;
    let mut service_ports = String::new();
    let mut slice_ports = String::new();
    for (name, port, _, protocol) in ports {
        service_ports += &format!(
            "    - {{ name: {name}, port: {port}, targetPort: {port}, protocol: TCP, appProtocol: {protocol} }}\n"
        );
        slice_ports += &format!("  - {{ name: {name}, port: {port}, protocol: TCP }}\n");
    }
    let mut text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {app}, namespace: shop }}\nspec:\n  selector: {{ app: {app} }}\n  \
         ports:\n{service_ports}---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {app}-1\n  \
         namespace: shop\n  labels: {{ kubernetes.io/service-name: {app} }}\naddressType: IPv4\nports:\n{slice_ports}\
         endpoints:\n  - addresses: [\"{ip}\"]\n    conditions: {{ ready: true }}\n"
    );
    if *app != "web" {
        text += &format!(
            "---\napiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\n\
             metadata:\n  name: {app}\n  namespace: shop\n  creationTimestamp: \"2026-01-01T00:00:00Z\"\n"
        );
    }
    text
}
