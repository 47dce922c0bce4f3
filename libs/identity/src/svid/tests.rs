use std::os::unix::fs::PermissionsExt as _;

use rcgen::{CertificateParams, IsCa, KeyUsagePurpose, SanType};

use super::*;
use crate::testkit::*;

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// A certificate with these names, else a proper leaf; `change` makes it improper.
fn leaf(names: Vec<SanType>, change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    change(&mut params);
    ca("east.example").sign_raw(&params, &KeyPair::generate().unwrap())
}

#[test]
fn leaf_rules_are_enforced() {
    let good = || vec![uri("spiffe://east.example/x")];
    assert!(spiffe_id_of(&leaf(good(), |_| ())).is_ok());
    assert!(matches!(spiffe_id_of(&leaf(vec![], |_| ())), Err(SvidError::UriSans(0))));
    let two = vec![uri("spiffe://east.example/x"), uri("spiffe://east.example/y")];
    assert!(matches!(spiffe_id_of(&leaf(two, |_| ())), Err(SvidError::UriSans(2))));
    for bad in ["https://east.example/x", "spiffe://east.example", "spiffe://East/x"] {
        assert!(matches!(spiffe_id_of(&leaf(vec![uri(bad)], |_| ())), Err(SvidError::Id(_))), "{bad}");
    }
    let a_ca = leaf(good(), |p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    assert!(matches!(spiffe_id_of(&a_ca), Err(SvidError::IsCa)));
    let signer = leaf(good(), |p| p.key_usages.push(KeyUsagePurpose::CrlSign));
    assert!(matches!(spiffe_id_of(&signer), Err(SvidError::SignsCertificates)));
    let mute = leaf(good(), |p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment]);
    assert!(matches!(spiffe_id_of(&mute), Err(SvidError::NoDigitalSignature)));
    let mut trailing = leaf(good(), |_| ()).to_vec();
    trailing.push(0);
    assert!(matches!(spiffe_id_of(&trailing), Err(SvidError::Malformed)));
}

#[test]
fn a_chain_needs_its_own_key_and_a_sane_length() {
    let svid = svid(&ca("east.example"), "x", DAY);
    let other = KeyPair::generate().unwrap();
    assert!(matches!(Svid::new(svid.chain().to_vec(), &other), Err(SvidError::KeyMismatch { .. })));
    assert!(matches!(Svid::new(Vec::new(), &other), Err(SvidError::ChainLength(0))));
    let long = vec![svid.chain()[0].clone(); MAX_CHAIN + 1];
    assert!(matches!(Svid::new(long, svid.key()), Err(SvidError::ChainLength(9))));
}

#[test]
fn files_give_back_what_was_saved_and_the_key_is_private() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Svid::load(dir.path(), "agent").unwrap().is_none());
    let ca = ca("east.example");
    for _ in 0..2 {
        let svid = svid(&ca, "x", DAY);
        svid.save(dir.path(), "agent").unwrap();
        let loaded = Svid::load(dir.path(), "agent").unwrap().unwrap();
        assert_eq!((loaded.id(), loaded.chain()), (svid.id(), svid.chain()));
        assert_eq!(loaded.key_pem(), svid.key_pem());
    }
    let mode = fs::metadata(dir.path().join("agent.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = fs::read_to_string(dir.path().join("agent.key")).unwrap();
    assert_eq!(text.matches("BEGIN").count(), 1, "the former key is gone");
}

#[test]
fn a_crash_while_saving_leaves_a_pair_that_fits() {
    let dir = tempfile::tempdir().unwrap();
    let ca = ca("east.example");
    let (old, new) = (svid(&ca, "x", DAY), svid(&ca, "x", DAY));
    old.save(dir.path(), "agent").unwrap();
    let (chain, key) = paths(dir.path(), "agent");
    fs::write(&key, format!("{}{}", new.key_pem(), old.key_pem())).unwrap();
    assert_eq!(Svid::load(dir.path(), "agent").unwrap().unwrap().chain(), old.chain());
    fs::write(&chain, new.chain_pem()).unwrap();
    assert_eq!(Svid::load(dir.path(), "agent").unwrap().unwrap().chain(), new.chain());
}

#[test]
fn damaged_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let svid = svid(&ca("east.example"), "x", DAY);
    svid.save(dir.path(), "agent").unwrap();
    let (chain, key) = paths(dir.path(), "agent");
    fs::write(&key, "junk").unwrap();
    let error = Svid::load(dir.path(), "agent").unwrap_err().to_string();
    assert!(error.contains("agent.key holds no private key that fits"), "{error}");
    svid.save(dir.path(), "agent").unwrap();
    assert!(Svid::load(dir.path(), "agent").unwrap().is_some(), "saving repairs");
    fs::write(&chain, "junk").unwrap();
    assert!(matches!(Svid::load(dir.path(), "agent"), Err(SvidError::BadFile { .. })));
}
