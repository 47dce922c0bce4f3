//! The first administrator's credentials, for `isthmusctl` on the control plane's own machine:
//! `<stateDir>/admin/{context.yaml, ca.pem, admin.pem, admin.key}`.
//!
//! The certificate is made at the first start and again when half of its life is over or it does not fit the CA; the
//! context file is rewritten when the address changed. A copy taken earlier stays valid until its certificate ends.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use isthmus_identity::svid::Svid;
use isthmus_model::time::Timestamp;
use isthmus_runtime::files;

use crate::authority::{Authority, AuthorityError};

const NAME: &str = "admin";

/// Why the credentials could not be written.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file.
    #[error("write {}", .path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The certificate.
    #[error("make the administrator's certificate")]
    Issue(#[from] AuthorityError),
    /// The certificate's files.
    #[error("keep the administrator's certificate")]
    Keep(#[from] isthmus_identity::svid::SvidError),
}

/// Writes what is missing or outdated. `admin` is where the admin API listens. Returns the context file's path.
pub fn write_credentials(
    state_dir: &Path,
    authority: &Authority,
    admin: SocketAddr,
) -> Result<PathBuf, CredentialsError> {
    let dir = state_dir.join("admin");
    let secret = |path: &Path, text: &str| {
        if fs::read(path).is_ok_and(|held| held == text.as_bytes()) {
            return Ok(());
        }
        files::write_secret(path, text.as_bytes())
            .map_err(|source| CredentialsError::Write { path: path.to_owned(), source })
    };
    secret(&dir.join("ca.pem"), &authority.roots().iter().map(|root| pem(root)).collect::<String>())?;
    let usable = Svid::load(&dir, NAME).ok().flatten().is_some_and(|svid| is_usable(&svid, authority));
    if !usable {
        authority.issue_admin("root")?.save(&dir, NAME)?;
        let chain = dir.join("admin.pem");
        let text =
            fs::read_to_string(&chain).map_err(|source| CredentialsError::Write { path: chain.clone(), source })?;
        files::write_secret(&chain, text.as_bytes())
            .map_err(|source| CredentialsError::Write { path: chain, source })?;
    }
    let context = dir.join("context.yaml");
    let federation = authority.federation();
    secret(
        &context,
        &format!("server: https://{admin}\nca: ca.pem\ncert: admin.pem\nkey: admin.key\nfederation: {federation}\n"),
    )?;
    Ok(context)
}

/// Of this CA, and not past half of its life.
fn is_usable(svid: &Svid, authority: &Authority) -> bool {
    let life = svid.not_after().since(svid.not_before());
    let now = Timestamp(isthmus_runtime::now());
    svid.chain().last().is_some_and(|root| **root == *authority.root_der()) && now < svid.not_before() + life / 2
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for (i, character) in text.chars().enumerate() {
        if i > 0 && i % 64 == 0 {
            pem.push('\n');
        }
        pem.push(character);
    }
    pem.push_str("\n-----END CERTIFICATE-----\n");
    pem
}
