//! YAML text → trees that know the line of each node. Splits a file into documents first, so that a syntax error ends
//! with its document.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;
use serde_saphyr::{MessageFormatter, Options, Spanned, UserMessageFormatter};

/// One document's text and where it begins in the file.
pub(super) struct Document {
    /// From 1.
    pub(super) first_line: u64,
    text: String,
}

/// Splits at lines that begin with `---`. In YAML that is a document's end wherever it stands, in block and quoted
/// scalars too (YAML 1.2.2, `c-forbidden`), so no parser is needed for it.
pub(super) fn split(text: &str) -> impl Iterator<Item = Document> {
    let mut lines = text.strip_prefix('\u{feff}').unwrap_or(text).split_inclusive('\n').zip(1u64..).peekable();
    std::iter::from_fn(move || {
        let (first, first_line) = lines.next()?;
        // What follows the marker on its line belongs to the document; spaces keep its columns.
        let mut text = match is_marker(first) {
            true => format!("   {}", first.get(3..).unwrap_or_default()),
            false => first.to_owned(),
        };
        while let Some((line, _)) = lines.next_if(|(line, _)| !is_marker(line)) {
            text.push_str(line);
        }
        Some(Document { first_line, text })
    })
}

fn is_marker(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// A value and the line that it stands on.
#[derive(Debug)]
pub(super) struct Node {
    line: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Null, boolean, number or text.
    Scalar(Value),
    Items(Vec<Node>),
    /// Keys with their lines; unique.
    Fields(Vec<(String, u64, Node)>),
}

impl Node {
    /// `None` for a document without content. Errors come with the line in the file.
    pub(super) fn parse(document: &Document) -> Result<Option<Self>, (u64, String)> {
        // An unexpected end is found behind the last line, which is another document's.
        let lines = document.text.lines().count() as u64;
        let line_in_file = |line: u64| document.first_line + line.clamp(1, lines.max(1)) - 1;
        let has_content = |line: &str| !matches!(line.trim_start().bytes().next(), None | Some(b'#' | b'%'));
        if !document.text.lines().any(has_content) {
            return Ok(None);
        }
        match serde_saphyr::from_str_with_options::<Self>(&document.text, options()) {
            Ok(Self { kind: Kind::Scalar(Value::Null), .. }) => Ok(None),
            Ok(mut node) => {
                node.shift_lines(document.first_line.saturating_sub(1));
                Ok(Some(node))
            }
            Err(e) => {
                let line = line_in_file(e.location().map_or(1, |l| l.line()));
                Err((line, format!("is not valid YAML: {}", one_line(&e))))
            }
        }
    }

    /// The field `key` of a mapping.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        self.field(key).map(|(_, node)| node)
    }

    /// The items of a sequence.
    pub(super) fn items(&self) -> Option<&[Self]> {
        if let Kind::Items(items) = &self.kind { Some(items) } else { None }
    }

    /// The text of a scalar.
    pub(super) fn text(&self) -> Option<&str> {
        if let Kind::Scalar(Value::String(s)) = &self.kind { Some(s) } else { None }
    }

    /// The line of what `path` leads to, or of the nearest thing above that exists.
    pub(super) fn line_of(&self, path: &Path) -> u64 {
        let (mut node, mut line) = (self, self.line);
        for step in &path.0 {
            let next = match step {
                Step::Field(key) => node.field(key),
                Step::Item(i) => node.items().and_then(|items| items.get(*i)).map(|item| (item.line, item)),
            };
            let Some((its_line, child)) = next else { break };
            (node, line) = (child, its_line);
        }
        line
    }

    pub(super) fn to_json(&self) -> Value {
        match &self.kind {
            Kind::Scalar(value) => value.clone(),
            Kind::Items(items) => items.iter().map(Self::to_json).collect(),
            Kind::Fields(fields) => Value::Object(fields.iter().map(|(k, _, v)| (k.clone(), v.to_json())).collect()),
        }
    }

    fn field(&self, key: &str) -> Option<(u64, &Self)> {
        let Kind::Fields(fields) = &self.kind else { return None };
        fields.iter().find(|(k, ..)| k == key).map(|(_, line, node)| (*line, node))
    }

    fn shift_lines(&mut self, by: u64) {
        self.line += by;
        match &mut self.kind {
            Kind::Scalar(_) => {}
            Kind::Items(items) => items.iter_mut().for_each(|item| item.shift_lines(by)),
            Kind::Fields(fields) => {
                for (_, line, node) in fields {
                    *line += by;
                    node.shift_lines(by);
                }
            }
        }
    }
}

