//! The real program: its command line, and what is left after kill -9.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests are tests; clippy knows only functions marked so"
)]

mod support;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use hyper::StatusCode;
use isthmus_identity::token::Token;
use isthmus_runtime::wait::wait_for;
use support::{Admin, Agent};

/// A process that does not outlive its test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_isthmus-global-cp"))
}

fn write_config(dir: &Path, text: &str) -> PathBuf {
    let file = dir.join("global-cp.yaml");
    std::fs::write(&file, text).unwrap();
    file
}

fn good_config(dir: &Path) -> PathBuf {
    let text = format!(
        "node: cp-1\nfederation: isthmus.example\nstateDir: {}\n\
         listen: {{ grpc: \"127.0.0.1:0\", admin: \"127.0.0.1:0\", health: \"127.0.0.1:0\" }}\n\
         settings: {{ failover: {{ holdDownMs: 3000 }} }}\n\
         raft: {{ snapshotAfterEntries: 20 }}\ntelemetry: {{ log: {{ level: warn, format: json }} }}\n",
        dir.join("state").display()
    );
    write_config(dir, &text)
}

fn start(config: &Path) -> Process {
    Process(program().args(["--config"]).arg(config).stdin(Stdio::null()).spawn().unwrap())
}

fn output(args: &[&str]) -> Output {
    program().args(args).stdin(Stdio::null()).output().unwrap()
}

/// The admin client of the process that runs now: its context file names the address.
async fn admin(dir: &Path) -> Admin {
    let state = dir.join("state");
    let mut found = None;
    wait_for("the control plane to answer", Duration::from_secs(20), async || {
        let Ok(context) = std::fs::read_to_string(state.join("admin/context.yaml")) else { return false };
        let address = context.lines().find_map(|line| line.strip_prefix("server: https://")).unwrap();
        let admin = Admin::of(&state, address.parse::<SocketAddr>().unwrap());
        let ready = admin.try_call("GET", "/v1/status", "").await.is_ok();
        found = ready.then_some(admin);
        ready
    })
    .await
    .unwrap();
    found.unwrap()
}

#[tokio::test]
async fn no_acknowledged_write_is_lost_to_kill_9() {
    isthmus_identity::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let config = good_config(dir.path());
    let stranger = Agent::new("stranger");
    let mut acknowledged: Vec<Token> = Vec::new();
    for round in 0..4_usize {
        let mut process = start(&config);
        let admin = admin(dir.path()).await;
        let address = admin.token("us-east", 900).await.address;
        for token in &acknowledged {
            // A token that is known is refused to another cluster for that reason, an unknown one for being unknown.
            let token = Token { address: address.clone(), ..token.clone() };
            let refusal = stranger.join(&token).await.unwrap_err();
            assert!(refusal.message().contains(&format!("is for cluster {}", token.cluster)), "{}", refusal.message());
        }
        // Writers go on until the process is gone from under them, at a different moment each time.
        let count = AtomicUsize::new(0);
        let writer = async |writer: usize| {
            let mut written = Vec::new();
            for i in 0.. {
                let path = format!("/v1/clusters/cluster-{round}-{writer}-{i}/join-token");
                let Ok((StatusCode::OK, answer)) = admin.try_call("POST", &path, "").await else { break };
                written.push(Token::parse(answer["token"].as_str().unwrap()).unwrap());
                count.fetch_add(1, Ordering::SeqCst);
            }
            written
        };
        let killer = async {
            let enough = async || count.load(Ordering::SeqCst) >= 5 + 7 * round;
            wait_for("some writes", Duration::from_secs(20), enough).await.unwrap();
            process.0.kill().unwrap();
        };
        let (one, other, ()) = tokio::join!(writer(1), writer(2), killer);
        acknowledged.extend(one.into_iter().chain(other));
    }
    assert!(acknowledged.len() >= 40, "{}", acknowledged.len());
}

#[tokio::test]
async fn a_new_epoch_begins_only_when_it_is_asked_for() {
    isthmus_identity::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let config = good_config(dir.path());
    let mut epochs = Vec::new();
    for args in [&[][..], &["--new-epoch"], &[]] {
        let process = Process(program().arg("--config").arg(&config).args(args).stdin(Stdio::null()).spawn().unwrap());
        epochs.push(admin(dir.path()).await.get("/v1/status").await["stamp"]["epoch"].clone());
        drop(process);
    }
    assert_eq!(epochs, [1, 2, 2]);
}

#[tokio::test]
async fn sigterm_drains_and_exits_cleanly() {
    isthmus_identity::install_crypto();
    let dir = tempfile::tempdir().unwrap();
    let mut process = start(&good_config(dir.path()));
    admin(dir.path()).await;
    let pid = process.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let mut status = None;
    wait_for("the exit", Duration::from_secs(10), async || {
        status = process.0.try_wait().unwrap();
        status.is_some()
    })
    .await
    .unwrap();
    assert!(status.unwrap().success(), "{status:?}");
}

#[test]
fn check_config_reports_all_problems_with_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let good = good_config(dir.path());
    assert!(output(&["--check-config", "--config", good.to_str().unwrap()]).status.success());

    let bad = write_config(
        dir.path(),
        "node: Not_A_Label\nfederation: isthmus.example\nstateDir: state\n\
         listen: { grpc: \"0.0.0.0:7443\", admin: \"0.0.0.0:7443\", health: \"127.0.0.1:0\" }\n",
    );
    let answer = output(&["--check-config", "--config", bad.to_str().unwrap()]);
    let text = String::from_utf8(answer.stderr).unwrap();
    assert!(!answer.status.success());
    for part in ["global-cp.yaml:1:", "node", "advertise", "listen.admin"] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
}

#[test]
fn help_shows_examples() {
    let text = String::from_utf8(output(&["--help"]).stdout).unwrap();
    assert!(text.contains("isthmus-global-cp --config global-cp.yaml"), "{text}");
}

#[test]
fn an_unwritable_state_folder_stops_the_program_before_it_listens() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("state"), "a file where the folder should be").unwrap();
    let config = good_config(dir.path());
    let answer = output(&["--config", config.to_str().unwrap()]);
    let text = String::from_utf8(answer.stderr).unwrap();
    assert!(!answer.status.success());
    assert!(text.contains(dir.path().join("state").to_str().unwrap()), "{text}");
}
