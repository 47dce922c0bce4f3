//! What is left of a handshake once its connection is established: rustls' key schedule, for the next keys.

use rustls::{
    Error, Tls13CipherSuite, client::ClientConnectionData, kernel::KernelConnection, server::ServerConnectionData,
};

use super::record::Secrets;

/// By the side that this end was on.
pub(super) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Keys {
    /// # Errors
    /// Not TLS 1.3.
    pub(super) fn suite(&self) -> Result<&'static Tls13CipherSuite, Error> {
        let suite = match self {
            Self::Client(keys) => keys.negotiated_cipher_suite(),
            Self::Server(keys) => keys.negotiated_cipher_suite(),
        };
        suite.tls13().ok_or_else(|| Error::General("only TLS 1.3 is spoken here".into()))
    }

    pub(super) fn next_to_send(&mut self) -> Result<Secrets, Error> {
        match self {
            Self::Client(keys) => keys.update_tx_secret(),
            Self::Server(keys) => keys.update_tx_secret(),
        }
    }

    pub(super) fn next_to_receive(&mut self) -> Result<Secrets, Error> {
        match self {
            Self::Client(keys) => keys.update_rx_secret(),
            Self::Server(keys) => keys.update_rx_secret(),
        }
    }

    /// A ticket of the server's, for a later handshake.
    pub(super) fn keep(&mut self, ticket: &[u8]) -> Result<(), Error> {
        match self {
            Self::Client(keys) => keys.handle_new_session_ticket(ticket),
            Self::Server(_) => Err(Error::General("a client sends no tickets".into())),
        }
    }
}
