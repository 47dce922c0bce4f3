//! What operators declare to the control plane (`isthmusctl apply`): own kinds of group `isthmus.io/v1alpha1`, in the shape
//! of Kubernetes objects. Text → values, each checked, each error with file, line and field; and back.

use isthmus_model::{
    global::Settings,
    grant::ClusterGrant,
    ids::{ClusterName, IdError},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ManifestError, Reader, document::Path, read_documents, wrong_version};

/// The `apiVersion` of own kinds.
pub const API_VERSION: &str = "isthmus.io/v1alpha1";
/// The name of the one [`Declaration::Settings`].
pub const SETTINGS: &str = "federation";

/// One object, as declared.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// `metadata.resourceVersion`: only if it is at this version.
    pub version: Option<u64>,
    /// What it says.
    pub declaration: Declaration,
    /// The file it was read from, and the line it begins at.
    pub at: (String, u64),
}

/// What can be declared.
#[derive(Clone, Debug, PartialEq)]
pub enum Declaration {
    /// Kind Settings: of the federation.
    Settings(Settings),
    /// Kind ClusterGrant: of the cluster of its name.
    ClusterGrant(ClusterName, ClusterGrant),
}

/// Kinds that can be declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// See [`Declaration::Settings`].
    Settings,
    /// See [`Declaration::ClusterGrant`].
    ClusterGrant,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Metadata {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resource_version: Option<String>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Shape<S> {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: S,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Settings, Self::ClusterGrant];

    /// As in `kind:`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Settings => "Settings",
            Self::ClusterGrant => "ClusterGrant",
        }
    }

    /// By what people type: the kind, its plural or its short name, in any case.
    pub fn find(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "settings" | "setting" => Some(Self::Settings),
            "clustergrant" | "clustergrants" | "grant" | "grants" => Some(Self::ClusterGrant),
            _ => None,
        }
    }
}

impl Declaration {
    /// Which kind it is of.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Settings(_) => Kind::Settings,
            Self::ClusterGrant(..) => Kind::ClusterGrant,
        }
    }

    /// `metadata.name`.
    pub fn name(&self) -> &str {
        match self {
            Self::Settings(_) => SETTINGS,
            Self::ClusterGrant(cluster, _) => cluster.as_str(),
        }
    }

    /// The object, as [`parse`] reads it. `version` goes into `metadata.resourceVersion`.
    pub fn to_json(&self, version: Option<u64>) -> Value {
        let spec = match self {
            Self::Settings(settings) => serde_json::to_value(settings),
            Self::ClusterGrant(_, grant) => serde_json::to_value(grant),
        };
        let shape = Shape {
            api_version: API_VERSION.to_owned(),
            kind: self.kind().name().to_owned(),
            metadata: Metadata {
                name: self.name().to_owned(),
                resource_version: version.map(|version| version.to_string()),
            },
            spec: spec.unwrap_or_default(),
        };
        serde_json::to_value(shape).unwrap_or_default()
    }
}

/// Reads all objects of a file, in order; a bad document gives its errors in its place.
pub fn parse(file: &str, text: &str) -> Vec<Result<Declared, ManifestError>> {
    read_documents(file, text, &read)
}

