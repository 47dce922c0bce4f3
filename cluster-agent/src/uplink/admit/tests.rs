use std::time::Duration;

use isthmus_identity::ca::CertificateAuthority;
use isthmus_model::{
    global::{ClusterInfo, ClusterState, Exporter, GlobalService, Locality, Settings},
    grant::{ClusterGrant, Namespaces},
    ids::{ClusterIndex, Epoch, Revision, ServiceName, VipIndex},
    service::ServiceKind,
    time::Timestamp,
};

use super::*;

struct Fixture {
    own: ClusterName,
    bundle: TrustBundle,
    west: CertificateAuthority,
    pins: Pins,
    raw: GlobalSnapshot,
}

fn ca(domain: &str) -> CertificateAuthority {
    isthmus_identity::install_crypto();
    CertificateAuthority::create(&domain.parse().unwrap(), Duration::from_secs(3600)).unwrap()
}

fn cluster(name: &str, index: u16, bundle: TrustBundle) -> (ClusterName, ClusterInfo) {
    let name: ClusterName = name.parse().unwrap();
    let locality = Locality { region: "us".parse().unwrap(), zone: "us-1".parse().unwrap() };
    let info = ClusterInfo {
        name: name.clone(),
        index: ClusterIndex(index),
        locality,
        state: ClusterState::Active,
        bundle,
        gateways: Vec::new(),
        grant: Default::default(),
    };
    (name, info)
}

fn stamp(epoch: u64, revision: u64) -> Stamp {
    Stamp { epoch: Epoch(epoch), revision: Revision(revision) }
}

impl Fixture {
    fn new() -> Self {
        let (federation, east, west) = (ca("isthmus.example"), ca("us-east.example"), ca("us-west.example"));
        let raw = GlobalSnapshot {
            stamp: stamp(1, 4),
            federation: "isthmus.example".parse().unwrap(),
            federation_bundle: federation.bundle(),
            settings: Settings::default(),
            clusters: [cluster("us-east", 1, east.bundle()), cluster("us-west", 2, west.bundle())].into(),
            services: BTreeMap::new(),
        };
        let pins = Pins::new(federation.bundle());
        Self { own: "us-east".parse().unwrap(), bundle: east.bundle(), west, pins, raw }
    }

    fn admit(&self, raw: &GlobalSnapshot, pins: &Pins) -> Result<Admitted, Refused> {
        admit(raw, pins, (&self.own, &self.bundle))
    }

    fn admitted(&self) -> Pins {
        self.admit(&self.raw, &self.pins).unwrap().pins
    }

    fn with_west(&self, bundle: TrustBundle) -> GlobalSnapshot {
        let mut raw = self.raw.clone();
        raw.clusters.get_mut("us-west".parse::<ClusterName>().as_ref().unwrap()).unwrap().bundle = bundle;
        raw
    }
}

/// A document of other roots and a later sequence.
fn later(of: &CertificateAuthority) -> TrustBundle {
    let mut document = BundleDocument::parse(&of.bundle().document).unwrap();
    document.sequence += 100;
    TrustBundle { document: document.to_json().unwrap(), predecessor_signature: Vec::new(), ..of.bundle() }
}

fn west() -> ClusterName {
    "us-west".parse().unwrap()
}

#[test]
fn first_bundles_are_believed_and_pinned() {
    let f = Fixture::new();
    let admitted = f.admit(&f.raw, &f.pins).unwrap();
    assert_eq!(admitted.problems, []);
    assert_eq!(admitted.snapshot, f.raw);
    assert_eq!(admitted.pins.clusters[&west()], f.west.bundle());
}

#[test]
fn a_swapped_bundle_without_its_owners_signature_keeps_the_old_one() {
    let f = Fixture::new();
    let swapped = f.with_west(later(&ca("us-west.example")));
    let admitted = f.admit(&swapped, &f.admitted()).unwrap();
    assert_eq!(admitted.snapshot.clusters[&west()].bundle, f.west.bundle());
    assert_eq!(admitted.pins.clusters[&west()], f.west.bundle());
    assert!(admitted.problems[0].at.contains("us-west"), "{:?}", admitted.problems);
}

#[test]
fn a_bundle_signed_by_its_predecessor_is_followed() {
    let f = Fixture::new();
    let mut next = later(&f.west);
    next.predecessor_signature = f.west.sign_document(next.document.as_bytes()).unwrap();
    let admitted = f.admit(&f.with_west(next.clone()), &f.admitted()).unwrap();
    assert_eq!(admitted.problems, []);
    assert_eq!(admitted.pins.clusters[&west()], next);
}

