//! What an operator types, against a real control plane and a real agent: the programs' own words are checked, and printed
//! for people to look at.
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unwrap_used, reason = "test code")]

use std::{fmt::Write as _, net::SocketAddr, path::PathBuf, time::Duration};

use isthmus_e2e::federation::process::{Process, program};
use isthmus_runtime::wait::wait_for;
use tempfile::TempDir;
use tokio::process::Command;

const READY: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

/// A control plane and an agent of cluster us-east, on addresses of their own. Dropping it kills them.
struct Rig {
    dir: TempDir,
    _control_plane: Process,
    agent: Process,
}

/// What a command printed.
struct Said {
    ok: bool,
    out: String,
    err: String,
}

fn at(fourth: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([127, 9, 1, fourth], port))
}

impl Rig {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("global-cp.yaml");
        let text = format!(
            "node: cp-1\nfederation: isthmus.example\nstateDir: {}\n\
             listen: {{ grpc: \"{}\", admin: \"{}\", health: \"{}\" }}\n\
             raft: {{ segmentBytes: 262144 }}\ntelemetry: {{ log: {{ level: info, format: text }} }}\n",
            dir.path().join("cp").display(),
            at(1, 7443),
            at(1, 7444),
            at(1, 9900)
        );
        std::fs::write(&config, text).unwrap();
        let binary = program("isthmus-global-cp").unwrap();
        let mut control_plane =
            Process::new("cp-1", &binary, dir.path()).arg("--config").arg(&config).health(at(1, 9900));
        control_plane.start().unwrap();
        control_plane.ready(READY).await.unwrap();

        let home = dir.path().join("us-east");
        std::fs::create_dir_all(home.join("manifests")).unwrap();
        let config = home.join("agent.yaml");
        let text = format!(
            "cluster: us-east\ntrustDomain: us-east.example\nlocality: {{ region: us, zone: us-east-1 }}\n\
             stateDir: {home}/agent\nmanifests: {home}/manifests\njoinTokenFile: {home}/join-token\n\
             listen: {{ local: \"{local}\", health: \"{health}\" }}\nadvertise: \"{local}\"\nvipRange: 127.99.0.0/16\n\
             telemetry: {{ log: {{ level: info, format: text }} }}\n",
            home = home.display(),
            local = at(2, 7445),
            health = at(2, 9900),
        );
        std::fs::write(&config, text).unwrap();
        let binary = program("isthmus-agent").unwrap();
        let agent =
            Process::new("us-east", &binary, dir.path()).arg("run").arg("--config").arg(&config).health(at(2, 9900));
        Self { dir, _control_plane: control_plane, agent }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs one command line, and shows it with what it printed.
    async fn isthmusctl(&self, line: &str) -> Said {
        let output = Command::new(program("isthmusctl").unwrap())
            .args(line.split_whitespace())
            .env("ISTHMUS_CONTEXT", self.path("cp/admin/context.yaml"))
            .current_dir(self.dir.path())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(SOON, output).await.expect("it ends in time").unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let said = Said { ok: output.status.success(), out: text(output.stdout), err: text(output.stderr) };
        println!("$ isthmusctl {line}\n{}{}", said.out, said.err);
        said
    }

    async fn fine(&self, line: &str) -> String {
        let said = self.isthmusctl(line).await;
        assert!(said.ok, "{line}: {}", said.err);
        said.out
    }

    /// Until `line` prints all of `parts`.
    async fn until(&self, line: &str, parts: &[&str]) {
        let said = async || {
            let out = self.isthmusctl(line).await.out;
            parts.iter().all(|part| out.contains(part))
        };
        wait_for(&format!("{line} to say {parts:?}"), SOON, said).await.unwrap();
    }

    /// Exports services s0 to s(n-1) of namespace shop.
    fn export(&self, n: usize) {
        let mut text = String::new();
        for i in 0..n {
            write!(
                text,
                "apiVersion: v1\nkind: Service\nmetadata: {{ name: s{i}, namespace: shop }}\n\
                 spec: {{ ports: [{{ name: http, port: 80, appProtocol: http }}] }}\n---\n\
                 apiVersion: multicluster.x-k8s.io/v1beta1\nkind: ServiceExport\n\
                 metadata: {{ name: s{i}, namespace: shop }}\n---\n"
            )
            .unwrap();
        }
        let (aside, file) = (self.path("services.new"), self.path("us-east/manifests/services.yaml"));
        std::fs::write(&aside, text).unwrap();
        std::fs::rename(aside, file).unwrap();
    }
}

