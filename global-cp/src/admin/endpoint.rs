//! What a route is: how it is called, what it takes and gives, and who may. The router, the gate, the OpenAPI document and
//! the table of roles in the documentation are all made of the same list, so that none of them can forget a route.
//!
//! It holds no handler's logic and decides nothing.

use axum::{
    extract::DefaultBodyLimit,
    handler::Handler,
    http::Method,
    routing::{MethodFilter, MethodRouter, on},
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::{
    Admin,
    auth::{
        Rule,
        decide::{Need, Place, Resource, Verb, need},
    },
};
use crate::state::Role;

/// One method of one path.
pub(super) struct Endpoint {
    pub(super) method: Method,
    pub(super) rule: Rule,
    /// What it does, in a sentence.
    pub(super) summary: &'static str,
    pub(super) query: &'static [Parameter],
    pub(super) headers: &'static [Parameter],
    pub(super) body: Option<Shape>,
    pub(super) answer: Shape,
    /// Beside those that every route has.
    pub(super) errors: &'static [u16],
    pub(super) handler: MethodRouter<Admin>,
}

/// Something in the query or in the headers.
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) summary: &'static str,
}

/// The form of a body.
#[derive(Clone, Copy)]
pub(super) enum Shape {
    /// JSON, as its type says.
    Json(fn(&mut SchemaGenerator) -> Schema),
    /// A JSON object or array of the data model, told in words.
    Told(&'static str, &'static str),
    /// A file.
    File(&'static str),
}

impl Endpoint {
    /// A route that reads.
    pub(super) fn get<H, T>(path: &'static str, action: &'static str, resource: Resource, handler: H) -> Self
    where
        H: Handler<T, Admin>,
        T: 'static,
    {
        Self::new((Method::GET, MethodFilter::GET), (path, action), (Verb::Read, resource), handler)
    }

    /// A route that changes something.
    pub(super) fn post<H, T>(path: &'static str, action: &'static str, resource: Resource, handler: H) -> Self
    where
        H: Handler<T, Admin>,
        T: 'static,
    {
        Self::new((Method::POST, MethodFilter::POST), (path, action), (Verb::Change, resource), handler)
    }

    /// A route that replaces something.
    pub(super) fn put<H, T>(path: &'static str, action: &'static str, resource: Resource, handler: H) -> Self
    where
        H: Handler<T, Admin>,
        T: 'static,
    {
        Self::new((Method::PUT, MethodFilter::PUT), (path, action), (Verb::Change, resource), handler)
    }

    /// A route that removes something.
    pub(super) fn delete<H, T>(path: &'static str, action: &'static str, resource: Resource, handler: H) -> Self
    where
        H: Handler<T, Admin>,
        T: 'static,
    {
        Self::new((Method::DELETE, MethodFilter::DELETE), (path, action), (Verb::Change, resource), handler)
    }

    fn new<H, T>(
        (method, filter): (Method, MethodFilter),
        (path, action): (&'static str, &'static str),
        (verb, resource): (Verb, Resource),
        handler: H,
    ) -> Self
    where
        H: Handler<T, Admin>,
        T: 'static,
    {
        Self {
            method,
            rule: Rule { path, action, verb, resource },
            summary: "",
            query: &[],
            headers: &[],
            body: None,
            answer: Shape::Told("object", ""),
            errors: &[],
            handler: on(filter, handler),
        }
    }

    pub(super) fn summary(self, summary: &'static str) -> Self {
        Self { summary, ..self }
    }

    pub(super) fn query(self, query: &'static [Parameter]) -> Self {
        Self { query, ..self }
    }

    pub(super) fn headers(self, headers: &'static [Parameter]) -> Self {
        Self { headers, ..self }
    }

    pub(super) fn takes<B: JsonSchema>(self) -> Self {
        Self { body: Some(Shape::Json(|generator| generator.subschema_for::<B>())), ..self }
    }

    /// A file, of so many bytes at most.
    pub(super) fn takes_file(self, media: &'static str, most: usize) -> Self {
        let handler = self.handler.layer(DefaultBodyLimit::max(most));
        Self { body: Some(Shape::File(media)), handler, ..self }
    }

    /// A body of so many bytes at most.
    pub(super) fn at_most(self, most: usize) -> Self {
        let handler = self.handler.layer(DefaultBodyLimit::max(most));
        Self { handler, ..self }
    }

    pub(super) fn gives<B: JsonSchema>(self) -> Self {
        Self { answer: Shape::Json(|generator| generator.subschema_for::<B>()), ..self }
    }

    /// `kind` is "object" or "array".
    pub(super) fn gives_told(self, kind: &'static str, words: &'static str) -> Self {
        Self { answer: Shape::Told(kind, words), ..self }
    }

    pub(super) fn gives_file(self, media: &'static str) -> Self {
        Self { answer: Shape::File(media), ..self }
    }

    pub(super) fn errors(self, errors: &'static [u16]) -> Self {
        Self { errors, ..self }
    }

    /// The role that it needs, as documents name it.
    pub(super) fn role(&self) -> &'static str {
        let namespaced = self.rule.path.split('/').any(|segment| segment == "{namespace}");
        let place = if namespaced { Place::Namespace("") } else { Place::Federation };
        match need(self.rule.verb, self.rule.resource, place) {
            Need::Nothing => "any",
            Need::Role(Role::Viewer) => "viewer",
            Need::Role(Role::Operator) if namespaced => "operator of the namespace",
            Need::Role(Role::Operator) => "operator",
            Need::Role(Role::Admin) => "admin",
        }
    }
}
