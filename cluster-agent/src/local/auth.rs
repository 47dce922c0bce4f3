//! Who may call what of the local services. The one place that decides it; pure.

use isthmus_identity::grpc::PeerInfo;
use isthmus_model::ids::{ClusterName, SpiffeId, TrustDomain};
use tonic::{Extensions, Status};

/// Whose agent this is.
#[derive(Clone, Debug)]
pub struct Realm {
    /// The cluster.
    pub cluster: ClusterName,
    /// The federation's trust domain: agents, gateways, DNS servers.
    pub federation: TrustDomain,
    /// The cluster's own: workloads.
    pub trust_domain: TrustDomain,
}

/// A caller with a certificate of this cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// One of its gateways.
    Gateway,
    /// One of its DNS servers.
    Dns,
    /// One of its workloads, or its sidecar's launcher.
    Workload(SpiffeId),
}

impl Realm {
    /// What a verified SPIFFE ID is to this cluster; `None`: a stranger.
    pub fn caller(&self, id: &SpiffeId) -> Option<Caller> {
        let segments: Vec<_> = id.segments().collect();
        if *id.trust_domain() == self.federation {
            return match segments.as_slice() {
                ["cluster", cluster, "gateway"] if *cluster == self.cluster.as_str() => Some(Caller::Gateway),
                ["cluster", cluster, "dns"] if *cluster == self.cluster.as_str() => Some(Caller::Dns),
                _ => None,
            };
        }
        let workload = matches!(segments.as_slice(), ["ns", _, "sa", _]);
        (*id.trust_domain() == self.trust_domain && workload).then(|| Caller::Workload(id.clone()))
    }

    /// The caller of a request, who must have shown a certificate.
    pub fn require(&self, extensions: &Extensions) -> Result<Caller, Status> {
        let peer = extensions.get::<PeerInfo>();
        let id = peer.and_then(|p| p.id.as_ref()).ok_or_else(|| {
            Status::unauthenticated(
                "this call needs a client certificate; enrol first with a token from `isthmus-agent token …`",
            )
        })?;
        self.caller(id)
            .ok_or_else(|| Status::permission_denied(format!("{id} does not belong to cluster {}", self.cluster)))
    }
}

/// For a call that is not the caller's to make.
pub fn denied(what: &str, needed: &str) -> Status {
    Status::permission_denied(format!("{what} is only for {needed} of this cluster"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_clusters_own_are_known() {
        let realm = Realm {
            cluster: "us-east".parse().unwrap(),
            federation: "isthmus.example".parse().unwrap(),
            trust_domain: "us-east.example".parse().unwrap(),
        };
        let of = |id: &str| realm.caller(&id.parse().unwrap());
        assert_eq!(of("spiffe://isthmus.example/cluster/us-east/gateway"), Some(Caller::Gateway));
        assert_eq!(of("spiffe://isthmus.example/cluster/us-east/dns"), Some(Caller::Dns));
        assert!(matches!(of("spiffe://us-east.example/ns/shop/sa/cart"), Some(Caller::Workload(_))));
        for stranger in [
            "spiffe://isthmus.example/cluster/us-west/gateway",
            "spiffe://isthmus.example/cluster/us-east/agent",
            "spiffe://isthmus.example/ns/shop/sa/cart",
            "spiffe://us-west.example/ns/shop/sa/cart",
            "spiffe://us-east.example/cluster/us-east/gateway",
            "spiffe://us-east.example/ns/shop/sa/cart/more",
        ] {
            assert_eq!(of(stranger), None, "{stranger}");
        }
    }
}
