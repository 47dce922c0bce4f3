//! Tests of manifest files: what is read, what each error says, and that hostile files stay harmless.

use proptest::prelude::*;

use super::*;

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: cart
  namespace: shop
  annotations:
    isthmus.io/service-accounts: cart, cart-v2
spec:
  ports:
    - name: http
      port: 80
      targetPort: 8080
      appProtocol: http
";
const SLICE: &str = "\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: cart-1
  namespace: shop
  labels: {kubernetes.io/service-name: cart}
addressType: IPv4
ports: [{name: http, port: 15001}]
endpoints:
  - addresses: [127.1.1.21]
    conditions: {ready: true}
    zone: us-east-1
";
const EXPORT: &str = "\
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: cart, namespace: shop, creationTimestamp: 2026-01-01T00:00:00Z}
";
const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n";

fn errors(text: &str) -> Vec<String> {
    parse("f.yaml", text).into_iter().filter_map(Result::err).map(|e| e.to_string()).collect()
}

fn one_error(text: &str) -> String {
    let errors = errors(text);
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].clone()
}

fn names(text: &str) -> Vec<String> {
    parse("f.yaml", text).into_iter().map(|o| o.map_or_else(|e| e.to_string(), |o| o.reference().to_string())).collect()
}

#[test]
fn all_known_kinds_are_read_in_order() {
    let text = [NAMESPACE, SERVICE, SLICE, EXPORT].join("---\n");
    assert_eq!(
        names(&text),
        ["Namespace shop", "Service shop/cart", "EndpointSlice shop/cart-1", "ServiceExport shop/cart"]
    );
    let Ok(Object::Service(service)) = &parse("f", SERVICE)[0] else { panic!("not a Service") };
    assert_eq!(service_accounts(service).into_iter().collect::<Vec<_>>(), ["cart", "cart-v2"]);
    assert_eq!(service.spec.as_ref().unwrap().ports.as_ref().unwrap()[0].port, 80);
    let Ok(Object::ServiceExport(export)) = &parse("f", EXPORT)[0] else { panic!("not a ServiceExport") };
    assert_eq!(export.metadata.creation_timestamp.as_ref().unwrap().0.as_second(), 1_767_225_600);
    assert_eq!(names(&EXPORT.replace("v1beta1", "v1alpha1")), ["ServiceExport shop/cart"]);
}

#[test]
fn a_list_is_its_items() {
    let item = |text: &str| format!("- {}\n", text.trim_end().replace('\n', "\n  "));
    let bad = item(&SERVICE.replace("port: 80", "port: 0"));
    let text = format!("apiVersion: v1\nkind: List\nitems:\n{}{bad}", item(NAMESPACE));
    let error = "f.yaml:18: items[1].spec.ports[0].port: 0 is not a port; use 1 to 65535";
    assert_eq!(names(&text), ["Namespace shop", error]);
}

#[test]
fn a_namespaced_object_without_namespace_gets_the_default() {
    let text = SERVICE.replace("  namespace: shop\n", "");
    assert_eq!(names(&text), ["Service default/cart"]);
}

#[test]
fn empty_documents_are_nothing() {
    for text in ["", "\n\n", "---\n", "# comment\n---\n---\n# another\n", "%YAML 1.2\n---\n", "null\n", "\u{feff}"] {
        assert_eq!(names(text), Vec::<String>::new(), "{text:?}");
    }
    assert_eq!(names(&format!("%YAML 1.2\n--- # first\n{NAMESPACE}...\n--- {{}}\n")).len(), 2);
    assert_eq!(names(&NAMESPACE.replace('\n', "\r\n")), ["Namespace shop"]);
}

#[test]
fn a_syntax_error_hides_no_other_document() {
    let text = format!("{NAMESPACE}---\nkind: [unclosed\nmetadata: {{\n---\n{SERVICE}---\nkind: \"x\n---\n{EXPORT}");
    let found = names(&text);
    assert_eq!(found.len(), 5, "{found:?}");
    assert_eq!(found[0], "Namespace shop");
    assert!(found[1].starts_with("f.yaml:") && found[1].contains("is not valid YAML"), "{}", found[1]);
    assert_eq!(found[2], "Service shop/cart");
    assert!(found[3].starts_with("f.yaml:23: is not valid YAML"), "{}", found[3]);
    assert_eq!(found[4], "ServiceExport shop/cart");
}

#[test]
fn a_syntax_error_has_its_line_in_the_file() {
    assert!(
        one_error(&format!("{NAMESPACE}---\n{}", SERVICE.replace("  name: cart", "  name: [cart")))
            .starts_with("f.yaml:")
    );
    let twice = one_error(&format!("{NAMESPACE}---\nkind: Service\nkind: Service\n"));
    assert!(twice.starts_with("f.yaml:7: is not valid YAML: ") && twice.contains("duplicate"), "{twice}");
}

#[test]
fn block_scalars_may_hold_dashes() {
    let text = NAMESPACE.to_owned() + "  annotations:\n    note: |\n      ---\n      text\n";
    assert_eq!(names(&text), ["Namespace shop"]);
}

