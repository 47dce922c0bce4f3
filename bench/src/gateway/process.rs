//! A process that is measured: its log, its CPU time, its memory.
//!
//! Read from /proc, by process id: what a process costs is its own user and system time (work that the kernel does for it in
//! interrupts is counted where it happens to run, alike for everybody), and its proportional share of resident memory. Memory of
//! the kernel for sockets is not in it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, ensure};
use tokio::process::{Child, Command};

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    pid: u32,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `command` with its output at the end of `<dir>/<name>.log`.
    pub(super) fn start(name: &str, mut command: Command, dir: &Path) -> anyhow::Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone().context("share a log")?).stderr(file);
        // Ctrl-C at the terminal is for us, who then end it.
        let child = command.process_group(0).kill_on_drop(true).spawn().with_context(|| format!("start {name}"))?;
        let pid = child.id().context("a process that has ended already")?;
        Ok(Self { name: name.to_owned(), pid, log, child })
    }

    /// An error with the end of its log, if it has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        let ended = self.child.try_wait().with_context(|| format!("look after {}", self.name))?;
        ensure!(ended.is_none(), "{} ended ({})\n{}", self.name, ended.unwrap_or_default(), self.tail());
        Ok(())
    }

    /// Its log's last lines.
    pub(super) fn tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.get(lines.len().saturating_sub(8)..).unwrap_or_default();
        format!("the end of {}:\n  {}", self.log.display(), last.join("\n  "))
    }

    /// Kills it and waits for its end.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| format!("stop {}", self.name))
    }

    /// Seconds of CPU since its start, user and system.
    pub(super) fn cpu(&self) -> anyhow::Result<f64> {
        let text = self.proc("stat")?;
        cpu_ticks(&text)
            .map(|ticks| ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
            .with_context(|| format!("read the CPU time of {}", self.name))
    }

    /// Bytes of memory: private ones, and its share of what it shares.
    pub(super) fn memory(&self) -> anyhow::Result<u64> {
        let text = self.proc("smaps_rollup")?;
        pss(&text).with_context(|| format!("read the memory of {}", self.name))
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/{file}", self.pid);
        fs::read_to_string(&path).with_context(|| format!("read {path} of {}\n{}", self.name, self.tail()))
    }
}

/// This program as it runs, even if a build has put another one in its place meanwhile.
pub(super) fn this_program() -> PathBuf {
    PathBuf::from(format!("/proc/{}/exe", std::process::id()))
}

/// Fields 14 and 15 of `/proc/PID/stat`; the second field may hold anything, so count from its end.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_ascii_whitespace().skip(11).map(str::parse::<u64>);
    Some(times.next()?.ok()? + times.next()?.ok()?)
}

fn pss(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_hostile_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 70 30 0 0 20 0 3 0 100 1000 200";
        assert_eq!(cpu_ticks(stat), Some(100));
        assert_eq!(cpu_ticks("nonsense"), None);
    }

    #[test]
    fn memory_is_the_proportional_share() {
        let rollup = "00400000-7fff ---p 00000000 00:00 0  [rollup]\nRss:  900 kB\nPss:  512 kB\nPss_Anon:  1 kB\n";
        assert_eq!(pss(rollup), Some(512 * 1024));
        assert_eq!(pss("Rss: 1 kB\n"), None);
    }

    #[test]
    fn this_process_has_both() {
        let me = std::process::id();
        assert!(cpu_ticks(&fs::read_to_string(format!("/proc/{me}/stat")).unwrap()).is_some());
        assert!(pss(&fs::read_to_string(format!("/proc/{me}/smaps_rollup")).unwrap()).unwrap() > 0);
    }
}
