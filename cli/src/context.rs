//! The context file: which control plane, and as whom. The control plane writes one on its first start, with one context;
//! a file may also hold several by name, one of them in use. Paths in it are relative to the file.
//!
//! In: `--context` (a name or a file), `--contexts` (the file of several). Out: a [`Context`] with its TLS and token, or
//! what to do. Secrets are never shown. What it writes is whole or not at all, and private.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use isthmus_identity::{
    bundle::TrustStore,
    keys::KeyPair,
    svid::Svid,
    tls::{self, IdentitySource},
};
use isthmus_model::ids::TrustDomain;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};

use crate::suggest;

/// Longest file read for a context; real ones have a few kilobytes.
const MAX_FILE: u64 = 1024 * 1024;
/// What a context of a file of one is called when it becomes one of several.
const DEFAULT: &str = "default";

const HOW_TO_GET_ONE: &str = "the control plane writes one on its first start, <stateDir>/admin/context.yaml: \
    name it with --context FILE or ISTHMUS_CONTEXT, or take it over: isthmusctl context add NAME FILE";

/// One context, as written.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    /// "host:port" of the admin API.
    server: String,
    /// PEM: the federation's roots.
    ca: PathBuf,
    /// PEM: our certificate chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cert: Option<PathBuf>,
    /// PEM: its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<PathBuf>,
    /// A bearer token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token: Option<Secret>,
    /// A file that holds one, read for each command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_file: Option<PathBuf>,
    federation: TrustDomain,
}

/// Several by name, as written.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Several {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current_context: Option<String>,
    contexts: BTreeMap<String, Entry>,
}

/// A file of either form.
enum File {
    One(Box<Entry>),
    Several(Several),
}

/// Not for logs or messages.
#[derive(Clone, Deserialize, Serialize)]
#[serde(transparent)]
pub(crate) struct Secret(String);

/// Where to look, as the command line says.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// A file, or the name of a context in `contexts`.
    pub(crate) context: Option<String>,
    /// The file of several.
    pub(crate) contexts: Option<PathBuf>,
}

/// A control plane that can be talked to.
pub(crate) struct Context {
    /// "host:port".
    pub(crate) server: String,
    pub(crate) tls: rustls::ClientConfig,
    /// Goes with each request.
    pub(crate) token: Option<Secret>,
    /// There is a certificate beside, or instead of, a token.
    pub(crate) certificate: bool,
    /// For messages.
    pub(crate) path: PathBuf,
}

