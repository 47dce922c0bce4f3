//! What can be typed, with an example for each command.

mod access;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use isthmus_model::ids::{ClusterName, NodeName, ServiceName};

pub(crate) use self::access::{
    AuditArgs, ContextCommand, Role, RoleBindingCommand, SetRoleBinding, Shell, TokenCommand,
};
use crate::shapes::Stamp;

/// Look at and steer an Isthmus federation.
#[derive(Debug, Parser)]
#[command(
    name = "isthmusctl",
    version,
    about,
    max_term_width = 110,
    after_help = "Examples:\n  \
        isthmusctl status                             clusters, gateways, problems\n  \
        isthmusctl cluster join-token us-east         a token for a new cluster\n  \
        isthmusctl explain shop/cart --from us-east   where its traffic goes, and why\n  \
        isthmusctl wait --timeout 30s                 until everyone has the latest\n\n\
        The context file says which control plane to talk to, and as whom. The control plane writes one on its first \
        start: <stateDir>/admin/context.yaml. `isthmusctl context add` takes it over under a name."
)]
pub(crate) struct Cli {
    /// A context's name, or a context file [default: the one in use]
    #[arg(long, global = true, env = "ISTHMUS_CONTEXT", value_name = "NAME|FILE")]
    pub(crate) context: Option<String>,
    /// The file in which contexts have names [default: ~/.isthmus/context.yaml]
    #[arg(long, global = true, env = "ISTHMUS_CONTEXTS", value_name = "FILE")]
    pub(crate) contexts: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Admit, list and revoke clusters
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// The control plane's own nodes: add, remove, look
    #[command(subcommand)]
    Cp(CpCommand),
    /// Clusters, their consumers, applied revisions and problems
    #[command(after_help = "Examples:\n  isthmusctl status\n  isthmusctl status --watch\n  \
        isthmusctl status -o json | jq '.clusters[].name'")]
    Status(StatusArgs),
    /// List what the federation sees, or what was declared, by kind
    #[command(after_help = "Examples:\n  isthmusctl get services\n  isthmusctl get services shop/cart -o yaml\n  \
        isthmusctl get clusters -o wide\n  isthmusctl get clustergrant us-east -o yaml > grant.yaml\n  \
        isthmusctl get services --watch\n\n\
        Settings and grants, as -o yaml prints them, can be edited and applied.")]
    Get(GetArgs),
    /// One service, cluster or other thing, with what is known of it
    #[command(after_help = "Examples:\n  isthmusctl describe service shop/cart\n  isthmusctl describe cluster us-east")]
    Describe {
        /// What kind of thing
        kind: Kind,
        /// Its name; of a service namespace/name
        name: String,
    },
    /// Put settings and grants in force, as files declare them
    #[command(
        after_help = "Examples:\n  isthmusctl apply -f grant.yaml\n  isthmusctl apply -f policies/ --dry-run\n  \
        isthmusctl get settings -o yaml | sed s/10000/5000/ | isthmusctl apply -f -\n\n\
        All files happen, or none: every problem is told with its file, line and field. An object with a \
        metadata.resourceVersion is only changed if nobody changed it meanwhile."
    )]
    Apply(ApplyArgs),
    /// Go back to the default of what was declared
    #[command(after_help = "Examples:\n  isthmusctl delete clustergrant us-east\n  isthmusctl delete -f grant.yaml")]
    Delete(DeleteArgs),
    /// Where a service's traffic from a cluster goes, and why
    #[command(after_help = "Examples:\n  isthmusctl explain shop/cart --from us-east\n  \
        isthmusctl explain shop/cart --from us-east --port 80 -o json\n\n\
        Exit code 1 if no cluster can take the traffic.")]
    Explain(ExplainArgs),
    /// Wait until the clusters have applied a revision
    #[command(after_help = "Examples:\n  isthmusctl wait\n  isthmusctl wait --revision 42 --timeout 30s\n  \
        isthmusctl wait --cluster us-east\n\n\
        Every connected consumer of every active cluster counts. On timeout: exit code 1, and who lags.")]
    Wait(WaitArgs),
    /// What was asked of the control plane, by whom, and what came of it
    #[command(after_help = "Examples:\n  isthmusctl history\n  isthmusctl history --all --limit 1000\n  \
        isthmusctl history --subject us-east\n  isthmusctl history --all -o jsonl > audit.jsonl\n\n\
        Without --all: what changed the state.")]
    History(HistoryArgs),
    /// What differs between two revisions, or what applying files would change
    #[command(after_help = "Examples:\n  isthmusctl diff 40 42\n  isthmusctl diff 40 42 -o yaml\n  \
        isthmusctl diff -f grant.yaml\n\n\
        Exit code 1 if files would change something.")]
    Diff(DiffArgs),
    /// Put the settings of an earlier revision in force again, as a new revision
    #[command(after_help = "Examples:\n  isthmusctl rollback 40\n\n\
        Settings come back; exports, bundles, indexes, tokens and revocations stay as they are. `isthmusctl diff` tells \
        beforehand what it would change.")]
    Rollback {
        /// Which
        revision: u64,
    },
    /// Write all that the control plane holds into a file
    #[command(after_help = "Examples:\n  isthmusctl backup before-upgrade.isthmus\n  \
        head -2 before-upgrade.isthmus     what it is of\n\n\
        The file holds no key: back up stateDir/ca of each node, too, or every cluster must join again after a restore.")]
    Backup {
        /// Where to write it; an existing file is not replaced
        file: PathBuf,
    },
    /// Put a backup into a new control plane that no cluster has joined
    #[command(after_help = "Examples:\n  isthmusctl restore before-upgrade.isthmus\n  \
        isthmusctl restore before-upgrade.isthmus --yes     without asking\n\n\
        Members, exports, indexes, settings and revocations come back, in a new epoch; join tokens do not. With the \
        CAs of then (stateDir/ca) the clusters go on by themselves.")]
    Restore {
        /// The backup
        file: PathBuf,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Which control planes there are to talk to, and as whom
    #[command(subcommand)]
    Context(ContextCommand),
    /// API tokens: mint, list, delete
    #[command(subcommand)]
    Token(TokenCommand),
    /// Who may do what: roles of users, groups, tokens and certificates
    #[command(subcommand)]
    RoleBinding(RoleBindingCommand),
    /// Every attempt, allowed or denied: who, from where, what, and what came of it
    #[command(after_help = "Examples:\n  isthmusctl audit\n  isthmusctl audit --outcome refused --since 24h\n  \
        isthmusctl audit --who user:alice --limit 1000\n  isthmusctl audit --limit 10240 -o jsonl > audit.jsonl\n\n\
        What was refused before it reached the control plane's log is told by the node at which it happened: ask each.")]
    Audit(AuditArgs),
    /// As whom the control plane sees you, and your roles
    #[command(after_help = "Examples:\n  isthmusctl whoami\n  isthmusctl whoami -o json")]
    Whoami(FormatArgs),
    /// Print what makes a shell complete this program's commands
    #[command(after_help = "Examples:\n  source <(isthmusctl completion bash)\n  \
        isthmusctl completion zsh > ~/.zfunc/_isthmusctl\n  \
        isthmusctl completion fish | source")]
    Completion {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// This program's version
    #[command(after_help = "Example:\n  isthmusctl version")]
    Version,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Mint a one-time token with which an agent joins as this cluster
    #[command(after_help = "Examples:\n  isthmusctl cluster join-token us-east > us-east.token\n  \
        isthmusctl cluster join-token us-east --ttl 1h\n  \
        isthmusctl cluster join-token us-east \\\n      --export-namespaces shop,pay --import-namespaces shop\n\n\
        Only the token goes to stdout. It can be used once and pins the control plane's CA.")]
    JoinToken {
        /// The cluster's name in the federation
        name: ClusterName,
        /// How long it may be used, 1s to 24h
        #[arg(long, default_value = "15m", value_parser = parse_ttl)]
        ttl: Duration,
        /// It may export services of these namespaces alone, comma-separated [default: all]
        #[arg(long, value_delimiter = ',', value_name = "NAMES")]
        export_namespaces: Vec<String>,
        /// It may use other clusters' services of these namespaces alone, comma-separated [default: all]
        #[arg(long, value_delimiter = ',', value_name = "NAMES")]
        import_namespaces: Vec<String>,
    },
    /// Send other clusters' new traffic elsewhere, as long as anybody else can take it
    #[command(after_help = "Example:\n  isthmusctl cluster drain us-east\n\n\
        The cluster stays a member, its own callers stay, and running connections go on.")]
    Drain {
        /// The cluster's name in the federation
        name: ClusterName,
    },
    /// Let other clusters' traffic come again
    #[command(after_help = "Example:\n  isthmusctl cluster undrain us-east")]
    Undrain {
        /// The cluster's name in the federation
        name: ClusterName,
    },
    /// Believe that a cluster meant to withdraw most of its exports at once
    #[command(after_help = "Example:\n  isthmusctl cluster confirm-withdrawal us-east\n\n\
        Until then they stay, by the policy in `isthmusctl get settings`; `isthmusctl describe cluster` lists them.")]
    ConfirmWithdrawal {
        /// The cluster's name in the federation
        name: ClusterName,
    },
    /// Cut a cluster off for good
    #[command(after_help = "Examples:\n  isthmusctl cluster revoke us-west\n  \
        isthmusctl cluster revoke us-west --yes     without asking\n\n\
        Its tunnels and sessions end within a second and its exports vanish. It cannot be undone: the name stays \
        refused.")]
    Revoke {
        /// The cluster's name in the federation
        name: ClusterName,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// List clusters
    #[command(after_help = "Examples:\n  isthmusctl cluster list\n  isthmusctl cluster list -o yaml")]
    List(FormatArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum CpCommand {
    /// Mint a one-time token with which another node joins the control plane
    #[command(after_help = "Examples:\n  isthmusctl cp add cp-2 > cp-2.token\n  isthmusctl cp add cp-2 --ttl 1h\n\n\
        Only the token goes to stdout. The node learns the state first, and votes when it has it. Use 3 or 5 nodes: \
        an even number survives no more losses than one less.")]
    Add {
        /// The new node's name, `node` in its configuration
        name: NodeName,
        /// How long it may be used, 1s to 24h
        #[arg(long, default_value = "15m", value_parser = parse_ttl)]
        ttl: Duration,
    },
    /// Who leads, who votes, who is behind
    #[command(after_help = "Examples:\n  isthmusctl cp status\n  isthmusctl cp status -o json\n\n\
        What the others hold only the leader knows: ask it to see all.")]
    Status(FormatArgs),
    /// Take a node out of the control plane for good
    #[command(after_help = "Examples:\n  isthmusctl cp remove cp-2\n  \
        isthmusctl cp remove cp-2 --yes     without asking\n\n\
        To replace a node that is lost: remove it, then add one under the same name or another, with an empty state \
        folder.")]
    Remove {
        /// The node's name
        name: NodeName,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// What can be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Global services: kind, ports, who exports them, conflicts
    #[value(alias = "service", alias = "svc")]
    Services,
    /// Clusters: state, locality, gateways, exports
    #[value(alias = "cluster")]
    Clusters,
    /// The control plane's nodes
    #[value(alias = "node")]
    Nodes,
    /// The federation's settings
    Settings,
    /// What each cluster may do
    #[value(name = "clustergrants", alias = "clustergrant", alias = "grants", alias = "grant")]
    ClusterGrants,
}

impl Kind {
    /// In the admin API's paths, and for people.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Clusters => "clusters",
            Self::Nodes => "nodes",
            Self::Settings => "settings",
            Self::ClusterGrants => "clustergrants",
        }
    }

    /// Can it be applied and deleted?
    pub(crate) fn is_declared(self) -> bool {
        matches!(self, Self::Settings | Self::ClusterGrants)
    }

    /// How it goes away, if not by `delete`.
    pub(crate) fn instead(self) -> &'static str {
        match self {
            Self::Services => "remove the ServiceExport in each cluster that exports it",
            Self::Clusters => "see `isthmusctl cluster revoke`",
            Self::Nodes => "see `isthmusctl cp remove`",
            Self::Settings | Self::ClusterGrants => "delete it",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// What kind of thing
    pub(crate) kind: Kind,
    /// Only this one; a service is namespace/name
    pub(crate) name: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = GetFormat::Table)]
    pub(crate) output: GetFormat,
    /// Print again on every change, until Ctrl-C
    #[arg(short, long)]
    pub(crate) watch: bool,
}

/// How to print a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GetFormat {
    /// For people
    Table,
    /// With more columns
    Wide,
    /// All that the control plane tells
    Json,
    /// The same, as YAML
    Yaml,
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// A file, a folder of .yaml, .yml and .json files, or "-" for the standard input; may be repeated
    #[arg(short, long = "filename", value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Only say what would happen
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// What kind of thing
    #[arg(required_unless_present = "files", requires = "name")]
    pub(crate) kind: Option<Kind>,
    /// Its name
    pub(crate) name: Option<String>,
    /// What these files declare: a file, a folder, or "-"; may be repeated
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "kind")]
    pub(crate) files: Vec<PathBuf>,
    /// Only say what would happen; with files
    #[arg(long, requires = "files")]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    /// The one revision
    #[arg(required_unless_present = "files", requires = "to")]
    pub(crate) from: Option<u64>,
    /// The other
    pub(crate) to: Option<u64>,
    /// Files to compare with what is in force: a file, a folder, or "-"; may be repeated
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "from")]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Also what was refused, and what changed nothing
    #[arg(long)]
    pub(crate) all: bool,
    /// Only about this cluster or node
    #[arg(long, value_name = "NAME")]
    pub(crate) subject: Option<String>,
    /// So many, the latest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_240))]
    pub(crate) limit: u32,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = HistoryFormat::Table)]
    pub(crate) output: HistoryFormat,
}

