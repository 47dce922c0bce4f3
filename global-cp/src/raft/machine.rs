//! The state machine behind the engine: applies committed commands to the pure [`State`], publishes each result as a
//! [`View`], and keeps a durable snapshot, so that a restart replays only the log that follows it.

use std::{io::Cursor, sync::Arc};

use openraft::{
    Entry, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError,
    StorageIOError, StoredMembership, storage::RaftStateMachine,
};
use tokio::sync::watch;

use super::{
    Peer, TypeConfig,
    agreement::{Digests, EVERY, digest},
    log::any,
    store::{PURGED, SNAPSHOT, Store, StoreError, encode},
};
use crate::state::{Answers, SUPPORTED, State, View};

/// Refuses a state of a level that this program does not know.
fn supported(state: &State) -> Result<(), StoreError> {
    let level = state.level();
    if level > SUPPORTED { Err(StoreError::Level { level }) } else { Ok(()) }
}

type Meta = SnapshotMeta<u64, Peer>;

/// The applied state, with its place in the log.
pub(super) struct Machine {
    store: Store,
    state: Arc<State>,
    applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, Peer>,
    views: watch::Sender<View>,
    digests: Digests,
}

/// The state at one moment, to be written as a snapshot.
pub(super) struct Builder {
    store: Store,
    state: Arc<State>,
    meta: Meta,
}

impl Machine {
    /// From the stored snapshot, or empty.
    pub(super) async fn load(store: Store) -> Result<Self, StorageError<u64>> {
        let read = |store: &Store| match store.snapshot::<Meta>()? {
            Some((meta, bytes)) => Ok((meta, store.decode(SNAPSHOT, &bytes)?)),
            // The log's beginning went into it; an empty state would forget every revocation.
            None if store.get::<LogId<u64>>(PURGED)?.is_some() => Err(store.missing(SNAPSHOT)),
            None => Ok((Meta::default(), State::default())),
        };
        let (meta, state) = store.run(read).await.map_err(|error| StorageIOError::read_state_machine(any(&error)))?;
        supported(&state).map_err(|error| StorageIOError::read_state_machine(any(&error)))?;
        let state = Arc::new(state);
        let (views, _) = watch::channel(View::new(state.clone()));
        Ok(Self {
            store,
            state,
            applied: meta.last_log_id,
            membership: meta.last_membership,
            views,
            digests: Digests::default(),
        })
    }

    /// Of the state at some places of the log.
    pub(super) fn digests(&self) -> Digests {
        self.digests.clone()
    }

    /// The state as it changes. Slow readers miss steps, never the latest.
    pub(super) fn views(&self) -> watch::Receiver<View> {
        self.views.subscribe()
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId<u64>>, StoredMembership<u64, Peer>), StorageError<u64>> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answers>, StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut responses = Vec::new();
        let mut changes = Vec::new();
        for entry in entries {
            self.applied = Some(entry.log_id);
            responses.push(match entry.payload {
                EntryPayload::Blank => Answers::default(),
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Answers::default()
                }
                EntryPayload::Normal(batch) => {
                    let (answers, seen) = Arc::make_mut(&mut self.state).apply_batch(&batch);
                    changes.extend(seen);
                    answers
                }
            });
            if entry.log_id.index.is_multiple_of(EVERY) {
                let (digests, state, index) = (self.digests.clone(), self.state.clone(), entry.log_id.index);
                // Nobody waits for it.
                tokio::task::spawn_blocking(move || digests.remember(index, digest(&state)));
            }
        }
        supported(&self.state).map_err(|error| StorageIOError::write_state_machine(any(&error)))?;
        // Before the answers go out, so that whoever gets one sees its effect.
        self.views.send_modify(|view| view.advance(self.state.clone(), changes));
        Ok(responses)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let at = self.applied.map_or_else(|| "0".to_owned(), |id| format!("{}-{}", id.leader_id.term, id.index));
        let meta =
            Meta { last_log_id: self.applied, last_membership: self.membership.clone(), snapshot_id: format!("s{at}") };
        Builder { store: self.store.clone(), state: self.state.clone(), meta }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(&mut self, meta: &Meta, snapshot: Box<Cursor<Vec<u8>>>) -> Result<(), StorageError<u64>> {
        let bytes = snapshot.into_inner();
        let record = meta.clone();
        let install = move |store: &Store| {
            let state: State = store.decode("the received snapshot", &bytes)?;
            supported(&state)?;
            store.set_snapshot(&record, &bytes)?;
            Ok(state)
        };
        let state = self
            .store
            .run(install)
            .await
            .map_err(|error| StorageIOError::write_snapshot(Some(meta.signature()), any(&error)))?;
        self.state = Arc::new(state);
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.views.send_replace(View::new(self.state.clone()));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError<u64>> {
        let read = |store: &Store| store.snapshot::<Meta>();
        let stored = self.store.run(read).await.map_err(|error| StorageIOError::read_snapshot(None, any(&error)))?;
        Ok(stored.map(|(meta, bytes)| Snapshot { meta, snapshot: Box::new(Cursor::new(bytes)) }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError<u64>> {
        let (state, record) = (self.state.clone(), self.meta.clone());
        let write = move |store: &Store| {
            let bytes = encode(&*state);
            store.set_snapshot(&record, &bytes)?;
            Ok(bytes)
        };
        let bytes = self
            .store
            .run(write)
            .await
            .map_err(|error| StorageIOError::write_snapshot(Some(self.meta.signature()), any(&error)))?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: Box::new(Cursor::new(bytes)) })
    }
}