fn read(reader: &Reader<'_>, version: &str, kind: &str) -> Result<Declared, Vec<(Path, String)>> {
    let known = Kind::ALL.into_iter().find(|known| known.name() == kind);
    let Some(known) = known else {
        let message = match kind {
            "Service" | "EndpointSlice" | "ServiceExport" | "Namespace" => {
                format!("{kind} belongs to a cluster: put it into the cluster's manifests folder, or its API server")
            }
            _ => {
                let names: Vec<&str> = Kind::ALL.into_iter().map(Kind::name).collect();
                format!("{kind:.64} is not a kind that can be applied here; known are {}", names.join(", "))
            }
        };
        return Err(vec![(Path::from(["kind"]), message)]);
    };
    if version != API_VERSION {
        return Err(wrong_version(version, API_VERSION));
    }
    let at = (reader.file.to_owned(), reader.root.line_of(&Path::default()));
    let (metadata, declaration) = match known {
        Kind::Settings => {
            let shape: Shape<Settings> = reader.typed()?;
            named(&shape.metadata.name, |name| match name {
                SETTINGS => Ok(()),
                _ => Err(format!("there is one Settings, named {SETTINGS}")),
            })?;
            (shape.metadata, Declaration::Settings(shape.spec))
        }
        Kind::ClusterGrant => {
            let shape: Shape<ClusterGrant> = reader.typed()?;
            let parse = |name: &str| name.parse().map_err(|error: IdError| error.to_string());
            let cluster: ClusterName = named(&shape.metadata.name, parse)?;
            (shape.metadata, Declaration::ClusterGrant(cluster, shape.spec))
        }
    };
    let version = metadata.resource_version.map(|version| {
        version.parse().map_err(|_| {
            let message =
                "is not a version; leave it as `isthmusctl get -o yaml` printed it, or leave it out".to_owned();
            vec![(Path::from(["metadata", "resourceVersion"]), message)]
        })
    });
    Ok(Declared { version: version.transpose()?, declaration, at })
}

fn named<T>(name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<T, Vec<(Path, String)>> {
    parse(name).map_err(|message| vec![(Path::from(["metadata", "name"]), message)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANT: &str = "apiVersion: isthmus.io/v1alpha1\nkind: ClusterGrant\nmetadata: { name: us-east }\n\
                         spec:\n  exportNamespaces: [shop]\n";

    fn errors(text: &str) -> Vec<String> {
        parse("a.yaml", text).into_iter().filter_map(Result::err).map(|error| error.to_string()).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        let text = format!(
            "{GRANT}---\napiVersion: isthmus.io/v1alpha1\nkind: Settings\n\
                            metadata: {{ name: federation, resourceVersion: \"7\" }}\nspec: {{ failover: {{ holdDownMs: 5 }} }}\n"
        );
        let read: Vec<Declared> = parse("a.yaml", &text).into_iter().map(Result::unwrap).collect();
        assert_eq!(
            read.iter().map(|d| (d.declaration.name(), d.version, d.at.1)).collect::<Vec<_>>(),
            [("us-east", None, 1), ("federation", Some(7), 7)]
        );
        for declared in read {
            let again = declared.declaration.to_json(declared.version).to_string();
            let again = parse("a.yaml", &again).remove(0).unwrap();
            assert_eq!((again.version, again.declaration), (declared.version, declared.declaration));
        }
    }

    #[test]
    fn each_error_tells_its_line_and_field_and_hides_no_other() {
        let text = format!(
            "{}---\n{}---\n{}---\nkind: Service\napiVersion: v1\n---\nkind: Frob\napiVersion: v1\n---\n{}",
            GRANT.replace("[shop]", "[Shop]"),
            GRANT.replace("exportNamespaces", "exports"),
            GRANT.replace("us-east", "any"),
            GRANT.replace("v1alpha1", "v9"),
        );
        let errors = errors(&text);
        for (error, parts) in errors.iter().zip([
            ["a.yaml:5: spec.exportNamespaces", "\"Shop\" is not a namespace"],
            ["a.yaml:11: spec.exports", "unknown field"],
            ["a.yaml:15: metadata.name", "reserved word"],
            ["a.yaml:19: kind", "belongs to a cluster"],
            ["a.yaml:22: kind", "Settings, ClusterGrant"],
            ["a.yaml:25: apiVersion", "write isthmus.io/v1alpha1"],
        ]) {
            assert!(parts.iter().all(|part| error.contains(part)), "{error} lacks one of {parts:?}");
        }
        assert_eq!(errors.len(), 6, "{errors:#?}");
    }

    #[test]
    fn kinds_are_found_by_what_people_type() {
        assert_eq!(Kind::find("ClusterGrants"), Some(Kind::ClusterGrant));
        assert_eq!(Kind::find("settings"), Some(Kind::Settings));
        assert_eq!(Kind::find("pods"), None);
    }
}