#[test]
fn a_cluster_that_went_and_came_back_cannot_bring_other_roots() {
    let f = Fixture::new();
    let mut without = f.raw.clone();
    without.clusters.remove(&west());
    let pins = f.admit(&without, &f.admitted()).unwrap().pins;
    let admitted = f.admit(&f.with_west(later(&ca("us-west.example"))), &pins).unwrap();
    assert_eq!(admitted.snapshot.clusters[&west()].bundle, f.west.bundle());
}

#[test]
fn our_own_bundle_is_ours_whatever_the_control_plane_says() {
    let f = Fixture::new();
    let mut raw = f.raw.clone();
    raw.clusters.get_mut(&f.own).unwrap().bundle = ca("us-east.example").bundle();
    let admitted = f.admit(&raw, &f.pins).unwrap();
    assert_eq!(admitted.snapshot.clusters[&f.own].bundle, f.bundle);
    assert_eq!(admitted.problems.len(), 1);
}

#[test]
fn a_trust_domain_of_another_cluster_cannot_be_claimed() {
    let f = Fixture::new();
    let pins = f.admitted();
    let mut raw = f.raw.clone();
    raw.clusters.remove(&west());
    raw.clusters.extend([cluster("thief", 3, ca("us-west.example").bundle())]);
    assert!(matches!(f.admit(&raw, &pins), Err(Refused::DomainTaken { .. })));
    let mut raw = f.raw.clone();
    raw.clusters.remove(&f.own);
    raw.clusters.extend([cluster("thief", 3, ca("us-east.example").bundle())]);
    assert!(matches!(f.admit(&raw, &pins), Err(Refused::DomainTaken { .. })));
}

#[test]
fn another_federation_and_a_contradiction_are_refused_whole() {
    let f = Fixture::new();
    let mut raw = f.raw.clone();
    raw.federation = "other.example".parse().unwrap();
    assert!(matches!(f.admit(&raw, &f.pins), Err(Refused::Federation(_))));
    let mut raw = f.raw.clone();
    raw.clusters.get_mut(&west()).unwrap().index = ClusterIndex(1);
    assert!(matches!(f.admit(&raw, &f.pins), Err(Refused::Inconsistent(_))));
}

#[test]
fn states_only_go_forward_unless_the_epoch_grew() {
    let held = Some(stamp(1, 4));
    assert_eq!(is_news(None, stamp(1, 1)), Ok(true));
    assert_eq!(is_news(held, stamp(1, 5)), Ok(true));
    assert_eq!(is_news(held, stamp(1, 4)), Ok(false));
    assert!(is_news(held, stamp(1, 3)).is_err());
    assert_eq!(is_news(held, stamp(2, 1)), Ok(true));
}

fn in_state(raw: &GlobalSnapshot, name: &ClusterName, stamp: Stamp, state: ClusterState) -> GlobalSnapshot {
    let mut raw = raw.clone();
    raw.stamp = stamp;
    raw.clusters.get_mut(name).unwrap().state = state;
    raw
}

#[test]
fn a_revocation_is_not_taken_back_by_a_later_state_nor_a_new_epoch() {
    let f = Fixture::new();
    let revoked = in_state(&f.raw, &west(), stamp(1, 5), ClusterState::Revoked);
    let pins = f.admit(&revoked, &f.admitted()).unwrap().pins;
    // As it is on the disk.
    let pins: Pins = serde_json::from_slice(&serde_json::to_vec(&pins).unwrap()).unwrap();
    for later in [stamp(1, 6), stamp(2, 1)] {
        let active = in_state(&f.raw, &west(), later, ClusterState::Active);
        let admitted = f.admit(&active, &pins).unwrap();
        assert_eq!(admitted.snapshot.clusters[&west()].state, ClusterState::Revoked);
        assert!(admitted.pins.revoked.contains(&west()));
        assert!(admitted.problems[0].message.contains("revoked"), "{:?}", admitted.problems);
    }
}

