//! The TLS 1.3 handshake, made by rustls: from a TCP connection to the keys of an established one.
//!
//! What the peer sent behind its handshake comes along. A failed handshake tells the peer why, by rustls' alert. The
//! caller sets the deadline.

use std::{io, sync::Arc};

use bytes::{Bytes, BytesMut};
use rustls::{
    ClientConfig, CommonState, Error, ExtractedSecrets, HandshakeKind, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::{CertificateDer, ServerName},
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::keys::Keys;

/// Read at a time.
const READ: usize = 4 * 1024;
/// More than any handshake of ours needs.
const MAX_INCOMING: usize = 128 * 1024;

/// An established connection.
pub(in super::super) struct Established {
    pub(super) tcp: TcpStream,
    pub(super) secrets: ExtractedSecrets,
    pub(super) keys: Keys,
    /// Came with the handshake: what was opened, and what is not whole yet.
    pub(super) received: Vec<Bytes>,
    pub(super) incoming: BytesMut,
    /// The peer's certificate.
    pub(in super::super) leaf: Option<CertificateDer<'static>>,
    /// Whether the peer's certificate was verified in this very handshake, and not in the one that it resumes.
    pub(in super::super) verified: bool,
}

/// As client.
pub(in super::super) async fn connect(
    config: &Arc<ClientConfig>,
    name: ServerName<'static>,
    tcp: TcpStream,
) -> io::Result<Established> {
    establish(UnbufferedClientConnection::new(config.clone(), name).map_err(invalid)?, tcp).await
}

/// As server.
pub(in super::super) async fn accept(config: &Arc<ServerConfig>, tcp: TcpStream) -> io::Result<Established> {
    establish(UnbufferedServerConnection::new(config.clone()).map_err(invalid)?, tcp).await
}

async fn establish<S: Side>(mut side: S, mut tcp: TcpStream) -> io::Result<Established> {
    let mut incoming = BytesMut::new();
    let mut outgoing = Vec::new();
    let mut received = Vec::new();
    loop {
        let step = step(&mut side, &mut incoming, &mut outgoing, &mut received);
        // What there is to say is said, be it why the handshake failed.
        if !outgoing.is_empty() && !matches!(step, Ok(Step::Again)) {
            tcp.write_all(&outgoing).await?;
            outgoing.clear();
        }
        match step? {
            Step::Again => {}
            Step::Read => {
                if incoming.len() > MAX_INCOMING {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "the handshake is too long"));
                }
                incoming.reserve(READ);
                if tcp.read_buf(&mut incoming).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Step::Done => break,
        }
    }
    let common = side.common();
    let leaf = common.peer_certificates().and_then(|chain| chain.first()).cloned().map(CertificateDer::into_owned);
    let verified = common.handshake_kind().is_some_and(|kind| kind != HandshakeKind::Resumed);
    let (secrets, keys) = side.into_keys().map_err(invalid)?;
    Ok(Established { tcp, secrets, keys, received, incoming, leaf, verified })
}

enum Step {
    Again,
    Read,
    Done,
}

/// As far as it goes without IO.
fn step<S: Side>(
    side: &mut S,
    incoming: &mut BytesMut,
    outgoing: &mut Vec<u8>,
    received: &mut Vec<Bytes>,
) -> io::Result<Step> {
    let UnbufferedStatus { mut discard, state } = side.process(incoming);
    let next = match state {
        Ok(ConnectionState::EncodeTlsData(data)) => encode(data, outgoing).map(|()| Step::Again),
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            transmit.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            while let Some(record) = traffic.next_record() {
                let record = record.map_err(invalid)?;
                discard += record.discard;
                received.push(Bytes::copy_from_slice(record.payload));
            }
            Ok(Step::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Read),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) => {
            // The alert, if there is one.
            if let Ok(ConnectionState::EncodeTlsData(alert)) = side.process(&mut []).state {
                drop(encode(alert, outgoing));
            }
            Err(invalid(error))
        }
    };
    drop(incoming.split_to(discard.min(incoming.len())));
    match next {
        // Only one direction is ready: a server still waits for the client's last words.
        Ok(Step::Done) if side.common().is_handshaking() => Ok(Step::Read),
        next => next,
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> io::Result<()> {
    let at = outgoing.len();
    let mut room = READ;
    loop {
        outgoing.resize(at + room, 0);
        match data.encode(outgoing.get_mut(at..).unwrap_or_default()) {
            Ok(n) => {
                outgoing.truncate(at + n);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(needs)) if needs.required_size > room => room = needs.required_size,
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// What both sides of rustls have, by the same names.
trait Side {
    type Data;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn into_keys(self) -> Result<(ExtractedSecrets, Keys), Error>;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, Keys), Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, keys)| (secrets, Keys::Client(keys)))
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, Keys), Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, keys)| (secrets, Keys::Server(keys)))
    }
}
