//! `orders`: a line protocol in which the server speaks first, as SMTP and MySQL do.
//!
//! Server: `220 orders <cluster> <instance>`; client: `ORDER <text>`; server: `250 <text>`; client: `QUIT`.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};

use super::Instance;

const IDLE: Duration = Duration::from_secs(60);

/// Serves the protocol on `listener`.
pub async fn serve(listener: TcpListener, me: Instance) -> anyhow::Result<()> {
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.context("accept")?;
                let me = me.clone();
                // A session's end, good or bad, concerns its client alone.
                sessions.spawn(async move { session(stream, me).await.ok() });
            }
            Some(_) = sessions.join_next() => {}
        }
    }
}

async fn session(stream: TcpStream, me: Instance) -> anyhow::Result<()> {
    let (read, mut write) = stream.into_split();
    write.write_all(format!("220 orders {} {}\r\n", me.cluster, me.instance).as_bytes()).await?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = timeout(IDLE, lines.next_line()).await.context("idle")?? {
        match line.split_once(' ') {
            Some(("ORDER", text)) => write.write_all(format!("250 {text}\r\n").as_bytes()).await?,
            _ if line == "QUIT" => break,
            _ => write.write_all(b"500 say ORDER <text> or QUIT\r\n").await?,
        }
    }
    Ok(())
}

/// One whole session as a client, within `deadline`: connect, greeting, an order, its confirmation. Returns the cluster
/// that served it.
pub async fn place_order(address: std::net::SocketAddr, text: &str, deadline: Duration) -> anyhow::Result<String> {
    let run = async {
        let stream = TcpStream::connect(address).await.context("connect")?;
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let greeting = lines.next_line().await.context("greeting")?.context("closed before the greeting")?;
        let Some(("220", rest)) = greeting.split_once(' ') else { bail!("greeting was {greeting:?}") };
        let cluster = rest.split(' ').nth(1).context("greeting names no cluster")?.to_owned();
        write.write_all(format!("ORDER {text}\n").as_bytes()).await.context("order")?;
        let reply = lines.next_line().await.context("confirmation")?.context("closed before the confirmation")?;
        if reply != format!("250 {text}") {
            bail!("confirmation was {reply:?}");
        }
        write.write_all(b"QUIT\n").await.ok();
        Ok(cluster)
    };
    timeout(deadline, run).await.context("timed out")?
}
