//! What can be typed about who may do what: contexts, tokens, role bindings, the audit log.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use super::{FormatArgs, HistoryFormat};

#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// The contexts of the file, and which of them is in use
    #[command(after_help = "Example:\n  isthmusctl context list")]
    List,
    /// Use another context from now on
    #[command(after_help = "Example:\n  isthmusctl context use prod")]
    Use {
        /// Its name
        name: String,
    },
    /// Which context is in use
    #[command(after_help = "Example:\n  isthmusctl context current")]
    Current,
    /// Take a context from another file, under a name
    #[command(after_help = "Examples:\n  \
        isthmusctl context add prod ./prod/context.yaml\n  \
        isthmusctl context add ci ./prod/context.yaml --token-file ci.token\n\n\
        The files that it names stay where they are. A file of one context becomes one of several: what it held is \
        then called default.")]
    Add {
        /// Its name
        name: String,
        /// A context file, as the control plane writes one
        file: PathBuf,
        /// A file that holds a token, in place of the file's credentials
        #[arg(long, value_name = "FILE")]
        token_file: Option<PathBuf>,
    },
    /// Forget a context
    #[command(after_help = "Example:\n  isthmusctl context remove old")]
    Remove {
        /// Its name
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Mint an API token; its secret is shown this once
    #[command(after_help = "Examples:\n  isthmusctl token create ci > ci.token\n  \
        isthmusctl token create ci --ttl 8h\n  \
        isthmusctl role-binding set ci --role viewer --token ci\n\n\
        Only the token goes to stdout. It can do nothing until a role binding names it.")]
    Create {
        /// Its name; role bindings speak of it by that
        #[arg(value_parser = parse_name)]
        name: String,
        /// How long it is good, 1s to 366d
        #[arg(long, default_value = "90d", value_parser = parse_ttl)]
        ttl: Duration,
    },
    /// List API tokens
    #[command(after_help = "Examples:\n  isthmusctl token list\n  isthmusctl token list -o json")]
    List(FormatArgs),
    /// Make an API token worthless, at once
    #[command(after_help = "Example:\n  isthmusctl token delete ci")]
    Delete {
        /// Its name
        #[arg(value_parser = parse_name)]
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum RoleBindingCommand {
    /// Give a role to users, groups, tokens or certificates; replaces the binding of that name
    #[command(after_help = "Examples:\n  isthmusctl role-binding set sre --role admin --group sre\n  \
        isthmusctl role-binding set shop --role operator \\\n    --user alice --namespace shop\n  \
        isthmusctl role-binding set ci --role viewer --token ci\n\n\
        Without --namespace: everywhere. Only operators can be bound to namespaces.")]
    Set(SetRoleBinding),
    /// List role bindings
    #[command(after_help = "Examples:\n  isthmusctl role-binding list\n  isthmusctl role-binding list -o yaml")]
    List(FormatArgs),
    /// Take a role back
    #[command(after_help = "Example:\n  isthmusctl role-binding delete shop")]
    Delete {
        /// The binding's name
        #[arg(value_parser = parse_name)]
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct SetRoleBinding {
    /// The binding's name
    #[arg(value_parser = parse_name)]
    pub(crate) name: String,
    /// What they may do
    #[arg(long, value_enum)]
    pub(crate) role: Role,
    /// A user, as its issuer names it; may be repeated
    #[arg(long, value_name = "NAME", required_unless_present_any = ["group", "token", "spiffe"])]
    pub(crate) user: Vec<String>,
    /// A group, as its issuer names it; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Vec<String>,
    /// An API token; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) token: Vec<String>,
    /// A certificate's SPIFFE ID; may be repeated
    #[arg(long, value_name = "ID")]
    pub(crate) spiffe: Vec<String>,
    /// Only in this namespace; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) namespace: Vec<String>,
    /// Only if the binding has this version now; 0: only if there is none
    #[arg(long, value_name = "N")]
    pub(crate) resource_version: Option<u64>,
}

/// Each includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Look at everything but secrets
    Viewer,
    /// Change what belongs to namespaces
    Operator,
    /// Everything
    Admin,
}

#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// Only what this caller asked: a SPIFFE ID, token:NAME, user:NAME
    #[arg(long)]
    pub(crate) who: Option<String>,
    /// Only what was about this
    #[arg(long, value_name = "NAME")]
    pub(crate) subject: Option<String>,
    /// Only this verb, such as revoke
    #[arg(long)]
    pub(crate) action: Option<String>,
    /// Only with this outcome; "refused" stands for all that were
    #[arg(long)]
    pub(crate) outcome: Option<String>,
    /// Not earlier than this: 2026-01-31T12:00:00Z, or 2h for two hours ago
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) since: Option<u64>,
    /// Not later than this
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(crate) until: Option<u64>,
    /// So many, the latest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_240))]
    pub(crate) limit: u32,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = HistoryFormat::Table)]
    pub(crate) output: HistoryFormat,
}

/// What completes the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// An RFC 1123 label, as the control plane demands; nothing else goes into a path.
fn parse_name(s: &str) -> Result<String, String> {
    let inner = s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if (1..=63).contains(&s.len()) && inner && !s.starts_with('-') && !s.ends_with('-') {
        return Ok(s.to_owned());
    }
    Err("a name has 1 to 63 lower-case letters, digits and '-', and neither begins nor ends with '-'".to_owned())
}

fn parse_ttl(s: &str) -> Result<Duration, String> {
    let ttl = humantime::parse_duration(s).map_err(|e| format!("{e}; write for example 8h or 90d"))?;
    let allowed = Duration::from_secs(1)..=Duration::from_secs(366 * 86_400);
    if allowed.contains(&ttl) { Ok(ttl) } else { Err("must be between 1s and 366d".to_owned()) }
}

/// Unix time in milliseconds.
fn parse_time(s: &str) -> Result<u64, String> {
    let at = match humantime::parse_duration(s) {
        Ok(ago) => std::time::SystemTime::now().checked_sub(ago),
        Err(_) => humantime::parse_rfc3339_weak(s).ok(),
    };
    let since = at.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
    let millis = since.and_then(|since| u64::try_from(since.as_millis()).ok());
    millis.ok_or_else(|| format!("{s:?} is no time: write 2026-01-31T12:00:00Z, or 2h for two hours ago"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_anything_is_sent() {
        assert!(parse_name("ci-2").is_ok());
        for bad in ["", "../status", "-a", "a-", "A", "a b", &"a".repeat(64)] {
            assert!(parse_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_dates_or_how_long_ago() {
        assert_eq!(parse_time("1970-01-01T00:00:01Z"), Ok(1000));
        assert_eq!(parse_time("1970-01-02 00:00:00"), Ok(86_400_000));
        assert!(parse_time("2h").unwrap() + 2 * 3_600_000 <= parse_time("0s").unwrap() + 1);
        assert!(parse_time("yesterday").unwrap_err().contains("yesterday"));
    }
}
