//! What goes wrong in an operator's hands, with the real programs: each says what, where and what to do, and nothing that
//! was good is lost.

#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unwrap_used, reason = "test code")]

use std::{path::Path, time::Duration};

use isthmus_e2e::federation::{
    Federation, Options,
    cluster::Cluster,
    layout::{Base, ClusterLayout},
    manifests,
    process::Process,
    repository,
};
use isthmus_runtime::wait::wait_for;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(20);

async fn federation(name: &str, base: u8) -> Federation {
    isthmus_identity::install_crypto();
    let dir = repository().join("target/e2e").join(name);
    let options = Options { dir, hold_down: Duration::from_secs(1), layout: Base(base) };
    Federation::start(options).await.unwrap()
}

/// The clusters' problems, as `isthmusctl status` shows them.
async fn problems(federation: &Federation) -> Vec<Value> {
    let status = federation.ctl.json(&["status"]).await.unwrap();
    let clusters = status["clusters"].as_array().unwrap();
    clusters.iter().flat_map(|c| c["problems"].as_array().cloned().unwrap_or_default()).collect()
}

async fn exports(federation: &Federation) -> Vec<String> {
    let services = federation.ctl.json(&["get", "services"]).await.unwrap();
    services.as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_manifests_and_a_vanished_folder_lose_nothing() {
    let mut federation = federation("manifests", 1).await;
    let layout = federation.layout("us-east", 1, "us");
    federation.join(layout).await.unwrap().write_manifests().unwrap();
    let all = ["shop/cart", "shop/catalog", "shop/orders"];
    wait_for("the exports", DEADLINE, async || exports(&federation).await == all).await.unwrap();

    // A port that is none: file, line and field are named, the last good version stays.
    let folder = federation.cluster("us-east").unwrap().manifests();
    let good = std::fs::read_to_string(folder.join("cart.yaml")).unwrap();
    let bad = good.replacen("port: 8080", "port: 80800", 1);
    let line = 1 + bad.lines().position(|l| l.contains("80800")).unwrap();
    manifests::replace(&folder, "cart.yaml", &bad).unwrap();
    wait_for("the problem in the status", DEADLINE, async || {
        problems(&federation).await.iter().any(|p| {
            p["at"].as_str().unwrap().ends_with(&format!("cart.yaml:{line}"))
                && p["field"].as_str().unwrap().contains("port")
        })
    })
    .await
    .unwrap_or_else(|e| panic!("{e}: wanted cart.yaml:{line}"));
    assert_eq!(exports(&federation).await, all);

    // Not YAML at all.
    manifests::replace(&folder, "cart.yaml", "kind: [Service\n\tport: {").unwrap();
    wait_for("the syntax error in the status", DEADLINE, async || {
        problems(&federation).await.iter().any(|p| p["at"].as_str().unwrap().contains("cart.yaml:"))
    })
    .await
    .unwrap();
    assert_eq!(exports(&federation).await, all);
    manifests::replace(&folder, "cart.yaml", &good).unwrap();
    wait_for("a clean status", DEADLINE, async || problems(&federation).await.is_empty()).await.unwrap();

    // An unmounted folder is not a deletion.
    let aside = folder.with_extension("aside");
    std::fs::rename(&folder, &aside).unwrap();
    wait_for("the folder's problem in the status", DEADLINE, async || {
        problems(&federation).await.iter().any(|p| p["at"].as_str().unwrap().contains("manifests"))
    })
    .await
    .unwrap();
    assert_eq!(exports(&federation).await, all);
    std::fs::rename(&aside, &folder).unwrap();
    wait_for("a clean status", DEADLINE, async || problems(&federation).await.is_empty()).await.unwrap();

    // A deleted file is one.
    std::fs::remove_file(folder.join("cart.yaml")).unwrap();
    wait_for("the withdrawal", DEADLINE, async || exports(&federation).await == all[1..]).await.unwrap();
    federation.stop(DEADLINE).await.unwrap();
}

/// Runs an agent that is expected to give up, and returns what it said.
async fn refused_agent(federation: &Federation, layout: &ClusterLayout, token: &str) -> String {
    let dir = federation.dir.join(format!("refused-{}", layout.name));
    std::fs::create_dir_all(dir.join("manifests")).unwrap();
    std::fs::write(dir.join("join-token"), token).unwrap();
    std::fs::write(dir.join("agent.yaml"), layout.agent_config(&dir)).unwrap();
    let mut agent = Process::new(format!("refused/{}", layout.name), &federation.binaries.agent, &federation.dir)
        .args(["run", "--config"])
        .arg(dir.join("agent.yaml"));
    std::fs::remove_file(agent.log()).ok();
    agent.start().unwrap();
    let status = agent.wait(DEADLINE).await.unwrap();
    assert!(!status.success());
    std::fs::read_to_string(agent.log()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_tokens_and_taken_ports_say_what_to_do() {
    let mut federation = federation("tokens", 2).await;
    let token = federation.ctl.run(&["cluster", "join-token", "us-east"]).await.unwrap();
    let layout = federation.layout("us-east", 1, "us");
    let cluster = Cluster::start(&federation.dir, &federation.binaries, layout.clone(), &token).await.unwrap();
    let hint = "isthmusctl cluster join-token";

    let other = federation.layout("us-east", 2, "us");
    let said = refused_agent(&federation, &other, &token).await;
    assert!(said.contains("used") && said.contains(hint), "a used token: {said}");
    let said = refused_agent(&federation, &other, &token[..token.len() / 2]).await;
    assert!(said.contains("token") && said.contains(hint), "half a token: {said}");
    let said = refused_agent(&federation, &other, "not a token").await;
    assert!(said.contains("token") && said.contains(hint), "no token: {said}");
    let brief = federation.ctl.run(&["cluster", "join-token", "us-east", "--ttl", "1s"]).await.unwrap();
    let minted = isthmus_runtime::now();
    wait_for("the token to expire", DEADLINE, async || isthmus_runtime::now() > minted + 1_100).await.unwrap();
    let said = refused_agent(&federation, &other, &brief).await;
    assert!(said.contains("expired") && said.contains(hint), "an expired token: {said}");

    // A second gateway process with the first one's state, and one on its addresses with a copy of that.
    let gateway = layout.gateways.first().unwrap();
    let config = cluster.dir.join(format!("{}.yaml", gateway.name));
    let said = refused_gateway(&federation, "second", &config).await;
    assert!(said.contains("stateDir") && said.contains("--take-over"), "taken state: {said}");
    let (state, copy) = (cluster.dir.join(&gateway.name), cluster.dir.join("third"));
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(&state).unwrap().map(Result::unwrap).filter(|f| f.file_type().unwrap().is_file()) {
        std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
    }
    let text = std::fs::read_to_string(&config).unwrap();
    let other = text.replace(state.to_str().unwrap(), copy.to_str().unwrap());
    assert_ne!(other, text);
    let config = cluster.dir.join("third.yaml");
    std::fs::write(&config, other).unwrap();
    let said = refused_gateway(&federation, "third", &config).await;
    assert!(said.contains("in use") && said.contains(&gateway.health.ip().to_string()), "a taken port: {said}");
    federation.clusters.insert("us-east".to_owned(), cluster);
    federation.stop(DEADLINE).await.unwrap();
}

/// What a gateway says that must not start.
async fn refused_gateway(federation: &Federation, name: &str, config: &Path) -> String {
    let mut process = Process::new(format!("us-east/{name}"), &federation.binaries.gateway, &federation.dir);
    process = process.arg("--config").arg(config);
    process.start().unwrap();
    assert!(!process.wait(DEADLINE).await.unwrap().success());
    std::fs::read_to_string(process.log()).unwrap()
}

/// Starts the control plane with its state on a disk of `kib` KiB of its own. Needs a mount namespace: a user namespace
/// gives one where there is no root.
fn on_small_disk(federation: &Federation, config: &Path, disk: &Path, kib: u32) -> Process {
    std::fs::create_dir_all(disk).unwrap();
    let mount = format!(
        "mount -t tmpfs -o size={kib}k tmpfs '{disk}' && exec '{cp}' --config '{config}'",
        disk = disk.display(),
        cp = federation.binaries.global_cp.display(),
        config = config.display()
    );
    let process = Process::new("small-disk-cp", Path::new("unshare"), &federation.dir);
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    let process = if root { process } else { process.arg("--map-root-user") };
    process.args(["--mount", "sh", "-c", &mount])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_the_control_plane_and_acknowledges_nothing() {
    let mut federation = federation("full-disk", 3).await;
    federation.control_plane.kill().await.unwrap();
    let layout = isthmus_e2e::federation::layout::ControlPlaneLayout::new(Base(3));
    let disk = federation.dir.join("disk");
    let config = federation.dir.join("small.yaml");
    // Small files, so that the second one is begun soon.
    let text = layout.config(&disk.join("state"), Duration::from_secs(1)) + "raft: { segmentBytes: 262144 }\n";
    std::fs::write(&config, text).unwrap();

    // Too small from the start: it says so and does not listen.
    let mut tiny = on_small_disk(&federation, &config, &disk, 64);
    tiny.start().unwrap();
    assert!(!tiny.wait(DEADLINE).await.unwrap().success());
    let said = std::fs::read_to_string(tiny.log()).unwrap();
    assert!(said.contains("No space left") && said.contains("state"), "{said}");
    std::fs::remove_file(tiny.log()).unwrap();

    // Full in the middle of work: writes fail, the process ends with a clear error, and what was acknowledged is there.
    let mut small = on_small_disk(&federation, &config, &disk, 4096).health(layout.health);
    small.start().unwrap();
    small.ready(DEADLINE).await.unwrap();
    // The disk is visible only in the process's own namespace.
    let inside = format!("/proc/{}/root{}", small.pid().unwrap(), disk.display());
    let context = Path::new(&inside).join("state/admin/context.yaml");
    let ctl = isthmus_e2e::federation::ctl::Isthmusctl::new(&federation.binaries.isthmusctl, &context);
    ctl.run(&["cluster", "join-token", "before"]).await.unwrap();
    // Whatever space is left goes.
    let filler = Path::new(&inside).join("filler");
    let full = std::fs::write(&filler, vec![0; 8 << 20]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
    let mut refused = None;
    for n in 0..2_000 {
        let answer = ctl.try_run(&["cluster", "join-token", &format!("c{n}")]).await.unwrap();
        if !answer.success {
            refused = Some(answer.stderr);
            break;
        }
    }
    let refused = refused.expect("a full disk must refuse a write before long");
    assert!(!small.wait(DEADLINE).await.unwrap().success(), "it must stop");
    let said = std::fs::read_to_string(small.log()).unwrap();
    assert!(said.contains("No space left"), "the log must say why: {said}\nthe client heard: {refused}");
    federation.stop(DEADLINE).await.unwrap();
}
