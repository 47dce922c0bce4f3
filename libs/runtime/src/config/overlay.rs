//! Environment variables laid over a configuration tree.
//!
//! Applied in the order of their names, so that the outcome does not depend on the environment's order.

use std::ffi::OsString;

use super::ConfigError;
use super::tree::{Node, Origin, Value};

/// Nothing that a configuration needs is nested deeper.
const MAX_DEPTH: usize = 16;

/// Sets in `root` what the variables `prefix__…` say.
pub(super) fn apply(
    root: &mut Node,
    prefix: &str,
    env: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(), ConfigError> {
    if prefix.is_empty() {
        return Ok(());
    }
    let start = format!("{prefix}__");
    let mut ours: Vec<(String, OsString)> = env
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| name.starts_with(&start))
        .collect();
    ours.sort();
    for (variable, value) in ours {
        let path: Vec<&str> = variable.get(start.len()..).unwrap_or_default().split("__").collect();
        let outcome = match value.into_string() {
            Ok(text) => set(root, &path, Node { origin: Origin::Env(variable.clone()), value: Value::Text(text) }),
            Err(_) => Err("its value is not UTF-8".to_owned()),
        };
        outcome.map_err(|message| ConfigError::Environment { variable, message })?;
    }
    Ok(())
}

fn set(root: &mut Node, path: &[&str], leaf: Node) -> Result<(), String> {
    if path.len() > MAX_DEPTH {
        return Err(format!("it names a field more than {MAX_DEPTH} levels deep"));
    }
    let mut node = root;
    for segment in path {
        if segment.is_empty() {
            return Err("a segment of its name is empty; write PREFIX__SECTION__KEY".to_owned());
        }
        node = enter(node, segment, &leaf.origin)?;
    }
    *node = leaf;
    Ok(())
}

/// The child that `segment` names, made if it is missing.
fn enter<'a>(node: &'a mut Node, segment: &str, origin: &Origin) -> Result<&'a mut Node, String> {
    let blank = || Node { origin: origin.clone(), value: Value::Null };
    if matches!(node.value, Value::Null) {
        *node = Node { origin: origin.clone(), value: Value::Map(Vec::new()) };
    }
    match &mut node.value {
        Value::Map(entries) => {
            let key = field_name(segment);
            let at = entries.iter().position(|(found, _)| found.text == key).unwrap_or_else(|| {
                entries.push((super::tree::Key { text: key, origin: origin.clone() }, blank()));
                entries.len() - 1
            });
            entries.get_mut(at).map(|(_, value)| value).ok_or_else(|| "its field is gone".to_owned())
        }
        Value::Seq(items) => {
            let length = items.len();
            let index: usize =
                segment.parse().map_err(|_| format!("{segment} must be a number: it indexes a list of {length}"))?;
            if index == length {
                items.push(blank());
            }
            items.get_mut(index).ok_or_else(|| format!("index {index} is beyond the list of {length} in the file"))
        }
        _ => Err(format!("{segment} cannot be set: what it would be a part of is a single value")),
    }
}

/// `STATE_DIR` is `stateDir`; a segment with lower-case letters is already spelled as in the file.
fn field_name(segment: &str) -> String {
    if segment.chars().any(char::is_lowercase) {
        return segment.to_owned();
    }
    let mut name = String::with_capacity(segment.len());
    let mut upper = false;
    for letter in segment.chars() {
        if letter == '_' {
            upper = !name.is_empty();
        } else if std::mem::take(&mut upper) {
            name.push(letter);
        } else {
            name.extend(letter.to_lowercase());
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_become_camel_case_unless_spelled_out() {
        for (segment, field) in
            [("LISTEN", "listen"), ("STATE_DIR", "stateDir"), ("HOLD_DOWN_MS", "holdDownMs"), ("my-Label", "my-Label")]
        {
            assert_eq!(field_name(segment), field);
        }
    }
}
