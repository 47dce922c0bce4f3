//! What the figures depend on: the machine and the programs, read from the system when a benchmark starts, kept beside its results.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::json;

/// One run's circumstances. What could not be read is empty.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_gib: u64,
    pub(crate) kernel: String,
    /// What TCP uses unless told otherwise.
    pub(crate) congestion_control: String,
    /// Bytes that a UDP socket may ask for as its receive buffer.
    pub(crate) udp_buffer_max: String,
    /// Of one minute, when the run began.
    pub(crate) load: String,
    /// The rivals' versions; of the one that was not there, nothing.
    #[serde(default)]
    pub(crate) envoy: String,
    #[serde(default)]
    pub(crate) etcd: String,
    /// Version and, in a checkout, commit.
    pub(crate) isthmus: String,
    /// "release" or "debug".
    pub(crate) build: String,
    /// When the run began, UTC.
    pub(crate) began: String,
    /// Its arguments.
    pub(crate) command: Vec<String>,
}

/// Whom ours is beside, by its program.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rival<'a> {
    Envoy(&'a Path),
    Etcd(&'a Path),
    Nobody,
}

/// The name of the file beside a benchmark's results.
pub(crate) fn file(benchmark: &str) -> String {
    format!("{benchmark}-machine.json")
}

impl Machine {
    /// Writes it beside the benchmark's results.
    pub(crate) fn record(&self, folder: &Path, benchmark: &str) -> anyhow::Result<()> {
        json::write(&folder.join(file(benchmark)), self)
    }

    /// As it is now. The rival is asked for its version.
    pub(crate) fn here(rival: Rival<'_>) -> Self {
        let version = |program: &Path| output(Command::new(program).arg("--version"));
        let (envoy, etcd) = match rival {
            Rival::Envoy(program) => (envoy_version(&version(program)), String::new()),
            Rival::Etcd(program) => (String::new(), etcd_version(&version(program))),
            Rival::Nobody => (String::new(), String::new()),
        };
        let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
        let field = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
            line.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let kib: u64 = field(&memory, "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0);
        Self {
            cpu: field(&cpu, "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: (kib + (1 << 19)) >> 20,
            kernel: read("/proc/sys/kernel/osrelease"),
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control"),
            udp_buffer_max: read("/proc/sys/net/core/rmem_max"),
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned(),
            envoy,
            etcd,
            isthmus: isthmus_version(),
            build: if cfg!(debug_assertions) { "debug" } else { "release" }.to_owned(),
            began: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            command: std::env::args().skip(1).collect(),
        }
    }
}

/// From `<path>  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL`.
fn envoy_version(text: &str) -> String {
    let version = text.split_once("version: ").and_then(|(_, version)| version.split('/').nth(1));
    version.unwrap_or_default().to_owned()
}

/// From `etcd Version: 3.4.23`.
fn etcd_version(text: &str) -> String {
    text.lines().find_map(|line| line.strip_prefix("etcd Version: ")).unwrap_or_default().to_owned()
}

fn isthmus_version() -> String {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let root = env!("CARGO_MANIFEST_DIR");
    match output(Command::new("git").args(["-C", root, "describe", "--always", "--dirty", "--exclude=*"])) {
        commit if commit.is_empty() => version,
        commit => format!("{version} ({commit})"),
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// What it prints; nothing if it cannot be run.
fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_found_in_what_a_rival_says() {
        let text = "/opt/envoy/bin/envoy  version: 2f8f5cd0/1.40.0/Clean/RELEASE/BoringSSL";
        assert_eq!(envoy_version(text), "1.40.0");
        assert_eq!(envoy_version(""), "");
        assert_eq!(etcd_version("etcd Version: 3.4.23\nGit SHA: Not provided\n"), "3.4.23");
    }

    #[test]
    fn a_record_is_read_back_and_a_missing_envoy_leaves_its_version_empty() {
        let folder = std::env::temp_dir().join(format!("isthmus-bench-machine-{}", std::process::id()));
        Machine::here(Rival::Envoy(Path::new("/nowhere/envoy"))).record(&folder, "gateway").unwrap();
        let text = fs::read_to_string(folder.join("gateway-machine.json")).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        let machine: Machine = serde_json::from_str(&text).unwrap();
        assert_eq!(machine.envoy, "");
        assert!(machine.cores > 0 && machine.memory_gib > 0 && !machine.kernel.is_empty(), "{machine:?}");
        assert!(machine.isthmus.starts_with(env!("CARGO_PKG_VERSION")), "{machine:?}");
    }
}
