use std::os::unix::fs::PermissionsExt as _;

use x509_parser::prelude::*;

use super::*;
use crate::{svid::spiffe_id_of, testkit::*};

fn csr() -> Vec<u8> {
    KeyPair::generate().unwrap().csr_der().unwrap()
}

fn refusal(result: Result<Vec<CertificateDer<'static>>, CaError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn leaf_and_root_have_the_shape_that_spiffe_and_envoy_expect() {
    let ca = ca("east.example");
    let web = id("spiffe://east.example/ns/shop/sa/web");
    let chain = ca.sign_csr(&csr(), &web, &["web.shop.svc".into()], DAY).unwrap();
    assert_eq!(chain[1], *ca.root_der());
    assert_eq!(spiffe_id_of(&chain[0]).unwrap(), web);

    let leaf = X509Certificate::from_der(&chain[0]).unwrap().1;
    let root = X509Certificate::from_der(&chain[1]).unwrap().1;
    assert_ne!(leaf.subject().as_raw(), root.subject().as_raw());
    assert_eq!(leaf.issuer().as_raw(), root.subject().as_raw());
    let usage = |c: &X509Certificate<'_>| c.key_usage().unwrap().unwrap().value.flags;
    assert_eq!((usage(&leaf), usage(&root)), (1, 1 << 5), "digitalSignature; keyCertSign");
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    assert!(root.is_ca() && !leaf.is_ca() && leaf.basic_constraints().unwrap().is_some());
    let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names[..], [GeneralName::URI(web.as_str()), GeneralName::DNSName("web.shop.svc")]);
    let names = &root.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names[..], [GeneralName::URI("spiffe://east.example")]);
    leaf.verify_signature(Some(root.public_key())).unwrap();

    let now = i64::try_from(crate::now().0 / 1000).unwrap();
    let backdated = now - leaf.validity().not_before.timestamp();
    assert!((60..70).contains(&backdated), "{backdated}");
    let again = ca.sign_csr(&csr(), &web, &[], DAY).unwrap();
    assert_ne!(X509Certificate::from_der(&again[0]).unwrap().1.raw_serial(), leaf.raw_serial());
}

#[test]
fn names_and_wishes_of_the_request_are_ignored() {
    let ca = ca("east.example");
    let key = KeyPair::generate().unwrap();
    let mut wish = CertificateParams::default();
    wish.subject_alt_names = vec![
        SanType::URI("spiffe://east.example/cluster/east/agent".try_into().unwrap()),
        SanType::DnsName("admin.example".try_into().unwrap()),
    ];
    wish.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let request = wish.serialize_request(key.signer()).unwrap();
    let web = id("spiffe://east.example/ns/shop/sa/web");
    let chain = ca.sign_csr(request.der(), &web, &[], DAY).unwrap();
    assert_eq!(spiffe_id_of(&chain[0]).unwrap(), web);
    let leaf = X509Certificate::from_der(&chain[0]).unwrap().1;
    assert_eq!(leaf.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
}

#[test]
fn life_of_a_leaf_ends_with_its_root_at_the_latest() {
    let ca = CertificateAuthority::create(&domain("east.example"), DAY).unwrap();
    let svid = svid(&ca, "x", 100 * DAY);
    assert!(svid.not_after() <= crate::now() + DAY);
}

#[test]
fn requests_that_are_forged_foreign_or_damaged_are_refused_with_the_reason() {
    let ca = ca("east.example");
    let web = id("spiffe://east.example/ns/shop/sa/web");
    let sign = |csr: &[u8]| ca.sign_csr(csr, &web, &[], DAY);
    let mut forged = csr();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert!(refusal(sign(&forged)).contains("signature"));
    assert!(refusal(sign(b"garbage")).contains("not a PKCS#10 request"));
    assert!(refusal(sign(&[])).contains("not a PKCS#10 request"));
    assert!(refusal(sign(&vec![0; MAX_CSR + 1])).contains("larger"));
    let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let request = CertificateParams::default().serialize_request(&p384).unwrap();
    assert!(refusal(sign(request.der())).contains("not ECDSA on P-256"));
    let foreign = ca.sign_csr(&csr(), &id("spiffe://west.example/ns/shop/sa/web"), &[], DAY);
    assert!(matches!(foreign, Err(CaError::ForeignId { .. })));
    let named = ca.sign_csr(&csr(), &web, &["not a name".into()], DAY);
    assert!(named.as_ref().unwrap_err().is_requesters_fault());
    assert!(refusal(named).contains("\"not a name\" is not a DNS name"));
}

#[test]
fn a_folder_keeps_its_ca_and_refuses_another_domain() {
    let dir = tempfile::tempdir().unwrap();
    let east = domain("east.example");
    let made = CertificateAuthority::load_or_create(dir.path(), &east).unwrap();
    let loaded = CertificateAuthority::load_or_create(dir.path(), &east).unwrap();
    assert_eq!(made.root_der(), loaded.root_der());
    assert_eq!(made.bundle(), loaded.bundle());
    let mode = fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let other = CertificateAuthority::load_or_create(dir.path(), &domain("west.example")).unwrap_err().to_string();
    assert!(other.contains("holds the CA of trust domain east.example, not of west.example"), "{other}");
}

#[test]
fn a_first_start_cut_short_is_finished_and_damage_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let east = domain("east.example");
    let open = || CertificateAuthority::load_or_create(dir.path(), &east);
    let key = KeyPair::load_or_create(&dir.path().join("ca.key")).unwrap();
    open().unwrap();
    assert_eq!(KeyPair::load(&dir.path().join("ca.key")).unwrap().unwrap().public_key(), key.public_key());

    fs::write(dir.path().join("ca.key"), KeyPair::generate().unwrap().to_pem()).unwrap();
    assert!(matches!(open(), Err(CaError::KeyMismatch { .. })));
    fs::write(dir.path().join("ca.key"), "junk").unwrap();
    assert!(matches!(open(), Err(CaError::Key(KeyError::BadFile { .. }))));
    fs::remove_file(dir.path().join("ca.key")).unwrap();
    assert!(matches!(open(), Err(CaError::KeyMissing { .. })));
    fs::write(dir.path().join("ca.pem"), "junk").unwrap();
    assert!(matches!(open(), Err(CaError::BadRoot { .. })));
}