/// Loads what `choice` names.
pub(crate) fn load(choice: &Choice) -> anyhow::Result<Context> {
    let (path, name) = choice.resolve()?;
    let Some(file) = read_file(&path)? else {
        bail!("there is no context file {}\n{HOW_TO_GET_ONE}", path.display());
    };
    let entry = match (file, name) {
        (File::One(entry), None) => *entry,
        (File::One(_), Some(name)) => bail!(
            "{name:?} is no file, and {} holds one context without a name\n\
             write the path of a context file, or: isthmusctl context add {name} FILE",
            path.display()
        ),
        (File::Several(several), name) => several.entry(name.as_deref(), &path)?.clone(),
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let (tls, token) = entry.credentials(folder).with_context(|| format!("context file {}", path.display()))?;
    let certificate = entry.cert.is_some();
    Ok(Context { server: host_and_port(&entry.server, &path)?, tls, token, certificate, path })
}

/// What `isthmusctl context list` shows: name, server, as whom, whether it is in use.
pub(crate) fn list(choice: &Choice) -> anyhow::Result<Vec<(String, String, &'static str, bool)>> {
    let path = choice.file()?;
    let row = |name: &str, entry: &Entry, current| {
        (name.to_owned(), entry.server.trim_start_matches("https://").to_owned(), entry.kind(), current)
    };
    match read_file(&path)? {
        None => bail!("there is no context file {}\n{HOW_TO_GET_ONE}", path.display()),
        Some(File::One(entry)) => Ok(vec![row(DEFAULT, &entry, true)]),
        Some(File::Several(several)) => {
            let current = several.current_context.as_deref();
            Ok(several.contexts.iter().map(|(name, entry)| row(name, entry, Some(name.as_str()) == current)).collect())
        }
    }
}

/// The name of the context in use.
pub(crate) fn current(choice: &Choice) -> anyhow::Result<String> {
    let path = choice.file()?;
    match several(&path)? {
        Several { current_context: Some(name), .. } => Ok(name),
        _ => bail!("no context of {} is in use; choose one: isthmusctl context use NAME", path.display()),
    }
}

/// Puts another one in use.
pub(crate) fn switch(choice: &Choice, name: &str) -> anyhow::Result<()> {
    let path = choice.file()?;
    let mut all = several(&path)?;
    all.entry(Some(name), &path)?;
    all.current_context = Some(name.to_owned());
    write(&path, &all)
}

/// Takes the context of `from` over as `name`; with `token`, in place of its credentials.
pub(crate) fn add(choice: &Choice, name: &str, from: &Path, token: Option<&Path>) -> anyhow::Result<()> {
    if name.is_empty() || looks_like_a_file(name) {
        bail!("{name:?} is no name for a context: it would be taken for a file");
    }
    let Some(File::One(mut entry)) = read_file(from)? else {
        bail!("{} is no file of one context, as the control plane writes it", from.display());
    };
    let folder = absolute(from)?.parent().map(Path::to_owned).unwrap_or_default();
    if let Some(token) = token {
        (entry.cert, entry.key, entry.token) = (None, None, None);
        entry.token_file = Some(absolute(token)?);
    }
    let Entry { ca, cert, key, token_file, .. } = &mut *entry;
    for path in [Some(ca), cert.as_mut(), key.as_mut(), token_file.as_mut()].into_iter().flatten() {
        *path = folder.join(&*path);
    }
    entry.credentials(&folder).with_context(|| format!("context file {}", from.display()))?;
    let path = choice.file()?;
    let mut all = if path.exists() { several(&path)? } else { Several::default() };
    all.contexts.insert(name.to_owned(), *entry);
    all.current_context.get_or_insert_with(|| name.to_owned());
    write(&path, &all)
}

/// Forgets one.
pub(crate) fn remove(choice: &Choice, name: &str) -> anyhow::Result<()> {
    let path = choice.file()?;
    let mut all = several(&path)?;
    all.entry(Some(name), &path)?;
    all.contexts.remove(name);
    all.current_context.take_if(|current| current == name);
    write(&path, &all)
}

impl Choice {
    /// The file to read, and which context of it; `None`: the one in use.
    fn resolve(&self) -> anyhow::Result<(PathBuf, Option<String>)> {
        match &self.context {
            Some(file) if looks_like_a_file(file) => Ok((file.into(), None)),
            name => Ok((self.file()?, name.clone())),
        }
    }

    /// The file of several. A file that `--context` names comes first: it may be one, too.
    fn file(&self) -> anyhow::Result<PathBuf> {
        if let Some(file) = self.context.as_ref().filter(|text| looks_like_a_file(text)) {
            return Ok(file.into());
        }
        match (&self.contexts, std::env::home_dir()) {
            (Some(file), _) => Ok(file.clone()),
            (None, Some(home)) => Ok(home.join(".isthmus").join("context.yaml")),
            (None, None) => bail!("no context file is named and there is no home folder to look in\n{HOW_TO_GET_ONE}"),
        }
    }
}

/// A name has neither a folder nor an extension, and there is no file of that name here.
fn looks_like_a_file(text: &str) -> bool {
    text.contains('/') || text.ends_with(".yaml") || text.ends_with(".yml") || Path::new(text).is_file()
}

impl Several {
    fn entry(&self, name: Option<&str>, path: &Path) -> anyhow::Result<&Entry> {
        let all = || self.contexts.keys().cloned().collect::<Vec<_>>().join(", ");
        let Some(name) = name.or(self.current_context.as_deref()) else {
            bail!("no context of {} is in use; choose one with isthmusctl context use NAME: {}", path.display(), all());
        };
        self.contexts.get(name).ok_or_else(|| {
            let near = suggest::near(name, self.contexts.keys().cloned());
            let hint = if near.is_empty() {
                format!("there are: {}", all())
            } else {
                format!("did you mean {}?", near.join(" or "))
            };
            anyhow::anyhow!("there is no context {name:?} in {}; {hint}", path.display())
        })
    }
}

impl Entry {
    fn kind(&self) -> &'static str {
        match (&self.cert, self.token.is_some() || self.token_file.is_some()) {
            (_, true) => "token",
            (Some(_), false) => "certificate",
            (None, false) => "nobody",
        }
    }

    fn credentials(&self, folder: &Path) -> anyhow::Result<(rustls::ClientConfig, Option<Secret>)> {
        let token = match (&self.token, &self.token_file) {
            (Some(_), Some(_)) => bail!("token: is there beside tokenFile; keep one"),
            (Some(token), None) => Some(token.0.clone()),
            (None, Some(file)) => Some(read(&folder.join(file)).context("tokenFile")?),
            (None, None) => None,
        };
        let token = token.map(|token| token.trim().to_owned());
        if token.as_ref().is_some_and(|token| token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic())) {
            bail!("token: it is empty, or has blanks or characters that no token has; it is one line");
        }
        let svid = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some(identity(&folder.join(cert), &folder.join(key))?),
            (None, None) => None,
            (Some(_), None) => bail!("key: is missing beside cert"),
            (None, Some(_)) => bail!("cert: is missing beside key"),
        };
        if svid.is_none() && token.is_none() {
            bail!("it says not as whom: name cert and key, or token, or tokenFile");
        }
        let roots = certificates("ca", &folder.join(&self.ca))?;
        let trust = TrustStore::new();
        trust.set([(self.federation.clone(), roots)].into());
        let federation = self.federation.clone();
        let control_plane: tls::PeerPolicy =
            std::sync::Arc::new(move |id| *id.trust_domain() == federation && id.segments().next() == Some("cp"));
        let source = svid.map(IdentitySource::new);
        let tls = tls::client_config(source.as_ref(), &trust, control_plane, &[b"http/1.1"])?;
        Ok((tls, token.map(Secret)))
    }
}

