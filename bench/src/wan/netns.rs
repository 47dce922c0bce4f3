//! A network namespace of our own: made, entered, and taken away with all that runs in it.
//!
//! Names are `isthmus-wan-<pid>-<number>-<side>`, so that a later run sees which belong to processes that are no more and
//! removes those, and only those. A namespace begins with loopback and nothing else.

use std::{
    fs::File,
    os::fd::AsFd,
    path::Path,
    process::{Command, Stdio},
    thread::{Builder, JoinHandle},
};

use anyhow::{Context, anyhow, bail};
use rustix::{
    process::{Pid, Signal, kill_process},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

const PREFIX: &str = "isthmus-wan-";

/// Where `ip netns` keeps the handles.
const HANDLES: &str = "/run/netns";

/// Exists while this value does.
#[derive(Debug)]
pub(super) struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes it, with loopback up.
    pub(super) fn create(number: u32, side: &str) -> anyhow::Result<Self> {
        let name = format!("{PREFIX}{}-{number}-{side}", std::process::id());
        ip(&["netns", "add", &name]).context("make a network namespace (this needs root and iproute2)")?;
        let namespace = Self { name };
        ip(&["-n", &namespace.name, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a new thread inside. Sockets and threads it makes belong to the namespace, wherever they are used later.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        thread: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
        let handle = Path::new(HANDLES).join(&self.name);
        let enter = move || {
            let handle = File::open(&handle).with_context(|| format!("open {}", handle.display()))?;
            move_into_link_name_space(handle.as_fd(), Some(LinkNameSpaceType::Network))
                .context("enter the namespace")?;
            Ok(work())
        };
        Builder::new().name(thread.to_owned()).spawn(enter).context("start a thread")
    }

    /// As [`Self::spawn`], waiting for the result.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        self.spawn("wan-setup", work)?.join().map_err(|_| anyhow!("a thread inside {} died", self.name))??
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.name) {
            eprintln!("could not remove the network namespace {}: {error:#}", self.name);
        }
    }
}

/// Removes the namespaces of runs whose process is gone.
pub(super) fn remove_leftovers() -> anyhow::Result<()> {
    let entries = match std::fs::read_dir(HANDLES) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(format!("list {HANDLES}")),
    };
    for entry in entries {
        let name = entry.with_context(|| format!("list {HANDLES}"))?.file_name();
        if let Some(name) = name.to_str().filter(|name| owner(name).is_some_and(|pid| !is_running(pid))) {
            let removed = remove(name);
            // Another run may have been faster.
            if Path::new(HANDLES).join(name).exists() {
                removed?;
            }
        }
    }
    Ok(())
}

/// The process that made a namespace of ours.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

/// A process that is dead and only not yet collected by its parent counts as gone.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    // The state follows the name, which is in brackets and may contain anything.
    stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])))
}

/// Kills what runs inside, by process id, and deletes the namespace.
fn remove(name: &str) -> anyhow::Result<()> {
    let inside = ip(&["netns", "pids", name])?;
    for pid in inside.split_whitespace().filter_map(|pid| pid.parse().ok()).filter_map(Pid::from_raw) {
        if pid != rustix::process::getpid() {
            // Gone in the meantime is as good.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    ip(&["netns", "delete", name]).map(drop)
}

/// Runs `ip` with these arguments and returns what it prints.
pub(super) fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output();
    let output = output.context("run `ip` (is iproute2 installed?)")?;
    if !output.status.success() {
        bail!("`ip {}` says: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).context("read the output of `ip`")
}
