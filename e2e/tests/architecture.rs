//! The dependency rule of docs/architecture.md, held over `cargo metadata`.
#![allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::unwrap_used, reason = "test code")]

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Workspace crate → workspace crates it may depend on (normal and build dependencies).
const ALLOWED: [(&str, &[&str]); 12] = [
    ("isthmus-model", &[]),
    ("isthmus-runtime", &[]),
    ("isthmus-api", &["isthmus-model"]),
    ("isthmus-identity", &["isthmus-api", "isthmus-model", "isthmus-runtime"]),
    ("isthmus-global-cp", SERVICE),
    ("isthmus-agent", SERVICE),
    ("isthmus-gateway", SERVICE),
    ("isthmus-dns", SERVICE),
    ("isthmusctl", &["isthmus-api", "isthmus-identity", "isthmus-model"]),
    ("isthmus-e2e", SERVICE),
    ("isthmus-fuzz", &["isthmus-gateway"]),
    ("isthmus-bench", BENCH),
];
/// What measures or fuzzes may look inside.
const BENCH: &[&str] =
    &["isthmus-api", "isthmus-identity", "isthmus-model", "isthmus-runtime", "isthmus-gateway", "isthmus-e2e"];
const SERVICE: &[&str] = &["isthmus-api", "isthmus-identity", "isthmus-model", "isthmus-runtime"];

/// Library → the only workspace crates that may name it. The end-to-end tests may play any part.
const RESERVED: [(&str, &[&str]); 4] = [
    ("openraft", &["isthmus-global-cp"]),
    // The benchmarks measure it alone, too.
    ("quinn", &["isthmus-gateway", "isthmus-e2e", "isthmus-bench"]),
    ("hickory-server", &["isthmus-dns"]),
    ("kube", &["isthmus-api", "isthmus-agent"]),
];

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    let normal = |kind: DependencyKind| kind != DependencyKind::Development;
    let packages = metadata.packages.into_iter();
    packages
        .map(|p| (p.name.to_string(), p.dependencies.into_iter().filter(|d| normal(d.kind)).map(|d| d.name).collect()))
        .collect()
}

#[test]
fn crates_depend_on_each_other_only_as_the_rule_says() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.into();
    let all = dependencies();
    for (name, dependencies) in &all {
        let may = allowed.get(name.as_str()).unwrap_or_else(|| panic!("{name} is not in the rule: add it"));
        for dependency in dependencies.iter().filter(|d| all.contains_key(*d)) {
            assert!(may.contains(&dependency.as_str()), "{name} must not depend on {dependency}");
        }
    }
    assert_eq!(all.len(), ALLOWED.len(), "the rule names a crate that is gone");
}

#[test]
fn reserved_libraries_stay_where_they_belong() {
    for (library, owners) in RESERVED {
        for (name, dependencies) in dependencies() {
            assert!(
                !dependencies.contains(library) || owners.contains(&name.as_str()),
                "{name} must not use {library}"
            );
        }
    }
}

#[test]
fn one_tls_provider_is_built() {
    // The metadata's graph names optional crates that no feature turns on; the tree has what is built.
    let cargo = std::env::var_os("CARGO").expect("run by cargo");
    let tree = std::process::Command::new(cargo).args(["tree", "--workspace", "--locked", "--prefix", "none"]).output();
    let tree = String::from_utf8(tree.expect("cargo tree").stdout).expect("text");
    let built: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(built.contains("aws-lc-rs"), "the provider of docs/architecture.md");
    for banned in ["ring", "openssl", "openssl-sys", "native-tls"] {
        assert!(!built.contains(banned), "{banned} is in the dependency tree: cargo tree -i {banned}");
    }
}

#[test]
fn pure_crates_have_no_io() {
    let all = dependencies();
    for library in ["tokio", "tonic", "kube", "hyper", "rustls"] {
        assert!(!all["isthmus-model"].contains(library), "isthmus-model must not use {library}");
    }
}
