//! When the endpoints of one stream are asked, and what their silence says of them. Sans-IO:
//! `(state, event, now) → whom to ask next, or how long to wait`.
//!
//! An endpoint that is silent for its share of the time stays asked, and another one is asked beside it: whoever answers
//! first serves. So slow endpoints serve slowly, rather than not at all, and a hung one costs the share. Asking beside, or
//! after a close, puts more load on what may be struggling and needs the replay budget's leave; asking after a refused
//! connection does not.

use std::time::{Duration, Instant};

use super::{ejection::Failure, endpoint::EndpointFailure};

/// Silence below this says nothing of an endpoint, however quick the others are.
const NOTEWORTHY: Duration = Duration::from_millis(100);

/// Whether an endpoint that was silent for so long fell behind one that answered within `answered_in`: clearly, so that
/// where all are slow nobody does.
pub(crate) fn outrun(silent_for: Duration, answered_in: Duration) -> bool {
    silent_for >= NOTEWORTHY && silent_for >= answered_in.saturating_mul(2)
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask another endpoint; if `charged`, only with the budget's leave.
    Ask { charged: bool },
    /// For one that was asked, until then at most.
    Wait(Instant),
    /// Nobody answered, and nobody is left to ask.
    Over(EndpointFailure),
}

/// The state of one stream's endpoints.
#[derive(Debug)]
pub(crate) struct Race {
    deadline: Instant,
    /// As many may still be asked.
    left: usize,
    /// Asked, and neither answered nor failed.
    running: usize,
    /// One is to be asked now, charged or not.
    due: Option<bool>,
    /// One is to be asked then, beside those that run.
    beside_at: Option<Instant>,
    last: EndpointFailure,
}

impl Race {
    /// At most `max` endpoints until `deadline`.
    pub(crate) fn new(deadline: Instant, max: usize) -> Self {
        let due = Some(false);
        Self { deadline, left: max, running: 0, due, beside_at: None, last: EndpointFailure::None }
    }

    /// What is to be done now.
    pub(crate) fn step(&self, now: Instant) -> Step {
        let over = Step::Over(if self.running > 0 { EndpointFailure::Silent } else { self.last });
        if now >= self.deadline {
            return over;
        }
        let beside = self.beside_at.filter(|at| *at <= now).map(|_| true);
        match self.due.or(beside).filter(|_| self.left > 0) {
            Some(charged) => Step::Ask { charged },
            None if self.running == 0 => over,
            None => Step::Wait(self.beside_at.filter(|_| self.left > 0).unwrap_or(self.deadline)),
        }
    }

    /// One was asked; `others` could be.
    pub(crate) fn asked(&mut self, others: usize, now: Instant) {
        self.left = self.left.saturating_sub(1);
        self.running += 1;
        self.due = None;
        // What is left is for this one and those after it alike.
        let sharers = u32::try_from(self.left.min(others)).unwrap_or(u32::MAX).saturating_add(1);
        let share = self.deadline.saturating_duration_since(now) / sharers;
        self.beside_at = (sharers > 1).then(|| now + share);
    }

    /// None could be asked: there is no other, or the budget is used up.
    pub(crate) fn none_asked(&mut self) {
        self.due = None;
        self.beside_at = None;
    }

    /// One of those that were asked has failed.
    pub(crate) fn failed(&mut self, failure: Failure) {
        self.running = self.running.saturating_sub(1);
        // Where no connection came about, nothing was added to anybody's load.
        self.due = Some(failure != Failure::Connect);
        self.last = EndpointFailure::Failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const FREE: Step = Step::Ask { charged: false };
    const CHARGED: Step = Step::Ask { charged: true };

    fn race(now: Instant) -> Race {
        Race::new(now + MS * 900, 3)
    }

    #[test]
    fn a_silent_endpoint_stays_asked_and_others_are_asked_beside_it_after_equal_shares() {
        let start = Instant::now();
        let mut race = race(start);
        assert_eq!(race.step(start), FREE);
        race.asked(2, start);
        assert_eq!(race.step(start), Step::Wait(start + MS * 300));
        assert_eq!(race.step(start + MS * 300), CHARGED);
        race.asked(1, start + MS * 300);
        assert_eq!(race.step(start + MS * 300), Step::Wait(start + MS * 600));
        race.asked(0, start + MS * 600);
        assert_eq!(race.step(start + MS * 600), Step::Wait(start + MS * 900));
        assert_eq!(race.step(start + MS * 900), Step::Over(EndpointFailure::Silent));
    }

    #[test]
    fn without_leave_the_first_is_waited_for() {
        let start = Instant::now();
        let mut race = race(start);
        race.asked(2, start);
        assert_eq!(race.step(start + MS * 300), CHARGED);
        race.none_asked();
        assert_eq!(race.step(start + MS * 300), Step::Wait(start + MS * 900));
        assert_eq!(race.step(start + MS * 900), Step::Over(EndpointFailure::Silent));
    }

    #[test]
    fn a_refused_connection_is_followed_by_the_next_endpoint_at_once_and_free() {
        let start = Instant::now();
        let mut race = race(start);
        race.asked(2, start);
        race.failed(Failure::Connect);
        assert_eq!(race.step(start), FREE);
        race.asked(1, start);
        // The two that are left share what is left.
        assert_eq!(race.step(start), Step::Wait(start + MS * 450));
        race.failed(Failure::Closed);
        assert_eq!(race.step(start), CHARGED);
        race.none_asked();
        assert_eq!(race.step(start), Step::Over(EndpointFailure::Failed));
    }

    #[test]
    fn one_that_fails_beside_a_silent_one_is_replaced_and_the_silent_one_stays_asked() {
        let start = Instant::now();
        let mut race = race(start);
        race.asked(2, start);
        race.asked(1, start + MS * 300);
        race.failed(Failure::Connect);
        assert_eq!(race.step(start + MS * 301), FREE);
        race.asked(0, start + MS * 301);
        race.failed(Failure::Connect);
        assert_eq!(race.step(start + MS * 302), Step::Wait(start + MS * 900), "all that may be asked were");
    }

    #[test]
    fn where_nobody_can_be_asked_it_is_over() {
        let start = Instant::now();
        let mut race = race(start);
        race.none_asked();
        assert_eq!(race.step(start), Step::Over(EndpointFailure::None));
    }

    #[test]
    fn only_who_takes_twice_as_long_and_noticeably_long_falls_behind() {
        assert!(outrun(MS * 300, MS));
        assert!(outrun(MS * 1_000, MS * 500));
        assert!(!outrun(MS * 800, MS * 500), "all are slow");
        assert!(!outrun(MS * 20, MS), "a peer's short deadline");
    }
}
