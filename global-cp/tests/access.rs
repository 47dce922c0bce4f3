//! Who may do what through the admin API, over real TLS: roles, tokens, audit, limits.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests; clippy knows only functions marked so"
)]

mod support;

use std::{collections::BTreeSet, path::Path, time::Duration};

use hyper::StatusCode;
use isthmus_runtime::wait::wait_for;
use serde_json::{Value, json};
use support::{Agent, ControlPlane, Session, client::Client, config};

/// A client with a new API token that has this role.
async fn bearer(cp: &ControlPlane, name: &str, role: Option<(&str, &[&str])>) -> Client {
    let root = Client::root(cp);
    let minted = root.post(&format!("/v1/tokens/{name}"), "").await.ok();
    if let Some((role, namespaces)) = role {
        let binding = json!({"subjects": [{"token": name}], "role": role, "namespaces": namespaces});
        root.put(&format!("/v1/role-bindings/{name}"), &binding).await.ok();
    }
    Client::stranger(cp).bearing(minted["token"].as_str().unwrap())
}

/// (method, path, role) as `docs/admin-api.md` says.
fn documented() -> Vec<(String, String, String)> {
    let text = include_str!("../../docs/admin-api.md");
    let (_, rest) = text.split_once("<!-- routes -->").unwrap();
    let (table, _) = rest.split_once("<!-- /routes -->").unwrap();
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        (cells[1].to_owned(), cells[2].trim_matches('`').to_owned(), cells[3].to_owned())
    };
    table.lines().filter(|line| line.contains("`/v1/")).map(row).collect()
}

#[tokio::test]
async fn each_route_is_open_to_exactly_the_roles_of_the_documented_table() {
    let dir = tempfile::tempdir().unwrap();
    let mut roomy = config(dir.path());
    (roomy.admin.requests_per_second, roomy.admin.burst) = (1000, 1000);
    let cp = ControlPlane::start_with(dir.path(), roomy).await;
    let served = Client::root(&cp).get("/v1/openapi.json").await.ok();
    let routes = documented();
    let told: BTreeSet<(String, String)> = routes.iter().map(|(m, p, _)| (m.clone(), p.clone())).collect();
    let methods = |path: &Value| path.as_object().unwrap().keys().map(|m| m.to_ascii_uppercase()).collect::<Vec<_>>();
    let paths = served["paths"].as_object().unwrap();
    let spec =
        paths.iter().flat_map(|(path, item)| methods(item).into_iter().map(move |m| (m, path.clone()))).collect();
    assert_eq!(told, spec, "the documented table and the served document name the same routes");

    let nobody = Client::stranger(&cp);
    let callers = [
        (bearer(&cp, "none", None).await, 0),
        (bearer(&cp, "viewer", Some(("viewer", &["*"]))).await, 1),
        (bearer(&cp, "shop", Some(("operator", &["shop"]))).await, 1),
        (bearer(&cp, "operator", Some(("operator", &["*"]))).await, 2),
        // Last, since it can do what the table says.
        (bearer(&cp, "boss", Some(("admin", &["*"]))).await, 3),
    ];
    for (method, template, role) in routes {
        let path = template.replace("{name}", "x").replace("{cluster}", "x").replace("{revision}", "0");
        let path = path.replace("{from}", "0").replace("{to}", "0").replace("{kind}", "settings");
        let needed = ["any", "viewer", "operator", "admin"].iter().position(|r| *r == role).expect("a known role");
        let reply = nobody.send(&method, &path, &[], "").await;
        assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{method} {path} for nobody");
        for (caller, has) in &callers {
            let reply = caller.send(&method, &path, &[], "").await;
            let denied = reply.status == StatusCode::FORBIDDEN;
            assert_eq!(denied, *has < needed, "{method} {path} for {has}: {} {}", reply.status, reply.body);
            assert_ne!(reply.status, StatusCode::UNAUTHORIZED, "{method} {path} for {has}");
            if !denied {
                assert!(!["internal", "denied"].contains(&reply.code().1), "{method} {path}: {}", reply.body);
            }
        }
        // What is asked with HEAD is what is asked with GET.
        if method == "GET" {
            let reply = callers[0].0.send("HEAD", &path, &[], "").await;
            assert_eq!(reply.status == StatusCode::FORBIDDEN, needed > 0, "HEAD {path}");
        }
    }
    cp.stop().await;
}

