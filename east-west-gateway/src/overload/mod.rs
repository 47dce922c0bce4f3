//! Whether this gateway takes anything new: early refusals instead of a late collapse.
//!
//! In: samples of memory and of the runtime's scheduling delay ([`sample`]), one task's. Out: one decision, [`Overload::admit`],
//! asked for every new local connection and every stream of a peer. What is carried already goes on whatever is decided.
//! What holds: a limit that was passed is left again only well below it, so that the decision does not flap; memory is
//! held against new work only while something is carried, since an allocator may keep what an idle process has freed.
//! Streams and connections have limits of their own, which are counted and not sampled.

pub(crate) mod sample;

use std::{
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

use self::sample::Sample;
use crate::metrics::Metrics;

/// A limit that was passed counts as left below this share of it.
const MEMORY_BACK: f64 = 0.95;
const DELAY_BACK: f64 = 0.5;
/// The delay must be too long, or short again, for so long.
const SUSTAINED: Duration = Duration::from_secs(1);
/// How much of the smoothed delay a new sample makes up.
const SMOOTHING: f64 = 0.2;

/// Why nothing new is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// Too much memory is in use.
    Memory,
    /// The processors do not keep up: tasks wait too long for their turn.
    Processor,
}

impl Why {
    /// Its metric label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Processor => "processor",
        }
    }

    /// The same as a reason for turning a local connection away.
    pub(crate) fn reject_label(self) -> &'static str {
        match self {
            Self::Memory => "overloaded_memory",
            Self::Processor => "overloaded_processor",
        }
    }

    /// As a peer is told.
    pub(crate) fn detail(self) -> &'static str {
        match self {
            Self::Memory => "this gateway is short of memory",
            Self::Processor => "this gateway's processors do not keep up",
        }
    }
}

/// What may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes; `None` if neither the configuration nor the system says.
    pub(crate) memory: Option<u64>,
    /// Of a task that is ready to run.
    pub(crate) delay: Duration,
}

/// The rules. Sans-IO: `(state, sample) → state`.
#[derive(Debug)]
pub(crate) struct Judge {
    limits: Limits,
    memory_over: bool,
    delay: f64,
    delay_over: bool,
    /// Since when the delay contradicts the verdict.
    turning: Option<Instant>,
}

impl Judge {
    /// Nothing is wrong.
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, memory_over: false, delay: 0.0, delay_over: false, turning: None }
    }

    /// Takes `sample` into account.
    pub(crate) fn observe(&mut self, sample: &Sample) {
        if let (Some(used), Some(limit)) = (sample.memory, self.limits.memory) {
            let back = limit as f64 * MEMORY_BACK;
            self.memory_over = if self.memory_over { used as f64 > back } else { used > limit };
        }
        self.delay += (sample.delay.as_secs_f64() - self.delay) * SMOOTHING;
        let limit = self.limits.delay.as_secs_f64();
        let contradicts = if self.delay_over { self.delay < limit * DELAY_BACK } else { self.delay > limit };
        self.turning = if contradicts { self.turning.or(Some(sample.at)) } else { None };
        if self.turning.is_some_and(|since| sample.at.saturating_duration_since(since) >= SUSTAINED) {
            self.delay_over = !self.delay_over;
            self.turning = None;
        }
    }

    /// The smoothed scheduling delay.
    pub(crate) fn delay(&self) -> Duration {
        Duration::from_secs_f64(self.delay.max(0.0))
    }

    /// What is passed now.
    pub(crate) fn state(&self) -> State {
        State { memory: self.memory_over, processor: self.delay_over }
    }
}

/// Which limits are passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) memory: bool,
    pub(crate) processor: bool,
}

/// The decision. `carried`: how many connections are carried now.
pub(crate) fn admit(state: State, carried: usize) -> Result<(), Why> {
    match state {
        State { memory: true, .. } if carried > 0 => Err(Why::Memory),
        State { processor: true, .. } => Err(Why::Processor),
        State { .. } => Ok(()),
    }
}

/// The state, shared with whoever admits.
#[derive(Debug, Default)]
pub(crate) struct Overload {
    state: AtomicU8,
}

const MEMORY: u8 = 1;
const PROCESSOR: u8 = 2;

