//! The control streams of one link over TCP, both ends, over pipes that keep the order and are late as a seed says: whole
//! links need a kernel for that, the rules of the conversation do not. No clock but the story's.
//!
//! What must hold: what one end wants offered, and what it can serve, is in the end what the other has heard, whatever came
//! in between; that it drains is heard once, with the word on its successor; a pipe that stalls for less than the limit is
//! no death, and one that loses everything is, at both ends, in time.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_api::proto::tunnel::v1::{ControlFrame, control_frame::Kind};
use isthmus_model::{availability::Availability, ids::ServiceName};

use super::net::Random;
use crate::tunnel::{
    Close,
    inbox::MAX_SERVICES,
    outbox::Table,
    session::{Own, Rhythm, Session, Told},
};

const MS: Duration = Duration::from_millis(1);
/// As links over TCP have it.
const RHYTHM: Rhythm = Rhythm { interval: Duration::from_millis(100), dead_after: Duration::from_millis(800) };
/// Up to this, each frame its own, and more for those that a stall meets: a round trip stays below the limit.
const DELAY: u64 = 50;
const STALL: u64 = 250;
/// Changes come until then, and what was said last must be heard a while later.
const BUSY: u64 = 3_000;
const QUIET: u64 = 1_500;
const SEEDS: u64 = 200;

/// One end: what it would say, and what it has heard.
struct End {
    session: Session,
    /// When it turns next without a cause.
    wake: Instant,
    table: Arc<Table>,
    offers: u32,
    drains: Option<bool>,
    heard: Table,
    heard_offers: u32,
    goaways: Vec<bool>,
    /// What is on the way to it.
    pipe: VecDeque<(Instant, Kind)>,
}

impl End {
    fn new(now: Instant) -> Self {
        Self {
            session: Session::new(RHYTHM, now),
            wake: now,
            table: Arc::default(),
            offers: 0,
            drains: None,
            heard: Table::new(),
            heard_offers: 0,
            goaways: Vec::new(),
            pipe: VecDeque::new(),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.wake <= now || self.pipe.front().is_some_and(|(at, _)| *at <= now)
    }

    /// Takes what has come, and says what is due.
    fn turn(&mut self, now: Instant) -> Result<Vec<Kind>, Close> {
        let mut out = Vec::new();
        while self.pipe.front().is_some_and(|(at, _)| *at <= now) {
            let kind = self.pipe.pop_front().map(|(_, kind)| kind);
            let response = self.session.heard(ControlFrame { kind }, 0, now)?;
            out.extend(response.reply);
            match response.told {
                Some(Told::Availability(word)) => assert!(word.apply(&mut self.heard, MAX_SERVICES)),
                Some(Told::Offers(connections)) => self.heard_offers = connections,
                Some(Told::Goaway { successor }) => self.goaways.push(successor),
                Some(Told::Alive { .. } | Told::Closing(_)) | None => {}
            }
        }
        let own = Own {
            table: &self.table,
            draining: self.drains.is_some(),
            succeeded: self.drains == Some(true),
            offers: self.offers,
            packets: 0,
        };
        let (frames, wake) = self.session.poll(&own, now)?;
        assert!(wake > now, "it would turn for ever");
        self.wake = wake;
        out.extend(frames);
        Ok(out)
    }

    /// Something of its own changes at `now`. A change of the table is a cause to turn; other connections on offer can wait.
    fn change(&mut self, random: &mut Random, now: Instant) {
        let service = ServiceName::new("shop", &format!("s{}", random.below(5))).unwrap();
        match random.below(4) {
            1 => self.offers = u32::try_from(random.below(5)).unwrap(),
            0 => {
                Arc::make_mut(&mut self.table).remove(&service);
                self.wake = now;
            }
            _ => {
                let ready = u8::try_from(random.below(3)).unwrap();
                Arc::make_mut(&mut self.table).insert(service, Availability { ready, total: 3, reachable: true });
                self.wake = now;
            }
        }
    }
}

/// A seed's story. From `severed` on nothing arrives at the second end. Gives both ends, or when they found the link dead.
fn play(seed: u64, severed: Option<u64>) -> Result<[End; 2], [Option<u64>; 2]> {
    let mut random = Random(seed);
    let begin = Instant::now();
    let mut ends = [End::new(begin), End::new(begin)];
    let drains_at = [random.below(BUSY * 2), random.below(BUSY * 2)];
    let mut stalled_until = [begin; 2];
    let mut died = [None; 2];
    for ms in 0..BUSY + QUIET {
        let now = begin + MS * u32::try_from(ms).unwrap();
        for i in 0..2 {
            if died[i].is_some() {
                continue;
            }
            if ms < BUSY && random.below(20) == 0 {
                ends[i].change(&mut random, now);
            }
            if ms < BUSY && drains_at[i] == ms {
                (ends[i].drains, ends[i].wake) = (Some(random.below(2) == 0), now);
            }
            if random.below(500) == 0 {
                stalled_until[i] = now + MS * u32::try_from(random.below(STALL)).unwrap();
            }
            if !ends[i].is_due(now) {
                continue;
            }
            match ends[i].turn(now) {
                Ok(frames) => {
                    let to = &mut ends[1 - i].pipe;
                    for kind in frames {
                        let late = now + MS * u32::try_from(random.below(DELAY)).unwrap();
                        let before = to.back().map_or(now, |(at, _)| *at);
                        if !(i == 0 && severed.is_some_and(|at| ms >= at)) {
                            to.push_back((late.max(before).max(stalled_until[i]), kind));
                        }
                    }
                }
                Err(why) => {
                    assert_eq!(why, Close::Dead, "seed {seed}");
                    died[i] = Some(ms);
                }
            }
        }
    }
    if died == [None, None] { Ok(ends) } else { Err(died) }
}

#[test]
fn the_last_word_is_heard_however_late_the_pipes_are() {
    let (mut drained, mut offered) = (0, 0);
    for seed in 1..=SEEDS {
        let ends = play(seed, None).unwrap_or_else(|died| panic!("seed {seed}: dead at {died:?} ms"));
        for (own, other) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
            assert_eq!(other.heard_offers, own.offers, "seed {seed}");
            assert_eq!(other.heard, *own.table, "seed {seed}");
            assert_eq!(other.goaways, Vec::from_iter(own.drains), "seed {seed}");
            drained += usize::from(own.drains.is_some());
            offered += usize::from(own.offers > 0);
        }
    }
    assert!(drained > 0 && offered > 0, "the stories must be able to go either way");
}

#[test]
fn a_pipe_that_loses_everything_is_death_to_both_ends_in_time() {
    for seed in 1..=SEEDS {
        let severed = 500 + seed * 5;
        let died = play(seed, Some(severed)).err().unwrap_or_else(|| panic!("seed {seed}: not noticed"));
        let limit = u64::try_from((RHYTHM.dead_after + RHYTHM.interval).as_millis()).unwrap() + 2 * (DELAY + STALL);
        for ms in died {
            let ms = ms.unwrap_or_else(|| panic!("seed {seed}: one end has not noticed"));
            assert!((severed..=severed + limit).contains(&ms), "seed {seed}: severed at {severed}, noticed at {ms}");
        }
    }
}