/// Does `value` have the form that the document tells? As much of JSON Schema as the document uses.
fn fits(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if let Some(reference) = schema["$ref"].as_str() {
        return fits(document, document.pointer(reference.trim_start_matches('#')).ok_or(reference)?, value);
    }
    if let Some(choices) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
        let one = choices.iter().any(|choice| fits(document, choice, value).is_ok());
        return one.then_some(()).ok_or(format!("{value} is none of {choices:?}"));
    }
    if let Some(only) = schema.get("const") {
        return (only == value).then_some(()).ok_or(format!("{value} is not {only}"));
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        _ => return Err(format!("the document says nothing of {value}")),
    };
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if !types.contains(&found) {
        return Err(format!("{value} is no {types:?}"));
    }
    for item in value.as_array().into_iter().flatten() {
        fits(document, &schema["items"], item)?;
    }
    let Value::Object(fields) = value else { return Ok(()) };
    let Some(properties) = schema["properties"].as_object() else { return Ok(()) };
    for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        fields.get(required).ok_or(format!("{required} is missing in {value}"))?;
    }
    for (name, field) in fields {
        fits(document, properties.get(name).ok_or(format!("{name} is not told"))?, field)?;
    }
    Ok(())
}

#[tokio::test]
async fn answers_have_the_form_that_the_document_tells() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    bearer(&cp, "ops", Some(("operator", &["shop"]))).await.get("/v1/backup").await;
    let root = Client::root(&cp);
    let document = root.get("/v1/openapi.json").await.ok();
    let binding =
        json!({"subjects": [{"spiffe": "spiffe://isthmus.example/admin/bob"}, {"user": "a"}], "role": "viewer"});
    for (method, path, template, body) in [
        ("PUT", "/v1/role-bindings/new", "/v1/role-bindings/{name}", binding.to_string().as_str()),
        ("GET", "/v1/role-bindings", "/v1/role-bindings", ""),
        ("GET", "/v1/role-bindings/ops", "/v1/role-bindings/{name}", ""),
        ("DELETE", "/v1/role-bindings/new", "/v1/role-bindings/{name}", ""),
        ("POST", "/v1/tokens/new", "/v1/tokens/{name}", ""),
        ("GET", "/v1/tokens", "/v1/tokens", ""),
        ("GET", "/v1/whoami", "/v1/whoami", ""),
        ("GET", "/v1/audit", "/v1/audit", ""),
        ("GET", "/v1/status", "/v1/status", ""),
        ("GET", "/v1/services", "/v1/services", ""),
        ("POST", "/v1/clusters/us-east/join-token", "/v1/clusters/{name}/join-token", ""),
        ("POST", "/v1/rollback/0", "/v1/rollback/{revision}", ""),
        ("POST", "/v1/clusters/nobody/revoke", "/v1/clusters/{name}/revoke", ""),
        ("DELETE", "/v1/nodes/nobody", "/v1/nodes/{name}", ""),
        ("POST", "/v1/restore", "/v1/restore", "x"),
    ] {
        let reply = root.send(method, path, &[], body).await;
        let responses = &document["paths"][template][method.to_ascii_lowercase()]["responses"];
        let schema = &responses[reply.status.as_str()]["content"]["application/json"]["schema"];
        fits(&document, schema, &reply.body).unwrap_or_else(|why| panic!("{method} {path} {}: {why}", reply.status));
    }
    // The check itself sees what does not fit.
    let wrong = json!({"who": 1, "kind": "x", "groups": [], "root": false, "roles": []});
    let schema = &document["paths"]["/v1/whoami"]["get"]["responses"]["200"]["content"]["application/json"]["schema"];
    assert!(fits(&document, schema, &wrong).is_err() && fits(&document, schema, &json!({"who": "x"})).is_err());
    cp.stop().await;
}