fn certificates(field: &str, path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let text = read(path).with_context(|| field.to_owned())?;
    let found: Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(anyhow::anyhow!("{field}: {} does not hold PEM certificates", path.display())),
    }
}

fn identity(cert: &Path, key_path: &Path) -> anyhow::Result<Svid> {
    let chain = certificates("cert", cert)?;
    let Some(key) = KeyPair::load(key_path).context("key")? else {
        bail!("key: there is no file {}", key_path.display())
    };
    Svid::new(chain, &key).context("cert")
}

impl Secret {
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Accepts "host:port" and "https://host:port".
fn host_and_port(server: &str, path: &Path) -> anyhow::Result<String> {
    let bare = server.strip_prefix("https://").unwrap_or(server).trim_end_matches('/');
    let port = bare.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    if port.is_none() || bare.contains(['/', '@']) {
        bail!("context file {}: server {server:?} is not host:port", path.display());
    }
    Ok(bare.to_owned())
}

/// `None` if there is no such file.
fn read_file(path: &Path) -> anyhow::Result<Option<File>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = read(path)?;
    let about = |e: serde_saphyr::Error| anyhow::anyhow!("context file {}: {e}\n{HOW_TO_GET_ONE}", path.display());
    // Which form it is decides which keys there may be, and so what is said of others.
    let form: serde_json::Value = serde_saphyr::from_str(&text).map_err(about)?;
    Ok(Some(if form.get("contexts").is_some() || form.get("currentContext").is_some() {
        File::Several(serde_saphyr::from_str(&text).map_err(about)?)
    } else {
        File::One(Box::new(serde_saphyr::from_str(&text).map_err(about)?))
    }))
}

/// The file's contexts; a file of one is one of several with one.
fn several(path: &Path) -> anyhow::Result<Several> {
    match read_file(path)? {
        None => bail!("there is no context file {}\n{HOW_TO_GET_ONE}", path.display()),
        Some(File::Several(several)) => Ok(several),
        Some(File::One(entry)) => {
            Ok(Several { current_context: Some(DEFAULT.to_owned()), contexts: [(DEFAULT.to_owned(), *entry)].into() })
        }
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("find {}", path.display()))
}

/// Beside the old one, then in its place.
fn write(path: &Path, all: &Several) -> anyhow::Result<()> {
    let about = || format!("write {}", path.display());
    let text = serde_saphyr::to_string(all).with_context(about)?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(about)?;
    }
    let part = path.with_extension("part");
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&part).with_context(about)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).with_context(about)?;
    fs::rename(&part, path).with_context(about)
}

fn read(path: &Path) -> anyhow::Result<String> {
    let about = || format!("read {}", path.display());
    if fs::metadata(path).with_context(about)?.len() > MAX_FILE {
        bail!("{} is over {MAX_FILE} bytes; that is no file of a context", path.display());
    }
    fs::read_to_string(path).with_context(about)
}

#[cfg(test)]
mod tests;