/// How to print events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HistoryFormat {
    /// For people
    Table,
    /// All that the control plane tells
    Json,
    /// The same, as YAML
    Yaml,
    /// One JSON object per line
    Jsonl,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// Print again on every change, until Ctrl-C
    #[arg(short, long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// namespace/name
    pub(crate) service: ServiceName,
    /// The cluster whose traffic is asked about
    #[arg(long, value_name = "CLUSTER")]
    pub(crate) from: ClusterName,
    /// A port of the service; absent: any
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// A revision (42, or with its epoch 1.42), or "latest": the control plane's at this moment
    #[arg(long, default_value = "latest")]
    pub(crate) revision: Target,
    /// Give up after this long
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    /// Look at this cluster only
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<ClusterName>,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// All that the control plane tells
    Json,
    /// The same, as YAML
    Yaml,
}

/// Which revision to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Latest,
    /// In the control plane's present epoch.
    Revision(u64),
    /// As the tables print it: epoch, dot, revision.
    Stamp(Stamp),
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "latest" {
            return Ok(Self::Latest);
        }
        if let Some((epoch, revision)) = s.split_once('.')
            && let (Ok(epoch), Ok(revision)) = (epoch.parse(), revision.parse())
        {
            return Ok(Self::Stamp(Stamp { epoch, revision }));
        }
        s.parse().map(Self::Revision).map_err(|_| {
            format!("{s:?} is none of: a revision (42), an epoch and revision as printed (1.42), \"latest\"")
        })
    }
}

