//! What the system says: memory in use and allowed, and how late a timer fires.
//!
//! Memory is the process's resident set against 85 % of the machine's memory, or of the smallest cgroup v2 limit above the
//! process if that is lower; under a cgroup's limit its own count matters, too, without page cache that can be dropped.
//! The delay is the lateness of a timer: what any task waits that is ready to run.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time;

use super::{Judge, Limits};
use crate::core::Core;

/// Between two samples of the delay.
const EVERY: Duration = Duration::from_millis(100);
/// Memory is read once in so many.
const MEMORY_EVERY: u32 = 5;
/// Share of what the system allows that may be used, in percent, unless configured.
const SHARE: u64 = 85;
const CGROUPS: &str = "/sys/fs/cgroup";

/// One look at the process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Bytes in use; `None` if that cannot be read.
    pub(crate) memory: Option<u64>,
    /// How much later than asked for the sampler woke.
    pub(crate) delay: Duration,
    pub(crate) at: Instant,
}

/// Samples and judges until the gateway stops.
pub(crate) async fn watch(core: Arc<Core>) {
    let config = &core.config.overload;
    let source = Memory::find(config.max_memory_bytes);
    tracing::info!(memory_limit = source.limit, delay_limit = ?config.max_scheduling_delay, "admission limits");
    let mut judge = Judge::new(Limits { memory: source.limit, delay: config.max_scheduling_delay });
    let (mut memory, mut round) = (None, 0_u32);
    loop {
        let began = Instant::now();
        tokio::select! {
            () = time::sleep(EVERY) => {}
            () = core.stop.cancelled() => return,
        }
        let at = Instant::now();
        if round.is_multiple_of(MEMORY_EVERY) {
            memory = source.used();
        }
        round = round.wrapping_add(1);
        judge.observe(&Sample { memory, delay: (at - began).saturating_sub(EVERY), at });
        core.metrics.scheduling_delay(judge.delay());
        core.overload.set(judge.state(), &core.metrics);
    }
}

/// Where memory is counted, and how much there may be.
#[derive(Debug, PartialEq, Eq)]
struct Memory {
    limit: Option<u64>,
    /// The cgroup whose limit is the one that counts.
    cgroup: Option<PathBuf>,
}

impl Memory {
    fn find(configured: Option<u64>) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| kibibytes(&text, "MemTotal:"));
        Self::among(configured, machine, Path::new(CGROUPS), &own)
    }

    fn among(configured: Option<u64>, machine: Option<u64>, root: &Path, own: &str) -> Self {
        let cgroup = smallest(root, own).filter(|(limit, _)| machine.is_none_or(|machine| *limit < machine));
        let (limit, cgroup) = match cgroup {
            Some((limit, path)) => (Some(limit), Some(path)),
            None => (machine, None),
        };
        // Divided first: a limit may be near the largest number.
        Self { limit: configured.or(limit.map(|limit| limit / 100 * SHARE)), cgroup }
    }

    fn used(&self) -> Option<u64> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let resident = kibibytes(&status, "VmRSS:")?;
        Some(resident.max(self.cgroup.as_deref().and_then(counted).unwrap_or_default()))
    }
}

/// The smallest limit of the cgroup that the process is in and of those above it, as far as this process sees them.
fn smallest(root: &Path, own: &str) -> Option<(u64, PathBuf)> {
    // Version 2: one line, `0::/path`.
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // In a cgroup namespace one's own is the root; a path out of it is not ours to read.
    let inside = root.join(path.split('/').filter(|part| *part != "..").collect::<PathBuf>());
    let all = inside.ancestors().take_while(|folder| folder.starts_with(root));
    let limited = all.filter_map(|folder| Some((number(&folder.join("memory.max"))?, folder.to_owned())));
    limited.min_by_key(|(limit, _)| *limit)
}

/// What the cgroup counts, without the cache that the system drops when it needs room.
fn counted(cgroup: &Path) -> Option<u64> {
    let current = number(&cgroup.join("memory.current"))?;
    let stat = fs::read_to_string(cgroup.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
    Some(current.saturating_sub(cache.unwrap_or_default()))
}

/// `max` is no number, and no limit.
fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn kibibytes(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn cgroups(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_smallest_limit_above_the_process_counts() {
        let root = cgroups(&[
            ("memory.max", "max\n"),
            ("pods/memory.max", "1073741824\n"),
            ("pods/gateway/memory.max", "2147483648\n"),
            ("pods/memory.current", "500000000\n"),
            ("pods/memory.stat", "anon 1\ninactive_file 100000000\n"),
        ]);
        let memory = Memory::among(None, Some(4 * GIB), root.path(), "0::/pods/gateway\n");
        assert_eq!(memory.limit, Some(GIB / 100 * 85));
        assert_eq!(memory.cgroup.as_deref().and_then(counted), Some(400_000_000));
    }

    #[test]
    fn without_a_lower_cgroup_limit_the_machine_counts() {
        let root = cgroups(&[("memory.max", "max\n"), ("big/memory.max", "8589934592")]);
        for own in ["0::/\n", "0::/big", "0::/../..", "5:memory:/old", ""] {
            let memory = Memory::among(None, Some(4 * GIB), root.path(), own);
            assert_eq!(memory, Memory { limit: Some(4 * GIB / 100 * 85), cgroup: None }, "{own}");
        }
        assert_eq!(Memory::among(None, None, root.path(), "").limit, None);
        assert_eq!(
            Memory::among(Some(7), Some(GIB), root.path(), "").limit,
            Some(7),
            "what is configured counts first"
        );
    }

    #[test]
    fn this_process_uses_some_of_what_this_machine_has() {
        let memory = Memory::find(None);
        let used = memory.used().unwrap();
        assert!(used > 1 << 20 && used < memory.limit.unwrap(), "{used} of {memory:?}");
    }
}
