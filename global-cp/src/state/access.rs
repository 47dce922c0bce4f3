//! Who may do what through the admin API: role bindings, and the API tokens that the control plane itself knows.
//!
//! In: commands that were authorized before. Out: [`RoleBinding`]s and [`ApiToken`]s, to decide by
//! ([`crate::admin`] does). Holds: a token's secret is never here, only its hash; every change of a binding gives it a
//! version that no binding ever had; members of the federation see nothing of it, so the revision stays. It decides
//! nothing itself.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use isthmus_model::{ids::SpiffeId, time::Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Change, Rejection, State, TokenHash,
    apply::{TOKEN_MEMORY_MS, within},
};

const MAX_BINDINGS: usize = 1000;
const MAX_SUBJECTS: usize = 100;
const MAX_NAMESPACES: usize = 100;
/// Of a user's or group's name, in bytes.
pub(crate) const MAX_NAME: usize = 256;
const MAX_API_TOKENS: usize = 1000;
/// Stands for every namespace.
pub(crate) const EVERYWHERE: &str = "*";

/// The name of a binding or a token: an RFC 1123 label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct AccessName(#[schemars(regex(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"))] String);

/// What one may do; each includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// Look at everything but secrets.
    Viewer,
    /// Change what belongs to namespaces.
    Operator,
    /// Everything.
    Admin,
}

/// Whom a binding is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Subject {
    /// A user, as an OIDC issuer names it, with the issuer's prefix.
    User(String),
    /// A group, as an OIDC issuer names it, with the issuer's prefix.
    Group(String),
    /// An API token.
    Token(AccessName),
    /// The bearer of a certificate with this name.
    Spiffe(#[schemars(with = "String")] SpiffeId),
}

/// Gives a role to subjects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RoleBinding {
    /// Of the binding.
    pub name: AccessName,
    /// Whom it is given to.
    pub subjects: Vec<Subject>,
    /// What is given.
    pub role: Role,
    /// Where an operator may change things; `["*"]`, the default, is everywhere.
    #[serde(default = "everywhere")]
    pub namespaces: Vec<String>,
    /// Which change of all bindings made it what it is. In a request: the one that it must have now.
    #[serde(default)]
    pub resource_version: u64,
}

/// A token that the control plane knows, by its secret's hash alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiToken {
    /// Of the secret.
    pub hash: TokenHash,
    /// When it was minted.
    pub created_at: Timestamp,
    /// From then on it is worthless.
    pub expires_at: Timestamp,
}

/// See [`super::Command::MintApiToken`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MintApiToken {
    /// Its name; bindings speak of it by that.
    pub name: AccessName,
    /// Of the secret.
    pub hash: TokenHash,
    /// From then on it is worthless.
    pub expires_at: Timestamp,
    /// When it was proposed.
    pub now: Timestamp,
}

/// All of it. Shared between views.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Counts the changes of bindings.
    version: u64,
    bindings: BTreeMap<AccessName, RoleBinding>,
    tokens: BTreeMap<AccessName, ApiToken>,
}

impl Access {
    /// The bindings, by name.
    pub fn bindings(&self) -> &BTreeMap<AccessName, RoleBinding> {
        &self.bindings
    }

    /// The tokens, by name; expired ones are kept a while.
    pub fn tokens(&self) -> &BTreeMap<AccessName, ApiToken> {
        &self.tokens
    }

    /// What a restore takes of a backup: who may do what, but no token, lest one that was deleted since comes back.
    pub(super) fn restored(&self, version: u64) -> Self {
        Self { version: self.version.max(version), bindings: self.bindings.clone(), tokens: BTreeMap::new() }
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }
}

impl State {
    /// Who may do what.
    pub fn access(&self) -> &Arc<Access> {
        &self.access
    }

    /// `expected`: the version that the binding must have now, 0 if there must be none; absent: whatever there is.
    pub(super) fn set_role_binding(
        &mut self,
        binding: &RoleBinding,
        expected: Option<u64>,
    ) -> Result<Change, Rejection> {
        check(binding)?;
        let held = self.access.bindings.get(&binding.name);
        expect(&binding.name, held, expected)?;
        let same = |held: &RoleBinding| {
            (&held.subjects, held.role, &held.namespaces) == (&binding.subjects, binding.role, &binding.namespaces)
        };
        if held.is_some_and(same) {
            return Ok(Change::default());
        }
        if held.is_none() {
            within("role bindings", self.access.bindings.len() + 1, MAX_BINDINGS)?;
        }
        let access = Arc::make_mut(&mut self.access);
        access.version += 1;
        let binding = RoleBinding { resource_version: access.version, ..binding.clone() };
        access.bindings.insert(binding.name.clone(), binding);
        Ok(Change::default())
    }

