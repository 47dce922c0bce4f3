//! Which tasks are alive: the bookkeeping behind [`super::Tasks`].
//!
//! An [`Entry`] lives inside its task's future, so that it is removed however the task goes: ended, panicked, aborted.
//! It decides nothing.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::task::AbortHandle;

/// What a task's end means, and whether a drain waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    Critical,
    Background,
}

#[derive(Debug)]
pub(super) struct Registry {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    // Counts only; the sender is used under the lock of `state`, so that a waiter never sees an older count last.
    live: watch::Sender<Live>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    closed: bool,
    tasks: HashMap<u64, Task>,
    panics: BTreeMap<&'static str, u64>,
}

#[derive(Debug)]
struct Task {
    name: &'static str,
    kind: Kind,
    // None for the moment between entering and being spawned.
    abort: Option<AbortHandle>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Live {
    awaited: usize,
    background: usize,
}

/// A task's place in the registry, given back on drop.
#[derive(Debug)]
pub(super) struct Entry {
    shared: Arc<Shared>,
    id: u64,
}

impl Default for Registry {
    fn default() -> Self {
        let shared = Shared { state: Mutex::default(), live: watch::Sender::default() };
        Self { shared: Arc::new(shared) }
    }
}

impl Registry {
    /// A place for a task that is about to be spawned; none after [`Registry::abort_all`].
    pub(super) fn enter(&self, name: &'static str, kind: Kind) -> Option<Entry> {
        let mut state = self.shared.lock();
        if state.closed {
            return None;
        }
        let id = state.next;
        state.next += 1;
        state.tasks.insert(id, Task { name, kind, abort: None });
        self.shared.count(kind, |live| *live += 1);
        Some(Entry { shared: self.shared.clone(), id })
    }

    /// Makes the task abortable; if everything was aborted since it entered, so is it.
    pub(super) fn started(&self, id: u64, abort: AbortHandle) {
        let mut state = self.shared.lock();
        if !state.closed {
            if let Some(task) = state.tasks.get_mut(&id) {
                task.abort = Some(abort);
            }
            return;
        }
        // Never aborted under the lock: on a runtime that is shutting down, that drops the task and its entry in place.
        drop(state);
        abort.abort();
    }

    pub(super) fn count_panic(&self, name: &'static str) {
        *self.shared.lock().panics.entry(name).or_default() += 1;
    }

    pub(super) fn panics(&self) -> BTreeMap<&'static str, u64> {
        self.shared.lock().panics.clone()
    }

    pub(super) fn running(&self) -> BTreeMap<&'static str, usize> {
        let mut names = BTreeMap::new();
        for task in self.shared.lock().tasks.values() {
            *names.entry(task.name).or_default() += 1;
        }
        names
    }

    /// Resolves when every task that a drain waits for has ended.
    pub(super) async fn drained(&self) {
        self.reach(|live| live.awaited == 0).await;
    }

    /// Resolves when every task has ended.
    pub(super) async fn empty(&self) {
        self.reach(|live| live.awaited + live.background == 0).await;
    }

    /// Aborts all tasks and admits no more; the names, with counts, of those that a drain had waited for.
    pub(super) fn abort_all(&self) -> BTreeMap<&'static str, usize> {
        let mut state = self.shared.lock();
        state.closed = true;
        let (mut names, mut handles) = (BTreeMap::new(), Vec::new());
        for task in state.tasks.values() {
            if task.kind != Kind::Background {
                *names.entry(task.name).or_default() += 1;
            }
            handles.extend(task.abort.clone());
        }
        drop(state);
        handles.iter().for_each(AbortHandle::abort);
        names
    }

    async fn reach(&self, condition: impl Fn(&Live) -> bool) {
        // The sender lives in `self`, so the channel cannot close meanwhile.
        let _ = self.shared.live.subscribe().wait_for(|live| condition(live)).await;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock; if some ever did, the counts are still sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, kind: Kind, change: impl FnOnce(&mut usize)) {
        self.live.send_modify(|live| match kind {
            Kind::Plain | Kind::Critical => change(&mut live.awaited),
            Kind::Background => change(&mut live.background),
        });
    }
}

impl Entry {
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let Some(task) = state.tasks.remove(&self.id) {
            self.shared.count(task.kind, |live| *live -= 1);
        }
    }
}
