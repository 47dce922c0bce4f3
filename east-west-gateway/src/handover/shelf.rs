//! The listening sockets that this gateway can give away, and those that it was given.
//!
//! Whoever listens puts a descriptor here and takes it back by dropping the guard, so that a port which is closed is not
//! kept open by this shelf. Sockets that were given are found by what they are for and by the address that the
//! configuration asks for: what does not fit is closed, and bound anew.

use std::{
    collections::BTreeMap,
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use isthmus_model::ids::ClusterName;
use serde::{Deserialize, Serialize};

/// What a socket is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Role {
    /// UDP, tunnels.
    Tunnel,
    /// TCP, tunnels where UDP is blocked.
    TunnelTcp,
    /// TCP, local sidecars: the gateway chooses the cluster.
    Auto,
    /// TCP, local sidecars: this cluster only.
    Pinned(ClusterName),
    /// TCP, health and metrics.
    Health,
    /// No socket: the open file whose lock keeps other gateways off the state folder.
    Lock,
}

/// What can be given away now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shelf {
    sockets: Arc<Mutex<BTreeMap<Role, (u64, OwnedFd)>>>,
    ids: Arc<AtomicU64>,
}

/// Takes the socket back when it is dropped.
#[derive(Debug)]
pub(crate) struct Shelved {
    shelf: Shelf,
    role: Role,
    id: u64,
}

impl Shelf {
    /// `socket` may be given away while the guard lives.
    pub(crate) fn put(&self, role: Role, socket: impl AsFd) -> io::Result<Shelved> {
        let copy = socket.as_fd().try_clone_to_owned()?;
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(role.clone(), (id, copy));
        Ok(Shelved { shelf: self.clone(), role, id })
    }

    /// Copies of all of them.
    pub(super) fn copies(&self) -> io::Result<Vec<(Role, OwnedFd)>> {
        self.lock().iter().map(|(role, (_, fd))| Ok((role.clone(), fd.try_clone()?))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Role, (u64, OwnedFd)>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shelved {
    fn drop(&mut self) {
        let mut sockets = self.shelf.lock();
        // Another socket may have come in its place.
        if sockets.get(&self.role).is_some_and(|(id, _)| *id == self.id) {
            sockets.remove(&self.role);
        }
    }
}

/// Sockets that were given and nobody has asked for yet. Empty in a gateway that took nothing over.
#[derive(Debug, Default)]
pub(crate) struct Given {
    sockets: Mutex<BTreeMap<Role, OwnedFd>>,
}

impl Given {
    pub(super) fn new(sockets: impl IntoIterator<Item = (Role, OwnedFd)>) -> Self {
        Self { sockets: Mutex::new(sockets.into_iter().collect()) }
    }

    /// The TCP listener for `role`, if one was given that listens where the configuration says.
    pub(crate) fn tcp(&self, role: &Role, wanted: SocketAddr) -> Option<TcpListener> {
        let listener = TcpListener::from(self.take(role)?);
        let fits = fits(role, listener.local_addr(), wanted);
        (fits && listener.set_nonblocking(true).is_ok()).then_some(listener)
    }

    /// The same for UDP.
    pub(crate) fn udp(&self, role: &Role, wanted: SocketAddr) -> Option<UdpSocket> {
        let socket = UdpSocket::from(self.take(role)?);
        fits(role, socket.local_addr(), wanted).then_some(socket)
    }

    /// The lock of the state folder, if it was given.
    pub(crate) fn state_lock(&self) -> Option<OwnedFd> {
        self.take(&Role::Lock)
    }

    /// Closes what nobody asked for, so that its ports are free when the predecessor has ended.
    pub(crate) fn close_rest(&self) {
        for role in std::mem::take(&mut *self.lock()).into_keys() {
            tracing::info!(?role, "a socket of the predecessor is not in this configuration; closed");
        }
    }

    fn take(&self, role: &Role) -> Option<OwnedFd> {
        self.lock().remove(role)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Role, OwnedFd>> {
        // Every section leaves the map whole, so a panic in another one does not spoil it.
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Port 0 asks for any, so any will do.
fn fits(role: &Role, given: io::Result<SocketAddr>, wanted: SocketAddr) -> bool {
    let fits = given.as_ref().is_ok_and(|a| a.ip() == wanted.ip() && (wanted.port() == 0 || a.port() == wanted.port()));
    if !fits {
        tracing::info!(?role, ?given, %wanted, "the predecessor listens elsewhere; binding anew");
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    #[test]
    fn a_socket_is_given_away_only_while_it_is_listened_on() {
        let shelf = Shelf::default();
        let (auto, address) = listener();
        let before = shelf.put(Role::Auto, &auto).unwrap();
        let shelved = shelf.put(Role::Auto, &auto).unwrap();
        drop(before);
        assert_eq!(shelf.copies().unwrap().len(), 1);
        drop((auto, shelved));
        assert!(shelf.copies().unwrap().is_empty());
        TcpListener::bind(address).expect("the shelf keeps no port open");
    }

    #[test]
    fn a_given_socket_is_used_only_where_the_configuration_wants_it() {
        let any = "127.0.0.1:0".parse().unwrap();
        for (wanted, fits) in [(None, true), (Some(any), true), (Some("127.0.0.1:1".parse().unwrap()), false)] {
            let (auto, address) = listener();
            let given = Given::new([(Role::Auto, auto.into())]);
            assert!(given.tcp(&Role::Health, any).is_none());
            let taken = given.tcp(&Role::Auto, wanted.unwrap_or(address));
            assert_eq!(taken.map(|l| l.local_addr().unwrap()), fits.then_some(address));
            assert!(given.tcp(&Role::Auto, any).is_none(), "given once");
        }
    }
}
