//! Why a program is no member of its cluster. Says what to do; where a new token is the remedy, with the command for it.

use std::{io, path::PathBuf};

use isthmus_model::ids::IdError;

use crate::{bundle::BundleError, keys::KeyError, svid::SvidError, tls::TlsError, token::TokenError};

/// Why there is no usable certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Nothing to start from.
    #[error(
        "there is no valid certificate in {} and agentTokenFile is not set: mint a token with `{command}`, put it into a \
         file and name that there", state_dir.display()
    )]
    NoToken {
        /// Where a certificate would lie.
        state_dir: PathBuf,
        /// Mints a token.
        command: String,
    },
    /// The token file cannot be read.
    #[error(
        "there is no valid certificate and agentTokenFile {} cannot be read: mint a token with `{command}` into it",
        path.display()
    )]
    ReadToken {
        /// The file.
        path: PathBuf,
        /// Mints a token.
        command: String,
        /// What the system said.
        source: io::Error,
    },
    /// What is in the token file is of no use.
    #[error("agentTokenFile {}: mint a new token with `{command}` into it", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Mints a token.
        command: String,
        /// What is wrong.
        source: TokenError,
    },
    /// Minted for something else.
    #[error("the token in {} is for {found:?}, not for this {wanted}: mint one with `{command}`", path.display())]
    OtherSubject {
        /// The file.
        path: PathBuf,
        /// What it is for.
        found: String,
        /// What this program is.
        wanted: &'static str,
        /// Mints a token.
        command: String,
    },
    /// The agent has judged the token, and asking again changes nothing.
    #[error("the agent at {address} refused to enrol with the token in {}: {message}; the remedy is `{command}`", path.display())]
    Refused {
        /// Where it was dialled.
        address: String,
        /// The token file.
        path: PathBuf,
        /// Its words.
        message: String,
        /// Mints a token.
        command: String,
    },
    /// The agent cannot be reached, or cannot answer now. Worth another try.
    #[error("no certificate from the agent at {address}: {message}")]
    Agent {
        /// Where it was dialled.
        address: String,
        /// Its words, or the connection's failure.
        message: String,
    },
    /// The agent's answer does not hold together, or is not what the token is for.
    #[error("the agent's answer is not usable: {0}")]
    Answer(&'static str),
    /// A name in it is not valid.
    #[error("the agent's answer is not usable")]
    Name(#[from] IdError),
    /// The certificate is no SVID, or not readable on disk.
    #[error("use the certificate")]
    Svid(#[from] SvidError),
    /// No key.
    #[error("make a key")]
    Key(#[from] KeyError),
    /// The federation's bundle is unusable, or nobody vouches for it.
    #[error("use the federation's trust bundle")]
    Bundle(#[from] BundleError),
    /// TLS cannot be configured.
    #[error("configure TLS towards the agent")]
    Tls(#[from] TlsError),
    /// The state folder.
    #[error("stateDir: {}: check that the folder exists and may be written to", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The record of the agent is damaged.
    #[error("{} is damaged: remove it, and enrol again with a new token (`{command}`)", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Mints a token.
        command: String,
        /// Where.
        source: serde_json::Error,
    },
}

impl EnrolError {
    /// Whether the same may work later, with nobody doing anything.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Agent { .. })
    }
}
