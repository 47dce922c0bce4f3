//! Credentials, roles and the audit log from the command line, against an admin API in this process that answers with what
//! it was asked.

use axum::{
    Json, Router,
    body::Bytes,
    http::{HeaderMap, HeaderName, StatusCode, Uri, header::AUTHORIZATION},
    routing::{delete, get, post, put},
};
use serde_json::{Value, json};

use super::tests::ControlPlane;
use crate::Verdict;

fn header(headers: &HeaderMap, name: HeaderName) -> String {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("none").to_owned()
}

/// The user's name is the header that came.
async fn who_am_i(headers: HeaderMap) -> Json<Value> {
    let roles = json!([{"role": "operator", "namespaces": ["shop", "pay"]}]);
    Json(
        json!({"who": header(&headers, AUTHORIZATION), "kind": "oidc", "groups": ["sre"], "root": false, "roles": roles}),
    )
}

/// The binding's subjects are those that came, its name is what was demanded of its version.
async fn set_binding(headers: HeaderMap, Json(body): Json<Value>) -> Json<Value> {
    let condition = format!(
        "{}/{}",
        header(&headers, HeaderName::from_static("if-match")),
        header(&headers, HeaderName::from_static("if-none-match"))
    );
    assert_eq!(body["role"], "operator");
    assert_eq!(body["namespaces"], json!(["shop"]));
    assert_eq!(body["subjects"], json!([{"user": "a b"}, {"group": "sre"}, {"group": "dev"}]));
    Json(
        json!({"name": condition, "subjects": body["subjects"], "role": "operator", "namespaces": ["shop"], "resourceVersion": 8}),
    )
}

async fn audit(uri: Uri) -> Json<Value> {
    let stamp = json!({"epoch": 1, "revision": 7});
    Json(json!([
        {"at": 1000, "who": uri.query(), "action": "revoke", "subject": "us-east", "outcome": "changed", "count": 1,
            "before": stamp, "after": {"epoch": 1, "revision": 8}},
        {"at": 0, "who": "", "action": "attempts", "outcome": "unauthenticated", "count": 40, "before": stamp, "after": stamp},
    ]))
}

fn refusal(status: u16, code: &str, message: &str) -> (StatusCode, Json<Value>) {
    (StatusCode::from_u16(status).unwrap(), Json(json!({"error": {"code": code, "message": message}})))
}

fn api() -> Router {
    Router::new()
        .route("/whoami", get(who_am_i))
        .route(
            "/tokens",
            get(async || Json(json!([{"name": "ci", "createdAt": 0, "expiresAt": 1000, "expired": true}]))),
        )
        .route(
            "/tokens/ci",
            post(async |body: Bytes| {
                assert_eq!(body, "{\"ttlSeconds\":28800}");
                Json(json!({"name": "ci", "token": "isthmus-api.ci.secret", "expiresAt": 1000}))
            }),
        )
        .route("/tokens/old", delete(async || Json(json!({"deleted": "old"}))))
        .route("/role-bindings", get(async || Json(json!([]))))
        .route("/role-bindings/shop", put(set_binding))
        .route("/audit", get(audit))
        .route("/status", get(async || refusal(401, "token_expired", "the token has expired")))
        .route("/nodes", get(async || refusal(403, "denied", "it needs the role viewer")))
        .route("/events", get(async || refusal(429, "throttled", "the next one may come in 1.5 s")))
}

/// Puts a token into the plane's context, beside the certificate or in its place.
fn with_token(plane: &ControlPlane, certificate: bool) {
    let dir = plane.dir.path();
    let credentials = if certificate { "cert: admin.pem\nkey: admin.key\n" } else { "" };
    let text = format!(
        "server: {}\nca: ca.pem\nfederation: isthmus.example\ntokenFile: ci.token\n{credentials}",
        plane.address
    );
    std::fs::write(dir.join("context.yaml"), text).unwrap();
    std::fs::write(dir.join("ci.token"), "isthmus-api.ci.secret\n").unwrap();
}

#[tokio::test]
async fn a_token_goes_with_each_request_and_needs_no_certificate() {
    let plane = ControlPlane::start(api()).await;
    let (_, out) = plane.run("whoami").await;
    assert!(out.starts_with("none (oidc)\ngroups: sre\noperator: shop, pay\n"), "{out}");
    for certificate in [false, true] {
        with_token(&plane, certificate);
        let (verdict, out) = plane.run("whoami").await;
        assert_eq!(verdict.unwrap(), Verdict::Yes);
        assert!(out.starts_with("Bearer isthmus-api.ci.secret (oidc)\n"), "{out}");
    }
}

