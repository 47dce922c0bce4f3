//! Commands by chance, as agents and administrators propose them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
    time::Duration,
};

use isthmus_identity::ca::CertificateAuthority;
use isthmus_model::{
    failover::FailoverPolicy,
    global::{Locality, Settings},
    ids::{ClusterName, NodeName, Revision, ServiceName},
    service::{AppProtocol, Export, GatewayAddress, Publication, ServiceKind, ServicePort, TrustBundle},
    time::Timestamp,
};
use rand::{RngExt as _, rngs::StdRng};

use crate::state::{Command, Join, KeyHash, MintNodeToken, MintToken, Publish, SetNode, TokenHash};

/// Clusters that join.
pub(super) const CLUSTERS: [&str; 5] = ["east", "west", "north", "south", "centre"];
const SERVICES: u32 = 7;
/// Of join tokens.
const TTL: u64 = 60_000;

static BUNDLES: LazyLock<BTreeMap<&str, TrustBundle>> = LazyLock::new(|| {
    let bundle = |name: &'static str| {
        let domain = format!("{name}.example").parse().unwrap();
        (name, CertificateAuthority::create(&domain, Duration::from_secs(86_400)).unwrap().bundle())
    };
    CLUSTERS.into_iter().chain(["isthmus"]).map(bundle).collect()
});

/// What has been asked for so far, as far as later commands refer to it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    tokens: Vec<(u8, usize)>,
    next_token: u8,
}

pub(super) fn cluster(nth: usize) -> ClusterName {
    CLUSTERS[nth].parse().unwrap()
}

/// The first command of all.
pub(super) fn found() -> Command {
    Command::SetFederationBundle { bundle: BUNDLES["isthmus"].clone() }
}

/// One that changes nothing but the state's clock.
pub(super) fn wait_until(now: Timestamp, nth: u64) -> Command {
    let mut hash = [0xee; 32];
    hash[..8].copy_from_slice(&nth.to_le_bytes());
    let cluster = "nobody".parse().unwrap();
    Command::MintToken(MintToken { hash: TokenHash(hash), cluster, expires_at: now, grant: None, now })
}

impl Plan {
    /// One more command, proposed at `now` by the clock of the node that is asked.
    pub(super) fn command(&mut self, rng: &mut StdRng, now: u64, latest: Revision) -> Command {
        let at = Timestamp(now);
        match rng.random_range(0..100) {
            0..40 => publish(rng, now),
            40..55 => {
                let (token, of) = (self.next_token, rng.random_range(0..CLUSTERS.len()));
                self.next_token = self.next_token.wrapping_add(1);
                self.tokens.push((token, of));
                let expires_at = Timestamp(now + TTL);
                let cluster = cluster(of);
                Command::MintToken(MintToken {
                    hash: TokenHash([token; 32]),
                    cluster,
                    expires_at,
                    grant: None,
                    now: at,
                })
            }
            55..80 => {
                let Some((token, of)) = self.tokens.get(rng.random_range(0..self.tokens.len().max(1))).copied() else {
                    return publish(rng, now);
                };
                let zone = format!("zone-{}", rng.random_range(0..3)).parse().unwrap();
                Command::Join(Join {
                    hash: TokenHash([token; 32]),
                    key: Some(KeyHash([rng.random_range(0..2); 32])),
                    cluster: cluster(of),
                    locality: Locality { region: "us".parse().unwrap(), zone },
                    bundle: BUNDLES[CLUSTERS[of]].clone(),
                    now: at,
                })
            }
            80..86 => {
                let hold_down = Duration::from_secs(rng.random_range(1..5));
                Command::SetSettings {
                    settings: Settings {
                        failover: FailoverPolicy { hold_down, ..FailoverPolicy::default() },
                        ..Settings::default()
                    },
                }
            }
            86..90 => Command::Rollback { to: Revision(rng.random_range(0..latest.0 + 2)) },
            90..92 => Command::StartEpoch,
            92..93 => Command::Revoke { cluster: cluster(rng.random_range(0..CLUSTERS.len())) },
            93..96 => Command::MintNodeToken(MintNodeToken {
                hash: TokenHash([rng.random(); 32]),
                node: node(rng),
                expires_at: Timestamp(now + TTL),
                now: at,
            }),
            96..99 => {
                let (id, node) = (rng.random_range(1..4), node(rng));
                let address = format!("198.18.0.{}:7443", rng.random_range(1..9));
                Command::SetNode(SetNode { id, node, address, supports: 1, now: at })
            }
            _ => Command::RemoveNode { node: node(rng) },
        }
    }
}

fn node(rng: &mut StdRng) -> NodeName {
    format!("cp-{}", rng.random_range(1..4)).parse().unwrap()
}

fn publish(rng: &mut StdRng, now: u64) -> Command {
    let of = rng.random_range(0..CLUSTERS.len());
    let name = CLUSTERS[of];
    let mut exports = BTreeMap::new();
    for number in 0..SERVICES {
        if rng.random_bool(0.5) {
            let service = ServiceName::new("shop", &format!("s{number}")).unwrap();
            exports.insert(service.clone(), export(rng, (name, service, number), now));
        }
    }
    let publication = Publication {
        exports,
        gateways: vec![GatewayAddress { name: "gateway-1".to_owned(), tunnel: "198.18.1.1:15443".parse().ok() }],
        bundle: BUNDLES[name].clone(),
    };
    Command::Publish(Publish { cluster: cluster(of), publication, incarnation: None, now: Timestamp(now) })
}

/// Mostly as others export it; never from the future, whose age would depend on when it came.
fn export(rng: &mut StdRng, (cluster, service, number): (&str, ServiceName, u32), now: u64) -> Export {
    let port = |rng: &mut StdRng, name: &str, number| ServicePort {
        name: name.parse().unwrap(),
        number,
        protocol: if rng.random_bool(0.1) { AppProtocol::Tcp } else { AppProtocol::Http },
    };
    let number_of_first = if rng.random_bool(0.1) { 8080 } else { 80 };
    let mut ports = vec![port(rng, "http", number_of_first)];
    if rng.random_bool(0.2) {
        ports.push(port(rng, "admin", 9000));
    }
    Export {
        service,
        created_at: Timestamp(now - rng.random_range(0..50_000)),
        kind: if rng.random_bool(0.1) { ServiceKind::Headless } else { ServiceKind::ClusterSetIp },
        ports,
        identities: BTreeSet::from([format!("spiffe://{cluster}.example/ns/shop/sa/s{number}").parse().unwrap()]),
    }
}
