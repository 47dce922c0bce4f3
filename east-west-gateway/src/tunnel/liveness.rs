//! Is the peer behind a tunnel alive? Sans-IO: `(state, event, now) → action`.
//!
//! A ping goes out every interval; each pong proves life and gives a round-trip time. Without any sign of life for
//! `dead_after` the peer is dead, but only if enough pings went unanswered: a process that was itself stalled must not
//! blame its peer. Packets are such a sign, too: behind much data or after losses a pong may be late. Pongs that stay away
//! although packets come are death after [`GRACE`] times as long. Before all that, a peer whose pongs are overdue is suspect, and new connections prefer another.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How much longer than `dead_after` a peer may owe its pongs while packets come from it.
pub(super) const GRACE: u32 = 5;

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Send a ping with this sequence number, then ask again.
    Ping(u64),
    /// Nothing before then.
    Wait(Instant),
    /// Close the connection.
    Dead,
}

/// When to ping and when to give up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rhythm {
    /// Between pings.
    pub(crate) interval: Duration,
    /// Silence that means death.
    pub(crate) dead_after: Duration,
}

/// The state of one tunnel's probing.
#[derive(Debug)]
pub(crate) struct Liveness {
    rhythm: Rhythm,
    next_sequence: u64,
    next_ping: Instant,
    last_pong: Instant,
    last_sign: Instant,
    unanswered: VecDeque<(u64, Instant)>,
    rtt: Option<Duration>,
}

impl Liveness {
    /// Begins at `now`, as if a pong had just come.
    pub(crate) fn new(rhythm: Rhythm, now: Instant) -> Self {
        Self {
            rhythm,
            next_sequence: 1,
            next_ping: now,
            last_pong: now,
            last_sign: now,
            unanswered: VecDeque::new(),
            rtt: None,
        }
    }

    /// What to do at `now`.
    pub(crate) fn poll(&mut self, now: Instant) -> Action {
        let silent = now.duration_since(self.last_sign) >= self.rhythm.dead_after;
        let owing = now.duration_since(self.last_pong) >= self.rhythm.dead_after * GRACE;
        if (silent || owing) && self.unanswered.len() >= self.patience() {
            return Action::Dead;
        }
        if now < self.next_ping {
            return Action::Wait(self.next_ping);
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.next_ping = now + self.rhythm.interval;
        self.unanswered.push_back((sequence, now));
        Action::Ping(sequence)
    }

    /// A pong came. Returns the smoothed round-trip time; a sequence never sent, or answered already, says nothing.
    pub(crate) fn pong(&mut self, sequence: u64, now: Instant) -> Option<Duration> {
        let at = self.unanswered.iter().position(|(s, _)| *s == sequence)?;
        let (_, sent) = self.unanswered.drain(..=at).next_back()?;
        self.last_pong = now;
        self.last_sign = now;
        let sample = now.duration_since(sent);
        // RFC 6298's weight for the smoothed time.
        let smooth = self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8);
        self.rtt = Some(smooth);
        Some(smooth)
    }

    /// Something else came from the peer.
    pub(crate) fn sign(&mut self, now: Instant) {
        self.last_sign = now;
    }

    /// What tells that the peer is dead, in words.
    pub(crate) fn evidence(&self, now: Instant) -> String {
        let since = |then| format!("{:.1?}", now.duration_since(then));
        let (sign, pong) = (since(self.last_sign), since(self.last_pong));
        format!("no sign of life for {sign}, no pong for {pong}, {} pings without answer", self.unanswered.len())
    }

    /// Pongs are overdue: two intervals beyond the usual round trip.
    pub(crate) fn is_suspect(&self, now: Instant) -> bool {
        let overdue = self.rhythm.interval * 2 + self.rtt.unwrap_or_default() * 2;
        self.unanswered.front().is_some_and(|(_, sent)| now.duration_since(*sent) > overdue)
    }

