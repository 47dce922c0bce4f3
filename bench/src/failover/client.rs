//! HTTP/1.1 as an app speaks it to its sidecar: keep-alive connections, reused while they last.
//!
//! A request that finds a reused connection closed before any byte of an answer gets a fresh one, as in every client
//! library; nothing else is tried again. Answers need a `content-length`.

use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// No answer here has more.
const MAX_HEAD: usize = 16 * 1024;
const MAX_BODY: usize = 64 * 1024;

/// A pool of connections to one address.
pub(super) struct Client {
    target: SocketAddr,
    host: String,
    idle: Mutex<Vec<TcpStream>>,
}

/// An answer.
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// Why there was no answer.
#[derive(Debug)]
pub(super) enum CallError {
    Connect(std::io::Error),
    /// Closed without a byte of an answer.
    NoAnswer,
    /// Broken off or not to be understood.
    Answer(String),
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(e) => write!(f, "connect: {e}"),
            Self::NoAnswer => write!(f, "closed without an answer"),
            Self::Answer(what) => write!(f, "answer: {what}"),
        }
    }
}

impl Client {
    pub(super) fn new(target: SocketAddr, host: &str) -> Self {
        Self { target, host: host.to_owned(), idle: Mutex::default() }
    }

    /// One exchange. The caller sets the deadline; cut short, the connection is closed.
    pub(super) async fn send(&self, method: &str, path: &str) -> Result<Reply, CallError> {
        let text = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-length: 0\r\n\r\n", self.host);
        // Two statements: the lock must not be held across the exchange.
        let reused = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(stream) = reused {
            match self.exchange(stream, &text).await {
                Err(CallError::NoAnswer) => {}
                outcome => return outcome,
            }
        }
        let stream = TcpStream::connect(self.target).await.map_err(CallError::Connect)?;
        stream.set_nodelay(true).map_err(CallError::Connect)?;
        self.exchange(stream, &text).await
    }

    async fn exchange(&self, mut stream: TcpStream, text: &str) -> Result<Reply, CallError> {
        if stream.write_all(text.as_bytes()).await.is_err() {
            return Err(CallError::NoAnswer);
        }
        let mut buffer = Vec::with_capacity(1024);
        let (head, length) = loop {
            let read = stream.read_buf(&mut buffer).await;
            match read {
                Ok(0) | Err(_) if buffer.is_empty() => return Err(CallError::NoAnswer),
                Ok(0) => return Err(CallError::Answer("broken off in its head".to_owned())),
                Err(e) => return Err(CallError::Answer(e.to_string())),
                Ok(_) => {}
            }
            if let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                let (head, _) = buffer.split_at(end);
                let head = Head::parse(&String::from_utf8_lossy(head)).map_err(CallError::Answer)?;
                break (head, end + 4);
            }
            if buffer.len() > MAX_HEAD {
                return Err(CallError::Answer("its head is too long".to_owned()));
            }
        };
        let mut body = buffer.split_off(length);
        while body.len() < head.length {
            match stream.read_buf(&mut body).await {
                Ok(0) => return Err(CallError::Answer("broken off in its body".to_owned())),
                Err(e) => return Err(CallError::Answer(e.to_string())),
                Ok(_) => {}
            }
        }
        if !head.closes && body.len() == head.length {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
        }
        Ok(Reply { status: head.status, body })
    }
}

struct Head {
    status: u16,
    length: usize,
    closes: bool,
}

impl Head {
    fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.split("\r\n");
        let first = lines.next().unwrap_or_default();
        let status = first.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(|| format!("not HTTP/1.1: {first}"))?;
        let (mut length, mut closes) = (None, false);
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                length = value.parse().ok().filter(|n| *n <= MAX_BODY);
            } else if name.eq_ignore_ascii_case("connection") {
                closes = value.eq_ignore_ascii_case("close");
            }
        }
        let length = length.ok_or_else(|| format!("{status} without a usable content-length"))?;
        Ok(Self { status, length, closes })
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

    /// Serves each connection the given number of answers, then closes it.
    async fn server(answers: Vec<usize>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            for n in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                for _ in 0..n {
                    let mut request = [0; 1024];
                    assert!(stream.read(&mut request).await.unwrap() > 0);
                    stream.write_all(ANSWER).await.unwrap();
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn a_connection_is_reused_and_a_stale_one_replaced_once() {
        // Two on the first connection, which then closes; the third must go over a second one.
        let client = Client::new(server(vec![2, 1]).await, "cart");
        for _ in 0..3 {
            let reply = client.send("GET", "/").await.unwrap();
            assert_eq!((reply.status, reply.body.as_slice()), (200, b"ok".as_slice()));
        }
        assert!(matches!(client.send("GET", "/").await, Err(CallError::NoAnswer | CallError::Connect(_))));
    }

    #[test]
    fn heads_without_a_length_are_refused() {
        assert!(Head::parse("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked").is_err());
        let head = Head::parse("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 7\r\nconnection: close").unwrap();
        assert_eq!((head.status, head.length, head.closes), (503, 7, true));
    }
}
