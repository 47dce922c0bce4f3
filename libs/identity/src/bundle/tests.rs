use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::testkit::*;

fn document(json: &Value) -> Result<BundleDocument, BundleError> {
    BundleDocument::parse(&json.to_string())
}

fn bundle_json(name: &str) -> Value {
    serde_json::from_str(&ca(name).bundle().document).unwrap()
}

fn successor(prev: &TrustBundle, sequence: u64, roots: &[&crate::ca::CertificateAuthority]) -> TrustBundle {
    let x509_roots = roots.iter().map(|ca| ca.root_der().clone()).collect();
    let document = BundleDocument { sequence, refresh_hint: None, x509_roots }.to_json().unwrap();
    TrustBundle { trust_domain: prev.trust_domain.clone(), document, predecessor_signature: Vec::new() }
}

#[test]
fn a_ca_s_bundle_round_trips_and_is_a_jwk_set() {
    let ca = ca("east.example");
    let parsed = BundleDocument::parse(&ca.bundle().document).unwrap();
    assert_eq!(parsed.x509_roots, [ca.root_der().clone()]);
    assert_eq!(parsed.sequence, 1);
    assert_eq!(BundleDocument::parse(&parsed.to_json().unwrap()).unwrap(), parsed);
    let json: Value = serde_json::from_str(&ca.bundle().document).unwrap();
    let key = &json["keys"][0];
    assert_eq!((&key["kty"], &key["crv"], &key["use"]), (&json!("EC"), &json!("P-256"), &json!("x509-svid")));
    assert!(key.get("kid").is_none() && key["x"].is_string() && key["y"].is_string());
    assert_eq!(key["x5c"].as_array().unwrap().len(), 1);
}

#[test]
fn unknown_keys_are_skipped_and_no_keys_means_all_revoked() {
    let mut json = bundle_json("east.example");
    let keys = json["keys"].as_array_mut().unwrap();
    keys.push(json!({"kty": "quantum", "use": "x509-svid", "x5c": "whatever"}));
    keys.push(json!({"kty": "EC", "use": "jwt-svid", "kid": "a", "crv": "P-256", "x": "", "y": ""}));
    keys.push(json!({"kty": "EC", "use": "x509-svid"}));
    keys.push(json!({"kty": "EC", "use": "x509-svid", "x5c": []}));
    assert_eq!(document(&json).unwrap().x509_roots.len(), 1);
    assert_eq!(document(&json!({"keys": []})).unwrap().x509_roots, []);
}