    /// Pings that must have gone unanswered: all that fit into `dead_after` but one, the last being still on its way.
    fn patience(&self) -> usize {
        let fit = self.rhythm.dead_after.as_nanos() / self.rhythm.interval.as_nanos().max(1);
        usize::try_from(fit).unwrap_or(usize::MAX).saturating_sub(1).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const RHYTHM: Rhythm = Rhythm { interval: Duration::from_millis(100), dead_after: Duration::from_millis(400) };

    /// Runs until `end`, answering each ping after `answer`; returns when the peer was declared dead.
    fn run(answer: impl Fn(u64) -> Option<Duration>, end: Duration) -> Option<Duration> {
        let start = Instant::now();
        let mut state = Liveness::new(RHYTHM, start);
        let mut pongs: Vec<(Instant, u64)> = Vec::new();
        let mut now = start;
        while now < start + end {
            pongs.retain(|(at, sequence)| {
                if *at <= now {
                    state.pong(*sequence, now);
                }
                *at > now
            });
            loop {
                match state.poll(now) {
                    Action::Ping(sequence) => pongs.extend(answer(sequence).map(|d| (now + d, sequence))),
                    Action::Wait(_) => break,
                    Action::Dead => return Some(now - start),
                }
            }
            now += MS;
        }
        None
    }

    #[test]
    fn a_peer_that_answers_lives() {
        assert_eq!(run(|_| Some(MS * 5), MS * 10_000), None);
    }

    #[test]
    fn a_far_peer_lives() {
        assert_eq!(run(|_| Some(MS * 300), MS * 10_000), None);
    }

    #[test]
    fn a_peer_that_falls_silent_is_dead_within_half_a_second() {
        let died = run(|sequence| (sequence <= 10).then_some(MS), MS * 10_000).unwrap();
        assert!(died >= MS * 1_301 && died <= MS * 1_500, "{died:?}");
    }

    #[test]
    fn a_lost_answer_or_two_are_forgiven() {
        assert_eq!(run(|sequence| (sequence % 4 < 2).then_some(MS), MS * 10_000), None);
    }

    #[test]
    fn a_stall_of_our_own_does_not_kill_the_peer() {
        let start = Instant::now();
        let mut state = Liveness::new(RHYTHM, start);
        assert_eq!(state.poll(start), Action::Ping(1));
        // Five seconds pass without our being scheduled.
        assert_eq!(state.poll(start + MS * 5_000), Action::Ping(2));
        assert!(matches!(state.poll(start + MS * 5_000), Action::Wait(_)));
        assert!(state.pong(2, start + MS * 5_001).is_some());
    }

    #[test]
    fn overdue_pongs_make_a_peer_suspect_before_it_is_dead() {
        let start = Instant::now();
        let mut state = Liveness::new(RHYTHM, start);
        state.poll(start);
        assert!(!state.is_suspect(start + MS * 150));
        assert!(state.is_suspect(start + MS * 250));
        state.pong(1, start + MS * 260);
        assert!(!state.is_suspect(start + MS * 300));
    }

    #[test]
    fn packets_bear_with_late_pongs_but_not_for_ever() {
        let start = Instant::now();
        let mut state = Liveness::new(RHYTHM, start);
        let died = (0..10_000).find(|ms| {
            let now = start + MS * *ms;
            state.sign(now);
            let mut dead = false;
            loop {
                match state.poll(now) {
                    Action::Ping(_) => {}
                    Action::Wait(_) => break,
                    Action::Dead => {
                        dead = true;
                        break;
                    }
                }
            }
            dead
        });
        assert_eq!(died, Some(2_000));
    }

    #[test]
    fn a_forged_pong_proves_nothing() {
        let start = Instant::now();
        let mut state = Liveness::new(RHYTHM, start);
        state.poll(start);
        assert_eq!(state.pong(7, start), None);
        assert_eq!(state.pong(1, start + MS), Some(MS));
        assert_eq!(state.pong(1, start + MS), None);
    }
}
