//! The gate of the admin API: who is calling, may they, and not too often. Every request passes it, and no handler is
//! reached by another way.
//!
//! In: a request, the connection's certificate, the replicated bindings and tokens. Out: the handler's answer with a
//! [`Caller`] in the request, or a refusal. Holds: a route without a rule is reached by nobody; what is refused is in this
//! node's journal, one by one or counted; a change is decided by tokens and bindings as they are when it is asked for,
//! whichever node changed them. It never looks into bodies.

pub(crate) mod decide;
pub(crate) mod journal;
mod jwks;
mod oidc;
pub(crate) mod principal;
mod sampler;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use axum::{
    extract::{ConnectInfo, FromRequestParts, MatchedPath, Request, State},
    http::{Method, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use isthmus_identity::grpc::PeerInfo;
use isthmus_model::{ids::Stamp, time::Timestamp};
use isthmus_runtime::health::Registry;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
};
use tokio::sync::watch;

pub use self::jwks::OidcError;
pub(crate) use self::oidc::Issuers;
use self::{
    decide::{Held, Place, Resource, Verb, may, roles},
    journal::{Entry, Journal},
    principal::{Principal, Shown, Stranger, owner, shown},
};
use super::error::{ApiError, Failure};
use crate::{
    limits::{Buckets, Rate},
    raft::Group,
    state::{Actor, View},
};

/// Callers whose rate is remembered.
const MAX_CALLERS: usize = 4096;

/// What a route is, as far as the gate must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// The route's template.
    pub(super) path: &'static str,
    /// As in events: `revoke`.
    pub(super) action: &'static str,
    pub(super) verb: Verb,
    pub(super) resource: Resource,
}

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Gate {
    inner: Arc<Inner>,
}

struct Inner {
    rules: BTreeMap<(String, &'static str), Rule>,
    issuers: Issuers,
    journal: Journal,
    group: Group,
    views: watch::Receiver<View>,
    callers: Buckets<String>,
    strangers: Buckets<IpAddr>,
    requests: Family<OutcomeLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Who was let in, for handlers.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) principal: Arc<Principal>,
    pub(super) roles: Arc<Vec<Held>>,
    from: SocketAddr,
}

/// A request, for the journal.
struct Attempt {
    rule: Option<Rule>,
    subject: String,
    from: SocketAddr,
    before: Stamp,
}

impl Gate {
    pub(super) fn new(
        rules: impl IntoIterator<Item = (Method, Rule)>,
        (issuers, journal): (Issuers, Journal),
        group: Group,
        rate: Rate,
    ) -> Self {
        let rules = rules.into_iter().map(|(method, rule)| ((method.to_string(), rule.path), rule)).collect();
        let views = group.views();
        let (callers, strangers) = (Buckets::new(rate, MAX_CALLERS), Buckets::new(rate, MAX_CALLERS));
        let requests = Family::default();
        Self { inner: Arc::new(Inner { rules, issuers, journal, group, views, callers, strangers, requests }) }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.sub_registry_with_prefix("isthmus_cp").register(
            "admin_requests",
            "Requests to the admin API, by what the gate made of them",
            self.inner.requests.clone(),
        );
    }
}

/// The layer around all routes.
pub(super) async fn pass(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let gate = gate.inner;
    let Some(ConnectInfo(peer)) = request.extensions().get::<ConnectInfo<PeerInfo>>().cloned() else {
        return ApiError::internal().into_response();
    };
    let attempt = gate.attempt(&request, &peer);
    let shown = match shown(request.headers(), peer.id.as_ref()) {
        Ok(shown) => shown,
        Err(stranger) => return gate.unauthenticated(&attempt, &stranger),
    };
    let principal = match gate.identify(&shown) {
        Ok(principal) => principal,
        Err(stranger) => return gate.unauthenticated(&attempt, &stranger),
    };
    // The last resort must work while something else uses it too often; and no binding or token makes it what it is.
    let bound = !principal.is_root();
    if bound && let Err(wait) = gate.callers.take(&principal.who(), Instant::now()) {
        return gate.refuse(&attempt, Some(&principal), "throttled", ApiError::throttled(wait));
    }
    // Without a rule there is no route: what answers is the fallback, or nobody.
    if bound && attempt.rule.is_some_and(|rule| rule.verb == Verb::Change) {
        // A token or a binding that was taken back, by whichever node, must not change anything any more.
        if let Err(error) = gate.group.barrier().await {
            return gate.refuse(&attempt, Some(&principal), "no_leader", error.into());
        }
        if let Err(stranger) = gate.identify(&shown) {
            return gate.unauthenticated(&attempt, &stranger);
        }
    }
    let access = gate.views.borrow().state().access().clone();
    let held = roles(&principal, access.bindings().values());
    let caller = Caller { principal: Arc::new(principal), roles: Arc::new(held), from: peer.remote };
    if let Some(rule) = attempt.rule
        && let Err(error) = caller.check((rule.verb, rule.resource), place(rule.path, request.uri().path()))
    {
        return gate.refuse(&attempt, Some(&caller.principal), "denied", error);
    }
    gate.count("allowed");
    request.extensions_mut().insert(caller.clone());
    let response = next.run(request).await;
    gate.settle(&attempt, &caller, &response);
    response
}

impl Inner {
    fn attempt(&self, request: &Request, peer: &PeerInfo) -> Attempt {
        // What reads with GET reads with HEAD.
        let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
        let template = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        let rule = template.and_then(|template| {
            let found = self.rules.iter().find(|((m, path), _)| m == method.as_str() && *path == template);
            found.map(|(_, rule)| *rule)
        });
        let subject = rule.map(|rule| subject(rule.path, request.uri().path())).unwrap_or_default();
        Attempt { rule, subject, from: peer.remote, before: self.stamp() }
    }