#[test]
fn duplicate_members_and_repeated_roots_are_refused() {
    for text in [r#"{"keys":[],"keys":[]}"#, r#"{"keys":[{"kty":"x","kty":"y"}]}"#, r#"{"keys":[],"z":{"a":1,"a":1}}"#]
    {
        assert!(matches!(BundleDocument::parse(text), Err(BundleError::Json(e)) if e.contains("duplicate")), "{text}");
    }
    let mut json = bundle_json("east.example");
    let key = json["keys"][0].clone();
    json["keys"].as_array_mut().unwrap().push(key);
    assert_eq!(document(&json), Err(BundleError::Repeated(1)));
}

#[test]
fn what_is_wrong_is_named() {
    let field = |json: Value| match document(&json) {
        Err(BundleError::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(field(json!([])), "top level");
    assert_eq!(field(json!({})), "keys");
    assert_eq!(field(json!({"keys": [1]})), "keys[0]");
    assert_eq!(field(json!({"keys": [{}]})), "keys[0].kty");
    assert_eq!(field(json!({"keys": [], "spiffe_sequence": -1})), "spiffe_sequence");
    assert_eq!(field(json!({"keys": [{"kty": "EC", "use": "x509-svid", "x5c": ["*"]}]})), "keys[0].x5c");
}

#[test]
fn a_certificate_that_is_no_ca_or_has_other_coordinates_is_refused() {
    let east = ca("east.example");
    let leaf = svid(&east, "x", DAY).chain()[0].clone();
    let made = BundleDocument { sequence: 1, refresh_hint: None, x509_roots: vec![leaf] }.to_json();
    assert_eq!(made, Err(BundleError::Root { index: 0, reason: RootError::NotCa }));
    let mut json = bundle_json("east.example");
    json["keys"][0]["x"] = bundle_json("east.example")["keys"][0]["x"].clone();
    assert_eq!(document(&json), Err(BundleError::Coordinates(0)));
}

#[test]
fn roots_of_another_domain_are_found_out() {
    let parsed = BundleDocument::parse(&ca("east.example").bundle().document).unwrap();
    assert_eq!(parsed.require_domain(&domain("east.example")), Ok(()));
    assert!(matches!(parsed.require_domain(&domain("west.example")), Err(BundleError::ForeignRoot { index: 0, .. })));
}

#[test]
fn size_and_number_of_keys_are_bounded() {
    let many = json!({"keys": vec![json!({"kty": "none"}); MAX_KEYS + 1]});
    assert_eq!(document(&many), Err(BundleError::TooManyKeys(65)));
    let large = " ".repeat(MAX_DOCUMENT + 1);
    assert_eq!(BundleDocument::parse(&large), Err(BundleError::TooLarge(MAX_DOCUMENT + 1)));
    assert!(matches!(BundleDocument::parse(&"[".repeat(100_000)), Err(BundleError::Json(_))));
}

#[test]
fn a_successor_needs_the_predecessor_s_signature_and_a_larger_sequence() {
    let (old, new, thief) = (ca("east.example"), ca("east.example"), ca("east.example"));
    let first = old.bundle();
    assert_eq!(verify_successor(&first, &first), Ok(()));
    let spaced = TrustBundle { document: format!(" {}", first.document), ..first.clone() };
    assert_eq!(verify_successor(&first, &spaced), Ok(()));

    let mut second = successor(&first, 2, &[&old, &new]);
    assert_eq!(verify_successor(&first, &second), Err(BundleError::NotSigned(domain("east.example"))));
    second.predecessor_signature = thief.sign_document(second.document.as_bytes()).unwrap();
    assert_eq!(verify_successor(&first, &second), Err(BundleError::NotSigned(domain("east.example"))));
    second.predecessor_signature = old.sign_document(second.document.as_bytes()).unwrap();
    assert_eq!(verify_successor(&first, &second), Ok(()));

    let mut third = successor(&second, 3, &[&new]);
    third.predecessor_signature = new.sign_document(third.document.as_bytes()).unwrap();
    assert_eq!(verify_successor(&second, &third), Ok(()));
    assert!(verify_successor(&first, &third).is_err(), "the first bundle does not know the new key");

    let mut replayed = successor(&first, 1, &[&new]);
    replayed.predecessor_signature = old.sign_document(replayed.document.as_bytes()).unwrap();
    assert_eq!(verify_successor(&first, &replayed), Err(BundleError::Sequence { prev: 1, next: 1 }));

    let mut foreign = second.clone();
    foreign.trust_domain = domain("west.example");
    assert!(matches!(verify_successor(&first, &foreign), Err(BundleError::OtherTrustDomain { .. })));
}

#[test]
fn the_store_gives_back_what_was_set() {
    let (east, west) = (ca("east.example"), ca("west.example"));
    let store = store(&[&east, &west]);
    assert_eq!(store.get().len(), 2);
    assert_eq!(store.get()[&domain("west.example")], [west.root_der().clone()]);
    let clone = store.clone();
    store.set(Default::default());
    assert!(clone.get().is_empty());
}

proptest! {
    #[test]
    fn parsing_never_panics(text in any::<String>()) {
        drop(BundleDocument::parse(&text));
    }

    #[test]
    fn parsing_damaged_documents_never_panics(at in 0usize..1200, byte in any::<u8>()) {
        let mut bytes = sample().as_bytes().to_vec();
        let at = at % bytes.len();
        bytes[at] = byte;
        drop(BundleDocument::parse(&String::from_utf8_lossy(&bytes)));
        drop(BundleDocument::parse(&String::from_utf8_lossy(&bytes[..at])));
    }

    #[test]
    fn reading_certificates_never_panics(at in 0usize..600, byte in any::<u8>(), junk in prop::collection::vec(any::<u8>(), 0..64)) {
        let parsed = BundleDocument::parse(sample()).unwrap();
        let mut der = parsed.x509_roots[0].to_vec();
        let at = at % der.len();
        der[at] = byte;
        drop(crate::x509::root(&der));
        drop(crate::svid::spiffe_id_of(&der));
        drop(crate::x509::root(&junk));
        let _ = crate::x509::is_self_issued(&der[..at]);
    }
}

fn sample() -> &'static str {
    static SAMPLE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    SAMPLE.get_or_init(|| ca("east.example").bundle().document)
}
