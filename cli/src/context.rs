//! The context file: which control plane, and as whom. Written by the control plane on its first start; paths in it are
//! relative to the file.

use std::{
    fs,
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
use serde::Deserialize;

/// Longest file read for a context; real ones have a few kilobytes.
const MAX_FILE: u64 = 1024 * 1024;

const HOW_TO_GET_ONE: &str = "the control plane writes one on its first start, <stateDir>/admin/context.yaml: \
    name it with --context FILE or ISTHMUS_CONTEXT, or copy that folder to ~/.isthmus/";

/// As written in the file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    /// "host:port" of the admin API.
    server: String,
    /// PEM: the federation's roots.
    ca: PathBuf,
    /// PEM: our certificate chain.
    cert: PathBuf,
    /// PEM: its key.
    key: PathBuf,
    federation: TrustDomain,
}

/// A control plane that can be talked to.
pub(crate) struct Context {
    /// "host:port".
    pub(crate) server: String,
    pub(crate) tls: rustls::ClientConfig,
    /// For messages.
    pub(crate) path: PathBuf,
}

/// Loads `path`, or the default context.
pub(crate) fn load(path: Option<PathBuf>) -> anyhow::Result<Context> {
    let path = match path {
        Some(path) => path,
        None => default_path()?,
    };
    if !path.exists() {
        bail!("there is no context file {}\n{HOW_TO_GET_ONE}", path.display());
    }
    let text = read(&path)?;
    let file: File = serde_saphyr::from_str(&text)
        .map_err(|e| anyhow::anyhow!("context file {}: {e}\n{HOW_TO_GET_ONE}", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let tls = file.tls(folder).with_context(|| format!("context file {}", path.display()))?;
    Ok(Context { server: host_and_port(&file.server, &path)?, tls, path })
}

impl File {
    fn tls(&self, folder: &Path) -> anyhow::Result<rustls::ClientConfig> {
        let certificates = |field: &str, path: &Path| {
            let path = folder.join(path);
            let text = read(&path).with_context(|| field.to_owned())?;
            let found: Result<Vec<CertificateDer<'static>>, _> =
                CertificateDer::pem_slice_iter(text.as_bytes()).collect();
            match found {
                Ok(found) if !found.is_empty() => Ok(found),
                _ => Err(anyhow::anyhow!("{field}: {} does not hold PEM certificates", path.display())),
            }
        };
        let roots = certificates("ca", &self.ca)?;
        let chain = certificates("cert", &self.cert)?;
        let key_path = folder.join(&self.key);
        let key = KeyPair::load(&key_path).context("key")?;
        let Some(key) = key else { bail!("key: there is no file {}", key_path.display()) };
        let svid = Svid::new(chain, &key).context("cert")?;
        let trust = TrustStore::new();
        trust.set([(self.federation.clone(), roots)].into());
        let federation = self.federation.clone();
        let control_plane: tls::PeerPolicy =
            std::sync::Arc::new(move |id| *id.trust_domain() == federation && id.segments().next() == Some("cp"));
        Ok(tls::client_config(Some(&IdentitySource::new(svid)), &trust, control_plane, &[b"http/1.1"])?)
    }
}

fn default_path() -> anyhow::Result<PathBuf> {
    match std::env::home_dir() {
        Some(home) => Ok(home.join(".isthmus").join("context.yaml")),
        None => bail!("no context file is named and there is no home folder to look in\n{HOW_TO_GET_ONE}"),
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

fn read(path: &Path) -> anyhow::Result<String> {
    let about = || format!("read {}", path.display());
    if fs::metadata(path).with_context(about)?.len() > MAX_FILE {
        bail!("{} is over {MAX_FILE} bytes; that is no file of a context", path.display());
    }
    fs::read_to_string(path).with_context(about)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_says_how_to_get_one() {
        let error = load(Some("/nonexistent/context.yaml".into())).err().unwrap().to_string();
        assert!(error.contains("/nonexistent/context.yaml") && error.contains("--context"), "{error}");
    }

    #[test]
    fn unknown_keys_and_unusable_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("context.yaml");
        let good = "server: 127.0.0.1:1\nca: ca.pem\ncert: admin.pem\nkey: admin.key\nfederation: isthmus.example\n";
        fs::write(&path, format!("{good}sever: x\n")).unwrap();
        assert!(format!("{:#}", load(Some(path.clone())).err().unwrap()).contains("sever"));
        fs::write(&path, good).unwrap();
        assert!(format!("{:#}", load(Some(path.clone())).err().unwrap()).contains("ca.pem"));
        fs::write(dir.path().join("ca.pem"), "nothing").unwrap();
        let error = format!("{:#}", load(Some(path)).err().unwrap());
        assert!(error.contains("does not hold PEM certificates"), "{error}");
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
}