#[tokio::test]
async fn strangers_are_told_how_to_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let stranger = Client::stranger(&cp);
    for path in ["/v1/status", "/v1/nothing", "/", "/v1/openapi.json"] {
        let reply = stranger.get(path).await;
        assert_eq!(reply.code(), (401, "unauthenticated"), "{path}");
        assert_eq!(reply.headers["www-authenticate"], "Bearer realm=\"isthmus\"");
        assert!(reply.message().contains("certificate") && reply.message().contains("Authorization: Bearer"));
    }
    let long = "x".repeat(17 << 10);
    for (header, code) in [
        ("Basic YTpi", "bad_authorization_header"),
        ("Bearer", "bad_authorization_header"),
        (&format!("Bearer {long}"), "bad_authorization_header"),
        ("Bearer garbage", "bad_token"),
        ("Bearer a.b.c", "bad_token"),
        ("Bearer ....", "bad_token"),
        ("Bearer isthmus-api.", "unknown_api_token"),
        ("Bearer isthmus-api.ci.guess", "unknown_api_token"),
        ("Bearer isthmus-api.../.guess", "unknown_api_token"),
    ] {
        let reply = stranger.send("GET", "/v1/status", &[("authorization", header)], "").await;
        assert_eq!(reply.code(), (401, code), "{:.40}", header);
        assert_eq!(reply.headers["www-authenticate"], "Bearer realm=\"isthmus\", error=\"invalid_token\"");
        assert!(!reply.message().contains("guess"), "{}", reply.message());
    }
    let two = [("authorization", "Bearer a"), ("authorization", "Bearer b")];
    assert_eq!(stranger.send("GET", "/v1/status", &two, "").await.code(), (401, "bad_authorization_header"));
    // A header that no request has is refused before anyone looks at it, and the server lives.
    let huge = "x".repeat(1 << 20);
    if let Ok(reply) = stranger.try_send("GET", "/v1/status", &[("x-huge", &huge)], "").await {
        assert_eq!(reply.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    }
    let many: Vec<(String, &str)> = (0..200).map(|n| (format!("x-{n}"), "y")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let reply = stranger.send("GET", "/v1/status", &many, "").await;
    assert_eq!(reply.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let body = "x".repeat(65 << 10);
    assert_eq!(stranger.post("/v1/tokens/x", &body).await.code().0, 401, "nobody reads a stranger's body");
    let reply = Client::root(&cp).post("/v1/tokens/x", &body).await;
    assert_eq!(reply.code(), (413, "too_large"));
    cp.stop().await;
}

#[tokio::test]
async fn a_token_is_good_until_it_expires_or_is_deleted_and_its_secret_is_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let root = Client::root(&cp);
    let ci = bearer(&cp, "ci", Some(("viewer", &["*"]))).await;
    let me = ci.get("/v1/whoami").await.ok();
    assert_eq!((me["who"].as_str(), me["kind"].as_str()), (Some("token:ci"), Some("apiToken")));
    assert_eq!(me["roles"], json!([{"role": "viewer", "namespaces": ["*"]}]));
    ci.get("/v1/status").await.ok();
    assert_eq!(root.post("/v1/tokens/ci", "").await.code(), (409, "api_token_exists"));
    for bad in ["{\"ttlSeconds\": 0}", "{\"ttlSeconds\": 99999999}", "{\"ttl\": 1}", "7"] {
        assert_eq!(root.post("/v1/tokens/other", bad).await.code(), (400, "invalid"), "{bad}");
    }
    assert_eq!(root.post("/v1/tokens/Not_a_label", "").await.code(), (400, "invalid"));

    let minted = root.post("/v1/tokens/short", "{\"ttlSeconds\": 1}").await.ok();
    let short = Client::stranger(&cp).bearing(minted["token"].as_str().unwrap());
    let secret = minted["token"].as_str().unwrap().rsplit('.').next().unwrap().to_owned();
    let expired = async || short.get("/v1/whoami").await.code() == (401, "api_token_expired");
    wait_for("the token to expire", Duration::from_secs(5), expired).await.unwrap();

    // Another one's secret under this name is no token, and neither is a part of it.
    let mixed = Client::stranger(&cp).bearing(&format!("isthmus-api.ci.{secret}"));
    assert_eq!(mixed.get("/v1/whoami").await.code(), (401, "unknown_api_token"));
    let listed = root.get("/v1/tokens").await.ok();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|t| (t["name"].clone(), t["expired"].clone())).collect();
    assert_eq!(names, [(json!("ci"), json!(false)), (json!("short"), json!(true))]);
    cp.stop().await;
    assert!(!anywhere(dir.path(), secret.as_bytes()), "the secret is on disk");

    let cp = ControlPlane::start(dir.path()).await;
    // Its port is another one now; the token is the same.
    let again = Client::stranger(&cp).bearing(&token_of(&ci));
    again.get("/v1/status").await.ok();
    Client::root(&cp).delete("/v1/tokens/ci").await.ok();
    assert_eq!(again.get("/v1/status").await.code(), (401, "unknown_api_token"));
    assert_eq!(Client::root(&cp).delete("/v1/tokens/ci").await.code(), (404, "unknown_api_token"));
    cp.stop().await;
}

