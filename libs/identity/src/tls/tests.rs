use std::{io, sync::Arc, time::Duration};

use isthmus_model::ids::SpiffeId;
use rustls::{CipherSuite, ClientConfig, ServerConfig, time_provider::TimeProvider};
use rustls_pki_types::UnixTime;

use super::*;
use crate::testkit::*;

const SERVER: &str = "spiffe://east.example/cluster/east/gateway";
const CLIENT: &str = "spiffe://west.example/ns/shop/sa/web";

fn server(source: &IdentitySource, trust: &TrustStore, auth: ClientAuth) -> Arc<ServerConfig> {
    Arc::new(server_config(source, trust, auth, &[b"h2"]).unwrap())
}

fn client(source: Option<&IdentitySource>, trust: &TrustStore, peer: PeerPolicy) -> Arc<ClientConfig> {
    Arc::new(client_config(source, trust, peer, &[b"h2"]).unwrap())
}

fn seen(verdict: &io::Result<Option<SpiffeId>>) -> Option<&str> {
    verdict.as_ref().unwrap().as_ref().map(SpiffeId::as_str)
}

/// A clock that runs ahead.
#[derive(Debug)]
struct Ahead(Duration);

impl TimeProvider for Ahead {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs()) + self.0))
    }
}

#[tokio::test]
async fn peers_of_two_trust_domains_know_each_other() {
    let (east, west) = (ca("east.example"), ca("west.example"));
    let trust = store(&[&east, &west]);
    let server = server(&source(&east, "cluster/east/gateway"), &trust, ClientAuth::Required(only(CLIENT)));
    let client = client(Some(&source(&west, "ns/shop/sa/web")), &trust, only(SERVER));
    let verdicts = handshake(&server, &client).await;
    assert_eq!(seen(&verdicts.server), Some(CLIENT));
    assert_eq!(seen(&verdicts.client), Some(SERVER));
}

#[tokio::test]
async fn unknown_trust_domain_is_refused_by_either_side() {
    let (east, west) = (ca("east.example"), ca("west.example"));
    let (both, east_only, west_only) = (store(&[&east, &west]), store(&[&east]), store(&[&west]));
    let (server_source, client_source) = (source(&east, "cluster/east/gateway"), source(&west, "ns/shop/sa/web"));
    let narrow = server(&server_source, &east_only, ClientAuth::Required(anyone()));
    let verdicts = handshake(&narrow, &client(Some(&client_source), &both, anyone())).await;
    assert!(verdicts.server_error().contains("UnknownIssuer"), "{}", verdicts.server_error());
    let alert = verdicts.client.as_ref().unwrap_err().to_string();
    assert!(alert.contains("UnknownCA"), "{alert}");

    let wide = server(&server_source, &both, ClientAuth::Required(anyone()));
    let verdicts = handshake(&wide, &client(Some(&client_source), &west_only, anyone())).await;
    let error = verdicts.client_error();
    assert!(error.contains(SERVER) && error.contains("no roots are known for trust domain east.example"), "{error}");
}

#[tokio::test]
async fn same_id_signed_by_another_ca_is_refused() {
    let (real, forged, west) = (ca("east.example"), ca("east.example"), ca("west.example"));
    let trust = store(&[&real, &west]);
    let impostor = server(&source(&forged, "cluster/east/gateway"), &trust, ClientAuth::Optional(anyone()));
    let verdicts = handshake(&impostor, &client(None, &trust, only(SERVER))).await;
    assert!(verdicts.client_error().contains("does not verify"), "{}", verdicts.client_error());
}

#[tokio::test]
async fn roots_of_one_domain_do_not_vouch_for_another() {
    // west's CA, turned hostile, issues an ID of east under west's root.
    let (east, west) = (ca("east.example"), ca("west.example"));
    let key = crate::keys::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(SERVER.try_into().unwrap())];
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = west.sign_raw(&params, &key);
    let svid = crate::svid::Svid::new(vec![leaf, west.root_der().clone()], &key).unwrap();
    assert_eq!(svid.id().as_str(), SERVER);
    let trust = store(&[&east, &west]);
    let impostor = server(&IdentitySource::new(svid), &trust, ClientAuth::Optional(anyone()));
    let verdicts = handshake(&impostor, &client(None, &trust, anyone())).await;
    assert!(verdicts.client_error().contains("does not verify"), "{}", verdicts.client_error());
}

