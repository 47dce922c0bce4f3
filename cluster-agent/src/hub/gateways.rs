//! The feeds of one gateway's name, and which of them counts. Pure.
//!
//! Usually there is one. There are two while a successor starts beside the process that it takes over from, and for a
//! moment after a connection broke that this end has not found dead yet. What holds: the newest says what the name stands
//! for (its addresses, whether it drains), and nothing that an older one says, or how it ends, changes that. If the newest
//! ends while another process of the name lives on, that one counts again: a failed upgrade takes no gateway away. What
//! feeds know of other clusters counts side by side, except of older ones that drain. A new feed of the same process
//! replaces the one before.

use isthmus_model::{availability::Report, time::Timestamp};

use super::{reports::Said, state::Session};
use crate::view::LocalGateway;

/// Feeds of one name at one time; with one more, the oldest does not count any longer.
const MAX_FEEDS: usize = 4;

/// How a gateway begins its feed.
#[derive(Clone, Debug)]
pub struct Hello {
    /// As it registers.
    pub gateway: LocalGateway,
    /// Tells a process from another of the same name; empty if it does not say.
    pub instance: String,
}

/// By age, the newest last.
#[derive(Debug, Default)]
pub struct GatewayFeeds {
    feeds: Vec<Feed>,
}

#[derive(Debug)]
struct Feed {
    session: Session,
    hello: Hello,
    said: Said,
}

impl GatewayFeeds {
    /// A feed begins, unless a newer one has already. What was reported last stands until it reports itself.
    pub fn begin(&mut self, session: Session, hello: Hello) {
        let newest = self.feeds.last();
        if newest.is_some_and(|f| f.session > session) {
            return;
        }
        let reports = newest.map(|f| f.said.reports.clone()).unwrap_or_default();
        let replaced = |f: &Feed| {
            let unknown = f.hello.instance.is_empty() || hello.instance.is_empty();
            f.said.silent_since.is_some() || unknown || f.hello.instance == hello.instance
        };
        self.feeds.retain(|f| !replaced(f));
        if self.feeds.len() >= MAX_FEEDS {
            self.feeds.remove(0);
        }
        self.feeds.push(Feed { session, hello, said: Said { reports, silent_since: None } });
    }

    /// All that it knows of other clusters. False if the feed does not count any longer, as in what follows.
    pub fn report(&mut self, session: Session, reports: Vec<Report>) -> bool {
        self.find(session).map(|feed| feed.said.reports = reports).is_some()
    }

    /// It takes no new traffic.
    pub fn drain(&mut self, session: Session) -> bool {
        self.find(session).map(|feed| feed.hello.gateway.draining = true).is_some()
    }

    /// It ended in order: on purpose.
    pub fn leave(&mut self, session: Session, now: Timestamp) -> bool {
        self.drain(session) && self.lose(session, now)
    }

    /// It broke.
    pub fn lose(&mut self, session: Session, now: Timestamp) -> bool {
        if self.feeds.len() > 1 {
            let before = self.feeds.len();
            self.feeds.retain(|f| f.session != session);
            return self.feeds.len() < before;
        }
        self.find(session).map(|feed| feed.said.silent_since = Some(now)).is_some()
    }

    /// What the name stands for.
    pub fn current(&self) -> Option<&LocalGateway> {
        self.feeds.last().map(|feed| &feed.hello.gateway)
    }

    /// Somebody can be heard.
    pub fn is_connected(&self) -> bool {
        self.feeds.iter().any(|feed| feed.said.silent_since.is_none())
    }

    /// All that counts.
    pub fn said(&self) -> impl Iterator<Item = &Said> {
        let newest = self.feeds.last().map(|feed| feed.session);
        let counts = move |f: &&Feed| !f.hello.gateway.draining || Some(f.session) == newest;
        self.feeds.iter().filter(counts).map(|feed| &feed.said)
    }

