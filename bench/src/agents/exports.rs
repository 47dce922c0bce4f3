//! What the clusters publish.
//!
//! Ten clusters at a time export the same [`EXPORTS`] services, so that 1,000 clusters have 100,000 exports and 10,000 global
//! services of ten exporters each: virtual IPs are there for 65,534. All exporters agree on kind and ports. Each export names
//! one identity of its cluster.

use isthmus_api::proto::{common::v1 as common, federation::v1 as pb};
use isthmus_model::service::TrustBundle;

/// Of each cluster.
pub(super) const EXPORTS: usize = 100;
/// Clusters that export the same services.
const SHARED_BY: usize = 10;

/// The name of the cluster with this number.
pub(super) fn cluster(number: usize) -> String {
    format!("cluster-{number:04}")
}

/// Its own trust domain.
pub(super) fn trust_domain(cluster: &str) -> String {
    format!("{cluster}.example")
}

/// What cluster `number` says of itself. One of its exports, `changed`, names another identity than usual.
pub(super) fn publication(number: usize, changed: Option<usize>, bundle: &TrustBundle) -> pb::Publication {
    let own = cluster(number);
    let export = |nth: usize| {
        let name = format!("service-{:05}", number / SHARED_BY * EXPORTS + nth);
        let account = if changed == Some(nth) { format!("{name}-next") } else { name.clone() };
        pb::Export {
            service: Some(common::ServiceName { namespace: "shop".to_owned(), name }),
            created_at_unix_ms: 1,
            kind: common::ServiceKind::ClusterSetIp.into(),
            ports: vec![common::ServicePort {
                name: "http".to_owned(),
                number: 8_080,
                protocol: common::AppProtocol::Http.into(),
            }],
            identities: vec![format!("spiffe://{}/ns/shop/sa/{account}", trust_domain(&own))],
        }
    };
    pb::Publication {
        exports: (0..EXPORTS).map(export).collect(),
        gateways: vec![common::GatewayAddress {
            name: "gateway-1".to_owned(),
            tunnel: format!("198.18.{}.{}:15443", number / 250, number % 250 + 1),
        }],
        bundle: Some(bundle.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_thousand_clusters_have_a_hundred_thousand_exports_of_ten_thousand_services() {
        let bundle = TrustBundle {
            trust_domain: "x.example".parse().unwrap(),
            document: String::new(),
            predecessor_signature: Vec::new(),
        };
        let (mut exports, mut services) = (0, BTreeSet::new());
        for number in 0..1_000 {
            let publication = publication(number, None, &bundle);
            exports += publication.exports.len();
            services.extend(publication.exports.into_iter().filter_map(|export| Some(export.service?.name)));
        }
        assert_eq!((exports, services.len()), (100_000, 10_000));
        assert_ne!(publication(3, None, &bundle), publication(3, Some(7), &bundle));
    }
}
