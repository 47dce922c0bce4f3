//! The OpenAPI document of the admin API, made of the list of endpoints, and the table of roles in the documentation.
//!
//! Holds: it names every route and no other. `docs/openapi.json` and the table in `docs/admin-api.md` are checked against
//! it by tests.

use std::sync::LazyLock;

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    auth::decide::Verb,
    endpoint::{Endpoint, Parameter, Shape},
    table::endpoints,
};

/// A place in the history of the state.
#[derive(JsonSchema)]
#[schemars(rename = "Stamp")]
#[expect(dead_code, reason = "only its schema is used, in place of the data model's type")]
pub(super) struct StampShape {
    /// Grows when a restore makes every member take the state whole.
    epoch: u64,
    /// Grows with every change that members see.
    revision: u64,
}

/// What a cluster may do.
#[derive(JsonSchema)]
#[schemars(rename = "ClusterGrant", rename_all = "camelCase")]
#[expect(dead_code, reason = "only its schema is used")]
pub(super) struct GrantShape {
    /// `["*"]` for all.
    export_namespaces: Option<Vec<String>>,
    /// `["*"]` for all.
    import_namespaces: Option<Vec<String>>,
    /// `gateway`, `dns`, `configSource`.
    roles: Option<Vec<String>>,
    /// `exports`, `gateways`.
    limits: Option<std::collections::BTreeMap<String, u32>>,
}

/// What a failed call answers.
#[derive(JsonSchema)]
#[schemars(rename = "Error")]
#[expect(dead_code, reason = "only its schema is used")]
struct ErrorShape {
    error: ErrorDetail,
}

/// In a form for programs and in words.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
struct ErrorDetail {
    /// Stable: `denied`.
    code: String,
    /// What is wrong, and what to do.
    message: String,
    /// Which part of the request, if it is one.
    field: Option<String>,
}

/// The document, as it is served.
pub(super) static DOCUMENT: LazyLock<String> =
    LazyLock::new(|| serde_json::to_string_pretty(&document(&endpoints())).unwrap_or_default() + "\n");

fn document(endpoints: &[Endpoint]) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let error = generator.subschema_for::<ErrorShape>();
    let mut paths = Map::new();
    for endpoint in endpoints {
        let operation = operation(endpoint, &error.clone().into(), &mut generator);
        let path = paths.entry(endpoint.rule.path).or_insert_with(|| json!({}));
        if let Value::Object(methods) = path {
            methods.insert(endpoint.method.as_str().to_ascii_lowercase(), operation);
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Isthmus admin API",
            "version": "v1",
            "description": "What `isthmusctl` talks to. JSON over TLS; errors have one shape.",
        },
        "servers": [{"url": "https://{address}", "variables": {"address": {
            "default": "127.1.0.1:7444", "description": "`listen.admin` of a node; any node will do",
        }}}],
        "security": [{"bearer": []}, {"certificate": []}],
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer",
                    "description": "An API token (isthmus-api.…), or a JWT of an issuer in `admin.oidc`. It decides, also \
                                    beside a certificate."},
                "certificate": {"type": "mutualTLS", "description": "A certificate spiffe://FEDERATION/admin/NAME"},
            },
        },
    })
}

fn operation(endpoint: &Endpoint, error: &Value, generator: &mut SchemaGenerator) -> Value {
    let Endpoint { rule, summary, .. } = endpoint;
    let mut parameters: Vec<Value> = rule
        .path
        .split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect();
    let parameter = |place: &str, parameter: &Parameter| {
        json!({
            "name": parameter.name, "in": place, "required": false, "description": parameter.summary,
            "schema": {"type": "string"},
        })
    };
    parameters.extend(endpoint.query.iter().map(|it| parameter("query", it)));
    parameters.extend(endpoint.headers.iter().map(|it| parameter("header", it)));
    let mut responses = Map::new();
    responses.insert("200".to_owned(), json!({"description": "Done", "content": content(endpoint.answer, generator)}));
    let takes_body = endpoint.body.is_some();
    let everywhere: &[u16] = match (rule.verb, takes_body) {
        (Verb::Read, _) => &[401, 403, 429, 500, 503],
        (Verb::Change, false) => &[401, 403, 429, 500, 502, 503, 504],
        (Verb::Change, true) => &[400, 401, 403, 413, 429, 500, 502, 503, 504],
    };
    for code in everywhere.iter().chain(endpoint.errors) {
        let content = json!({"application/json": {"schema": error}});
        responses.insert(code.to_string(), json!({"description": words(*code), "content": content}));
    }
    let role = endpoint.role();
    let mut operation = json!({
        "operationId": rule.action,
        "summary": summary,
        "description": format!("Needs: {role}."),
        "x-isthmus-role": role,
        "parameters": parameters,
        "responses": responses,
    });
    if let (Some(body), Value::Object(fields)) = (endpoint.body, &mut operation) {
        fields.insert("requestBody".to_owned(), json!({"required": false, "content": content(body, generator)}));
    }
    operation
}

