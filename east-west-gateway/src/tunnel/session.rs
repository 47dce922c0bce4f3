//! The rules of one link's control stream. Sans-IO: `(state, event, now) → what to send, what was told, when to ask again`.
//!
//! Both ends run the same rules: each probes the other, tells what its own cluster can serve, how full it is, and that it
//! drains. Frames come whole and in order; what does not belong ends the link with [`Close::Protocol`].

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use isthmus_api::proto::tunnel::v1::{ControlFrame, Goaway, Offers, Ping, control_frame::Kind};

use super::{
    Close,
    inbox::Word,
    liveness::{Action, Liveness},
    outbox::{Outbox, Table},
};

pub(crate) use super::liveness::Rhythm;

/// What this end has to say, as of now.
#[derive(Debug)]
pub(crate) struct Own<'a> {
    /// What its cluster can serve; another one if anything of it has changed.
    pub(crate) table: &'a Arc<Table>,
    /// It takes nothing new.
    pub(crate) draining: bool,
    /// If so: a gateway of its name goes on.
    pub(crate) succeeded: bool,
    /// Connections that it would like to be offered (TCP).
    pub(crate) offers: u32,
    /// Packets, or pieces of streams, that have come from the peer so far.
    pub(crate) packets: u64,
}

/// What the peer has said that somebody must act on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// A probe came back: the smoothed round-trip time, and how full the peer is.
    Alive {
        /// Round trip.
        rtt: Duration,
        /// The peer's load.
        load_permille: u32,
    },
    /// It drains.
    Goaway {
        /// A gateway of its name goes on, where it is dialled.
        successor: bool,
    },
    /// What its cluster can serve.
    Availability(Word),
    /// It would like so many connections on offer (TCP).
    Offers(u32),
    /// It ends the link (TCP).
    Closing(String),
}

/// The state of one control stream, after the hellos.
#[derive(Debug)]
pub(crate) struct Session {
    liveness: Liveness,
    outbox: Outbox,
    /// The table that the outbox has gone through, and when it must again although that has not changed: so that a peer's
    /// frames, however many, cost nothing that grows with the services.
    followed: Option<Arc<Table>>,
    again: Option<Instant>,
    told_draining: bool,
    told_offers: u32,
    seen_packets: u64,
}

/// What a frame leads to.
#[derive(Debug, Default)]
pub(crate) struct Response {
    /// To be sent at once.
    pub(crate) reply: Option<Kind>,
    /// To be acted on.
    pub(crate) told: Option<Told>,
}

impl Session {
    /// Begins at `now`, as if the peer had just answered.
    pub(crate) fn new(rhythm: Rhythm, now: Instant) -> Self {
        Self {
            liveness: Liveness::new(rhythm, now),
            outbox: Outbox::default(),
            followed: None,
            again: None,
            told_draining: false,
            told_offers: 0,
            seen_packets: 0,
        }
    }

    /// What is to be sent at `now`, and when to ask again at the latest. Fails when the peer is dead.
    pub(crate) fn poll(&mut self, own: &Own<'_>, now: Instant) -> Result<(Vec<Kind>, Instant), Close> {
        let mut out = Vec::new();
        if own.packets > self.seen_packets {
            self.seen_packets = own.packets;
            self.liveness.sign(now);
        }
        let wake = loop {
            match self.liveness.poll(now) {
                Action::Ping(sequence) => out.push(Kind::Ping(Ping { sequence, load_permille: 0 })),
                Action::Wait(until) => break until,
                Action::Dead => return Err(Close::Dead),
            }
        };
        if own.draining && !self.told_draining {
            self.told_draining = true;
            out.push(Kind::Goaway(Goaway { successor: own.succeeded }));
        }
        if own.offers != self.told_offers {
            self.told_offers = own.offers;
            out.push(Kind::Offers(Offers { connections: own.offers }));
        }
        let changed = self.followed.as_ref().is_none_or(|followed| !Arc::ptr_eq(followed, own.table));
        if changed || self.again.is_some_and(|again| again <= now) {
            let (updates, again) = self.outbox.poll(own.table, now);
            out.extend(updates.into_iter().map(Kind::Availability));
            self.again = again;
            self.followed = Some(own.table.clone());
        }
        Ok((out, self.again.map_or(wake, |again| wake.min(again))))
    }

    /// What tells that the peer is dead, in words.
    pub(crate) fn evidence(&self, now: Instant) -> String {
        self.liveness.evidence(now)
    }

    /// The peer's answers are overdue.
    pub(crate) fn is_suspect(&self, now: Instant) -> bool {
        self.liveness.is_suspect(now)
    }

