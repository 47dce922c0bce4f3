//! Binding sockets, with errors that say which address, which configuration field, and what to do.
//!
//! Nothing is retried and no other port is tried: an address in the configuration means that address.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use tokio::net::{TcpListener, TcpSocket};

/// Why an address could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket holds the address and port.
    #[error(
        "{field}: {protocol} address {addr} is already in use; \
         stop the process that holds it (`{}` shows it) or set {field} to a free address",
        protocol.list_command(addr.port())
    )]
    InUse {
        /// The configuration field that the address came from.
        field: String,
        /// TCP or UDP.
        protocol: Protocol,
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// No interface of this machine has the IP address.
    #[error(
        "{field}: {} is not an address of this machine; set {field} to one that is (`ip -br addr` lists them)",
        addr.ip()
    )]
    NotOnThisMachine {
        /// The configuration field that the address came from.
        field: String,
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// The process may not use this port.
    #[error(
        "{field}: no permission to listen on {protocol} {addr}; ports below 1024 need root or CAP_NET_BIND_SERVICE: \
         set {field} to a port from 1024 up, or grant that capability"
    )]
    NotPermitted {
        /// The configuration field that the address came from.
        field: String,
        /// TCP or UDP.
        protocol: Protocol,
        /// The address that was asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else, such as no file descriptors left.
    #[error("{field}: cannot listen on {protocol} {addr}")]
    Other {
        /// The configuration field that the address came from.
        field: String,
        /// TCP or UDP.
        protocol: Protocol,
        /// The address that was asked for.
        addr: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// The transport of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// A listening TCP socket.
    Tcp,
    /// A bound UDP socket.
    Udp,
}

impl Protocol {
    fn list_command(self, port: u16) -> String {
        match self {
            Protocol::Tcp => format!("ss -ltnp 'sport = :{port}'"),
            Protocol::Udp => format!("ss -lunp 'sport = :{port}'"),
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        })
    }
}

/// Listens on TCP `addr`; port 0 takes a free one. `field` is the configuration field to name in errors.
pub async fn bind_tcp(addr: SocketAddr, field: &str) -> Result<TcpListener, BindError> {
    listen(addr).map_err(|source| explain(source, Protocol::Tcp, addr, field))
}

/// Connections that the system completes before the program accepts them. Beyond it, a burst costs clients seconds or
/// their connection; the system's own maximum may be lower.
const BACKLOG: u32 = 4_096;

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Binds UDP `addr`, non-blocking, as both tokio and quinn want it; port 0 takes a free one.
pub fn bind_udp(addr: SocketAddr, field: &str) -> Result<UdpSocket, BindError> {
    UdpSocket::bind(addr)
        .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
        .map_err(|source| explain(source, Protocol::Udp, addr, field))
}

fn explain(source: io::Error, protocol: Protocol, addr: SocketAddr, field: &str) -> BindError {
    let field = field.to_owned();
    match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse { field, protocol, addr },
        io::ErrorKind::AddrNotAvailable => BindError::NotOnThisMachine { field, addr },
        io::ErrorKind::PermissionDenied => BindError::NotPermitted { field, protocol, addr, source },
        _ => BindError::Other { field, protocol, addr, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any_port() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    #[tokio::test]
    async fn a_taken_tcp_port_names_address_field_and_remedy() {
        let holder = bind_tcp(any_port(), "listen.grpc").await.unwrap();
        let addr = holder.local_addr().unwrap();
        let message = bind_tcp(addr, "listen.grpc").await.unwrap_err().to_string();
        assert_eq!(
            message,
            format!(
                "listen.grpc: TCP address {addr} is already in use; stop the process that holds it \
                 (`ss -ltnp 'sport = :{}'` shows it) or set listen.grpc to a free address",
                addr.port()
            )
        );
    }

    #[test]
    fn a_taken_udp_port_points_at_the_udp_listing() {
        let holder = bind_udp(any_port(), "listen.tunnel").unwrap();
        let addr = holder.local_addr().unwrap();
        let message = bind_udp(addr, "listen.tunnel").unwrap_err().to_string();
        assert!(message.starts_with(&format!("listen.tunnel: UDP address {addr} is already in use")), "{message}");
        assert!(message.contains("ss -lunp"), "{message}");
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_told_apart() {
        // TEST-NET-1 (RFC 5737) is on no interface.
        let addr = "192.0.2.1:7443".parse().unwrap();
        let message = bind_tcp(addr, "listen.grpc").await.unwrap_err().to_string();
        assert!(message.starts_with("listen.grpc: 192.0.2.1 is not an address of this machine"), "{message}");
    }

    #[test]
    fn a_refused_port_speaks_of_low_ports() {
        // Made by hand: a privileged test run may bind low ports, so the system cannot be asked for this error.
        let refused = io::Error::from(io::ErrorKind::PermissionDenied);
        let message = explain(refused, Protocol::Udp, "127.0.0.1:53".parse().unwrap(), "listen.dns").to_string();
        assert!(message.contains("no permission to listen on UDP 127.0.0.1:53; ports below 1024"), "{message}");
    }

    #[tokio::test]
    async fn bound_udp_sockets_are_ready_for_async_use() {
        let socket = bind_udp(any_port(), "listen.dns").unwrap();
        let mut buffer = [0; 1];
        assert_eq!(socket.recv(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        tokio::net::UdpSocket::from_std(socket).unwrap();
    }
}
