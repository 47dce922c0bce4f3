//! One Envoy process, which never outlives the launcher.
//!
//! A normal stop is the supervisor's affair. If the launcher itself is killed nothing runs any more that could stop Envoy, so
//! the kernel must: `setpriv --pdeathsig KILL` (util-linux) sets the parent-death signal and then becomes Envoy. That signal
//! comes when the *thread* ends that started the child, so each Envoy has a thread of its own, which starts it and waits for
//! it. Without `setpriv` an Envoy left behind is found by its admin socket at the next start.

use std::{
    fs::OpenOptions,
    io,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    thread,
};

use tokio::{process::Command, runtime, sync::oneshot};

/// Becomes Envoy unless the launcher died before the signal was set, when it would never come.
const STILL_OURS: &str = r#"[ "$PPID" = "$1" ] || exit 1; shift; exec "$@""#;

/// What to start.
#[derive(Clone, Debug)]
pub(super) struct Launch {
    pub(super) envoy: PathBuf,
    pub(super) bootstrap: PathBuf,
    pub(super) log: Option<PathBuf>,
    pub(super) log_level: &'static str,
    /// `None`: not installed.
    pub(super) setpriv: Option<PathBuf>,
}

/// A running Envoy. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: Option<u32>,
    kill: Option<oneshot::Sender<()>>,
    exit: oneshot::Receiver<io::Result<ExitStatus>>,
}

impl Launch {
    /// Starts Envoy; returns when it runs or could not be started.
    pub(super) async fn start(&self) -> io::Result<Process> {
        let (started_tx, started) = oneshot::channel();
        let (kill, killed) = oneshot::channel::<()>();
        let (exit_tx, exit) = oneshot::channel();
        let launch = self.clone();
        // Not a task: the child's life hangs on this very thread, and a pool may end its threads.
        thread::Builder::new().name("envoy".to_owned()).spawn(move || {
            let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(e) => return drop(started_tx.send(Err(e))),
            };
            let outcome = runtime.block_on(async {
                let mut child = match launch.command().and_then(|mut c| c.spawn()) {
                    Ok(child) => child,
                    Err(e) => {
                        drop(started_tx.send(Err(e)));
                        return None;
                    }
                };
                drop(started_tx.send(Ok(child.id())));
                Some(tokio::select! {
                    status = child.wait() => status,
                    // Also when the sender is dropped.
                    _ = killed => match child.start_kill() {
                        Ok(()) => child.wait().await,
                        Err(e) => Err(e),
                    },
                })
            });
            if let Some(outcome) = outcome {
                drop(exit_tx.send(outcome));
            }
        })?;
        let pid = started.await.map_err(io::Error::other)??;
        Ok(Process { pid, kill: Some(kill), exit })
    }

    fn command(&self) -> io::Result<Command> {
        let mut command = match &self.setpriv {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL", "--", "/bin/sh", "-c", STILL_OURS, "sh"]);
                command.arg(std::process::id().to_string()).arg(&self.envoy);
                command
            }
            None => Command::new(&self.envoy),
        };
        command
            .arg("--config-path")
            .arg(&self.bootstrap)
            .args(["--concurrency", "1"])
            // Shared memory and sockets of hot restart would be left behind by a kill, and nobody restarts hot here.
            .arg("--disable-hot-restart")
            .args(["--log-level", self.log_level])
            // A terminal's Ctrl-C is for the launcher, which then drains Envoy.
            .process_group(0)
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some(path) = &self.log {
            command.stderr(Stdio::from(OpenOptions::new().create(true).append(true).open(path)?));
        }
        Ok(command)
    }
}

impl Process {
    /// Resolves when Envoy has ended. Cancel-safe; after it has resolved once it does not again.
    pub(super) async fn exited(&mut self) -> io::Result<ExitStatus> {
        (&mut self.exit).await.map_err(io::Error::other)?
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) {
        self.kill.take();
    }
}

/// `setpriv` in the usual places.
pub(super) fn find_setpriv() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/bin".into()])
        .map(|dir| dir.join("setpriv"))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::fs::PermissionsExt, path::Path, time::Duration};

    use isthmus_runtime::wait::wait_for;
    use tokio::{
        io::{AsyncBufReadExt, BufReader},
        time::timeout,
    };

    use super::*;

    /// Names the folder of the launcher that the test kills.
    const ROLE: &str = "ISTHMUS_TEST_ENVOY";
    /// Only a hang takes so long; a loaded machine may need seconds to start a process.
    const DEADLINE: Duration = Duration::from_secs(30);

    fn launch(envoy: &Path) -> Launch {
        Launch {
            envoy: envoy.to_owned(),
            bootstrap: "/nonexistent".into(),
            log: None,
            log_level: "error",
            setpriv: Some(find_setpriv().expect("setpriv of util-linux is needed")),
        }
    }

    fn runs(pid: u32) -> bool {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie has ended; whoever is its parent now has yet to fetch it.
        state.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    }

    /// The launcher to be killed: starts a child in Envoy's place, tells its pid, and lives for as long as the test.
    async fn be_launcher(dir: &Path) {
        // Written here, where no other thread starts processes: one that inherited the open file would keep it "busy".
        let envoy = dir.join("envoy");
        std::fs::write(&envoy, "#!/bin/sh\n: > \"$0.up\"\nexec sleep 600\n").unwrap();
        std::fs::set_permissions(&envoy, std::fs::Permissions::from_mode(0o755)).unwrap();
        let child = launch(&envoy).start().await.unwrap();
        println!("\npid {}", child.pid.unwrap());
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    }

    /// Runs itself once more as the launcher to be killed.
    #[tokio::test]
    async fn envoy_dies_with_a_launcher_that_is_killed() {
        if let Some(dir) = std::env::var_os(ROLE) {
            return be_launcher(Path::new(&dir)).await;
        }
        let dir = tempfile::tempdir().unwrap();
        let name = "sidecar::process::tests::envoy_dies_with_a_launcher_that_is_killed";
        // Not `current_exe`, whose path is gone once a build has replaced the file.
        let mut launcher = Command::new("/proc/self/exe")
            .args([name, "--exact", "--nocapture"])
            .env(ROLE, dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
        let pid = async {
            loop {
                let line = lines.next_line().await.unwrap().expect("the launcher ended");
                if let Some(pid) = line.strip_prefix("pid ") {
                    return pid.parse().unwrap();
                }
            }
        };
        let pid = timeout(DEADLINE, pid).await.expect("no pid");
        // From here on only the parent-death signal can end it.
        wait_for("the child to run", DEADLINE, async || dir.path().join("envoy.up").exists()).await.unwrap();
        assert!(runs(pid));
        launcher.kill().await.unwrap();
        wait_for("the child to die", DEADLINE, async || !runs(pid)).await.unwrap();
    }

    #[tokio::test]
    async fn a_killed_process_and_one_that_cannot_start_are_told() {
        let mut sleeper = launch(Path::new("/bin/sh"));
        sleeper.setpriv = None;
        // A shell does not know Envoy's options and ends at once.
        assert!(!sleeper.start().await.unwrap().exited().await.unwrap().success());
        sleeper.envoy = "/nonexistent/envoy".into();
        assert_eq!(sleeper.start().await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
