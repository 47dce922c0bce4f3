//! Manifest files: multi-document YAML text → Kubernetes objects, each checked, each error with file, line and field.
//!
//! Known are Service, EndpointSlice, Namespace (the Kubernetes types), ServiceExport (own type) and `List` of them. What
//! holds: a bad document never hides the others; no input makes this panic, recurse deeply or allocate far beyond its
//! own size. A namespaced object without a namespace gets "default", as with `kubectl apply`. What this does not do:
//! look at the file system, or at how objects fit together.

mod check;
pub mod declared;
mod document;
mod service_export;

pub use check::{SERVICE_ACCOUNTS_ANNOTATION, SERVICE_NAME_LABEL, app_protocol, service_accounts};
pub use service_export::{ServiceExport, ServiceExportSpec};

use std::fmt;

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Serialize, de::DeserializeOwned};

use document::{Node, Path};

/// The largest file that is read.
pub const MAX_FILE_BYTES: usize = 4 * 1024 * 1024;
/// The most objects, and problems, that one file may hold.
pub const MAX_OBJECTS: usize = 10_000;

/// An object that passed all checks; `metadata.name` and, but for Namespace, `metadata.namespace` are set.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// `v1` Service.
    Service(Box<Service>),
    /// `discovery.k8s.io/v1` EndpointSlice, with [`SERVICE_NAME_LABEL`].
    EndpointSlice(Box<EndpointSlice>),
    /// `multicluster.x-k8s.io/v1beta1` or `v1alpha1` ServiceExport.
    ServiceExport(Box<ServiceExport>),
    /// `v1` Namespace.
    Namespace(Box<Namespace>),
}

/// Which object something is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// For example "Service".
    pub kind: String,
    /// Empty for a Namespace.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

/// What is wrong with one document of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// As given to [`parse`].
    pub file: String,
    /// From 1; 0 if it is about the whole file.
    pub line: u64,
    /// Dotted path with indexes, for example `spec.ports[0].port`; empty if not about one field.
    pub field: String,
    /// What is wrong and what is allowed.
    pub message: String,
    /// Which object the document holds, as far as it can be read: the one whose last good version should stay.
    pub object: Option<Box<ObjectRef>>,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

impl ManifestError {
    /// "cart.yaml:14", or the file alone.
    pub fn at(&self) -> String {
        if self.line == 0 { self.file.clone() } else { format!("{}:{}", self.file, self.line) }
    }
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.at())?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ManifestError {}

impl Object {
    /// Kind, namespace and name.
    pub fn reference(&self) -> ObjectRef {
        let (kind, metadata) = match self {
            Self::Service(o) => ("Service", &o.metadata),
            Self::EndpointSlice(o) => ("EndpointSlice", &o.metadata),
            Self::ServiceExport(o) => ("ServiceExport", &o.metadata),
            Self::Namespace(o) => ("Namespace", &o.metadata),
        };
        ObjectRef {
            kind: kind.to_owned(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
        }
    }
}

/// Reads all objects of a file, in order; a bad document gives one error per problem in its place.
pub fn parse(file: &str, text: &str) -> Vec<Result<Object, ManifestError>> {
    read_documents(file, text, &|reader, version, kind| reader.read_kind(version, kind))
}

/// Reads one object, of this `apiVersion` and kind.
type ReadKind<'k, T> = &'k dyn Fn(&Reader<'_>, &str, &str) -> Result<T, Vec<(Path, String)>>;

fn read_documents<T>(file: &str, text: &str, kind: ReadKind<'_, T>) -> Vec<Result<T, ManifestError>> {
    let fail = |line, message: String| {
        Err(ManifestError { file: file.to_owned(), line, field: String::new(), message, object: None })
    };
    if text.len() > MAX_FILE_BYTES {
        return vec![fail(0, format!("{} bytes; at most {MAX_FILE_BYTES} are read. Split the file", text.len()))];
    }
    let mut out = Vec::new();
    for document in document::split(text) {
        match Node::parse(&document) {
            Ok(None) => {}
            Ok(Some(root)) => Reader { file, root: &root, prefix: Path::default() }.read(kind, &mut out),
            Err((line, message)) => out.push(fail(line, message)),
        }
        if out.len() > MAX_OBJECTS {
            out.truncate(MAX_OBJECTS);
            let message = format!("more than {MAX_OBJECTS} objects; the rest is not read. Split the file");
            out.push(fail(document.first_line, message));
            break;
        }
    }
    out
}

/// As [`parse`], for bytes as they come from a disk.
pub fn parse_bytes(file: &str, bytes: &[u8]) -> Vec<Result<Object, ManifestError>> {
    match std::str::from_utf8(bytes) {
        Ok(text) => parse(file, text),
        Err(e) => {
            let good = bytes.get(..e.valid_up_to()).unwrap_or_default();
            let line = 1 + good.iter().filter(|b| **b == b'\n').count() as u64;
            let message = "is not UTF-8 text".to_owned();
            vec![Err(ManifestError { file: file.to_owned(), line, field: String::new(), message, object: None })]
        }
    }
}

/// One object (or List of them) within a document.
struct Reader<'a> {
    file: &'a str,
    root: &'a Node,
    /// Where `root` lies within its document: empty, or an item of a List.
    prefix: Path,
}

impl Reader<'_> {
    fn read<T>(&self, read_kind: ReadKind<'_, T>, out: &mut Vec<Result<T, ManifestError>>) {
        let problems = match (self.text("apiVersion"), self.text("kind")) {
            (Err(e), _) | (_, Err(e)) => vec![e],
            (Ok("v1"), Ok("List")) if self.prefix.is_empty() => return self.read_items(read_kind, out),
            (Ok(version), Ok(kind)) => match read_kind(self, version, kind) {
                Ok(object) => return out.push(Ok(object)),
                Err(problems) => problems,
            },
        };
        out.extend(problems.into_iter().map(|(path, message)| Err(self.error(path, message))));
    }

