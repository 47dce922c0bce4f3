//! Calls to the control plane: which of its nodes is dialled, and the certificates it signs.
//!
//! It says where its nodes are; what was last said is kept on disk. One node is used for as long as it answers, then the
//! next one. The address that the cluster joined with stays among them, as the last resort.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use isthmus_api::{
    convert::ConvertError,
    proto::federation::v1::{Role, SignRequest, federation_client::FederationClient},
};
use isthmus_identity::{
    bundle::TrustStore,
    grpc::connect_lazy,
    tls::{IdentitySource, PeerPolicy, TlsError, client_config},
};
use isthmus_model::{
    ids::{SpiffeId, TrustDomain},
    service::TrustBundle,
};
use isthmus_runtime::{files::LastKnownGood, tasks::chain as chain_of};
use rustls::ClientConfig;
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;
use tonic::{Code, Status, transport::Channel};

/// A call that is not answered by then has failed.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Snapshots of the largest federations; bounds what a control plane can make us allocate.
pub(super) const MAX_MESSAGE: usize = 128 * 1024 * 1024;

/// Most nodes that are remembered.
const MAX_NODES: usize = 16;
/// Of the file of addresses: a JSON list.
pub const NODES_FORMAT: u32 = 1;

/// The control plane, as this agent reaches it. Clones share one connection.
#[derive(Clone)]
pub struct ControlPlane(Arc<Shared>);

struct Shared {
    tls: Arc<ClientConfig>,
    /// Where it was joined, or as configured.
    first: String,
    disk: LastKnownGood,
    nodes: Mutex<Nodes>,
}

/// In the order in which they are tried.
struct Nodes {
    addresses: VecDeque<String>,
    made: BTreeMap<String, FederationClient<Channel>>,
}

/// A certificate with the bundle to verify others of its trust domain.
#[derive(Clone, Debug)]
pub struct Signed {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The federation's.
    pub federation_bundle: TrustBundle,
}

impl ControlPlane {
    /// Dials `first` (`host:port`) or one of the nodes that `disk` remembers, at first use; the server must be a
    /// control-plane node of `federation`.
    pub fn new(
        first: &str,
        disk: LastKnownGood,
        federation: &TrustDomain,
        identity: &IdentitySource,
        trust: &TrustStore,
    ) -> Result<Self, TlsError> {
        let federation = federation.clone();
        let policy: PeerPolicy = Arc::new(move |id| *id.trust_domain() == federation && is_control_plane(id));
        let tls = Arc::new(client_config(Some(identity), trust, policy, &[b"h2"])?);
        let remembered = disk.load().unwrap_or_else(|error| {
            tracing::warn!("the control plane's nodes are not remembered: {}", chain_of(&error));
            None
        });
        let remembered: Vec<String> =
            remembered.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let nodes = Nodes { addresses: in_order(first, first, &remembered), made: BTreeMap::new() };
        Ok(Self(Arc::new(Shared { tls, first: first.to_owned(), disk, nodes: Mutex::new(nodes) })))
    }

    /// The node in use.
    pub fn address(&self) -> String {
        self.nodes().addresses.front().cloned().unwrap_or_default()
    }

    /// A client of the node in use.
    pub fn client(&self) -> FederationClient<Channel> {
        let mut nodes = self.nodes();
        let address = nodes.addresses.front().cloned().unwrap_or_default();
        let connect = || client(connect_lazy(&address, self.0.tls.clone()));
        nodes.made.entry(address.clone()).or_insert_with(connect).clone()
    }

    /// The node in use does not answer: the next one is.
    pub fn use_next(&self) {
        self.nodes().addresses.rotate_left(1);
    }

