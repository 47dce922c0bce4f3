use std::time::Duration;

use isthmus_identity::ca::CertificateAuthority;

use super::*;

const ONE: &str = "server: 127.0.0.1:1\nca: ca.pem\ncert: admin.pem\nkey: admin.key\nfederation: isthmus.example\n";

fn of(context: &str) -> Choice {
    Choice { context: Some(context.to_owned()), contexts: None }
}

fn in_file(path: &Path, context: Option<&str>) -> Choice {
    Choice { context: context.map(ToOwned::to_owned), contexts: Some(path.to_owned()) }
}

fn refused(choice: &Choice) -> String {
    format!("{:#}", load(choice).err().expect("it is refused"))
}

/// A folder as the control plane writes it.
fn written() -> tempfile::TempDir {
    isthmus_identity::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::create(&"isthmus.example".parse().unwrap(), Duration::from_secs(3600)).unwrap();
    let key = KeyPair::generate().unwrap();
    let id = "spiffe://isthmus.example/admin/root".parse().unwrap();
    let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(600)).unwrap();
    let svid = Svid::new(chain, &key).unwrap();
    svid.save(dir.path(), "admin").unwrap();
    fs::write(dir.path().join("ca.pem"), svid.chain_pem()).unwrap();
    fs::write(dir.path().join("context.yaml"), ONE).unwrap();
    fs::write(dir.path().join("ci.token"), "isthmus-api.ci.secret\n").unwrap();
    dir
}

#[test]
fn a_missing_file_says_how_to_get_one() {
    let error = refused(&of("/nonexistent/context.yaml"));
    assert!(error.contains("/nonexistent/context.yaml") && error.contains("--context"), "{error}");
}

#[test]
fn unknown_keys_and_unusable_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("context.yaml");
    let choice = of(path.to_str().unwrap());
    fs::write(&path, format!("{ONE}sever: x\n")).unwrap();
    assert!(refused(&choice).contains("sever"));
    fs::write(&path, ONE).unwrap();
    assert!(refused(&choice).contains("admin.pem"));
    fs::write(dir.path().join("admin.pem"), "nothing").unwrap();
    assert!(refused(&choice).contains("does not hold PEM certificates"));
    fs::write(&path, "contexts:\n  a: {server: x, sever: y}\ncurrentContext: a\n").unwrap();
    assert!(refused(&choice).contains("sever"));
}

#[test]
fn the_server_may_be_written_with_a_scheme() {
    let path = Path::new("c.yaml");
    for server in ["127.1.0.1:7444", "https://127.1.0.1:7444", "https://127.1.0.1:7444/"] {
        assert_eq!(host_and_port(server, path).unwrap(), "127.1.0.1:7444");
    }
    for server in ["127.1.0.1", "http://a/b:1", "", "me@host:1"] {
        assert!(host_and_port(server, path).is_err(), "{server}");
    }
}

#[test]
fn a_context_comes_with_a_certificate_or_a_token_or_both() {
    let dir = written();
    let path = dir.path().join("other.yaml");
    let check = |credentials: &str| {
        fs::write(&path, format!("server: 127.0.0.1:1\nca: ca.pem\nfederation: isthmus.example\n{credentials}"))
            .unwrap();
        load(&of(path.to_str().unwrap())).map_err(|error| format!("{error:#}"))
    };
    let both = check("cert: admin.pem\nkey: admin.key\ntoken: abc").unwrap();
    assert!(both.certificate && both.token.is_some());
    let file = check("tokenFile: ci.token").unwrap();
    assert!(!file.certificate);
    assert_eq!(file.token.as_ref().unwrap().expose(), "isthmus-api.ci.secret");
    assert_eq!(format!("{:?}", file.token), "Some((secret))");
    for (bad, says) in [
        ("", "as whom"),
        ("cert: admin.pem", "key"),
        ("key: admin.key", "cert"),
        ("token: a\ntokenFile: ci.token", "tokenFile"),
        ("token: \"a b\"", "one line"),
        ("tokenFile: nowhere", "nowhere"),
    ] {
        let error = check(bad).err().expect(bad);
        assert!(error.contains(says), "{bad}: {error}");
    }
}

#[test]
fn a_file_holds_several_contexts_and_one_is_in_use() {
    let (dir, other) = (written(), written());
    let from = other.path().join("context.yaml");
    let file = dir.path().join("all.yaml");
    let all = in_file(&file, None);
    assert!(refused(&all).contains("all.yaml"));
    add(&all, "prod", &from, None).unwrap();
    add(&all, "ci", &from, Some(&dir.path().join("ci.token"))).unwrap();
    assert_eq!(current(&all).unwrap(), "prod", "the first is in use");
    assert!(load(&all).unwrap().certificate);
    let ci = load(&in_file(&file, Some("ci"))).unwrap();
    assert!(!ci.certificate && ci.token.is_some());
    switch(&all, "ci").unwrap();
    assert_eq!(current(&all).unwrap(), "ci");
    let rows = list(&all).unwrap();
    assert_eq!(rows[0], ("ci".to_owned(), "127.0.0.1:1".to_owned(), "token", true));
    assert_eq!(rows[1], ("prod".to_owned(), "127.0.0.1:1".to_owned(), "certificate", false));
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    assert!(refused(&in_file(&file, Some("prd"))).contains("did you mean prod?"));
    assert!(switch(&all, "nowhere").unwrap_err().to_string().contains("ci, prod"));
    remove(&all, "ci").unwrap();
    assert!(current(&all).unwrap_err().to_string().contains("context use"));
    assert!(refused(&all).contains("context use"));
    assert!(add(&all, "a/b", &from, None).is_err() && add(&all, "", &from, None).is_err());
}

#[test]
fn a_file_of_one_is_read_as_ever_and_becomes_one_of_several() {
    let dir = written();
    let file = dir.path().join("context.yaml");
    // By its path, as ever, and as the default file.
    assert!(load(&of(file.to_str().unwrap())).unwrap().certificate);
    assert!(load(&in_file(&file, None)).unwrap().certificate);
    assert_eq!(current(&in_file(&file, None)).unwrap(), "default");
    assert!(refused(&in_file(&file, Some("prod"))).contains("context add prod"));
    let other = written();
    add(&in_file(&file, None), "prod", &other.path().join("context.yaml"), None).unwrap();
    assert_eq!(current(&in_file(&file, None)).unwrap(), "default");
    for name in [None, Some("default"), Some("prod")] {
        assert!(load(&in_file(&file, name)).unwrap().certificate, "{name:?}");
    }
}