#[tokio::test]
async fn an_operators_day() {
    let mut rig = Rig::start().await;

    // Admission: pending until it joins, and told what it may do.
    let said = rig.isthmusctl("cluster join-token us-east").await;
    assert!(said.ok && said.err.contains("--export-namespaces"), "{}", said.err);
    std::fs::write(rig.path("us-east/join-token"), said.out.trim()).unwrap();
    assert!(rig.fine("get clusters").await.contains("us-east  pending"));
    rig.export(12);
    rig.agent.start().unwrap();
    rig.agent.ready(READY).await.unwrap();
    rig.until("get clusters", &["us-east  active", " 12\n"]).await;
    assert!(rig.fine("get clustergrants").await.contains("us-east  *           *           gateway,dns"));
    assert!(rig.fine("describe service shop/s0").await.contains("spiffe://us-east.example/ns/shop/sa/s0"));

    // A grant, as a file: looked at, tried, applied, seen by the agent.
    let yaml = rig.fine("get clustergrant us-east -o yaml").await;
    let narrow = yaml.replace("exportNamespaces:\n    - '*'", "exportNamespaces:\n    - pay");
    let narrow = narrow.replace("exportNamespaces:\n  - '*'", "exportNamespaces:\n  - pay");
    let narrow = narrow.replace("exportNamespaces:\n    - \"*\"", "exportNamespaces:\n    - pay");
    let narrow = narrow.replace("exportNamespaces:\n  - \"*\"", "exportNamespaces:\n  - pay");
    assert_ne!(yaml, narrow, "{yaml}");
    std::fs::write(rig.path("grant.yaml"), &narrow).unwrap();
    let said = rig.isthmusctl("diff -f grant.yaml").await;
    assert!(!said.ok && said.out.contains("pay"), "exit code 1 means a difference");
    assert!(rig.fine("apply -f grant.yaml --dry-run").await.contains("nothing was changed"));
    assert!(rig.fine("apply -f grant.yaml").await.contains("ClusterGrant/us-east created"));
    rig.until("status", &["ServiceExport shop/s0", "NotGranted"]).await;
    assert!(rig.fine("get services").await.contains("No service is exported"));
    assert!(rig.fine("apply -f grant.yaml").await.contains("unchanged"));
    assert!(rig.fine("delete clustergrant us-east").await.contains("deleted"));
    rig.until("get services", &["shop/s11"]).await;

    // What is wrong is told with its place, all of it, and nothing happens.
    std::fs::write(rig.path("bad.yaml"), "kind: ClusterGrant\n---\napiVersion: isthmus.io/v1alpha1\nkind: Frob\n")
        .unwrap();
    let said = rig.isthmusctl("apply -f bad.yaml").await;
    assert!(
        !said.ok && said.err.contains("bad.yaml:1: apiVersion") && said.err.contains("bad.yaml:4: kind"),
        "{}",
        said.err
    );
    let said = rig.isthmusctl("apply -f nowhere.yaml").await;
    assert!(!said.ok && said.err.contains("nowhere.yaml"), "{}", said.err);
    let said = rig.isthmusctl("get services shop/s00").await;
    assert!(!said.ok && said.err.contains("did you mean shop/s0"), "{}", said.err);

    // Most exports vanish at once: they stay until somebody says so.
    rig.export(2);
    rig.until("describe cluster us-east", &["10 exports were withdrawn at once", "WithdrawalHeld"]).await;
    assert!(rig.fine("get services").await.contains("shop/s11"));
    rig.fine("cluster confirm-withdrawal us-east").await;
    rig.until("get clusters", &[" 2\n"]).await;

    // Maintenance, history, and back.
    assert!(rig.fine("cluster drain us-east").await.contains("us-east is draining"));
    rig.until("explain shop/s0 --from us-east", &["own cluster"]).await;
    assert!(rig.fine("cluster undrain us-east").await.contains("takes traffic again"));
    let history = rig.fine("history").await;
    for action in ["join", "apply", "confirm-withdrawal", "drain", "undrain"] {
        assert!(history.contains(action), "{action} is not in the history");
    }
    rig.fine("backup state.isthmus").await;
    let said = rig.isthmusctl("backup state.isthmus").await;
    assert!(!said.ok && said.err.contains("state.isthmus"), "an existing file is not replaced: {}", said.err);
    rig.fine("wait --timeout 15s").await;
}