fn content(shape: Shape, generator: &mut SchemaGenerator) -> Value {
    match shape {
        Shape::Json(schema) => json!({"application/json": {"schema": schema(generator)}}),
        Shape::Told("array", words) => json!({"application/json": {"schema": {
            "type": "array", "items": {"type": "object"}, "description": words,
        }}}),
        Shape::Told(kind, words) => json!({"application/json": {"schema": {"type": kind, "description": words}}}),
        Shape::File(media) => json!({media: {}}),
    }
}

fn words(code: u16) -> &'static str {
    match code {
        400 => "Something in the request is wrong; `field` says what",
        401 => "Nobody is known to be calling: no certificate and no good token",
        403 => "The caller has not the role that is needed",
        404 => "What was named is not there",
        409 => "It contradicts what is stored, or what is stored has changed meanwhile",
        413 => "The body is over this route's limit",
        429 => "The caller asks too often; `Retry-After` says when to come back",
        502 => "The leader refused to take the change from this node",
        503 => "Nobody leads, or the control plane is not ready",
        504 => "Not committed in time; it may still be",
        507 => "A limit on stored objects is reached",
        _ => "Something went wrong in here; see the node's log",
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::PathBuf};

    use super::*;

    fn docs(file: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file)
    }

    /// With `ISTHMUS_WRITE_DOCS=1` it writes what it would else only check.
    fn check(file: &str, expected: &str) {
        if std::env::var_os("ISTHMUS_WRITE_DOCS").is_some() {
            fs::write(docs(file), expected).unwrap();
        }
        let held = fs::read_to_string(docs(file)).unwrap();
        assert!(held == expected, "docs/{file} is stale: run the tests once with ISTHMUS_WRITE_DOCS=1");
    }

    #[test]
    fn the_documentation_holds_the_document() {
        check("openapi.json", &DOCUMENT);
    }

    #[test]
    fn the_documentation_holds_the_table_of_roles() {
        let mut table = String::from("| | route | role | |\n|---|---|---|---|\n");
        for endpoint in endpoints() {
            let (method, path, role, summary) =
                (&endpoint.method, endpoint.rule.path, endpoint.role(), endpoint.summary);
            table.push_str(&format!("| {method} | `{path}` | {role} | {summary} |\n"));
        }
        let text = fs::read_to_string(docs("admin-api.md")).unwrap();
        let (begin, end) = ("<!-- routes -->\n", "<!-- /routes -->\n");
        let (before, rest) = text.split_once(begin).expect("the table's beginning");
        let (_, after) = rest.split_once(end).expect("the table's end");
        check("admin-api.md", &format!("{before}{begin}{table}{end}{after}"));
    }

    #[test]
    fn the_document_is_openapi_and_names_each_route_once() {
        let spec = oas3::from_json(&*DOCUMENT).expect("an OpenAPI 3.1 document");
        let told: BTreeSet<(String, String)> =
            spec.operations().map(|(path, method, _)| (method.to_string(), path)).collect();
        let served: BTreeSet<(String, String)> =
            endpoints().iter().map(|e| (e.method.to_string(), e.rule.path.to_owned())).collect();
        assert_eq!(told, served);
        assert_eq!(served.len(), endpoints().len(), "a route is twice in the table");
        let ids: BTreeSet<_> = endpoints().iter().map(|e| e.rule.action).collect();
        assert_eq!(ids.len(), endpoints().len(), "an action is twice in the table");
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere_and_every_route_is_described() {
        fn references(value: &Value, into: &mut Vec<String>) {
            match value {
                Value::Object(fields) => {
                    into.extend(fields.get("$ref").and_then(Value::as_str).map(ToOwned::to_owned));
                    fields.values().for_each(|value| references(value, into));
                }
                Value::Array(items) => items.iter().for_each(|value| references(value, into)),
                _ => {}
            }
        }
        let document: Value = serde_json::from_str(&DOCUMENT).unwrap();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
        }
        for endpoint in endpoints() {
            assert!(!endpoint.summary.is_empty(), "{}", endpoint.rule.path);
        }
    }
}
