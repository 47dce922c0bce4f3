//! Who may do what: one pure decision, [`may`], which every route goes through.
//!
//! In: the caller, the roles that bindings give it, and what it wants to do to what. Out: yes, or a [`Denied`] that says
//! which role is missing. Holds: what nothing allows is denied; the control plane's own administrator may do everything,
//! whatever the bindings say. It reads no state and knows no routes.

use std::fmt;

use super::principal::Principal;
use crate::state::{Role, RoleBinding, access::EVERYWHERE};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Read,
    Change,
}

/// What it is done to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    /// What everyone who is known may see: who one is, and what the API can do.
    Api,
    /// Status, snapshot, services, availability.
    Federation,
    /// Events, audit log, differences between revisions.
    History,
    /// Clusters: admission and revocation.
    Clusters,
    /// The control plane's own nodes.
    Nodes,
    /// The whole state as a file.
    Backup,
    /// Federation-wide settings, earlier ones included.
    Settings,
    /// Role bindings.
    RoleBindings,
    /// API tokens.
    ApiTokens,
}

/// Where it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place<'a> {
    /// It belongs to no namespace.
    Federation,
    /// In this one.
    Namespace(&'a str),
}

/// The least that is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// To be known.
    Nothing,
    /// A role, everywhere (of viewers: anywhere).
    Role(Role),
}

/// What one binding gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) role: Role,
    pub(crate) namespaces: Vec<String>,
}

/// No, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{who} may not do this: {need}; {who} {has}. An administrator can grant it: isthmusctl role-binding set NAME {example}"
)]
pub(crate) struct Denied {
    who: String,
    need: String,
    has: String,
    example: String,
}

/// May `principal`, to whom bindings give `roles`, do `verb` to `resource` at `place`?
pub(crate) fn may(
    principal: &Principal,
    roles: &[Held],
    (verb, resource): (Verb, Resource),
    place: Place<'_>,
) -> Result<(), Denied> {
    let Need::Role(need) = need(verb, resource, place) else { return Ok(()) };
    if principal.is_root() || roles.iter().any(|held| held.suffices(need, verb, place)) {
        return Ok(());
    }
    Err(denied(principal, roles, need, place))
}

/// The table. What belongs to a namespace is for operators to change; all the rest is for administrators.
pub(crate) fn need(verb: Verb, resource: Resource, place: Place<'_>) -> Need {
    match (verb, resource, place) {
        (Verb::Read, Resource::Api, _) => Need::Nothing,
        (Verb::Read, Resource::Backup, _) => Need::Role(Role::Admin),
        (Verb::Read, ..) => Need::Role(Role::Viewer),
        // Who may do what, who is in, and the whole of the state are nobody's but an administrator's, wherever it is.
        (
            Verb::Change,
            Resource::Api
            | Resource::Clusters
            | Resource::Nodes
            | Resource::Backup
            | Resource::Settings
            | Resource::RoleBindings
            | Resource::ApiTokens
            | Resource::History,
            _,
        ) => Need::Role(Role::Admin),
        (Verb::Change, Resource::Federation, Place::Namespace(_) | Place::Federation) => Need::Role(Role::Operator),
    }
}

/// The roles that `bindings` give to `principal`.
pub(crate) fn roles<'a>(principal: &Principal, bindings: impl IntoIterator<Item = &'a RoleBinding>) -> Vec<Held> {
    let mine = bindings.into_iter().filter(|binding| binding.subjects.iter().any(|subject| principal.is(subject)));
    mine.map(|binding| Held { role: binding.role, namespaces: binding.namespaces.clone() }).collect()
}

impl Held {
    fn suffices(&self, need: Role, verb: Verb, place: Place<'_>) -> bool {
        self.role >= need && (verb == Verb::Read || self.holds_in(place))
    }

    fn holds_in(&self, place: Place<'_>) -> bool {
        self.namespaces.iter().any(|namespace| match place {
            Place::Federation => namespace == EVERYWHERE,
            Place::Namespace(wanted) => namespace == EVERYWHERE || namespace == wanted,
        })
    }
}

