//! The store under openraft's own suite, across restarts, damaged, and on disks that fail.

use std::{fmt::Debug, ops::RangeBounds, path::Path, time::Duration};

use isthmus_identity::{bundle::TrustStore, ca::CertificateAuthority, keys::KeyPair, svid::Svid, tls::IdentitySource};
use isthmus_model::time::Timestamp;
use openraft::{
    Entry, EntryPayload, LogId, LogState, OptionalSend, RaftLogReader, StorageError, Vote,
    storage::{LogFlushed, RaftLogStorage},
    testing::{StoreBuilder, Suite},
};
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::state::{Actor, Command, MintToken, ProposalId, TokenHash};

/// Of the log's files.
const SEGMENT: u64 = 1 << 20;

struct OnDisk;

/// The suite writes logs with gaps, and over what is there; openraft itself does neither. Gaps are filled, and what is in the
/// way is truncated first, as openraft does.
#[derive(Clone)]
struct Sparse(LogStore);

impl RaftLogReader<TypeConfig> for Sparse {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError<u64>> {
        self.0.try_get_log_entries(range).await
    }
}

impl RaftLogStorage<TypeConfig> for Sparse {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<u64>> {
        self.0.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.0.get_log_reader().await
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        self.0.save_vote(vote).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        self.0.read_vote().await
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut whole: Vec<Entry<TypeConfig>> = Vec::new();
        let mut next = self.0.get_log_state().await?.last_log_id.map_or(0, |last| last.index + 1);
        for entry in entries {
            if whole.is_empty() && entry.log_id.index < next {
                self.0.truncate(entry.log_id).await?;
                next = entry.log_id.index;
            }
            for index in next..entry.log_id.index {
                let log_id = LogId { index, ..entry.log_id };
                whole.push(Entry { log_id, payload: EntryPayload::Blank });
            }
            next = entry.log_id.index + 1;
            whole.push(entry);
        }
        self.0.append(whole, callback).await
    }

    async fn truncate(&mut self, since: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.0.truncate(since).await
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.0.purge(upto).await
    }
}

impl StoreBuilder<TypeConfig, Sparse, Machine, TempDir> for OnDisk {
    async fn build(&self) -> Result<(TempDir, Sparse, Machine), StorageError<u64>> {
        let dir = tempfile::tempdir().unwrap();
        // Few entries fill a segment.
        let store = Store::open(dir.path(), 300).unwrap();
        let machine = Machine::load(store.clone()).await?;
        Ok((dir, Sparse(LogStore::new(store)), machine))
    }
}

type Openraft = Suite<TypeConfig, Sparse, Machine, OnDisk, TempDir>;

macro_rules! suite {
    ($($test:ident),* $(,)?) => {$(
        #[tokio::test]
        async fn $test() {
            let (_dir, log, machine) = OnDisk.build().await.unwrap();
            Openraft::$test(log, machine).await.unwrap();
        }
    )*};
}

/// openraft's own suite, but for `get_initial_state_membership_from_log_and_sm`, which writes an entry that is purged already.
mod openrafts_suite {
    use super::*;

    suite!(
        last_membership_in_log_initial,
        last_membership_in_log,
        last_membership_in_log_multi_step,
        get_membership_initial,
        get_membership_from_log_and_empty_sm,
        get_membership_from_empty_log_and_sm,
        get_membership_from_log_le_sm_last_applied,
        get_membership_from_log_gt_sm_last_applied_1,
        get_membership_from_log_gt_sm_last_applied_2,
        get_initial_state_without_init,
        get_initial_state_with_state,
        get_initial_state_last_log_gt_sm,
        get_initial_state_last_log_lt_sm,
        get_initial_state_log_ids,
        get_initial_state_re_apply_committed,
        save_vote,
        get_log_entries,
        limited_get_log_entries,
        try_get_log_entry,
        initial_logs,
        get_log_state,
        get_log_id,
        last_id_in_log,
        last_applied_state,
        purge_logs_upto_0,
        purge_logs_upto_5,
        purge_logs_upto_20,
        delete_logs_since_11,
        delete_logs_since_0,
        append_to_log,
        snapshot_meta,
        apply_single,
        apply_multiple,
    );

    #[tokio::test]
    async fn transfer_snapshot() {
        Openraft::transfer_snapshot(&OnDisk).await.unwrap();
    }
}

fn bundle() -> Command {
    let ca = CertificateAuthority::create(&"isthmus.example".parse().unwrap(), Duration::from_secs(86_400)).unwrap();
    Command::SetFederationBundle { bundle: ca.bundle() }
}

fn mint(i: u8) -> Command {
    let (expires_at, now) = (Timestamp(1000), Timestamp(1));
    let cluster = "us-east".parse().unwrap();
    Command::MintToken(MintToken { hash: TokenHash([i; 32]), cluster, expires_at, grant: None, now })
}