    fn find(&mut self, session: Session) -> Option<&mut Feed> {
        self.feeds.iter_mut().find(|feed| feed.session == session)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use isthmus_model::{availability::Availability, local};
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp(1_000);

    fn hello(instance: &str) -> Hello {
        let hello = local::LocalGateway {
            name: "gateway-1".to_owned(),
            tunnel: None,
            local_ip: "127.1.1.11".parse().unwrap(),
            auto_port: 15440,
            pinned_port_base: 15500,
        };
        Hello { gateway: LocalGateway { hello, draining: false }, instance: instance.to_owned() }
    }

    fn report(ready: u8) -> Vec<Report> {
        let (service, cluster) = ("shop/cart".parse().unwrap(), "us-west".parse().unwrap());
        vec![Report {
            service,
            cluster,
            current: Availability { ready, total: 9, reachable: true },
            recovered_at: None,
        }]
    }

    fn ready(feeds: &GatewayFeeds) -> Vec<u8> {
        feeds.said().flat_map(|s| &s.reports).map(|r| r.current.ready).collect()
    }

    fn drains(feeds: &GatewayFeeds) -> bool {
        feeds.current().unwrap().draining
    }

    #[test]
    fn a_predecessors_end_and_drain_do_not_touch_its_successor() {
        for end in [GatewayFeeds::leave, GatewayFeeds::lose] {
            let mut feeds = GatewayFeeds::default();
            feeds.begin(1, hello("old"));
            feeds.report(1, report(2));
            feeds.begin(2, hello("new"));
            assert_eq!(ready(&feeds), [2, 2], "the successor starts from what is known");
            feeds.report(2, report(1));
            assert_eq!(ready(&feeds), [2, 1], "both reach the far side");
            assert!(feeds.drain(1) && !drains(&feeds));
            assert_eq!(ready(&feeds), [1], "what drains is soon gone");
            assert!(end(&mut feeds, 1, NOW) && !drains(&feeds) && feeds.is_connected());
            assert_eq!(ready(&feeds), [1]);
            assert!(!feeds.report(1, report(9)) && !feeds.drain(1), "it counts no longer");
        }
    }

    #[test]
    fn an_upgrade_that_fails_leaves_the_predecessor_in_place() {
        for end in [GatewayFeeds::leave, GatewayFeeds::lose] {
            let mut feeds = GatewayFeeds::default();
            feeds.begin(1, hello("old"));
            feeds.begin(2, hello("new"));
            assert!(end(&mut feeds, 2, NOW) && !drains(&feeds) && feeds.is_connected());
            assert!(feeds.drain(1) && drains(&feeds), "and now its own word counts");
        }
    }

    #[test]
    fn a_process_that_connects_again_leaves_no_feed_behind_that_could_count_for_it() {
        for (first, second) in [("a", "a"), ("", "a"), ("a", ""), ("", "")] {
            let mut feeds = GatewayFeeds::default();
            feeds.begin(1, hello(first));
            feeds.begin(2, hello(second));
            assert!(!feeds.lose(1, NOW), "{first:?} {second:?}");
            assert!(feeds.leave(2, NOW) && drains(&feeds) && !feeds.is_connected(), "{first:?} {second:?}");
        }
    }

    #[test]
    fn an_older_feed_that_comes_late_is_not_taken_and_feeds_are_bounded() {
        let mut feeds = GatewayFeeds::default();
        feeds.begin(5, hello("new"));
        feeds.begin(1, hello("old"));
        assert!(!feeds.drain(1));
        for session in 6..100 {
            feeds.begin(session, hello(&session.to_string()));
        }
        assert_eq!(feeds.feeds.len(), MAX_FEEDS);
    }

    proptest! {
        /// Whatever happens to older feeds: the newest that lives decides, and the name drains only if that one does.
        #[test]
        fn the_newest_living_process_decides(events in proptest::collection::vec((0..4u8, 0..6u64), 1..40)) {
            let mut feeds = GatewayFeeds::default();
            // Living feeds by age, and whether they drain.
            let mut living: BTreeMap<Session, bool> = BTreeMap::new();
            for (session, (event, which)) in (10..).zip(events) {
                let chosen = living.keys().copied().nth(usize::try_from(which).unwrap());
                match (event, chosen) {
                    (0, _) if living.len() < MAX_FEEDS => {
                        feeds.begin(session, hello(&session.to_string()));
                        living.insert(session, false);
                    }
                    (1, Some(s)) => {
                        prop_assert!(feeds.drain(s));
                        living.insert(s, true);
                    }
                    (2, Some(s)) => {
                        prop_assert!(feeds.leave(s, NOW));
                        living.remove(&s);
                    }
                    (3, Some(s)) => {
                        prop_assert!(feeds.lose(s, NOW));
                        living.remove(&s);
                    }
                    _ => {}
                }
                prop_assert_eq!(feeds.is_connected(), !living.is_empty());
                if let Some((_, draining)) = living.last_key_value() {
                    prop_assert_eq!(drains(&feeds), *draining);
                }
            }
        }
    }
}
