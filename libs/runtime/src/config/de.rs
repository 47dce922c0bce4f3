//! serde's view of a configuration tree: every error knows the path of its field and the place it was written at.
//!
//! Text from variables becomes what the type asks for; nothing else is converted, and numbers never become names.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::value::{StrDeserializer, StringDeserializer};
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess,
    VariantAccess, Visitor,
};

use super::tree::{self, Key, Node, Origin, Value};

/// Nobody reads more.
const MOST: usize = 50;
/// Words from here up are taken for one another (Jaro-Winkler, from 0 to 1).
const ALIKE: f64 = 0.85;

/// What does not fit the type, and where.
#[derive(Debug)]
pub(super) struct TreeError {
    pub(super) message: String,
    pub(super) path: String,
    pub(super) origin: Option<Origin>,
    cause: Cause,
}

#[derive(Debug)]
enum Cause {
    Value,
    /// A key of the section at the path that nothing has a use for.
    Unknown(String),
    /// A key that the section at the path lacks.
    Missing(&'static str),
}

/// Makes a typed value of the tree, or says all that does not fit.
///
/// serde stops at the first error, so what does not fit is taken out and the rest looked at again. That a section lacks
/// something is found last of it: of several missing keys it is the first.
pub(super) fn deserialize<T: DeserializeOwned>(root: &Node) -> Result<T, Vec<TreeError>> {
    let mut found = match T::deserialize(root) {
        Ok(value) => return Ok(value),
        Err(error) => vec![error],
    };
    let mut rest = root.clone();
    let mut taken = HashSet::new();
    while let Some(last) = found.last()
        && found.len() <= MOST
    {
        let mut wrong: Vec<&str> = tree::segments(&last.path).collect();
        if let Cause::Unknown(key) = &last.cause {
            // It may have dots of its own.
            wrong.push(key);
        }
        if !take(&mut rest, &wrong, &mut taken) {
            break;
        }
        match T::deserialize(&rest) {
            Ok(_) => break,
            Err(error) => found.push(error),
        }
    }
    // What was taken out is not missing.
    found.retain(|error| match error.cause {
        Cause::Missing(key) => {
            let path: Vec<String> = tree::segments(&error.path).chain([key]).map(str::to_owned).collect();
            !taken.contains(&path)
        }
        Cause::Value | Cause::Unknown(_) => true,
    });
    found.truncate(MOST);
    Err(found)
}

/// Whether something was taken `from` where `path` leads, that was not taken before.
fn take(from: &mut Node, path: &[&str], taken: &mut HashSet<Vec<String>>) -> bool {
    let depth = from.take(path);
    let owned = |path: &[&str]| path.iter().map(|segment| (*segment).to_owned()).collect();
    depth.and_then(|depth| path.get(..depth)).is_some_and(|path| taken.insert(owned(path)))
}

impl Node {
    /// A variable's text as YAML would read it: for lists, maps, and types that take whatever is there.
    fn reread(&self, text: &str) -> Result<Node, TreeError> {
        if text.trim().is_empty() {
            return Ok(Node { origin: self.origin.clone(), value: Value::Null });
        }
        let mut node = tree::parse(text).map_err(|error| self.error(tree::message_of(&error)))?;
        node.moved_to(&self.origin);
        Ok(node)
    }

    fn error(&self, message: impl Into<String>) -> TreeError {
        TreeError {
            message: message.into(),
            path: String::new(),
            origin: Some(self.origin.clone()),
            cause: Cause::Value,
        }
    }

    fn number<'de, V: Visitor<'de>, N: std::str::FromStr + IntoDeserializer<'de, TreeError>>(
        &self,
        visitor: V,
        what: &str,
    ) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::Text(text) => match text.trim().parse::<N>() {
                Ok(number) => number.into_deserializer().deserialize_any(visitor),
                Err(_) => Err(self.error(format!("{text:?} is not {what}"))),
            },
            _ => self.any(visitor),
        }
    }

    fn any<'de, V: Visitor<'de>>(&self, visitor: V) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::Null | Value::Taken => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::String(value) => visitor.visit_str(value),
            Value::Text(text) => return self.reread(text)?.any(visitor),
            Value::Seq(items) => visitor.visit_seq(Items { items: items.iter().enumerate() }),
            Value::Map(entries) => visitor.visit_map(Entries { entries: entries.iter(), current: None }),
        }
        .map_err(|error| error.or_at(&self.origin))
    }
}

impl TreeError {
    /// Innermost place wins: it is set on the way out only if nothing closer has.
    fn or_at(mut self, origin: &Origin) -> Self {
        self.origin.get_or_insert_with(|| origin.clone());
        self
    }

    fn below(mut self, segment: &str) -> Self {
        self.path = joined(segment, &self.path);
        self
    }
}

