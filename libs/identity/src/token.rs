//! One-time tokens: what an operator carries from `isthmusctl` or the agent to a newcomer.
//!
//! Text form: `isthmus-<kind>.<base64url(JSON)>`. A token says whom to dial and which root to expect there; its secret
//! proves, once, that the bearer may join. Nothing in it is signed: the issuer keeps [`Token::secret_hash`] and its own
//! record of subject and expiry, which alone decide. The reader's checks are for good error messages.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use isthmus_model::{ids::ClusterName, time::Timestamp};
use rand::RngExt as _;
use serde::{Deserialize, Serialize};

/// Longest token text; ours have under 500 characters.
pub const MAX_TOKEN: usize = 4096;

const PREFIX: &str = "isthmus-";

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A cluster's agent joins the federation, at the control plane.
    Join,
    /// A gateway, DNS server or workload enrols, at its agent.
    Local,
    /// Another node of the control plane, at one that runs.
    Node,
}

impl TokenKind {
    /// As in the text form.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join",
            Self::Local => "local",
            Self::Node => "node",
        }
    }
}

impl fmt::Display for TokenKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a text is no usable token. Says what to do, and never repeats the secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not a token at all.
    #[error(
        "this is not an Isthmus token: one starts with isthmus-join., isthmus-local. or isthmus-node. ({0}); {RENEW}"
    )]
    Garbage(&'static str),
    /// The end is missing.
    #[error("the token is cut off: copy it whole, it is one line without blanks; if it is lost, {RENEW}")]
    CutOff,
    /// A part is not as it should be.
    #[error("the token's {field} is not valid: {rule}; {RENEW}")]
    Field {
        /// Which part.
        field: &'static str,
        /// What is expected there.
        rule: &'static str,
    },
    /// A token of the other kind.
    #[error(
        "this is a {found} token, a {wanted} token is needed here: `isthmusctl cluster join-token` makes those for a \
         cluster's agent, `isthmus-agent token` those for gateways, DNS servers and workloads, `isthmusctl cp add` those for \
         nodes of the control plane"
    )]
    WrongKind {
        /// The token's.
        found: TokenKind,
        /// What was wanted.
        wanted: TokenKind,
    },
    /// Too late.
    #[error("the token expired at {at}: mint a new one with `{command}`")]
    Expired {
        /// RFC 3339.
        at: String,
        /// The command that mints such a token.
        command: String,
    },
}

const RENEW: &str = "mint a new one with `isthmusctl cluster join-token CLUSTER` (agents), `isthmus-agent token` \
                     (gateways, DNS, workloads) or `isthmusctl cp add NODE` (control plane)";

/// A one-time token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What for.
    pub kind: TokenKind,
    /// "host:port" to dial.
    pub address: String,
    /// SHA-256 of the root that the server's chain must contain.
    pub ca_pin: [u8; 32],
    /// Which cluster the bearer is to belong to; a node of the control plane belongs to none, and its token says
    /// `control-plane`.
    pub cluster: ClusterName,
    /// `agent`, `gateway/<name>`, `dns/<name>`, `workload/<namespace>/<service account>` or `cp/<node>`.
    pub subject: String,
    /// 256 random bits as base64url. Secret.
    pub secret: String,
    /// Not accepted later.
    pub expires_at: Timestamp,
}

/// All of a token but its secret.
#[derive(Clone, Debug)]
pub struct TokenSpec {
    /// See [`Token::kind`].
    pub kind: TokenKind,
    /// See [`Token::address`].
    pub address: String,
    /// See [`Token::ca_pin`].
    pub ca_pin: [u8; 32],
    /// See [`Token::cluster`].
    pub cluster: ClusterName,
    /// See [`Token::subject`].
    pub subject: String,
    /// See [`Token::expires_at`].
    pub expires_at: Timestamp,
}

/// The JSON inside, version 1.
#[derive(Serialize, Deserialize)]
struct Wire {
    v: u32,
    address: String,
    pin: String,
    cluster: String,
    subject: String,
    secret: String,
    expires: u64,
}

impl Token {
    /// A new token with a random secret.
    pub fn mint(spec: TokenSpec) -> Self {
        let TokenSpec { kind, address, ca_pin, cluster, subject, expires_at } = spec;
        let secret: [u8; 32] = rand::rng().random();
        Self { kind, address, ca_pin, cluster, subject, secret: URL_SAFE_NO_PAD.encode(secret), expires_at }
    }

    /// The text form.
    pub fn encode(&self) -> String {
        let wire = Wire {
            v: 1,
            address: self.address.clone(),
            pin: hex::encode(self.ca_pin),
            cluster: self.cluster.to_string(),
            subject: self.subject.clone(),
            secret: self.secret.clone(),
            expires: self.expires_at.0,
        };
        // Strings and numbers alone: this cannot fail, and an empty body would be refused by `parse`.
        let json = serde_json::to_vec(&wire).unwrap_or_default();
        format!("{PREFIX}{}.{}", self.kind, URL_SAFE_NO_PAD.encode(json))
    }

