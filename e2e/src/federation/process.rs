//! One program: started with its output in a log file, watched, terminated or killed. Dies with its parent.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    time::{Instant, sleep, timeout, timeout_at},
};

/// The project's programs, as built, and Envoy.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each field is the program of its name")]
pub struct Binaries {
    pub global_cp: PathBuf,
    pub agent: PathBuf,
    pub gateway: PathBuf,
    pub dns: PathBuf,
    pub isthmusctl: PathBuf,
    pub shop: PathBuf,
    pub envoy: PathBuf,
}

/// The project's program `name`, as built: beside the running one, or in `ISTHMUS_BIN_DIR`.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let dir = match std::env::var_os("ISTHMUS_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let exe = std::env::current_exe().context("find the running program")?;
            let dir = exe.parent().context("the running program has no folder")?;
            // Tests run from target/<profile>/deps.
            if dir.ends_with("deps") { dir.join("..") } else { dir.to_owned() }
        }
    };
    let path = dir.join(name);
    ensure!(path.is_file(), "{} is missing: run `cargo build --workspace --bins`", path.display());
    path.canonicalize().with_context(|| format!("resolve {}", path.display()))
}

impl Binaries {
    /// Each as [`program`] finds it; Envoy from `ISTHMUS_ENVOY` or the repository's tools folder.
    pub fn find() -> anyhow::Result<Self> {
        let envoy = match std::env::var_os("ISTHMUS_ENVOY") {
            Some(path) => PathBuf::from(path),
            None => super::repository().join(".tools/envoy/envoy"),
        };
        ensure!(envoy.is_file(), "Envoy is missing at {}: run `make envoy`, or set ISTHMUS_ENVOY", envoy.display());
        Ok(Self {
            global_cp: program("isthmus-global-cp")?,
            agent: program("isthmus-agent")?,
            gateway: program("isthmus-gateway")?,
            dns: program("isthmus-dns")?,
            isthmusctl: program("isthmusctl")?,
            shop: program("isthmus-shop")?,
            envoy: envoy.canonicalize().context("resolve Envoy's path")?,
        })
    }
}

/// A program with its arguments, running or not. Dropping it kills it.
pub struct Process {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    log: PathBuf,
    health: Option<SocketAddr>,
    child: Option<Child>,
    starts: u32,
}

impl Process {
    /// Describes a program; `dir` gets its log, `<name>.log`.
    pub fn new(name: impl Into<String>, program: &Path, dir: &Path) -> Self {
        let name = name.into();
        let log = dir.join("logs").join(format!("{}.log", name.replace('/', "-")));
        Self { name, program: program.to_owned(), args: vec![], log, health: None, child: None, starts: 0 }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Where `/readyz` is served.
    pub fn health(mut self, address: SocketAddr) -> Self {
        self.health = Some(address);
        self
    }

    /// For example "us-east/gateway-1".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that gets standard output and error, over all starts.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Of the running process.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }

    /// Starts it. `setpriv` makes the kernel kill it when this process dies, however that happens.
    pub fn start(&mut self) -> anyhow::Result<()> {
        ensure!(!self.is_running(), "{} runs already", self.name);
        if let Some(dir) = self.log.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&self.program)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log")?)
            .stderr(log)
            // Ctrl-C at the terminal is for the parent, which then ends its children in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {} (is `setpriv` from util-linux installed?)", self.program.display()))?;
        self.child = Some(child);
        self.starts += 1;
        Ok(())
    }

    /// Still there?
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Waits until `/readyz` says 200, or fails with the log's end if the process dies or the deadline passes.
    pub async fn ready(&mut self, within: Duration) -> anyhow::Result<()> {
        let health = self.health.with_context(|| format!("{} has no health address", self.name))?;
        let deadline = Instant::now() + within;
        loop {
            ensure!(self.is_running(), "{} ended while starting; {}", self.name, self.tail());
            let status = timeout(Duration::from_secs(2), http_get(health, "/readyz")).await;
            if matches!(&status, Ok(Ok(answer)) if answer.0 == 200) {
                // Another program on that address may have answered.
                ensure!(self.is_running(), "{} ended while starting; {}", self.name, self.tail());
                return Ok(());
            }
            if Instant::now() > deadline {
                let why = match status {
                    Ok(Ok((code, body))) => format!("/readyz says {code}: {}", body.trim()),
                    Ok(Err(e)) => format!("/readyz on {health}: {e:#}"),
                    Err(_) => format!("/readyz on {health} does not answer"),
                };
                bail!("{} is not ready after {within:?}: {why}; {}", self.name, self.tail());
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// SIGTERM, if it runs.
    pub fn terminate(&mut self) {
        self.signal("TERM");
    }

    /// Sends `signal` (for example "STOP") to the running process.
    pub fn signal(&mut self, signal: &str) {
        if let Some(pid) = self.pid() {
            // A process that has just ended needs no signal.
            std::process::Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status().ok();
        }
    }

    /// SIGKILL, and waits for the end.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().await.with_context(|| format!("kill {}", self.name))?;
        }
        Ok(())
    }

    /// SIGKILL and a new start, waiting until ready if it has a health address.
    pub async fn restart(&mut self, within: Duration) -> anyhow::Result<()> {
        self.kill().await?;
        self.start()?;
        if self.health.is_some() { self.ready(within).await } else { Ok(()) }
    }

    /// Waits for the end until `deadline`, then kills.
    pub async fn reap_until(&mut self, deadline: Instant) {
        if let Some(mut child) = self.child.take()
            && timeout_at(deadline, child.wait()).await.is_err()
        {
            child.kill().await.ok();
        }
    }

    /// The exit status, once it has ended.
    pub async fn wait(&mut self, within: Duration) -> anyhow::Result<std::process::ExitStatus> {
        let child = self.child.as_mut().with_context(|| format!("{} does not run", self.name))?;
        timeout(within, child.wait()).await.with_context(|| format!("{} still runs", self.name))?.context("wait")
    }

    /// The log's last lines, for error messages.
    pub fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(12).collect();
        let lines: Vec<&str> = lines.into_iter().rev().collect();
        format!("the end of {}:\n  {}", self.log.display(), lines.join("\n  "))
    }
}

/// `GET path` over HTTP/1.1; status and body.
pub async fn http_get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address).await.context("connect")?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.take(4 << 20).read_to_string(&mut text).await?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    let code = head.split(' ').nth(1).context("no status")?.parse().context("no status")?;
    Ok((code, body.to_owned()))
}
