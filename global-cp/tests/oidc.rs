//! Tokens of an OpenID Connect issuer at the admin API, with an issuer in the test: good ones, hostile ones, keys that
//! change, and an issuer that is away. Tokens are signed by hand, not by the library that checks them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests; clippy knows only functions marked so"
)]

mod support;

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use aws_lc_rs::{
    hmac,
    rand::SystemRandom,
    rsa,
    signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaPublicKeyComponents},
};
use base64::{Engine as _, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD};
use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use isthmus_global_cp::config::{Config, OidcIssuer};
use isthmus_identity::{
    bundle::TrustStore,
    ca::CertificateAuthority,
    keys::KeyPair,
    svid::Svid,
    tls::{ClientAuth, IdentitySource, server_config},
};
use isthmus_runtime::wait::wait_for;
use serde_json::{Value, json};
use support::{ControlPlane, anyone, client::Client, config};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const ISSUER: &str = "https://issuer.example";

/// A key of the issuer.
enum Key {
    Rsa(rsa::KeyPair),
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

/// An HTTPS server that publishes keys.
struct Issuer {
    uri: String,
    answer: Arc<Mutex<(StatusCode, String)>>,
    asked: Arc<Mutex<usize>>,
    /// Connections, whatever became of them.
    dialled: Arc<Mutex<usize>>,
}

impl Key {
    fn rsa() -> Self {
        Self::Rsa(rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap())
    }

    fn ec() -> Self {
        Self::Ec(EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap())
    }

    fn ed() -> Self {
        Self::Ed(Ed25519KeyPair::generate().unwrap())
    }

    fn alg(&self) -> &'static str {
        match self {
            Self::Rsa(_) => "RS256",
            Self::Ec(_) => "ES256",
            Self::Ed(_) => "EdDSA",
        }
    }

    fn jwk(&self, kid: &str) -> Value {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let mut jwk = match self {
            Self::Rsa(key) => {
                let RsaPublicKeyComponents { n, e } = RsaPublicKeyComponents::<Vec<u8>>::from(key.public_key());
                json!({"kty": "RSA", "n": text(&n), "e": text(&e)})
            }
            Self::Ec(key) => {
                let point = key.public_key().as_ref();
                json!({"kty": "EC", "crv": "P-256", "x": text(&point[1..33]), "y": text(&point[33..])})
            }
            Self::Ed(key) => json!({"kty": "OKP", "crv": "Ed25519", "x": text(key.public_key().as_ref())}),
        };
        jwk["kid"] = kid.into();
        jwk["use"] = "sig".into();
        jwk["alg"] = self.alg().into();
        jwk
    }

    fn sign(&self, header: &Value, claims: &Value) -> String {
        let signed = unsigned(header, claims);
        let bytes = match self {
            Self::Rsa(key) => {
                let mut bytes = vec![0; key.public_modulus_len()];
                let (padding, rng) = (&signature::RSA_PKCS1_SHA256, SystemRandom::new());
                key.sign(padding, &rng, signed.as_bytes(), &mut bytes).unwrap();
                bytes
            }
            Self::Ec(key) => key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap().as_ref().to_vec(),
            Self::Ed(key) => key.sign(signed.as_bytes()).as_ref().to_vec(),
        };
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// As the issuer would.
    fn token(&self, kid: &str, claims: &Value) -> String {
        self.sign(&json!({"alg": self.alg(), "typ": "JWT", "kid": kid}), claims)
    }
}

fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

fn with_secret(header: &Value, claims: &Value, secret: &[u8]) -> String {
    let signed = unsigned(header, claims);
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag))
}

fn now() -> u64 {
    isthmus_runtime::now() / 1000
}

fn claims() -> Value {
    json!({"iss": ISSUER, "aud": "isthmus", "sub": "alice", "groups": ["sre", "dev"], "exp": now() + 600, "iat": now()})
}