#[test]
fn a_revoked_cluster_that_is_dropped_stays_revoked_also_when_it_comes_back() {
    let f = Fixture::new();
    let revoked = in_state(&f.raw, &west(), stamp(1, 5), ClusterState::Revoked);
    let pins = f.admit(&revoked, &f.admitted()).unwrap().pins;
    let mut without = f.raw.clone();
    without.clusters.remove(&west());
    without.stamp = stamp(2, 1);
    let admitted = f.admit(&without, &pins).unwrap();
    let kept = &admitted.snapshot.clusters[&west()];
    assert_eq!((kept.state, &kept.bundle), (ClusterState::Revoked, &f.west.bundle()));
    assert_eq!(admitted.snapshot.check(), Ok(()));
    assert!(admitted.problems[0].at.contains("us-west"), "{:?}", admitted.problems);
    let back = f.admit(&in_state(&f.raw, &west(), stamp(2, 2), ClusterState::Active), &admitted.pins).unwrap();
    assert_eq!(back.snapshot.clusters[&west()].state, ClusterState::Revoked);
}

#[test]
fn a_revoked_cluster_does_not_come_back_under_another_name_with_its_keys() {
    let f = Fixture::new();
    let revoked = in_state(&f.raw, &west(), stamp(1, 5), ClusterState::Revoked);
    let pins = f.admit(&revoked, &f.admitted()).unwrap().pins;
    let mut renamed = f.raw.clone();
    renamed.clusters.remove(&west());
    renamed.clusters.extend([cluster("us-new", 3, f.west.bundle())]);
    let admitted = f.admit(&renamed, &pins).unwrap();
    assert!(admitted.snapshot.active_cluster(&"us-new".parse().unwrap()).is_none());
    assert_eq!(admitted.snapshot.check(), Ok(()));
}

#[test]
fn our_own_revocation_stands_too() {
    let f = Fixture::new();
    let pins = f.admit(&in_state(&f.raw, &f.own, stamp(1, 5), ClusterState::Revoked), &f.pins).unwrap().pins;
    let admitted = f.admit(&in_state(&f.raw, &f.own, stamp(2, 1), ClusterState::Active), &pins).unwrap();
    assert_eq!(admitted.snapshot.clusters[&f.own].state, ClusterState::Revoked);
}

#[test]
fn pins_saved_before_revocations_were_kept_can_be_read() {
    let f = Fixture::new();
    let mut json = serde_json::to_value(f.admitted()).unwrap();
    json.as_object_mut().unwrap().remove("revoked");
    assert_eq!(serde_json::from_value::<Pins>(json).unwrap(), f.admitted());
}

#[test]
fn exports_outside_grants_are_not_taken_over() {
    let f = Fixture::new();
    let mut raw = f.raw.clone();
    let export = |name: &str, exporters: &[&str]| {
        let exporter = |cluster: &&str| {
            let exporter = Exporter { created_at: Timestamp(1), identities: [].into() };
            (cluster.parse().unwrap(), exporter)
        };
        let name: ServiceName = name.parse().unwrap();
        let exporters = exporters.iter().map(exporter).collect();
        let index = VipIndex(name.name().len() as u32);
        let service = GlobalService {
            name: name.clone(),
            index,
            kind: ServiceKind::ClusterSetIp,
            ports: Vec::new(),
            exporters,
            conflicts: Vec::new(),
        };
        (name, service.into())
    };
    raw.services =
        [export("shop/a", &["us-east", "us-west"]), export("pay/bb", &["us-west"]), export("ops/ccc", &["us-west"])]
            .into();
    let only = |namespaces: &[&str]| Namespaces::Only(namespaces.iter().map(|name| name.parse().unwrap()).collect());
    let grant = |raw: &mut GlobalSnapshot, of: &str, grant| {
        raw.clusters.get_mut(of.parse::<ClusterName>().as_ref().unwrap()).unwrap().grant = grant;
    };
    grant(&mut raw, "us-west", ClusterGrant { export_namespaces: only(&["pay", "ops"]), ..ClusterGrant::default() });
    grant(&mut raw, "us-east", ClusterGrant { import_namespaces: only(&["shop", "pay"]), ..ClusterGrant::default() });
    let admitted = f.admit(&raw, &f.pins).unwrap().snapshot;
    let kept: Vec<String> = admitted
        .services
        .values()
        .map(|s| format!("{} of {}", s.name, s.exporters.keys().map(ToString::to_string).collect::<Vec<_>>().join(" ")))
        .collect();
    assert_eq!(kept, ["pay/bb of us-west", "shop/a of us-east"]);
}
