//! Loading configurations from real files, with and without variables.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Deserialize;

use super::*;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Config {
    node: String,
    state_dir: PathBuf,
    listen: Listen,
    #[serde(default)]
    inbound: Vec<Inbound>,
    #[serde(default)]
    upstreams: Vec<String>,
    #[serde(default)]
    failover: Failover,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    advertise: Option<SocketAddr>,
    #[serde(default, with = "humantime_serde")]
    #[expect(dead_code, reason = "only refused values are looked at")]
    patience: std::time::Duration,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listen {
    grpc: SocketAddr,
    health: SocketAddr,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inbound {
    port: u16,
    #[serde(default)]
    protocol: Protocol,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    #[default]
    Tcp,
    Http,
    Grpc,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Failover {
    hold_down_ms: u64,
    share: Option<f64>,
    enabled: bool,
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if self.node.len() > 8 {
            problems.add("node", "is longer than 8 characters");
        }
        for (index, inbound) in self.inbound.iter().enumerate() {
            if inbound.port == 0 {
                problems.add(format!("inbound[{index}].port"), "must be from 1 up");
            }
        }
        if self.advertise.is_none() && self.listen.grpc.ip().is_unspecified() {
            problems.add("advertise", "is needed when listen.grpc is no single address");
        }
        problems.within("failover", &self.failover);
    }
}

impl Validate for Failover {
    fn validate(&self, problems: &mut Problems) {
        if self.hold_down_ms > 60_000 {
            problems.add("holdDownMs", "is over 60000");
        }
    }
}

const GOOD: &str = "\
# a node
node: cp-1
stateDir: /var/lib/isthmus
listen: { grpc: 127.1.0.1:7443, health: 127.1.0.1:7445 }
inbound:
  - { port: 8080, protocol: http }
  - port: 9090
failover:
  holdDownMs: 3000
labels:
  zone: us-east-1
";

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn fixture(text: impl AsRef<[u8]>) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cp.yaml");
    std::fs::write(&path, text).unwrap();
    Fixture { _dir: dir, path }
}

fn load_text(text: &str, env: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let fixture = fixture(text);
    let env = env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    load_with_env(&fixture.path, "CP", env)
}

/// The error's text with the temporary folder cut off, so that it can be compared whole.
fn message(text: &str, env: &[(&str, &str)]) -> String {
    let fixture = fixture(text);
    let env = env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let folder = format!("{}/", fixture.path.parent().unwrap().display());
    load_with_env::<Config>(&fixture.path, "CP", env).unwrap_err().to_string().replace(&folder, "")
}

#[test]
fn a_good_file_loads() {
    let config = load_text(GOOD, &[]).unwrap();
    assert_eq!(config.node, "cp-1");
    assert_eq!(config.state_dir, PathBuf::from("/var/lib/isthmus"));
    assert_eq!(config.listen.health.port(), 7445);
    assert_eq!((config.inbound[0].port, &config.inbound[0].protocol), (8080, &Protocol::Http));
    assert_eq!((config.inbound[1].port, &config.inbound[1].protocol), (9090, &Protocol::Tcp));
    assert_eq!(config.labels["zone"], "us-east-1");
    assert_eq!(config.advertise, None);
}

#[test]
fn the_process_environment_is_read_without_disturbing_a_file_that_needs_nothing_of_it() {
    let fixture = fixture(GOOD);
    assert_eq!(load::<Config>(&fixture.path, "ISTHMUS_TEST_OF_CONFIG").unwrap().node, "cp-1");
}

#[test]
fn a_missing_file_says_which_and_how_to_pass_another() {
    let error = load::<Config>(Path::new("/nonexistent/cp.yaml"), "CP").unwrap_err();
    assert_eq!(
        error.to_string(),
        "configuration file /nonexistent/cp.yaml does not exist; pass another with --config PATH"
    );
}

#[test]
fn a_folder_or_bytes_that_are_no_text_cannot_be_read() {
    let error = load::<Config>(Path::new("/"), "CP").unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
    let binary = fixture(b"node: \xff\xfe");
    let error = load::<Config>(&binary.path, "CP").unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
}

#[test]
fn an_oversized_file_is_not_parsed() {
    let mut text = GOOD.to_owned();
    text.push_str(&"# padding\n".repeat(200_000));
    assert!(message(&text, &[]).contains("over the limit of 1048576 bytes"));
}

#[test]
fn a_syntax_error_has_its_line() {
    for (text, expected) in [
        ("a: b: c\n", "cp.yaml:1:5: mapping values are not allowed in this context"),
        ("node: x\nlisten: [\n", "cp.yaml:2:9: unclosed bracket '['"),
        ("node: *x\n", "cp.yaml:1:7: alias references unknown anchor"),
        ("node: x\n---\nnode: y\n", "cp.yaml:3:1: a second document begins here; a configuration is one"),
        ("- node\n- x\n", "cp.yaml:1:1: expected a section of keys, found a list"),
    ] {
        assert_eq!(message(text, &[]), expected);
    }
}

#[test]
fn a_key_given_twice_is_an_error() {
    let text = message(&format!("{GOOD}node: cp-2\n"), &[]);
    assert!(text.starts_with("cp.yaml:12:1: ") && text.contains("node"), "{text}");
    assert!(text.ends_with("; keep one of them") && !text.contains("Policy"), "{text}");
}

#[test]
fn an_unknown_key_is_rejected_at_its_place() {
    let text = message(&GOOD.replace("holdDownMs", "patience"), &[]);
    assert_eq!(
        text,
        "cp.yaml:9:3: failover: unknown field `patience`; expected one of `holdDownMs`, `share`, `enabled`"
    );
    let text = message(&GOOD.replace("holdDownMs", "holdDown"), &[]);
    assert_eq!(text, "cp.yaml:9:3: failover: unknown field `holdDown`; did you mean `holdDownMs`?");
}

#[test]
fn a_value_of_the_wrong_type_is_rejected_at_its_place() {
    let text = message(&GOOD.replace("8080", "80800"), &[]);
    assert_eq!(
        text,
        "cp.yaml:6:13: inbound[0].port: invalid value: integer `80800`, expected u16; \
         write a whole number from 0 to 65535"
    );
    let text = message(&GOOD.replace("127.1.0.1:7445", "everywhere"), &[]);
    assert_eq!(
        text,
        "cp.yaml:4:41: listen.health: invalid socket address syntax; \
         write IP:port, for example 192.0.2.1:443; names are not looked up"
    );
    let text = message(&GOOD.replace("protocol: http", "protocol: smtp"), &[]);
    assert_eq!(
        text,
        "cp.yaml:6:29: inbound[0].protocol: unknown variant `smtp`, expected one of `tcp`, `http`, `grpc`"
    );
}

#[test]
fn a_number_where_a_name_belongs_says_to_quote_it() {
    let text = message(&GOOD.replace("cp-1", "1.10"), &[]);
    assert_eq!(
        text,
        "cp.yaml:2:7: node: invalid type: floating point `1.1`, expected a string; put the value in quotes"
    );
    assert_eq!(load_text(&GOOD.replace("cp-1", "\"1.10\""), &[]).unwrap().node, "1.10");
}

#[test]
fn a_size_with_a_unit_and_a_duration_without_are_told_what_to_write() {
    let text = message(&GOOD.replace("8080", "4MiB"), &[]);
    assert!(text.contains("4MiB") && text.ends_with("sizes are in bytes, so that 4 MiB are 4194304"), "{text}");
    let text = message(&format!("{GOOD}patience: 400\n"), &[]);
    let advice = "expected a duration; write a number with its unit, for example 400ms, 5s or 10m";
    assert!(text.contains("400") && text.ends_with(advice), "{text}");
}

#[test]
fn a_missing_key_is_named_with_the_section_it_belongs_to() {
    let text = message(&GOOD.replace("grpc: 127.1.0.1:7443, ", ""), &[]);
    assert_eq!(text, "cp.yaml:4:9: listen: missing field `grpc`");
    assert_eq!(message("# nothing yet\n", &[]), "cp.yaml:1:1: missing field `node`");
}

#[test]
fn a_section_whose_lines_are_all_commented_out_has_its_defaults() {
    let config = load_text(&GOOD.replace("  holdDownMs", "  # holdDownMs"), &[]).unwrap();
    assert_eq!(config.failover, Failover::default());
}

#[test]
fn words_that_old_yaml_took_for_booleans_are_words() {
    assert_eq!(load_text(&GOOD.replace("cp-1", "no"), &[]).unwrap().node, "no");
}

#[test]
fn variables_win_over_the_file_and_add_to_it() {
    let env = [
        ("CP__NODE", "cp-2"),
        ("CP__STATE_DIR", "/tmp/state"),
        ("CP__LISTEN__GRPC", "127.0.0.1:1"),
        ("CP__FAILOVER__HOLD_DOWN_MS", "5"),
        ("CP__FAILOVER__SHARE", "0.5"),
        ("CP__FAILOVER__ENABLED", "true"),
        ("CP__INBOUND__1__PORT", "9091"),
        ("CP__INBOUND__2__PORT", "9092"),
        ("CP__UPSTREAMS", "[shop/cart, shop/web]"),
        ("CP__LABELS__rack", "7"),
        ("CP__ADVERTISE", "127.0.0.1:2"),
        ("CPX__NODE", "another program's"),
        ("CP_NODE", "not ours either"),
    ];
    let config = load_text(GOOD, &env).unwrap();
    assert_eq!((config.node.as_str(), config.state_dir), ("cp-2", PathBuf::from("/tmp/state")));
    assert_eq!(config.listen.grpc, "127.0.0.1:1".parse().unwrap());
    assert_eq!(config.listen.health.port(), 7445, "its neighbour stays");
    assert_eq!(config.failover, Failover { hold_down_ms: 5, share: Some(0.5), enabled: true });
    assert_eq!(config.inbound.iter().map(|inbound| inbound.port).collect::<Vec<_>>(), [8080, 9091, 9092]);
    assert_eq!(config.upstreams, ["shop/cart", "shop/web"]);
    assert_eq!(config.labels["rack"], "7", "a variable's digits may be a name");
    assert_eq!(config.advertise, Some("127.0.0.1:2".parse().unwrap()));
}

#[test]
fn an_empty_variable_unsets_an_option_and_empties_a_list_or_map() {
    let text = format!("{GOOD}advertise: 127.0.0.1:2\n");
    assert_eq!(load_text(&text, &[("CP__ADVERTISE", "")]).unwrap().advertise, None);
    assert!(load_text(GOOD, &[("CP__INBOUND", "")]).unwrap().inbound.is_empty());
    assert!(load_text(GOOD, &[("CP__LABELS", "")]).unwrap().labels.is_empty());
    assert_eq!(load_text(GOOD, &[("CP__LABELS", "{ rack: \"7\" }")]).unwrap().labels["rack"], "7");
}

#[test]
fn a_required_key_may_come_from_a_variable_alone() {
    let config = load_text(&GOOD.replace("node: cp-1\n", ""), &[("CP__NODE", "17")]).unwrap();
    assert_eq!(config.node, "17");
}

#[test]
fn errors_of_variables_name_the_variable() {
    assert_eq!(
        message(GOOD, &[("CP__FAILOVER__HOLD_DOWN_MS", "soon")]),
        "environment variable CP__FAILOVER__HOLD_DOWN_MS: failover.holdDownMs: \"soon\" is not a whole number from 0 up"
    );
    assert_eq!(
        message(GOOD, &[("CP__FAILOVER__HOLDDOWN", "1")]),
        "environment variable CP__FAILOVER__HOLDDOWN: failover: unknown field `holddown`; \
         did you mean `holdDownMs`?"
    );
    assert_eq!(
        message(GOOD, &[("CP__INBOUND__7__PORT", "1")]),
        "environment variable CP__INBOUND__7__PORT: index 7 is beyond the list of 2 in the file"
    );
    assert_eq!(
        message(GOOD, &[("CP__NODE__NAME", "x")]),
        "environment variable CP__NODE__NAME: NAME cannot be set: what it would be a part of is a single value"
    );
    assert!(message(GOOD, &[("CP__LISTEN__", "x")]).contains("a segment of its name is empty"));
    let deep = format!("CP{}", "__A".repeat(40));
    assert!(message(GOOD, &[(deep.as_str(), "x")]).contains("more than 16 levels deep"));
}

#[test]
fn all_problems_come_at_once_with_their_places() {
    let text = GOOD.replace("cp-1", "far-too-long").replace("8080", "0").replace("127.1.0.1:7443", "0.0.0.0:7443");
    assert_eq!(
        message(&text, &[("CP__FAILOVER__HOLD_DOWN_MS", "70000")]),
        "cp.yaml is not valid:\
         \n  cp.yaml:2:7: node: is longer than 8 characters\
         \n  cp.yaml:6:13: inbound[0].port: must be from 1 up\
         \n  cp.yaml: advertise: is needed when listen.grpc is no single address\
         \n  environment variable CP__FAILOVER__HOLD_DOWN_MS: failover.holdDownMs: is over 60000"
    );
}

#[test]
fn what_does_not_fit_its_type_comes_at_once_too() {
    let text = GOOD
        .replace("127.1.0.1:7443", "everywhere")
        .replace("8080", "-1")
        .replace("port: 9090", "prot: 9090")
        .replace("holdDownMs: 3000", "holdDownMs: 3s\n  enabled: yes")
        .replace("node: cp-1\n", "");
    assert_eq!(
        message(&text, &[("CP__UPSTREAMS", "[a, [b]]")]),
        "cp.yaml is not valid:\
         \n  cp.yaml:3:17: listen.grpc: invalid socket address syntax; \
         write IP:port, for example 192.0.2.1:443; names are not looked up\
         \n  cp.yaml:5:13: inbound[0].port: invalid value: integer `-1`, expected u16; \
         write a whole number from 0 to 65535\
         \n  cp.yaml:6:5: inbound[1]: unknown field `prot`; did you mean `port`?\
         \n  cp.yaml:6:5: inbound[1]: missing field `port`\
         \n  cp.yaml:8:15: failover.holdDownMs: invalid type: string \"3s\", expected u64; \
         write a plain number without a unit; sizes are in bytes, so that 4 MiB are 4194304\
         \n  cp.yaml:9:12: failover.enabled: invalid type: string \"yes\", expected a boolean; write true or false\
         \n  environment variable CP__UPSTREAMS: upstreams[1]: invalid type: sequence, expected a string\
         \n  cp.yaml:2:1: missing field `node`"
    );
}

#[test]
fn a_key_that_is_spelled_as_a_path_is_one_unknown_key() {
    let text = format!("{}failover.enabled: true\n", GOOD.replace("3000", "soon"));
    let said = message(&text, &[]);
    assert_eq!(said.matches("unknown field `failover.enabled`").count(), 1, "{said}");
    assert!(said.contains("failover.holdDownMs: invalid type"), "{said}");
}

#[test]
fn aliases_that_multiply_are_refused() {
    let mut text = String::from("a: &a [x, x, x, x, x, x, x, x, x, x]\n");
    for (name, of) in "bcdefghi".chars().zip("abcdefgh".chars()) {
        text.push_str(&format!(
            "{name}: &{name} [*{of}, *{of}, *{of}, *{of}, *{of}, *{of}, *{of}, *{of}, *{of}, *{of}]\n"
        ));
    }
    assert!(matches!(load_text(&text, &[]).unwrap_err(), ConfigError::Syntax { .. }));
}