/// The good claims, but for some; `null` takes one away.
fn but(changes: &[(&str, Value)]) -> Value {
    let mut claims = claims();
    for (name, value) in changes {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(*name)),
            value => claims[*name] = value.clone(),
        }
    }
    claims
}

impl Issuer {
    /// Its root goes into `<dir>/issuer-ca.pem`.
    async fn start(dir: &Path, keys: &[Value]) -> Self {
        isthmus_identity::install_crypto();
        let domain = "issuer.example".parse().unwrap();
        let ca = CertificateAuthority::create(&domain, Duration::from_secs(3600)).unwrap();
        let key = KeyPair::generate().unwrap();
        let id = "spiffe://issuer.example/server".parse().unwrap();
        let names = ["localhost".to_owned()];
        let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &names, Duration::from_secs(3600)).unwrap();
        let source = IdentitySource::new(Svid::new(chain, &key).unwrap());
        let tls = server_config(&source, &TrustStore::new(), ClientAuth::Optional(anyone()), &[b"http/1.1"]).unwrap();
        let pem = STANDARD.encode(ca.root_der());
        let pem = format!("-----BEGIN CERTIFICATE-----\n{pem}\n-----END CERTIFICATE-----\n");
        std::fs::write(dir.join("issuer-ca.pem"), pem).unwrap();

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("https://localhost:{}/keys", listener.local_addr().unwrap().port());
        let answer = Arc::new(Mutex::new((StatusCode::OK, json!({ "keys": keys }).to_string())));
        let (asked, dialled) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
        let (served, counted, connections) = (answer.clone(), asked.clone(), dialled.clone());
        tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(Arc::new(tls));
            while let Ok((tcp, _)) = listener.accept().await {
                *connections.lock().unwrap() += 1;
                let Ok(stream) = acceptor.accept(tcp).await else { continue };
                let (served, counted) = (served.clone(), counted.clone());
                let service = service_fn(move |_| {
                    *counted.lock().unwrap() += 1;
                    let (status, body) = served.lock().unwrap().clone();
                    async move { Response::builder().status(status).body(Full::new(Bytes::from(body))) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { uri, answer, asked, dialled }
    }

    fn publish(&self, keys: &[Value]) {
        *self.answer.lock().unwrap() = (StatusCode::OK, json!({ "keys": keys }).to_string());
    }

    fn fail(&self) {
        *self.answer.lock().unwrap() = (StatusCode::INTERNAL_SERVER_ERROR, String::new());
    }

    fn asked(&self) -> usize {
        *self.asked.lock().unwrap()
    }

    fn config(&self, dir: &Path) -> Config {
        let oidc: OidcIssuer = serde_json::from_value(json!({
            "issuer": ISSUER, "audience": "isthmus", "jwksUri": self.uri, "caFile": dir.join("issuer-ca.pem"),
            "keysMinRefresh": "1s",
        }))
        .unwrap();
        let mut config = config(dir);
        config.admin.oidc = vec![oidc];
        (config.admin.requests_per_second, config.admin.burst) = (1000, 1000);
        config
    }
}

async fn is_let_in(cp: &ControlPlane, token: &str) -> bool {
    Client::stranger(cp).bearing(token).get("/v1/whoami").await.status == StatusCode::OK
}

async fn lets_in(cp: &ControlPlane, token: &str) {
    wait_for("the issuer's keys", Duration::from_secs(8), async || is_let_in(cp, token).await).await.unwrap();
}

#[tokio::test]
async fn users_come_in_with_what_their_issuer_says_and_get_the_roles_of_their_groups() {
    let dir = tempfile::tempdir().unwrap();
    let keys = [Key::rsa(), Key::ec(), Key::ed()];
    let issuer = Issuer::start(dir.path(), &[keys[0].jwk("0"), keys[1].jwk("1"), keys[2].jwk("2")]).await;
    let cp = ControlPlane::start_with(dir.path(), issuer.config(dir.path())).await;
    for (n, key) in keys.iter().enumerate() {
        let token = key.token(&n.to_string(), &claims());
        lets_in(&cp, &token).await;
        let me = Client::stranger(&cp).bearing(&token).get("/v1/whoami").await.ok();
        assert_eq!((me["who"].as_str(), me["kind"].as_str()), (Some("user:alice"), Some("oidc")), "{}", key.alg());
        assert_eq!(me["groups"], json!(["dev", "sre"]));
        assert_eq!(Client::stranger(&cp).bearing(&token).get("/v1/status").await.code(), (403, "denied"));
    }
    let root = Client::root(&cp);
    root.put("/v1/role-bindings/sre", &json!({"subjects": [{"group": "sre"}], "role": "viewer"})).await.ok();
    let alice = Client::stranger(&cp).bearing(&keys[1].token("1", &claims()));
    alice.get("/v1/status").await.ok();
    assert_eq!(alice.post("/v1/clusters/x/revoke", "").await.code(), (403, "denied"));
    let denied = root.get("/v1/audit?outcome=denied&who=user:alice").await.ok();
    assert_eq!(denied[0]["action"], "revoke");
    // One group, several audiences: both are as good.
    let other = keys[2].token("2", &but(&[("groups", json!("sre")), ("aud", json!(["x", "isthmus"]))]));
    Client::stranger(&cp).bearing(&other).get("/v1/status").await.ok();
    // Within the leeway for clocks.
    for near in [but(&[("exp", json!(now() - 10))]), but(&[("nbf", json!(now() + 10))])] {
        assert!(is_let_in(&cp, &keys[0].token("0", &near)).await, "{near}");
    }
    cp.stop().await;
}

#[tokio::test]
async fn no_hostile_token_gets_in() {
    let dir = tempfile::tempdir().unwrap();
    let (rsa, ec, ed) = (Key::rsa(), Key::ec(), Key::ed());
    let shared = b"a secret that someone has published";
    let oct = json!({"kty": "oct", "kid": "oct", "k": URL_SAFE_NO_PAD.encode(shared), "alg": "HS256"});
    let issuer = Issuer::start(dir.path(), &[rsa.jwk("rsa"), ec.jwk("ec"), ed.jwk("ed"), oct]).await;
    let cp = ControlPlane::start_with(dir.path(), issuer.config(dir.path())).await;
    let good = ec.token("ec", &claims());
    lets_in(&cp, &good).await;

    let header = |alg: &str, kid: &str| json!({"alg": alg, "typ": "JWT", "kid": kid});
    let jwk = rsa.jwk("rsa");
    let modulus = URL_SAFE_NO_PAD.decode(jwk["n"].as_str().unwrap()).unwrap();
    let parts: Vec<&str> = good.split('.').collect();
    let mallory = URL_SAFE_NO_PAD.encode(but(&[("sub", json!("mallory"))]).to_string());
    let mut flipped = URL_SAFE_NO_PAD.decode(parts[2]).unwrap();
    flipped[7] ^= 1;
    let stranger = Key::ec();
    let of_rsa = |claims: &Value| rsa.token("rsa", claims);
    let cases = [
        ("alg none", format!("{}.", unsigned(&header("none", "ec"), &claims())), "bad_algorithm"),
        ("alg None", format!("{}.", unsigned(&header("None", "ec"), &claims())), "bad_algorithm"),
        ("no alg", format!("{}.", unsigned(&json!({"kid": "ec"}), &claims())), "bad_algorithm"),
        ("HS256 with the public key", with_secret(&header("HS256", "rsa"), &claims(), &modulus), "bad_algorithm"),
        (
            "HS256 with the published key as text",
            with_secret(&header("HS256", "rsa"), &claims(), jwk.to_string().as_bytes()),
            "bad_algorithm",
        ),
        ("HS256 with a published secret", with_secret(&header("HS256", "oct"), &claims(), shared), "bad_algorithm"),
        ("a shared secret's name", ec.sign(&header("ES256", "oct"), &claims()), "unknown_key"),
        ("another algorithm of the family", rsa.sign(&header("PS256", "rsa"), &claims()), "bad_algorithm"),
        ("the key of another algorithm", ec.sign(&header("ES256", "rsa"), &claims()), "bad_algorithm"),
        ("no key's name, of several keys", ec.sign(&json!({"alg": "ES256"}), &claims()), "unknown_key"),
        ("somebody else's key", stranger.token("ec", &claims()), "bad_signature"),
        (
            "a key that it brings along",
            stranger.sign(&json!({"alg": "ES256", "kid": "ec", "jwk": stranger.jwk("ec")}), &claims()),
            "bad_signature",
        ),
        ("no signature", format!("{}.{}.", parts[0], parts[1]), "bad_signature"),
        ("another's claims", format!("{}.{mallory}.{}", parts[0], parts[2]), "bad_signature"),
        ("a flipped bit", format!("{}.{}.{}", parts[0], parts[1], URL_SAFE_NO_PAD.encode(flipped)), "bad_signature"),
        ("four parts", format!("{good}.x"), "bad_token"),
        ("two parts", format!("{}.{}", parts[0], parts[1]), "bad_token"),
        (
            "an extension that one must know",
            ec.sign(&json!({"alg": "ES256", "kid": "ec", "crit": ["b64"]}), &claims()),
            "bad_token",
        ),
        ("claims that are none", ec.sign(&header("ES256", "ec"), &json!([1])), "bad_claim"),
        ("another issuer", of_rsa(&but(&[("iss", json!("https://evil.example"))])), "unknown_issuer"),
        ("no issuer", of_rsa(&but(&[("iss", Value::Null)])), "bad_claim"),
        ("another audience", of_rsa(&but(&[("aud", json!("shop"))])), "wrong_audience"),
        ("no audience", of_rsa(&but(&[("aud", Value::Null)])), "bad_claim"),
        ("expired", of_rsa(&but(&[("exp", json!(now() - 60))])), "token_expired"),
        ("for ever", of_rsa(&but(&[("exp", Value::Null)])), "bad_claim"),
        ("not yet valid", of_rsa(&but(&[("nbf", json!(now() + 120))])), "token_not_yet_valid"),
        ("nobody", of_rsa(&but(&[("sub", Value::Null)])), "bad_claim"),
        ("a name of two lines", of_rsa(&but(&[("sub", json!("a\nb"))])), "bad_claim"),
        ("an endless name", of_rsa(&but(&[("sub", json!("a".repeat(300)))])), "bad_claim"),
        ("groups that are none", of_rsa(&but(&[("groups", json!({"a": 1}))])), "bad_claim"),
        ("far too many groups", of_rsa(&but(&[("groups", json!(vec!["g"; 300]))])), "bad_claim"),
    ];
    for (what, token, code) in cases {
        let reply = Client::stranger(&cp).bearing(&token).get("/v1/whoami").await;
        assert_eq!(reply.code(), (401, code), "{what}: {}", reply.body);
        assert!(!reply.message().contains(&token), "{what}");
        // A good certificate does not help it.
        assert_eq!(Client::root(&cp).bearing(&token).get("/v1/whoami").await.code(), (401, code), "{what}");
    }
    assert!(is_let_in(&cp, &good).await);
    cp.stop().await;
}

#[tokio::test]
async fn new_keys_are_found_old_ones_go_on_while_the_issuer_is_away_and_a_flood_does_not_reach_it() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Key::ec(), Key::ed());
    let issuer = Issuer::start(dir.path(), &[old.jwk("old")]).await;
    let cp = ControlPlane::start_with(dir.path(), issuer.config(dir.path())).await;
    lets_in(&cp, &old.token("old", &claims())).await;

    issuer.fail();
    let (begun, before) = (tokio::time::Instant::now(), issuer.asked());
    for n in 0..200 {
        let reply = Client::stranger(&cp).bearing(&new.token(&format!("guess-{n}"), &claims())).get("/v1/whoami").await;
        assert_eq!(reply.code(), (401, "unknown_key"));
    }
    assert!(is_let_in(&cp, &old.token("old", &claims())).await, "the issuer is away, its keys are not");
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap();
    let asked = issuer.asked() - before;
    assert!(asked <= seconds + 2, "{asked} attempts in {seconds} s");

    issuer.publish(&[old.jwk("old"), new.jwk("new")]);
    lets_in(&cp, &new.token("new", &claims())).await;
    assert!(is_let_in(&cp, &old.token("old", &claims())).await);
    // What the issuer does not publish any more is no key any more, when the keys are fetched the next time.
    issuer.publish(&[new.jwk("new")]);
    let gone = async || {
        Client::stranger(&cp).bearing(&new.token("unknown", &claims())).get("/v1/whoami").await;
        !is_let_in(&cp, &old.token("old", &claims())).await
    };
    wait_for("the old key's end", Duration::from_secs(8), gone).await.unwrap();
    // An answer that is none, or is far too large, changes nothing.
    for bad in ["{}".to_owned(), "x".repeat(1 << 20)] {
        let asked = issuer.asked();
        *issuer.answer.lock().unwrap() = (StatusCode::OK, bad);
        let fetched = async || {
            Client::stranger(&cp).bearing(&new.token("unknown", &claims())).get("/v1/whoami").await;
            issuer.asked() > asked
        };
        wait_for("another attempt", Duration::from_secs(8), fetched).await.unwrap();
        assert!(is_let_in(&cp, &new.token("new", &claims())).await);
    }
    cp.stop().await;
}

#[tokio::test]
async fn a_server_that_its_roots_do_not_vouch_for_publishes_no_keys() {
    let dir = tempfile::tempdir().unwrap();
    let key = Key::ec();
    let issuer = Issuer::start(dir.path(), &[key.jwk("k")]).await;
    let other = issuer.config(dir.path());
    // The file now holds the root of another one.
    drop(Issuer::start(dir.path(), &[]).await);
    let cp = ControlPlane::start_with(dir.path(), other).await;
    // The second attempt comes when the first is over.
    let refused = async || *issuer.dialled.lock().unwrap() >= 2;
    wait_for("two attempts", Duration::from_secs(8), refused).await.unwrap();
    let reply = Client::stranger(&cp).bearing(&key.token("k", &claims())).get("/v1/whoami").await;
    assert_eq!(reply.code(), (401, "unknown_key"));
    assert_eq!(issuer.asked(), 0, "nothing was asked over a connection that nobody vouches for");
    cp.stop().await;
}

#[tokio::test]
async fn keys_may_come_from_a_file_and_names_get_the_issuers_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let key = Key::ed();
    let file = dir.path().join("keys.json");
    std::fs::write(&file, json!({"keys": [key.jwk("k")]}).to_string()).unwrap();
    let oidc = json!({
        "issuer": ISSUER, "audience": "isthmus", "jwksFile": file, "usernameClaim": "email", "groupsClaim": "teams",
        "prefix": "corp:", "keysMinRefresh": "1s",
    });
    let mut from_file = config(dir.path());
    from_file.admin.oidc = vec![serde_json::from_value(oidc).unwrap()];
    let cp = ControlPlane::start_with(dir.path(), from_file).await;
    let named = |verified: Value| {
        // The only key needs no name.
        let claims = but(&[("email", json!("a@b.example")), ("teams", json!(["x"])), ("email_verified", verified)]);
        key.sign(&json!({"alg": "EdDSA"}), &claims)
    };
    lets_in(&cp, &named(json!(true))).await;
    let me = Client::stranger(&cp).bearing(&named(Value::Null)).get("/v1/whoami").await.ok();
    assert_eq!((me["who"].as_str(), &me["groups"]), (Some("user:corp:a@b.example"), &json!(["corp:x"])));
    for unverified in [json!(false), json!("true")] {
        let reply = Client::stranger(&cp).bearing(&named(unverified)).get("/v1/whoami").await;
        assert_eq!(reply.code(), (401, "bad_claim"));
    }
    cp.stop().await;
}