fn token_of(client: &Client) -> String {
    client.token().expect("a token").to_owned()
}

fn anywhere(dir: &Path, wanted: &[u8]) -> bool {
    std::fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => anywhere(&path, wanted),
            false => std::fs::read(&path).unwrap().windows(wanted.len()).any(|bytes| bytes == wanted),
        }
    })
}

#[tokio::test]
async fn a_token_beside_a_certificate_decides() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let viewer = bearer(&cp, "viewer", Some(("viewer", &["*"]))).await;
    let both = Client::root(&cp).bearing(&token_of(&viewer));
    assert_eq!(both.get("/v1/whoami").await.ok()["who"], "token:viewer");
    assert_eq!(both.get("/v1/backup").await.code(), (403, "denied"));
    let spoiled = Client::root(&cp).bearing("isthmus-api.viewer.wrong");
    assert_eq!(spoiled.get("/v1/status").await.code(), (401, "unknown_api_token"));
    cp.stop().await;
}

#[tokio::test]
async fn other_administrators_certificates_need_a_binding_and_the_control_planes_own_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let bob = Client::admin(&cp, dir.path(), "bob");
    let denied = bob.get("/v1/status").await;
    assert_eq!(denied.code(), (403, "denied"));
    assert!(
        denied.message().contains("--role viewer --spiffe spiffe://isthmus.example/admin/bob"),
        "{}",
        denied.message()
    );
    let root = Client::root(&cp);
    let binding = json!({"subjects": [{"spiffe": "spiffe://isthmus.example/admin/bob"}], "role": "admin"});
    root.put("/v1/role-bindings/bob", &binding).await.ok();
    bob.get("/v1/backup").await.status.is_success().then_some(()).expect("bob is an administrator");
    // Nobody can lock the last resort out.
    bob.put("/v1/role-bindings/bob", &binding).await.ok();
    root.delete("/v1/role-bindings/bob").await.ok();
    assert_eq!(bob.delete("/v1/role-bindings/bob").await.code(), (403, "denied"));
    cp.stop().await;
}

#[tokio::test]
async fn a_binding_is_not_changed_by_who_has_not_seen_its_latest_version() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let (root, path) = (Client::root(&cp), "/v1/role-bindings/ops");
    let binding = |role: &str| json!({"subjects": [{"group": "sre"}], "role": role}).to_string();
    let new = root.send("PUT", path, &[("if-none-match", "*")], &binding("viewer")).await;
    assert_eq!(new.headers["etag"], "\"1\"");
    let again = root.send("PUT", path, &[("if-none-match", "*")], &binding("admin")).await;
    assert_eq!(again.code(), (409, "stale_role_binding"));
    let stale = root.send("PUT", path, &[("if-match", "\"7\"")], &binding("admin")).await;
    assert_eq!(stale.code(), (409, "stale_role_binding"));
    let body = json!({"subjects": [{"group": "sre"}], "role": "operator", "resourceVersion": 1});
    assert_eq!(root.put(path, &body).await.ok()["resourceVersion"], 2);
    assert_eq!(root.put(path, &body).await.code(), (409, "stale_role_binding"));
    for (headers, body) in [
        (("if-match", "x"), binding("viewer")),
        (("if-none-match", "2"), binding("viewer")),
        (("x", "y"), json!({"subjects": [], "role": "viewer", "sujects": 1}).to_string()),
        (("x", "y"), json!({"name": "other", "subjects": [], "role": "viewer"}).to_string()),
    ] {
        assert_eq!(root.send("PUT", path, &[headers], &body).await.code(), (400, "invalid"), "{body}");
    }
    let senseless = json!({"subjects": [{"user": "a"}], "role": "admin", "namespaces": ["shop"]});
    assert_eq!(root.put(path, &senseless).await.code(), (400, "malformed"));
    assert_eq!(root.send("DELETE", path, &[("if-match", "\"1\"")], "").await.code(), (409, "stale_role_binding"));
    root.send("DELETE", path, &[("if-match", "\"2\"")], "").await.ok();
    assert_eq!(root.get(path).await.code(), (404, "unknown_role_binding"));
    assert_eq!(root.get("/v1/role-bindings").await.ok(), json!([]));
    cp.stop().await;
}

