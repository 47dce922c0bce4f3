//! The store under openraft's own suite, across crashes, and on disks that fail.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use isthmus_identity::ca::CertificateAuthority;
use isthmus_model::time::Timestamp;
use openraft::{
    StorageError,
    testing::{StoreBuilder, Suite},
};
use redb::{StorageBackend, backends::InMemoryBackend};
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::state::{MintToken, TokenHash};

struct OnDisk;

impl StoreBuilder<TypeConfig, LogStore, Machine, TempDir> for OnDisk {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), StorageError<u64>> {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let machine = Machine::load(store.clone()).await?;
        Ok((dir, LogStore::new(store), machine))
    }
}

#[test]
fn the_store_passes_openrafts_suite() {
    Suite::test_all(OnDisk).unwrap();
}

fn bundle() -> Command {
    let ca = CertificateAuthority::create(&"isthmus.example".parse().unwrap(), Duration::from_secs(86_400)).unwrap();
    Command::SetFederationBundle { bundle: ca.bundle() }
}

fn mint(i: u8) -> Command {
    let (expires_at, now) = (Timestamp(1000), Timestamp(1));
    let cluster = "us-east".parse().unwrap();
    Command::MintToken(MintToken { hash: TokenHash([i; 32]), cluster, expires_at, now })
}

async fn start(dir: &Path, snapshot_after: u64) -> Group {
    Group::start(Store::open(dir).unwrap(), snapshot_after).await.unwrap()
}

#[tokio::test]
async fn a_restart_resumes_from_snapshot_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path(), 5).await;
    group.proposer().propose(bundle()).await.unwrap();
    for i in 1..30 {
        group.proposer().propose(mint(i)).await.unwrap();
    }
    group.raft.wait(Some(Duration::from_secs(10))).metrics(|m| m.snapshot.is_some(), "a snapshot").await.unwrap();
    let before = group.views().borrow().state().clone();
    group.stop().await;
    drop(group);
    let group = start(dir.path(), 5).await;
    assert_eq!(*group.views().borrow().state(), before);
    group.stop().await;
}

#[test]
fn a_second_process_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let _open = Store::open(dir.path()).unwrap();
    let error = Store::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("another process uses it") && error.contains(dir.path().to_str().unwrap()), "{error}");
}

#[test]
fn a_record_of_a_later_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.write(|transaction| store::put(transaction, store::VOTE, &[2, b'{', b'}'])).unwrap();
    let error = store.get::<openraft::Vote<u64>>(store::VOTE).unwrap_err().to_string();
    assert!(error.contains("vote") && error.contains("format 2"), "{error}");
}

#[tokio::test]
async fn a_snapshot_that_is_gone_is_damage_and_not_an_empty_state() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.set(store::SNAPSHOT_META, &openraft::SnapshotMeta::<u64, BasicNode>::default()).unwrap();
    let error = Machine::load(store).await.err().unwrap().to_string();
    assert!(error.contains("record snapshot") && error.contains("restore the state folder"), "{error}");
}

/// A disk that is full from some moment on.
#[derive(Debug)]
struct Disk {
    inner: InMemoryBackend,
    full: Arc<AtomicBool>,
}

impl Disk {
    fn check(&self) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.check()?;
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.check()?;
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.check()?;
        self.inner.write(offset, data)
    }
}

#[tokio::test]
async fn a_full_disk_stops_the_engine_and_nothing_is_acknowledged() {
    let full = Arc::new(AtomicBool::new(false));
    let store = Store::on_backend(Disk { inner: InMemoryBackend::new(), full: full.clone() }).unwrap();
    let group = Group::start(store, 1000).await.unwrap();
    group.proposer().propose(bundle()).await.unwrap();
    let before = group.views().borrow().state().clone();
    full.store(true, Ordering::SeqCst);
    let refused = group.proposer().propose(mint(1)).await;
    assert!(matches!(refused, Err(ProposeError::Stopped(_))), "{refused:?}");
    let fatal = timeout(Duration::from_secs(5), group.failure()).await.unwrap();
    assert!(matches!(fatal, openraft::error::Fatal::StorageError(_)), "{fatal}");
    assert_eq!(*group.views().borrow().state(), before);
}

#[test]
fn a_disk_that_is_full_at_the_start_is_found_before_anything_else() {
    let full = Arc::new(AtomicBool::new(true));
    assert!(Store::on_backend(Disk { inner: InMemoryBackend::new(), full }).is_err());
}