fn parse_ttl(s: &str) -> Result<Duration, String> {
    let ttl = humantime::parse_duration(s).map_err(|e| format!("{e}; write for example 15m or 1h"))?;
    let allowed = Duration::from_secs(1)..=Duration::from_secs(86_400);
    if allowed.contains(&ttl) { Ok(ttl) } else { Err("must be between 1s and 24h".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn revisions_are_taken_as_they_are_printed() {
        let parsed = |s: &str| s.parse::<Target>();
        assert!(matches!(parsed("latest"), Ok(Target::Latest)));
        assert!(matches!(parsed("42"), Ok(Target::Revision(42))));
        assert!(matches!(parsed("2.42"), Ok(Target::Stamp(Stamp { epoch: 2, revision: 42 }))));
        assert!(parsed("2.x").is_err() && parsed("").is_err() && parsed(".").is_err());
    }

    #[test]
    fn every_command_shows_an_example() {
        fn check(command: &clap::Command) {
            if command.get_subcommands().next().is_none() && command.get_name() != "help" {
                let help = command.clone().render_help().to_string();
                assert!(help.contains("Example"), "{}", command.get_name());
            }
            // Indented lines are there to be copied: none may be wrapped.
            let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let wide = examples.lines().find(|line| line.starts_with("  ") && line.len() >= 80);
            assert_eq!(wide, None, "{}", command.get_name());
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn a_token_lives_a_day_at_most() {
        let parse = |ttl| Cli::try_parse_from(["isthmusctl", "cluster", "join-token", "a", "--ttl", ttl]);
        assert!(parse("24h").is_ok());
        for bad in ["0s", "25h", "soon"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_checked_before_anything_is_sent() {
        let parse = |name| Cli::try_parse_from(["isthmusctl", "cluster", "revoke", name]);
        assert!(parse("us-east").is_ok());
        assert!(parse("../status").is_err());
    }
}
