//! One YAML file per process, overlaid by environment variables, checked as a whole.
//!
//! A path and a prefix go in, a typed configuration or an error comes out that says file, line and field. The variable
//! `PREFIX__LISTEN__GRPC=127.0.0.1:1` sets `listen.grpc`: segments are parted by `__`, `STATE_DIR` means `stateDir`, a
//! segment with lower-case letters is taken as it is, a number indexes a list. Unknown keys are rejected when the type
//! says `#[serde(deny_unknown_fields)]`, which every configuration here does. Defaults are the types' affair.

mod de;
mod overlay;
#[cfg(test)]
mod tests;
mod tree;

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use tree::{Node, Origin};

/// The largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// Checks what types cannot say: ranges, exclusions, references between fields.
pub trait Validate {
    /// Adds every problem there is, not only the first.
    fn validate(&self, problems: &mut Problems);
}

/// The problems found by one validation, each with its field path.
#[derive(Debug, Default)]
pub struct Problems {
    prefix: String,
    found: Vec<(String, String)>,
}

impl Problems {
    /// Adds a problem. `field` is the path as the file spells it, such as `listen.grpc` or `inbound[0].port`.
    pub fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.found.push((format!("{}{}", self.prefix, field.into()), message.into()));
    }

    /// Whether none was added.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Checks the part of the configuration under `field`, whose problems get that path in front.
    pub fn within(&mut self, field: &str, part: &impl Validate) {
        let outer = self.prefix.clone();
        self.prefix = format!("{outer}{field}.");
        part.validate(self);
        self.prefix = outer;
    }

    /// The problems so far as (field, message), in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.found.iter().map(|(field, message)| (field.as_str(), message.as_str()))
    }
}

/// Why there is no configuration. All variants say which file, and where possible which line and field.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("configuration file {} does not exist; pass another with --config PATH", file.display())]
    Missing {
        /// The path that was asked for.
        file: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read configuration file {}", file.display())]
    Read {
        /// The path that was asked for.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is larger than any configuration.
    #[error("configuration file {} is over the limit of {MAX_FILE} bytes", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
    /// The file is not YAML.
    #[error("{}:{line}:{column}: {message}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: u64,
        /// Column, from 1.
        column: u64,
        /// What is wrong.
        message: String,
    },
    /// An environment variable with our prefix cannot be applied.
    #[error("environment variable {variable}: {message}")]
    Environment {
        /// Its name.
        variable: String,
        /// What is wrong.
        message: String,
    },
    /// Keys are unknown or missing, values of the wrong type; or, if all of these are right, values make no sense.
    #[error("{}", List { file, problems })]
    Invalid {
        /// The file.
        file: PathBuf,
        /// All problems.
        problems: Vec<Problem>,
    },
}

/// One of a configuration's problems.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `file:line:column`, or the environment variable, that set the field; the file for a field that is not set.
    pub place: String,
    /// Path of the field; empty at the top.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

/// Reads `path`, applies the process's environment variables that begin with `env_prefix` and `__`, and validates.
///
/// An empty prefix means no variables.
pub fn load<T: DeserializeOwned + Validate>(path: &Path, env_prefix: &str) -> Result<T, ConfigError> {
    load_with_env(path, env_prefix, std::env::vars_os())
}

/// The same with the variables given, for tests and embedding.
pub fn load_with_env<T: DeserializeOwned + Validate>(
    path: &Path,
    env_prefix: &str,
    env: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<T, ConfigError> {
    let mut root = parse(path, &read(path)?)?;
    overlay::apply(&mut root, env_prefix, env)?;
    let place = |origin: &Origin| match origin {
        Origin::File { line, column } => format!("{}:{line}:{column}", path.display()),
        Origin::Env(variable) => format!("environment variable {variable}"),
    };
    let value: T = de::deserialize(&root).map_err(|found| {
        let located = found.into_iter().map(|error| Problem {
            place: error.origin.as_ref().map_or_else(|| path.display().to_string(), place),
            field: error.path,
            message: advised(error.message),
        });
        ConfigError::Invalid { file: path.to_owned(), problems: located.collect() }
    })?;
    let mut problems = Problems::default();
    value.validate(&mut problems);
    if problems.is_empty() {
        return Ok(value);
    }
    let located = problems.found.into_iter().map(|(field, message)| Problem {
        place: root.find(&field).map_or_else(|| path.display().to_string(), |node| place(&node.origin)),
        field,
        message,
    });
    Err(ConfigError::Invalid { file: path.to_owned(), problems: located.collect() })
}

/// What types call themselves, and what they take.
const NUMBERS: [(&str, &str); 4] = [
    ("u16", "write a whole number from 0 to 65535"),
    ("u32", "write a whole number from 0 to 4294967295"),
    ("u64", "write a whole number from 0 up"),
    ("usize", "write a whole number from 0 up"),
];

/// The libraries' words for what does not fit a type, with what to write instead.
fn advised(message: String) -> String {
    let number = NUMBERS.iter().find(|(kind, _)| message.ends_with(&format!("expected {kind}")));
    let advice = match () {
        () if message.contains("expected a duration") => "write a number with its unit, for example 400ms, 5s or 10m",
        () if message.contains("invalid socket address syntax") => {
            "write IP:port, for example 192.0.2.1:443; names are not looked up"
        }
        () if message.contains("invalid IP address syntax") => "write an IP address; names are not looked up",
        () if number.is_some() && message.contains("string") => {
            "write a plain number without a unit; sizes are in bytes, so that 4 MiB are 4194304"
        }
        () if message.ends_with("expected a boolean") => "write true or false",
        () => match number {
            Some((_, range)) => range,
            None => return message,
        },
    };
    // A number where a text belongs is advised to be quoted, which would not help here.
    format!("{}; {advice}", message.trim_end_matches("; put the value in quotes"))
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let file = path.to_owned();
    let opened = match File::open(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ConfigError::Missing { file }),
        Err(source) => return Err(ConfigError::Read { file, source }),
    };
    let mut text = String::new();
    match opened.take(MAX_FILE + 1).read_to_string(&mut text) {
        Ok(_) if text.len() as u64 > MAX_FILE => Err(ConfigError::TooLarge { file }),
        Ok(_) => Ok(text),
        Err(source) => Err(ConfigError::Read { file, source }),
    }
}

fn parse(path: &Path, text: &str) -> Result<Node, ConfigError> {
    tree::parse(text).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |location| (location.line(), location.column()));
        ConfigError::Syntax { file: path.to_owned(), line, column, message: tree::message_of(&error) }
    })
}

struct List<'a> {
    file: &'a Path,
    problems: &'a [Problem],
}

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = self.problems {
            return only.fmt(f);
        }
        write!(f, "{} is not valid:", self.file.display())?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joint = if self.field.is_empty() { "" } else { ": " };
        write!(f, "{}: {}{joint}{}", self.place, self.field, self.message)
    }
}