#[tokio::test]
async fn every_attempt_is_in_the_audit_log_and_strangers_write_nothing_to_the_replicated_one() {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::start(dir.path()).await;
    let viewer = bearer(&cp, "viewer", Some(("viewer", &["*"]))).await;
    let root = Client::root(&cp);
    let last = async || root.get("/v1/nodes").await.ok()["lastLogIndex"].as_u64().unwrap();
    let before = last().await;
    assert_eq!(viewer.post("/v1/clusters/us-east/revoke", "").await.code(), (403, "denied"));
    assert_eq!(root.post("/v1/tokens/x", "{\"ttlSeconds\": 0}").await.code(), (400, "invalid"));
    root.get("/v1/backup").await;
    let stranger = Client::stranger(&cp).bearing("isthmus-api.viewer.guess");
    for _ in 0..60 {
        let status = stranger.get("/v1/status").await.status.as_u16();
        assert!([401, 429].contains(&status), "{status}");
    }
    // A read asks the leader whether it still leads; it writes nothing.
    assert_eq!(last().await, before, "refused attempts are no entries of the log");
    assert_eq!(root.post("/v1/clusters/nobody/revoke", "").await.code(), (404, "unknown_cluster"));

    let query = async |query: &str| root.get(&format!("/v1/audit?{query}")).await.ok();
    let denied = query("outcome=denied").await;
    let entry = &denied[0];
    assert_eq!((entry["who"].as_str(), entry["action"].as_str()), (Some("token:viewer"), Some("revoke")));
    assert_eq!((entry["subject"].as_str(), entry["node"].as_str()), (Some("us-east"), Some("cp-1")));
    assert!(entry["reason"].as_str().unwrap().contains("needs the role admin"), "{entry}");
    assert!(entry["from"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(entry["before"], entry["after"]);
    let backups = query("action=take-backup").await;
    assert_eq!(
        (backups[0]["outcome"].as_str(), backups[0]["who"].as_str()),
        (Some("allowed"), Some("spiffe://isthmus.example/admin/root"))
    );
    assert_eq!(query("action=mint-api-token&outcome=invalid").await[0]["subject"], "x");
    let refused = query("action=revoke&outcome=refused&limit=10").await;
    assert_eq!(refused.as_array().unwrap().len(), 2, "what the state refused is replicated, and there once: {refused}");
    assert!(refused[0]["number"].is_u64() && refused[0]["node"].is_null());
    let minted = query("action=mint-api-token&outcome=done").await;
    assert_eq!(
        (minted[0]["who"].as_str(), minted[0]["subject"].as_str()),
        (Some("spiffe://isthmus.example/admin/root"), Some("viewer"))
    );
    let guesses = query("outcome=unknown_api_token&limit=1000").await;
    assert_eq!(guesses.as_array().unwrap().len(), 20, "the first are written one by one");
    assert!(!guesses.to_string().contains("guess"), "no token is in there");
    let since = refused[0]["at"].as_u64().unwrap();
    assert_eq!(query(&format!("since={since}&action=revoke")).await.as_array().unwrap().len(), 1);
    assert_eq!(query(&format!("until={}&action=revoke", since - 1)).await.as_array().unwrap().len(), 1);
    for bad in ["limit=0", "limit=99999", "since=yesterday", "whom=x"] {
        assert_eq!(root.get(&format!("/v1/audit?{bad}")).await.code(), (400, "invalid"), "{bad}");
    }
    cp.stop().await;

    // The others were counted, and the count is there at the latest when the node has stopped.
    let cp = ControlPlane::start(dir.path()).await;
    let counted = Client::root(&cp).get("/v1/audit?outcome=unauthenticated").await.ok();
    assert_eq!((counted[0]["count"].as_u64(), counted[0]["who"].as_str()), (Some(40), Some("(strangers)")));
    cp.stop().await;
}

#[tokio::test]
async fn a_token_that_one_node_deleted_changes_nothing_at_another() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let one = ControlPlane::start(first.path()).await;
    let node_token = Client::root(&one).post("/v1/nodes/cp-2/join-token", "").await.ok();
    let file = second.path().join("token");
    std::fs::write(&file, node_token["token"].as_str().unwrap()).unwrap();
    let state = second.path().join("state");
    let mut joining = config(&state);
    (joining.node, joining.join_token_file) = ("cp-2".to_owned(), Some(file));
    let two = ControlPlane::start_with(&state, joining).await;
    let votes = async || {
        let nodes = Client::root(&one).get("/v1/nodes").await.ok();
        let roles: Vec<&str> = nodes["nodes"].as_array().unwrap().iter().filter_map(|n| n["role"].as_str()).collect();
        roles == ["leader", "voter"]
    };
    wait_for("two voters", Duration::from_secs(20), votes).await.unwrap();
    for n in 0..10 {
        let name = format!("ci-{n}");
        let boss = bearer(&one, &name, Some(("admin", &["*"]))).await;
        let elsewhere = Client::stranger(&two).bearing(&token_of(&boss));
        let known = async || elsewhere.get("/v1/whoami").await.status == StatusCode::OK;
        wait_for("the token at the other node", Duration::from_secs(5), known).await.unwrap();
        Client::root(&one).delete(&format!("/v1/tokens/{name}")).await.ok();
        let reply = elsewhere.post("/v1/tokens/backdoor", "").await;
        assert_eq!(reply.code(), (401, "unknown_api_token"), "attempt {n}");
    }
    two.stop().await;
    one.stop().await;
}

#[tokio::test]
async fn who_asks_too_often_waits_and_nobody_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let mut narrow = config(dir.path());
    (narrow.admin.requests_per_second, narrow.admin.burst) = (1, 20);
    let cp = ControlPlane::start_with(dir.path(), narrow).await;
    let viewer = bearer(&cp, "viewer", Some(("viewer", &["*"]))).await;
    let flood = async |client: &Client| {
        for _ in 0..60 {
            let reply = client.get("/v1/whoami").await;
            if reply.status == StatusCode::TOO_MANY_REQUESTS {
                return reply;
            }
        }
        panic!("it was never throttled");
    };
    let reply = flood(&viewer).await;
    assert_eq!(reply.code(), (429, "throttled"));
    let wait: u64 = reply.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=3).contains(&wait), "{wait}");
    let stranger = flood(&Client::stranger(&cp)).await;
    assert_eq!(stranger.code(), (429, "throttled"));
    Client::root(&cp).get("/v1/whoami").await.ok();
    let let_in_again = async || viewer.get("/v1/whoami").await.status == StatusCode::OK;
    wait_for("its turn", Duration::from_secs(5), let_in_again).await.unwrap();
    cp.stop().await;
}

