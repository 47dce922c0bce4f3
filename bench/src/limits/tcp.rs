//! Bulk over a TCP connection.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::anyhow;

use super::{Moved, cpu};

const CHUNK: usize = 256 * 1024;

pub(super) fn measure(time: Duration) -> anyhow::Result<Moved> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    let (began, before) = (Instant::now(), cpu());
    let reader = thread::spawn(move || -> std::io::Result<u64> {
        let (mut buffer, mut bytes) = (vec![0; CHUNK], 0);
        loop {
            match far.read(&mut buffer)? {
                0 => return Ok(bytes),
                n => bytes += n as u64,
            }
        }
    });
    let chunk = vec![7; CHUNK];
    while began.elapsed() < time {
        near.write_all(&chunk)?;
    }
    near.shutdown(Shutdown::Write)?;
    let bytes = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
    Ok(Moved::since(began, before, bytes))
}