    fn identify(&self, shown: &Shown<'_>) -> Result<Principal, Stranger> {
        match shown {
            Shown::Nothing => Err(Stranger::Nothing),
            Shown::Certificate(id) => Ok(Principal::Spiffe { id: (*id).clone() }),
            Shown::ApiToken { name, secret } => {
                let access = self.views.borrow().state().access().clone();
                owner(&access, name, secret, Timestamp(isthmus_runtime::now()))
            }
            Shown::Foreign(token) => Ok(self.issuers.verify(token)?),
        }
    }

    /// A stranger's flood costs it its own rate, and nobody else's: who is known has another one.
    fn unauthenticated(&self, attempt: &Attempt, stranger: &Stranger) -> Response {
        let error = match self.strangers.take(&source_of(attempt.from.ip()), Instant::now()) {
            Ok(()) => ApiError::unauthenticated(stranger.code(), stranger.to_string(), *stranger == Stranger::Nothing),
            Err(wait) => ApiError::throttled(wait),
        };
        self.refuse(attempt, None, "unauthenticated", error)
    }

    fn refuse(&self, attempt: &Attempt, who: Option<&Principal>, outcome: &'static str, error: ApiError) -> Response {
        self.count(outcome);
        let response = error.into_response();
        let failure = response.extensions().get::<Failure>().cloned().unwrap_or_default();
        let who = who.map(Principal::who).unwrap_or_default();
        tracing::warn!(
            %who, from = %attempt.from, action = attempt.action(), subject = %attempt.subject.escape_debug(),
            code = failure.code, "a request to the admin API was refused"
        );
        self.journal.sample(outcome, self.entry(attempt, who, failure.code, failure.message));
        response
    }

    /// What a handler has done, if it is not in the replicated events, and worth being written down.
    fn settle(&self, attempt: &Attempt, caller: &Caller, response: &Response) {
        let Some(rule) = attempt.rule else { return };
        let who = caller.principal.who();
        match (rule.verb, response.extensions().get::<Failure>()) {
            // Secrets that were taken away leave no other trace.
            (Verb::Read, None) if rule.resource == Resource::Backup => {
                self.journal.record(self.entry(attempt, who, "allowed", String::new()));
            }
            // What reached the log is there, also if it was refused by the state.
            (Verb::Change, Some(failure)) if !failure.committed => {
                self.journal.sample("failed", self.entry(attempt, who, failure.code, failure.message.clone()));
            }
            _ => {}
        }
    }

    fn entry(&self, attempt: &Attempt, who: String, outcome: &str, reason: String) -> Entry {
        Entry {
            at: Timestamp(isthmus_runtime::now()),
            who,
            from: attempt.from.to_string(),
            action: attempt.action().to_owned(),
            subject: attempt.subject.clone(),
            outcome: outcome.to_owned(),
            reason,
            count: 1,
            before: attempt.before,
            after: self.stamp(),
        }
    }

    fn count(&self, outcome: &'static str) {
        self.requests.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    fn stamp(&self) -> Stamp {
        self.views.borrow().state().stamp()
    }
}

impl Attempt {
    fn action(&self) -> &'static str {
        self.rule.map_or("unknown-route", |rule| rule.action)
    }
}

impl Caller {
    /// For routes whose bodies say what is changed: the gate has asked for the route, the handler asks for each part.
    pub(super) fn check(&self, act: (Verb, Resource), place: Place<'_>) -> Result<(), ApiError> {
        may(&self.principal, &self.roles, act, place).map_err(|denied| ApiError::denied(denied.to_string()))
    }

    /// As commands name it.
    pub(super) fn actor(&self) -> Actor {
        Actor { who: self.principal.who(), from: self.from.to_string() }
    }

    /// For logs.
    pub(super) fn who(&self) -> String {
        self.principal.who()
    }
}

/// Only the gate makes one; without it there is no answer.
impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}

/// The namespace that a path names, if its template has one.
fn place<'a>(template: &str, path: &'a str) -> Place<'a> {
    segment(template, path, |name| name == "{namespace}").map_or(Place::Federation, Place::Namespace)
}

/// What a path is about: what its template leaves open.
fn subject(template: &str, path: &str) -> String {
    let open: Vec<&str> = template
        .split('/')
        .zip(path.split('/'))
        .filter(|(name, _)| name.starts_with('{'))
        .map(|(_, text)| text)
        .collect();
    open.join("/")
}

fn segment<'a>(template: &str, path: &'a str, wanted: impl Fn(&str) -> bool) -> Option<&'a str> {
    template.split('/').zip(path.split('/')).find(|(name, _)| wanted(name)).map(|(_, text)| text)
}

/// Whom an address stands for: of IPv6 the /64, which is what one host can have.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paths_template_says_what_it_is_about_and_where() {
        assert_eq!(subject("/v1/clusters/{name}/revoke", "/v1/clusters/us-east/revoke"), "us-east");
        assert_eq!(subject("/v1/diff/{from}/{to}", "/v1/diff/40/42"), "40/42");
        assert_eq!(subject("/v1/status", "/v1/status"), "");
        assert_eq!(place("/v1/status", "/v1/status"), Place::Federation);
        assert_eq!(place("/v1/x/{namespace}/{name}", "/v1/x/shop/cart"), Place::Namespace("shop"));
    }

    #[test]
    fn a_host_is_one_source() {
        let source = |text: &str| source_of(text.parse().unwrap());
        assert_eq!(source("2001:db8::1"), source("2001:db8::ffff"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
        assert_eq!(source("::ffff:192.0.2.1"), source("192.0.2.1"));
    }
}