impl Overload {
    /// Is one more taken beside the `carried` ones?
    pub(crate) fn admit(&self, carried: usize) -> Result<(), Why> {
        admit(self.state(), carried)
    }

    fn state(&self) -> State {
        let bits = self.state.load(Ordering::Relaxed);
        State { memory: bits & MEMORY != 0, processor: bits & PROCESSOR != 0 }
    }

    /// From now on this is decided by.
    pub(crate) fn set(&self, state: State, metrics: &Metrics) {
        let bits = if state.memory { MEMORY } else { 0 } | if state.processor { PROCESSOR } else { 0 };
        let before = self.state();
        self.state.store(bits, Ordering::Relaxed);
        for (why, was, is) in
            [(Why::Memory, before.memory, state.memory), (Why::Processor, before.processor, state.processor)]
        {
            metrics.overloaded(why, is);
            match (was, is) {
                (false, true) => {
                    tracing::warn!(why = why.detail(), "overloaded: new connections and streams are turned away");
                }
                (true, false) => tracing::info!(resource = why.label(), "not overloaded any more"),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { memory: Some(1_000), delay: Duration::from_millis(100) };

    /// A judge that is fed every 100 ms.
    struct Fed {
        judge: Judge,
        now: Instant,
    }

    impl Fed {
        fn new(limits: Limits) -> Self {
            Self { judge: Judge::new(limits), now: Instant::now() }
        }

        fn feed(&mut self, memory: u64, delay_ms: u64) -> State {
            self.now += Duration::from_millis(100);
            let delay = Duration::from_millis(delay_ms);
            self.judge.observe(&Sample { memory: Some(memory), delay, at: self.now });
            self.judge.state()
        }

        /// After how many samples of this delay the verdict is `over`.
        fn turns(&mut self, over: bool, delay_ms: u64) -> Option<usize> {
            (1..100).find(|_| self.feed(0, delay_ms).processor == over)
        }
    }

    #[test]
    fn memory_over_the_limit_counts_until_it_is_well_below() {
        let mut fed = Fed::new(LIMITS);
        assert!(!fed.feed(1_000, 0).memory);
        assert!(fed.feed(1_001, 0).memory);
        assert!(fed.feed(990, 0).memory, "just below is not enough");
        assert!(!fed.feed(950, 0).memory);
        assert!(!fed.feed(990, 0).memory);
    }

    #[test]
    fn a_delay_counts_only_when_it_lasts() {
        let mut fed = Fed::new(LIMITS);
        for round in 0..20 {
            // Five in a row, then none: a burst.
            for i in 0..10 {
                assert!(!fed.feed(0, if i < 5 { 200 } else { 0 }).processor, "round {round}");
            }
        }
        let after = fed.turns(true, 200).unwrap();
        // Four samples until the smoothed delay is over the limit, ten more for a second.
        assert!((11..=16).contains(&after), "{after}");
    }

    #[test]
    fn a_delay_that_hovers_at_the_limit_does_not_flap() {
        let mut fed = Fed::new(LIMITS);
        fed.turns(true, 300).unwrap();
        for i in 0..200 {
            assert!(fed.feed(0, if i % 2 == 0 { 60 } else { 120 }).processor);
        }
        let after = fed.turns(false, 0).unwrap();
        assert!((11..=25).contains(&after), "{after}");
    }

    #[test]
    fn one_long_pause_is_no_overload() {
        let mut fed = Fed::new(LIMITS);
        // Such as a suspended machine, or a debugger.
        assert!(!fed.feed(0, 2_000).processor);
        assert_eq!(fed.turns(true, 0), None);
    }

    #[test]
    fn memory_is_not_held_against_an_idle_gateway() {
        let memory = State { memory: true, processor: false };
        assert_eq!(admit(memory, 0), Ok(()));
        assert_eq!(admit(memory, 1), Err(Why::Memory));
        let processor = State { memory: false, processor: true };
        assert_eq!(admit(processor, 0), Err(Why::Processor));
        assert_eq!(admit(State::default(), 1_000_000), Ok(()));
    }

    #[test]
    fn without_a_known_limit_memory_does_not_count() {
        let mut fed = Fed::new(Limits { memory: None, ..LIMITS });
        assert!(!fed.feed(u64::MAX, 0).memory);
    }
}