fn denied(principal: &Principal, roles: &[Held], need: Role, place: Place<'_>) -> Denied {
    let (within, option) = match place {
        Place::Namespace(name) => (format!(" in namespace {name}"), format!(" --namespace {name}")),
        Place::Federation if need == Role::Operator => (" in all namespaces".to_owned(), String::new()),
        Place::Federation => (String::new(), String::new()),
    };
    let has = match roles {
        [] => "has no role".to_owned(),
        roles => format!("is {}", roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    };
    Denied {
        who: principal.to_string(),
        need: format!("it needs the role {need}{within}"),
        has,
        example: format!("--role {need} {}{option}", principal.as_option()),
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.role)?;
        if self.namespaces.iter().any(|namespace| namespace == EVERYWHERE) {
            return Ok(());
        }
        // A person reads it: a few names tell enough.
        let shown: Vec<&str> = self.namespaces.iter().take(3).map(String::as_str).collect();
        let more = if self.namespaces.len() > shown.len() { ", …" } else { "" };
        write!(f, " in {}{more}", shown.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::Subject;

    const ALL: [Resource; 9] = [
        Resource::Api,
        Resource::Federation,
        Resource::History,
        Resource::Clusters,
        Resource::Nodes,
        Resource::Backup,
        Resource::Settings,
        Resource::RoleBindings,
        Resource::ApiTokens,
    ];

    fn alice() -> Principal {
        Principal::User { name: "alice".to_owned(), groups: vec!["sre".to_owned()] }
    }

    fn held(role: Role, namespaces: &[&str]) -> Held {
        Held { role, namespaces: namespaces.iter().map(|n| (*n).to_owned()).collect() }
    }

    #[test]
    fn an_operator_changes_its_namespaces_and_nothing_else() {
        let roles = [held(Role::Operator, &["shop", "pay"])];
        let change = |resource, place| may(&alice(), &roles, (Verb::Change, resource), place).is_ok();
        assert!(change(Resource::Federation, Place::Namespace("shop")));
        assert!(change(Resource::Federation, Place::Namespace("pay")));
        assert!(!change(Resource::Federation, Place::Namespace("ledger")));
        assert!(!change(Resource::Federation, Place::Federation));
        assert!(!change(Resource::Clusters, Place::Namespace("shop")));
        let everywhere = [held(Role::Operator, &["*"])];
        let change = |resource, place| may(&alice(), &everywhere, (Verb::Change, resource), place).is_ok();
        assert!(change(Resource::Federation, Place::Federation) && change(Resource::Federation, Place::Namespace("x")));
        assert!(ALL.iter().filter(|r| **r != Resource::Federation).all(|r| !change(*r, Place::Federation)));
    }

    #[test]
    fn bindings_speak_of_users_groups_tokens_and_certificates_and_of_nobody_else() {
        let binding = |subject| RoleBinding {
            name: "b".parse().unwrap(),
            subjects: vec![subject],
            role: Role::Viewer,
            namespaces: vec!["*".to_owned()],
            resource_version: 1,
        };
        let token = Principal::Token { name: "ci".parse().unwrap() };
        let bob: Principal = Principal::Spiffe { id: "spiffe://isthmus.example/admin/bob".parse().unwrap() };
        let bindings = [
            binding(Subject::User("alice".to_owned())),
            binding(Subject::Group("sre".to_owned())),
            binding(Subject::Token("ci".parse().unwrap())),
            binding(Subject::Spiffe("spiffe://isthmus.example/admin/bob".parse().unwrap())),
            // Names of one kind are not those of another.
            binding(Subject::User("ci".to_owned())),
            binding(Subject::Group("alice".to_owned())),
        ];
        assert_eq!(roles(&alice(), &bindings).len(), 2);
        assert_eq!(roles(&token, &bindings).len(), 1);
        assert_eq!(roles(&bob, &bindings).len(), 1);
        let stranger = Principal::User { name: "mallory".to_owned(), groups: vec![] };
        assert_eq!(roles(&stranger, &bindings), []);
    }

    #[test]
    fn a_denial_says_what_is_missing_and_how_to_get_it() {
        let roles = [held(Role::Operator, &["shop"])];
        let text =
            may(&alice(), &roles, (Verb::Change, Resource::Clusters), Place::Federation).unwrap_err().to_string();
        assert_eq!(
            text,
            "user alice may not do this: it needs the role admin; user alice is operator in shop. An administrator can \
             grant it: isthmusctl role-binding set NAME --role admin --user alice"
        );
    }

    proptest! {
        #[test]
        fn without_a_role_nothing_is_allowed_and_a_higher_one_allows_no_less(
            resource in proptest::sample::select(ALL.to_vec()),
            change: bool,
            namespace in proptest::option::of("[a-z]{1,3}"),
            own in "[a-z]{1,3}",
        ) {
            let act = (if change { Verb::Change } else { Verb::Read }, resource);
            let place = namespace.as_deref().map_or(Place::Federation, Place::Namespace);
            let allowed = |roles: &[Held]| may(&alice(), roles, act, place).is_ok();
            prop_assert_eq!(allowed(&[]), act == (Verb::Read, Resource::Api));
            let ladder = [
                allowed(&[held(Role::Viewer, &["*"])]),
                allowed(&[held(Role::Operator, &[&own])]),
                allowed(&[held(Role::Operator, &["*"])]),
                allowed(&[held(Role::Admin, &["*"])]),
            ];
            prop_assert!(ladder.is_sorted());
            prop_assert!(ladder[3]);
            prop_assert!(!change || !ladder[0], "a viewer changes nothing");
        }
    }
}