#[tokio::test]
async fn expired_certificates_are_refused_by_either_side() {
    let (east, west) = (ca("east.example"), ca("west.example"));
    let trust = store(&[&east, &west]);
    let short = IdentitySource::new(svid(&east, "cluster/east/gateway", Duration::from_secs(3600)));
    let config = server(&short, &trust, ClientAuth::Optional(anyone()));
    let mut late = client_config(None, &trust, anyone(), &[]).unwrap();
    late.time_provider = Arc::new(Ahead(Duration::from_secs(7200)));
    let verdicts = handshake(&config, &Arc::new(late)).await;
    assert!(verdicts.client_error().contains("its certificate expired at 20"), "{}", verdicts.client_error());

    let short = IdentitySource::new(svid(&west, "ns/shop/sa/web", Duration::from_secs(3600)));
    let long = source(&east, "cluster/east/gateway");
    let mut late = server_config(&long, &trust, ClientAuth::Required(anyone()), &[]).unwrap();
    late.time_provider = Arc::new(Ahead(Duration::from_secs(7200)));
    let verdicts = handshake(&Arc::new(late), &client(Some(&short), &trust, anyone())).await;
    assert!(verdicts.server_error().contains("Expired"), "{}", verdicts.server_error());
}

#[tokio::test]
async fn expired_roots_vouch_for_nobody() {
    let east = ca("east.example");
    let trust = store(&[&east]);
    let config = server(&source(&east, "cluster/east/gateway"), &trust, ClientAuth::Optional(anyone()));
    let mut late = client_config(None, &trust, anyone(), &[]).unwrap();
    late.time_provider = Arc::new(Ahead(11 * DAY));
    let verdicts = handshake(&config, &Arc::new(late)).await;
    assert!(verdicts.client_error().contains("every root"), "{}", verdicts.client_error());
}

#[tokio::test]
async fn policy_has_the_last_word_on_either_side() {
    let (east, west) = (ca("east.example"), ca("west.example"));
    let trust = store(&[&east, &west]);
    let (server_source, client_source) = (source(&east, "cluster/east/gateway"), source(&west, "ns/shop/sa/web"));
    let other = "spiffe://west.example/ns/shop/sa/other";
    let strict = server(&server_source, &trust, ClientAuth::Required(only(other)));
    let verdicts = handshake(&strict, &client(Some(&client_source), &trust, anyone())).await;
    let alert = verdicts.client.as_ref().unwrap_err().to_string();
    assert!(verdicts.server.is_err() && alert.contains("AccessDenied"), "{alert}");

    let open = server(&server_source, &trust, ClientAuth::Required(anyone()));
    let verdicts = handshake(&open, &client(Some(&client_source), &trust, only(other))).await;
    assert!(verdicts.client_error().contains("is not accepted here"), "{}", verdicts.client_error());
}

#[tokio::test]
async fn client_certificate_is_required_or_optional_as_configured() {
    let east = ca("east.example");
    let trust = store(&[&east]);
    let source = source(&east, "cluster/east/gateway");
    let optional = server(&source, &trust, ClientAuth::Optional(anyone()));
    let verdicts = handshake(&optional, &client(None, &trust, anyone())).await;
    assert_eq!(verdicts.server.unwrap(), None);
    assert_eq!(seen(&verdicts.client), Some(SERVER));

    let required = server(&source, &trust, ClientAuth::Required(anyone()));
    let verdicts = handshake(&required, &client(None, &trust, anyone())).await;
    assert!(verdicts.server_error().contains("no certificates"), "{}", verdicts.server_error());
}

#[tokio::test]
async fn a_bad_certificate_is_refused_even_where_none_is_needed() {
    let (east, stranger) = (ca("east.example"), ca("stranger.example"));
    let trust = store(&[&east]);
    let optional = server(&source(&east, "cluster/east/gateway"), &trust, ClientAuth::Optional(anyone()));
    let verdicts = handshake(&optional, &client(Some(&source(&stranger, "x")), &trust, anyone())).await;
    assert!(verdicts.server_error().contains("UnknownIssuer"), "{}", verdicts.server_error());
}