    /// Reads the text form, white space around it allowed, and checks the expiry against this machine's clock.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        Self::parse_at(text, crate::now())
    }

    /// As [`Token::parse`], at a given time.
    pub fn parse_at(text: &str, now: Timestamp) -> Result<Self, TokenError> {
        let token = Self::decode(text.trim())?;
        if token.expires_at <= now {
            let at = crate::rfc3339(token.expires_at);
            return Err(TokenError::Expired { at, command: token.mint_command() });
        }
        Ok(token)
    }

    /// The token itself, if it is of this kind.
    pub fn require(self, wanted: TokenKind) -> Result<Self, TokenError> {
        if self.kind == wanted { Ok(self) } else { Err(TokenError::WrongKind { found: self.kind, wanted }) }
    }

    /// What the issuer keeps instead of the secret.
    pub fn secret_hash(secret: &str) -> [u8; 32] {
        crate::tls::sha256(secret.as_bytes())
    }

    /// The command line that mints another token like this one.
    pub fn mint_command(&self) -> String {
        match self.kind {
            TokenKind::Join => format!("isthmusctl cluster join-token {}", self.cluster),
            TokenKind::Node => format!("isthmusctl {}", self.subject.replacen("cp/", "cp add ", 1)),
            TokenKind::Local => {
                format!("isthmus-agent token {} --config <the agent's config>", self.subject.replacen('/', " ", 1))
            }
        }
    }

    fn decode(text: &str) -> Result<Self, TokenError> {
        if text.is_empty() {
            return Err(TokenError::Garbage("it is empty"));
        }
        if text.len() > MAX_TOKEN {
            return Err(TokenError::Garbage("it is too long"));
        }
        let Some(rest) = text.strip_prefix(PREFIX) else {
            let cut = PREFIX.starts_with(text);
            return Err(if cut { TokenError::CutOff } else { TokenError::Garbage("the beginning is something else") });
        };
        let Some((kind, body)) = rest.split_once('.') else {
            let cut = ["join", "local", "node"].iter().any(|kind| kind.starts_with(rest));
            return Err(if cut { TokenError::CutOff } else { TokenError::Garbage("there is no '.'") });
        };
        let kind = match kind {
            "join" => TokenKind::Join,
            "local" => TokenKind::Local,
            "node" => TokenKind::Node,
            _ => return Err(TokenError::Garbage("its kind is unknown")),
        };
        if !body.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
            return Err(TokenError::Garbage("there are characters that no token has"));
        }
        // A text of the right alphabet fails to decode, or ends within the JSON, only if its end is missing.
        let json = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::CutOff)?;
        let wire: Wire = serde_json::from_slice(&json).map_err(|e| match e.classify() {
            serde_json::error::Category::Eof => TokenError::CutOff,
            _ => TokenError::Garbage("its content is damaged"),
        })?;
        Self::from_wire(kind, wire)
    }

    fn from_wire(kind: TokenKind, wire: Wire) -> Result<Self, TokenError> {
        let field = |field, rule| TokenError::Field { field, rule };
        if wire.v != 1 {
            return Err(field("version", "only 1 is known; use programs of the same release"));
        }
        let pin = hex::decode(&wire.pin).ok().and_then(|bytes| bytes.try_into().ok());
        let host_and_port = wire.address.rsplit_once(':');
        if !host_and_port.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0)) {
            return Err(field("address", "host:port is expected"));
        }
        if !is_subject(&wire.subject) {
            return Err(field(
                "subject",
                "agent, gateway/NAME, dns/NAME, workload/NAMESPACE/SERVICEACCOUNT or cp/NODE",
            ));
        }
        if wire.secret.is_empty() {
            return Err(field("secret", "it is empty"));
        }
        Ok(Self {
            kind,
            address: wire.address,
            ca_pin: pin.ok_or_else(|| field("CA pin", "64 hexadecimal digits are expected"))?,
            cluster: wire.cluster.parse().map_err(|_| field("cluster", "an RFC 1123 label is expected"))?,
            subject: wire.subject,
            secret: wire.secret,
            expires_at: Timestamp(wire.expires),
        })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("kind", &self.kind)
            .field("address", &self.address)
            .field("cluster", &self.cluster)
            .field("subject", &self.subject)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

fn is_subject(subject: &str) -> bool {
    match subject.split('/').collect::<Vec<_>>().as_slice() {
        ["agent"] => true,
        ["gateway" | "dns" | "cp", name] => !name.is_empty(),
        ["workload", namespace, account] => !namespace.is_empty() && !account.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