/// A group of one, which dials nobody.
async fn start_on(store: Store, snapshot_after: u64) -> Group {
    let ca = CertificateAuthority::create(&"isthmus.example".parse().unwrap(), Duration::from_secs(3600)).unwrap();
    let key = KeyPair::generate().unwrap();
    let id = "spiffe://isthmus.example/cp/cp-1".parse().unwrap();
    let chain = ca.sign_csr(&key.csr_der().unwrap(), &id, &[], Duration::from_secs(60)).unwrap();
    let source = IdentitySource::new(Svid::new(chain, &key).unwrap());
    let peers = Peers::new(source, TrustStore::new(), "isthmus.example".parse().unwrap());
    let peer = Peer { name: "cp-1".to_owned(), address: "127.0.0.1:1".to_owned() };
    Group::start(store, Own { id: 1, node: "cp-1".parse().unwrap(), peer, founds: true }, peers, snapshot_after)
        .await
        .unwrap()
}

async fn start(dir: &Path, snapshot_after: u64) -> Group {
    start_with(dir, snapshot_after, SEGMENT).await
}

pub(super) async fn start_with(dir: &Path, snapshot_after: u64, segment: u64) -> Group {
    // Tasks of a group that was dropped may hold the folder a little longer; those of a process end with it.
    let open = async {
        loop {
            match Store::open(dir, segment) {
                Err(StoreError::InUse { .. }) => tokio::task::yield_now().await,
                opened => return opened.unwrap(),
            }
        }
    };
    start_on(timeout(Duration::from_secs(10), open).await.expect("the folder is let go"), snapshot_after).await
}

#[tokio::test]
async fn a_restart_resumes_from_snapshot_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path(), 5).await;
    let proposer = group.proposer(&Tasks::new(), Actor::default());
    proposer.propose(bundle()).await.unwrap();
    for i in 1..30 {
        proposer.propose(mint(i)).await.unwrap();
    }
    group.raft.wait(Some(Duration::from_secs(10))).metrics(|m| m.snapshot.is_some(), "a snapshot").await.unwrap();
    let before = group.views().borrow().state().clone();
    group.stop().await;
    drop(group);
    let group = start(dir.path(), 5).await;
    assert_eq!(*group.views().borrow().state(), before);
    group.stop().await;
}

#[tokio::test]
async fn a_proposal_that_is_repeated_takes_effect_once_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let id = ProposalId([7; 16]);
    let group = start(dir.path(), 5).await;
    let proposer = group.proposer(&Tasks::new(), Actor::default());
    proposer.propose(bundle()).await.unwrap();
    let first = proposer.propose_once(id, Command::StartEpoch).await.unwrap();
    assert_eq!(proposer.propose_once(id, Command::StartEpoch).await.unwrap(), first);
    for i in 1..20 {
        proposer.propose(mint(i)).await.unwrap();
    }
    group.stop().await;
    drop((group, proposer));
    let group = start(dir.path(), 5).await;
    let again = group.proposer(&Tasks::new(), Actor::default()).propose_once(id, Command::StartEpoch).await.unwrap();
    assert_eq!(again, first);
    assert_eq!(group.views().borrow().state().stamp().epoch, first.stamp.epoch);
    group.stop().await;
}

#[tokio::test]
async fn proposals_that_come_together_share_entries_and_each_has_its_own_answer() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path(), 100_000).await;
    let proposer = group.proposer(&Tasks::new(), Actor::default());
    proposer.propose(bundle()).await.unwrap();
    let last = |group: &Group| group.raft.metrics().borrow().last_log_index.unwrap();
    let before = last(&group);
    // Every other one is refused.
    let nobody = || Command::Revoke { cluster: "nobody".parse().unwrap() };
    let all = (0..200_u8).map(|i| {
        let command = if i % 2 == 0 { nobody() } else { mint(i) };
        let proposer = proposer.clone();
        async move { proposer.propose(command).await }
    });
    let answers = futures_util::future::join_all(all).await;
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(answer.is_ok(), i % 2 == 1, "{i}: {answer:?}");
    }
    let entries = last(&group) - before;
    assert!(entries < 50, "200 proposals in {entries} entries");
    group.stop().await;
}

#[test]
fn a_second_process_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let _open = Store::open(dir.path(), SEGMENT).unwrap();
    let error = Store::open(dir.path(), SEGMENT).unwrap_err().to_string();
    assert!(error.contains("another process uses it") && error.contains(dir.path().to_str().unwrap()), "{error}");
}