#[tokio::test]
async fn pinned_client_accepts_the_pinned_root_alone_and_returns_it() {
    let (east, forged) = (ca("east.example"), ca("east.example"));
    let server = server(&source(&east, "cluster/east/gateway"), &store(&[&east]), ClientAuth::Optional(anyone()));
    let (config, root) = pinned_client_config(east.root_sha256(), only(SERVER)).unwrap();
    assert!(root.get().is_none());
    let verdicts = handshake(&server, &Arc::new(config)).await;
    assert_eq!(seen(&verdicts.client), Some(SERVER));
    assert_eq!(root.get().as_ref(), Some(east.root_der()));

    let (config, root) = pinned_client_config(forged.root_sha256(), only(SERVER)).unwrap();
    let verdicts = handshake(&server, &Arc::new(config)).await;
    assert!(verdicts.client_error().contains("pinned root is not in its chain"), "{}", verdicts.client_error());
    assert!(root.get().is_none());
}

#[tokio::test]
async fn a_pinned_root_appended_to_a_foreign_chain_helps_nobody() {
    let (real, forged) = (ca("east.example"), ca("east.example"));
    let svid = svid(&forged, "cluster/east/gateway", DAY);
    let chain = vec![svid.chain()[0].clone(), real.root_der().clone()];
    let impostor = IdentitySource::new(crate::svid::Svid::new(chain, svid.key()).unwrap());
    let server = server(&impostor, &store(&[&real]), ClientAuth::Optional(anyone()));
    let (config, root) = pinned_client_config(real.root_sha256(), anyone()).unwrap();
    let verdicts = handshake(&server, &Arc::new(config)).await;
    assert!(verdicts.client_error().contains("does not verify"), "{}", verdicts.client_error());
    assert!(root.get().is_none());
}

#[tokio::test]
async fn renewal_and_trust_changes_count_from_the_next_handshake_on() {
    let (east, west) = (ca("east.example"), ca("west.example"));
    let (server_source, trust) = (source(&east, "cluster/east/gateway"), store(&[&east]));
    let server = server(&server_source, &trust, ClientAuth::Optional(anyone()));
    let client_source = source(&east, "cluster/east/dns");
    let client = client(Some(&client_source), &trust, anyone());
    assert_eq!(seen(&handshake(&server, &client).await.client), Some(SERVER));

    server_source.set(svid(&east, "cluster/east/agent", DAY));
    client_source.set(svid(&west, "ns/shop/sa/web", DAY));
    assert!(handshake(&server, &client).await.server_error().contains("UnknownIssuer"));

    trust.set((*store(&[&east, &west]).get()).clone());
    let verdicts = handshake(&server, &client).await;
    assert_eq!(seen(&verdicts.client), Some("spiffe://east.example/cluster/east/agent"));
    assert_eq!(seen(&verdicts.server), Some(CLIENT));

    trust.set(Default::default());
    assert!(handshake(&server, &client).await.client_error().contains("no roots are known"));
}

#[test]
fn configurations_fit_quic_and_never_resume() {
    let east = ca("east.example");
    let (source, trust) = (source(&east, "cluster/east/gateway"), store(&[&east]));
    let server = server_config(&source, &trust, ClientAuth::Required(anyone()), &[b"isthmus-tunnel/1"]).unwrap();
    assert_eq!((server.send_tls13_tickets, server.max_early_data_size), (0, 0));
    assert!(!server.session_storage.can_cache());
    let client = client_config(Some(&source), &trust, anyone(), &[b"isthmus-tunnel/1"]).unwrap();
    assert!(!client.enable_early_data);
    for provider in [server.crypto_provider(), client.crypto_provider()] {
        // QUIC's Initial packets need this suite (RFC 9001, 5.2).
        let initial = provider.cipher_suites.iter().filter_map(|suite| suite.tls13());
        let mut initial = initial.filter(|suite| suite.common.suite == CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert!(initial.next().unwrap().quic_suite().is_some());
    }
}

#[test]
fn reasons_and_sources_do_not_show_keys() {
    let source = source(&ca("east.example"), "cluster/east/gateway");
    let text = format!("{source:?} {:?}", source.current().key());
    assert!(text.contains(SERVER) && !text.contains("PRIVATE"), "{text}");
}