#[tokio::test]
async fn a_cluster_that_floods_publications_waits_alone() {
    use isthmus_api::proto::federation::v1::control_message::Kind;

    let dir = tempfile::tempdir().unwrap();
    let mut narrow = config(dir.path());
    (narrow.publications.per_second, narrow.publications.burst) = (1, 1);
    let cp = ControlPlane::start_with(dir.path(), narrow).await;
    let (east, west) = (Agent::new("us-east"), Agent::new("us-west"));
    let (east_svid, west_svid) = (cp.join(&east).await, cp.join(&west).await);
    let mut sessions = Vec::new();
    let mut client = cp.client(Some(&east_svid));
    for _ in 0..8 {
        sessions.push(Session::open(&mut client, "us-east", None).await.unwrap());
    }
    let begun = tokio::time::Instant::now();
    for (n, session) in sessions.iter().enumerate() {
        let service = format!("service-{n}");
        session.send(east.publish(1, &[&service])).await;
    }
    let mut other = Session::open(&mut cp.client(Some(&west_svid)), "us-west", None).await.unwrap();
    other.send(west.publish(1, &["cart"])).await;
    assert!(matches!(other.answer().await, Kind::Published(_)));
    assert!(begun.elapsed() < Duration::from_secs(1), "the other cluster waited {:?}", begun.elapsed());

    let (mut published, mut refused) = (0, 0);
    let answers = futures_util::future::join_all(sessions.iter_mut().map(Session::answer)).await;
    for answer in answers {
        match answer {
            Kind::Published(_) => published += 1,
            Kind::Refused(why) => {
                refused += 1;
                assert!(why.reason.contains("us-east publishes too often"), "{}", why.reason);
            }
            other => panic!("no answer: {other:?}"),
        }
    }
    // One at once, five in their turn, and who would have waited longer is told so.
    assert_eq!((published, refused), (6, 2));
    assert!(begun.elapsed() >= Duration::from_millis(4900), "{:?}", begun.elapsed());
    cp.stop().await;
}
