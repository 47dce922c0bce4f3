//! What the kernel says of a running process.

use std::fs;

use anyhow::Context;

/// Its resident memory in bytes, now.
pub(crate) fn resident(pid: u32) -> anyhow::Result<f64> {
    status(pid, "VmRSS")
}

/// And the most that it ever was.
pub(crate) fn resident_peak(pid: u32) -> anyhow::Result<f64> {
    status(pid, "VmHWM")
}

fn status(pid: u32, field: &str) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    parse(&text, field).with_context(|| format!("find {field} in {path}"))
}

/// From `VmRSS:     1234 kB`.
fn parse(text: &str, field: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024.0)
}

/// Processor time that it has used, in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let ticks = cpu_ticks(&text).with_context(|| format!("understand {path}"))?;
    Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
}

/// User and system time; the name before them may hold blanks and parentheses.
fn cpu_ticks(text: &str) -> Option<f64> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_time_are_found_in_what_the_kernel_writes() {
        assert_eq!(parse("VmHWM:\t  20 kB\nVmRSS:\t    1234 kB\n", "VmRSS"), Some(1_263_616.0));
        assert_eq!(parse("VmHWM:\t  20 kB\n", "VmRSS"), None);
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 0 0 0 150 25 0 0 20 0 4 0 1";
        assert_eq!(cpu_ticks(stat), Some(175.0));
    }

    #[test]
    fn our_own_memory_is_some() {
        let own = std::process::id();
        assert!(resident(own).unwrap() > 1e6 && resident_peak(own).unwrap() >= resident(own).unwrap() * 0.9);
        assert!(cpu_seconds(own).unwrap() >= 0.0);
    }
}
