//! Where a run takes place: network and mount namespaces that end with it, a network namespace for each node in them, and
//! small disks. Nothing of it is seen outside, and nothing of it stays behind, however the run ends.
//!
//! Each node has a link of its own to the middle, where the test is; the middle forwards between the nodes and is where
//! partitions are made, so that the test itself always reaches all. Addresses are of 198.18.0.0/15; there is no route out.
//! Root is not needed where the system lets users make namespaces.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};

/// Set for the process within.
const WITHIN: &str = "ISTHMUS_FAULTS_WITHIN";
const HANDLES: &str = "/run/netns";
/// Of each node's state: room for log, snapshot, and the next snapshot.
const DISK: &str = "96m";
/// Where nodes serve agents and each other.
pub(crate) const GRPC: u16 = 7443;

/// Runs `body`, which is the whole of the test `name`, within namespaces of its own: in a process of its own.
pub(crate) fn within(name: &str, body: impl AsyncFnOnce()) {
    if std::env::var_os(WITHIN).is_some() {
        enter().expect("prepare the namespaces");
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        return runtime.block_on(body());
    }
    let exe = std::env::current_exe().expect("the running program");
    let mut command = Command::new("unshare");
    if !is_root() {
        command.arg("--map-root-user");
    }
    // `setpriv` last: what changes credentials forgets whom to die with.
    let command = command
        .args(["--net", "--mount", "--propagation", "private", "--", "setpriv", "--pdeathsig", "KILL", "--"])
        .arg(exe)
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(WITHIN, "1")
        .stdin(Stdio::null());
    let status = command.status().expect("run `unshare` (of util-linux)");
    assert!(
        status.success(),
        "{name} failed, as told above (namespaces need root, or a system that lets users make them)"
    );
}

fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|text| text.contains("\nUid:\t0\t0\t"))
}

fn enter() -> anyhow::Result<()> {
    // Handles of namespaces, and what libfaketime shares, vanish with the mounts.
    for folder in ["/run", "/dev/shm"] {
        run("mount", &["-t", "tmpfs", "tmpfs", folder])?;
    }
    std::fs::create_dir_all(HANDLES).context("make the folder of namespaces")?;
    run("ip", &["link", "set", "lo", "up"])?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("let the middle forward")?;
    rules("table ip faults {\n chain cuts {\n type filter hook forward priority 0; policy accept;\n }\n}\n")
}

/// What is lost on the way from one node to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Every packet.
    All,
    /// Those of connections that the one makes to the other: it is heard, and asks nothing.
    Requests,
}

/// Makes these cuts, and no others: from, to, what. Nodes are counted from 1.
pub(crate) fn cut(cuts: &[(u8, u8, Lost)]) {
    let mut text = "flush chain ip faults cuts\n".to_owned();
    for (from, to, lost) in cuts {
        let (from, to) = (address(*from), address(*to));
        let ports = match lost {
            Lost::All => String::new(),
            Lost::Requests => format!("tcp dport {GRPC} "),
        };
        text.push_str(&format!("add rule ip faults cuts ip saddr {from} ip daddr {to} {ports}drop\n"));
    }
    rules(&text).expect("cut links");
}

/// Of node `number`.
pub(crate) fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, number, 2)
}

pub(crate) fn at(number: u8, port: u16) -> SocketAddr {
    (address(number), port).into()
}

/// The namespace of node `number`, with its link to the middle, made if it is not there; the handle to enter it by.
pub(crate) fn node(number: u8) -> PathBuf {
    let handle = Path::new(HANDLES).join(format!("n{number}"));
    if handle.exists() {
        return handle;
    }
    let make = || -> anyhow::Result<()> {
        let (name, link, middle) = (format!("n{number}"), format!("v{number}"), format!("198.18.{number}.1"));
        run("ip", &["netns", "add", &name])?;
        run("ip", &["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
        run("ip", &["addr", "add", &format!("{middle}/30"), "dev", &link])?;
        run("ip", &["link", "set", &link, "up"])?;
        run("ip", &["-n", &name, "addr", "add", &format!("{}/30", address(number)), "dev", "eth0"])?;
        run("ip", &["-n", &name, "link", "set", "eth0", "up"])?;
        run("ip", &["-n", &name, "link", "set", "lo", "up"])?;
        run("ip", &["-n", &name, "route", "add", "default", "via", &middle])
    };
    make().expect("make a node's network");
    handle
}

/// A small disk at `folder`, in memory.
pub(crate) fn disk(folder: &Path) {
    std::fs::create_dir_all(folder).expect("make a state folder");
    let folder = folder.to_str().expect("a path in UTF-8");
    run("mount", &["-t", "tmpfs", "-o", &format!("size={DISK},mode=700"), "tmpfs", folder])
        .expect("mount a small disk");
}

/// Takes a disk away.
pub(crate) fn unmount(folder: &Path) {
    let folder = folder.to_str().expect("a path in UTF-8");
    // What is still mounted goes with the namespace.
    drop(run("umount", &["--lazy", folder]));
}

/// Takes what is left of the disk at `folder`.
pub(crate) fn fill(folder: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(folder.join("filler")).expect("make the filler");
    let block = vec![1_u8; 1 << 16];
    for size in [block.len(), 4096] {
        while file.write_all(&block[..size]).is_ok() {}
    }
}

/// Gives it back.
pub(crate) fn free(folder: &Path) {
    std::fs::remove_file(folder.join("filler")).expect("remove the filler");
}

/// Where libfaketime is, as Debian packs it.
pub(crate) fn faketime() -> PathBuf {
    let found = ["x86_64", "aarch64"]
        .map(|machine| PathBuf::from(format!("/usr/lib/{machine}-linux-gnu/faketime/libfaketimeMT.so.1")))
        .into_iter()
        .find(|path| path.is_file());
    found.expect("libfaketime is missing: make tools")
}

fn rules(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().context("run `nft`")?;
    nft.stdin.take().context("nft's input")?.write_all(text.as_bytes()).context("tell nft")?;
    ensure!(nft.wait().context("wait for nft")?.success(), "nft refused: {text}");
    Ok(())
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run `{program}`"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{program} {}` says: {}", arguments.join(" "), said.trim());
    Ok(())
}
