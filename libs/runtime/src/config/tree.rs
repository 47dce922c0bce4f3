//! A configuration as a tree whose every node knows where it was written.
//!
//! YAML goes in; environment variables change it ([`super::overlay`]); typed values come out ([`super::de`]). The detour
//! over a tree, rather than from YAML straight to the type, is what lets both sources mix and every error still name its
//! place. Values from variables stay text until the type asks: `1` may be a number or a name.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{Location, Spanned};

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// In the file; both count from 1.
    File { line: u64, column: u64 },
    /// In the environment variable of that name.
    Env(String),
}

/// A value and its place.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) value: Value,
}

/// The key of a map entry and its place.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) text: String,
    pub(super) origin: Origin,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    String(String),
    /// From a variable: typed when it is asked for.
    Text(String),
    Seq(Vec<Node>),
    Map(Vec<(Key, Node)>),
    /// An item of a list that is passed over, so that the others keep their places.
    Taken,
}

/// The tree of a YAML document; an empty one is an empty map.
pub(super) fn parse(text: &str) -> Result<Node, serde_saphyr::Error> {
    // YAML 1.2 booleans only: `no` and `on` are words here.
    let options = serde_saphyr::options! { strict_booleans: true };
    if text.lines().all(|line| line.trim_start().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(Node { origin: Origin::File { line: 1, column: 1 }, value: Value::Map(Vec::new()) });
    }
    serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options).map(Node::from)
}

/// The parser's message on one line and without its picture of the source, which our own place replaces.
pub(super) fn message_of(error: &serde_saphyr::Error) -> String {
    if matches!(error.without_snippet(), serde_saphyr::Error::MultipleDocuments { .. }) {
        return "a second document begins here; a configuration is one".to_owned();
    }
    let text = error.without_snippet().to_string();
    let location = error.location();
    let place = location.map(|at| format!(" at line {}, column {}", at.line(), at.column()));
    let text = place.map_or_else(|| text.clone(), |place| text.replace(&place, ""));
    // Advice for programs that call the parser.
    text.split_once("DuplicateKeyPolicy")
        .and_then(|(before, _)| before.rsplit_once([',', ';', '.', '(']))
        .map_or_else(|| text.clone(), |(before, _)| format!("{}; keep one of them", before.trim_end()))
}

/// The keys and indexes of a path such as `inbound[0].port`.
pub(super) fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split(['.', '[']).map(|segment| segment.trim_end_matches(']')).filter(|segment| !segment.is_empty())
}

impl Node {
    /// The node at a path such as `listen.grpc` or `inbound[0].port`, or the nearest of its ancestors that is set.
    pub(super) fn find(&self, path: &str) -> Option<&Node> {
        let mut node = self;
        let mut found = None;
        for segment in segments(path) {
            let child = match &node.value {
                Value::Map(entries) => entries.iter().find(|(key, _)| key.text == segment).map(|(_, value)| value),
                Value::Seq(items) => segment.parse().ok().and_then(|index: usize| items.get(index)),
                _ => None,
            };
            match child {
                Some(child) => (node, found) = (child, Some(child)),
                None => break,
            }
        }
        found
    }

    /// Takes out what is at `path`, or the innermost part that holds it; tells how many of the segments lead there.
    pub(super) fn take(&mut self, path: &[&str]) -> Option<usize> {
        let (segment, below) = path.split_first()?;
        match &mut self.value {
            Value::Map(entries) => {
                let at = entries.iter().position(|(key, _)| key.text == *segment)?;
                let deeper = entries.get_mut(at)?.1.take(below);
                if deeper.is_none() {
                    entries.remove(at);
                }
                Some(1 + deeper.unwrap_or_default())
            }
            Value::Seq(items) => {
                let item = segment.parse().ok().and_then(|index: usize| items.get_mut(index))?;
                let deeper = item.take(below);
                if deeper.is_none() {
                    item.value = Value::Taken;
                }
                Some(1 + deeper.unwrap_or_default())
            }
            _ => None,
        }
    }

    /// Makes `origin` the place of the whole subtree.
    pub(super) fn moved_to(&mut self, origin: &Origin) {
        self.origin = origin.clone();
        match &mut self.value {
            Value::Seq(items) => items.iter_mut().for_each(|item| item.moved_to(origin)),
            Value::Map(entries) => {
                for (key, value) in entries {
                    key.origin = origin.clone();
                    value.moved_to(origin);
                }
            }
            _ => {}
        }
    }
}

/// A value as the YAML parser hands it over, with spans on everything below.
enum Raw {
    Scalar(Value),
    Seq(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
}

impl From<Spanned<Raw>> for Node {
    fn from(raw: Spanned<Raw>) -> Self {
        let value = match raw.value {
            Raw::Scalar(value) => value,
            Raw::Seq(items) => Value::Seq(items.into_iter().map(Node::from).collect()),
            Raw::Map(entries) => {
                let entry = |(key, value): (Spanned<String>, Spanned<Raw>)| {
                    (Key { text: key.value, origin: file_origin(key.referenced) }, Node::from(value))
                };
                Value::Map(entries.into_iter().map(entry).collect())
            }
        };
        Node { origin: file_origin(raw.referenced), value }
    }
}

fn file_origin(location: Location) -> Origin {
    Origin::File { line: location.line(), column: location.column() }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Bool(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Unsigned(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Scalar(u64::try_from(value).map_or(Value::Signed(value), Value::Unsigned)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Scalar(Value::String(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Raw, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Raw::Seq(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Raw::Map(entries))
    }
}
