//! Metrics that every process has without asking: version, start, memory, files, threads, processor time, tasks.
//!
//! Read from `/proc/self` at each scrape; what the system does not tell is left out rather than shown as 0.

use std::fs;
use std::sync::LazyLock;
use std::sync::atomic::AtomicU64;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};

use super::Registry;
use crate::tasks::Tasks;

/// Linux reports processor time in this many ticks per second on every architecture (USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

static STARTED: LazyLock<f64> = LazyLock::new(|| crate::now() as f64 / 1000.0);

/// A registry with all of it.
pub(super) fn registry(tasks: &Tasks) -> Registry {
    let mut registry = Registry::default();
    let build_info = Family::<[(&'static str, &'static str); 1], Gauge>::default();
    build_info.get_or_create(&[("version", env!("CARGO_PKG_VERSION"))]).set(1);
    registry.register("isthmus_build_info", "1, labelled with the version of this program", build_info);
    let started = Gauge::<f64, AtomicU64>::default();
    started.set(*STARTED);
    registry.register("process_start_time_seconds", "Start of the process, in Unix time", started);
    registry.register_collector(Box::new(ProcFs));
    registry.register_collector(Box::new(TaskMetrics(tasks.clone())));
    registry
}

#[derive(Debug)]
struct ProcFs;

impl Collector for ProcFs {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: Option<i64>| match value {
            Some(value) => encode(&mut encoder, name, help, &ConstGauge::new(value)),
            None => Ok(()),
        };
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let resident = field(&status, "VmRSS:").map(|kibibytes| kibibytes.saturating_mul(1024));
        gauge("process_resident_memory_bytes", "Resident memory", resident)?;
        gauge("process_threads", "Threads of the operating system", field(&status, "Threads:"))?;
        let open_files = fs::read_dir("/proc/self/fd").ok().and_then(|files| i64::try_from(files.count()).ok());
        gauge("process_open_fds", "Open file descriptors", open_files)?;
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        match processor_seconds(&stat) {
            Some(seconds) => {
                let help = "Processor time, user and system";
                encode(&mut encoder, "process_cpu_seconds", help, &ConstCounter::new(seconds))
            }
            None => Ok(()),
        }
    }
}

#[derive(Debug)]
struct TaskMetrics(Tasks);

impl Collector for TaskMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let running = ConstGauge::new(0i64);
        let mut metric = encoder.encode_descriptor(
            "isthmus_runtime_tasks",
            "Tasks running, by name",
            None,
            running.metric_type(),
        )?;
        for (name, count) in self.0.running() {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(metric.encode_family(&[("task", name)])?)?;
        }
        let panics = ConstCounter::new(0u64);
        let help = "Tasks that panicked, by name";
        let mut metric = encoder.encode_descriptor("isthmus_runtime_task_panics", help, None, panics.metric_type())?;
        for (name, count) in self.0.panics() {
            ConstCounter::new(count).encode(metric.encode_family(&[("task", name)])?)?;
        }
        Ok(())
    }
}

fn encode(encoder: &mut DescriptorEncoder, name: &str, help: &str, metric: &impl EncodeMetric) -> std::fmt::Result {
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

/// The number after `name` in a `/proc` table of `name: number` lines.
fn field(table: &str, name: &str) -> Option<i64> {
    table.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// User plus system time of `/proc/self/stat`: fields 14 and 15. Counted behind the command's closing parenthesis, since
/// the command itself may hold spaces.
fn processor_seconds(stat: &str) -> Option<f64> {
    let (_, behind) = stat.rsplit_once(')')?;
    let mut ticks = behind.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (ticks.next()?.parse().ok()?, ticks.next()?.parse().ok()?);
    Some((user + system) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_survives_a_command_with_spaces_and_parentheses() {
        let stat = "42 (tokio) worker (1)) S 1 42 42 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 4 0 100 0 0";
        assert_eq!(processor_seconds(stat), Some(2.0));
    }

    #[test]
    fn a_field_that_is_missing_or_no_number_is_none() {
        let table = "VmRSS:\t  1234 kB\nThreads:\tmany\n";
        assert_eq!(field(table, "VmRSS:"), Some(1234));
        assert_eq!(field(table, "Threads:"), None);
        assert_eq!(field(table, "VmHWM:"), None);
    }
}