#[test]
fn a_record_of_a_later_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SEGMENT).unwrap();
    std::fs::write(dir.path().join("raft/vote"), [2, 0, 0, 0, 0, b'{', b'}']).unwrap();
    let error = store.get::<openraft::Vote<u64>>(store::VOTE).unwrap_err().to_string();
    assert!(error.contains("vote") && error.contains("format 2"), "{error}");
}

#[test]
fn a_vote_or_snapshot_that_is_not_what_was_written_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SEGMENT).unwrap();
    store.set(store::VOTE, &openraft::Vote::new(3, 1)).unwrap();
    store.set_snapshot(&openraft::SnapshotMeta::<u64, Peer>::default(), b"state").unwrap();
    for record in ["vote", "snapshot"] {
        let path = dir.path().join("raft").join(record);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            for bytes in [&flipped[..], &whole[..at]] {
                std::fs::write(&path, bytes).unwrap();
                let vote = store.get::<openraft::Vote<u64>>(store::VOTE).map(drop);
                let snapshot = store.snapshot::<openraft::SnapshotMeta<u64, Peer>>().map(drop);
                let error = vote.and(snapshot).unwrap_err().to_string();
                assert!(error.starts_with(record) && error.contains(dir.path().to_str().unwrap()), "{error}");
            }
        }
        std::fs::write(&path, &whole).unwrap();
    }
}

#[tokio::test]
async fn a_snapshot_that_is_gone_is_damage_and_not_an_empty_state() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SEGMENT).unwrap();
    store.set(store::PURGED, &openraft::LogId::new(openraft::CommittedLeaderId::new(1, 1), 7)).unwrap();
    let error = Machine::load(store).await.err().unwrap().to_string();
    assert!(error.contains("snapshot") && error.contains("isthmusctl cp remove"), "{error}");
}

#[test]
fn a_store_of_the_first_drafts_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("raft")).unwrap();
    std::fs::write(dir.path().join("raft/log.redb"), b"redb").unwrap();
    let error = Store::open(dir.path(), SEGMENT).unwrap_err().to_string();
    assert!(error.contains("log.redb") && error.contains("join anew"), "{error}");
}

#[tokio::test]
async fn a_disk_that_refuses_stops_the_engine_and_nothing_is_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let group = start_on(Store::open(dir.path(), 16_384).unwrap(), 1000).await;
    let proposer = group.proposer(&Tasks::new(), Actor::default());
    proposer.propose(bundle()).await.unwrap();
    // Where each further segment would be, something is in the way.
    for index in 0..500 {
        let path = dir.path().join(format!("raft/log/{index:020}.log"));
        if !path.exists() {
            std::fs::create_dir(path).unwrap();
        }
    }
    let (mut before, mut refused) = (group.views().borrow().state().clone(), None);
    for i in 0..250 {
        match proposer.propose(mint(i)).await {
            Ok(_) => before = group.views().borrow().state().clone(),
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    assert!(matches!(refused, Some(ProposeError::Stopped(_))), "{refused:?}");
    let fatal = timeout(Duration::from_secs(5), group.failure()).await.unwrap();
    assert!(matches!(fatal, openraft::error::Fatal::StorageError(_)), "{fatal}");
    assert_eq!(*group.views().borrow().state(), before);
}

#[tokio::test]
async fn a_replayed_log_gives_the_same_state_at_the_same_place() {
    let dir = tempfile::tempdir().unwrap();
    let group = start(dir.path(), 100_000).await;
    let proposer = group.proposer(&Tasks::new(), Actor::default());
    proposer.propose(bundle()).await.unwrap();
    for i in 0..20 {
        proposer.propose(mint(i)).await.unwrap();
    }
    let taken = async |group: &Group| {
        let digests = group.digests();
        let all = async {
            while digests.all().len() < 2 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), all).await.expect("digests are taken");
        digests.all()
    };
    let before = taken(&group).await;
    group.stop().await;
    drop((group, proposer));
    let group = start(dir.path(), 100_000).await;
    let after = taken(&group).await;
    let (first, digest) = before.first_key_value().unwrap();
    assert_eq!(after.get(first), Some(digest), "{before:?} {after:?}");
    assert_ne!(before.values().next(), before.values().nth(1), "another state, another digest");
    group.stop().await;
}

#[tokio::test]
async fn a_state_of_a_level_that_this_program_does_not_know_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), SEGMENT).unwrap();
    let later = serde_json::json!({ "level": crate::state::SUPPORTED + 1, "clock": 0, "global": null, "members": {},
        "tokens": {}, "vips": { "last": 0, "quarantine": [] }, "last_cluster_index": 0 });
    store.set_snapshot(&openraft::SnapshotMeta::<u64, Peer>::default(), &store::encode(&later)).unwrap();
    let error = Machine::load(store).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("install the version of the other nodes"), "{error}");
}