    /// A frame came at `now`.
    pub(crate) fn heard(&mut self, frame: ControlFrame, load_permille: u32, now: Instant) -> Result<Response, Close> {
        let reply = |kind| Ok(Response { reply: Some(kind), told: None });
        let told = |told| Ok(Response { reply: None, told: Some(told) });
        match frame.kind {
            Some(Kind::Ping(ping)) => reply(Kind::Pong(Ping { sequence: ping.sequence, load_permille })),
            Some(Kind::Pong(pong)) => match self.liveness.pong(pong.sequence, now) {
                Some(rtt) => told(Told::Alive { rtt, load_permille: pong.load_permille }),
                None => Ok(Response::default()),
            },
            Some(Kind::Goaway(Goaway { successor })) => told(Told::Goaway { successor }),
            Some(Kind::Availability(update)) => {
                told(Told::Availability(Word::try_from(update).map_err(|_| Close::Protocol)?))
            }
            Some(Kind::Offers(offers)) => told(Told::Offers(offers.connections)),
            Some(Kind::Closing(closing)) => told(Told::Closing(closing.reason.chars().take(200).collect())),
            // A newer peer's frame of a kind we do not know.
            None => Ok(Response::default()),
            Some(Kind::Hello(_)) => Err(Close::Protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_model::availability::Availability;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const RHYTHM: Rhythm = Rhythm { interval: Duration::from_millis(100), dead_after: Duration::from_millis(400) };

    fn own(table: &Arc<Table>) -> Own<'_> {
        Own { table, draining: false, succeeded: false, offers: 0, packets: 0 }
    }

    #[test]
    fn it_begins_with_a_probe_and_a_snapshot() {
        let now = Instant::now();
        let (out, wake) = Session::new(RHYTHM, now).poll(&own(&Arc::default()), now).unwrap();
        assert!(matches!(out.as_slice(), [Kind::Ping(_), Kind::Availability(first)] if first.snapshot), "{out:?}");
        assert_eq!(wake, now + RHYTHM.interval);
    }

    #[test]
    fn that_it_drains_is_said_once() {
        let now = Instant::now();
        let mut session = Session::new(RHYTHM, now);
        let table = Arc::default();
        let mut said = 0;
        for i in 0..3 {
            let (out, _) = session.poll(&Own { draining: true, ..own(&table) }, now + MS * i).unwrap();
            said += out.iter().filter(|kind| matches!(kind, Kind::Goaway(_))).count();
        }
        assert_eq!(said, 1);
    }

    #[test]
    fn a_change_that_had_to_wait_goes_out_in_time_although_the_table_stays_the_same() {
        let start = Instant::now();
        let mut session = Session::new(RHYTHM, start);
        let table = |ready| {
            let availability = Availability { ready, total: 3, reachable: true };
            Arc::new(Table::from([(crate::testkit::service_name(), availability)]))
        };
        let mut said = |table: &Arc<Table>, at: Duration| {
            let (out, wake) = session.poll(&own(table), start + at).unwrap();
            let updates = out.into_iter().filter_map(|kind| match kind {
                Kind::Availability(update) => update.services.first().map(|service| service.ready),
                _ => None,
            });
            (updates.collect::<Vec<_>>(), wake - start)
        };
        let (one, two) = (table(1), table(2));
        assert_eq!(said(&one, MS * 30).0, vec![1]);
        // At most one mention in 100 ms.
        assert_eq!(said(&two, MS * 50), (Vec::<u32>::new(), MS * 130));
        for ms in 51..130 {
            assert!(said(&two, MS * ms).0.is_empty(), "{ms}");
        }
        assert_eq!(said(&two, MS * 130).0, vec![2]);
        assert!(said(&two, MS * 300).0.is_empty());
    }

    #[test]
    fn a_pong_tells_the_load() {
        let now = Instant::now();
        let mut session = Session::new(RHYTHM, now);
        session.poll(&own(&Arc::default()), now).unwrap();
        let pong = Some(Kind::Pong(Ping { sequence: 1, load_permille: 700 }));
        let response = session.heard(ControlFrame { kind: pong }, 0, now + MS * 5).unwrap();
        assert_eq!(response.told, Some(Told::Alive { rtt: MS * 5, load_permille: 700 }));
    }

    #[test]
    fn silence_is_death() {
        let now = Instant::now();
        let mut session = Session::new(RHYTHM, now);
        let table = Arc::default();
        let died = (0..1_000).find(|i| session.poll(&own(&table), now + MS * *i).is_err());
        assert!((400..=500).contains(&died.unwrap()), "{died:?}");
    }

    #[test]
    fn a_second_hello_and_a_false_name_end_the_link() {
        use isthmus_api::proto::{
            common::v1::ServiceName,
            tunnel::v1::{AvailabilityUpdate, ControlHello},
        };
        let now = Instant::now();
        let mut session = Session::new(RHYTHM, now);
        let hello = Some(Kind::Hello(ControlHello::default()));
        assert_eq!(session.heard(ControlFrame { kind: hello }, 0, now).unwrap_err(), Close::Protocol);
        let removed = vec![ServiceName { namespace: "No Such".into(), name: "x".into() }];
        let update = Some(Kind::Availability(AvailabilityUpdate { removed, ..Default::default() }));
        assert_eq!(session.heard(ControlFrame { kind: update }, 0, now).unwrap_err(), Close::Protocol);
    }
}
