//! Yesterday's files: a state folder and a backup that an earlier program wrote, which today's must read. A change of format
//! adds a folder beside `fixtures/format-1`; it never writes that one anew.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use isthmus_identity::ca::CertificateAuthority;
use isthmus_model::{
    global::{ClusterState, Locality, Settings},
    grant::{ClusterGrant, Namespaces},
    ids::{ClusterName, ServiceName, VipIndex},
    service::{AppProtocol, Export, GatewayAddress, Publication, ServiceKind, ServicePort},
    time::Timestamp,
};
use isthmus_runtime::tasks::Tasks;

use super::tests::start_with;
use crate::state::{
    Actor, Apply, Command, Join, MintToken, Publish, Resource, State, TokenHash, Write,
    backup::{read, write},
};

/// Of the log's files: small, for they are in the repository.
const SEGMENT: u64 = 32 << 10;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/raft/fixtures/format-1")
}

/// A folder with all that is in it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.as_ref().unwrap().file_name()));
        match from.is_dir() {
            true => copy(&from, &to),
            false => drop(fs::copy(from, to).unwrap()),
        }
    }
}

fn name(name: &str) -> ClusterName {
    name.parse().unwrap()
}

fn cart() -> ServiceName {
    "shop/cart".parse().unwrap()
}

/// One of each kind that operators and clusters cause, and what it leaves.
fn commands() -> Vec<Command> {
    let ca =
        |domain: &str| CertificateAuthority::create(&domain.parse().unwrap(), Duration::from_secs(86_400)).unwrap();
    let mut commands = vec![Command::SetFederationBundle { bundle: ca("isthmus.example").bundle() }];
    for (i, cluster) in (1..).zip(["us-east", "us-west"]) {
        let (hash, now) = (TokenHash([i; 32]), Timestamp(u64::from(i)));
        let bundle = ca(&format!("{cluster}.example")).bundle();
        let locality = Locality { region: "us".parse().unwrap(), zone: format!("{cluster}-1").parse().unwrap() };
        let identity = format!("spiffe://{cluster}.example/ns/shop/sa/cart").parse().unwrap();
        let export = Export {
            service: cart(),
            created_at: Timestamp(1),
            kind: ServiceKind::ClusterSetIp,
            ports: vec![ServicePort { name: "http".parse().unwrap(), number: 80, protocol: AppProtocol::Http }],
            identities: [identity].into(),
        };
        let gateway = GatewayAddress { name: "gateway-1".to_owned(), tunnel: "198.18.0.1:15443".parse().ok() };
        let publication =
            Publication { exports: [(cart(), export)].into(), gateways: vec![gateway], bundle: bundle.clone() };
        let cluster = name(cluster);
        let expires_at = Timestamp(1_000);
        commands.extend([
            Command::MintToken(MintToken { hash, cluster: cluster.clone(), expires_at, grant: None, now }),
            Command::Join(Join { hash, key: None, cluster: cluster.clone(), locality, bundle, now }),
            Command::Publish(Publish { cluster, publication, incarnation: None, now }),
        ]);
    }
    let only_pay = Namespaces::Only(["pay".parse().unwrap()].into());
    let grant = ClusterGrant { import_namespaces: only_pay, ..ClusterGrant::default() };
    let mut settings = Settings::default();
    settings.failover.hold_down = Duration::from_secs(7);
    let put = |resource| Write::Put { resource, expected: None };
    let writes = vec![put(Resource::Settings(settings)), put(Resource::ClusterGrant(name("us-east"), grant))];
    commands.extend([Command::Apply(Apply { writes }), Command::Revoke { cluster: name("us-west") }]);
    commands
}

/// What [`commands`] leave, however they are stored.
fn check(state: &State) {
    let global = state.global().unwrap();
    assert_eq!((global.stamp.epoch.0, global.stamp.revision.0), (1, 7));
    let [east, west] = ["us-east", "us-west"].map(|cluster| &global.clusters[&name(cluster)]);
    assert_eq!((east.index.0, east.state), (1, ClusterState::Active));
    assert_eq!((west.index.0, west.state), (2, ClusterState::Revoked));
    assert_eq!(east.gateways.len(), 1);
    assert!(!east.grant.may_import(&"shop".parse().unwrap()) && east.grant.may_export(&"shop".parse().unwrap()));
    let cart = &global.services[&cart()];
    assert_eq!(cart.index, VipIndex(1));
    assert_eq!(cart.exporters.keys().collect::<Vec<_>>(), [&name("us-east")]);
    assert_eq!(global.settings.failover.hold_down, Duration::from_secs(7));
    assert_eq!(state.events().count(), commands().len());
    let token = state.check_token(&TokenHash([1; 32]), None, &name("us-east"), Timestamp(5));
    assert_eq!(token.unwrap_err().code(), "token_used");
}

#[tokio::test]
async fn a_state_folder_of_format_1_is_read() {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixtures().join("raft"), &dir.path().join("raft"));
    let group = start_with(dir.path(), 1_000, SEGMENT).await;
    check(group.views().borrow().state());
    // And written to.
    let again = Command::Revoke { cluster: name("us-east") };
    group.proposer(&Tasks::new(), Actor::default()).propose(again).await.unwrap();
    group.stop().await;
}

#[test]
fn a_backup_of_format_1_is_read() {
    let (head, state) = read(&fs::read(fixtures().join("backup.isthmus")).unwrap()).unwrap();
    assert_eq!((head.taken_at, head.stamp), (Timestamp(9), state.stamp()));
    check(&state);
}

/// For a new format: `cargo test --workspace --lib -- --ignored --exact raft::formats::write_the_files`, after the path in
/// [`fixtures`] was changed.
#[tokio::test]
#[ignore = "writes into the repository"]
async fn write_the_files() {
    let (dir, to) = (tempfile::tempdir().unwrap(), fixtures());
    assert!(!to.exists(), "{} is there already, and must stay as it is", to.display());
    let group = start_with(dir.path(), 5, SEGMENT).await;
    let proposer = group.proposer(&Tasks::new(), Actor::default());
    for command in commands() {
        proposer.propose(command).await.unwrap();
    }
    check(group.views().borrow().state());
    let backup = write(group.views().borrow().state(), Timestamp(9)).unwrap();
    group.stop().await;
    copy(&dir.path().join("raft"), &to.join("raft"));
    fs::write(to.join("backup.isthmus"), backup).unwrap();
}