    fn read_items<T>(&self, read_kind: ReadKind<'_, T>, out: &mut Vec<Result<T, ManifestError>>) {
        let Some(items) = self.root.get("items").and_then(Node::items) else {
            return out.push(Err(self.error(Path::from(["items"]), "is not a list of objects".to_owned())));
        };
        for (i, item) in items.iter().enumerate() {
            if out.len() > MAX_OBJECTS {
                return;
            }
            Reader { file: self.file, root: item, prefix: Path::from(["items"]).item(i) }.read(read_kind, out);
        }
    }

    fn read_kind(&self, version: &str, kind: &str) -> Result<Object, Vec<(Path, String)>> {
        match (kind, version) {
            ("Service", "v1") => {
                let mut service: Service = self.typed()?;
                self.check(&mut service.metadata, true)?;
                check::service(&service)?;
                Ok(Object::Service(service.into()))
            }
            ("EndpointSlice", "discovery.k8s.io/v1") => {
                let mut slice: EndpointSlice = self.typed()?;
                self.check(&mut slice.metadata, true)?;
                check::endpoint_slice(&slice)?;
                Ok(Object::EndpointSlice(slice.into()))
            }
            ("ServiceExport", "multicluster.x-k8s.io/v1beta1" | "multicluster.x-k8s.io/v1alpha1") => {
                let mut export: ServiceExport = self.typed()?;
                self.check(&mut export.metadata, true)?;
                check::label(&export.metadata, "ServiceExport name")?;
                Ok(Object::ServiceExport(export.into()))
            }
            ("Namespace", "v1") => {
                let mut namespace: Namespace = self.typed()?;
                self.check(&mut namespace.metadata, false)?;
                check::label(&namespace.metadata, "namespace")?;
                Ok(Object::Namespace(namespace.into()))
            }
            ("Service" | "Namespace", _) => Err(wrong_version(version, "v1")),
            ("EndpointSlice", _) => Err(wrong_version(version, "discovery.k8s.io/v1")),
            ("ServiceExport", _) => Err(wrong_version(version, "multicluster.x-k8s.io/v1beta1")),
            ("ClusterGrant" | "Settings", _) => {
                let message = format!("{kind} belongs to the control plane: isthmusctl apply -f {}", self.file);
                Err(vec![(Path::from(["kind"]), message)])
            }
            _ => {
                let known = "Service, EndpointSlice, ServiceExport, Namespace, and List of them";
                let message = format!("{kind:.64} is not a kind that is read here; known are {known}");
                Err(vec![(Path::from(["kind"]), message)])
            }
        }
    }

    /// The node as a `T`; misspelt fields are errors, as they are for `kubectl apply`.
    fn typed<T: DeserializeOwned + Serialize>(&self) -> Result<T, Vec<(Path, String)>> {
        let value = self.root.to_json();
        let object: T = serde_path_to_error::deserialize(&value).map_err(|e| {
            let path = Path::from(e.path());
            vec![(path, e.into_inner().to_string())]
        })?;
        let known = serde_json::to_value(&object).map_err(|e| vec![(Path::default(), e.to_string())])?;
        let unknown = document::unknown_fields(&value, &known);
        if unknown.is_empty() {
            return Ok(object);
        }
        let message = "is not a field that is known here; is it misspelt or at the wrong depth?";
        Err(unknown.into_iter().map(|path| (path, message.to_owned())).collect())
    }

    fn check(&self, metadata: &mut ObjectMeta, namespaced: bool) -> Result<(), Vec<(Path, String)>> {
        if namespaced {
            metadata.namespace.get_or_insert_with(|| "default".to_owned());
        } else {
            metadata.namespace = None;
        }
        check::metadata(metadata)
    }

    fn text(&self, field: &str) -> Result<&str, (Path, String)> {
        match self.root.get(field) {
            None => Err((Path::from([field]), "is missing".to_owned())),
            Some(node) => node.text().ok_or_else(|| (Path::from([field]), "is not text".to_owned())),
        }
    }

    fn error(&self, path: Path, message: String) -> ManifestError {
        ManifestError {
            file: self.file.to_owned(),
            line: self.root.line_of(&path),
            field: self.prefix.clone().joined(&path).to_string(),
            message,
            object: self.reference().map(Box::new),
        }
    }

    fn reference(&self) -> Option<ObjectRef> {
        let kind = self.root.get("kind")?.text()?;
        let metadata = self.root.get("metadata")?;
        let name = metadata.get("name")?.text()?;
        let namespace = metadata.get("namespace").and_then(Node::text);
        let namespace = if kind == "Namespace" { "" } else { namespace.unwrap_or("default") };
        Some(ObjectRef { kind: kind.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

fn wrong_version(version: &str, right: &str) -> Vec<(Path, String)> {
    let message = format!("{version:.64} is not a version that is read here; write {right}");
    vec![(Path::from(["apiVersion"]), message)]
}

#[cfg(test)]
mod tests;
