//! How a simulated agent becomes a member: with a token that an administrator minted, as a real one does.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use isthmus_api::proto::{
    common::v1 as common,
    federation::v1::{JoinRequest, JoinResponse, federation_client::FederationClient},
};
use isthmus_identity::{
    bundle::BundleDocument,
    ca::CertificateAuthority,
    grpc::connect_lazy,
    keys::KeyPair,
    svid::Svid,
    tls::{IdentitySource, PeerPolicy, pinned_client_config},
    token::Token,
};
use isthmus_model::service::TrustBundle;
use rustls::pki_types::CertificateDer;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use super::exports;
use crate::control::{group::client_tls, http2::Connection};

const CALL: Duration = Duration::from_secs(10);
/// A control plane that has too many at once says so; for as long as this an agent comes back.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);
/// A cluster's root.
const LIFETIME: Duration = Duration::from_secs(86_400);

/// A member that has no session yet.
pub(super) struct Member {
    pub(super) number: usize,
    pub(super) ca: CertificateAuthority,
    /// With its certificate, trusting the federation's roots.
    pub(super) tls: Arc<rustls::ClientConfig>,
}

/// Has a token minted, and joins with it at the node that it names.
pub(super) async fn join(number: usize, admin: &mut Connection) -> anyhow::Result<Member> {
    let cluster = exports::cluster(number);
    let domain = exports::trust_domain(&cluster).parse().context("a trust domain")?;
    let ca = CertificateAuthority::create(&domain, LIFETIME).context("make a CA")?;
    let key = KeyPair::generate()?;
    let token = mint(&cluster, admin).await.context("mint a token")?;
    let anyone: PeerPolicy = Arc::new(|_| true);
    let (tls, _root) = pinned_client_config(token.ca_pin, anyone)?;
    let mut client = FederationClient::new(connect_lazy(&token.address, Arc::new(tls)));
    let request = JoinRequest {
        secret: token.secret.clone(),
        cluster,
        locality: Some(common::Locality { region: "us".to_owned(), zone: format!("us-{}", number % 3) }),
        bundle: Some((&ca.bundle()).into()),
        csr: key.csr_der()?,
    };
    let deadline = Instant::now() + PATIENCE;
    let answer: JoinResponse = loop {
        match timeout(CALL, client.join(request.clone())).await.context("no answer to a join")? {
            Ok(answer) => break answer.into_inner(),
            Err(status) if passes(status.code()) && Instant::now() < deadline => sleep(PAUSE).await,
            Err(status) => return Err(status).context("join"),
        }
    };
    let chain = answer.certificate_chain.into_iter().map(CertificateDer::from).collect();
    let svid = Svid::new(chain, &key)?;
    let bundle = TrustBundle::try_from(answer.federation_bundle.context("the federation's bundle")?)?;
    let roots = BundleDocument::parse(&bundle.document).context("the federation's bundle")?.x509_roots;
    let tls = client_tls(Some(&IdentitySource::new(svid)), roots)?;
    Ok(Member { number, ca, tls })
}

async fn mint(cluster: &str, admin: &mut Connection) -> anyhow::Result<Token> {
    let answer = admin.call("POST", &format!("/v1/clusters/{cluster}/join-token"), "").await?;
    let token = answer.get("token").and_then(Value::as_str).context("`token` in the answer")?;
    Token::parse(token).context("read the token")
}

fn passes(code: Code) -> bool {
    matches!(code, Code::ResourceExhausted | Code::Unavailable)
}
