//! The availability feed: what one gateway's outbox says makes another's table the same, in as few words as promised; and
//! whatever a hostile peer says, memory stays bounded and nothing is known that nobody exports.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use isthmus_api::proto::tunnel::v1::{AvailabilityUpdate, ControlFrame, control_frame::Kind};
use isthmus_model::{availability::Availability, ids::ServiceName};

use super::Input;
use crate::{
    frame::{self, Decoder, MAX_CONTROL},
    observed::Observed,
    testkit::{cluster, federation, service_name},
    tunnel::{
        inbox::Word,
        outbox::{MIN_INTERVAL, Outbox, Table},
        registry::Evidence,
    },
    view::View,
};

/// Even first byte: a hostile peer's control stream. Odd: what happens to a table, and when.
pub fn availability(data: &[u8]) {
    let mut input = Input(data);
    if input.byte() % 2 == 0 { hostile(input) } else { Feed::new().play(input) }
}

/// Limit, then the stream.
fn hostile(mut input: Input<'_>) {
    let max = usize::from(input.byte());
    let mut decoder = Decoder::new(MAX_CONTROL);
    decoder.push(input.0);
    let view = View { global: Some(federation(&["east", "west"]).into()), ..View::default() };
    let observed = Observed::new(cluster("east"));
    let mut table = Table::new();
    let mut reachable = true;
    while let Ok(Some(ControlFrame { kind })) = decoder.next() {
        match kind {
            Some(Kind::Availability(update)) => {
                let before = table.clone();
                let accepted = Word::try_from(update).is_ok_and(|word| word.apply(&mut table, max));
                assert!(accepted || table == before, "a word that is refused changes nothing");
                assert!(table.len() <= max, "{} services, {max} allowed", table.len());
            }
            // Any other frame stands for a tunnel that is lost, or back.
            _ => reachable = !reachable,
        }
        let evidence = Evidence { reachable, tried: true, table: table.clone() };
        observed.refresh(&cluster("west"), &view, || Some(evidence));
        let known = observed.report();
        assert!(known.len() <= 1, "one service is exported, {} are known", known.len());
        assert!(known.iter().all(|report| report.service == service_name() && report.cluster == cluster("west")));
    }
}

/// A sender, a connection and a receiver.
struct Feed {
    current: Table,
    outbox: Outbox,
    now: Instant,
    /// Each service's last mention on this connection.
    mentioned: BTreeMap<ServiceName, Instant>,
    began: bool,
    decoder: Decoder,
    heard: Table,
}

impl Feed {
    fn new() -> Self {
        Self {
            current: Table::new(),
            outbox: Outbox::default(),
            now: Instant::now(),
            mentioned: BTreeMap::new(),
            began: false,
            decoder: Decoder::new(MAX_CONTROL),
            heard: Table::new(),
        }
    }

    fn play(mut self, mut input: Input<'_>) {
        while !input.is_empty() {
            match input.byte() % 8 {
                0 | 1 => {
                    let service = service(input.byte().into());
                    self.current.insert(service, word(&mut input));
                }
                2 => drop(self.current.remove(&service(input.byte().into()))),
                3 => {
                    // More than one update holds.
                    let (first, count) = (usize::from(input.byte()), usize::from(input.short()) % 600);
                    let word = word(&mut input);
                    self.current.extend((first..first + count).map(|i| (service(i), word)));
                }
                4 => self.current.clear(),
                5 => self.now += Duration::from_millis(input.byte().into()),
                6 => self.poll(),
                // The connection is lost and comes back; the last word outlives it.
                _ => {
                    self.outbox = Outbox::default();
                    self.mentioned.clear();
                    self.began = false;
                    self.decoder = Decoder::new(MAX_CONTROL);
                }
            }
        }
        self.poll();
        self.now += MIN_INTERVAL;
        self.poll();
        self.agree("the last state always arrives");
        let (more, wait) = self.outbox.poll(&self.current, self.now);
        assert!(more.is_empty() && wait.is_none(), "there is nothing left to say");
    }

    fn poll(&mut self) {
        let (updates, wait) = self.outbox.poll(&self.current, self.now);
        for update in updates {
            assert_eq!(update.snapshot, !std::mem::replace(&mut self.began, true), "one snapshot, and first");
            self.mention(&update);
            let frame = ControlFrame { kind: Some(Kind::Availability(update)) };
            self.decoder.push(&frame::encode(&frame).expect("every update fits a frame"));
            let came = self.decoder.next::<ControlFrame>().expect("readable").expect("whole");
            let Some(Kind::Availability(update)) = came.kind else { panic!("another frame: {came:?}") };
            let word = Word::try_from(update).expect("what we say is acceptable");
            // Never more than it has itself, or had.
            assert!(word.apply(&mut self.heard, LIMIT), "the receiver's limit is the sender's");
        }
        match wait {
            None => self.agree("all is said when nothing waits"),
            Some(at) => assert!(at > self.now && at <= self.now + MIN_INTERVAL, "it waits an interval at most"),
        }
    }

    fn agree(&self, why: &str) {
        let differs = |(s, word): &(&ServiceName, &Availability)| self.heard.get(*s) != Some(*word);
        let missing = self.current.iter().find(differs);
        let left = self.heard.keys().find(|s| !self.current.contains_key(*s));
        assert!(missing.is_none() && left.is_none(), "{why}: not heard {missing:?}, still there {left:?}");
    }

    fn mention(&mut self, update: &AvailabilityUpdate) {
        let services = update.services.iter().filter_map(|entry| entry.service.clone());
        for service in services.chain(update.removed.iter().cloned()) {
            let service = ServiceName::try_from(service).expect("a name");
            let before = self.mentioned.insert(service.clone(), self.now);
            assert!(
                before.is_none_or(|at| at + MIN_INTERVAL <= self.now),
                "{service} was mentioned twice in an interval"
            );
        }
    }
}

/// All that [`service`] can name in a play.
const LIMIT: usize = 256 + 600;

fn service(i: usize) -> ServiceName {
    ServiceName::new("shop", &format!("s-{i}")).expect("a name")
}

fn word(input: &mut Input<'_>) -> Availability {
    let (ready, total) = (input.byte(), input.byte());
    Availability { ready: ready.min(total), total, reachable: true }
}