/// Tight enough that neither nesting nor aliases make a document grow far beyond its text.
fn options() -> Options {
    let mut options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 32,
            max_anchors: 256,
            max_aliases: 1_000,
            max_merge_keys: 1_000,
            max_recorded_anchor_events: 100_000,
            max_documents: 2,
        },
        with_snippet: false,
    };
    options.alias_limits.max_total_replayed_events = 5_000;
    options.alias_limits.max_replay_stack_depth = 16;
    options
}

/// The parser's words for users, without the place: it is said in the file's terms elsewhere.
fn one_line(error: &serde_saphyr::Error) -> String {
    let text = UserMessageFormatter.format_message(error.without_snippet()).into_owned();
    text.lines().next().unwrap_or_default().chars().take(512).collect()
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Kind>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), kind: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON can express")
    }

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Kind, E> {
        Ok(Kind::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Kind, E> {
        Ok(Kind::Scalar(v.into()))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Kind, E> {
        Ok(Kind::Scalar(v.into()))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Kind, E> {
        Ok(Kind::Scalar(v.into()))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Kind, E> {
        Ok(Kind::Scalar(v.into()))
    }

    fn visit_str<E>(self, v: &str) -> Result<Kind, E> {
        Ok(Kind::Scalar(v.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Kind, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Kind::Items(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kind, A::Error> {
        let mut fields = Vec::new();
        while let Some((key, node)) = map.next_entry::<Spanned<String>, Node>()? {
            fields.push((key.value, key.referenced.line(), node));
        }
        Ok(Kind::Fields(fields))
    }
}

/// Where something lies in a document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Path(Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    Item(usize),
}

impl Path {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn field(mut self, name: &str) -> Self {
        self.0.push(Step::Field(name.to_owned()));
        self
    }

    pub(super) fn item(mut self, index: usize) -> Self {
        self.0.push(Step::Item(index));
        self
    }

    pub(super) fn joined(mut self, rest: &Self) -> Self {
        self.0.extend(rest.0.iter().cloned());
        self
    }
}

impl<const N: usize> From<[&str; N]> for Path {
    fn from(fields: [&str; N]) -> Self {
        Self(fields.iter().map(|f| Step::Field((*f).to_owned())).collect())
    }
}

impl From<&serde_path_to_error::Path> for Path {
    fn from(path: &serde_path_to_error::Path) -> Self {
        use serde_path_to_error::Segment;
        let step = |segment: &Segment| match segment {
            Segment::Seq { index } => Some(Step::Item(*index)),
            Segment::Map { key } => Some(Step::Field(key.clone())),
            Segment::Enum { .. } | Segment::Unknown => None,
        };
        Self(path.iter().filter_map(step).collect())
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.0.iter().enumerate() {
            let dot = if i == 0 { "" } else { "." };
            match step {
                Step::Item(index) => write!(f, "[{index}]")?,
                Step::Field(name) if is_plain(name) => write!(f, "{dot}{name}")?,
                Step::Field(name) => write!(f, "[{name:.128?}]")?,
            }
        }
        Ok(())
    }
}

/// Reads well between dots.
fn is_plain(name: &str) -> bool {
    matches!(name.len(), 1..=64) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// Fields of `given` that `known`, the same object written back, lacks: a handful at most. Nulls and empty collections
/// say nothing, so they may be lost on the way.
pub(super) fn unknown_fields(given: &Value, known: &Value) -> Vec<Path> {
    let mut found = Vec::new();
    compare(given, known, &Path::default(), &mut found);
    found
}

fn compare(given: &Value, known: &Value, at: &Path, found: &mut Vec<Path>) {
    /// Enough to see what is wrong.
    const MAX_FOUND: usize = 8;

    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given.iter().filter(|(key, _)| !at.is_empty() || !is_type_meta(key)) {
                match known.get(key) {
                    _ if found.len() >= MAX_FOUND => return,
                    Some(known) => compare(value, known, &at.clone().field(key), found),
                    None if is_void(value) => {}
                    None => found.push(at.clone().field(key)),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (i, (given, known)) in given.iter().zip(known).enumerate() {
                compare(given, known, &at.clone().item(i), found);
            }
        }
        _ => {}
    }
}

fn is_type_meta(key: &str) -> bool {
    matches!(key, "apiVersion" | "kind")
}

fn is_void(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}
