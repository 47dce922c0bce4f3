//! A network namespace of the benchmark's own: fixed loopback addresses clash with nobody, and packets can be made to vanish.
//!
//! The program runs itself again inside (with a process namespace too, so that at the end, however it comes, the kernel
//! ends everything that was started in it). There is no way out of it but loopback.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use tokio::{
    io::AsyncWriteExt,
    process::Command,
    signal::unix::{SignalKind, signal},
    time::timeout,
};

/// Set for the run inside.
const INSIDE: &str = "ISTHMUS_BENCH_INSIDE";
const TOOL_DEADLINE: Duration = Duration::from_secs(10);
const RULES: &str = "table inet fault {\n  set gone { type ipv4_addr; }\n  chain in {\n    \
                     type filter hook input priority 0;\n    ip saddr @gone counter drop\n    \
                     ip daddr @gone counter drop\n  }\n}\n";

/// True in the process that runs inside.
pub(super) fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program again, with the same arguments, in fresh namespaces; returns how it ended, or none if a signal ended it.
pub(super) async fn enter() -> anyhow::Result<Option<ExitStatus>> {
    let this = std::env::current_exe().context("find the running program")?;
    let root = std::fs::metadata("/proc/self").context("look at /proc/self")?.uid() == 0;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child"]);
    if !root {
        command.arg("--map-root-user");
    }
    command
        .arg("--")
        .arg(this)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let mut child = command.spawn().context("run setpriv and unshare (Debian's util-linux)")?;
    let mut int = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut term = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    tokio::select! {
        status = child.wait() => Ok(Some(status.context("wait for the run inside")?)),
        // Dropping the child ends it, and with it all that lives in the process namespace.
        _ = int.recv() => Ok(None),
        _ = term.recv() => Ok(None),
    }
}

/// Loopback comes up and the (still empty) set of vanished addresses is there.
pub(super) async fn set_up() -> anyhow::Result<()> {
    tool("ip", &["link", "set", "lo", "up"], "").await?;
    tool("nft", &["-f", "-"], RULES).await
}

/// From now on nothing from or to these addresses arrives, and nobody is told.
///
/// Packets are dropped where they come in: dropped on the way out, the sender would get an error.
pub(super) async fn vanish(addresses: &BTreeSet<IpAddr>) -> anyhow::Result<()> {
    let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    tool("nft", &["-f", "-"], &format!("add element inet fault gone {{ {} }}\n", list.join(", "))).await
}

/// All addresses are back.
pub(super) async fn reappear() -> anyhow::Result<()> {
    tool("nft", &["-f", "-"], "flush set inet fault gone\n").await
}

async fn tool(program: &str, args: &[&str], input: &str) -> anyhow::Result<()> {
    let run = async {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("run {program} (Debian's packages iproute2 and nftables)"))?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(input.as_bytes()).await.context("write to its input")?;
        drop(stdin);
        let output = child.wait_with_output().await.context("wait for it")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{program} {} failed: {}", args.join(" "), said.trim());
        anyhow::Ok(())
    };
    timeout(TOOL_DEADLINE, run).await.with_context(|| format!("{program} does not end"))?
}