    pub(super) fn delete_role_binding(
        &mut self,
        name: &AccessName,
        expected: Option<u64>,
    ) -> Result<Change, Rejection> {
        let held = self.access.bindings.get(name);
        if held.is_none() {
            return Err(Rejection::UnknownRoleBinding { name: name.clone() });
        }
        expect(name, held, expected)?;
        let access = Arc::make_mut(&mut self.access);
        access.version += 1;
        access.bindings.remove(name);
        Ok(Change::default())
    }

    pub(super) fn mint_api_token(&mut self, mint: &MintApiToken) -> Result<Change, Rejection> {
        let now = self.clock.max(mint.now);
        if self.access.tokens.get(&mint.name).is_some_and(|held| held.expires_at > now) {
            return Err(Rejection::ApiTokenExists { name: mint.name.clone() });
        }
        let forgotten = |token: &ApiToken| token.expires_at.0.saturating_add(TOKEN_MEMORY_MS) <= now.0;
        let kept = self.access.tokens.values().filter(|token| !forgotten(token)).count();
        within("API tokens", kept + 1, MAX_API_TOKENS)?;
        self.clock = now;
        let access = Arc::make_mut(&mut self.access);
        access.tokens.retain(|_, token| !forgotten(token));
        let token = ApiToken { hash: mint.hash, created_at: now, expires_at: mint.expires_at };
        access.tokens.insert(mint.name.clone(), token);
        Ok(Change::default())
    }

    pub(super) fn delete_api_token(&mut self, name: &AccessName) -> Result<Change, Rejection> {
        if !self.access.tokens.contains_key(name) {
            return Err(Rejection::UnknownApiToken { name: name.clone() });
        }
        Arc::make_mut(&mut self.access).tokens.remove(name);
        Ok(Change::default())
    }
}

fn expect(name: &AccessName, held: Option<&RoleBinding>, expected: Option<u64>) -> Result<(), Rejection> {
    let found = held.map_or(0, |held| held.resource_version);
    match expected {
        Some(expected) if expected != found => Err(Rejection::StaleRoleBinding { name: name.clone(), expected, found }),
        _ => Ok(()),
    }
}

/// Says what is wrong with a binding, by field.
fn check(binding: &RoleBinding) -> Result<(), Rejection> {
    let wrong = |what: String| Err(Rejection::Malformed { what });
    within("subjects", binding.subjects.len(), MAX_SUBJECTS)?;
    within("namespaces", binding.namespaces.len(), MAX_NAMESPACES)?;
    if binding.subjects.is_empty() {
        return wrong("subjects: name at least one user, group, token or spiffe".to_owned());
    }
    for subject in &binding.subjects {
        if let Subject::User(name) | Subject::Group(name) = subject
            && !is_name(name)
        {
            return wrong(format!("subjects: a name has 1 to {MAX_NAME} bytes and no control characters"));
        }
    }
    if binding.namespaces.is_empty() {
        return wrong("namespaces: name at least one, or [\"*\"] for all".to_owned());
    }
    let all = binding.namespaces.iter().any(|namespace| namespace == EVERYWHERE);
    if all && binding.namespaces.len() > 1 {
        return wrong("namespaces: \"*\" stands for all and must be alone".to_owned());
    }
    if !all && binding.role != Role::Operator {
        return wrong("namespaces: only operators can be bound to namespaces; say [\"*\"]".to_owned());
    }
    if let Some(bad) = binding.namespaces.iter().find(|namespace| *namespace != EVERYWHERE && !is_label(namespace)) {
        return wrong(format!(
            "namespaces: {:?} is not the name of a namespace",
            bad.chars().take(64).collect::<String>()
        ));
    }
    Ok(())
}

fn everywhere() -> Vec<String> {
    vec![EVERYWHERE.to_owned()]
}

/// Of a user or a group.
pub(crate) fn is_name(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.len()) && !text.chars().any(char::is_control)
}

fn is_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&text.len()) && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

impl AccessName {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Not an RFC 1123 label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to 63 lower-case letters, digits and '-', and neither begins nor ends with '-'")]
pub struct NotALabel;

impl FromStr for AccessName {
    type Err = NotALabel;

    fn from_str(text: &str) -> Result<Self, NotALabel> {
        if is_label(text) { Ok(Self(text.to_owned())) } else { Err(NotALabel) }
    }
}

impl TryFrom<String> for AccessName {
    type Error = NotALabel;

    fn try_from(text: String) -> Result<Self, NotALabel> {
        text.parse()
    }
}

impl From<AccessName> for String {
    fn from(name: AccessName) -> Self {
        name.0
    }
}

impl fmt::Display for AccessName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding(role: Role, namespaces: &[&str]) -> RoleBinding {
        RoleBinding {
            name: "ops".parse().unwrap(),
            subjects: vec![Subject::User("alice".to_owned())],
            role,
            namespaces: namespaces.iter().map(|n| (*n).to_owned()).collect(),
            resource_version: 0,
        }
    }

