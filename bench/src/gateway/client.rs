//! The load's two processes, from the outside: commands in, answers out.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout},
    time::timeout,
};

use super::{
    place::{End, Place},
    process::{Process, this_program},
    system::SERVER_PORT,
};
use crate::load::command::Command;

/// A running client. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Client {
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Client {
    /// At the near end.
    pub(super) fn start(place: &Place, threads: usize) -> anyhow::Result<Self> {
        let mut command = place.command(End::Near, this_program());
        command.args([crate::INTERNAL_CLIENT, "--threads", &threads.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().context("start the client")?;
        let input = child.stdin.take().context("the client has no input")?;
        let output = BufReader::new(child.stdout.take().context("the client has no output")?).lines();
        Ok(Self { input, output, _child: child })
    }

    /// Has one command obeyed.
    pub(super) async fn ask<T: DeserializeOwned>(&mut self, command: &Command, within: Duration) -> anyhow::Result<T> {
        let mut line = serde_json::to_string(command).context("write a command")?;
        line.push('\n');
        let exchange = async {
            self.input.write_all(line.as_bytes()).await.context("tell the client")?;
            self.output.next_line().await.context("hear the client")?.context("the client is gone")
        };
        let text = timeout(within, exchange).await.context("the client does not answer")??;
        let answer: Value = serde_json::from_str(&text).context("understand the client")?;
        if let Some(error) = answer.get("error").and_then(Value::as_str) {
            bail!("{error}");
        }
        serde_json::from_value(answer).context("understand the client's answer")
    }
}

/// Starts the server at the far end.
pub(super) fn server(place: &Place, threads: usize, dir: &Path) -> anyhow::Result<Process> {
    let listen = SocketAddr::from(([0, 0, 0, 0], SERVER_PORT));
    let mut command = place.command(End::Far, this_program());
    command.args([crate::INTERNAL_SERVER, "--listen", &listen.to_string(), "--threads", &threads.to_string()]);
    Process::start("server", command, dir)
}