#[tokio::test]
async fn refusals_say_what_to_look_at() {
    let plane = ControlPlane::start(api()).await;
    let said = async |line: &str| plane.run(line).await.0.unwrap_err().to_string();
    let unknown = said("status").await;
    assert!(unknown.contains("does not know who is calling") && unknown.contains("`cert` and `key`"), "{unknown}");
    let denied = said("cp status").await;
    assert!(denied.contains("needs the role viewer") && denied.contains("isthmusctl whoami"), "{denied}");
    let throttled = said("history").await;
    assert!(throttled.contains("asks for patience") && throttled.contains("1.5 s"), "{throttled}");
    with_token(&plane, false);
    let unknown = said("status").await;
    assert!(unknown.contains("token has expired") && unknown.contains("`tokenFile`"), "{unknown}");
    with_token(&plane, true);
    assert!(said("status").await.contains("the token decides"));
    assert!(!said("status").await.contains("secret"));
}

#[tokio::test]
async fn tokens_are_minted_listed_and_deleted() {
    let plane = ControlPlane::start(api()).await;
    assert_eq!(plane.run("token create ci --ttl 8h").await.1, "isthmus-api.ci.secret\n");
    let (_, list) = plane.run("token list").await;
    assert!(list.contains("ci") && list.contains("1970-01-01T00:00:01Z (expired)"), "{list}");
    assert_eq!(plane.run("token delete old").await.1, "old deleted\n");
}

#[tokio::test]
async fn bindings_are_set_whole_and_with_the_version_that_is_expected() {
    let plane = ControlPlane::start(api()).await;
    let line = "role-binding set shop --role operator --group sre --group dev --namespace shop";
    for (option, condition) in
        [("", "none/none"), (" --resource-version 7", "\"7\"/none"), (" --resource-version 0", "none/*")]
    {
        // The line is split at blanks, and a user's name may have one.
        let file = plane.dir.path().join("context.yaml");
        let mut words = vec!["isthmusctl", "--context", file.to_str().unwrap()];
        let whole = format!("{line}{option}");
        words.extend(whole.split(' '));
        words.extend(["--user", "a b"]);
        let mut out = Vec::new();
        super::run(clap::Parser::try_parse_from(words).unwrap(), &mut out).await.unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), format!("{condition} set, version 8\n"));
    }
    let (_, list) = plane.run("role-binding list").await;
    assert!(list.contains("only the control plane's own administrator"), "{list}");
    let nobody = <crate::args::Cli as clap::Parser>::try_parse_from([
        "isthmusctl",
        "role-binding",
        "set",
        "a",
        "--role",
        "admin",
    ]);
    assert!(nobody.unwrap_err().to_string().contains("--user"));
}

#[tokio::test]
async fn the_audit_log_is_asked_for_exactly() {
    let plane = ControlPlane::start(api()).await;
    let (_, table) = plane.run("audit --who user:a&b --outcome refused --since 1970-01-01T00:00:01Z").await;
    assert!(table.contains("limit=50&who=user%3Aa%26b&outcome=refused&since=1000"), "{table}");
    assert!(table.contains("1.7 -> 1.8") && table.contains("(stranger)") && table.contains("40"), "{table}");
    let (_, lines) = plane.run("audit -o jsonl").await;
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines[0]["at"].as_u64(), lines[1]["at"].as_u64()), (Some(0), Some(1000)), "oldest first");
}

#[tokio::test]
async fn shells_complete_every_command() {
    let plane = ControlPlane::start(api()).await;
    for shell in ["bash", "zsh", "fish"] {
        let (verdict, script) = plane.run(&format!("completion {shell}")).await;
        assert_eq!(verdict.unwrap(), Verdict::Yes);
        for word in ["isthmusctl", "role-binding", "join-token", "completion"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

#[tokio::test]
async fn contexts_are_chosen_by_name() {
    let plane = ControlPlane::start(api()).await;
    let (one, all) = (plane.dir.path().join("context.yaml"), plane.dir.path().join("all.yaml"));
    let run = async |line: &str| {
        let mut words = vec!["isthmusctl", "--contexts", all.to_str().unwrap()];
        words.extend(line.split(' '));
        let mut out = Vec::new();
        let verdict = super::run(clap::Parser::try_parse_from(words).unwrap(), &mut out).await;
        verdict.map(|_| String::from_utf8(out).unwrap())
    };
    run(&format!("context add prod {}", one.display())).await.unwrap();
    run(&format!("context add dev {}", one.display())).await.unwrap();
    assert_eq!(run("context current").await.unwrap(), "prod\n");
    let list = run("context list").await.unwrap();
    assert!(list.contains("*       prod") && list.contains("certificate"), "{list}");
    run("whoami").await.unwrap();
    run("whoami --context dev").await.unwrap();
    assert!(run("whoami --context prdo").await.unwrap_err().to_string().contains("prod"));
    run("context use dev").await.unwrap();
    run("context remove dev").await.unwrap();
    assert!(run("whoami").await.unwrap_err().to_string().contains("context use"));
}