    fn mint(name: &str, expires_at: u64, now: u64) -> MintApiToken {
        let (expires_at, now) = (Timestamp(expires_at), Timestamp(now));
        MintApiToken { name: name.parse().unwrap(), hash: TokenHash([1; 32]), expires_at, now }
    }

    #[test]
    fn a_binding_changes_only_for_who_saw_its_latest_version() {
        let mut state = State::default();
        state.set_role_binding(&binding(Role::Viewer, &["*"]), Some(0)).unwrap();
        let version = |state: &State| state.access().bindings()[&"ops".parse().unwrap()].resource_version;
        assert_eq!(version(&state), 1);
        let again = state.set_role_binding(&binding(Role::Admin, &["*"]), Some(0)).unwrap_err();
        assert!(matches!(again, Rejection::StaleRoleBinding { expected: 0, found: 1, .. }));
        state.set_role_binding(&binding(Role::Viewer, &["*"]), None).unwrap();
        assert_eq!(version(&state), 1, "the same is no change");
        state.set_role_binding(&binding(Role::Operator, &["shop"]), Some(1)).unwrap();
        let name = "ops".parse().unwrap();
        assert!(state.delete_role_binding(&name, Some(1)).is_err());
        state.delete_role_binding(&name, Some(2)).unwrap();
        state.set_role_binding(&binding(Role::Viewer, &["*"]), Some(0)).unwrap();
        assert_eq!(version(&state), 4, "a version never comes again");
        assert!(matches!(
            state.delete_role_binding(&"none".parse().unwrap(), None),
            Err(Rejection::UnknownRoleBinding { .. })
        ));
    }

    #[test]
    fn a_binding_that_makes_no_sense_is_refused_by_field() {
        let mut state = State::default();
        let no_subject = RoleBinding { subjects: vec![], ..binding(Role::Viewer, &["*"]) };
        let control =
            RoleBinding { subjects: vec![Subject::Group("a\nb".to_owned())], ..binding(Role::Viewer, &["*"]) };
        for (bad, field) in [
            (no_subject, "subjects"),
            (control, "subjects"),
            (binding(Role::Operator, &[]), "namespaces"),
            (binding(Role::Operator, &["*", "shop"]), "namespaces"),
            (binding(Role::Operator, &["Shop"]), "namespaces"),
            (binding(Role::Viewer, &["shop"]), "namespaces"),
            (binding(Role::Admin, &["shop"]), "namespaces"),
        ] {
            let refused = state.set_role_binding(&bad, None).unwrap_err().to_string();
            assert!(refused.starts_with(field), "{refused}");
        }
        assert_eq!(state, State::default());
    }

    #[test]
    fn a_tokens_name_is_free_again_when_it_has_expired() {
        let mut state = State::default();
        state.mint_api_token(&mint("ci", 100, 1)).unwrap();
        assert!(matches!(state.mint_api_token(&mint("ci", 200, 99)), Err(Rejection::ApiTokenExists { .. })));
        state.mint_api_token(&mint("ci", 200, 100)).unwrap();
        state.delete_api_token(&"ci".parse().unwrap()).unwrap();
        assert!(matches!(state.delete_api_token(&"ci".parse().unwrap()), Err(Rejection::UnknownApiToken { .. })));
        state.mint_api_token(&mint("old", 300, 200)).unwrap();
        state.mint_api_token(&mint("new", 10 + TOKEN_MEMORY_MS + 300, TOKEN_MEMORY_MS + 300)).unwrap();
        assert_eq!(state.access().tokens().len(), 1, "long expired ones are forgotten");
    }

    #[test]
    fn a_restore_takes_bindings_and_no_token() {
        let mut state = State::default();
        state.set_role_binding(&binding(Role::Viewer, &["*"]), None).unwrap();
        state.mint_api_token(&mint("ci", 100, 1)).unwrap();
        let restored = state.access().restored(7);
        assert_eq!((restored.bindings().len(), restored.tokens().len(), restored.version()), (1, 0, 7));
    }

    #[test]
    fn it_is_written_as_people_write_it() {
        let text = r#"{"name":"ops","subjects":[{"user":"alice"},{"group":"sre"},{"token":"ci"},
            {"spiffe":"spiffe://isthmus.example/admin/bob"}],"role":"operator","namespaces":["shop"]}"#;
        let read: RoleBinding = serde_json::from_str(text).unwrap();
        assert_eq!(read.subjects.len(), 4);
        assert!(serde_json::from_str::<RoleBinding>(r#"{"name":"Ops","subjects":[],"role":"admin"}"#).is_err());
        assert!(serde_json::from_str::<RoleBinding>(r#"{"name":"a","subjects":[],"role":"root"}"#).is_err());
    }
}