    /// Remembers where the nodes are. Blocks.
    pub fn learn(&self, addresses: &[String]) {
        {
            let mut nodes = self.nodes();
            let current = nodes.addresses.front().cloned().unwrap_or_default();
            let order = in_order(&current, &self.0.first, addresses);
            if order == nodes.addresses {
                return;
            }
            nodes.made.retain(|address, _| order.contains(address));
            nodes.addresses = order;
        }
        let known: Vec<&String> = addresses.iter().take(MAX_NODES).collect();
        let saved = serde_json::to_vec(&known).map_err(|error| error.to_string());
        let saved = saved.and_then(|bytes| self.0.disk.save(&bytes).map_err(|error| chain_of(&error)));
        match saved {
            Ok(()) => tracing::info!(nodes = ?known, "the control plane's nodes"),
            Err(error) => tracing::error!("the control plane's nodes cannot be remembered: {error}"),
        }
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.0.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a certificate signed for this agent, or for a gateway or DNS server of its cluster.
    pub async fn sign(&self, role: Role, csr: Vec<u8>) -> Result<Signed, Status> {
        let mut tries = self.nodes().addresses.len();
        let response = loop {
            let mut client = self.client();
            let call = client.sign(SignRequest { role: role.into(), csr: csr.clone() });
            let silent = || Err(Status::deadline_exceeded("the control plane did not answer in time"));
            match timeout(CALL_DEADLINE, call).await.unwrap_or_else(|_| silent()) {
                Ok(response) => break response.into_inner(),
                Err(status) if status.code() == Code::Unavailable && tries > 1 => {
                    tries -= 1;
                    self.use_next();
                }
                Err(status) => return Err(status),
            }
        };
        let bundle = response.federation_bundle.ok_or_else(|| ConvertError::new("federation_bundle", "is missing"));
        let bundle = bundle.and_then(TrustBundle::try_from).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Signed { chain: chain(response.certificate_chain), federation_bundle: bundle })
    }
}

impl fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ControlPlane").field(&self.nodes().addresses).finish()
    }
}

/// `current` first, then the others, `last` among them.
fn in_order(current: &str, last: &str, known: &[String]) -> VecDeque<String> {
    let known = known.iter().map(String::as_str).take(MAX_NODES);
    let mut order: VecDeque<String> = VecDeque::new();
    for address in [current].into_iter().chain(known.clone()).chain([last]) {
        // The one in use need not be one any more.
        let wanted = address == last || known.clone().any(|known| known == address);
        if wanted && !order.iter().any(|held| held == address) {
            order.push_back(address.to_owned());
        }
    }
    order
}

/// What a call's failure says to people; tonic's own text repeats its sources.
pub fn words(status: &Status) -> String {
    match status.message() {
        "" => status.code().description().to_owned(),
        message => message.to_owned(),
    }
}

/// `spiffe://<federation>/cp/<node>`.
pub fn is_control_plane(id: &SpiffeId) -> bool {
    let mut segments = id.segments();
    segments.next() == Some("cp") && segments.next().is_some() && segments.next().is_none()
}

/// A client with our limits.
pub(super) fn client(channel: Channel) -> FederationClient<Channel> {
    FederationClient::new(channel).max_decoding_message_size(MAX_MESSAGE)
}

/// As it comes off the wire; [`isthmus_identity::svid::Svid::new`] checks it.
pub(super) fn chain(der: Vec<Vec<u8>>) -> Vec<CertificateDer<'static>> {
    der.into_iter().map(CertificateDer::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_in_use_stays_and_the_first_address_is_never_forgotten() {
        let known = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(in_order("lb:1", "lb:1", &[]), ["lb:1"]);
        assert_eq!(in_order("b:1", "lb:1", &known(&["a:1", "b:1", "c:1"])), ["b:1", "a:1", "c:1", "lb:1"]);
        assert_eq!(in_order("gone:1", "lb:1", &known(&["a:1"])), ["a:1", "lb:1"], "a node that was removed");
        assert_eq!(in_order("a:1", "a:1", &known(&["a:1", "b:1"])), ["a:1", "b:1"]);
    }
}