#[test]
fn errors_name_file_line_and_field() {
    for (from, to, expected) in [
        (
            "port: 80\n",
            "port: eighty\n",
            "f.yaml:11: spec.ports[0].port: invalid type: string \"eighty\", expected i32",
        ),
        ("port: 80\n", "port: 70000\n", "f.yaml:11: spec.ports[0].port: 70000 is not a port; use 1 to 65535"),
        ("targetPort: 8080", "targetPort: -1", "f.yaml:12: spec.ports[0].targetPort: -1 is not a port; use 1 to 65535"),
        ("      port: 80\n", "", "f.yaml:10: spec.ports[0].port: 0 is not a port; use 1 to 65535"),
        (
            "  ports:",
            "  prots:",
            "f.yaml:9: spec.prots: is not a field that is known here; is it misspelt or at the wrong depth?",
        ),
        ("  name: cart\n", "", "f.yaml:3: metadata.name: is missing"),
        (
            "namespace: shop",
            "namespace: 7",
            "f.yaml:5: metadata.namespace: invalid type: integer `7`, expected a string",
        ),
        (
            "kind: Service",
            "kind: Deployment",
            "f.yaml:2: kind: Deployment is not a kind that is read here; known are Service, EndpointSlice, ServiceExport, Namespace, and List of them",
        ),
        ("apiVersion: v1", "apiVersion: v2", "f.yaml:1: apiVersion: v2 is not a version that is read here; write v1"),
        ("apiVersion: v1\n", "", "f.yaml:1: apiVersion: is missing"),
        (
            "cart, cart-v2",
            "cart,,Cart",
            "f.yaml:7: metadata.annotations[\"isthmus.io/service-accounts\"]: \"\" is not the name of a service account; write names with commas between",
        ),
    ] {
        assert!(SERVICE.contains(from), "{from}");
        assert_eq!(one_error(&SERVICE.replacen(from, to, 1)), expected);
    }
    for (from, to, expected) in [
        ("127.1.1.21", "127.1.1", "f.yaml:10: endpoints[0].addresses[0]: \"127.1.1\" is not an IP address"),
        ("127.1.1.21", "'::1'", "f.yaml:10: endpoints[0].addresses[0]: ::1 is not of the slice's addressType"),
        ("127.1.1.21", "0.0.0.0", "f.yaml:10: endpoints[0].addresses[0]: 0.0.0.0 is not the address of a host"),
        (
            "ready: true",
            "ready: 'yes'",
            "f.yaml:11: endpoints[0].conditions.ready: invalid type: string \"yes\", expected a boolean",
        ),
        ("15001", "0", "f.yaml:8: ports[0].port: 0 is not a port; use 1 to 65535"),
        ("IPv4", "FQDN", "f.yaml:7: addressType: \"FQDN\" is not supported; use IPv4 or IPv6"),
        (
            "kubernetes.io/service-name: cart",
            "a: b",
            "f.yaml:6: metadata.labels[\"kubernetes.io/service-name\"]: is missing; it names the Service that the endpoints belong to",
        ),
    ] {
        assert!(SLICE.contains(from), "{from}");
        assert_eq!(one_error(&SLICE.replacen(from, to, 1)), expected);
    }
}

#[test]
fn all_problems_of_an_object_are_told_and_name_the_object() {
    let text = SERVICE.replace("port: 80\n", "port: 0\n").replace("name: http", "name: HTTP");
    let found = parse("f.yaml", &text);
    assert_eq!(found.len(), 2);
    let reference = ObjectRef { kind: "Service".into(), namespace: "shop".into(), name: "cart".into() };
    assert!(found.iter().all(|e| e.as_ref().unwrap_err().object.as_deref() == Some(&reference)));
}

#[test]
fn hostile_files_are_refused_cheaply() {
    assert!(one_error(&"a".repeat(MAX_FILE_BYTES + 1)).starts_with("f.yaml: 4194305 bytes"));
    assert!(one_error(&"[".repeat(100_000)).contains("is not valid YAML"));
    assert!(one_error(&(0..5_000).map(|i| " ".repeat(i) + "a:\n").collect::<String>()[..1_000_000]).contains("YAML"));
    let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
    for i in 1..20 {
        let reference = format!("*a{},", i - 1).repeat(10);
        bomb += &format!("a{i}: &a{i} [{}]\n", reference.trim_end_matches(','));
    }
    assert!(one_error(&bomb).contains("is not valid YAML"));
    let storm = parse("f.yaml", &"---\nx\n".repeat(100_000));
    assert_eq!(storm.len(), MAX_OBJECTS + 1);
    assert!(storm.iter().all(Result::is_err));
    let bytes = parse_bytes("f.yaml", b"a\nb\n\xff");
    assert_eq!(bytes[0].as_ref().unwrap_err().to_string(), "f.yaml:3: is not UTF-8 text");
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        parse_bytes("f", &bytes);
    }

    #[test]
    fn damaged_manifests_never_panic_and_errors_lie_within_the_file(
        cut in 0..SLICE.len(),
        junk in "[-:\\[\\]{}&*!|>'\"%@`#, \n\ta-c0-9]{0,12}",
        keep in 0..SLICE.len(),
    ) {
        let text = format!("{SERVICE}---\n{}{junk}{}", &SLICE[..cut], &SLICE[keep..]);
        let lines = text.lines().count() as u64 + 1;
        let found = parse("f", &text);
        prop_assert!(matches!(&found[0], Ok(Object::Service(_))), "the first document is whole");
        for error in found.into_iter().filter_map(Result::err) {
            prop_assert!((1..=lines).contains(&error.line), "{error}");
        }
    }
}