fn joined(section: &str, rest: &str) -> String {
    let joint = if section.is_empty() || rest.is_empty() || rest.starts_with('[') { "" } else { "." };
    format!("{section}{joint}{rest}")
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TreeError {}

impl de::Error for TreeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { message: message.to_string(), path: String::new(), origin: None, cause: Cause::Value }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let alike = |known: &&&str| strsim::jaro_winkler(&field.to_lowercase(), &known.to_lowercase());
        let nearest = expected.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
        let meant = nearest.filter(|known| alike(known) >= ALIKE);
        let advice = match (meant, expected) {
            (Some(known), _) => format!("did you mean `{known}`?"),
            (None, []) => "there are none".to_owned(),
            (None, known) => format!("expected one of `{}`", known.join("`, `")),
        };
        let message = format!("unknown field `{field}`; {advice}");
        Self { message, path: String::new(), origin: None, cause: Cause::Unknown(field.to_owned()) }
    }

    fn missing_field(field: &'static str) -> Self {
        let message = format!("missing field `{field}`");
        Self { message, path: String::new(), origin: None, cause: Cause::Missing(field) }
    }
}

impl<'de> Deserializer<'de> for &Node {
    type Error = TreeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.any(visitor)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.number::<V, bool>(visitor, "true or false").map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.number::<V, u64>(visitor, "a whole number from 0 up").map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_u64(visitor)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.number::<V, i64>(visitor, "a whole number").map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_i8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_i64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.number::<V, f64>(visitor, "a number").map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::Text(text) => visitor.visit_str(text).map_err(|error: TreeError| error.or_at(&self.origin)),
            Value::Bool(_) | Value::Unsigned(_) | Value::Signed(_) | Value::Float(_) => {
                // The text as written is gone (1.10 reads as 1.1), so it is not guessed back.
                self.any(visitor).map_err(|mut error| {
                    error.message.push_str("; put the value in quotes");
                    error
                })
            }
            _ => self.any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::Null => visitor.visit_none(),
            // An empty variable unsets what the file set.
            Value::Text(text) if text.is_empty() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
        .map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, TreeError> {
        visitor.visit_newtype_struct(self).map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::Null => visitor.visit_seq(Items { items: [].iter().enumerate() }),
            Value::Text(text) => self.reread(text)?.deserialize_seq(visitor),
            _ => self.any(visitor),
        }
        .map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TreeError> {
        match &self.value {
            // `telemetry:` with every line below it commented out means: all defaults.
            Value::Null => visitor.visit_map(Entries { entries: [].iter(), current: None }),
            Value::Text(text) => self.reread(text)?.deserialize_map(visitor),
            // serde would take a list's items for the fields in their order.
            Value::Seq(_) => Err(self.error("expected a section of keys, found a list")),
            _ => self.any(visitor),
        }
        .map_err(|error| error.or_at(&self.origin))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TreeError> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TreeError> {
        match &self.value {
            Value::String(text) | Value::Text(text) => {
                visitor.visit_enum(StrDeserializer::<TreeError>::new(text)).map_err(|error| error.or_at(&self.origin))
            }
            Value::Map(entries) => match entries.as_slice() {
                [(key, node)] => visitor.visit_enum(Variant { key, node }).map_err(|error| error.or_at(&self.origin)),
                _ => Err(self.error(format!("expected one key that names a variant, found {}", entries.len()))),
            },
            _ => self.any(visitor),
        }
    }

    serde::forward_to_deserialize_any! {
        i128 u128 bytes byte_buf unit unit_struct tuple tuple_struct ignored_any
    }
}

struct Items<'a> {
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = TreeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, TreeError> {
        let Some((index, node)) = self.items.find(|(_, node)| !matches!(node.value, Value::Taken)) else {
            return Ok(None);
        };
        seed.deserialize(node).map(Some).map_err(|error| error.or_at(&node.origin).below(&format!("[{index}]")))
    }
}

struct Entries<'a> {
    entries: std::slice::Iter<'a, (Key, Node)>,
    current: Option<&'a (Key, Node)>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = TreeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, TreeError> {
        self.current = self.entries.next();
        let Some((key, _)) = self.current else {
            return Ok(None);
        };
        // An unknown key is known as such here, so this is where its place is.
        let text = StringDeserializer::new(key.text.clone());
        seed.deserialize(text).map(Some).map_err(|error: TreeError| error.or_at(&key.origin))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, TreeError> {
        let Some((key, node)) = self.current.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        seed.deserialize(node).map_err(|error| error.or_at(&node.origin).below(&key.text))
    }
}

struct Variant<'a> {
    key: &'a Key,
    node: &'a Node,
}

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = TreeError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), TreeError> {
        let name = StrDeserializer::<TreeError>::new(&self.key.text);
        let value = seed.deserialize(name).map_err(|error| error.or_at(&self.key.origin))?;
        Ok((value, self))
    }
}

impl Variant<'_> {
    fn inside<T>(&self, outcome: Result<T, TreeError>) -> Result<T, TreeError> {
        outcome.map_err(|error| error.or_at(&self.node.origin).below(&self.key.text))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = TreeError;

    fn unit_variant(self) -> Result<(), TreeError> {
        self.inside(<()>::deserialize(self.node))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, TreeError> {
        self.inside(seed.deserialize(self.node))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, TreeError> {
        self.inside(self.node.deserialize_seq(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TreeError> {
        self.inside(self.node.deserialize_map(visitor))
    }
}
