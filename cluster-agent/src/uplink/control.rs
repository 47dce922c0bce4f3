//! Calls to the control plane: the one channel, and the certificates it signs.

use std::{sync::Arc, time::Duration};

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
use rustls_pki_types::CertificateDer;
use tokio::time::timeout;
use tonic::{Status, transport::Channel};

/// A call that is not answered by then has failed.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Snapshots of the largest federations; bounds what a control plane can make us allocate.
const MAX_MESSAGE: usize = 128 * 1024 * 1024;

/// The control plane, as this agent reaches it. Clones share one connection.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    client: FederationClient<Channel>,
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
    /// Dials `address` (`host:port`) at first use; the server must be a control-plane node of `federation`.
    pub fn new(
        address: &str,
        federation: &TrustDomain,
        identity: &IdentitySource,
        trust: &TrustStore,
    ) -> Result<Self, TlsError> {
        let federation = federation.clone();
        let policy: PeerPolicy = Arc::new(move |id| *id.trust_domain() == federation && is_control_plane(id));
        let tls = client_config(Some(identity), trust, policy, &[b"h2"])?;
        Ok(Self { client: client(connect_lazy(address, Arc::new(tls))) })
    }

    /// For the session.
    pub fn client(&self) -> FederationClient<Channel> {
        self.client.clone()
    }

    /// Has a certificate signed for this agent, or for a gateway or DNS server of its cluster.
    pub async fn sign(&self, role: Role, csr: Vec<u8>) -> Result<Signed, Status> {
        let mut client = self.client();
        let call = client.sign(SignRequest { role: role.into(), csr });
        let response = timeout(CALL_DEADLINE, call)
            .await
            .map_err(|_| Status::deadline_exceeded("the control plane did not answer in time"))??
            .into_inner();
        let bundle = response.federation_bundle.ok_or_else(|| ConvertError::new("federation_bundle", "is missing"));
        let bundle = bundle.and_then(TrustBundle::try_from).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Signed { chain: chain(response.certificate_chain), federation_bundle: bundle })
    }
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
